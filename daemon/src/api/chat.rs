//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::ask;
use super::auth::ShownKey;
use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::gather::{Answer, Update, Used, Whole};
use super::generation::{Delivery, Generation, Reading, TokenIds};
use super::shape;
use super::state::{ApiState, Loaded};
use super::stream::{self, Chunks, UsagePlan};
use crate::model::text::{AddSpecial, ChatRequest, Text};
use crate::request::TokenId;

/// What the template makes of a body.
pub(crate) struct Conversation {
    messages: Value,
    add_generation_prompt: bool,
    continue_final_message: bool,
    kwargs: Map<String, Value>,
    special: AddSpecial,
    /// The final message's text, when the answer begins with it.
    echoed: Option<String>,
}

struct Writer {
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
    text: Arc<Text>,
    prompt: Vec<TokenId>,
    echoed: String,
    wants_logprobs: bool,
    wants_prompt_logprobs: bool,
    token_ids: TokenIds,
    n: usize,
}

/// Answers a chat, whole or streamed.
///
/// # Errors
/// Everything that [`ApiError`] names.
pub(crate) async fn complete(
    State(state): State<Arc<ApiState>>,
    Extension(key): Extension<ShownKey>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let loaded = state.loaded()?;
    let mut fields = Fields::parse(&body)?;
    let logprobs = read_logprobs(&mut fields, state.limits.top_logprobs)?;
    let max_tokens = match fields.count("max_completion_tokens", 1..=u32::MAX)? {
        Some(tokens) => {
            fields.take("max_tokens");
            Some(tokens)
        }
        None => fields.count("max_tokens", 1..=u32::MAX)?,
    };
    let conversation = Conversation::read(&mut fields)?;
    let reading = Reading { state: &state, loaded, key: key.0.as_deref() };
    let mut generation = Generation::read(&mut fields, reading, logprobs)?;
    generation.max_tokens = max_tokens;
    fields.ignore_rest();
    let prompt = conversation.prompt(loaded).await?;
    let default = loaded.text.sampling_defaults().max_new_tokens;
    let request = generation.request(loaded, prompt.clone(), 0, default)?;
    let writer = Writer {
        id: format!("chatcmpl-{:x}-{}", state.created, request.id.0),
        created: super::now(),
        model: generation.model.clone(),
        fingerprint: loaded.fingerprint.clone(),
        text: Arc::clone(&loaded.text),
        prompt,
        echoed: conversation.echoed.unwrap_or_default(),
        wants_logprobs: logprobs.is_some(),
        wants_prompt_logprobs: generation.prompt_logprobs.is_some(),
        token_ids: generation.token_ids,
        n: generation.n_returned() as usize,
    };
    let gathers = ask::submit(&state, loaded, &generation, vec![request])?;
    match generation.delivery {
        Delivery::Stream { usage } => {
            let plan = UsagePlan { when: usage, preemptions: generation.preemptions };
            Ok(stream::respond(gathers, writer, plan))
        }
        Delivery::Whole => {
            let whole = futures_util::future::try_join_all(
                gathers.into_iter().map(super::gather::Gather::whole),
            );
            let whole = super::within(state.limits.request_timeout, whole).await?;
            let mut used = Used::default();
            let mut choices = Vec::new();
            for one in whole {
                used = used.plus(one.used);
                choices.extend(writer.choices(one));
            }
            let mut body = writer.envelope("chat.completion", choices);
            body["usage"] = shape::usage(used, generation.preemptions);
            Ok(Json(body).into_response())
        }
    }
}

