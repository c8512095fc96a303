//! Copies of whole blocks of the KV arena: for copy-on-write, and to and from the host's memory.

#[cfg(feature = "cuda")]
pub use launch::BlockPairs;
#[cfg(feature = "cuda")]
pub(super) use launch::MODULE;

/// The meaning of the kernel: `arena` is [blocks, block_len]; each pair is (from, to). Pairs of one call name no block twice as
/// `to` and none as `from` that another has as `to`; a pair with a block that is not there is left out.
pub fn copy_blocks_reference<T: Copy>(arena: &mut [T], block_len: usize, pairs: &[(u32, u32)]) {
    let blocks = arena.len() / block_len;
    for (from, to) in pairs.iter().map(|(from, to)| (*from as usize, *to as usize)) {
        if from < blocks && to < blocks {
            arena.copy_within(from * block_len..(from + 1) * block_len, to * block_len);
        }
    }
}

#[cfg(feature = "cuda")]
mod launch {
    use std::ops::Range;

    use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr, PinnedHostSlice};

    use crate::cuda::beside::Grid;
    use crate::cuda::device::Module;
    use crate::cuda::launch::{THREADS, at_least, below, launched};
    use crate::cuda::{Arena, Kernels, LaunchError};

    pub(in crate::cuda) const MODULE: Module = Module {
        image: include_bytes!(concat!(env!("OUT_DIR"), "/copy_blocks.fatbin")),
        functions: &["copy_blocks"],
        most_shared: 0,
    };

    /// 16-byte pieces that a thread copies, as in the kernel.
    const PIECES: u32 = 4;
    /// Blocks a grid has in its second dimension at most.
    const MOST_PAIRS: u32 = 65_535;

    /// Pairs (from, to) in device memory, of which the first `count` count.
    #[derive(Debug)]
    pub struct BlockPairs<'a> {
        pub pairs: &'a CudaSlice<u32>,
        pub count: u32,
    }

    /// The kernel's argument, field by field.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    struct Argument {
        arena: u64,
        pairs: u64,
        blocks: u32,
        width: u32,
    }

    impl<T: DeviceRepr> Arena<T> {
        /// Values of one block.
        pub fn block_len(&self) -> usize {
            self.values.len() / self.shape.blocks.max(1) as usize
        }

        fn block(&self, block: u32) -> Result<Range<usize>, LaunchError> {
            below("block", block, self.shape.blocks)?;
            let begin = block as usize * self.block_len();
            Ok(begin..begin + self.block_len())
        }
    }

    impl Kernels {
        /// Queues copies within the arena. What they mean, [`super::copy_blocks_reference`] says.
        ///
        /// # Errors
        /// When there are fewer pairs than counted, or too many.
        pub fn copy_blocks<T: DeviceRepr>(
            &self,
            arena: &mut Arena<T>,
            pairs: &BlockPairs<'_>,
        ) -> Result<(), LaunchError> {
            at_least("pairs", pairs.pairs.len(), 2 * pairs.count as usize)?;
            below("pairs", pairs.count, MOST_PAIRS + 1)?;
            if pairs.count == 0 {
                return Ok(());
            }
            let width = u32::try_from(arena.block_len() * size_of::<T>() / 16)
                .map_err(|_| LaunchError::Unsupported("blocks of 64 GiB".to_owned()))?;
            let argument = Argument {
                arena: arena.values.device_ptr_mut(self.stream()).0,
                pairs: pairs.pairs.device_ptr(self.stream()).0,
                blocks: arena.shape.blocks,
                width,
            };
            let grid = Grid::of([width.div_ceil(THREADS * PIECES), pairs.count], THREADS);
            let function = self.kernel("copy_blocks")?;
            // SAFETY: the argument is that of `copy_blocks` in copy_blocks.cu, which bounds both blocks of a pair and waits first.
            launched("copy_blocks", unsafe { grid.queue(self, function, &argument) })
        }

        /// Queues the copy of a block to pinned memory of the host, which must not be read nor dropped before the stream has come that far.
        ///
        /// # Errors
        /// When the block is not there or the memory is no block's.
        pub fn block_to_host<T: DeviceRepr>(
            &self,
            arena: &Arena<T>,
            block: u32,
            to: &mut PinnedHostSlice<T>,
        ) -> Result<(), LaunchError> {
            at_least("host memory", to.len(), arena.block_len())?;
            let from = arena.values.slice(arena.block(block)?);
            launched("copy a block to the host", self.stream().memcpy_dtoh(&from, to))
        }

        /// Queues the copy of a block from pinned memory of the host, which must not be written nor dropped before the stream has come that far.
        ///
        /// # Errors
        /// When the block is not there or the memory is no block's.
        pub fn block_from_host<T: DeviceRepr>(
            &self,
            arena: &mut Arena<T>,
            block: u32,
            from: &PinnedHostSlice<T>,
        ) -> Result<(), LaunchError> {
            at_least("host memory", arena.block_len(), from.len())?;
            let place = arena.block(block)?;
            let mut to = arena.values.slice_mut(place);
            launched("copy a block from the host", self.stream().memcpy_htod(from, &mut to))
        }
    }
}
