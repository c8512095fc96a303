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
use super::prompt::{List, Prompt};
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
    /// Where the text of the next token begins, by index of the choice: for log-probabilities that are streamed.
    offsets: Vec<isize>,
}

/// Answers a completion, whole or streamed.
///
/// # Errors
/// Everything that [`ApiError`] names.
pub(crate) async fn complete(
    State(state): State<Arc<ApiState>>,
    Extension(key): Extension<ShownKey>,
    Body { bytes, room }: Body,
) -> Result<Response, ApiError> {
    let loaded = state.loaded()?;
    let ask = read(&state, loaded, &key, &bytes).await?;
    let requests = ask.requests(loaded)?;
    drop((bytes, room));
    let Ask { generation, prompts, echo } = ask;
    let id = requests.first().map_or(RequestId(0), |request| request.id);
    let gathers = ask::submit(&state, loaded, &generation, requests)?;
    let envelope = Envelope::new("cmpl", id, &generation, &state, loaded);
    let mut writer = Completion {
        offsets: Vec::new(),
        envelope,
        prompts,
        echo,
        logprobs: generation.logprobs,
        wants_prompt_logprobs: generation.prompt_logprobs.is_some(),
        special: generation.special,
        token_ids: generation.token_ids,
    };
    writer.offsets = writer.first_offsets();
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
    let prompts = take_prompts(&mut fields, &state.limits)?;
    let mut generation = Generation::read(&mut fields, reading, logprobs)?;
    fields.ignore_rest();
    generation.max_tokens = max_tokens;
    if echo != Echo::Off {
        generation.prompt_logprobs = generation.prompt_logprobs.or(logprobs);
        if matches!(generation.choices, Choices::Beams { .. }) {
            return Err(ApiError::invalid("echo", "is not supported with use_beam_search"));
        }
    }
    let ask = Ask { generation, prompts: tokenize_all(loaded, prompts, special).await?, echo };
    ask.check_repeats(loaded, &state.limits)?;
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
    fn check_repeats(&self, loaded: &Loaded, limits: &ApiLimits) -> Result<(), ApiError> {
        let n = self.generation.choices.returned().get() as usize;
        let tokens = n * self.prompts.iter().map(Vec::len).sum::<usize>();
        self.generation.check_prompt_logprobs(tokens, limits)?;
        if self.echo == Echo::Off {
            return Ok(());
        }
        let bytes_of = |token: &TokenId| loaded.text.token_bytes(*token).len();
        let bytes = n * self.prompts.iter().flatten().map(bytes_of).sum::<usize>();
        let most = limits.body_bytes;
        if bytes > most {
            let said = format!("would repeat {bytes} bytes of prompts, wanted at most {most}");
            return Err(ApiError::invalid("echo", said));
        }
        Ok(())
    }
}

/// A string, token ids, or an array of either.
fn take_prompts(fields: &mut Fields, limits: &ApiLimits) -> Result<Vec<Prompt>, ApiError> {
    let most = limits.prompts;
    match (fields.list("prompt"), fields.take("prompt")) {
        (Some(List { stranger: Some(kind), .. }), _) => {
            Err(ApiError::invalid("prompt", format!("wanted strings or token ids, got {kind}")))
        }
        (Some(list), _) if list.len == 0 || (list.ids.is_empty() && list.len > most) => Err(
            ApiError::invalid("prompt", format!("wanted 1 to {most} prompts, got {}", list.len)),
        ),
        (Some(list), _) if list.ids.is_empty() => Ok(list.prompts),
        (Some(list), _) => Ok(vec![Prompt::Ids(list)]),
        (None, Some(Value::String(text))) => Ok(vec![Prompt::Text(text)]),
        (None, Some(other)) => {
            Err(wrong("prompt", "a string, an array of strings or token ids", &other))
        }
        (None, None) => Err(ApiError::invalid("prompt", "is missing")),
    }
}

async fn tokenize_all(
    loaded: &Loaded,
    prompts: Vec<Prompt>,
    special: AddSpecial,
) -> Result<Vec<Vec<TokenId>>, ApiError> {
    let mut all = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let tokens = match prompt {
            Prompt::Text(text) => ask::tokenize(loaded, text, special).await?,
            Prompt::Ids(list) => token_ids("prompt", &list, loaded.text.vocab_size())?,
        };
        all.push(ask::check_prompt(tokens)?);
    }
    Ok(all)
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
            let mut logprobs = self.logprobs_from(self.first_offset(prompt));
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

    /// Where the text of each choice's first token begins, by index of the choice.
    fn first_offsets(&self) -> Vec<isize> {
        let of_prompt = |prompt| std::iter::repeat_n(self.first_offset(prompt), self.envelope.n);
        (0..self.prompts.len()).flat_map(of_prompt).collect()
    }

    /// Before the text where an echoed prompt's first token loses a space.
    fn first_offset(&self, prompt: usize) -> isize {
        match self.echo {
            Echo::Off => 0,
            Echo::Prompt | Echo::PromptOnly => {
                -shape::stripped(&self.envelope.text, &self.prompts[prompt], self.special)
            }
        }
    }

    fn logprobs_from(&self, offset: isize) -> CompletionLogprobs<'_> {
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
        let logprobs = (self.echo != Echo::Off && self.logprobs.is_some()).then(|| {
            let mut written = self.logprobs_from(self.offsets[index]);
            written.push_first(tokens[0]);
            (written.offset(), written.into_json())
        });
        let (offset, logprobs) = logprobs.unzip();
        let mut chunk = self.chunk(index, self.echoed(prompt), logprobs);
        if self.token_ids == TokenIds::Returned {
            chunk["choices"][0]["prompt_token_ids"] = shape::ids(tokens);
        }
        self.offsets[index] = offset.unwrap_or(self.offsets[index]);
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
