//! Memory for what every step reads: in large pages where the system has them, since a step that reads all weights would
//! otherwise look up tens of thousands of small ones.

use bytes::BytesMut;

use super::error::KernelError;

/// Memory that matrices are packed into, one behind the other.
#[derive(Debug, Default)]
pub struct Memory {
    rest: BytesMut,
}

impl Memory {
    /// Takes `bytes` bytes of zeros; resident page by page as they are written.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn new(bytes: usize) -> Result<Self, KernelError> {
        // Asked for first, so that too much is an error; then zeroed by the system, without touching a page.
        Vec::<u8>::new()
            .try_reserve_exact(bytes)
            .map_err(|_| KernelError::OutOfMemory { what: "weights", bytes })?;
        let mut rest = BytesMut::zeroed(bytes);
        want_large_pages(&mut rest);
        Ok(Self { rest })
    }

    /// The next `bytes` bytes; more than is left comes from elsewhere.
    pub(crate) fn take(&mut self, bytes: usize) -> Result<BytesMut, KernelError> {
        if bytes > self.rest.len() {
            return Ok(Self::new(bytes)?.rest);
        }
        Ok(self.rest.split_to(bytes))
    }
}

/// Asks the system for large pages. Where it has none, nothing changes.
pub(crate) fn want_large_pages<T>(memory: &mut [T]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let bytes = std::mem::size_of_val(memory);
        let first = memory.as_mut_ptr().cast::<u8>();
        let skipped = first.align_offset(PAGE);
        let whole = bytes.saturating_sub(skipped) / PAGE * PAGE;
        if whole > 0 {
            // SAFETY: whole pages inside the slice; the advice changes how they are backed and not what they hold.
            unsafe {
                libc::madvise(first.wrapping_add(skipped).cast(), whole, libc::MADV_HUGEPAGE)
            };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Asks for the cache line of an address that will be read soon.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint that reads nothing, harmless for any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_overlap_and_what_does_not_fit_comes_from_elsewhere() {
        let mut memory = Memory::new(10_000).unwrap();
        let (mut one, mut two) = (memory.take(6000).unwrap(), memory.take(4000).unwrap());
        one.fill(1);
        two.fill(2);
        let three = memory.take(9000).unwrap();
        assert!(one.iter().all(|byte| *byte == 1) && two.iter().all(|byte| *byte == 2));
        assert!(three.len() == 9000 && three.iter().all(|byte| *byte == 0));
        assert!(memory.take(usize::MAX / 2).is_err());
    }
}
