//! What every launch needs: checks of lengths, the kernel by its name.

use cudarc::driver::{CudaFunction, DriverError};

use super::{Kernels, LaunchError};
use crate::cpu::KernelError;

/// The names of kernels that there are for each pair of activations and of what K and V are stored as.
macro_rules! each_kv_dtype {
    ($name:literal: $($shape:literal)* $(; $($more:literal)*)?) => {
        &[
            $(
                concat!($name, "_bf16_", $shape),
                concat!($name, "_bf16_e4m3_", $shape),
                concat!($name, "_f16_", $shape),
                concat!($name, "_f16_e4m3_", $shape),
            )*
            $($($more),*)?
        ]
    };
}
pub(super) use each_kv_dtype;

/// Threads of a block where nothing speaks for another number.
pub(super) const THREADS: u32 = 256;
/// Numbers that a thread takes at once.
pub(super) const EIGHT: u32 = 8;

/// The length of an array.
pub(super) fn len(factors: &[u32]) -> usize {
    factors.iter().map(|factor| *factor as usize).fold(1, usize::saturating_mul)
}

pub(super) fn same(what: &'static str, got: usize, wanted: usize) -> Result<(), KernelError> {
    if got == wanted { Ok(()) } else { Err(KernelError::Length { what, wanted, got }) }
}

pub(super) fn at_least(what: &'static str, got: usize, wanted: usize) -> Result<(), KernelError> {
    if got >= wanted { Ok(()) } else { Err(KernelError::Length { what, wanted, got }) }
}

pub(super) fn below(what: &'static str, got: u32, limit: u32) -> Result<(), KernelError> {
    let (got, limit) = (got as usize, limit as usize);
    if got < limit { Ok(()) } else { Err(KernelError::OutOfRange { what, limit, got }) }
}

/// Rows are moved 16 bytes at a time.
pub(super) fn whole_eights(what: &'static str, width: u32) -> Result<(), LaunchError> {
    if width.is_multiple_of(EIGHT) && width > 0 {
        return Ok(());
    }
    Err(LaunchError::Unsupported(format!("{what} {width}: a multiple of {EIGHT} is wanted")))
}

/// What the driver said of a launch.
pub(super) fn launched<T>(
    what: &'static str,
    result: Result<T, DriverError>,
) -> Result<(), LaunchError> {
    result.map(drop).map_err(|source| LaunchError::Driver { what, source })
}

impl Kernels {
    /// A kernel, or that none was built.
    pub(super) fn kernel(&self, name: &str) -> Result<&CudaFunction, LaunchError> {
        self.function(name).ok_or_else(|| LaunchError::Unsupported(name.to_owned()))
    }
}
