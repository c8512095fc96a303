//! The owner of all blocks: reference counts, the free list, and what is cached.
//!
//! The free list runs through the records in the order of reuse (least recently used first), the null block's record is
//! its head and tail, so that taking, giving back and reviving a block are O(1). The shape follows vLLM's V1 pool.

use std::collections::{HashMap, VecDeque};

use super::{BlockId, BlockKey, BlockSize, BlockTable, StepId};
use crate::request::TokenId;

/// Children of one cached block that are compared with a prompt when it shares only a part of one of them.
const MAX_COMPARED_CHILDREN: usize = 64;

/// Not enough blocks now. An ordinary answer: the caller waits or preempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{needed} blocks are needed, {free} are free")]
pub struct OutOfBlocks {
    pub needed: usize,
    pub free: usize,
}

/// The part of a cached block that a prompt begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedPrefix {
    pub block: BlockId,
    /// Slots of it, from the first, that hold the prompt's next tokens.
    pub slots: usize,
}

/// How the blocks are used; `used + cached + free` is `total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolUsage {
    /// Blocks without the null block.
    pub total: usize,
    /// Referenced, or waiting for a step in flight.
    pub used: usize,
    /// Of `used`: referenced more than once.
    pub shared: usize,
    /// References beyond the first.
    pub saved: usize,
    /// Unreferenced and findable.
    pub cached: usize,
    /// Unreferenced and empty.
    pub free: usize,
    /// Slots of used blocks that hold a token.
    pub filled_slots: usize,
}

#[derive(Debug, Clone)]
struct Record {
    references: u32,
    /// Slots from the first that hold a token.
    filled: u32,
    /// Neighbours in the free list; a block outside of it names itself.
    before: BlockId,
    after: BlockId,
    published: Option<Published>,
}

/// A block that can be found by its content.
#[derive(Debug, Clone, Copy)]
struct Published {
    key: BlockKey,
    parent: BlockKey,
    /// The step that computes its last slot.
    step: StepId,
    /// The next block with the same parent.
    sibling: Option<BlockId>,
}

/// Owns every block. Invariant: free + cached + referenced (or fenced) = total, and no block is written by two owners.
#[derive(Debug)]
pub struct BlockPool {
    size: BlockSize,
    records: Vec<Record>,
    /// Tokens of published blocks, [blocks, block size].
    tokens: Vec<TokenId>,
    by_key: HashMap<BlockKey, BlockId>,
    first_child: HashMap<BlockKey, BlockId>,
    /// Blocks whose references ended while a step in flight may still write them, oldest step first.
    fenced: VecDeque<(StepId, BlockId)>,
    n_free: usize,
    n_cached: usize,
    n_shared: usize,
    n_saved: usize,
    filled_slots: usize,
}

impl BlockPool {
    /// Makes a pool of `blocks` free blocks beside the null block.
    pub fn new(size: BlockSize, blocks: u32) -> Self {
        let n_records = blocks as usize + 1;
        let record = |id| Record {
            references: 0,
            filled: 0,
            before: BlockId(id),
            after: BlockId(id),
            published: None,
        };
        let mut pool = Self {
            size,
            records: (0..=blocks).map(record).collect(),
            tokens: vec![TokenId(0); n_records * size.tokens()],
            by_key: HashMap::new(),
            first_child: HashMap::new(),
            fenced: VecDeque::new(),
            n_free: 0,
            n_cached: 0,
            n_shared: 0,
            n_saved: 0,
            filled_slots: 0,
        };
        (1..=blocks).for_each(|id| pool.append_free(BlockId(id)));
        pool
    }

    /// Tokens per block.
    pub fn size(&self) -> BlockSize {
        self.size
    }

    /// Blocks without the null block.
    pub fn total(&self) -> usize {
        self.records.len() - 1
    }

    /// Blocks that can be taken now: empty ones and cached ones that nobody references.
    pub fn available(&self) -> usize {
        self.n_free
    }

    /// Blocks that become available when the steps in flight are collected.
    pub fn pending_free(&self) -> usize {
        self.fenced.len()
    }

    /// References held on a block.
    pub fn references(&self, block: BlockId) -> u32 {
        self.records[block.index()].references
    }

