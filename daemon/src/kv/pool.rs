//! The owner of all blocks: reference counts, the free list, and what is cached.
//!
//! The free list runs through the records in the order of reuse (least recently used first), the null block's record is
//! its head and tail, so that taking, giving back and reviving a block are O(1). The shape follows vLLM's V1 pool.

use std::collections::{HashMap, VecDeque};

use super::{BlockId, BlockKey, BlockSize, BlockTable, StepId};
use crate::request::TokenId;

/// Children of one cached block that are compared with a prompt when it shares only a part of one of them.
const MAX_COMPARED_CHILDREN: usize = 64;

/// Children that are looked at for those: the newest ones, of the step that is planned, cannot be copied yet.
const MAX_VISITED_CHILDREN: usize = 1024;

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

/// The first `slots` slots of block `from` are copied over those of block `to`, in all layers.
/// All copies of a batch happen before anything of the batch is computed, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    pub from: BlockId,
    pub to: BlockId,
    pub slots: u32,
}

impl BlockCopy {
    fn of(from: BlockId, to: BlockId, slots: usize) -> Self {
        Self { from, to, slots: u32::try_from(slots).unwrap_or(u32::MAX) }
    }
}

/// Positions `computed..tokens` of a table, which are to be written.
#[derive(Debug, Clone, Copy)]
pub struct Write<'a> {
    pub table: &'a BlockTable,
    pub computed: usize,
    pub tokens: usize,
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
    /// The blocks with the same parent that were published next and last before this one.
    newer: Option<BlockId>,
    older: Option<BlockId>,
}

/// Owns every block. Invariant: free + cached + referenced (or fenced) = total, and no block is written by two owners.
#[derive(Debug)]
pub struct BlockPool {
    size: BlockSize,
    records: Vec<Record>,
    /// Tokens of published blocks, [blocks, block size].
    tokens: Vec<TokenId>,
    by_key: HashMap<BlockKey, BlockId>,
    /// The child that was published last; the others follow by [`Published::older`].
    newest_child: HashMap<BlockKey, BlockId>,
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
            by_key: HashMap::with_capacity(blocks as usize),
            newest_child: HashMap::with_capacity(blocks as usize),
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

