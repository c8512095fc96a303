//! One request to an OpenAI-compatible server: sends it, reads its stream, notes when what arrived.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::{Value, json};

use super::prompts::Prompt;
use super::sse::Events;

/// Most of an error's body that is read.
const LARGEST_ERROR: usize = 4096;

/// Which API is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum EndpointType {
    /// `/v1/completions`, prompts as token ids.
    #[value(name = "openai", alias = "openai-completions", alias = "vllm")]
    Completions,
    /// `/v1/chat/completions`, prompts as text.
    #[value(name = "openai-chat")]
    Chat,
}

impl EndpointType {
    /// Where the API lies below the base URL.
    pub(in crate::bench) fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

/// A server and what all requests to it share.
#[derive(Debug, Clone)]
pub(in crate::bench) struct Target {
    pub(in crate::bench) client: reqwest::Client,
    pub(in crate::bench) base_url: String,
    pub(in crate::bench) path: String,
    pub(in crate::bench) endpoint_type: EndpointType,
    pub(in crate::bench) model: String,
    pub(in crate::bench) api_key: Option<String>,
    /// Fields of every body: temperature, n, ignore_eos.
    pub(in crate::bench) shared: serde_json::Map<String, Value>,
}

/// What a request that ended well took.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::bench) struct Measured {
    pub(in crate::bench) prompt_tokens: u64,
    /// Of all choices.
    pub(in crate::bench) output_tokens: u64,
    /// To the first token of any choice.
    pub(in crate::bench) ttft: Duration,
    /// Between the arrivals of one choice's tokens; an arrival may carry several.
    pub(in crate::bench) gaps: Vec<Duration>,
    /// To the last token.
    pub(in crate::bench) latency: Duration,
    /// Whether the server counted the tokens, or arrivals were counted instead.
    pub(in crate::bench) counted: Counted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) enum Counted {
    ByServer,
    ByArrivals,
}

/// Why a request failed; its words are what failures are counted by.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::bench) enum Failure {
    #[error("cannot connect")]
    Connect,
    #[error("HTTP {status}: {message}")]
    Status { status: u16, message: String },
    #[error("timed out")]
    Timeout,
    #[error("the stream broke off")]
    BrokeOff,
    #[error("the stream ended without [DONE]")]
    NoEnd,
    #[error("no token arrived")]
    NoToken,
    #[error("the stream is not understood: {0}")]
    NotUnderstood(String),
    #[error("the server reported in the stream: {0}")]
    Reported(String),
    #[error("the request was not run to its end")]
    Lost,
}

#[derive(Debug, Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    #[serde(default)]
    index: u32,
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Debug, Deserialize, Clone, Copy)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
}

impl Choice {
    /// Whether the chunk brings a token: a chat's first chunk brings a role alone, and a last one only the reason.
    fn has_token(&self) -> bool {
        match (&self.text, &self.delta) {
            (Some(text), _) => !text.is_empty() || self.finish_reason.is_none(),
            (None, Some(delta)) => {
                delta.content.as_ref().is_some_and(|content| !content.is_empty())
            }
            (None, None) => false,
        }
    }
}

/// What a stream has brought so far.
#[derive(Debug)]
struct Reading {
    started: Instant,
    first: Option<Instant>,
    last: BTreeMap<u32, Instant>,
    gaps: Vec<Duration>,
    arrivals: u64,
    usage: Option<Usage>,
    ended: Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    Yes,
    No,
}

impl Reading {
    fn new(started: Instant) -> Self {
        let (last, gaps) = (BTreeMap::new(), Vec::new());
        Self { started, first: None, last, gaps, arrivals: 0, usage: None, ended: Ended::No }
    }

    fn take(&mut self, data: &[u8], now: Instant) -> Result<(), Failure> {
        if data == b"[DONE]" {
            self.ended = Ended::Yes;
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_slice(data)
            .map_err(|error| Failure::NotUnderstood(error.to_string()))?;
        if let Some(error) = chunk.error {
            return Err(Failure::Reported(shortened(&message_of(&error))));
        }
        self.usage = chunk.usage.or(self.usage);
        for choice in chunk.choices.iter().filter(|choice| choice.has_token()) {
            self.first.get_or_insert(now);
            self.arrivals += 1;
            if let Some(before) = self.last.insert(choice.index, now) {
                self.gaps.push(now.duration_since(before));
            }
        }
        Ok(())
    }

    fn measured(self, prompt: &Prompt) -> Result<Measured, Failure> {
        if self.ended == Ended::No {
            return Err(Failure::NoEnd);
        }
        let (Some(first), Some(last)) = (self.first, self.last.values().max()) else {
            return Err(Failure::NoToken);
        };
        let counted = if self.usage.is_some() { Counted::ByServer } else { Counted::ByArrivals };
        let usage = self.usage.unwrap_or(Usage {
            prompt_tokens: prompt.tokens.len() as u64,
            completion_tokens: self.arrivals,
        });
        Ok(Measured {
            prompt_tokens: usage.prompt_tokens,
            output_tokens: usage.completion_tokens,
            ttft: first.duration_since(self.started),
            latency: last.duration_since(self.started),
            gaps: self.gaps,
            counted,
        })
    }
}

impl Target {
    /// Sends one prompt and reads the answer to its end.
    pub(in crate::bench) async fn send(
        &self,
        prompt: &Prompt,
        text: Option<&str>,
    ) -> Result<Measured, Failure> {
        let request = self.post(&self.path).json(&self.body(prompt, text));
        let mut reading = Reading::new(Instant::now());
        let response = request.send().await.map_err(|error| transport(&error))?;
        if !response.status().is_success() {
            return Err(refusal(response).await);
        }
        let mut body = response.bytes_stream();
        let mut events = Events::default();
        while let Some(bytes) = body.next().await {
            let bytes = bytes.map_err(|error| transport(&error))?;
            let now = Instant::now();
            for data in
                events.push(&bytes).map_err(|error| Failure::NotUnderstood(error.to_string()))?
            {
                reading.take(&data, now)?;
            }
        }
        reading.measured(prompt)
    }

