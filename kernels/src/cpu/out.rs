//! An output that tasks write at the same time, each its own part.

use std::marker::PhantomData;
use std::ops::Range;

/// A slice whose disjoint parts are written by several tasks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Out<'a> {
    at: *mut f32,
    len: usize,
    slice: PhantomData<&'a mut [f32]>,
}

// SAFETY: tasks write disjoint parts, see `Out::part`.
unsafe impl Send for Out<'_> {}
// SAFETY: as above.
unsafe impl Sync for Out<'_> {}

impl<'a> Out<'a> {
    pub(crate) fn new(out: &'a mut [f32]) -> Self {
        Self { at: out.as_mut_ptr(), len: out.len(), slice: PhantomData }
    }

    /// # Safety
    /// Nobody else may use the range while the result lives.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(self, range: Range<usize>) -> &'a mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len, "inside the output");
        // SAFETY: the range lies inside the slice that `at` was made from, which is borrowed for 'a, and is one task's.
        unsafe { std::slice::from_raw_parts_mut(self.at.wrapping_add(range.start), range.len()) }
    }
}
