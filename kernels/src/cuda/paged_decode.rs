//! Paged decode attention: one query token a sequence against all its positions, out = softmax(q K^T * scale) V.

use super::{KvValues, PagedAttention};

/// A layer attends with one token a sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PagedDecode {
    /// Rows of the launch; those of length 0 are no sequence.
    pub sequences: u32,
    /// At most 16 query heads a KV head.
    pub attention: PagedAttention,
}

impl PagedDecode {
    /// The meaning of the kernel. `q`, `out`: [sequences, heads, head_dim]; `tables`: [sequences, table_width], blocks in the
    /// order of positions; `lengths`: [sequences], the query's own position included. A block that the arena does not have is
    /// not seen; a sequence that sees nothing gets zeros.
    pub fn reference<T: Copy + Into<f32>>(
        &self,
        arena: &KvValues<'_, T>,
        (tables, lengths): (&[u32], &[u32]),
        q: &[f32],
        out: &mut [f32],
    ) {
        let (attention, shape) = (&self.attention, &arena.shape);
        let dims = shape.head_dim as usize;
        let mut rows = q.chunks(dims).zip(out.chunks_mut(dims));
        for (sequence, length) in lengths.iter().enumerate() {
            for (head, (q, out)) in (0..attention.heads).zip(&mut rows) {
                let slots = attention.seen(shape, tables, (sequence, *length, head));
                attention.attend(arena, &slots, q, out);
            }
        }
    }
}

#[cfg(feature = "cuda")]
pub(super) use launch::MODULE;
#[cfg(feature = "cuda")]
pub use launch::{DecodeInput, DecodeScratch};

