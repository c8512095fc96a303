//! Who owns which block. Pure bookkeeping: no bytes, no tensors, no clock.

mod capacity;
mod pool;
mod prefix;
mod table;

pub use capacity::{KvBudget, plan_blocks};
pub use pool::{BlockCopy, BlockPool, ChainedKey, OutOfBlocks, PoolUsage, SharedPrefix, Write};
pub use prefix::{BlockKey, PrefixHasher};
pub use table::BlockTable;

use std::num::NonZeroU32;

/// A fixed number of consecutive token slots in KV memory. Block 0 is the null block and never handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

impl BlockId {
    /// The block that belongs to nobody.
    pub const NULL: Self = Self(0);

    fn index(self) -> usize {
        self.0 as usize
    }
}

/// The number of a step: later steps have larger numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepId(pub u64);

/// Tokens per block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSize(pub NonZeroU32);

impl BlockSize {
    /// Tokens per block.
    pub fn tokens(self) -> usize {
        self.0.get() as usize
    }

    /// Blocks that hold `tokens` tokens.
    pub fn blocks_for(self, tokens: usize) -> usize {
        tokens.div_ceil(self.tokens())
    }

    /// Blocks that `tokens` tokens fill to the last slot.
    pub fn full_blocks(self, tokens: usize) -> usize {
        tokens / self.tokens()
    }

    /// Slots used in the last block of `tokens` tokens when it is not full, else 0.
    pub fn tail(self, tokens: usize) -> usize {
        tokens % self.tokens()
    }
}
