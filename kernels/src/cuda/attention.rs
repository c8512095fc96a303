//! What attention over pages means for one query, in f64: out = softmax(q K^T * scale) V. Decode and prefill differ in which
//! queries there are.

use super::{ArenaShape, KvHalf, KvValues, Slot};

/// How a layer attends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Meaning {
    pub(super) layer: u32,
    pub(super) scale: f32,
    pub(super) window: Option<u32>,
    pub(super) soft_cap: Option<f32>,
}

impl Meaning {
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

    /// The slots of the K that a query sees which is at position `length - 1` of a sequence, of one KV head. A block that the arena
    /// does not have is not seen.
    pub(super) fn seen(
        &self,
        shape: &ArenaShape,
        table: &[u32],
        (length, head): (u32, u32),
    ) -> Vec<Slot> {
        let most = u32::try_from(table.len()).unwrap_or(u32::MAX).saturating_mul(shape.block_size);
        let length = length.min(most);
        let first = self.window.map_or(0, |window| length.saturating_sub(window));
        let slot = |position: u32| Slot {
            block: table[(position / shape.block_size) as usize],
            layer: self.layer,
            half: KvHalf::K,
            head,
            row: position % shape.block_size,
            dim: 0,
        };
        (first..length).map(slot).filter(|slot| slot.block < shape.blocks).collect()
    }
}

#[cfg(feature = "cuda")]
pub(super) use launch::AttentionArgument;

#[cfg(feature = "cuda")]
mod launch {
    use super::Meaning;

    /// How a layer attends, as kernels take it: what `Decode`, `SharedPrefix` and `Prefill` have from `table_width` to `soft_cap`.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    pub(in crate::cuda) struct AttentionArgument {
        table_width: u32,
        layer: u32,
        group: u32,
        window: u32,
        scale: f32,
        soft_cap: f32,
    }

    impl Meaning {
        /// With tables of `table_width` blocks a row, and `group` query heads a KV head.
        pub(in crate::cuda) fn argument(&self, table_width: u32, group: u32) -> AttentionArgument {
            // Powers of two are taken of scores, unless they are capped first.
            let scale = if self.soft_cap.is_some() { 1.0 } else { std::f32::consts::LOG2_E };
            AttentionArgument {
                table_width,
                layer: self.layer,
                group,
                window: self.window.unwrap_or(0),
                scale: self.scale * scale,
                soft_cap: self.soft_cap.unwrap_or(0.0),
            }
        }
    }
}
