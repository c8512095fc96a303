//! What a step may hold.

use crate::kv::BlockSize;

/// Whether computed blocks are found again by other requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefixCaching {
    Enabled,
    Disabled,
}

/// The limits of the scheduler; checked where flags are read (`max_num_batched_tokens` is at least `max_num_seqs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most sequences that hold memory.
    pub max_num_seqs: u32,
    /// The token budget of a step.
    pub max_num_batched_tokens: usize,
    pub block_size: BlockSize,
    /// Blocks without the null block.
    pub blocks: u32,
    /// Blocks that stay free when a request is admitted while another runs.
    pub watermark_blocks: usize,
    /// Most tokens x context of one prefill chunk, so that a chunk far into a long prompt is short.
    pub max_attended: usize,
    pub prefix_caching: PrefixCaching,
}

impl Limits {
    /// Most tokens of a chunk that begins after `computed` tokens; at least 1.
    pub(super) fn chunk_tokens(&self, computed: usize) -> usize {
        // The largest n with n * (computed + n) <= max_attended, by the quadratic formula in integers.
        let discriminant =
            computed.saturating_mul(computed).saturating_add(self.max_attended.saturating_mul(4));
        (discriminant.isqrt().saturating_sub(computed) / 2).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU32;

    #[test]
    fn chunks_shrink_with_their_context_but_never_to_nothing() {
        let limits = Limits {
            max_num_seqs: 1,
            max_num_batched_tokens: 1,
            block_size: BlockSize(NonZeroU32::MIN),
            blocks: 1,
            watermark_blocks: 0,
            max_attended: 10_000,
            prefix_caching: PrefixCaching::Disabled,
        };
        assert_eq!(limits.chunk_tokens(0), 100);
        assert_eq!(limits.chunk_tokens(900), 10);
        assert_eq!(limits.chunk_tokens(1_000_000), 1);
        for computed in [0, 1, 57, 1000] {
            let tokens = limits.chunk_tokens(computed);
            assert!(tokens * (computed + tokens) <= 10_000);
            assert!((tokens + 1) * (computed + tokens + 1) > 10_000);
        }
    }
}
