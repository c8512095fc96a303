//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::ask;
use super::auth::ShownKey;
use super::error::ApiError;
use super::fields::{Fields, token_ids, wrong};
use super::gather::{Answer, Update, Used, Whole};
use super::generation::{Choices, Delivery, Generation, Reading, TokenIds};
use super::shape::{self, CompletionLogprobs};
use super::state::{ApiState, Loaded};
use super::stream::{self, Chunks, UsagePlan};
use crate::model::text::{AddSpecial, SpecialTokens, Text};
use crate::request::TokenId;

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
struct Writer {
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
    text: Arc<Text>,
    prompts: Vec<Vec<TokenId>>,
    echo: Echo,
    logprobs: Option<u32>,
    wants_prompt_logprobs: bool,
    special: SpecialTokens,
    token_ids: TokenIds,
    n: usize,
}

/// Answers a completion, whole or streamed.
///
/// # Errors
/// Everything that [`ApiError`] names.
pub(crate) async fn complete(
    State(state): State<Arc<ApiState>>,
    Extension(key): Extension<ShownKey>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let loaded = state.loaded()?;
    let ask = read(&state, loaded, &key, &body).await?;
    let request = |(index, prompt): (u32, &Vec<TokenId>)| {
        ask.generation.request(loaded, prompt.clone(), index, Some(DEFAULT_MAX_TOKENS))
    };
    let requests = (0..).zip(&ask.prompts).map(request).collect::<Result<Vec<_>, _>>()?;
    let id = requests.first().map_or(0, |request| request.id.0);
    let gathers = ask::submit(&state, loaded, &ask.generation, requests)?;
    let generation = ask.generation;
    let writer = Writer {
        id: format!("cmpl-{:x}-{id}", state.created),
        created: super::now(),
        model: generation.model.clone(),
        fingerprint: loaded.fingerprint.clone(),
        text: Arc::clone(&loaded.text),
        prompts: ask.prompts,
        echo: ask.echo,
        logprobs: generation.logprobs,
        wants_prompt_logprobs: generation.prompt_logprobs.is_some(),
        special: generation.special,
        token_ids: generation.token_ids,
        n: generation.n_returned() as usize,
    };
    match generation.delivery {
        Delivery::Stream { usage } => {
            let plan = UsagePlan { when: usage, preemptions: generation.preemptions };
            let offsets = vec![0; writer.prompts.len() * writer.n];
            Ok(stream::respond(gathers, Streamed { writer, offsets }, plan))
        }
        Delivery::Whole => {
            let whole = futures_util::future::try_join_all(
                gathers.into_iter().map(super::gather::Gather::whole),
            );
            let whole = super::within(state.limits.request_timeout, whole).await?;
            Ok(Json(writer.whole(whole, &generation)).into_response())
        }
    }
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
        if matches!(generation.choices, Choices::Beams(_)) {
            return Err(ApiError::invalid("echo", "is not supported with use_beam_search"));
        }
    }
    let prompts = read_prompts(state, loaded, prompt, special).await?;
    Ok(Ask { generation, prompts, echo })
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

impl Writer {
    fn envelope(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": choices,
        })
    }

    fn whole(&self, whole: Vec<Whole>, generation: &Generation) -> Value {
        let mut used = Used::default();
        let mut choices = Vec::new();
        for (prompt, mut whole) in whole.into_iter().enumerate() {
            if self.echo == Echo::PromptOnly {
                whole.used.output_tokens = 0;
            }
            used = used.plus(whole.used);
            let answers = super::best(std::mem::take(&mut whole.answers), self.n);
            choices.extend(
                answers
                    .into_iter()
                    .enumerate()
                    .map(|(at, answer)| self.choice(prompt, at, answer, &whole)),
            );
        }
        let mut body = self.envelope(choices);
        body["usage"] = shape::usage(used, generation.preemptions);
        body
    }

    fn choice(&self, prompt: usize, at: usize, mut answer: Answer, whole: &Whole) -> Value {
        let tokens = &self.prompts[prompt];
        if self.echo == Echo::PromptOnly {
            answer = Answer { finish: answer.finish.take(), ..Answer::default() };
            if let Some(finish) = &mut answer.finish {
                finish.reason = crate::request::FinishReason::Length;
                finish.cause = None;
            }
        }
        let shown = match self.echo {
            Echo::Off => String::new(),
            Echo::Prompt | Echo::PromptOnly => self.text.decode(tokens, self.special),
        };
        let logprobs = self.logprobs.map(|_| {
            let (mut logprobs, mut offset) = (CompletionLogprobs::default(), 0);
            if self.echo != Echo::Off {
                logprobs.push_first(&self.text, tokens[0], &mut offset);
                whole.prompt.iter().for_each(|one| logprobs.push(&self.text, one, &mut offset));
            }
            answer.logprobs.iter().for_each(|one| logprobs.push(&self.text, one, &mut offset));
            logprobs.into_json()
        });
        let mut choice = json!({
            "index": prompt * self.n + at, "text": shown + &answer.text, "logprobs": logprobs,
        });
        shape::put_finish(&mut choice, answer.finish.as_ref());
        if self.wants_prompt_logprobs {
            choice["prompt_logprobs"] = shape::prompt_logprobs(&self.text, &whole.prompt);
        }
        if self.token_ids == TokenIds::Returned {
            choice["prompt_token_ids"] = shape::ids(tokens);
            choice["token_ids"] = shape::ids(&answer.tokens);
        }
        choice
    }
}

