//! A sequence's blocks in position order.

use super::BlockId;

/// The blocks of one sequence in position order. Each entry is one reference that the table owns:
/// tables are made, forked and emptied by [`super::BlockPool`] alone.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    pub(super) blocks: Vec<BlockId>,
}

impl BlockTable {
    /// The blocks in position order.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// How many blocks the sequence holds.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether the sequence holds no block.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}