#[cfg(feature = "cuda")]
mod launch {
    use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr};

    use super::PagedDecode;
    use crate::cpu::KernelError;
    use crate::cuda::attention::AttentionArgument;
    use crate::cuda::beside::{Begins, Grid};
    use crate::cuda::device::Module;
    use crate::cuda::launch::{at_least, below, each_kv_dtype, launched, len, same};
    use crate::cuda::shared_prefix::{PrefixArgument, PrefixInput, PrefixScratch};
    use crate::cuda::{Arena, ArenaShape, DeviceError, Kernels, KvReal, LaunchError, Real};

    /// As in the kernel.
    const TILE: u32 = 16;
    const HEADS: u32 = 8;

    pub(in crate::cuda) const MODULE: Module = Module {
        image: include_bytes!(concat!(env!("OUT_DIR"), "/paged_decode.fatbin")),
        functions: each_kv_dtype!(
            "decode": "64_8" "64_16" "96_8" "96_16" "128_8" "128_16" "256_8" "256_16"
        ),
        most_shared: 227 << 10,
    };

    /// Warps of a block, as the kernel that was built for such launches has them.
    fn warps(begins: Begins) -> u32 {
        match begins {
            Begins::Beside => 4,
            Begins::After => 2,
        }
    }

    /// Bytes of shared memory of a block: two halves of a tile for each stage of a warp; two parts of a warp, which have a maximum
    /// and a sum beside each row; three numbers a sequence. `heads`: rows of a part; `row`: bytes of a row of K or V.
    fn shared_bytes(warps: u32, sequences: u32, heads: u32, (dims, row): (u32, u32)) -> u32 {
        let stages = match row {
            ..=64 => 8,
            65..=128 => 4,
            129..=256 => 2,
            _ => 1,
        };
        let (tiles, parts) = (warps * stages * 2 * TILE * row, 2 * warps * heads * (dims + 2) * 4);
        tiles + parts + 1024 + sequences * 12
    }

    /// Shared memory of a multiprocessor, and what a block takes of it beside its own.
    const SHARED: u32 = 228 << 10;
    const PER_BLOCK: u32 = 1 << 10;
    /// Blocks of a multiprocessor at most: more do not read faster.
    const BLOCKS: u32 = 2;

    /// Numbers of the parts that the largest grid leaves: two of a block.
    fn parts(kernels: &Kernels, shape: &ArenaShape) -> usize {
        len(&[2 * BLOCKS, kernels.multiprocessors(), 2 * HEADS, shape.head_dim + 2])
    }

    /// What a launch keeps between its blocks. As it is made, and after every launch, nothing has arrived.
    #[derive(Debug)]
    pub struct DecodeScratch {
        parts: CudaSlice<f32>,
        arrived: CudaSlice<u32>,
        prefix: Option<PrefixScratch>,
    }

    impl DecodeScratch {
        /// For launches of at most `sequences` rows on an arena of this shape.
        ///
        /// # Errors
        /// When the device has not as much memory.
        pub fn new(
            kernels: &Kernels,
            shape: ArenaShape,
            sequences: u32,
        ) -> Result<Self, DeviceError> {
            let parts = parts(kernels, &shape);
            let mut arrived = kernels.memory(sequences as usize * shape.kv_heads as usize)?;
            let cleared = kernels.stream().memset_zeros(&mut arrived);
            cleared.map_err(|source| DeviceError::Driver { what: "clear memory", source })?;
            Ok(Self { parts: kernels.memory(parts)?, arrived, prefix: None })
        }

        /// Also for launches whose sequences share prefixes, of so many query heads.
        ///
        /// # Errors
        /// When the device has not as much memory.
        pub fn with_prefixes(
            mut self,
            kernels: &Kernels,
            shape: ArenaShape,
            (sequences, heads): (u32, u32),
        ) -> Result<Self, DeviceError> {
            self.prefix = Some(PrefixScratch::new(kernels, shape, (sequences, heads))?);
            Ok(self)
        }
    }

    /// What changes from step to step, in device memory.
    #[derive(Debug)]
    pub struct DecodeInput<'a> {
        pub tables: &'a CudaSlice<u32>,
        pub lengths: &'a CudaSlice<u32>,
        /// What is shared is read once, by a launch of its own; the scratch must be made for it.
        pub prefixes: Option<PrefixInput<'a>>,
    }

    /// The kernel's argument, field by field.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    struct Decode {
        attention: AttentionArgument,
        lengths: u64,
        results: u64,
        sequences: u32,
        parts: u64,
        arrived: u64,
        prefix: PrefixArgument,
    }

    impl PagedDecode {
        fn check<T>(
            &self,
            kernels: &Kernels,
            arena: &Arena<T>,
            input: &DecodeInput<'_>,
            scratch: &DecodeScratch,
            (q, out): (usize, usize),
        ) -> Result<(), LaunchError> {
            let (shape, attention) = (&arena.shape, &self.attention);
            let lens = [input.tables.len(), q, out];
            below("query heads of a KV head", attention.group(shape), 2 * HEADS + 1)?;
            attention.check(shape, (self.sequences, self.sequences), lens)?;
            same("lengths", input.lengths.len(), self.sequences as usize)?;
            at_least("parts", scratch.parts.len(), parts(kernels, shape))?;
            let pairs = len(&[self.sequences, shape.kv_heads]);
            at_least("arrived", scratch.arrived.len(), pairs)?;
            // All tiles of all sequences are counted in 32 bits.
            let most = len(&[attention.table_width, shape.block_size]).div_ceil(TILE as usize);
            let tiles = pairs.checked_mul(most).filter(|tiles| *tiles < 1 << 31);
            Ok(tiles.map(drop).ok_or(KernelError::Overflow("the tables"))?)
        }
    }

    impl Kernels {
        /// Queues the attention. Shapes as in [`PagedDecode::reference`]; of shared prefixes the tables are as
        /// [`SharedPrefixes::spread`](crate::cuda::SharedPrefixes::spread) makes them.
        ///
        /// # Errors
        /// When lengths do not fit, or no kernel was built for the head dimension or block size.
        pub fn paged_decode<T: Real, KV: KvReal<T>>(
            &self,
            shape: &PagedDecode,
            arena: &Arena<KV>,
            input: &DecodeInput<'_>,
            (q, out): (&CudaSlice<T>, &mut CudaSlice<T>),
            scratch: &mut DecodeScratch,
        ) -> Result<(), LaunchError> {
            shape.check(self, arena, input, scratch, (q.len(), out.len()))?;
            if shape.sequences == 0 {
                return Ok(());
            }
            let (dims, group) = (arena.shape.head_dim, shape.attention.group(&arena.shape));
            let heads = group.next_multiple_of(HEADS);
            let function =
                self.kernel(&format!("decode_{}{}_{dims}_{heads}", T::NAME, KV::SUFFIX))?;
            let grid = self.decode_grid(shape.sequences, heads, (dims, dims * KV::BYTES))?;
            let mut prefix = PrefixArgument::default();
            if let Some(prefixes) = &input.prefixes {
                let none = || LaunchError::Unsupported("prefixes without their scratch".to_owned());
                let scratch = scratch.prefix.as_mut().ok_or_else(none)?;
                self.shared_prefix(shape, arena, (input, prefixes), q, scratch)?;
                prefix = scratch.argument(self);
            }
            let argument = self.argument((shape, prefix), (arena, input), (q, out), scratch);
            // SAFETY: the argument is that of `decode_*` in paged_decode.cu, which stays within the lengths checked above, bounds
            // lengths and block ids by them and waits before it reads.
            launched("paged_decode", unsafe { grid.queue(self, function, &argument) })
        }

        /// `heads`, `dims`, `row`: as [`shared_bytes`] takes them.
        fn decode_grid(
            &self,
            sequences: u32,
            heads: u32,
            (dims, row): (u32, u32),
        ) -> Result<Grid, LaunchError> {
            let warps = warps(self.begins());
            let (bytes, most) =
                (shared_bytes(warps, sequences, heads, (dims, row)), self.most_shared());
            if bytes > most {
                let what = format!("decode attention of {sequences} sequences, {dims} a head");
                let why =
                    format!("{what}: {bytes} bytes of shared memory, of which there are {most}");
                return Err(LaunchError::Unsupported(why));
            }
            let blocks = (SHARED / (bytes + PER_BLOCK)).clamp(1, BLOCKS);
            let grid = Grid::of([self.multiprocessors() * blocks, 1], warps * 32);
            Ok(grid.spread(self, bytes, blocks))
        }

        fn argument<T: Real, KV: DeviceRepr>(
            &self,
            (shape, prefix): (&PagedDecode, PrefixArgument),
            (arena, input): (&Arena<KV>, &DecodeInput<'_>),
            (q, out): (&CudaSlice<T>, &mut CudaSlice<T>),
            scratch: &mut DecodeScratch,
        ) -> Decode {
            let stream = self.stream();
            Decode {
                attention: shape.attention.argument(self, arena, (input.tables, q)),
                lengths: input.lengths.device_ptr(stream).0,
                results: out.device_ptr_mut(stream).0,
                sequences: shape.sequences,
                parts: scratch.parts.device_ptr_mut(stream).0,
                arrived: scratch.arrived.device_ptr_mut(stream).0,
                prefix,
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        /// A block's most, in bytes: of sm_86 and sm_89, and of Hopper.
        const ADA: u32 = 99 << 10;
        const HOPPER: u32 = 227 << 10;

        #[test]
        fn a_block_fits_into_the_shared_memory_of_every_device() {
            for (dims, bytes) in [64, 96, 128, 256].into_iter().flat_map(|it| [(it, 1), (it, 2)]) {
                for heads in [HEADS, 2 * HEADS] {
                    let of = |begins, sequences| {
                        shared_bytes(warps(begins), sequences, heads, (dims, dims * bytes))
                    };
                    let most = if dims == 256 && heads > HEADS { 128 } else { 2048 };
                    assert!(of(Begins::After, most) <= ADA, "{dims} {bytes} {heads}");
                    assert!(of(Begins::Beside, most) <= HOPPER, "{dims} {bytes} {heads}");
                }
            }
        }
    }
}
