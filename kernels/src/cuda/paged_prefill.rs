//! Paged prefill attention: chunks of several sequences, each token against all its positions up to its own, which are in the
//! arena, those of the chunk included: out = softmax(q K^T * scale) V.

use super::KvValues;
use super::attention::Meaning;

/// How a layer attends with chunks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PagedPrefill {
    pub sequences: u32,
    /// Rows of q. Those of no sequence are left alone.
    pub tokens: u32,
    /// Blocks that a row of the tables has room for.
    pub table_width: u32,
    pub layer: u32,
    /// Query heads; a multiple of the arena's KV heads. Consecutive ones share a KV head.
    pub heads: u32,
    /// Above 0.
    pub scale: f32,
    /// A token sees this many positions, its own included.
    pub window: Option<u32>,
    /// Scores become cap * tanh(score / cap).
    pub soft_cap: Option<f32>,
}

/// Which rows of q are whose.
#[derive(Debug, Clone, Copy)]
pub struct Chunks<'a> {
    /// [sequences, table_width], blocks in the order of positions.
    pub tables: &'a [u32],
    /// [sequences + 1], rows of q where sequences begin.
    pub begins: &'a [u32],
    /// [sequences], positions of their first rows.
    pub starts: &'a [u32],
}

impl PagedPrefill {
    /// The meaning of the kernels. `q`, `out`: [tokens, heads, head_dim]. A block that the arena does not have is not seen; a token
    /// that sees nothing gets zeros.
    pub fn reference<T: Copy + Into<f32>>(
        &self,
        arena: &KvValues<'_, T>,
        chunks: &Chunks<'_>,
        q: &[f32],
        out: &mut [f32],
    ) {
        let shape = &arena.shape;
        let (dims, heads) = (shape.head_dim as usize, self.heads as usize);
        for sequence in 0..self.sequences as usize {
            let table =
                &chunks.tables[sequence * self.table_width as usize..][..self.table_width as usize];
            let begin = chunks.begins[sequence].min(self.tokens);
            for row in begin..chunks.begins[sequence + 1].min(self.tokens) {
                let most = self.table_width * shape.block_size;
                let length = (chunks.starts[sequence].min(most) + (row - begin) + 1).min(most);
                for head in 0..heads {
                    let at = (row as usize * heads + head) * dims;
                    let kv_head = u32::try_from(head).unwrap_or(0) / (self.heads / shape.kv_heads);
                    let slots = self.meaning().seen(shape, table, (length, kv_head));
                    let (q, out) = (&q[at..at + dims], &mut out[at..at + dims]);
                    self.meaning().attend(arena, &slots, q, out);
                }
            }
        }
    }

    fn meaning(&self) -> Meaning {
        let Self { layer, scale, window, soft_cap, .. } = *self;
        Meaning { layer, scale, window, soft_cap }
    }
}

#[cfg(feature = "cuda")]
pub use launch::PrefillInput;
#[cfg(feature = "cuda")]
pub(super) use launch::{HOPPER_MODULE, MODULE};