/// A completion in chunks.
struct Streamed {
    writer: Writer,
    /// Characters told so far, by index of the choice.
    offsets: Vec<usize>,
}

impl Streamed {
    fn indices(&self, prompt: usize) -> std::ops::Range<usize> {
        prompt * self.writer.n..(prompt + 1) * self.writer.n
    }

    fn chunk(&self, index: usize, text: String, logprobs: Option<Value>) -> Value {
        let mut choice = json!({"index": index, "text": text, "logprobs": logprobs});
        shape::put_finish(&mut choice, None);
        self.writer.envelope(vec![choice])
    }

    /// The prompt's own log-probabilities, for every choice.
    fn prompt_chunks(
        &mut self,
        prompt: usize,
        logprobs: &[crate::request::TokenLogprobs],
    ) -> Vec<Value> {
        if self.writer.echo == Echo::Off || self.writer.logprobs.is_none() {
            return Vec::new();
        }
        let indices = self.indices(prompt);
        let chunk = |index: usize| {
            let mut written = CompletionLogprobs::default();
            let offset = &mut self.offsets[index];
            if *offset == 0 {
                written.push_first(&self.writer.text, self.writer.prompts[prompt][0], offset);
            }
            logprobs.iter().for_each(|one| written.push(&self.writer.text, one, offset));
            (index, written.into_json())
        };
        let written: Vec<_> = indices.map(chunk).collect();
        written
            .into_iter()
            .map(|(index, json)| self.chunk(index, String::new(), Some(json)))
            .collect()
    }
}

impl Chunks for Streamed {
    fn opening(&mut self) -> Vec<Value> {
        if self.writer.echo == Echo::Off {
            return Vec::new();
        }
        let shown = |prompt: usize| {
            self.writer.text.decode(&self.writer.prompts[prompt], self.writer.special)
        };
        (0..self.offsets.len())
            .map(|index| self.chunk(index, shown(index / self.writer.n), None))
            .collect()
    }

    fn of(&mut self, prompt: usize, update: Update) -> Vec<Value> {
        let delta = match update {
            Update::Prompt(logprobs) => return self.prompt_chunks(prompt, &logprobs),
            Update::Beams(_) => return Vec::new(),
            Update::Delta(delta) => delta,
        };
        let only_prompt = self.writer.echo == Echo::PromptOnly;
        let says_nothing =
            delta.text.is_empty() && delta.logprobs.is_empty() && delta.finish.is_none();
        if (only_prompt && delta.finish.is_none())
            || (says_nothing && self.writer.token_ids == TokenIds::Left)
        {
            return Vec::new();
        }
        let index = prompt * self.writer.n + delta.choice as usize;
        let (text, logprobs) =
            if only_prompt { (String::new(), Vec::new()) } else { (delta.text, delta.logprobs) };
        let written = (!logprobs.is_empty()).then(|| {
            let mut written = CompletionLogprobs::default();
            let offset = &mut self.offsets[index];
            logprobs.iter().for_each(|one| written.push(&self.writer.text, one, offset));
            written.into_json()
        });
        let mut chunk = self.chunk(index, text, written);
        shape::put_finish(&mut chunk["choices"][0], delta.finish.as_ref());
        if self.writer.token_ids == TokenIds::Returned {
            chunk["choices"][0]["token_ids"] = shape::ids(&delta.tokens);
        }
        vec![chunk]
    }

    fn empty(&self) -> Value {
        self.writer.envelope(Vec::new())
    }
}
