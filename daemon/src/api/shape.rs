//! The JSON of answers: usage and log-probabilities as OpenAI's API and vLLM write them.

use serde_json::{Map, Value, json};

use super::gather::{Finish, StopCause, Used};
use super::generation::PreemptionDetails;
use crate::model::text::{SpecialTokens, Text};
use crate::request::{TokenId, TokenLogprob, TokenLogprobs};

/// Log-probabilities below this are written as this: JSON has no infinity.
const LEAST_LOGPROB: f32 = -9999.0;

/// The `usage` object.
pub(crate) fn usage(used: Used, preemptions: PreemptionDetails) -> Value {
    let mut usage = json!({
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.output_tokens,
        "total_tokens": used.prompt_tokens + used.output_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
    });
    if preemptions == PreemptionDetails::Told {
        usage["preemptions"] =
            json!({"count": used.preemptions, "recomputed_tokens": used.recomputed_tokens});
    }
    usage
}

/// `finish_reason` and vLLM's `stop_reason` of a choice.
pub(crate) fn put_finish(choice: &mut Value, finish: Option<&Finish>) {
    choice["finish_reason"] = finish.map_or(Value::Null, |finish| finish.reason.label().into());
    let cause = finish.and_then(|finish| finish.cause.as_ref());
    choice["stop_reason"] = match cause {
        None => Value::Null,
        Some(StopCause::Token(token)) => token.0.into(),
        Some(StopCause::Text(text)) => text.clone().into(),
    };
}

/// Token ids as numbers.
pub(crate) fn ids(tokens: &[TokenId]) -> Value {
    tokens.iter().map(|token| token.0).collect()
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { LEAST_LOGPROB } else { logprob.max(LEAST_LOGPROB) }
}

/// `logprobs` of a chat choice.
pub(crate) fn chat_logprobs(text: &Text, logprobs: &[TokenLogprobs]) -> Value {
    let entry = |one: &TokenLogprob| {
        json!({
            "token": text.token_text(one.token), "logprob": finite(one.logprob), "bytes": text.token_bytes(one.token),
        })
    };
    let content = logprobs.iter().map(|one| {
        let mut entry_of_token = entry(&one.token);
        entry_of_token["top_logprobs"] = one.top.iter().map(entry).collect();
        entry_of_token
    });
    json!({"content": content.collect::<Vec<_>>()})
}

/// `logprobs` of a completion choice, grown token by token.
#[derive(Debug)]
pub(crate) struct CompletionLogprobs<'a> {
    text: &'a Text,
    special: SpecialTokens,
    offset: isize,
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<isize>,
}

impl<'a> CompletionLogprobs<'a> {
    /// Of a text of which `offset` characters were told before; below 0 where it loses its first ones, see [`stripped`].
    pub(crate) fn new(text: &'a Text, special: SpecialTokens, offset: isize) -> Self {
        let (tokens, token_logprobs) = (Vec::new(), Vec::new());
        let (top_logprobs, text_offset) = (Vec::new(), Vec::new());
        Self { text, special, offset, tokens, token_logprobs, top_logprobs, text_offset }
    }

    /// A prompt: its first token has no log-probability.
    pub(crate) fn push_first(&mut self, token: TokenId) {
        self.push_token(token);
        self.token_logprobs.push(Value::Null);
        self.top_logprobs.push(Value::Null);
    }

    pub(crate) fn push(&mut self, one: &TokenLogprobs) {
        self.push_token(one.token.token);
        self.token_logprobs.push(finite(one.token.logprob).into());
        let top = one.top.iter().chain([&one.token]);
        let entry = |entry: &TokenLogprob| {
            (self.text.token_text(entry.token), finite(entry.logprob).into())
        };
        self.top_logprobs.push(top.map(entry).collect::<Map<_, _>>().into());
    }

    fn push_token(&mut self, token: TokenId) {
        self.text_offset.push(self.offset.max(0));
        self.tokens.push(self.text.token_text(token).into());
        if self.special == SpecialTokens::Skip && self.text.is_special(token) {
            return;
        }
        self.offset += characters(&self.text.token_bytes(token));
    }

    /// Characters told so far.
    pub(crate) fn offset(&self) -> isize {
        self.offset
    }

    pub(crate) fn into_json(self) -> Value {
        json!({
            "tokens": self.tokens, "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs, "text_offset": self.text_offset,
        })
    }
}

/// Characters that begin in these bytes: one that is split over tokens counts once.
fn characters(bytes: &[u8]) -> isize {
    bytes.iter().map(|byte| isize::from(byte & 0xC0 != 0x80)).sum()
}

/// Characters that the first token shows alone and a text of `tokens` does not begin with: SentencePiece's space.
pub(crate) fn stripped(text: &Text, tokens: &[TokenId], special: SpecialTokens) -> isize {
    let is_shown = |token: &TokenId| special == SpecialTokens::Keep || !text.is_special(*token);
    let first = tokens.iter().copied().find(is_shown);
    let lost = |token| {
        let shown = text.decode(&[token], SpecialTokens::Keep);
        characters(&text.token_bytes(token)) - characters(shown.as_bytes())
    };
    first.map_or(0, lost).max(0)
}

/// vLLM's `prompt_logprobs`: one object a token by id, `null` for the first token.
pub(crate) fn prompt_logprobs(text: &Text, logprobs: &[TokenLogprobs]) -> Value {
    let entry = |one: &TokenLogprob| {
        let value = json!({"logprob": finite(one.logprob), "rank": one.rank, "decoded_token": text.token_text(one.token)});
        (one.token.0.to_string(), value)
    };
    let of_token = |one: &TokenLogprobs| -> Value {
        [entry(&one.token)]
            .into_iter()
            .chain(one.top.iter().map(entry))
            .collect::<Map<_, _>>()
            .into()
    };
    [Value::Null].into_iter().chain(logprobs.iter().map(of_token)).collect()
}
