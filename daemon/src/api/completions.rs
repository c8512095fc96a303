//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde_json::{Value, json};

use super::ask;
use super::auth::ShownKey;
use super::body::Body;
use super::error::ApiError;
use super::fields::{Fields, token_ids, wrong};
use super::gather::{Answer, Delta, Finish, Update, Whole};
use super::generation::{Choices, Generation, Reading, TokenIds};
use super::respond::{Envelope, Writer, respond};
use super::shape::{self, CompletionLogprobs};
use super::state::{ApiLimits, ApiState, Loaded};
use crate::model::text::{AddSpecial, SpecialTokens};
use crate::request::{FinishReason, Request, RequestId, TokenId, TokenLogprobs};

/// The `object` of answers and chunks.
const OBJECT: &str = "text_completion";

/// OpenAI's default of `max_tokens`.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// Whether an answer begins with its prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Echo {
    /// The prompt and the answer.
    Prompt,
    /// The prompt alone: `max_tokens` is 0.
    PromptOnly,
    Off,
}

/// What the body asks for.
struct Ask {
    generation: Generation,
    prompts: Vec<Vec<TokenId>>,
    echo: Echo,
}

/// What every choice of an answer is written with.
struct Completion {
    envelope: Envelope,
    prompts: Vec<Vec<TokenId>>,
    echo: Echo,
    logprobs: Option<u32>,
    wants_prompt_logprobs: bool,
    special: SpecialTokens,
    token_ids: TokenIds,
    /// Characters of streamed log-probabilities told so far, by index of the choice.
    offsets: Vec<usize>,
}

/// Answers a completion, whole or streamed.
///
/// # Errors
/// Everything that [`ApiError`] names.
pub(crate) async fn complete(
    State(state): State<Arc<ApiState>>,
    Extension(key): Extension<ShownKey>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let loaded = state.loaded()?;
    let ask = read(&state, loaded, &key, &body).await?;
    let requests = ask.requests(loaded)?;
    let Ask { generation, prompts, echo } = ask;
    let id = requests.first().map_or(RequestId(0), |request| request.id);
    let gathers = ask::submit(&state, loaded, &generation, requests)?;
    let envelope = Envelope::new("cmpl", id, &generation, &state, loaded);
    let writer = Completion {
        offsets: vec![0; prompts.len() * envelope.n],
        envelope,
        prompts,
        echo,
        logprobs: generation.logprobs,
        wants_prompt_logprobs: generation.prompt_logprobs.is_some(),
        special: generation.special,
        token_ids: generation.token_ids,
    };
    respond(&state, gathers, &generation, writer).await
}

async fn read(
    state: &ApiState,
    loaded: &Loaded,
    key: &ShownKey,
    body: &[u8],
) -> Result<Ask, ApiError> {
    let mut fields = Fields::parse(body)?;
    let logprobs = fields.count("logprobs", 0..=state.limits.top_logprobs)?;
    let max_tokens = fields.count("max_tokens", 0..=u32::MAX)?;
    let echo = match (fields.bool("echo", false)?, max_tokens) {
        (true, Some(0)) => Echo::PromptOnly,
        (true, _) => Echo::Prompt,
        (false, Some(0)) => {
            return Err(ApiError::invalid("max_tokens", "wanted at least 1 without echo, got 0"));
        }
        (false, _) => Echo::Off,
    };
    let special =
        if fields.bool("add_special_tokens", true)? { AddSpecial::Yes } else { AddSpecial::No };
    let reading = Reading { state, loaded, key: key.0.as_deref() };
    let prompt = fields.take("prompt").ok_or_else(|| ApiError::invalid("prompt", "is missing"))?;
    let mut generation = Generation::read(&mut fields, reading, logprobs)?;
    fields.ignore_rest();
    generation.max_tokens = max_tokens;
    if echo != Echo::Off {
        generation.prompt_logprobs = generation.prompt_logprobs.or(logprobs);
        if matches!(generation.choices, Choices::Beams { .. }) {
            return Err(ApiError::invalid("echo", "is not supported with use_beam_search"));
        }
    }
    let ask =
        Ask { generation, prompts: read_prompts(state, loaded, prompt, special).await?, echo };
    ask.check_repeats(&state.limits)?;
    Ok(ask)
}