    /// Counts the blocks by use.
    pub fn usage(&self) -> PoolUsage {
        PoolUsage {
            total: self.total(),
            used: self.total() - self.n_free,
            shared: self.n_shared,
            saved: self.n_saved,
            cached: self.n_cached,
            free: self.n_free - self.n_cached,
            filled_slots: self.filled_slots,
        }
    }

    /// New blocks (copies included) that writing positions `computed..tokens` of the table takes.
    pub fn blocks_to_extend(&self, table: &BlockTable, computed: usize, tokens: usize) -> usize {
        let copy = usize::from(tokens > computed && self.tail_is_shared(table, computed));
        self.size.blocks_for(tokens).saturating_sub(table.len()) + copy
    }

    /// Makes positions `computed..tokens` of the table writable, or changes nothing.
    /// Where the block at `computed` is partly filled and shared, it is replaced by a private one
    /// and the copy that this needs is returned: copy-on-write.
    ///
    /// # Errors
    /// [`OutOfBlocks`] when fewer blocks are available than needed.
    pub fn extend(
        &mut self,
        table: &mut BlockTable,
        computed: usize,
        tokens: usize,
    ) -> Result<Option<SharedPrefixCopy>, OutOfBlocks> {
        let needed = self.blocks_to_extend(table, computed, tokens);
        if needed > self.n_free {
            return Err(OutOfBlocks { needed, free: self.n_free });
        }
        let copy = (tokens > computed && self.tail_is_shared(table, computed)).then(|| {
            let entry = self.size.full_blocks(computed);
            let (from, to) = (table.blocks[entry], self.take());
            table.blocks[entry] = to;
            self.release_block(from);
            self.fill(to, self.size.tail(computed));
            SharedPrefixCopy { from, to, slots: self.size.tail(computed) }
        });
        while table.len() < self.size.blocks_for(tokens) {
            let block = self.take();
            table.blocks.push(block);
        }
        self.fill_range(table, computed, tokens);
        Ok(copy)
    }

    /// A second table over the first `tokens` tokens of `table`. Shared blocks are copied when one owner writes.
    pub fn fork(&mut self, table: &BlockTable, tokens: usize) -> BlockTable {
        let blocks = table.blocks[..self.size.blocks_for(tokens)].to_vec();
        blocks.iter().for_each(|&block| self.reference(block));
        BlockTable { blocks }
    }

    /// Gives the table's blocks back, the last one first, so that beginnings stay cached longest.
    /// With `after` they become available when that step, which may still write them, is collected.
    pub fn release(&mut self, table: BlockTable, after: Option<StepId>) {
        for &block in table.blocks.iter().rev() {
            match after {
                Some(step) if self.records[block.index()].references == 1 => {
                    self.fence(block, step)
                }
                Some(_) | None => self.release_block(block),
            }
        }
    }

    /// Lifts the fences of `step` and earlier steps.
    pub fn collected(&mut self, step: StepId) {
        while let Some(&(fenced, block)) = self.fenced.front() {
            if fenced > step {
                break;
            }
            self.fenced.pop_front();
            self.release_block(block);
        }
    }

    /// Leading blocks of `keys` that are cached.
    pub fn hits(&self, keys: &[BlockKey]) -> usize {
        keys.iter().take_while(|key| self.by_key.contains_key(key)).count()
    }

    /// How many of the first `hits` cached blocks of `keys` are not referenced: taking them uses up available blocks.
    pub fn unreferenced(&self, keys: &[BlockKey]) -> usize {
        let idle = |key: &&BlockKey| {
            self.by_key.get(key).is_some_and(|&block| self.references(block) == 0)
        };
        keys.iter().filter(idle).count()
    }

    /// A table over the cached blocks of `keys`, all of which must be cached ([`BlockPool::hits`]).
    pub fn share(&mut self, keys: &[BlockKey]) -> BlockTable {
        let blocks: Vec<BlockId> =
            keys.iter().filter_map(|key| self.by_key.get(key).copied()).collect();
        debug_assert_eq!(blocks.len(), keys.len(), "every key was a hit");
        blocks.iter().for_each(|&block| self.reference(block));
        BlockTable { blocks }
    }

