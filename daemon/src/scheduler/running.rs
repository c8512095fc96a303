//! The first part of a step: tokens for the sequences that run, with preemption where memory is short.

use std::ops::Range;

use super::sequence::Running;
use super::step::{
    Chunk, DrawKind, Input, PromptScore, RowChange, RowId, Step, StepDraw, StepScore,
};
use super::{Effect, Freed, Scheduler};
use crate::kv::{BlockTable, Write};
use crate::request::{Decoding, TokenId};

/// Whether a unit can be computed in this step.
enum Room {
    Made,
    /// Not now: with the blocks of a step in flight there will be. Until then this many are promised to the unit.
    Later {
        promised: usize,
    },
    /// The unit itself was preempted.
    Lost,
}

impl Scheduler {
    /// Gives tokens to running sequences in order; returns what is left of the budget.
    pub(super) fn schedule_running(&mut self, step: &mut Step) -> usize {
        let mut budget = self.limits.max_num_batched_tokens;
        let (mut index, mut promised) = (0, 0);
        let mut chunks = Vec::new();
        while index < self.running.len() {
            let unit = self.unit(index);
            self.chunks_of(unit.clone(), budget, &mut chunks);
            match self.make_room(unit.clone(), &chunks, promised, step) {
                Room::Lost => continue,
                Room::Later { promised: more } => {
                    promised += more;
                    step.counts.deferred += unit.len();
                    index = unit.end;
                }
                Room::Made => {
                    budget -= chunks.iter().sum::<usize>();
                    index = self.compute_unit(unit, &chunks, step);
                }
            }
        }
        (0..self.running.len()).for_each(|index| self.publish(index));
        budget
    }

    /// The running members that are scheduled together: all beams of a search, or one sequence.
    fn unit(&self, first: usize) -> Range<usize> {
        let sequence = &self.running[first].sequence;
        if !sequence.is_beam() {
            return first..first + 1;
        }
        let members = self.running[first..]
            .iter()
            .take_while(|other| other.sequence.key.same_request(sequence.key));
        first..first + members.count()
    }

    /// How many tokens of each member are computed: what is pending, within the limits of a chunk,
    /// and so that every sequence after it can still have one.
    fn chunks_of(&self, unit: Range<usize>, budget: usize, chunks: &mut Vec<usize>) {
        chunks.clear();
        let mut left = budget.saturating_sub(self.running.len() - unit.end);
        let mut after = unit.len();
        for running in &self.running[unit] {
            after -= 1;
            let most = self.limits.chunk_tokens(running.computed).min(left.saturating_sub(after));
            let tokens = running.pending().min(most);
            left -= tokens;
            chunks.push(tokens);
        }
    }

    /// Preempts the last sequences until the unit's chunks fit beside what is promised to units before it.
    fn make_room(
        &mut self,
        unit: Range<usize>,
        chunks: &[usize],
        promised: usize,
        step: &mut Step,
    ) -> Room {
        loop {
            // Counted anew each time: a block that only a victim shared needs no copy any more.
            let members = self.running[unit.clone()].iter().zip(chunks);
            let writes = members.map(|(running, tokens)| running.write(running.computed + tokens));
            let needed = self.pool.blocks_to_write(writes);
            let soon = self.pool.available() + self.pool.pending_free();
            if needed + promised <= soon {
                return match needed <= self.pool.available() {
                    true => Room::Made,
                    false => Room::Later { promised: needed },
                };
            }
            if promised > 0 {
                // Whether anything must go shows when those before it have what they were promised.
                return Room::Later { promised: 0 };
            }
            let last = self.last_unit();
            self.preempt(last.clone(), step);
            if last == unit {
                return Room::Lost;
            }
        }
    }

    /// The unit that is preempted first: the newest of the lowest priority.
    fn last_unit(&self) -> Range<usize> {
        let last = self.running.len() - 1;
        let sequence = &self.running[last].sequence;
        if !sequence.is_beam() {
            return last..last + 1;
        }
        let first = self.running.partition_point(|other| {
            other.sequence.key < sequence.key && !other.sequence.key.same_request(sequence.key)
        });
        first..last + 1
    }

    fn preempt(&mut self, unit: Range<usize>, step: &mut Step) {
        for index in unit.rev() {
            let computed = self.running[index].computed;
            let Freed { waiting, table, after } = self.take_memory(index);
            self.pool.release(table, after);
            let key = waiting.sequence.key;
            let id = waiting.sequence.request.id;
            self.effects.push(Effect::Preempted { id, choice: key.member, tokens: computed });
            step.counts.preemptions += 1;
            step.counts.preempted_tokens += computed;
            self.waiting.insert(key, waiting);
        }
    }

    /// Puts the unit's chunks into the step; returns the index after the unit and the choices that forked off.
    fn compute_unit(&mut self, unit: Range<usize>, chunks: &[usize], step: &mut Step) -> usize {
        let mut index = unit.start;
        for &tokens in chunks {
            index += match tokens {
                0 => 1,
                tokens => self.compute(index, tokens, step),
            };
        }
        index
    }