/// The requests that a body asks for.
///
/// # Errors
/// As [`complete`], but for those of the engine.
pub(crate) async fn requests(state: &ApiState, body: &[u8]) -> Result<Vec<Request>, ApiError> {
    let loaded = state.loaded()?;
    read(state, loaded, &ShownKey(None), body).await?.requests(loaded)
}

impl Ask {
    fn requests(&self, loaded: &Loaded) -> Result<Vec<Request>, ApiError> {
        let request = |(index, prompt): (u32, &Vec<TokenId>)| {
            self.generation.request(loaded, prompt.clone(), index, Some(DEFAULT_MAX_TOKENS))
        };
        (0..).zip(&self.prompts).map(request).collect()
    }

    /// Refuses answers that would say long prompts many times: each choice repeats what is asked of its prompt.
    fn check_repeats(&self, limits: &ApiLimits) -> Result<(), ApiError> {
        let n = self.generation.choices.returned().get() as usize;
        let tokens = n * self.prompts.iter().map(Vec::len).sum::<usize>();
        self.generation.check_prompt_logprobs(tokens, limits)?;
        let most = limits.body_bytes;
        if self.echo != Echo::Off && tokens > most {
            let said = format!("would repeat {tokens} tokens, wanted at most {most}");
            return Err(ApiError::invalid("echo", said));
        }
        Ok(())
    }
}

/// A string, token ids, or an array of either.
async fn read_prompts(
    state: &ApiState,
    loaded: &Loaded,
    prompt: Value,
    special: AddSpecial,
) -> Result<Vec<Vec<TokenId>>, ApiError> {
    let items = match prompt {
        Value::String(_) => vec![prompt],
        Value::Array(ref items) if items.first().is_some_and(Value::is_number) => vec![prompt],
        Value::Array(items) => items,
        other => return Err(wrong("prompt", "a string, an array of strings or token ids", &other)),
    };
    let most = state.limits.prompts;
    if items.is_empty() || items.len() > most {
        return Err(ApiError::invalid(
            "prompt",
            format!("wanted 1 to {most} prompts, got {}", items.len()),
        ));
    }
    let mut prompts = Vec::with_capacity(items.len());
    for item in items {
        let tokens = match item {
            Value::String(text) => ask::tokenize(loaded, text, special).await?,
            Value::Array(ids) => token_ids("prompt", &ids, loaded.text.vocab_size())?,
            other => return Err(wrong("prompt", "strings or arrays of token ids", &other)),
        };
        prompts.push(ask::check_prompt(tokens)?);
    }
    Ok(prompts)
}

impl Completion {
    fn choice(
        &self,
        prompt: usize,
        at: usize,
        mut answer: Answer,
        whole: &[TokenLogprobs],
    ) -> Value {
        let tokens = &self.prompts[prompt];
        if self.echo == Echo::PromptOnly {
            answer =
                Answer { finish: answer.finish.take().map(|_| OF_PROMPT), ..Answer::default() };
        }
        let index = prompt * self.envelope.n + at;
        let logprobs = self.logprobs.map(|_| {
            let mut logprobs = self.logprobs_from(0);
            if self.echo != Echo::Off {
                logprobs.push_first(tokens[0]);
                whole.iter().for_each(|one| logprobs.push(one));
            }
            answer.logprobs.iter().for_each(|one| logprobs.push(one));
            logprobs.into_json()
        });
        let text = self.echoed(prompt) + &answer.text;
        let mut choice = json!({"index": index, "text": text, "logprobs": logprobs});
        shape::put_finish(&mut choice, answer.finish.as_ref());
        if self.wants_prompt_logprobs {
            choice["prompt_logprobs"] = shape::prompt_logprobs(&self.envelope.text, whole);
        }
        if self.token_ids == TokenIds::Returned {
            choice["prompt_token_ids"] = shape::ids(tokens);
            choice["token_ids"] = shape::ids(&answer.tokens);
        }
        choice
    }

    /// The text of a prompt where it is wanted.
    fn echoed(&self, prompt: usize) -> String {
        match self.echo {
            Echo::Off => String::new(),
            Echo::Prompt | Echo::PromptOnly => {
                self.envelope.text.decode(&self.prompts[prompt], self.special)
            }
        }
    }

