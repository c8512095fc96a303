//! Paged prefill attention: chunks of several sequences, each token against all its positions up to its own, which are in the
//! arena, those of the chunk included: out = softmax(q K^T * scale) V.

use super::{KvValues, PagedAttention};

/// A layer attends with chunks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PagedPrefill {
    pub sequences: u32,
    /// Rows of q. Those of no sequence are left alone.
    pub tokens: u32,
    pub attention: PagedAttention,
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
        let (attention, shape) = (&self.attention, &arena.shape);
        let (dims, heads) = (shape.head_dim as usize, attention.heads as usize);
        let most = attention.table_width * shape.block_size;
        for sequence in 0..self.sequences as usize {
            let begin = chunks.begins[sequence].min(self.tokens);
            for row in begin..chunks.begins[sequence + 1].min(self.tokens) {
                let length = (chunks.starts[sequence].min(most) + (row - begin) + 1).min(most);
                let rows = row as usize * heads * dims..(row as usize + 1) * heads * dims;
                let heads = q[rows.clone()].chunks(dims).zip(out[rows].chunks_mut(dims));
                for (head, (q, out)) in (0..).zip(heads) {
                    let slots = attention.seen(shape, chunks.tables, (sequence, length, head));
                    attention.attend(arena, &slots, q, out);
                }
            }
        }
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
    use crate::cuda::attention::{AttentionArgument, tile_bytes};
    use crate::cuda::beside::Grid;
    use crate::cuda::device::Module;
    use crate::cuda::launch::{each_kv_dtype, launched, len, same};
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
        attention: AttentionArgument,
        begins: u64,
        starts: u64,
        results: u64,
        sequences: u32,
        tokens: u32,
    }

    impl PagedPrefill {
        fn check<T>(
            &self,
            arena: &Arena<T>,
            input: &PrefillInput<'_>,
            (q, out): (usize, usize),
        ) -> Result<(), LaunchError> {
            let (shape, attention) = (&arena.shape, &self.attention);
            let lens = [input.tables.len(), q, out];
            attention.check(shape, (self.sequences, self.tokens), lens)?;
            same("begins", input.begins.len(), self.sequences as usize + 1)?;
            same("starts", input.starts.len(), self.sequences as usize)?;
            // Tiles of 64 rows are counted in 32 bits, even if every sequence has all rows.
            let rows = len(&[self.tokens, attention.heads]);
            let fits = rows < 1 << 30 && len(&[self.sequences]).saturating_mul(rows) < 1 << 36;
            Ok(fits.then_some(()).ok_or(KernelError::Overflow("the tokens"))?)
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
            let dims = arena.shape.head_dim;
            let is_hopper = self.is_hopper() && matches!(dims, 64 | 128);
            let prefix = if is_hopper { "prefill_90" } else { "prefill" };
            let suffix =
                if is_hopper && shape.attention.soft_cap.is_some() { "_capped" } else { "" };
            let name = format!("{prefix}_{}{}_{dims}{suffix}", T::NAME, KV::SUFFIX);
            let function = self.kernel(&name)?;
            // Hopper: two stages of 128 rows of q, K and V, and 8 rows of results for each of 8 warps, all of 16 bits, and a warpgroup
            // more where K and V are widened.
            let (blocks, threads, tiles) = if is_hopper {
                (1, if KV::BYTES == 1 { 512 } else { 384 }, (3 * 2 * 128 + 8 * 8) * dims * 2)
            } else {
                (2, 128, tile_bytes(dims, KV::BYTES))
            };
            let shared_bytes = tiles + 1024 + (shape.sequences + 1) * 4;
            let grid = Grid::of([self.multiprocessors() * blocks, 1], threads);
            let grid = grid.spread(self, shared_bytes, blocks);
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
            let stream = self.stream();
            Argument {
                attention: shape.attention.argument(self, arena, (input.tables, q)),
                begins: input.begins.device_ptr(stream).0,
                starts: input.starts.device_ptr(stream).0,
                results: out.device_ptr_mut(stream).0,
                sequences: shape.sequences,
                tokens: shape.tokens,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{ArenaShape, PagedDecode};

    /// Of the second sequence, at positions 10 to 13 of 24; its second block is not there.
    #[test]
    fn a_token_of_a_chunk_sees_what_decode_sees() {
        let shape = ArenaShape { blocks: 7, block_size: 8, layers: 2, kv_heads: 2, head_dim: 64 };
        let attention = PagedAttention {
            table_width: 3,
            layer: 1,
            heads: 4,
            scale: 0.2,
            window: Some(11),
            soft_cap: Some(3.0),
        };
        let mut random = fastrand::Rng::with_seed(7);
        let mut some = |len: usize| (0..len).map(|_| random.f32() - 0.5).collect::<Vec<_>>();
        let (values, q) = (some(shape.len().unwrap()), some(4 * 4 * 64));
        let arena = KvValues { shape, values: &values, scales: &[1.0; 8] };
        let tables = [1, 2, 3, 4, 7, 6];
        let chunks = Chunks { tables: &tables, begins: &[0, 0, 4], starts: &[0, 10] };
        let mut chunk = vec![0.0; q.len()];
        let prefill = PagedPrefill { sequences: 2, tokens: 4, attention };
        prefill.reference(&arena, &chunks, &q, &mut chunk);
        for (length, (q, chunk)) in (11..).zip(q.chunks(256).zip(chunk.chunks(256))) {
            let mut token = vec![0.0; 256];
            let decode = PagedDecode { sequences: 1, attention };
            decode.reference(&arena, (&tables[3..], &[length]), q, &mut token);
            assert_eq!(chunk, token, "{length} positions");
            assert!(token.iter().any(|value| *value != 0.0));
        }
    }
}