    /// The cached block after `parent` that begins with the most of `tokens`, computed before `step`.
    pub fn longest_prefix(
        &self,
        parent: BlockKey,
        tokens: &[TokenId],
        step: StepId,
    ) -> Option<SharedPrefix> {
        let mut child = self.first_child.get(&parent).copied();
        let mut best: Option<SharedPrefix> = None;
        for _ in 0..MAX_COMPARED_CHILDREN {
            let Some(block) = child else { break };
            let published = self.records[block.index()].published?;
            let slots = self.common_tokens(block, tokens);
            if published.step < step && slots > best.map_or(0, |best| best.slots) {
                best = Some(SharedPrefix { block, slots });
            }
            child = published.sibling;
        }
        best
    }

    /// Appends a private block to `table` that will receive the slots of a cached one.
    /// The source is referenced until [`BlockPool::unpin`], so that this step cannot reuse it.
    ///
    /// # Errors
    /// [`OutOfBlocks`] when none is available beside the source.
    pub fn copy_prefix(
        &mut self,
        table: &mut BlockTable,
        source: SharedPrefix,
    ) -> Result<SharedPrefixCopy, OutOfBlocks> {
        self.reference(source.block);
        if self.n_free == 0 {
            self.release_block(source.block);
            return Err(OutOfBlocks { needed: 1, free: 0 });
        }
        let to = self.take();
        table.blocks.push(to);
        self.fill(to, source.slots);
        Ok(SharedPrefixCopy { from: source.block, to, slots: source.slots })
    }

    /// Ends the reference that [`BlockPool::copy_prefix`] holds on its source.
    pub fn unpin(&mut self, source: BlockId) {
        self.release_block(source);
    }

    /// Makes a full block findable, unless an equal one already is. `tokens` are the block's.
    pub fn publish(
        &mut self,
        block: BlockId,
        keys: ChainedKey,
        tokens: impl Iterator<Item = TokenId>,
        step: StepId,
    ) {
        if self.by_key.contains_key(&keys.key) || self.records[block.index()].published.is_some() {
            return;
        }
        let first = block.index() * self.size.tokens();
        self.tokens[first..first + self.size.tokens()]
            .iter_mut()
            .zip(tokens)
            .for_each(|(slot, token)| *slot = token);
        let sibling = self.first_child.insert(keys.parent, block);
        self.records[block.index()].published =
            Some(Published { key: keys.key, parent: keys.parent, step, sibling });
        self.by_key.insert(keys.key, block);
    }

