//! A step flattened into arrays: what a backend sees. Shapes are stated once, here.

use std::ops::Range;
use std::sync::Arc;

use crate::kv::BlockId;
use crate::request::{Position, Request, TokenId};

/// A place for the sampling state of one sequence inside the backend (last token, penalty counts).
/// Less than the engine's `max_num_seqs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowId(pub u32);

/// The first `slots` slots of block `from` are copied over those of block `to`, in all layers.
/// All copies of a batch happen before anything of the batch is computed, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    pub from: BlockId,
    pub to: BlockId,
    pub slots: u32,
}

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

/// A run of consecutive tokens of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Its tokens in [`Batch::inputs`], `positions` and `slots`.
    pub tokens: Range<usize>,
    /// Position of its first token, which is also how many tokens before it have their KV stored.
    pub start: Position,
    /// Its blocks in [`Batch::tables`], in position order, enough for `start + tokens.len()` tokens.
    pub table: Range<usize>,
}

/// Draws from the logits of one token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draw {
    /// Index of the token in the batch whose logits are used.
    pub token: usize,
    pub row: RowId,
    pub kind: DrawKind,
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

/// One forward pass as arrays. Several [`Draw`]s may name the same token (the choices of a prompt).
/// Reused from step to step: clearing keeps the memory.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    pub rows: Vec<RowChange>,
    /// [tokens]
    pub inputs: Vec<Input>,
    /// [tokens] position in the sequence.
    pub positions: Vec<Position>,
    /// [tokens] slot in the arena that receives the token's K and V: block x block size + offset.
    pub slots: Vec<u32>,
    pub spans: Vec<Span>,
    /// Block tables of the spans, one after the other.
    pub tables: Vec<BlockId>,
    pub draws: Vec<Draw>,
    pub scores: Vec<PromptScore>,
}

/// Log-probability of one token, and its rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    pub token: TokenId,
    /// Natural logarithm.
    pub logprob: f32,
    /// 1 is the most likely.
    pub rank: u32,
}

/// A token's log-probability and the most likely ones at its position, best first.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub token: TokenLogprob,
    pub top: Vec<TokenLogprob>,
}

/// What one [`Draw`] gave. Results come in the order of [`Batch::draws`].
#[derive(Debug, Clone, PartialEq)]
pub enum Drawn {
    Token {
        token: TokenId,
        /// Natural logarithm of its probability in the raw distribution.
        logprob: f32,
        /// Present when the row's parameters ask for it.
        logprobs: Option<Box<TokenLogprobs>>,
    },
    /// Best first; equal ones in id order.
    Candidates(Vec<TokenLogprob>),
}

/// The results of one batch. Reused from step to step.
#[derive(Debug, Clone, Default)]
pub struct Output {
    /// One for each of [`Batch::draws`].
    pub drawn: Vec<Drawn>,
    /// One for each of [`Batch::scores`], one entry a token.
    pub scores: Vec<Vec<TokenLogprobs>>,
}

impl Batch {
    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        let Self { rows, inputs, positions, slots, spans, tables, draws, scores } = self;
        rows.clear();
        inputs.clear();
        positions.clear();
        slots.clear();
        spans.clear();
        tables.clear();
        draws.clear();
        scores.clear();
    }
}

impl Output {
    /// Empties the output and keeps its memory.
    pub fn clear(&mut self) {
        self.drawn.clear();
        self.scores.clear();
    }
}
