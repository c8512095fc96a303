//! A backend for tests whose "model" is a hash of the tokens that it finds in the arena through the block tables:
//! one wrong, lost or overwritten slot changes every token after it.

use std::collections::{HashMap, HashSet, VecDeque};

use super::{Backend, BackendError};
use crate::model::batch::{Batch, BlockCopy, DrawKind, Drawn, Input, Output, RowChange, RowId};
use crate::model::batch::{TokenLogprob, TokenLogprobs};
use crate::request::TokenId;

/// Tokens that the fake model knows.
pub(crate) const VOCABULARY: u32 = 61;

#[derive(Debug)]
pub(crate) struct FakeBackend {
    depth: usize,
    block_size: usize,
    /// [slots] the token whose K and V are stored there.
    arena: Vec<Option<TokenId>>,
    rows: HashMap<RowId, Row>,
    results: VecDeque<Output>,
    pub(crate) computed_tokens: usize,
    pub(crate) copied_slots: usize,
    pub(crate) copies: usize,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    choice: u32,
    last: Option<TokenId>,
}

fn mix(state: u64, value: u64) -> u64 {
    (state ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29) ^ (state >> 7)
}

/// A number that depends on every token of the context, in order.
pub(crate) fn fingerprint(context: &[TokenId]) -> u64 {
    context.iter().fold(0x51_7C_C1_B7, |state, token| mix(state, u64::from(token.0) + 1))
}

/// The token that choice `choice` draws after `context`.
pub(crate) fn next_token(context: &[TokenId], choice: u32) -> TokenId {
    let hash = mix(fingerprint(context), u64::from(choice) + 77) % u64::from(VOCABULARY);
    TokenId(u32::try_from(hash).unwrap())
}

/// The log-probabilities after `context`, best first.
pub(crate) fn candidates(context: &[TokenId], count: u32) -> Vec<TokenLogprob> {
    let base = fingerprint(context);
    let score = |token: u32| -0.01 * (mix(base, u64::from(token)) % 997) as f32 - 0.1;
    let mut all: Vec<TokenLogprob> = (0..VOCABULARY)
        .map(|token| TokenLogprob { token: TokenId(token), logprob: score(token), rank: 0 })
        .collect();
    all.sort_by(|a, b| b.logprob.total_cmp(&a.logprob).then(a.token.cmp(&b.token)));
    (1..).zip(&mut all).for_each(|(rank, entry)| entry.rank = rank);
    all.truncate(count as usize);
    all
}

impl FakeBackend {
    pub(crate) fn new(depth: usize, blocks: u32, block_size: u32) -> Self {
        let slots = (blocks as usize + 1) * block_size as usize;
        Self {
            depth,
            block_size: block_size as usize,
            arena: vec![None; slots],
            rows: HashMap::new(),
            results: VecDeque::new(),
            computed_tokens: 0,
            copied_slots: 0,
            copies: 0,
        }
    }

    fn apply(&mut self, change: &RowChange) {
        match change {
            RowChange::Admit { row, choice, history, .. } => {
                assert!(!self.rows.contains_key(row), "row {row:?} is admitted twice");
                self.rows.insert(*row, Row { choice: *choice, last: history.last().copied() });
            }
            RowChange::Fork { from, to, choice } => {
                assert!(!self.rows.contains_key(to), "row {to:?} is forked into while it is used");
                let last = self.rows[from].last;
                self.rows.insert(*to, Row { choice: *choice, last });
            }
            RowChange::Release { row } => {
                assert!(self.rows.remove(row).is_some(), "row {row:?} is released twice")
            }
        }
    }

    fn slot(&self, table: &[crate::kv::BlockId], position: usize) -> usize {
        table[position / self.block_size].0 as usize * self.block_size + position % self.block_size
    }

    /// The tokens that stand in the arena for the first `len` positions of a table.
    fn read(&self, table: &[crate::kv::BlockId], len: usize) -> Vec<TokenId> {
        let token = |position| self.arena[self.slot(table, position)];
        (0..len)
            .map(|position| {
                token(position).unwrap_or_else(|| panic!("position {position} is empty"))
            })
            .collect()
    }
}

impl Backend for FakeBackend {
    fn depth(&self) -> usize {
        self.depth
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<(), BackendError> {
        for copy in copies {
            let (from, to) =
                (copy.from.0 as usize * self.block_size, copy.to.0 as usize * self.block_size);
            let moved: Vec<_> = self.arena[from..from + copy.slots as usize].to_vec();
            assert!(moved.iter().all(Option::is_some), "an empty slot is copied");
            self.arena[to..to + moved.len()].copy_from_slice(&moved);
            self.copied_slots += moved.len();
            self.copies += 1;
        }
        Ok(())
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), BackendError> {
        assert!(self.results.len() < self.depth, "more is launched than the depth allows");
        batch.rows.iter().for_each(|change| self.apply(change));
        let mut written = HashSet::new();
        for (index, input) in batch.inputs.iter().enumerate() {
            let token = match input {
                Input::Known(token) => *token,
                Input::Drawn(row) => self.rows[row].last.unwrap(),
            };
            let slot = batch.slots[index] as usize;
            assert!(slot >= self.block_size, "the null block is written");
            assert!(written.insert(slot), "slot {slot} is written twice");
            self.arena[slot] = Some(token);
        }
        self.computed_tokens += batch.inputs.len();
        let mut output = Output::default();
        for draw in &batch.draws {
            let span = batch.spans.iter().find(|span| span.tokens.contains(&draw.token)).unwrap();
            let len = span.start as usize + (draw.token - span.tokens.start) + 1;
            let context = self.read(&batch.tables[span.table.clone()], len);
            output.drawn.push(match draw.kind {
                DrawKind::Candidates { count } => Drawn::Candidates(candidates(&context, count)),
                DrawKind::Sample => {
                    let row = self.rows.get_mut(&draw.row).unwrap();
                    let token = next_token(&context, row.choice);
                    row.last = Some(token);
                    Drawn::Token { token, logprobs: None }
                }
            });
        }
        for score in &batch.scores {
            let one = |token: &TokenId| TokenLogprobs {
                token: TokenLogprob { token: *token, logprob: -1.0, rank: 1 },
                top: Vec::new(),
            };
            output.scores.push(score.next.iter().map(one).collect());
        }
        self.results.push_back(output);
        Ok(())
    }

    fn collect(&mut self, output: &mut Output) -> Result<(), BackendError> {
        *output = self.results.pop_front().ok_or(BackendError::NothingLaunched)?;
        Ok(())
    }
}
