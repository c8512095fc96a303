//! What both endpoints do with their choices: tell them whole, or as they come.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::error::ApiError;
use super::gather::{Gather, Update, Used, Whole};
use super::generation::{Delivery, Generation};
use super::shape;
use super::state::{ApiState, Loaded};
use super::stream::{self, UsagePlan};
use crate::model::text::Text;
use crate::request::RequestId;

/// How an endpoint writes its choices.
pub(crate) trait Writer: Send + 'static {
    /// The body of a whole answer, without its usage. One [`Whole`] a prompt.
    fn whole(&self, whole: Vec<Whole>) -> Value;
    /// The first chunk of a choice, before anything is computed. Indices count from 0; past the last choice the result
    /// is `None`.
    fn opening(&mut self, index: usize) -> Option<Value>;
    /// Chunks that tell what is new about a prompt.
    fn chunks(&mut self, prompt: usize, update: Update) -> Vec<Value>;
    /// A chunk without choices.
    fn empty(&self) -> Value;
}

/// What every answer and chunk carries.
#[derive(Debug)]
pub(crate) struct Envelope {
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
    /// Turns tokens to text.
    pub(crate) text: Arc<Text>,
    /// Choices of each prompt that the client gets.
    pub(crate) n: usize,
}

impl Envelope {
    /// What the answer to `generation` carries, whose first request is `id`. `kind` begins the id that clients see.
    pub(crate) fn new(
        kind: &str,
        id: RequestId,
        generation: &Generation,
        state: &ApiState,
        loaded: &Loaded,
    ) -> Self {
        Self {
            id: format!("{kind}-{:x}-{}", state.created, id.0),
            created: super::now(),
            model: generation.model.clone(),
            fingerprint: loaded.fingerprint.clone(),
            text: Arc::clone(&loaded.text),
            n: generation.choices.returned().get() as usize,
        }
    }

    /// An answer or a chunk, by `object`.
    pub(crate) fn wrap(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": choices,
        })
    }
}

/// Answers with what `gathers` bring, one for each prompt of the body.
///
/// # Errors
/// When the engine stops, or the whole answer takes too long: then it is dropped, which cancels its requests.
pub(crate) async fn respond(
    state: &ApiState,
    gathers: Vec<Gather>,
    generation: &Generation,
    writer: impl Writer,
) -> Result<Response, ApiError> {
    let limit = state.limits.request_timeout;
    match generation.delivery {
        Delivery::Stream { usage } => {
            let plan = UsagePlan { when: usage, preemptions: generation.preemptions };
            Ok(stream::respond(gathers, writer, plan, limit))
        }
        Delivery::Whole => {
            let whole = futures_util::future::try_join_all(gathers.into_iter().map(Gather::whole));
            let whole = tokio::time::timeout(limit, whole).await;
            let whole = whole.unwrap_or(Err(ApiError::Timeout { limit }))?;
            let used = whole.iter().fold(Used::default(), |used, one| used.plus(one.used));
            let mut body = writer.whole(whole);
            body["usage"] = shape::usage(used, generation.preemptions);
            Ok(Json(body).into_response())
        }
    }
}
