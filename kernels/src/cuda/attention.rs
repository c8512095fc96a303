//! What attention over pages means for one query, in f64: out = softmax(q K^T * scale) V. Decode and prefill differ in which
//! queries there are.

use super::{ArenaShape, KvHalf, KvValues, Slot};

/// How a layer attends to an arena.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PagedAttention {
    /// Blocks that a row of the tables has room for.
    pub table_width: u32,
    pub layer: u32,
    /// Query heads; a multiple of the arena's KV heads. Consecutive ones share a KV head.
    pub heads: u32,
    /// Above 0.
    pub scale: f32,
    /// A token sees this many positions, its own included; above 0. What lies before them in a block that is there must be numbers:
    /// some kernels multiply it by weights of 0.
    pub window: Option<u32>,
    /// Scores become cap * tanh(score / cap); above 0.
    pub soft_cap: Option<f32>,
}

impl PagedAttention {
    /// Query heads that share a KV head.
    pub(super) fn group(&self, shape: &ArenaShape) -> u32 {
        self.heads / shape.kv_heads.max(1)
    }

    /// Attends from one query: `q`, `out`: [head_dim]. Where nothing is seen, the result is zeros.
    pub(super) fn attend<T: Copy + Into<f32>>(
        &self,
        arena: &KvValues<'_, T>,
        slots: &[Slot],
        q: &[f32],
        out: &mut [f32],
    ) {
        let value = |slot: &Slot, dim: usize, half| {
            arena.get(Slot { dim: u32::try_from(dim).unwrap_or(0), half, ..*slot })
        };
        let score = |slot: &Slot| {
            let product =
                q.iter().enumerate().map(|(dim, q)| f64::from(*q) * value(slot, dim, KvHalf::K));
            let score = product.sum::<f64>() * f64::from(self.scale);
            self.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
        };
        let scores: Vec<f64> = slots.iter().map(score).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (dim, out) in out.iter_mut().enumerate() {
            let total: f64 = slots
                .iter()
                .zip(&weights)
                .map(|(slot, weight)| weight * value(slot, dim, KvHalf::V))
                .sum();
            *out = if slots.is_empty() { 0.0 } else { (total / sum) as f32 };
        }
    }

    /// The slots of the K that a query head of a sequence sees, at position `length - 1`. `tables`: [sequences, table_width]. A block
    /// that the arena does not have is not seen.
    pub(super) fn seen(
        &self,
        shape: &ArenaShape,
        tables: &[u32],
        (sequence, length, head): (usize, u32, u32),
    ) -> Vec<Slot> {
        let table = &tables[sequence * self.table_width as usize..][..self.table_width as usize];
        let most = self.table_width.saturating_mul(shape.block_size);
        let length = length.min(most);
        let first = self.window.map_or(0, |window| length.saturating_sub(window));
        let slot = |position: u32| Slot {
            block: table[(position / shape.block_size) as usize],
            layer: self.layer,
            half: KvHalf::K,
            head: head / self.group(shape),
            row: position % shape.block_size,
            dim: 0,
        };
        (first..length).map(slot).filter(|slot| slot.block < shape.blocks).collect()
    }
}

#[cfg(feature = "cuda")]
pub(super) use launch::{AttentionArgument, tile_bytes};

