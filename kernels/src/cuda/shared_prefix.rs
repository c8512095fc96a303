//! Decode attention to what sequences share: groups of consecutive sequences that begin with the same blocks, which are read once
//! for all of them. [`super::PagedDecode`] queues it before its own kernel, which adds what it leaves.

/// Which sequences share which first blocks, on the host: for references.
#[derive(Debug, Clone, Copy)]
pub struct SharedPrefixes<'a> {
    /// [groups + 1], ascending: the rows where groups begin. A group without rows is none.
    pub begins: &'a [u32],
    /// [groups], how many blocks a group shares: those of its first row's table count for all of its rows.
    pub blocks: &'a [u32],
}

impl SharedPrefixes<'_> {
    /// The tables as they are meant: rows of `width` blocks.
    pub fn spread(&self, tables: &[u32], width: u32) -> Vec<u32> {
        let (mut spread, width) = (tables.to_vec(), width as usize);
        for (ends, blocks) in self.begins.windows(2).zip(self.blocks) {
            let shared = width.min(*blocks as usize);
            let first = ends[0] as usize * width;
            for row in ends[0] as usize..ends[1] as usize {
                spread.copy_within(first..first + shared, row * width);
            }
        }
        spread
    }
}

#[cfg(feature = "cuda")]
pub use launch::PrefixInput;
#[cfg(feature = "cuda")]
pub(super) use launch::{MODULE, PrefixArgument, PrefixScratch};

#[cfg(feature = "cuda")]
mod launch {
    use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

    use crate::cpu::KernelError;
    use crate::cuda::attention::{AttentionArgument, tile_bytes};
    use crate::cuda::beside::Grid;
    use crate::cuda::device::Module;
    use crate::cuda::launch::{at_least, below, each_kv_dtype, launched, len, same};
    use crate::cuda::{
        Arena, ArenaShape, DecodeInput, DeviceError, Kernels, KvReal, LaunchError, PagedDecode,
        Real,
    };

    /// As in the kernel: rows of a unit, and threads of a block.
    const ROWS: u32 = 64;
    const THREADS: u32 = 128;
    /// Blocks of a multiprocessor.
    const BLOCKS: u32 = 2;
    /// Groups of a launch: their sums are in shared memory.
    const MOST_GROUPS: u32 = 4096;

    pub(in crate::cuda) const MODULE: Module = Module {
        image: include_bytes!(concat!(env!("OUT_DIR"), "/shared_prefix.fatbin")),
        functions: each_kv_dtype!(
            "shared_prefix": 64 96 128 256;
            "merge_prefixes_64" "merge_prefixes_96" "merge_prefixes_128" "merge_prefixes_256"
        ),
        most_shared: 99 << 10,
    };

