//! A step flattened into arrays: what a backend sees. Shapes are stated once, here.

use std::ops::Range;

use crate::kv::{BlockId, BlockSize};
use crate::request::Position;
pub use crate::request::{TokenLogprob, TokenLogprobs};
use crate::scheduler::step::Step;
pub use crate::scheduler::step::{
    BlockCopy, DrawKind, Drawn, Input, Output, PromptScore, RowChange, RowId,
};

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

impl Batch {
    /// Flattens a step: positions and slots follow from its chunks and tables.
    pub fn fill(&mut self, step: &Step, size: BlockSize) {
        self.clear();
        self.rows.extend_from_slice(&step.rows);
        self.inputs.extend_from_slice(&step.inputs);
        self.tables.extend_from_slice(&step.tables);
        self.scores.extend(step.scores.iter().map(|scored| scored.score.clone()));
        let draws = step.draws.iter().map(|draw| Draw {
            token: draw.token,
            row: draw.row,
            kind: draw.kind,
        });
        self.draws.extend(draws);
        for chunk in &step.chunks {
            self.spans.push(Span {
                tokens: chunk.tokens.clone(),
                start: chunk.start,
                table: chunk.table.clone(),
            });
            let table = &step.tables[chunk.table.clone()];
            for position in (chunk.start..).take(chunk.tokens.len()) {
                let block = table[position as usize / size.tokens()];
                self.positions.push(position);
                self.slots.push(block.0 * size.0.get() + position % size.0.get());
            }
        }
    }

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