    /// Asks for JSON at a path of the server; `None` when it does not answer with success.
    pub(in crate::bench) async fn ask(&self, path: &str, body: &Value) -> Option<Value> {
        let response = self.post(path).json(body).send().await.ok()?;
        if response.status().is_success() { response.json().await.ok() } else { None }
    }

    fn post(&self, path: &str) -> reqwest::RequestBuilder {
        self.authorized(self.client.post(format!("{}{path}", self.base_url)))
    }

    /// The names of the models that the server offers; empty when it does not say.
    pub(in crate::bench) async fn models(&self) -> Vec<String> {
        let request = self.authorized(self.client.get(format!("{}/v1/models", self.base_url)));
        let answer: Option<Value> = match request.send().await {
            Ok(response) => response.json().await.ok(),
            Err(_) => None,
        };
        let models = answer.as_ref().and_then(|answer| answer["data"].as_array());
        models
            .into_iter()
            .flatten()
            .filter_map(|model| Some(model["id"].as_str()?.to_owned()))
            .collect()
    }

    fn authorized(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    fn body(&self, prompt: &Prompt, text: Option<&str>) -> Value {
        let mut body = self.shared.clone();
        body.insert("model".into(), json!(self.model));
        body.insert("stream".into(), json!(true));
        body.insert("stream_options".into(), json!({"include_usage": true}));
        match self.endpoint_type {
            EndpointType::Completions => {
                body.insert("prompt".into(), json!(prompt.tokens));
                body.insert("max_tokens".into(), json!(prompt.output_tokens));
            }
            EndpointType::Chat => {
                let content = text.unwrap_or_default();
                body.insert("messages".into(), json!([{"role": "user", "content": content}]));
                body.insert("max_completion_tokens".into(), json!(prompt.output_tokens));
            }
        }
        Value::Object(body)
    }
}

fn transport(error: &reqwest::Error) -> Failure {
    if error.is_timeout() {
        Failure::Timeout
    } else if error.is_connect() {
        Failure::Connect
    } else {
        Failure::BrokeOff
    }
}

async fn refusal(mut response: reqwest::Response) -> Failure {
    let status = response.status().as_u16();
    let mut body = Vec::new();
    while let Ok(Some(bytes)) = response.chunk().await {
        body.extend_from_slice(&bytes);
        if body.len() >= LARGEST_ERROR {
            break;
        }
    }
    let message = match serde_json::from_slice::<Value>(&body) {
        Ok(answer) => message_of(answer.get("error").unwrap_or(&answer)),
        Err(_) => String::from_utf8_lossy(&body).into_owned(),
    };
    Failure::Status { status, message: shortened(&message) }
}

fn message_of(error: &Value) -> String {
    error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned)
}

fn shortened(message: &str) -> String {
    message.chars().take(200).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(chunks: &[Value]) -> Result<Measured, Failure> {
        let mut reading = Reading::new(Instant::now());
        for chunk in chunks {
            reading.take(chunk.to_string().as_bytes(), Instant::now())?;
        }
        reading.take(b"[DONE]", Instant::now())?;
        reading.measured(&Prompt { tokens: vec![1, 2, 3], output_tokens: 9 })
    }

    fn chat(delta: Value) -> Value {
        json!({"choices": [{"index": 0, "delta": delta}]})
    }

    #[test]
    fn a_role_alone_is_no_token() {
        let role = chat(json!({"role": "assistant", "content": ""}));
        assert_eq!(read(std::slice::from_ref(&role)), Err(Failure::NoToken));
        let measured =
            read(&[role, chat(json!({"content": "a"})), chat(json!({"content": "b"}))]).unwrap();
        assert_eq!(
            (measured.gaps.len(), measured.output_tokens, measured.prompt_tokens),
            (1, 2, 3)
        );
        assert_eq!(measured.counted, Counted::ByArrivals);
    }

    #[test]
    fn gaps_are_those_of_one_choice() {
        let text = |index: u32| json!({"choices": [{"index": index, "text": "x"}]});
        assert_eq!(read(&[text(0), text(1), text(0)]).unwrap().gaps.len(), 1);
    }

    #[test]
    fn an_error_inside_the_stream_is_a_failure() {
        let error = json!({"error": {"message": "no\nmemory"}});
        assert_eq!(read(&[error]), Err(Failure::Reported("no memory".into())));
        assert!(matches!(read(&[json!([])]), Err(Failure::NotUnderstood(_))));
    }
}
