//! One step's plan: which tokens of which sequences are computed, and what is drawn from them.

use std::ops::Range;
use std::sync::Arc;

use super::sequence::SequenceKey;
pub use crate::kv::BlockCopy;
use crate::kv::{BlockId, StepId};
use crate::request::{Position, Request, TokenId, TokenLogprob, TokenLogprobs};

/// A place for the sampling state of one sequence inside the backend (last token, penalty counts).
/// Less than the engine's `max_num_seqs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowId(pub u32);

/// A change to the sampling state, applied in order before the batch is computed.
#[derive(Debug, Clone)]
pub enum RowChange {
    /// `row` now holds `choice` of `request`, whose known tokens are `history`
    /// (the prompt and, after a preemption, the output so far).
    Admit { row: RowId, request: Arc<Request>, choice: u32, history: Arc<[TokenId]> },
    /// `to` becomes a copy of `from` that draws as `choice`.
    Fork { from: RowId, to: RowId, choice: u32 },
    /// `row` is free. It may be admitted or forked into again, even in the same batch.
    Release { row: RowId },
}

/// Where an input token comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    Known(TokenId),
    /// The last token that this row drew: it is not yet known to the scheduler.
    Drawn(RowId),
}

/// What is wanted of a row's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrawKind {
    /// One token by the row's parameters. The row's state takes it up.
    Sample,
    /// The `count` most likely tokens with log-probabilities of the raw logits. The row's state does not change.
    Candidates { count: u32 },
}

/// Log-probabilities wanted for the prompt tokens that follow tokens `tokens` of the batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptScore {
    pub row: RowId,
    /// Tokens of the batch whose logits are scored.
    pub tokens: Range<usize>,
    /// The token that follows each of `tokens`; same length.
    pub next: Vec<TokenId>,
    /// How many of the most likely tokens to report beside it.
    pub count: u32,
}

/// The tokens of one sequence that a step computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub key: SequenceKey,
    /// Its tokens in [`Step::inputs`].
    pub tokens: Range<usize>,
    /// Position of the first of them.
    pub start: Position,
    /// Its blocks in [`Step::tables`].
    pub table: Range<usize>,
}

/// A draw and the sequence that it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepDraw {
    pub key: SequenceKey,
    pub row: RowId,
    /// Index into [`Step::inputs`] of the token whose logits are used.
    pub token: usize,
    pub kind: DrawKind,
    /// The position of the drawn token in its sequence.
    pub position: usize,
}

/// Prompt log-probabilities and the sequence that they are for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepScore {
    pub key: SequenceKey,
    pub score: PromptScore,
}

/// What a step did, in counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepCounts {
    pub prefill_tokens: usize,
    pub decode_tokens: usize,
    /// Tokens that were computed before and lost to a preemption.
    pub recomputed_tokens: usize,
    pub preemptions: usize,
    pub preempted_tokens: usize,
    /// Sequences that wait for blocks of a step in flight.
    pub deferred: usize,
    pub forked_blocks: usize,
    pub prefix_copied_slots: usize,
    pub prefix_queries: usize,
    /// Prompt tokens that were admitted without a look-up.
    pub unqueried_tokens: usize,
    pub prefix_hits: usize,
}

/// One forward pass and its plan. Reused from step to step: clearing keeps the memory.
#[derive(Debug)]
pub struct Step {
    pub id: StepId,
    /// Before anything of the step is computed, in order.
    pub copies: Vec<BlockCopy>,
    pub rows: Vec<RowChange>,
    pub inputs: Vec<Input>,
    pub tables: Vec<BlockId>,
    pub chunks: Vec<Chunk>,
    pub draws: Vec<StepDraw>,
    pub scores: Vec<StepScore>,
    pub counts: StepCounts,
}

impl Default for Step {
    fn default() -> Self {
        Self {
            id: StepId(0),
            copies: Vec::new(),
            rows: Vec::new(),
            inputs: Vec::new(),
            tables: Vec::new(),
            chunks: Vec::new(),
            draws: Vec::new(),
            scores: Vec::new(),
            counts: StepCounts::default(),
        }
    }
}

impl Step {
    pub(super) fn restart(&mut self, id: StepId) {
        let Self { id: own, copies, rows, inputs, tables, chunks, draws, scores, counts } = self;
        *own = id;
        *counts = StepCounts::default();
        copies.clear();
        rows.clear();
        inputs.clear();
        tables.clear();
        chunks.clear();
        draws.clear();
        scores.clear();
    }
}

/// What one draw gave. Results come in the order of the batch's draws.
#[derive(Debug, Clone, PartialEq)]
pub enum Drawn {
    Token {
        token: TokenId,
        /// Present when the row's parameters ask for it.
        logprobs: Option<Box<TokenLogprobs>>,
    },
    /// Best first; equal ones in id order.
    Candidates(Vec<TokenLogprob>),
}

/// The results of one batch. Reused from step to step.
#[derive(Debug, Clone, Default)]
pub struct Output {
    /// One for each of the batch's draws.
    pub drawn: Vec<Drawn>,
    /// One for each of the batch's scores, one entry a token.
    pub scores: Vec<Vec<TokenLogprobs>>,
}

impl Output {
    /// Empties the output and keeps its memory.
    pub fn clear(&mut self) {
        self.drawn.clear();
        self.scores.clear();
    }
}
