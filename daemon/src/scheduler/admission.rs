//! The second part of a step: waiting sequences take memory, in order, while the whole of their known tokens fits.

use std::sync::Arc;

use super::sequence::{Running, SequenceKey, Waiting};
use super::step::{RowChange, Step};
use super::{Effect, PrefixCaching, Scheduler};
use crate::kv::{BlockKey, SharedPrefix};
use crate::request::TokenId;

/// What the prefix cache has of a waiting sequence.
struct Cached {
    /// Full blocks from the first.
    blocks: usize,
    /// The block after them that begins with the sequence's next tokens.
    partial: Option<SharedPrefix>,
}

impl Scheduler {
    /// Admits waiting sequences in order until one does not fit or the budget is spent.
    pub(super) fn admit(&mut self, step: &mut Step, mut budget: usize) {
        let mut unit = Vec::new();
        while budget > 0 {
            self.next_unit(&mut unit);
            if unit.is_empty() || !self.fits(&unit) {
                return;
            }
            for &key in &unit {
                let cached = self.find_cached(key);
                if let Some(waiting) = self.waiting.remove(&key) {
                    budget -= self.start(waiting, cached, budget, step);
                }
            }
        }
    }

    /// The sequences that must be admitted together next: all beams of a search, or one sequence.
    fn next_unit(&self, unit: &mut Vec<SequenceKey>) {
        unit.clear();
        let Some((&first, waiting)) = self.waiting.first_key_value() else { return };
        unit.push(first);
        if waiting.sequence.is_beam() {
            let beams = self.waiting.keys().skip(1).take_while(|key| key.same_request(first));
            unit.extend(beams);
        }
    }

    /// Whether rows and blocks are there for the whole unit: for all its known tokens, for what the running ones still
    /// need for theirs, and above the watermark. The last two, and the copies of choices to come, count only while
    /// something runs: alone, every request goes on.
    fn fits(&mut self, unit: &[SequenceKey]) -> bool {
        let members = || unit.iter().filter_map(|key| self.waiting.get(key));
        if members().any(|waiting| waiting.sequence.in_flight > 0) {
            return false;
        }
        let rows = members().map(|waiting| 1 + waiting.sequence.forks_due as usize).sum::<usize>();
        let rows = rows.max(self.spare_rows_of(unit[0]) + unit.len());
        if rows + self.reserved_rows() > self.free_rows.len() {
            return false;
        }
        let alone = self.running.is_empty() && self.pool.pending_free() == 0;
        let mut needed = 0;
        for key in unit {
            needed += self.blocks_needed_by(*key, alone);
        }
        let reserved =
            if alone { 0 } else { self.blocks_outstanding() + self.limits.watermark_blocks };
        needed + reserved <= self.pool.available()
    }

    /// Rows that running requests will still take: for choices to come and for beams that ended.
    fn reserved_rows(&self) -> usize {
        let forks = self.running.iter().map(|running| running.sequence.forks_due as usize);
        let firsts = self.running.iter().enumerate().filter(|(index, running)| {
            let before = index.checked_sub(1).map(|before| self.running[before].sequence.key);
            running.sequence.is_beam()
                && !before.is_some_and(|key| key.same_request(running.sequence.key))
        });
        forks.sum::<usize>()
            + firsts.map(|(_, running)| self.spare_rows_of(running.sequence.key)).sum::<usize>()
    }

    /// How many more beams than it has now the search of `key` may have.
    fn spare_rows_of(&self, key: SequenceKey) -> usize {
        let sequence = match self.find_running(key) {
            Ok(index) => &self.running[index].sequence,
            Err(_) => match self.waiting.get(&key) {
                Some(waiting) => &waiting.sequence,
                None => return 0,
            },
        };
        let live = self.requests.get(&sequence.request.id);
        live.and_then(|live| live.beams.as_ref()).map_or(0, |beams| beams.spare(&sequence.request))
    }

    /// Blocks that the running sequences lack for their known tokens and for the choices to come.
    fn blocks_outstanding(&self) -> usize {
        let size = self.limits.block_size;
        let lacks = |running: &Running| {
            let copies = running.sequence.forks_due as usize
                * usize::from(size.tail(running.sequence.known()) > 0);
            size.blocks_for(running.sequence.total()).saturating_sub(running.table.len()) + copies
        };
        self.running.iter().map(lacks).sum()
    }

