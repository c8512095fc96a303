//! The parameters of sampling, checked once at the door.

use std::num::NonZeroU32;

use crate::request::TokenId;

/// How one row's tokens are drawn. Values are in range by construction at the door (`api`).
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// 0 is greedy: the most likely token, the lowest id among equals.
    pub temperature: f32,
    /// Keep only this many of the most likely tokens.
    pub top_k: Option<NonZeroU32>,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from tokens that are in the output.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens; ids inside the vocabulary, no duplicates.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Key of the random numbers.
    pub seed: u64,
    /// Which prompt of the client's array this is: the first word of the random counter.
    pub prompt_index: u32,
    /// Stop tokens are not drawn before this many output tokens.
    pub min_tokens: u32,
    /// The tokens that `min_tokens` holds back.
    pub stop_tokens: std::sync::Arc<[TokenId]>,
    /// `Some(k)`: report the log-probability of the drawn token and the `k` most likely ones,
    /// from the raw logits, before temperature, bias and penalties, as vLLM does.
    pub logprobs: Option<u32>,
}

impl Params {
    /// The most likely token, always, with nothing else asked for.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            prompt_index: 0,
            min_tokens: 0,
            stop_tokens: std::sync::Arc::new([]),
            logprobs: None,
        }
    }
}
