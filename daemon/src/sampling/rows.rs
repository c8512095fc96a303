//! The sampling state of the sequences that run: what a backend keeps a row of for each.

use std::collections::HashMap;
use std::sync::Arc;

use rayon::prelude::*;

use super::logprob::candidates;
pub use super::logprob::score;
use super::params::Params;
use super::{filter, philox};
use crate::model::batch::Draw;
use crate::request::{Decoding, Request, TokenId};
use crate::scheduler::step::{DrawKind, Drawn, RowChange, RowId};

/// Draws below this are done on the calling thread.
const PARALLEL_LOGITS: usize = 1 << 16;

/// Rows of sampling state, by [`RowId`]. A row that was never admitted draws greedily and keeps nothing.
#[derive(Debug)]
pub struct Rows {
    rows: Vec<Row>,
    vocab: usize,
}

#[derive(Debug, Default)]
struct Row {
    state: Option<State>,
    /// Logits after bias and penalties.
    work: Vec<f32>,
    /// Logits that filters are still choosing from.
    kept: Vec<f32>,
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
        Self { rows: (0..max_rows).map(|_| Row::default()).collect(), vocab }
    }

    /// Bytes that the scratch of `max_rows` rows comes to at most.
    pub fn bytes(max_rows: usize, vocab: usize) -> usize {
        max_rows.saturating_mul(vocab).saturating_mul(2 * size_of::<f32>())
    }

    /// Follows a change. Rows that are not there are ignored.
    pub fn apply(&mut self, change: &RowChange) {
        match change {
            RowChange::Admit { row, request, choice, history } => {
                let state = State::admitted(request, *choice, history);
                self.set(*row, Some(state));
            }
            RowChange::Fork { from, to, choice } => {
                let state = self.row(*from).and_then(|row| row.state.clone());
                self.set(*to, state.map(|state| State { choice: *choice, ..state }));
            }
            RowChange::Release { row } => self.set(*row, None),
        }
    }

    /// The last token of the row's sequence.
    pub fn last_token(&self, row: RowId) -> Option<TokenId> {
        self.row(row)?.state.as_ref()?.last
    }

    /// What one draw gives. `logits`: [vocab], raw. A sampled token is taken up by the row.
    pub fn draw(&mut self, draw: &Draw, logits: &[f32]) -> Drawn {
        match self.rows.get_mut(draw.row.0 as usize) {
            Some(row) => row.draw(draw.kind, logits),
            None => Row::default().draw(draw.kind, logits),
        }
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
        let mut taken: Vec<(Row, &Draw, usize)> = draws
            .iter()
            .zip(logit_row)
            .map(|(draw, &index)| {
                let row =
                    self.rows.get_mut(draw.row.0 as usize).map(std::mem::take).unwrap_or_default();
                (row, draw, index)
            })
            .collect();
        let drawn: Vec<Drawn> = taken
            .par_iter_mut()
            .map(|(row, draw, index)| row.draw(draw.kind, row_of(*index)))
            .collect();
        out.extend(drawn);
        for (row, draw, _) in taken {
            if let Some(place) = self.rows.get_mut(draw.row.0 as usize) {
                *place = row;
            }
        }
    }

    fn row(&self, row: RowId) -> Option<&Row> {
        self.rows.get(row.0 as usize)
    }

    fn set(&mut self, row: RowId, state: Option<State>) {
        if let Some(row) = self.rows.get_mut(row.0 as usize) {
            row.state = state;
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

impl Row {
    fn draw(&mut self, kind: DrawKind, logits: &[f32]) -> Drawn {
        match kind {
            DrawKind::Candidates { count } => Drawn::Candidates(candidates(logits, count)),
            DrawKind::Sample => self.sample(logits),
        }
    }

    fn sample(&mut self, logits: &[f32]) -> Drawn {
        let Self { state, work, kept } = self;
        let params = state.as_ref().and_then(|state| state.params.clone());
        let token = match (&params, state.as_ref()) {
            (Some(params), Some(state)) => {
                let changed = changes_logits(params, state);
                if changed {
                    work.clear();
                    work.extend_from_slice(logits);
                    change_logits(params, state, work);
                }
                let logits = if changed { &work[..] } else { logits };
                if filter::is_greedy(params) {
                    filter::most_likely(logits)
                } else {
                    let u =
                        philox::uniform(params.seed, params.prompt_index, state.choice, state.len);
                    filter::draw(logits, params, u, kept)
                }
            }
            _ => filter::most_likely(logits),
        };
        if let Some(state) = state {
            state.take_up(token);
        }
        let top = params.and_then(|params| params.logprobs);
        Drawn::Token { token, logprobs: top.map(|top| Box::new(score(logits, token, top))) }
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
