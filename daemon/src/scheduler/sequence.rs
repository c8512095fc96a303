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
#[derive(Debug)]
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
        let forks_due = request.choices().get() - 1;
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
        let mut output = Vec::with_capacity(self.request.max_tokens.get() as usize);
        output.extend_from_slice(&self.output);
        let mut keys = Vec::with_capacity(self.keys.capacity());
        keys.extend_from_slice(&self.keys);
        let Self { in_flight, cached, high_water, scored, root, .. } = *self;
        let (key, request) = (SequenceKey { member, ..self.key }, Arc::clone(&self.request));
        Self {
            key,
            request,
            output,
            in_flight,
            forks_due: 0,
            cached,
            high_water,
            scored,
            root,
            keys,
        }
    }

    /// Makes room for all that the sequence may come to be, so that its tokens need no allocation.
    pub(super) fn reserve(&mut self, size: BlockSize) {
        let (tokens, keys) =
            (self.request.max_tokens.get() as usize, size.full_blocks(self.request.longest()));
        self.output.reserve_exact(tokens.saturating_sub(self.output.len()));
        self.keys.reserve_exact(keys.saturating_sub(self.keys.len()));
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

    /// Copies of the prompt's last block that the choices to come take: each writes its own, but one has the original.
    pub(super) fn copies_due(&self, size: BlockSize) -> usize {
        // The only token of a choice needs no KV.
        let writes = self.request.max_tokens.get() > 1 && size.tail(self.request.prompt.len()) > 0;
        if writes { self.forks_due as usize } else { 0 }
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

    /// Block keys that were computed.
    #[cfg(test)]
    pub(super) fn n_keys(&self) -> usize {
        self.keys.len()
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
        self.needed().saturating_sub(self.computed)
    }

    /// Tokens that need KV: the last one that may be drawn does not.
    pub(super) fn needed(&self) -> usize {
        self.sequence.total() - usize::from(self.sequence.is_drawn_out())
    }

    /// Gives up its memory; the tokens survive, the KV is computed again later.
    pub(super) fn preempt(self) -> (Waiting, BlockTable) {
        (Waiting { sequence: self.sequence }, self.table)
    }
}
