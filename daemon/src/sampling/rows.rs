//! The sampling state of the sequences that run: what a backend keeps a row of for each.

use std::collections::HashMap;
use std::sync::Arc;

use rayon::prelude::*;

pub use super::logprob::score;
use super::logprob::{candidates, score_with};
use super::params::Params;
use super::survey::{self, Survey};
use super::{filter, philox};
use crate::model::batch::Draw;
use crate::request::{Decoding, Request, TokenId};
use crate::scheduler::step::{DrawKind, Drawn, RowChange, RowId};

/// Draws below this are done on the calling thread.
const PARALLEL_LOGITS: usize = 1 << 16;

/// Rows of sampling state, by [`RowId`]. A row that was never admitted draws greedily and keeps nothing.
#[derive(Debug)]
pub struct Rows {
    rows: Vec<Option<State>>,
    vocab: usize,
}

/// One sequence's state.
#[derive(Debug, Clone)]
struct State {
    /// Absent for beams, which are not drawn but chosen.
    params: Option<Arc<Params>>,
    choice: u32,
    last: Option<TokenId>,
    /// Tokens of prompt and output.
    len: u32,
    output_len: u32,
    counts: Counts,
}

/// Occurrences of tokens, kept only where a penalty asks for them.
#[derive(Debug, Clone, Default)]
struct Counts {
    /// In the output, 0 for tokens of the prompt alone.
    output: HashMap<TokenId, u32>,
}

impl Rows {
    /// `max_rows` free rows for logits of `vocab` tokens.
    pub fn new(max_rows: usize, vocab: usize) -> Self {
        Self { rows: (0..max_rows).map(|_| None).collect(), vocab }
    }

    /// Bytes that drawing on `threads` threads takes at most, beside the counts of penalized sequences.
    pub fn bytes(threads: usize, vocab: usize) -> usize {
        threads.saturating_mul(survey::bytes(vocab))
    }

    /// Follows a change. Rows that are not there are ignored.
    pub fn apply(&mut self, change: &RowChange) {
        match change {
            RowChange::Admit { row, request, choice, history } => {
                let state = State::admitted(request, *choice, history);
                self.set(*row, Some(state));
            }
            RowChange::Fork { from, to, choice } => {
                let state = self.row(*from).cloned();
                self.set(*to, state.map(|state| State { choice: *choice, ..state }));
            }
            RowChange::Release { row } => self.set(*row, None),
        }
    }

    /// The last token of the row's sequence.
    pub fn last_token(&self, row: RowId) -> Option<TokenId> {
        self.row(row)?.last
    }

    /// What one draw gives. `logits`: [vocab], raw. A sampled token is taken up by the row.
    pub fn draw(&mut self, draw: &Draw, logits: &[f32]) -> Drawn {
        let state = self.rows.get_mut(draw.row.0 as usize).and_then(Option::as_mut);
        draw_row(state, draw.kind, logits)
    }

    /// What all of `draws` give, appended to `out` in order. `logits`: [n, vocab]; draw `i` reads row `logit_row[i]`.
    pub fn draw_all(
        &mut self,
        draws: &[Draw],
        logit_row: &[usize],
        logits: &[f32],
        out: &mut Vec<Drawn>,
    ) {
        let vocab = self.vocab;
        let row_of =
            |index: usize| logits.get(index * vocab..(index + 1) * vocab).unwrap_or_default();
        if draws.len() < 2 || draws.len() * vocab < PARALLEL_LOGITS {
            out.extend(
                draws.iter().zip(logit_row).map(|(draw, &index)| self.draw(draw, row_of(index))),
            );
            return;
        }
        debug_assert!(
            draws.iter().map(|draw| draw.row).collect::<std::collections::HashSet<_>>().len()
                == draws.len(),
            "each row draws once"
        );
        // Each draw takes its row along, so that the rows can be drawn at once.
        let mut taken: Vec<(Option<State>, &Draw, usize)> = draws
            .iter()
            .zip(logit_row)
            .map(|(draw, &index)| {
                let row = self.rows.get_mut(draw.row.0 as usize).and_then(Option::take);
                (row, draw, index)
            })
            .collect();
        let drawn: Vec<Drawn> = taken
            .par_iter_mut()
            .map(|(row, draw, index)| draw_row(row.as_mut(), draw.kind, row_of(*index)))
            .collect();
        out.extend(drawn);
        for (row, draw, _) in taken {
            if let Some(place) = self.rows.get_mut(draw.row.0 as usize) {
                *place = row;
            }
        }
    }