    /// New blocks (copies included) that all of `writes` take together.
    pub fn blocks_to_write<'a>(&self, writes: impl Iterator<Item = Write<'a>>) -> usize {
        let mut shared_tails = Vec::new();
        let mut new_blocks = 0;
        for Write { table, computed, tokens } in writes {
            new_blocks += self.size.blocks_for(tokens).saturating_sub(table.len());
            if tokens > computed {
                shared_tails.extend(self.shared_tail(table, computed));
            }
        }
        new_blocks + self.copies_of(shared_tails)
    }

    /// Every owner that writes into a shared block copies it, but the last one left has it for itself.
    fn copies_of(&self, mut written: Vec<BlockId>) -> usize {
        written.sort_unstable();
        let copies = |owners: &[BlockId]| {
            let others = self.references(owners[0]) as usize - 1;
            owners.len().min(others)
        };
        written.chunk_by(|a, b| a == b).map(copies).sum()
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
    ) -> Result<Option<BlockCopy>, OutOfBlocks> {
        let needed = self.blocks_to_write([Write { table, computed, tokens }].into_iter());
        if needed > self.n_free {
            return Err(OutOfBlocks { needed, free: self.n_free });
        }
        let shared = self.shared_tail(table, computed).filter(|_| tokens > computed);
        let copy = shared.map(|from| {
            let (to, slots) = (self.take(), self.size.tail(computed));
            table.blocks[self.size.full_blocks(computed)] = to;
            self.release_block(from);
            self.fill(to, slots);
            BlockCopy::of(from, to, slots)
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
        let mut blocks = Vec::with_capacity(table.blocks.capacity());
        blocks.extend_from_slice(&table.blocks[..self.size.blocks_for(tokens)]);
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
    /// It grows to `most` blocks without an allocation.
    pub fn share(&mut self, keys: &[BlockKey], most: usize) -> BlockTable {
        let mut blocks = Vec::with_capacity(most);
        blocks.extend(keys.iter().filter_map(|key| self.by_key.get(key)));
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
        let computed = |block: &BlockId| self.published(*block).is_some_and(|p| p.step < step);
        let mut best: Option<SharedPrefix> = None;
        let candidates = self.children(parent).take(MAX_VISITED_CHILDREN).filter(computed);
        for block in candidates.take(MAX_COMPARED_CHILDREN) {
            let slots = self.common_tokens(block, tokens);
            if slots > best.map_or(0, |best| best.slots) {
                best = Some(SharedPrefix { block, slots });
            }
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
    ) -> Result<BlockCopy, OutOfBlocks> {
        self.reference(source.block);
        if self.n_free == 0 {
            self.release_block(source.block);
            return Err(OutOfBlocks { needed: 1, free: 0 });
        }
        let to = self.take();
        table.blocks.push(to);
        self.fill(to, source.slots);
        Ok(BlockCopy::of(source.block, to, source.slots))
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
        let ChainedKey { parent, key } = keys;
        let older = self.newest_child.insert(parent, block);
        self.link_sibling(older, |link| link.newer = Some(block));
        self.records[block.index()].published =
            Some(Published { key, parent, step, newer: None, older });
        self.by_key.insert(key, block);
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
        let saved: u32 = references.iter().map(|count| count.saturating_sub(1)).sum();
        assert_eq!(saved as usize, self.n_saved, "references beyond the first and their count");
        let filled: u32 = self.records.iter().filter(|r| r.references > 0).map(|r| r.filled).sum();
        assert_eq!(filled as usize, self.filled_slots, "filled slots and their count");
        self.check_published();
    }

    /// What is findable by key is what is published, and every published block is once among its parent's children.
    fn check_published(&self) {
        let n_published = self.records.iter().filter(|record| record.published.is_some()).count();
        assert_eq!(n_published, self.by_key.len(), "published blocks and their keys");
        for (key, &block) in &self.by_key {
            let published = self.published(block);
            assert_eq!(published.map(|p| p.key), Some(*key), "the key of block {block:?}");
        }
        let mut n_children = 0;
        for &parent in self.newest_child.keys() {
            let mut newer = None;
            for block in self.children(parent) {
                let published = self.published(block);
                assert_eq!(published.map(|p| (p.parent, p.newer)), Some((parent, newer)));
                newer = Some(block);
                n_children += 1;
                assert!(n_children <= n_published, "the children of a block are a cycle");
            }
        }
        assert_eq!(n_children, n_published, "published blocks and the children of all");
    }

    /// The partly filled block at `computed` when others own it too.
    fn shared_tail(&self, table: &BlockTable, computed: usize) -> Option<BlockId> {
        let block = *table.blocks.get(self.size.full_blocks(computed))?;
        (self.size.tail(computed) > 0 && self.references(block) > 1).then_some(block)
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
        let Published { parent, newer, older, .. } = published;
        self.link_sibling(newer, |link| link.older = older);
        self.link_sibling(older, |link| link.newer = newer);
        match (newer, older) {
            (Some(_), _) => None,
            (None, Some(older)) => self.newest_child.insert(parent, older),
            (None, None) => self.newest_child.remove(&parent),
        };
    }

    fn link_sibling(&mut self, sibling: Option<BlockId>, link: impl FnOnce(&mut Published)) {
        let record = sibling.map(|block| &mut self.records[block.index()]);
        record.and_then(|record| record.published.as_mut()).map(link);
    }

    fn published(&self, block: BlockId) -> Option<&Published> {
        self.records[block.index()].published.as_ref()
    }

    /// The cached blocks after `parent`, the one published last first.
    fn children(&self, parent: BlockKey) -> impl Iterator<Item = BlockId> {
        let newest = self.newest_child.get(&parent).copied();
        std::iter::successors(newest, |&block| self.published(block)?.older)
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

/// A block's key and that of the block before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainedKey {
    pub parent: BlockKey,
    pub key: BlockKey,
}

#[cfg(test)]
mod tests;