    /// Available blocks that a waiting sequence takes for all its known tokens.
    fn blocks_needed_by(&mut self, key: SequenceKey, alone: bool) -> usize {
        let size = self.limits.block_size;
        let hits = self.find_cached(key).blocks;
        let Some(Waiting { sequence }) = self.waiting.get_mut(&key) else { return 0 };
        let revived = self.pool.unreferenced(sequence.keys(&self.hasher, size, hits));
        let copies = sequence.forks_due as usize * usize::from(size.tail(sequence.known()) > 0);
        size.blocks_for(sequence.known()) - hits + revived + if alone { 0 } else { copies }
    }

    /// Looks a waiting sequence up in the prefix cache. The last known token is always computed.
    fn find_cached(&mut self, key: SequenceKey) -> Cached {
        let none = Cached { blocks: 0, partial: None };
        let Some(Waiting { sequence }) = self.waiting.get_mut(&key) else { return none };
        if self.limits.prefix_caching == PrefixCaching::Disabled || sequence.needs_scores() {
            return none;
        }
        let size = self.limits.block_size;
        let most = sequence.known() - 1;
        let blocks = self.pool.hits(sequence.keys(&self.hasher, size, size.full_blocks(most)));
        let first = blocks * size.tokens();
        let next: Vec<TokenId> = (first..most.min(first + size.tokens()))
            .map(|position| sequence.token(position))
            .collect();
        let partial = self.pool.longest_prefix(sequence.parent_key(blocks), &next, self.next_step);
        Cached { blocks, partial }
    }

    /// Makes a waiting sequence run and computes its first chunk; returns the chunk's tokens.
    fn start(
        &mut self,
        Waiting { mut sequence }: Waiting,
        cached: Cached,
        budget: usize,
        step: &mut Step,
    ) -> usize {
        let key = sequence.key;
        let Some(row) = self.free_rows.pop() else {
            debug_assert!(false, "admission checked that a row is free");
            return 0;
        };
        let size = self.limits.block_size;
        let keys: Vec<BlockKey> = sequence.keys(&self.hasher, size, cached.blocks).to_vec();
        let mut table = self.pool.share(&keys);
        let mut computed = cached.blocks * size.tokens();
        let source = cached.partial.filter(|_| self.spare_block_for(&sequence, cached.blocks));
        let copy = source.and_then(|source| self.pool.copy_prefix(&mut table, source).ok());
        if let Some(copy) = copy {
            self.pinned.push(copy.from);
            step.copies.push(super::running::block_copy(copy));
            step.counts.prefix_copied_slots += copy.slots;
            computed += copy.slots;
        }
        self.say_admitted(&mut sequence, computed, step);
        let capacity = sequence.request.max_tokens.get() as usize - sequence.output.len();
        sequence.output.reserve_exact(capacity);
        let (request, choice) = (Arc::clone(&sequence.request), key.member);
        let history = (0..sequence.known()).map(|position| sequence.token(position)).collect();
        self.row_changes.push(RowChange::Admit { row, request, choice, history });
        let published = cached.blocks;
        let running = Running {
            sequence,
            computed,
            table,
            row,
            published,
            last_step: None,
            candidates: None,
        };
        let index = self.running.partition_point(|other| other.sequence.key < key);
        let tokens = running.pending().min(budget).min(self.limits.chunk_tokens(computed));
        self.running.insert(index, running);
        if tokens > 0 {
            self.compute(index, tokens, step);
            self.publish(index);
        }
        tokens
    }

    /// Whether a block stays for the source of a copy, which this step may not reuse, beside what the sequence takes.
    fn spare_block_for(&self, sequence: &super::Sequence, hits: usize) -> bool {
        self.pool.available() > self.limits.block_size.blocks_for(sequence.known()) - hits
    }

    fn say_admitted(&mut self, sequence: &mut super::Sequence, computed: usize, step: &mut Step) {
        // What was copied or shared is not computed again.
        sequence.high_water = sequence.high_water.max(computed);
        if sequence.cached.is_none() {
            sequence.cached = Some(computed);
            step.counts.prefix_queries += sequence.known();
            step.counts.prefix_hits += computed;
            self.effects
                .push(Effect::Admitted { id: sequence.request.id, cached_tokens: computed });
        }
    }
}