#[cfg(feature = "cuda")]
mod launch {
    use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr};

    use super::PagedPrefill;
    use crate::cpu::KernelError;
    use crate::cuda::arena::ArenaArgument;
    use crate::cuda::attention::AttentionArgument;
    use crate::cuda::beside::Grid;
    use crate::cuda::device::Module;
    use crate::cuda::launch::{below, each_kv_dtype, launched, len, same};
    use crate::cuda::{Arena, Kernels, KvReal, LaunchError, Real};

    pub(in crate::cuda) const MODULE: Module = Module {
        image: include_bytes!(concat!(env!("OUT_DIR"), "/paged_prefill.fatbin")),
        functions: each_kv_dtype!("prefill": 64 96 128 256),
        most_shared: 99 << 10,
    };

    pub(in crate::cuda) const HOPPER_MODULE: Module = Module {
        image: include_bytes!(concat!(env!("OUT_DIR"), "/paged_prefill_90.fatbin")),
        functions: each_kv_dtype!("prefill_90": 64 128 "64_capped" "128_capped"),
        most_shared: 227 << 10,
    };

    /// Sequences of a launch: their sums are in shared memory.
    const MOST_SEQUENCES: u32 = 4096;

    /// What changes from step to step, in device memory: as [`super::Chunks`].
    #[derive(Debug)]
    pub struct PrefillInput<'a> {
        pub tables: &'a CudaSlice<u32>,
        pub begins: &'a CudaSlice<u32>,
        pub starts: &'a CudaSlice<u32>,
    }

    /// The kernels' argument, field by field.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    struct Argument {
        arena: ArenaArgument,
        tables: u64,
        begins: u64,
        starts: u64,
        queries: u64,
        results: u64,
        sequences: u32,
        tokens: u32,
        attention: AttentionArgument,
    }

    impl PagedPrefill {
        fn check<T>(
            &self,
            arena: &Arena<T>,
            input: &PrefillInput<'_>,
            (q, out): (usize, usize),
        ) -> Result<(), KernelError> {
            let shape = &arena.shape;
            let rows = len(&[self.tokens, self.heads, shape.head_dim]);
            let whole = self.heads / shape.kv_heads.max(1) * shape.kv_heads;
            below("sequences", self.sequences, MOST_SEQUENCES + 1)?;
            below("layer", self.layer, shape.layers)?;
            same("query heads", whole as usize, self.heads as usize)?;
            same("q", q, rows)?;
            same("out", out, rows)?;
            same("begins", input.begins.len(), self.sequences as usize + 1)?;
            same("starts", input.starts.len(), self.sequences as usize)?;
            same("tables", input.tables.len(), len(&[self.sequences, self.table_width]))?;
            // Rows and positions are counted in 32 bits.
            let counts =
                [len(&[self.tokens, self.heads]), len(&[self.table_width, shape.block_size])];
            let fits = counts.iter().all(|count| *count < 1 << 30) && self.scale > 0.0;
            if fits {
                Ok(())
            } else {
                Err(KernelError::Overflow("the tables or tokens, or the scale"))
            }
        }
    }

    impl Kernels {
        /// Queues the attention. Shapes as in [`PagedPrefill::reference`].
        ///
        /// # Errors
        /// When lengths do not fit, or no kernel was built for the head dimension or block size.
        pub fn paged_prefill<T: Real, KV: KvReal<T>>(
            &self,
            shape: &PagedPrefill,
            arena: &Arena<KV>,
            input: &PrefillInput<'_>,
            (q, out): (&CudaSlice<T>, &mut CudaSlice<T>),
        ) -> Result<(), LaunchError> {
            shape.check(arena, input, (q.len(), out.len()))?;
            if shape.sequences == 0 || shape.tokens == 0 {
                return Ok(());
            }
            let (size, dims) = (arena.shape.block_size, arena.shape.head_dim);
            if !matches!(size, 8 | 16 | 32 | 64) {
                return Err(LaunchError::Unsupported(format!("prefill on blocks of {size}")));
            }
            let bytes = u32::try_from(size_of::<KV>()).unwrap_or(2);
            let is_hopper = self.is_hopper() && matches!(dims, 64 | 128);
            let prefix = if is_hopper { "prefill_90" } else { "prefill" };
            let suffix = if is_hopper && shape.soft_cap.is_some() { "_capped" } else { "" };
            let name = format!("{prefix}_{}{}_{dims}{suffix}", T::NAME, KV::SUFFIX);
            let function = self.kernel(&name)?;
            // Hopper: two stages of 128 rows of q, K and V, and 8 rows of results for each of 8 warps, all of 16 bits, and a warpgroup
            // more where K and V are widened; else two stages of 64 positions, of 32 where heads are large.
            let positions = if dims > 128 { 32 } else { 64 };
            let (blocks, threads, tiles) = if is_hopper {
                (1, if bytes == 1 { 512 } else { 384 }, (3 * 2 * 128 + 8 * 8) * dims * 2)
            } else {
                (2, 128, 2 * 2 * positions * dims * bytes)
            };
            let shared_bytes = tiles + 1024 + (shape.sequences + 1) * 4;
            let grid = Grid::of([self.multiprocessors() * blocks, 1], threads);
            let grid = Grid { shared_bytes, ..grid }.spread(self, blocks);
            let argument = self.prefill_argument(shape, (arena, input), (q, out));
            // SAFETY: the argument is that of `prefill_*` in paged_prefill.cu and paged_prefill_90.cu, which stay within the lengths
            // checked above, bound rows, positions and block ids by them and wait before they read.
            launched("paged_prefill", unsafe { grid.queue(self, function, &argument) })
        }

        fn prefill_argument<T: Real, KV: DeviceRepr>(
            &self,
            shape: &PagedPrefill,
            (arena, input): (&Arena<KV>, &PrefillInput<'_>),
            (q, out): (&CudaSlice<T>, &mut CudaSlice<T>),
        ) -> Argument {
            let (stream, group) = (self.stream(), shape.heads / arena.shape.kv_heads);
            Argument {
                arena: arena.argument(self),
                tables: input.tables.device_ptr(stream).0,
                begins: input.begins.device_ptr(stream).0,
                starts: input.starts.device_ptr(stream).0,
                queries: q.device_ptr(stream).0,
                results: out.device_ptr_mut(stream).0,
                sequences: shape.sequences,
                tokens: shape.tokens,
                attention: shape.meaning().argument(shape.table_width, group),
            }
        }
    }
}
