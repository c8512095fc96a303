//! What the next step computes. Pure: counts and tables, never tensors, never a clock.
//!
//! There is no prefill and no decode phase: every sequence has *computed* and *total* tokens, and a step gives tokens
//! from one budget to those that have some pending, running sequences first, then waiting ones.

mod admission;
mod beams;
mod commit;
mod limits;
mod running;
mod sequence;
pub mod step;
#[cfg(test)]
pub(crate) mod tests;

pub use limits::{Limits, PrefixCaching};
pub use sequence::SequenceKey;

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;
use std::sync::Arc;

use beams::BeamGroup;
use sequence::{Running, Sequence, Waiting};
use step::{RowChange, RowId, Step};

use crate::kv::{BlockId, BlockPool, BlockSize, BlockTable, PoolUsage, PrefixHasher, StepId};
use crate::request::{Beam, Decoding, FinishReason, Request, RequestId, TokenId, TokenLogprobs};

/// The most blocks that the request may need for one schedulable unit:
/// a beam search moves as one, the choices of a sampled request run one by one if they must.
pub fn blocks_needed(request: &Request, size: BlockSize) -> usize {
    let per_sequence = size.blocks_for(request.longest());
    match &request.decoding {
        Decoding::Sample { .. } => per_sequence,
        // One more each: a beam that writes into a shared last block holds the old and the new one for a moment.
        Decoding::Beam(beam) => (per_sequence + 1) * beam.width.get() as usize,
    }
}

/// What a request's owner should be told.
#[derive(Debug, PartialEq)]
pub enum Effect {
    Admitted { id: RequestId, cached_tokens: usize },
    Preempted { id: RequestId, choice: u32, tokens: usize },
    Token { id: RequestId, choice: u32, token: TokenId, logprobs: Option<Box<TokenLogprobs>> },
    PromptLogprobs { id: RequestId, logprobs: Vec<TokenLogprobs> },
    Beams { id: RequestId, beams: Vec<Beam> },
    Finished { id: RequestId, choice: u32, reason: FinishReason, stop_token: Option<TokenId> },
}

/// A request with sequences in the scheduler.
#[derive(Debug)]
struct Live {
    priority: i32,
    arrival: u64,
    /// Choices that have not ended.
    choices: u32,
    beams: Option<BeamGroup>,
}

/// What a sequence leaves that gave up its memory.
struct Freed {
    waiting: Waiting,
    table: BlockTable,
    /// The step in flight that may still write the table's blocks.
    after: Option<StepId>,
}

impl Live {
    /// The keys of all its members.
    fn keys(&self) -> RangeInclusive<SequenceKey> {
        let key = |member| SequenceKey { priority: self.priority, arrival: self.arrival, member };
        key(0)..=key(u32::MAX)
    }
}

/// Owns every sequence and every block.
///
/// Invariants: `running` is sorted by key and holds distinct rows; a sequence is in `running` or in `waiting`;
/// what runs and what preemption and admission order is decided by keys alone.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    hasher: PrefixHasher,
    requests: HashMap<RequestId, Live>,
    waiting: BTreeMap<SequenceKey, Waiting>,
    running: Vec<Running>,
    free_rows: Vec<RowId>,
    /// Changes that the next step tells the backend.
    row_changes: Vec<RowChange>,
    /// Sources of this step's copies from cached blocks.
    pinned: Vec<BlockId>,
    effects: Vec<Effect>,
    next_step: StepId,
    /// The last step whose results are known.
    collected: StepId,
    next_arrival: u64,
    discarded_tokens: usize,
}

impl Scheduler {
    /// An empty scheduler. `secret` keys the prefix cache and should be random for each process.
    pub fn new(limits: Limits, secret: [u8; 32]) -> Self {
        Self {
            limits,
            pool: BlockPool::new(limits.block_size, limits.blocks),
            hasher: PrefixHasher::new(secret),
            requests: HashMap::new(),
            waiting: BTreeMap::new(),
            running: Vec::new(),
            free_rows: (0..limits.max_num_seqs).rev().map(RowId).collect(),
            row_changes: Vec::new(),
            pinned: Vec::new(),
            effects: Vec::new(),
            next_step: StepId(1),
            collected: StepId(0),
            next_arrival: 0,
            discarded_tokens: 0,
        }
    }

    /// Takes a request in. It fits the pool by [`blocks_needed`] and is no wider than `max_num_seqs`.
    pub fn submit(&mut self, request: Arc<Request>) {
        let arrival = self.next_arrival;
        self.next_arrival += 1;
        let (priority, id) = (request.priority, request.id);
        let choices = request.choices().get();
        let beams = match &request.decoding {
            Decoding::Sample { .. } => None,
            Decoding::Beam(params) => Some(BeamGroup::new(*params, &request)),
        };
        let key = SequenceKey { priority, arrival, member: 0 };
        let sequence = Sequence::new(key, Arc::clone(&request), self.hasher.root(request.salt));
        self.requests.insert(id, Live { priority, arrival, choices, beams });
        self.waiting.insert(key, Waiting { sequence });
    }