    fn row(&self, row: RowId) -> Option<&State> {
        self.rows.get(row.0 as usize)?.as_ref()
    }

    fn set(&mut self, row: RowId, state: Option<State>) {
        if let Some(row) = self.rows.get_mut(row.0 as usize) {
            *row = state;
        }
    }
}

impl State {
    fn admitted(request: &Request, choice: u32, history: &[TokenId]) -> Self {
        let params = match &request.decoding {
            Decoding::Sample { params, .. } => Some(Arc::clone(params)),
            Decoding::Beam(_) => None,
        };
        let mut counts = Counts::default();
        if params.as_deref().is_some_and(has_penalty) {
            for (position, &token) in history.iter().enumerate() {
                *counts.output.entry(token).or_default() +=
                    u32::from(position >= request.prompt.len());
            }
        }
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let output_len = count(history.len().saturating_sub(request.prompt.len()));
        Self {
            params,
            choice,
            last: history.last().copied(),
            len: count(history.len()),
            output_len,
            counts,
        }
    }

    fn take_up(&mut self, token: TokenId) {
        self.last = Some(token);
        self.len += 1;
        self.output_len += 1;
        if self.params.as_deref().is_some_and(has_penalty) {
            *self.counts.output.entry(token).or_default() += 1;
        }
    }
}

fn draw_row(state: Option<&mut State>, kind: DrawKind, logits: &[f32]) -> Drawn {
    match (kind, state) {
        (DrawKind::Candidates { count }, _) => Drawn::Candidates(candidates(logits, count)),
        (DrawKind::Sample, Some(state)) => {
            survey::with_survey(|survey| state.sample(logits, survey))
        }
        (DrawKind::Sample, None) => survey::with_survey(|survey| {
            survey.look_at(logits);
            Drawn::Token { token: survey.most_likely(logits), logprobs: None }
        }),
    }
}

impl State {
    fn sample(&mut self, logits: &[f32], survey: &mut Survey) -> Drawn {
        let Some(params) = self.params.clone() else {
            survey.look_at(logits);
            let token = survey.most_likely(logits);
            self.take_up(token);
            return Drawn::Token { token, logprobs: None };
        };
        let u = philox::uniform(params.seed, params.prompt_index, self.choice, self.len);
        let token = if changes_logits(&params, self) {
            let mut changed = std::mem::take(&mut survey.changed);
            changed.clear();
            changed.extend_from_slice(logits);
            change_logits(&params, self, &mut changed);
            let token = filter::draw(&changed, &params, u, survey);
            survey.changed = changed;
            token
        } else {
            filter::draw(logits, &params, u, survey)
        };
        self.take_up(token);
        let score = |top| Box::new(score_with(logits, token, top, survey));
        Drawn::Token { token, logprobs: params.logprobs.map(score) }
    }
}

fn has_penalty(params: &Params) -> bool {
    params.presence_penalty != 0.0
        || params.frequency_penalty != 0.0
        || params.repetition_penalty != 1.0
}

fn holds_back_stop(params: &Params, state: &State) -> bool {
    state.output_len < params.min_tokens && !params.stop_tokens.is_empty()
}

fn changes_logits(params: &Params, state: &State) -> bool {
    has_penalty(params) || !params.logit_bias.is_empty() || holds_back_stop(params, state)
}

/// Bias, then stop tokens that must not come yet, then penalties.
fn change_logits(params: &Params, state: &State, logits: &mut [f32]) {
    for (token, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(token.0 as usize) {
            *logit += bias;
        }
    }
    if holds_back_stop(params, state) {
        for token in params.stop_tokens.iter() {
            if let Some(logit) = logits.get_mut(token.0 as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    for (token, &count) in &state.counts.output {
        let Some(logit) = logits.get_mut(token.0 as usize) else { continue };
        let by = params.repetition_penalty;
        *logit = if *logit > 0.0 { *logit / by } else { *logit * by };
        *logit -= params.frequency_penalty * count as f32;
        if count > 0 {
            *logit -= params.presence_penalty;
        }
    }
}

#[cfg(test)]
mod tests;
