//! How many blocks the KV memory makes.

use super::BlockSize;

/// What decides the number of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvBudget {
    pub block_size: BlockSize,
    /// Bytes of K and V of one token in all layers.
    pub bytes_per_token: usize,
    /// Bytes that KV blocks may take, the null block included.
    pub bytes: usize,
}

/// Blocks that the budget makes, the null block included; `None` when the sizes overflow.
pub fn plan_blocks(budget: KvBudget) -> Option<usize> {
    let block_bytes = budget.bytes_per_token.checked_mul(budget.block_size.tokens())?;
    Some(budget.bytes.checked_div(block_bytes)?.min(u32::MAX as usize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU32;

    #[test]
    fn blocks_are_bytes_over_block_bytes_rounded_down() {
        let block_size = BlockSize(NonZeroU32::new(16).unwrap());
        let blocks = |bytes| plan_blocks(KvBudget { block_size, bytes_per_token: 100, bytes });
        assert_eq!(blocks(1599), Some(0));
        assert_eq!(blocks(1600), Some(1));
        assert_eq!(blocks(16_000), Some(10));
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        let block_size = BlockSize(NonZeroU32::new(u32::MAX).unwrap());
        assert_eq!(
            plan_blocks(KvBudget { block_size, bytes_per_token: usize::MAX, bytes: 1 }),
            None
        );
    }
}