    /// Puts the next `tokens` tokens of a running sequence into the step, for which there is room;
    /// returns 1 and the number of choices that forked off behind it.
    pub(super) fn compute(&mut self, index: usize, tokens: usize, step: &mut Step) -> usize {
        let running = &mut self.running[index];
        let (start, end) = (running.computed, running.computed + tokens);
        match self.pool.extend(&mut running.table, start, end) {
            Ok(Some(copy)) => {
                step.counts.forked_blocks += 1;
                step.copies.push(copy);
            }
            Ok(None) => {}
            Err(shortage) => {
                debug_assert!(false, "the caller made room: {shortage}");
                return 1;
            }
        }
        running.count(start, end, step);
        running.put_chunk(start, end, step);
        running.put_scores(start, end, step);
        (running.computed, running.last_step) = (end, Some(step.id));
        if end < running.sequence.total() {
            return 1;
        }
        match &running.sequence.request.decoding {
            Decoding::Beam(beam) => {
                let count = beam.width.get().saturating_mul(2);
                running.put_draw(DrawKind::Candidates { count }, step);
                1
            }
            Decoding::Sample { .. } => {
                running.put_draw(DrawKind::Sample, step);
                1 + self.fork_choices(index, step)
            }
        }
    }

    /// The choices that share the prompt which is computed with this step; each draws from its last logits.
    fn fork_choices(&mut self, index: usize, step: &mut Step) -> usize {
        let forks = std::mem::take(&mut self.running[index].sequence.forks_due);
        for choice in (1..=forks).rev() {
            let Some(row) = self.free_rows.pop() else {
                debug_assert!(false, "admission reserved a row for each choice");
                continue;
            };
            let parent = &self.running[index];
            let table = self.pool.fork(&parent.table, parent.computed);
            let fork = parent.fork(choice, row, table);
            self.row_changes.push(RowChange::Fork { from: parent.row, to: row, choice });
            self.running.insert(index + 1, fork);
        }
        let first = &mut self.running[index];
        first.sequence.in_flight += 1;
        for fork in &mut self.running[index + 1..][..forks as usize] {
            fork.put_draw(DrawKind::Sample, step);
            fork.sequence.in_flight += 1;
        }
        forks as usize
    }
}

impl Running {
    /// Writing it up to `tokens` tokens.
    pub(super) fn write(&self, tokens: usize) -> Write<'_> {
        Write { table: &self.table, computed: self.computed, tokens }
    }

    /// Another member that shares everything computed so far through `table`.
    pub(super) fn fork(&self, member: u32, row: RowId, table: BlockTable) -> Self {
        let sequence = self.sequence.fork(member);
        let Self { computed, published, last_step, .. } = *self;
        Self { sequence, computed, table, row, published, last_step, candidates: None }
    }

    fn count(&mut self, start: usize, end: usize, step: &mut Step) {
        let counts = &mut step.counts;
        match self.pending() {
            1 => counts.decode_tokens += 1,
            _ => counts.prefill_tokens += end - start,
        }
        counts.recomputed_tokens += self.sequence.high_water.min(end).saturating_sub(start);
        self.sequence.high_water = self.sequence.high_water.max(end);
    }

    fn put_chunk(&self, start: usize, end: usize, step: &mut Step) {
        let first = step.inputs.len();
        let input = |position| match position < self.sequence.known() {
            true => Input::Known(self.sequence.token(position)),
            false => Input::Drawn(self.row),
        };
        step.inputs.extend((start..end).map(input));
        let first_block = step.tables.len();
        step.tables.extend_from_slice(self.table.blocks());
        step.chunks.push(Chunk {
            key: self.sequence.key,
            tokens: first..step.inputs.len(),
            start: u32::try_from(start).unwrap_or(u32::MAX),
            table: first_block..step.tables.len(),
        });
    }

    /// Asks for the log-probabilities of the prompt tokens after `start..end` that were not asked for before.
    fn put_scores(&mut self, start: usize, end: usize, step: &mut Step) {
        let sequence = &mut self.sequence;
        let Some(count) = sequence.request.prompt_logprobs else { return };
        let from = start.max(sequence.scored);
        let to = end.min(sequence.request.prompt.len() - 1);
        if from >= to {
            return;
        }
        let base = step.inputs.len() - (end - start);
        let next: Vec<TokenId> = sequence.request.prompt[from + 1..=to].to_vec();
        let tokens = base + (from - start)..base + (to - start);
        step.scores.push(StepScore {
            key: sequence.key,
            score: PromptScore { row: self.row, tokens, next, count },
        });
        sequence.scored = to;
    }

    fn put_draw(&self, kind: DrawKind, step: &mut Step) {
        step.draws.push(StepDraw {
            key: self.sequence.key,
            row: self.row,
            token: step.inputs.len() - 1,
            kind,
            position: self.sequence.total(),
        });
    }
}