    /// What sequences share, in device memory: as [`super::SharedPrefixes`].
    #[derive(Debug, Clone, Copy)]
    pub struct PrefixInput<'a> {
        pub begins: &'a CudaSlice<u32>,
        pub blocks: &'a CudaSlice<u32>,
    }

    /// What the launches keep between their blocks, and leave for decode attention.
    #[derive(Debug)]
    pub(in crate::cuda) struct PrefixScratch {
        parts: CudaSlice<f32>,
        across: CudaSlice<u32>,
        values: CudaSlice<f32>,
        sums: CudaSlice<f32>,
        lengths: CudaSlice<u32>,
    }

    /// `PrefixParts` in shared_prefix.cuh, field by field.
    #[repr(C)]
    #[derive(Debug, Clone, Copy, Default)]
    pub(in crate::cuda) struct PrefixArgument {
        values: u64,
        sums: u64,
        lengths: u64,
    }

    /// Numbers of the parts that the grid leaves: two of a block.
    fn parts(kernels: &Kernels, shape: &ArenaShape) -> usize {
        len(&[2 * BLOCKS, kernels.multiprocessors(), ROWS, shape.head_dim + 2])
    }

    impl PrefixScratch {
        pub(in crate::cuda) fn new(
            kernels: &Kernels,
            shape: ArenaShape,
            (sequences, heads): (u32, u32),
        ) -> Result<Self, DeviceError> {
            let rows = len(&[sequences, heads]);
            Ok(Self {
                parts: kernels.memory(parts(kernels, &shape))?,
                across: kernels.memory(rows * 2)?,
                values: kernels.memory(rows * shape.head_dim as usize)?,
                sums: kernels.memory(rows * 2)?,
                lengths: kernels.memory(sequences as usize)?,
            })
        }

        pub(in crate::cuda) fn argument(&mut self, kernels: &Kernels) -> PrefixArgument {
            let stream = kernels.stream();
            PrefixArgument {
                values: self.values.device_ptr_mut(stream).0,
                sums: self.sums.device_ptr_mut(stream).0,
                lengths: self.lengths.device_ptr_mut(stream).0,
            }
        }

        fn check(
            &self,
            kernels: &Kernels,
            decode: &PagedDecode,
            shape: &ArenaShape,
            prefixes: &PrefixInput<'_>,
        ) -> Result<u32, KernelError> {
            let rows = len(&[decode.sequences, decode.attention.heads]);
            let groups = u32::try_from(prefixes.blocks.len()).unwrap_or(u32::MAX);
            below("groups", groups, MOST_GROUPS + 1)?;
            same("begins of groups", prefixes.begins.len(), groups as usize + 1)?;
            at_least("parts", self.parts.len(), parts(kernels, shape))?;
            at_least("rows across parts", self.across.len(), 2 * rows)?;
            at_least("shared lengths", self.lengths.len(), decode.sequences as usize)?;
            at_least("rows of shared parts", self.sums.len(), 2 * rows)?;
            at_least("shared parts", self.values.len(), rows * shape.head_dim as usize)?;
            Ok(groups)
        }
    }

    /// The kernel's argument, field by field.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    struct Argument {
        attention: AttentionArgument,
        lengths: u64,
        begins: u64,
        blocks: u64,
        groups: u32,
        sequences: u32,
        parts: u64,
        across: u64,
        results: PrefixArgument,
    }

    impl Kernels {
        /// Queues attention to what is shared, for a launch of decode attention that was checked.
        pub(in crate::cuda) fn shared_prefix<T: Real, KV: KvReal<T>>(
            &self,
            decode: &PagedDecode,
            arena: &Arena<KV>,
            (input, prefixes): (&DecodeInput<'_>, &PrefixInput<'_>),
            q: &CudaSlice<T>,
            scratch: &mut PrefixScratch,
        ) -> Result<(), LaunchError> {
            let groups = scratch.check(self, decode, &arena.shape, prefixes)?;
            let dims = arena.shape.head_dim;
            let function =
                self.kernel(&format!("shared_prefix_{}{}_{dims}", T::NAME, KV::SUFFIX))?;
            let (stream, results) = (self.stream(), scratch.argument(self));
            let argument = Argument {
                attention: decode.attention.argument(self, arena, (input.tables, q)),
                lengths: input.lengths.device_ptr(stream).0,
                begins: prefixes.begins.device_ptr(stream).0,
                blocks: prefixes.blocks.device_ptr(stream).0,
                groups,
                sequences: decode.sequences,
                parts: scratch.parts.device_ptr_mut(stream).0,
                across: scratch.across.device_ptr_mut(stream).0,
                results,
            };
            let shared_bytes = tile_bytes(dims, KV::BYTES) + 1024 + groups * 4;
            let grid = Grid::of([BLOCKS * self.multiprocessors(), 1], THREADS);
            let grid = grid.spread(self, shared_bytes, BLOCKS);
            // SAFETY: the argument is that of `shared_prefix_*` in shared_prefix.cu, which stays within the lengths checked, bounds
            // groups, blocks, lengths and block ids by them and waits first.
            launched("shared_prefix", unsafe { grid.queue(self, function, &argument) })?;
            let rows = decode.sequences * decode.attention.heads;
            let grid = Grid::of([rows.div_ceil(THREADS / 32), 1], THREADS);
            let function = self.kernel(&format!("merge_prefixes_{dims}"))?;
            // SAFETY: the argument is that of `merge_prefixes_*`, which waits for what the launch before it writes.
            launched("merge_prefixes", unsafe { grid.queue(self, function, &argument) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_the_first_blocks_of_its_first_row() {
        let prefixes = SharedPrefixes { begins: &[1, 3, 3, 4], blocks: &[2, 9, 9] };
        let tables = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        let wanted = [1, 2, 3, 4, 5, 6, 4, 5, 9, 10, 11, 12, 13, 14, 15];
        assert_eq!(prefixes.spread(&tables, 3), wanted);
    }
}
