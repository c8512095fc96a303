//! What a kernel refuses.

/// A call whose lengths do not fit together, or that asks for too much.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    #[error("{what} has length {got}, wanted {wanted}")]
    Length { what: &'static str, wanted: usize, got: usize },
    #[error("{what} is {got}, wanted less than {limit}")]
    OutOfRange { what: &'static str, limit: usize, got: usize },
    #[error("the sizes of {0} overflow")]
    Overflow(&'static str),
    #[error("{bytes} bytes for {what} cannot be had")]
    OutOfMemory { what: &'static str, bytes: usize },
}

/// Checks a length.
pub(crate) fn expect_len(what: &'static str, got: usize, wanted: usize) -> Result<(), KernelError> {
    if got == wanted { Ok(()) } else { Err(KernelError::Length { what, wanted, got }) }
}

/// Checks an index.
pub(crate) fn expect_below(
    what: &'static str,
    got: usize,
    limit: usize,
) -> Result<(), KernelError> {
    if got < limit { Ok(()) } else { Err(KernelError::OutOfRange { what, limit, got }) }
}
