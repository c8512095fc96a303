//! The words that every room shares: tokens, requests and how they end.
//! Nothing here computes.

use std::num::NonZeroU32;
use std::sync::Arc;

use crate::sampling::Params;

/// One vocabulary entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenId(pub u32);

/// A request, unique within the life of one engine process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Index of a token in its sequence, from 0.
pub type Position = u32;

/// Why a choice of a request left the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// An end token, a stop token or a stop string.
    Stop,
    /// `max_tokens` or the model's context was reached.
    Length,
    /// The client went away or cancelled.
    Abort,
    /// The engine failed.
    Error,
}

impl FinishReason {
    /// Every reason, in the order of the metrics.
    pub const ALL: [Self; 4] = [Self::Stop, Self::Length, Self::Abort, Self::Error];

    /// The stable word used in response bodies and metric labels.
    pub fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// Separates prefix caches: requests share cached blocks only when their salts are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Salt(pub [u8; 32]);

/// What a client asked for. Never changes after admission.
#[derive(Debug, Clone)]
pub struct Request {
    pub id: RequestId,
    /// Not empty, every id inside the vocabulary, at most `max_model_len - 1` long.
    pub prompt: Arc<[TokenId]>,
    pub decoding: Decoding,
    /// Most tokens to generate per choice; prompt + `max_tokens` fits the model's context.
    pub max_tokens: NonZeroU32,
    /// Tokens that end a choice (end tokens of the model unless `ignore_eos`, and `stop_token_ids`).
    /// Sorted, without duplicates. None of them ends it before `params.min_tokens`.
    pub stop_tokens: Arc<[TokenId]>,
    /// Lower runs first, as in vLLM. 0 is the default.
    pub priority: i32,
    pub salt: Salt,
    /// `Some(k)`: report the log-probability of every prompt token and of the `k` best beside it.
    /// Such a request never uses prefix hits.
    pub prompt_logprobs: Option<u32>,
}

/// How output tokens are chosen.
#[derive(Debug, Clone)]
pub enum Decoding {
    /// Independent draws: `choices` answers that share the prompt's blocks.
    Sample { params: Arc<Params>, choices: NonZeroU32 },
    /// The `width` most likely continuations, in lock-step.
    Beam(BeamParams),
}

/// Parameters of a beam search, with the meanings of vLLM and Hugging Face.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BeamParams {
    /// Live beams a step, and results at most.
    pub width: NonZeroU32,
    /// Exponent of the sequence length by which the summed log-probability is divided.
    pub length_penalty: f32,
    pub early_stopping: EarlyStopping,
}

/// When a beam search that has `width` finished beams ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EarlyStopping {
    /// At once.
    Always,
    /// When the best live beam, scored at its present length, is no better than the worst finished one.
    Heuristic,
    /// When no live beam can become better at any length it may reach.
    Never,
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

/// One result of a beam search.
#[derive(Debug, Clone, PartialEq)]
pub struct Beam {
    /// Output tokens, an end token included.
    pub tokens: Vec<TokenId>,
    pub cumulative_logprob: f32,
    pub finish: FinishReason,
    /// The end token that finished it.
    pub stop_token: Option<TokenId>,
}

impl Request {
    /// The number of answers that are told one by one: a beam search tells all of its beams as one.
    pub fn choices(&self) -> NonZeroU32 {
        match &self.decoding {
            Decoding::Sample { choices, .. } => *choices,
            Decoding::Beam(_) => NonZeroU32::MIN,
        }
    }

    /// Most tokens of a choice that need KV: its last one does not.
    pub fn longest(&self) -> usize {
        self.prompt.len() + self.max_tokens.get() as usize - 1
    }

    /// The number of sequences that this request may hold at once.
    pub fn width(&self) -> NonZeroU32 {
        match &self.decoding {
            Decoding::Sample { choices, .. } => *choices,
            Decoding::Beam(beam) => beam.width,
        }
    }
}