fn read_logprobs(fields: &mut Fields, most: u32) -> Result<Option<u32>, ApiError> {
    let wanted = fields.bool("logprobs", false)?;
    let top = fields.count("top_logprobs", 0..=most)?;
    match (wanted, top) {
        (false, Some(top)) if top > 0 => {
            Err(ApiError::invalid("top_logprobs", "wanted only with logprobs: true"))
        }
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

impl Conversation {
    /// Reads what the chat template needs.
    pub(crate) fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let messages = match fields.take("messages") {
            Some(Value::Array(messages)) if !messages.is_empty() => messages,
            Some(Value::Array(_)) | None => {
                return Err(ApiError::invalid("messages", "wanted at least one message"));
            }
            Some(other) => return Err(wrong("messages", "an array of messages", &other)),
        };
        let messages: Vec<Value> =
            messages.into_iter().enumerate().map(read_message).collect::<Result<_, _>>()?;
        let continue_final_message = fields.bool("continue_final_message", false)?;
        let add_generation_prompt =
            fields.bool("add_generation_prompt", !continue_final_message)?;
        if continue_final_message && add_generation_prompt {
            let reason = "cannot be true together with add_generation_prompt";
            return Err(ApiError::invalid("continue_final_message", reason));
        }
        let last = messages.last().and_then(|message| message["content"].as_str());
        let echoed = (fields.bool("echo", false)? && continue_final_message)
            .then(|| last.unwrap_or("").to_owned());
        Ok(Self {
            messages: Value::Array(messages),
            add_generation_prompt,
            continue_final_message,
            kwargs: fields.object("chat_template_kwargs")?.unwrap_or_default(),
            special: if fields.bool("add_special_tokens", false)? {
                AddSpecial::Yes
            } else {
                AddSpecial::No
            },
            echoed,
        })
    }

    /// Renders the template and tokenizes what it gives, away from the threads that serve connections.
    pub(crate) async fn prompt(&self, loaded: &Loaded) -> Result<Vec<TokenId>, ApiError> {
        let text = Arc::clone(&loaded.text);
        let (messages, kwargs) = (self.messages.clone(), self.kwargs.clone());
        let (add_generation_prompt, continue_final_message) =
            (self.add_generation_prompt, self.continue_final_message);
        let render = move || {
            text.render_chat(&ChatRequest {
                messages: &messages,
                add_generation_prompt,
                continue_final_message,
                kwargs: &kwargs,
                template: None,
            })
        };
        let rendered =
            tokio::task::spawn_blocking(render).await.map_err(|_| ApiError::EngineStopped)??;
        ask::check_prompt(ask::tokenize(loaded, rendered, self.special).await?)
    }
}

/// A message with its content as one text; other fields are the template's.
fn read_message((index, message): (usize, Value)) -> Result<Value, ApiError> {
    let name = |field: &str| format!("messages[{index}].{field}");
    let Value::Object(mut message) = message else {
        return Err(wrong(&format!("messages[{index}]"), "an object", &message));
    };
    match message.get("role") {
        Some(Value::String(role)) if role == "developer" => {
            drop(message.insert("role".into(), "system".into()))
        }
        Some(Value::String(role))
            if ["system", "user", "assistant", "tool"].contains(&role.as_str()) => {}
        Some(Value::String(_)) => {
            return Err(ApiError::invalid(
                name("role"),
                "wanted system, developer, user, assistant or tool",
            ));
        }
        Some(other) => return Err(wrong(&name("role"), "a string", other)),
        None => return Err(ApiError::invalid(name("role"), "is missing")),
    }
    let content = match message.remove("content") {
        Some(Value::String(text)) => text,
        None | Some(Value::Null) => String::new(),
        Some(Value::Array(parts)) => parts
            .iter()
            .map(|part| read_part(&name("content"), part))
            .collect::<Result<String, _>>()?,
        Some(other) => {
            return Err(wrong(&name("content"), "a string or an array of parts", &other));
        }
    };
    message.insert("content".into(), content.into());
    Ok(Value::Object(message))
}

fn read_part<'a>(name: &str, part: &'a Value) -> Result<&'a str, ApiError> {
    match part.get("type").and_then(Value::as_str) {
        Some("text") => part
            .get("text")
            .and_then(Value::as_str)
            .ok_or_else(|| ApiError::invalid(name, "wanted a text part's text")),
        Some(other) => {
            let kind: String = other.chars().take(40).collect();
            Err(ApiError::Unsupported { param: format!("{name} of type {kind:?}") })
        }
        None => Err(ApiError::invalid(name, "wanted parts with a type")),
    }
}

impl Writer {
    fn envelope(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": choices,
        })
    }

    fn choices(&self, mut whole: Whole) -> Vec<Value> {
        let answers = super::best(std::mem::take(&mut whole.answers), self.n);
        answers
            .into_iter()
            .enumerate()
            .map(|(index, answer)| self.choice(index, &answer, &whole))
            .collect()
    }

    fn choice(&self, index: usize, answer: &Answer, whole: &Whole) -> Value {
        let content = format!("{}{}", self.echoed, answer.text);
        let logprobs =
            self.wants_logprobs.then(|| shape::chat_logprobs(&self.text, &answer.logprobs));
        let mut choice = json!({
            "index": index, "message": {"role": "assistant", "content": content, "refusal": null}, "logprobs": logprobs,
        });
        shape::put_finish(&mut choice, answer.finish.as_ref());
        if self.wants_prompt_logprobs {
            choice["prompt_logprobs"] = shape::prompt_logprobs(&self.text, &whole.prompt);
        }
        if self.token_ids == TokenIds::Returned {
            choice["prompt_token_ids"] = shape::ids(&self.prompt);
            choice["token_ids"] = shape::ids(&answer.tokens);
        }
        choice
    }

    fn chunk(&self, index: usize, delta: Value, logprobs: Option<Value>) -> Value {
        let mut choice = json!({"index": index, "delta": delta, "logprobs": logprobs});
        shape::put_finish(&mut choice, None);
        self.envelope("chat.completion.chunk", vec![choice])
    }
}

impl Chunks for Writer {
    fn opening(&mut self) -> Vec<Value> {
        (0..self.n)
            .map(|index| {
                self.chunk(index, json!({"role": "assistant", "content": self.echoed}), None)
            })
            .collect()
    }

    fn of(&mut self, _prompt: usize, update: Update) -> Vec<Value> {
        let Update::Delta(delta) = update else { return Vec::new() };
        let says_nothing =
            delta.text.is_empty() && delta.logprobs.is_empty() && delta.finish.is_none();
        if says_nothing && self.token_ids == TokenIds::Left {
            return Vec::new();
        }
        let logprobs =
            (!delta.logprobs.is_empty()).then(|| shape::chat_logprobs(&self.text, &delta.logprobs));
        let content =
            if delta.text.is_empty() { json!({}) } else { json!({"content": delta.text}) };
        let mut chunk = self.chunk(delta.choice as usize, content, logprobs);
        shape::put_finish(&mut chunk["choices"][0], delta.finish.as_ref());
        if self.token_ids == TokenIds::Returned {
            chunk["choices"][0]["token_ids"] = shape::ids(&delta.tokens);
        }
        vec![chunk]
    }

    fn empty(&self) -> Value {
        self.envelope("chat.completion.chunk", Vec::new())
    }
}
