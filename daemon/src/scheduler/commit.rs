//! What the results of a step change: sequences grow, end, or go on as other beams.

use super::sequence::{Sequence, SequenceKey};
use super::step::{DrawKind, Drawn, Output, Step, StepDraw};
use super::{Effect, Scheduler};
use crate::request::{FinishReason, TokenId, TokenLogprob};

impl Scheduler {
    /// Takes in the results of the oldest step that was scheduled and not committed. `output` is emptied.
    pub fn commit(&mut self, step: &Step, output: &mut Output) {
        self.collected = step.id;
        self.pool.collected(step.id);
        for (scored, logprobs) in step.scores.iter().zip(output.scores.drain(..)) {
            if let Some(sequence) = self.find_sequence(scored.key) {
                let id = sequence.request.id;
                self.effects.push(Effect::PromptLogprobs { id, logprobs });
            }
        }
        for (draw, drawn) in step.draws.iter().zip(output.drawn.drain(..)) {
            match (draw.kind, drawn) {
                (DrawKind::Sample, Drawn::Token { token, logprobs }) => {
                    self.take_token(draw.key, token, logprobs);
                }
                (DrawKind::Candidates { .. }, Drawn::Candidates(candidates)) => {
                    self.take_candidates(draw, candidates)
                }
                (DrawKind::Sample, Drawn::Candidates(_))
                | (DrawKind::Candidates { .. }, Drawn::Token { .. }) => {
                    debug_assert!(false, "a backend answers each draw with its kind");
                }
            }
        }
    }

    fn find_sequence(&mut self, key: SequenceKey) -> Option<&mut Sequence> {
        match self.find_running(key) {
            Ok(index) => Some(&mut self.running[index].sequence),
            Err(_) => self.waiting.get_mut(&key).map(|waiting| &mut waiting.sequence),
        }
    }

    fn take_token(
        &mut self,
        key: SequenceKey,
        token: TokenId,
        logprobs: Option<Box<crate::request::TokenLogprobs>>,
    ) {
        let Some(sequence) = self.find_sequence(key) else {
            self.discarded_tokens += 1;
            return;
        };
        sequence.in_flight -= 1;
        sequence.output.push(token);
        let (id, choice) = (sequence.request.id, key.member);
        let end = ended_by(sequence, token);
        self.effects.push(Effect::Token { id, choice, token, logprobs });
        let running = self.find_running(key);
        if let Ok(index) = running {
            self.publish(index);
        }
        let Some(reason) = end else { return };
        match running {
            Ok(index) => drop(self.stop_running(index)),
            Err(_) => drop(self.waiting.remove(&key)),
        }
        let stop_token = (reason == FinishReason::Stop).then_some(token);
        self.effects.push(Effect::Finished { id, choice, reason, stop_token });
        self.choice_ended(id);
    }

    /// Results that are not for the beam's present last token are of a step before its preemption.
    fn take_candidates(&mut self, draw: &StepDraw, candidates: Vec<TokenLogprob>) {
        let Ok(index) = self.find_running(draw.key) else { return };
        let beam = &mut self.running[index];
        if beam.sequence.total() == draw.position && beam.computed == draw.position {
            beam.candidates = Some(candidates);
            let id = beam.sequence.request.id;
            self.advance_beams(id);
        }
    }
}

/// Whether the sequence ends with `token`, its newest.
fn ended_by(sequence: &Sequence, token: TokenId) -> Option<FinishReason> {
    let request = &sequence.request;
    let min_tokens = match &request.decoding {
        crate::request::Decoding::Sample { params, .. } => params.min_tokens as usize,
        crate::request::Decoding::Beam(_) => 0,
    };
    if sequence.output.len() >= min_tokens && request.stop_tokens.binary_search(&token).is_ok() {
        return Some(FinishReason::Stop);
    }
    (sequence.output.len() >= request.max_tokens.get() as usize).then_some(FinishReason::Length)
}
