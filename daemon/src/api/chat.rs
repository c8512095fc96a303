//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::ask;
use super::auth::ShownKey;
use super::body::Body;
use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::gather::{Answer, Delta, Update, Whole};
use super::generation::{Generation, Reading, TokenIds};
use super::respond::{Envelope, Writer, respond};
use super::shape;
use super::state::{ApiState, Loaded};
use crate::model::text::{AddSpecial, ChatRequest};
use crate::request::{Request, TokenId};

/// The `object` of chunks.
const CHUNK: &str = "chat.completion.chunk";

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

struct Chat {
    envelope: Envelope,
    prompt: Vec<TokenId>,
    echoed: String,
    wants_logprobs: bool,
    wants_prompt_logprobs: bool,
    token_ids: TokenIds,
}

/// What the body asks for.
struct Ask {
    generation: Generation,
    prompt: Vec<TokenId>,
    echoed: String,
}

/// Answers a chat, whole or streamed.
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
    let request = ask.request(loaded)?;
    drop((bytes, room));
    let Ask { generation, prompt, echoed } = ask;
    let writer = Chat {
        envelope: Envelope::new("chatcmpl", request.id, &generation, &state, loaded),
        prompt,
        echoed,
        wants_logprobs: generation.logprobs.is_some(),
        wants_prompt_logprobs: generation.prompt_logprobs.is_some(),
        token_ids: generation.token_ids,
    };
    let gathers = ask::submit(&state, loaded, &generation, vec![request])?;
    respond(&state, gathers, &generation, writer).await
}

async fn read(
    state: &ApiState,
    loaded: &Loaded,
    key: &ShownKey,
    body: &[u8],
) -> Result<Ask, ApiError> {
    let mut fields = Fields::parse(body)?;
    let logprobs = read_logprobs(&mut fields, state.limits.top_logprobs)?;
    let max_tokens = fields.count("max_tokens", 1..=u32::MAX)?;
    let max_tokens = fields.count("max_completion_tokens", 1..=u32::MAX)?.or(max_tokens);
    let conversation = Conversation::read(&mut fields)?;
    let reading = Reading { state, loaded, key: key.0.as_deref() };
    let mut generation = Generation::read(&mut fields, reading, logprobs)?;
    fields.ignore_rest();
    generation.max_tokens = max_tokens;
    let echoed = conversation.echoed.clone().unwrap_or_default();
    let prompt = conversation.prompt(loaded).await?;
    generation.check_prompt_logprobs(prompt.len(), &state.limits)?;
    Ok(Ask { generation, prompt, echoed })
}

/// The request that a body asks for.
///
/// # Errors
/// As [`complete`], but for those of the engine.
pub(crate) async fn request(state: &ApiState, body: &[u8]) -> Result<Request, ApiError> {
    let loaded = state.loaded()?;
    read(state, loaded, &ShownKey(None), body).await?.request(loaded)
}

impl Ask {
    fn request(&self, loaded: &Loaded) -> Result<Request, ApiError> {
        self.generation.request(loaded, self.prompt.clone(), 0, None)
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
    pub(crate) async fn prompt(self, loaded: &Loaded) -> Result<Vec<TokenId>, ApiError> {
        let text = Arc::clone(&loaded.text);
        let special = self.special;
        let render = move || {
            Ok(text.render_chat(&ChatRequest {
                messages: &self.messages,
                add_generation_prompt: self.add_generation_prompt,
                continue_final_message: self.continue_final_message,
                kwargs: &self.kwargs,
                template: None,
            })?)
        };
        let rendered = ask::off_thread(loaded, render).await?;
        ask::check_prompt(ask::tokenize(loaded, rendered, special).await?)
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

impl Chat {
    fn choice(&self, (index, answer): (usize, Answer)) -> Value {
        let content = format!("{}{}", self.echoed, answer.text);
        let message = json!({"role": "assistant", "content": content, "refusal": null});
        let logprobs = self
            .wants_logprobs
            .then(|| shape::chat_logprobs(&self.envelope.text, &answer.logprobs));
        let mut choice = json!({"index": index, "message": message, "logprobs": logprobs});
        shape::put_finish(&mut choice, answer.finish.as_ref());
        if self.token_ids == TokenIds::Returned {
            choice["token_ids"] = shape::ids(&answer.tokens);
        }
        choice
    }

    fn chunk(&self, index: usize, delta: Value, logprobs: Option<Value>) -> Value {
        let mut choice = json!({"index": index, "delta": delta, "logprobs": logprobs});
        shape::put_finish(&mut choice, None);
        self.envelope.wrap(CHUNK, vec![choice])
    }

    fn delta(&self, delta: &Delta) -> Option<Value> {
        let says_nothing =
            delta.text.is_empty() && delta.logprobs.is_empty() && delta.finish.is_none();
        if says_nothing && self.token_ids == TokenIds::Left {
            return None;
        }
        let logprobs = (!delta.logprobs.is_empty())
            .then(|| shape::chat_logprobs(&self.envelope.text, &delta.logprobs));
        let content =
            if delta.text.is_empty() { json!({}) } else { json!({"content": delta.text}) };
        let mut chunk = self.chunk(delta.choice as usize, content, logprobs);
        shape::put_finish(&mut chunk["choices"][0], delta.finish.as_ref());
        if self.token_ids == TokenIds::Returned {
            chunk["choices"][0]["token_ids"] = shape::ids(&delta.tokens);
        }
        Some(chunk)
    }
}

impl Writer for Chat {
    /// The prompt's tokens and log-probabilities stand beside the choices, as in vLLM.
    fn whole(&self, whole: Vec<Whole>) -> Value {
        let (prompts, answers): (Vec<_>, Vec<_>) =
            whole.into_iter().map(|whole| (whole.prompt, whole.answers)).unzip();
        let answers = answers.into_iter().flatten().enumerate();
        let mut body =
            self.envelope.wrap("chat.completion", answers.map(|one| self.choice(one)).collect());
        if self.wants_prompt_logprobs {
            body["prompt_logprobs"] =
                shape::prompt_logprobs(&self.envelope.text, &prompts.concat());
        }
        if self.token_ids == TokenIds::Returned {
            body["prompt_token_ids"] = shape::ids(&self.prompt);
        }
        body
    }

    fn opening(&mut self, index: usize) -> Option<Value> {
        let role = json!({"role": "assistant", "content": self.echoed});
        let mut chunk = (index < self.envelope.n).then(|| self.chunk(index, role, None))?;
        if index == 0 && self.token_ids == TokenIds::Returned {
            chunk["prompt_token_ids"] = shape::ids(&self.prompt);
        }
        Some(chunk)
    }

    fn chunks(&mut self, _prompt: usize, update: Update) -> Vec<Value> {
        match update {
            Update::Delta(delta) => self.delta(&delta).into_iter().collect(),
            // Neither is streamed.
            Update::Prompt(_) | Update::Beams(_) => Vec::new(),
        }
    }

    fn empty(&self) -> Value {
        self.envelope.wrap(CHUNK, Vec::new())
    }
}