    fn logprobs_from(&self, offset: usize) -> CompletionLogprobs<'_> {
        CompletionLogprobs::new(&self.envelope.text, self.special, offset)
    }

    fn chunk(&self, index: usize, text: String, logprobs: Option<Value>) -> Value {
        let mut choice = json!({"index": index, "text": text, "logprobs": logprobs});
        shape::put_finish(&mut choice, None);
        self.envelope.wrap(OBJECT, vec![choice])
    }

    /// The prompt's own log-probabilities, for every choice.
    fn prompt_chunks(&mut self, prompt: usize, logprobs: &[TokenLogprobs]) -> Vec<Value> {
        if self.echo == Echo::Off || self.logprobs.is_none() {
            return Vec::new();
        }
        let n = self.envelope.n;
        let chunk = |index: usize| {
            let mut written = self.logprobs_from(self.offsets[index]);
            if self.offsets[index] == 0 {
                written.push_first(self.prompts[prompt][0]);
            }
            logprobs.iter().for_each(|one| written.push(one));
            let offset = written.offset();
            (offset, self.chunk(index, String::new(), Some(written.into_json())))
        };
        let (offsets, chunks): (Vec<_>, Vec<_>) = (prompt * n..(prompt + 1) * n).map(chunk).unzip();
        self.offsets[prompt * n..(prompt + 1) * n].copy_from_slice(&offsets);
        chunks
    }

    fn delta(&mut self, prompt: usize, delta: Delta) -> Option<Value> {
        let only_prompt = self.echo == Echo::PromptOnly;
        let says_nothing =
            delta.text.is_empty() && delta.logprobs.is_empty() && delta.finish.is_none();
        if (only_prompt && delta.finish.is_none())
            || (says_nothing && self.token_ids == TokenIds::Left)
        {
            return None;
        }
        let index = prompt * self.envelope.n + delta.choice as usize;
        let delta = if only_prompt {
            let finish = delta.finish.map(|_| OF_PROMPT);
            Delta { text: String::new(), tokens: Vec::new(), logprobs: Vec::new(), finish, ..delta }
        } else {
            delta
        };
        let mut logprobs = None;
        if !delta.logprobs.is_empty() {
            let mut written = self.logprobs_from(self.offsets[index]);
            delta.logprobs.iter().for_each(|one| written.push(one));
            let offset = written.offset();
            logprobs = Some(written.into_json());
            self.offsets[index] = offset;
        }
        let mut chunk = self.chunk(index, delta.text, logprobs);
        shape::put_finish(&mut chunk["choices"][0], delta.finish.as_ref());
        if self.token_ids == TokenIds::Returned {
            chunk["choices"][0]["token_ids"] = shape::ids(&delta.tokens);
        }
        Some(chunk)
    }
}

impl Writer for Completion {
    fn whole(&self, whole: Vec<Whole>) -> Value {
        let of_prompt = |(prompt, whole): (usize, Whole)| {
            let answers = whole.answers.into_iter().enumerate();
            answers
                .map(|(at, answer)| self.choice(prompt, at, answer, &whole.prompt))
                .collect::<Vec<_>>()
        };
        let choices = whole.into_iter().enumerate().flat_map(of_prompt).collect();
        self.envelope.wrap(OBJECT, choices)
    }

    /// Where the prompt or its tokens are wanted.
    fn opening(&mut self, index: usize) -> Option<Value> {
        let prompt = index / self.envelope.n;
        let tokens = self.prompts.get(prompt)?;
        if self.echo == Echo::Off && self.token_ids == TokenIds::Left {
            return None;
        }
        let mut chunk = self.chunk(index, self.echoed(prompt), None);
        if self.token_ids == TokenIds::Returned {
            chunk["choices"][0]["prompt_token_ids"] = shape::ids(tokens);
        }
        Some(chunk)
    }

    fn chunks(&mut self, prompt: usize, update: Update) -> Vec<Value> {
        match update {
            Update::Prompt(logprobs) => self.prompt_chunks(prompt, &logprobs),
            // Beams are not streamed.
            Update::Beams(_) => Vec::new(),
            Update::Delta(delta) => self.delta(prompt, delta).into_iter().collect(),
        }
    }

    fn empty(&self) -> Value {
        self.envelope.wrap(OBJECT, Vec::new())
    }
}

/// The end of an answer of no tokens, whatever the token that was computed would have ended.
const OF_PROMPT: Finish = Finish { reason: FinishReason::Length, cause: None };
