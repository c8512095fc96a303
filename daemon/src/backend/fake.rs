//! A backend for tests whose "model" is a hash of the tokens that it finds in the arena through the block tables:
//! one wrong, lost or overwritten slot changes every token after it.

use std::collections::{HashMap, HashSet, VecDeque};

use super::{Backend, BackendError};
use crate::model::batch::{
    Batch, BlockCopy, Draw, DrawKind, Drawn, Input, Output, PromptScore, RowChange, RowId,
};
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
    /// Slots that the copies for the next launch wrote.
    copied: HashSet<usize>,
    launched: VecDeque<Launched>,
    pub(crate) computed_tokens: usize,
    pub(crate) copied_slots: usize,
    pub(crate) copies: usize,
}

#[derive(Debug, Clone)]
struct Row {
    choice: u32,
    /// Its known tokens and those that it drew. A beam's begins with these: what follows, its owner chooses.
    context: Vec<TokenId>,
}

/// What was launched and not collected.
#[derive(Debug)]
struct Launched {
    output: Output,
    /// Blocks that it writes: nobody may begin another one there. Whoever takes a block begins at its first slot.
    blocks: HashSet<usize>,
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
            copied: HashSet::new(),
            launched: VecDeque::new(),
            computed_tokens: 0,
            copied_slots: 0,
            copies: 0,
        }
    }

    fn apply(&mut self, change: &RowChange) {
        match change {
            RowChange::Admit { row, choice, history, .. } => {
                assert!(!self.rows.contains_key(row), "row {row:?} is admitted twice");
                self.rows.insert(*row, Row { choice: *choice, context: history.to_vec() });
            }
            RowChange::Fork { from, to, choice } => {
                assert!(!self.rows.contains_key(to), "row {to:?} is forked into while it is used");
                let context = self.rows[from].context.clone();
                self.rows.insert(*to, Row { choice: *choice, context });
            }
            RowChange::Release { row } => {
                assert!(self.rows.remove(row).is_some(), "row {row:?} is released twice")
            }
        }
    }

    /// Somebody begins a block: what it held is gone.
    fn begin(&mut self, block: usize) {
        let fenced = self.launched.iter().any(|launched| launched.blocks.contains(&block));
        assert!(!fenced, "block {block} is begun while a step in flight writes it");
        self.arena[block * self.block_size..(block + 1) * self.block_size].fill(None);
    }

    /// Stores the batch's tokens; returns the blocks that they are in.
    fn store(&mut self, batch: &Batch) -> HashSet<usize> {
        let mut written = std::mem::take(&mut self.copied);
        for (input, &slot) in batch.inputs.iter().zip(&batch.slots) {
            let token = match input {
                Input::Known(token) => *token,
                Input::Drawn(row) => *self.rows[row].context.last().unwrap(),
            };
            let slot = slot as usize;
            assert!(slot >= self.block_size, "the null block is written");
            assert!(written.insert(slot), "slot {slot} is written twice");
            if slot.is_multiple_of(self.block_size) {
                self.begin(slot / self.block_size);
            }
            self.arena[slot] = Some(token);
        }
        written.into_iter().map(|slot| slot / self.block_size).collect()
    }

    /// The tokens up to `draw`'s, which are those of its row.
    fn context(&self, batch: &Batch, draw: &Draw) -> Vec<TokenId> {
        let span = batch.spans.iter().find(|span| span.tokens.contains(&draw.token)).unwrap();
        let len = span.start as usize + (draw.token - span.tokens.start) + 1;
        let context = self.read(&batch.tables[span.table.clone()], len);
        let row = &self.rows[&draw.row].context;
        match draw.kind {
            DrawKind::Sample => assert_eq!(&context, row, "the arena holds another's tokens"),
            DrawKind::Candidates { .. } => assert!(context.starts_with(row)),
        }
        context
    }

    fn draw(&mut self, batch: &Batch, draw: &Draw) -> Drawn {
        let context = self.context(batch, draw);
        match draw.kind {
            DrawKind::Candidates { count } => Drawn::Candidates(candidates(&context, count)),
            DrawKind::Sample => {
                let row = self.rows.get_mut(&draw.row).unwrap();
                let token = next_token(&context, row.choice);
                row.context.push(token);
                Drawn::Token { token, logprobs: None }
            }
        }
    }

    fn score(&self, batch: &Batch, score: &PromptScore) -> Vec<TokenLogprobs> {
        let first = score.tokens.start;
        let span = batch.spans.iter().find(|span| span.tokens.contains(&first)).unwrap();
        let next = span.start as usize + (first - span.tokens.start) + 1;
        let wanted = &self.rows[&score.row].context[next..next + score.tokens.len()];
        assert_eq!(score.next, wanted, "tokens are scored that do not follow");
        let one = |token: &TokenId| TokenLogprobs {
            token: TokenLogprob { token: *token, logprob: -1.0, rank: 1 },
            top: Vec::new(),
        };
        score.next.iter().map(one).collect()
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
            self.begin(copy.to.0 as usize);
            for slot in to..to + moved.len() {
                assert!(self.copied.insert(slot), "slot {slot} is copied into twice");
            }
            self.arena[to..to + moved.len()].copy_from_slice(&moved);
            self.copied_slots += moved.len();
            self.copies += 1;
        }
        Ok(())
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), BackendError> {
        assert!(self.launched.len() < self.depth, "more is launched than the depth allows");
        batch.rows.iter().for_each(|change| self.apply(change));
        let blocks = self.store(batch);
        self.computed_tokens += batch.inputs.len();
        let drawn = batch.draws.iter().map(|draw| self.draw(batch, draw)).collect();
        let scores = batch.scores.iter().map(|score| self.score(batch, score)).collect();
        self.launched.push_back(Launched { output: Output { drawn, scores }, blocks });
        Ok(())
    }

    fn collect(&mut self, output: &mut Output) -> Result<(), BackendError> {
        *output = self.launched.pop_front().ok_or(BackendError::NothingLaunched)?.output;
        Ok(())
    }
}