    /// Plans the next step into `step`. `false`: nothing can be computed now, and `step` is to be ignored
    /// (its copies and row changes stay for the next one).
    pub fn schedule(&mut self, step: &mut Step) -> bool {
        step.restart(self.next_step);
        let budget = self.schedule_running(step);
        if step.counts.preemptions == 0 {
            self.admit(step, budget);
        }
        self.pinned.drain(..).for_each(|block| self.pool.unpin(block));
        if step.chunks.is_empty() {
            debug_assert!(step.copies.is_empty(), "copies belong to scheduled sequences");
            return false;
        }
        step.rows.append(&mut self.row_changes);
        self.next_step = StepId(self.next_step.0 + 1);
        true
    }

    /// Ends every choice of a request; nothing is said about it. `None` when it is not here.
    pub fn cancel(&mut self, id: RequestId) -> Option<()> {
        let live = self.requests.remove(&id)?;
        let keys = live.keys();
        let first = self.running.partition_point(|running| running.sequence.key < *keys.start());
        while self.running.get(first).is_some_and(|running| keys.contains(&running.sequence.key)) {
            self.stop_running(first);
        }
        while let Some((&key, _)) = self.waiting.range(keys.clone()).next() {
            self.waiting.remove(&key);
        }
        Some(())
    }

    /// Ends one choice whose owner found a stop string; nothing is said about it.
    /// A choice that has ended, or is not forked yet, is left alone.
    pub fn finish(&mut self, id: RequestId, choice: u32) {
        let Some(live) = self.requests.get(&id) else { return };
        let key = SequenceKey { priority: live.priority, arrival: live.arrival, member: choice };
        if live.beams.is_some() {
            return;
        }
        if let Ok(index) = self.find_running(key) {
            self.stop_running(index);
        } else if self.waiting.remove(&key).is_none() {
            return;
        }
        self.choice_ended(id);
    }

    /// What has happened since the last call.
    pub fn take_effects(&mut self) -> std::vec::Drain<'_, Effect> {
        self.effects.drain(..)
    }

    /// Whether no request is here.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Sequences with memory.
    pub fn n_running(&self) -> usize {
        self.running.len()
    }

    /// Sequences without memory.
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// How the blocks are used.
    pub fn usage(&self) -> PoolUsage {
        self.pool.usage()
    }

    /// The most slots that a running sequence holds and has not filled.
    pub fn most_empty_slots(&self) -> usize {
        let size = self.limits.block_size.tokens();
        let empty = |running: &Running| running.table.len() * size - running.computed;
        self.running.iter().map(empty).max().unwrap_or_default()
    }

    /// Tokens drawn for sequences that had ended, since the start.
    pub fn discarded_tokens(&self) -> usize {
        self.discarded_tokens
    }

    /// Checks every invariant; for tests and for debug builds when the engine is idle.
    ///
    /// # Panics
    /// When the bookkeeping contradicts itself.
    pub fn check(&self) {
        self.pool.check(self.running.iter().map(|running| &running.table));
        assert!(
            self.running.is_sorted_by(|a, b| a.sequence.key < b.sequence.key),
            "running is sorted"
        );
        assert_eq!(
            self.free_rows.len() + self.running.len(),
            self.limits.max_num_seqs as usize,
            "rows are conserved"
        );
        let size = self.limits.block_size;
        for Running { sequence, computed, table, .. } in &self.running {
            assert!(*computed <= sequence.total(), "no more is computed than there is");
            assert_eq!(
                table.len(),
                size.blocks_for(*computed),
                "at most block size - 1 slots are empty"
            );
        }
    }

    fn find_running(&self, key: SequenceKey) -> Result<usize, usize> {
        self.running.binary_search_by_key(&key, |running| running.sequence.key)
    }

    /// Takes a running sequence out and gives back what it holds.
    fn stop_running(&mut self, index: usize) -> Sequence {
        let Freed { waiting, table, after } = self.take_memory(index);
        self.pool.release(table, after);
        waiting.sequence
    }

    /// Takes a running sequence out: its row is free, its table is the caller's to release.
    fn take_memory(&mut self, index: usize) -> Freed {
        let running = self.running.remove(index);
        let after = running.last_step.filter(|&step| step > self.collected);
        self.free_rows.push(running.row);
        self.row_changes.push(RowChange::Release { row: running.row });
        let (waiting, table) = running.preempt();
        Freed { waiting, table, after }
    }

    fn choice_ended(&mut self, id: RequestId) {
        if let Some(live) = self.requests.get_mut(&id) {
            live.choices -= 1;
            if live.choices == 0 {
                self.requests.remove(&id);
            }
        }
    }

    /// Blocks of the sequence whose tokens are known and whose KV is computed, or is being computed, become findable.
    fn publish(&mut self, index: usize) {
        if self.limits.prefix_caching == PrefixCaching::Disabled {
            return;
        }
        let Running { sequence, computed, table, published, last_step, .. } =
            &mut self.running[index];
        let Some(step) = *last_step else { return };
        let size = self.limits.block_size;
        let full = size.full_blocks((*computed).min(sequence.known()));
        while *published < full {
            sequence.keys(&self.hasher, size, *published + 1);
            let key = sequence.parent_key(*published + 1);
            let keys = crate::kv::ChainedKey { parent: sequence.parent_key(*published), key };
            let first = *published * size.tokens();
            let tokens = (first..first + size.tokens()).map(|position| sequence.token(position));
            self.pool.publish(table.blocks()[*published], keys, tokens, step);
            *published += 1;
        }
    }
}