    /// Checks every invariant; for tests and for debug builds when the engine is idle.
    ///
    /// # Panics
    /// When the bookkeeping contradicts itself.
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) {
        let mut references = vec![0_u32; self.records.len()];
        tables.flat_map(|table| table.blocks()).for_each(|block| references[block.index()] += 1);
        self.fenced.iter().for_each(|(_, block)| references[block.index()] += 1);
        for (id, record) in self.records.iter().enumerate() {
            assert_eq!(record.references, references[id], "references of block {id}");
        }
        let mut listed = 0;
        let mut block = self.records[0].after;
        while block != BlockId::NULL {
            assert_eq!(self.records[block.index()].references, 0, "a free block is referenced");
            listed += 1;
            assert!(listed <= self.total(), "the free list is a cycle");
            block = self.records[block.index()].after;
        }
        assert_eq!(listed, self.n_free, "the free list and its count");
        let held = references.iter().filter(|&&count| count > 0).count();
        assert_eq!(held + self.n_free, self.total(), "blocks are conserved");
        let cached = self
            .records
            .iter()
            .skip(1)
            .filter(|r| r.references == 0 && r.published.is_some())
            .count();
        assert_eq!(cached, self.n_cached, "cached blocks and their count");
        let shared = references.iter().filter(|&&count| count > 1).count();
        assert_eq!(shared, self.n_shared, "shared blocks and their count");
        let filled: u32 = self.records.iter().filter(|r| r.references > 0).map(|r| r.filled).sum();
        assert_eq!(filled as usize, self.filled_slots, "filled slots and their count");
    }

    fn tail_is_shared(&self, table: &BlockTable, computed: usize) -> bool {
        let entry = table.blocks.get(self.size.full_blocks(computed));
        self.size.tail(computed) > 0 && entry.is_some_and(|&block| self.references(block) > 1)
    }

    fn common_tokens(&self, block: BlockId, tokens: &[TokenId]) -> usize {
        let first = block.index() * self.size.tokens();
        let cached = &self.tokens[first..first + self.size.tokens()];
        cached.iter().zip(tokens).take_while(|(a, b)| a == b).count()
    }

    /// Takes the least recently used available block; the caller has checked that there is one.
    fn take(&mut self) -> BlockId {
        let block = self.records[0].after;
        debug_assert_ne!(block, BlockId::NULL, "the caller checks that a block is available");
        self.evict(block);
        self.records[block.index()].filled = 0;
        self.reference(block);
        block
    }

    /// Forgets what a block holds.
    fn evict(&mut self, block: BlockId) {
        let Some(published) = self.records[block.index()].published.take() else { return };
        self.by_key.remove(&published.key);
        self.n_cached -= usize::from(self.references(block) == 0);
        let head = self.first_child.get(&published.parent).copied();
        if head == Some(block) {
            match published.sibling {
                Some(next) => self.first_child.insert(published.parent, next),
                None => self.first_child.remove(&published.parent),
            };
            return;
        }
        let mut cursor = head;
        while let Some(before) = cursor {
            let Some(link) = &mut self.records[before.index()].published else { break };
            if link.sibling == Some(block) {
                link.sibling = published.sibling;
                break;
            }
            cursor = link.sibling;
        }
    }

    fn reference(&mut self, block: BlockId) {
        if self.references(block) == 0 {
            self.unlink_free(block);
            let record = &self.records[block.index()];
            self.n_cached -= usize::from(record.published.is_some());
            self.filled_slots += record.filled as usize;
        }
        let record = &mut self.records[block.index()];
        record.references += 1;
        self.n_shared += usize::from(record.references == 2);
        self.n_saved += usize::from(record.references >= 2);
    }

    fn release_block(&mut self, block: BlockId) {
        let record = &mut self.records[block.index()];
        debug_assert!(record.references > 0, "a reference is given back once");
        record.references -= 1;
        self.n_shared -= usize::from(record.references == 1);
        self.n_saved -= usize::from(record.references >= 1);
        if record.references > 0 {
            return;
        }
        self.filled_slots -= record.filled as usize;
        if record.published.is_some() {
            self.n_cached += 1;
            self.append_free(block);
        } else {
            self.prepend_free(block);
        }
    }

    fn fence(&mut self, block: BlockId, step: StepId) {
        let later = self.fenced.partition_point(|&(fenced, _)| fenced <= step);
        self.fenced.insert(later, (step, block));
    }

    fn fill_range(&mut self, table: &BlockTable, computed: usize, tokens: usize) {
        let size = self.size.tokens();
        for entry in computed / size..self.size.blocks_for(tokens) {
            self.fill(table.blocks[entry], (tokens - entry * size).min(size));
        }
    }

    /// Says that the first `slots` slots of a referenced block hold tokens.
    fn fill(&mut self, block: BlockId, slots: usize) {
        let record = &mut self.records[block.index()];
        let filled = u32::try_from(slots).unwrap_or(u32::MAX).max(record.filled);
        self.filled_slots += (filled - record.filled) as usize;
        record.filled = filled;
    }

    /// The next to be reused.
    fn prepend_free(&mut self, block: BlockId) {
        self.link_free(BlockId::NULL, block, self.records[0].after);
    }

    /// The last to be reused.
    fn append_free(&mut self, block: BlockId) {
        self.link_free(self.records[0].before, block, BlockId::NULL);
    }

    fn link_free(&mut self, before: BlockId, block: BlockId, after: BlockId) {
        self.records[before.index()].after = block;
        self.records[after.index()].before = block;
        let record = &mut self.records[block.index()];
        (record.before, record.after) = (before, after);
        self.n_free += 1;
    }

    fn unlink_free(&mut self, block: BlockId) {
        let Record { before, after, .. } = self.records[block.index()];
        self.records[before.index()].after = after;
        self.records[after.index()].before = before;
        let record = &mut self.records[block.index()];
        (record.before, record.after) = (block, block);
        self.n_free -= 1;
    }
}

/// Slots to copy before the next write: the first `slots` of `from` to those of `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedPrefixCopy {
    pub from: BlockId,
    pub to: BlockId,
    pub slots: usize,
}

/// A block's key and that of the block before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainedKey {
    pub parent: BlockKey,
    pub key: BlockKey,
}