#[cfg(feature = "cuda")]
mod launch {
    use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};

    use super::PagedAttention;
    use crate::cuda::arena::ArenaArgument;
    use crate::cuda::launch::{below, len, same};
    use crate::cuda::{Arena, ArenaShape, Kernels, LaunchError};

    /// Sequences of a launch: their sums are in shared memory.
    const MOST_SEQUENCES: u32 = 4096;

    /// What row_tile.cuh keeps in shared memory: two stages of 64 positions of K and V, of 32 where heads are large. A number of K has
    /// so many bytes.
    pub(in crate::cuda) fn tile_bytes(dims: u32, bytes: u32) -> u32 {
        let positions = if dims > 128 { 32 } else { 64 };
        2 * 2 * positions * dims * bytes
    }

    /// What all kernels take: `Attention` in attention.cuh, field by field.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    pub(in crate::cuda) struct AttentionArgument {
        arena: ArenaArgument,
        tables: u64,
        queries: u64,
        table_width: u32,
        layer: u32,
        group: u32,
        window: u32,
        scale: f32,
        soft_cap: f32,
    }

    impl PagedAttention {
        /// That so many tokens of so many sequences fit. `tables`, `q`, `out`: lengths.
        pub(in crate::cuda) fn check(
            &self,
            shape: &ArenaShape,
            (sequences, tokens): (u32, u32),
            [tables, q, out]: [usize; 3],
        ) -> Result<(), LaunchError> {
            let rows = len(&[tokens, self.heads, shape.head_dim]);
            let whole = len(&[self.group(shape), shape.kv_heads]);
            below("sequences", sequences, MOST_SEQUENCES + 1)?;
            below("layer", self.layer, shape.layers)?;
            same("query heads", whole, self.heads as usize)?;
            same("q", q, rows)?;
            same("out", out, rows)?;
            same("tables", tables, len(&[sequences, self.table_width]))?;
            if !matches!(shape.block_size, 8 | 16 | 32 | 64) {
                let size = shape.block_size;
                let why = format!("attention over blocks of {size}: wanted 8, 16, 32 or 64");
                return Err(LaunchError::Unsupported(why));
            }
            // Positions are counted in 32 bits.
            let positions = len(&[self.table_width, shape.block_size]);
            below("positions of a table", u32::try_from(positions).unwrap_or(u32::MAX), 1 << 30)?;
            let Self { scale, window, soft_cap, .. } = *self;
            let is_positive = |factor: f32| factor > 0.0 && factor.is_finite();
            if is_positive(scale) && window != Some(0) && soft_cap.is_none_or(is_positive) {
                return Ok(());
            }
            let got = format!("scale {scale}, window {window:?}, soft cap {soft_cap:?}");
            Err(LaunchError::Unsupported(format!("{got}: wanted above 0")))
        }

        pub(in crate::cuda) fn argument<T: DeviceRepr, KV: DeviceRepr>(
            &self,
            kernels: &Kernels,
            arena: &Arena<KV>,
            (tables, q): (&CudaSlice<u32>, &CudaSlice<T>),
        ) -> AttentionArgument {
            // Powers of two are taken of scores, unless they are capped first.
            let scale = if self.soft_cap.is_some() { 1.0 } else { std::f32::consts::LOG2_E };
            AttentionArgument {
                arena: arena.argument(kernels),
                tables: tables.device_ptr(kernels.stream()).0,
                queries: q.device_ptr(kernels.stream()).0,
                table_width: self.table_width,
                layer: self.layer,
                group: self.group(&arena.shape),
                window: self.window.unwrap_or(0),
                scale: self.scale * scale,
                soft_cap: self.soft_cap.unwrap_or(0.0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_sees_its_window_of_the_blocks_that_are_there() {
        let shape = ArenaShape { blocks: 7, block_size: 8, layers: 2, kv_heads: 2, head_dim: 64 };
        let seen = |window, length| -> Vec<(u32, u32)> {
            let attention = PagedAttention {
                table_width: 3,
                layer: 1,
                heads: 4,
                scale: 1.0,
                window,
                soft_cap: None,
            };
            let slots = attention.seen(&shape, &[1, 2, 3, 4, 7, 6], (1, length, 3));
            assert!(slots.iter().all(|slot| (slot.layer, slot.head) == (1, 1)));
            slots.iter().map(|slot| (slot.block, slot.row)).collect()
        };
        let of =
            |block, rows: std::ops::Range<u32>| rows.map(|row| (block, row)).collect::<Vec<_>>();
        // The second block, 7, is not the arena's.
        assert_eq!(seen(None, 12), of(4, 0..8));
        assert_eq!(seen(Some(11), 12), of(4, 1..8));
        assert_eq!(seen(Some(3), 24), of(6, 5..8));
        assert_eq!(seen(Some(3), 100), of(6, 5..8), "no more than the table has room for");
        assert_eq!(seen(Some(1), 1), of(4, 0..1));
        assert_eq!(seen(None, 0), vec![]);
    }
}
