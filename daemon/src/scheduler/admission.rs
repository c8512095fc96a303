//! The second part of a step: waiting sequences take memory, in order, while the whole of their known tokens fits.

use std::sync::Arc;

use super::sequence::{Running, Sequence, SequenceKey, Waiting};
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
                let blocks = self.hits(key);
                // The source of a copy stays taken for the step: a block that another member may have been promised.
                let partial = match unit.len() {
                    1 => self.find_partial(key, blocks),
                    _ => None,
                };
                let cached = Cached { blocks, partial };
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
        let reserved = self.reserved_blocks();
        // The last known token is never a hit, so that each takes a block: no look-up is needed to refuse.
        if self.pool.available() < reserved + unit.len() {
            return false;
        }
        let needed: usize = unit.iter().map(|&key| self.blocks_needed_by(key)).sum();
        needed + reserved <= self.pool.available()
    }

    fn is_alone(&self) -> bool {
        self.running.is_empty() && self.pool.pending_free() == 0
    }

    fn reserved_blocks(&self) -> usize {
        match self.is_alone() {
            true => 0,
            false => self.blocks_outstanding() + self.limits.watermark_blocks,
        }
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

    /// Blocks that the running sequences lack for their tokens and for the choices to come.
    fn blocks_outstanding(&self) -> usize {
        let copies = |running: &Running| running.sequence.copies_due(self.limits.block_size);
        self.pool
            .blocks_to_write(self.running.iter().map(|running| running.write(running.needed())))
            + self.running.iter().map(copies).sum::<usize>()
    }

    /// Available blocks that a waiting sequence takes for all its known tokens.
    fn blocks_needed_by(&mut self, key: SequenceKey) -> usize {
        let (size, alone) = (self.limits.block_size, self.is_alone());
        let hits = self.hits(key);
        let Some(Waiting { sequence }) = self.waiting.get_mut(&key) else { return 0 };
        let revived = self.pool.unreferenced(sequence.keys(&self.hasher, size, hits));
        let copies = if alone { 0 } else { sequence.copies_due(size) };
        size.blocks_for(sequence.known()) - hits + revived + copies
    }

    /// Whether a sequence looks into the prefix cache at all.
    fn may_hit(&self, sequence: &Sequence) -> bool {
        self.limits.prefix_caching == PrefixCaching::Enabled && !sequence.needs_scores()
    }

    /// Full blocks of a waiting sequence that are cached. The last known token is always computed.
    fn hits(&mut self, key: SequenceKey) -> usize {
        let size = self.limits.block_size;
        match self.waiting.get(&key) {
            Some(Waiting { sequence }) if self.may_hit(sequence) => {}
            Some(_) | None => return 0,
        }
        let Some(Waiting { sequence }) = self.waiting.get_mut(&key) else { return 0 };
        let most = size.full_blocks(sequence.known() - 1);
        self.pool.hits(sequence.keys(&self.hasher, size, most))
    }

    /// The block after `hits` blocks that begins with most of what a waiting sequence goes on with.
    fn find_partial(&self, key: SequenceKey, hits: usize) -> Option<SharedPrefix> {
        let Waiting { sequence } = self.waiting.get(&key)?;
        if !self.may_hit(sequence) {
            return None;
        }
        let size = self.limits.block_size;
        let (first, most) = (hits * size.tokens(), sequence.known() - 1);
        let next: Vec<TokenId> = (first..most.min(first + size.tokens()))
            .map(|position| sequence.token(position))
            .collect();
        self.pool.longest_prefix(sequence.parent_key(hits), &next, self.next_step)
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
        let mut table = self.pool.share(&keys, size.blocks_for(sequence.request.longest()));
        let mut computed = cached.blocks * size.tokens();
        let source = cached.partial.filter(|_| self.spare_block_for(&sequence, cached.blocks));
        let copy = source.and_then(|source| self.pool.copy_prefix(&mut table, source).ok());
        if let Some(copy) = copy {
            self.pinned.push(copy.from);
            step.copies.push(copy);
            step.counts.prefix_copied_slots += copy.slots as usize;
            computed += copy.slots as usize;
        }
        self.say_admitted(&mut sequence, computed, step);
        sequence.reserve(size);
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
            // The step may write the blocks that it shares, even when nothing is left to compute of it.
            last_step: Some(step.id),
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
    fn spare_block_for(&self, sequence: &Sequence, hits: usize) -> bool {
        self.pool.available() > self.limits.block_size.blocks_for(sequence.known()) - hits
    }

    fn say_admitted(&mut self, sequence: &mut Sequence, computed: usize, step: &mut Step) {
        // What was copied or shared is not computed again.
        sequence.high_water = sequence.high_water.max(computed);
        if sequence.cached.is_some() {
            return;
        }
        sequence.cached = Some(computed);
        match self.may_hit(sequence) {
            true => step.counts.prefix_queries += sequence.known(),
            false => step.counts.unqueried_tokens += sequence.known(),
        }
        step.counts.prefix_hits += computed;
        self.effects.push(Effect::Admitted { id: sequence.request.id, cached_tokens: computed });
    }
}
