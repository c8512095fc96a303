//! Who is preempted and who is admitted: keys alone decide, and no more is preempted than must be.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::kv::BlockId;
use crate::scheduler::step::StepCounts;
use crate::scheduler::{Scheduler, SequenceKey};

/// The scheduler before a step, against which the step's decisions are held.
pub(super) struct Before {
    running: BTreeMap<SequenceKey, Held>,
    waiting: BTreeSet<SequenceKey>,
}

struct Held {
    blocks: Vec<BlockId>,
    /// Blocks for all that it has pending.
    lacks: usize,
    is_beam: bool,
}

impl Before {
    pub(super) fn of(scheduler: &Scheduler) -> Self {
        let held = |running: &crate::scheduler::Running| {
            let lacks =
                scheduler.pool.blocks_to_write([running.write(running.needed())].into_iter());
            let blocks = running.table.blocks().to_vec();
            (running.sequence.key, Held { blocks, lacks, is_beam: running.sequence.is_beam() })
        };
        Self {
            running: scheduler.running.iter().map(held).collect(),
            waiting: scheduler.waiting.keys().copied().collect(),
        }
    }

    pub(super) fn check(&self, after: &Scheduler, counts: &StepCounts, depth: usize) {
        let running: BTreeSet<SequenceKey> =
            after.running.iter().map(|running| running.sequence.key).collect();
        let is_waiting = |key: &&SequenceKey| after.waiting.contains_key(key);
        let victims: Vec<SequenceKey> = self.running.keys().filter(is_waiting).copied().collect();
        assert_eq!(victims.len(), counts.preemptions, "a victim waits for the next step");
        if let (Some(victim), Some(last)) = (victims.first(), running.last()) {
            assert!(victim > last, "{victim:?} was preempted and {last:?} runs");
        }
        let first_waiting = after.waiting.keys().next();
        for key in self.waiting.intersection(&running) {
            assert!(first_waiting.is_none_or(|waiting| key < waiting), "{key:?} was not the next");
        }
        if depth == 1 && !victims.is_empty() {
            self.check_last_victim(&victims, after);
        }
    }

    /// Without what the last victim gave back somebody had too little: those before it, or itself.
    fn check_last_victim(&self, victims: &[SequenceKey], after: &Scheduler) {
        let with_last = |key: &&SequenceKey| {
            **key == victims[0] || (key.same_request(victims[0]) && self.running[key].is_beam)
        };
        let unit: Vec<&Held> =
            victims.iter().filter(with_last).map(|key| &self.running[key]).collect();
        let blocks: HashSet<BlockId> =
            unit.iter().flat_map(|held| held.blocks.iter().copied()).collect();
        let itself: usize = unit.iter().map(|held| held.lacks).sum();
        let left = after.pool.available();
        assert!(left < blocks.len() + itself, "{left} blocks are left, {victims:?} had to go");
    }
}
