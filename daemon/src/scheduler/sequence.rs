//! A request's tokens as they grow, without memory ([`Waiting`]) and with it ([`Running`]).

use std::sync::Arc;

use super::step::RowId;
use crate::kv::{BlockKey, BlockSize, BlockTable, PrefixHasher, StepId};
use crate::request::{Decoding, Request, TokenId, TokenLogprob};

/// Names a sequence and orders all of them: lower priority values, then earlier arrivals, then lower members go first.
/// The members of a request are its choices, or the beams of its search.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceKey {
    pub priority: i32,
    pub arrival: u64,
    pub member: u32,
}

impl SequenceKey {
    /// Whether both belong to one request.
    pub fn same_request(self, other: Self) -> bool {
        self.arrival == other.arrival
    }
}

/// The tokens of one choice or beam. Invariant: `total = prompt + output + in_flight`.
#[derive(Debug, Clone)]
pub(super) struct Sequence {
    pub key: SequenceKey,
    pub request: Arc<Request>,
    pub output: Vec<TokenId>,
    /// Tokens drawn by steps in flight: they count, and are not known yet.
    pub in_flight: usize,
    /// Choices that will fork off when the prompt is computed.
    pub forks_due: u32,
    /// Prompt tokens that the first admission found cached.
    pub cached: Option<usize>,
    /// Tokens whose KV was computed at any time: computing them again is the price of a preemption.
    pub high_water: usize,
    /// Leading tokens whose successor's log-probability has been asked for.
    pub scored: usize,
    root: BlockKey,
    keys: Vec<BlockKey>,
}

/// Known tokens, no KV memory.
#[derive(Debug)]
pub(super) struct Waiting {
    pub sequence: Sequence,
}

/// Holds KV memory for its first `computed` tokens.
#[derive(Debug)]
pub(super) struct Running {
    pub sequence: Sequence,
    pub computed: usize,
    pub table: BlockTable,
    pub row: RowId,
    /// Leading blocks that were published or shared.
    pub published: usize,
    /// The last step that computes something of it.
    pub last_step: Option<StepId>,
    /// What a beam's last token can be followed by, until all beams of the search have theirs.
    pub candidates: Option<Vec<TokenLogprob>>,
}

impl Sequence {
    /// A new sequence that holds the prompt.
    pub(super) fn new(key: SequenceKey, request: Arc<Request>, root: BlockKey) -> Self {
        let forks_due = match &request.decoding {
            Decoding::Sample { choices, .. } => choices.get() - 1,
            Decoding::Beam(_) => 0,
        };
        let (output, keys) = (Vec::new(), Vec::new());
        Self {
            key,
            request,
            output,
            in_flight: 0,
            forks_due,
            cached: None,
            high_water: 0,
            scored: 0,
            root,
            keys,
        }
    }

    /// Another member with the same tokens.
    pub(super) fn fork(&self, member: u32) -> Self {
        let key = SequenceKey { member, ..self.key };
        let mut output = Vec::with_capacity(self.request.max_tokens.get() as usize);
        output.extend_from_slice(&self.output);
        Self { key, output, forks_due: 0, ..self.clone() }
    }

    /// Tokens whose values are known here.
    pub(super) fn known(&self) -> usize {
        self.request.prompt.len() + self.output.len()
    }

    /// Tokens, those in flight included.
    pub(super) fn total(&self) -> usize {
        self.known() + self.in_flight
    }

    /// The known token at `position`.
    pub(super) fn token(&self, position: usize) -> TokenId {
        match position.checked_sub(self.request.prompt.len()) {
            None => self.request.prompt[position],
            Some(output) => self.output[output],
        }
    }

    /// Whether every token that may be drawn is drawn or in flight.
    pub(super) fn is_drawn_out(&self) -> bool {
        self.output.len() + self.in_flight >= self.request.max_tokens.get() as usize
    }

    /// Whether the request is a beam search.
    pub(super) fn is_beam(&self) -> bool {
        matches!(self.request.decoding, Decoding::Beam(_))
    }

    /// The keys of the first `blocks` blocks, all of whose tokens are known.
    pub(super) fn keys(
        &mut self,
        hasher: &PrefixHasher,
        size: BlockSize,
        blocks: usize,
    ) -> &[BlockKey] {
        while self.keys.len() < blocks {
            let first = self.keys.len() * size.tokens();
            let tokens = (first..first + size.tokens()).map(|position| self.token(position));
            let key = hasher.child(self.parent_key(self.keys.len()), tokens);
            self.keys.push(key);
        }
        &self.keys[..blocks]
    }

    /// The key of the block before block `block`, once it was computed by [`Sequence::keys`].
    pub(super) fn parent_key(&self, block: usize) -> BlockKey {
        block.checked_sub(1).map_or(self.root, |before| self.keys[before])
    }

    /// Whether prompt tokens still wait for their log-probability: then cached blocks must be computed again.
    pub(super) fn needs_scores(&self) -> bool {
        self.request.prompt_logprobs.is_some() && self.scored + 1 < self.request.prompt.len()
    }
}

impl Running {
    /// Tokens still to compute: more than one is prefill, exactly one is decode.
    pub(super) fn pending(&self) -> usize {
        // The last token that may be drawn needs no KV of its own.
        let needed = self.sequence.total() - usize::from(self.sequence.is_drawn_out());
        needed.saturating_sub(self.computed)
    }

    /// Gives up its memory; the tokens survive, the KV is computed again later.
    pub(super) fn preempt(self) -> (Waiting, BlockTable) {
        (Waiting { sequence: self.sequence }, self.table)
    }
}
