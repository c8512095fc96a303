//! Who owns which block. Pure bookkeeping: no bytes, no tensors, no clock.

/// A fixed number of consecutive token slots in KV memory. Block 0 is the null block and never handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);
