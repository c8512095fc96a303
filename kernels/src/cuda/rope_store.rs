//! Rotary position embedding of Q and K (Su et al., arXiv 2104.09864, halves as in Llama), after a norm of each head where there is
//! one, and the store of K and V into their slots.

use super::{ArenaShape, KvHalf, Slot};

/// Tokens to turn and store.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeStore {
    pub tokens: u32,
    /// Query heads.
    pub heads: u32,
    pub layer: u32,
    /// Dimensions of a head that turn, from its first: a multiple of 16.
    pub rotary: u32,
    /// Of the heads' norms.
    pub epsilon: f32,
}

/// Weights of the norms of each head; absent: there is none. Both: [head_dim].
#[derive(Debug, Clone, Copy)]
pub struct HeadNorms<W> {
    pub q: W,
    pub k: W,
}

impl RopeStore {
    /// The meaning of the kernel. `qkv`: [tokens, heads + 2 kv_heads, head_dim]; `frequencies`: [rotary / 2], radians a position,
    /// scaled for long contexts by whoever made them; an angle is their product in f32. `q`: [tokens, heads, head_dim]. `store` gets
    /// K and V of each token, before any scale, and where they belong; a slot (block * block_size + row) of a block that is not there is not stored.
    pub fn reference(
        &self,
        shape: &ArenaShape,
        (qkv, norms): (&[f32], Option<HeadNorms<&[f32]>>),
        (positions, slots, frequencies): (&[u32], &[u32], &[f32]),
        q: &mut [f32],
        mut store: impl FnMut(Slot, f32),
    ) {
        let (dims, heads, kv_heads) = (shape.head_dim as usize, self.heads, shape.kv_heads);
        let all = heads + 2 * kv_heads;
        for (index, head) in qkv.chunks(dims).enumerate() {
            let (token, number) =
                (index / all as usize, u32::try_from(index % all as usize).unwrap_or(0));
            let turn = |weight: Option<&[f32]>| {
                self.turned(&self.normed(head, weight), positions[token] as f32, frequencies)
            };
            if number < heads {
                let begin = (token * heads as usize + number as usize) * dims;
                q[begin..begin + dims].copy_from_slice(&turn(norms.map(|norms| norms.q)));
                continue;
            }
            let (half, values) = if number < heads + kv_heads {
                (KvHalf::K, turn(norms.map(|norms| norms.k)))
            } else {
                (KvHalf::V, head.to_vec())
            };
            let (block, row) = (slots[token] / shape.block_size, slots[token] % shape.block_size);
            let head = (number - heads) % kv_heads;
            for (dim, value) in (0..).zip(values).filter(|_| block < shape.blocks) {
                store(Slot { block, layer: self.layer, half, head, row, dim }, value);
            }
        }
    }

    fn normed(&self, head: &[f32], weight: Option<&[f32]>) -> Vec<f32> {
        let Some(weight) = weight else { return head.to_vec() };
        let squares: f64 = head.iter().map(|x| f64::from(*x).powi(2)).sum();
        let factor = 1.0 / (squares / head.len() as f64 + f64::from(self.epsilon)).sqrt();
        head.iter()
            .zip(weight)
            .map(|(x, weight)| (f64::from(*x) * factor) as f32 * weight)
            .collect()
    }

    fn turned(&self, head: &[f32], position: f32, frequencies: &[f32]) -> Vec<f32> {
        let (mut turned, half) = (head.to_vec(), self.rotary as usize / 2);
        for (pair, frequency) in (0..half).zip(frequencies) {
            let (sine, cosine) = f64::from(position * frequency).sin_cos();
            let (a, b) = (f64::from(head[pair]), f64::from(head[pair + half]));
            turned[pair] = (a * cosine - b * sine) as f32;
            turned[pair + half] = (b * cosine + a * sine) as f32;
        }
        turned
    }
}

#[cfg(feature = "cuda")]
pub(super) use launch::MODULE;
#[cfg(feature = "cuda")]
pub use launch::RopeInput;

#[cfg(feature = "cuda")]
mod launch {
    use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

    use super::{HeadNorms, RopeStore};
    use crate::cuda::arena::ArenaArgument;
    use crate::cuda::beside::Grid;
    use crate::cuda::device::Module;
    use crate::cuda::launch::{below, each_kv_dtype, launched, len, same};
    use crate::cuda::{Arena, ArenaShape, Kernels, KvReal, LaunchError, Real};

