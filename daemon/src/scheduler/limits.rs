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
impl Limits {
    /// A pool of `blocks` and nothing that is tight beside it.
    pub(crate) fn small(blocks: u32, block_size: u32) -> Self {
        Self {
            max_num_seqs: 16,
            max_num_batched_tokens: 64,
            block_size: BlockSize(block_size.try_into().expect("a size that is not 0")),
            blocks,
            watermark_blocks: 0,
            max_attended: usize::MAX,
            prefix_caching: PrefixCaching::Enabled,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_shrink_with_their_context_but_never_to_nothing() {
        let limits = Limits { max_attended: 10_000, ..Limits::small(1, 1) };
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
