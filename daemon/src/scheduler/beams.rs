//! Beam search inside the scheduler: its beams are members of one request that share blocks by copy-on-write,
//! are admitted and preempted together, and advance together when all of them know what can follow.

use super::sequence::Running;
use super::step::RowChange;
use super::{Effect, Scheduler};
use crate::request::{BeamParams, FinishReason, Request, RequestId, TokenLogprob};
use crate::sampling::{BeamSearch, Continuation};

/// A search and which members its live beams are.
#[derive(Debug)]
pub(super) struct BeamGroup {
    search: BeamSearch,
    /// Members in the order in which the search knows them.
    members: Vec<u32>,
    next_member: u32,
}

impl BeamGroup {
    pub(super) fn new(params: BeamParams, request: &Request) -> Self {
        let stop_tokens = std::sync::Arc::clone(&request.stop_tokens);
        let search = BeamSearch::new(params, request.prompt.len(), request.max_tokens, stop_tokens);
        Self { search, members: vec![0], next_member: 1 }
    }

    /// How many beams more it may come to have.
    pub(super) fn spare(&self, request: &Request) -> usize {
        (request.width().get() as usize).saturating_sub(self.members.len())
    }
}

impl Scheduler {
    /// When every beam of the request knows its candidates: the next beams, or the end of the search.
    pub(super) fn advance_beams(&mut self, id: RequestId) {
        let Some(live) = self.requests.get_mut(&id) else { return };
        let (priority, arrival) = (live.priority, live.arrival);
        let Some(mut group) = live.beams.take() else { return };
        let key = |member| super::SequenceKey { priority, arrival, member };
        let index = |member: &u32| self.find_running(key(*member)).ok();
        let parents: Option<Vec<usize>> = group.members.iter().map(index).collect();
        let ready = parents.filter(|parents| {
            parents.iter().all(|&index| self.running[index].candidates.is_some())
        });
        let Some(parents) = ready else { return self.put_back(id, group) };
        let take = |index: &usize| self.running[*index].candidates.take().unwrap_or_default();
        let candidates: Vec<Vec<TokenLogprob>> = parents.iter().map(take).collect();
        let continuations = group.search.advance(&candidates);
        if continuations.is_empty() {
            return self.finish_beams(id, group);
        }
        let parents: Vec<Running> = {
            let first = parents.iter().copied().min().unwrap_or_default();
            let mut taken: Vec<Running> =
                self.running.drain(first..first + parents.len()).collect();
            group.members.iter().filter_map(|&member| take_member(&mut taken, member)).collect()
        };
        self.replace_beams(parents, &continuations, &mut group);
        self.put_back(id, group);
    }

    fn put_back(&mut self, id: RequestId, group: BeamGroup) {
        if let Some(live) = self.requests.get_mut(&id) {
            live.beams = Some(group);
        }
    }

    /// Each beam that goes on is its parent with one more token: the first of a parent's takes the parent's memory,
    /// the others share it, and a parent without any gives it back.
    fn replace_beams(
        &mut self,
        mut parents: Vec<Running>,
        continuations: &[Continuation],
        group: &mut BeamGroup,
    ) {
        let first_of =
            |parent| continuations.iter().position(|continuation| continuation.parent == parent);
        let mut next: Vec<Option<Running>> = continuations.iter().map(|_| None).collect();
        for (slot, continuation) in continuations.iter().enumerate() {
            if first_of(continuation.parent) != Some(slot) {
                let parent = &parents[continuation.parent];
                let table = self.pool.fork(&parent.table, parent.computed);
                next[slot] = Some(parent.fork(group.next_member, parent.row, table));
                group.next_member += 1;
            }
        }
        for (index, parent) in parents.drain(..).enumerate() {
            match first_of(index) {
                Some(slot) => next[slot] = Some(parent),
                None => self.drop_beam(parent),
            }
        }
        for (slot, continuation) in continuations.iter().enumerate() {
            if first_of(continuation.parent) != Some(slot) {
                self.give_row(&mut next[slot]);
            }
        }
        group.members.clear();
        for (beam, continuation) in next.into_iter().flatten().zip(continuations) {
            self.insert_beam(beam, continuation, group);
        }
    }

    fn insert_beam(
        &mut self,
        mut beam: Running,
        continuation: &Continuation,
        group: &mut BeamGroup,
    ) {
        beam.sequence.output.push(continuation.token);
        let key = beam.sequence.key;
        group.members.push(key.member);
        let index = self.running.partition_point(|other| other.sequence.key < key);
        self.running.insert(index, beam);
        self.publish(index);
    }

    /// A row of its own for a beam that still names its parent's.
    fn give_row(&mut self, beam: &mut Option<Running>) {
        let (Some(beam), Some(row)) = (beam, self.free_rows.pop()) else {
            debug_assert!(false, "admission reserved a row for each beam");
            return;
        };
        self.row_changes.push(RowChange::Fork {
            from: beam.row,
            to: row,
            choice: beam.sequence.key.member,
        });
        beam.row = row;
    }

    fn drop_beam(&mut self, beam: Running) {
        let after = beam.last_step.filter(|&step| step > self.collected);
        self.free_rows.push(beam.row);
        self.row_changes.push(RowChange::Release { row: beam.row });
        self.pool.release(beam.table, after);
    }

    fn finish_beams(&mut self, id: RequestId, group: BeamGroup) {
        self.cancel(id);
        let beams = group.search.finish();
        let reason = beams.first().map_or(FinishReason::Length, |beam| beam.finish);
        let stop_token = beams.first().and_then(|beam| beam.stop_token);
        self.effects.push(Effect::Beams { id, beams });
        self.effects.push(Effect::Finished { id, choice: 0, reason, stop_token });
    }
}

fn take_member(beams: &mut Vec<Running>, member: u32) -> Option<Running> {
    let index = beams.iter().position(|beam| beam.sequence.key.member == member)?;
    Some(beams.remove(index))
}