    pub(in crate::cuda) const MODULE: Module = Module {
        image: include_bytes!(concat!(env!("OUT_DIR"), "/rope_store.fatbin")),
        functions: each_kv_dtype!("rope_store": 64 96 128 256),
        most_shared: 0,
    };

    /// Threads of a block at most, as in the kernel.
    const MOST_THREADS: u32 = 512;

    /// What changes from step to step, in device memory, and the frequencies.
    #[derive(Debug)]
    pub struct RopeInput<'a> {
        pub positions: &'a CudaSlice<u32>,
        pub slots: &'a CudaSlice<u32>,
        pub frequencies: &'a CudaSlice<f32>,
    }

    /// The kernel's argument, field by field.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    struct Argument {
        arena: ArenaArgument,
        positions: u64,
        slots: u64,
        frequencies: u64,
        qkv: u64,
        q_weight: u64,
        k_weight: u64,
        q: u64,
        heads: u32,
        layer: u32,
        rotary: u32,
        epsilon: f32,
    }

    impl RopeStore {
        fn check(
            &self,
            shape: &ArenaShape,
            input: &RopeInput<'_>,
            (qkv, q): (usize, usize),
        ) -> Result<(), LaunchError> {
            let kv_heads = shape.kv_heads.saturating_mul(2);
            same(
                "qkv",
                qkv,
                len(&[self.tokens, self.heads.saturating_add(kv_heads), shape.head_dim]),
            )?;
            same("q", q, len(&[self.tokens, self.heads, shape.head_dim]))?;
            same("positions", input.positions.len(), self.tokens as usize)?;
            same("slots", input.slots.len(), self.tokens as usize)?;
            same("frequencies", input.frequencies.len(), self.rotary as usize / 2)?;
            below("layer", self.layer, shape.layers)?;
            below("rotary", self.rotary, shape.head_dim + 1)?;
            same("rotary, in sixteens,", self.rotary as usize, self.rotary as usize / 16 * 16)?;
            Ok(())
        }

        /// A block for each token, or more where its heads have more lanes than a block has threads.
        fn grid(&self, shape: &ArenaShape) -> Grid {
            let lanes = (shape.head_dim / 16).next_power_of_two();
            let heads = self.heads + 2 * shape.kv_heads;
            let blocks = (heads * lanes).div_ceil(MOST_THREADS);
            let threads = (heads.div_ceil(blocks) * lanes).next_multiple_of(32);
            Grid::of([self.tokens, blocks], threads)
        }
    }

    impl Kernels {
        /// Queues the turning and storing. Shapes as in [`RopeStore::reference`].
        ///
        /// # Errors
        /// When lengths do not fit, or no kernel was built for the head dimension.
        pub fn rope_store<T: Real, KV: KvReal<T>>(
            &self,
            shape: &RopeStore,
            (qkv, norms): (&CudaSlice<T>, Option<HeadNorms<&CudaSlice<T>>>),
            input: &RopeInput<'_>,
            arena: &mut Arena<KV>,
            q: &mut CudaSlice<T>,
        ) -> Result<(), LaunchError> {
            let dims = arena.shape.head_dim;
            shape.check(&arena.shape, input, (qkv.len(), q.len()))?;
            for weight in norms.iter().flat_map(|norms| [norms.q, norms.k]) {
                same("a norm's weight", weight.len(), dims as usize)?;
            }
            let function = self.kernel(&format!("rope_store_{}{}_{dims}", T::NAME, KV::SUFFIX))?;
            below("tokens", shape.tokens, 1 << 31)?;
            if shape.tokens == 0 {
                return Ok(());
            }
            let stream = self.stream();
            let weight = |of: fn(HeadNorms<&CudaSlice<T>>) -> &CudaSlice<T>| {
                norms.map_or(0, |norms| of(norms).device_ptr(stream).0)
            };
            let argument = Argument {
                arena: arena.argument(self),
                positions: input.positions.device_ptr(stream).0,
                slots: input.slots.device_ptr(stream).0,
                frequencies: input.frequencies.device_ptr(stream).0,
                qkv: qkv.device_ptr(stream).0,
                q_weight: weight(|norms| norms.q),
                k_weight: weight(|norms| norms.k),
                q: q.device_ptr_mut(stream).0,
                heads: shape.heads,
                layer: shape.layer,
                rotary: shape.rotary,
                epsilon: shape.epsilon,
            };
            let grid = shape.grid(&arena.shape);
            // SAFETY: the argument is that of `rope_store_*` in rope_store.cu, which bounds slots, stays within the lengths checked
            // above and waits first.
            launched("rope_store", unsafe { grid.queue(self, function, &argument) })
        }
    }
}
