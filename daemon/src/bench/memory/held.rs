//! How one fixed KV memory is used, in slots: what is filled, and the three ways to waste the rest.

use std::ops::AddAssign;

use crate::engine::stats::BlockStats;

/// How a KV memory is divided among sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// Contiguous room for the longest possible sequence: the engine with one block of that length a sequence.
    MaxLength,
    /// Contiguous room of the length that the sequence will have, known in advance: simulated, first fit.
    ExactSize,
    /// Contiguous room of the next power of two above that length: simulated, first fit.
    PowersOfTwo,
    /// Blocks: the engine as it is served.
    Paged,
}

/// The use of the memory at one moment, or summed over moments. The five parts are the whole memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Held {
    /// Slots that hold a token, shared ones once.
    pub(super) filled: usize,
    /// Contiguous room for tokens that have not come yet or never will.
    pub(super) reserved: usize,
    /// Empty slots of last blocks.
    pub(super) internal: usize,
    /// Room that is free, lies in holes, and is not given to a request that waits.
    pub(super) external: usize,
    /// Room that nobody asks for, or that paging keeps free; cached blocks without an owner among it.
    pub(super) free: usize,
    /// Sequences that hold memory.
    pub(super) users: usize,
}

impl Method {
    pub(super) const ALL: [Self; 4] =
        [Self::MaxLength, Self::ExactSize, Self::PowersOfTwo, Self::Paged];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::MaxLength => "contiguous, max length (engine)",
            Self::ExactSize => "contiguous, exact size (simulated)",
            Self::PowersOfTwo => "contiguous, powers of two (simulated)",
            Self::Paged => "paged (engine)",
        }
    }
}

impl Held {
    /// What the engine's blocks hold for `users` sequences, when `method` is one that the engine runs.
    pub(super) fn of_blocks(method: Method, blocks: &BlockStats, users: usize) -> Self {
        let empty = blocks.used * blocks.block_size - blocks.filled_slots;
        let free = (blocks.total - blocks.used) * blocks.block_size;
        let held = Self { filled: blocks.filled_slots, free, users, ..Self::default() };
        match method {
            Method::Paged => Self { internal: empty, ..held },
            Method::MaxLength | Method::ExactSize | Method::PowersOfTwo => {
                Self { reserved: empty, ..held }
            }
        }
    }

    /// Slots that sequences were given.
    pub(super) fn allocated(&self) -> usize {
        self.filled + self.reserved + self.internal
    }

    /// All slots.
    pub(super) fn total(&self) -> usize {
        self.allocated() + self.external + self.free
    }

    /// Of the slots that sequences were given, those that hold a token.
    pub(super) fn filled_share(&self) -> f64 {
        share(self.filled, self.allocated())
    }

    /// Of all slots, those that hold no token.
    pub(super) fn empty_share(&self) -> f64 {
        1.0 - share(self.filled, self.total())
    }

    /// A part's share of what is given or lost to holes.
    pub(super) fn part(&self, slots: usize) -> f64 {
        share(slots, self.allocated() + self.external)
    }

    /// Mean slots filled for a sequence: L.
    pub(super) fn mean_length(&self) -> f64 {
        share(self.filled, self.users)
    }
}

impl AddAssign for Held {
    fn add_assign(&mut self, other: Self) {
        let Self { filled, reserved, internal, external, free, users } = other;
        self.filled += filled;
        self.reserved += reserved;
        self.internal += internal;
        self.external += external;
        self.free += free;
        self.users += users;
    }
}

/// `part` over `whole`; 0 of nothing.
pub(super) fn share(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_blocks_are_the_whole_memory() {
        let blocks = BlockStats {
            total: 10,
            used: 4,
            filled_slots: 50,
            block_size: 16,
            ..BlockStats::default()
        };
        let paged = Held::of_blocks(Method::Paged, &blocks, 2);
        assert_eq!((paged.filled, paged.internal, paged.reserved, paged.free), (50, 14, 0, 96));
        assert_eq!((paged.total(), paged.allocated()), (160, 64));
        let contiguous = Held::of_blocks(Method::MaxLength, &blocks, 2);
        assert_eq!((contiguous.internal, contiguous.reserved), (0, 14));
        assert_eq!(paged.filled_share(), 50.0 / 64.0);
        assert_eq!(paged.empty_share(), 110.0 / 160.0);
        assert_eq!(paged.mean_length(), 25.0);
    }
}
