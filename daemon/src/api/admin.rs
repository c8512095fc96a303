//! Everything that generates nothing: models, tokenizing, health, version, metrics.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::ask;
use super::body::Body;
use super::chat::Conversation;
use super::error::ApiError;
use super::fields::Fields;
use super::shape;
use super::state::{ApiState, Loaded};
use crate::engine::handle;
use crate::model::text::{AddSpecial, SpecialTokens};

/// A step loop that has not moved for this long although there is work is sick.
const MOST_SILENCE: Duration = Duration::from_secs(60);

pub(crate) async fn models(State(state): State<Arc<ApiState>>) -> Json<Value> {
    let data: Vec<Value> =
        state.served_model_names.iter().map(|name| model_card(&state, name)).collect();
    Json(json!({"object": "list", "data": data}))
}

pub(crate) async fn model(
    State(state): State<Arc<ApiState>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(name) = name.map_err(|refused| ApiError::UnknownModel(refused.body_text()))?;
    let name = state.served(Some(name))?;
    Ok(Json(model_card(&state, &name)))
}

fn model_card(state: &ApiState, name: &str) -> Value {
    let max_model_len = state.loaded().ok().map(|loaded| loaded.handle.capacity().max_model_len);
    json!({
        "id": name, "object": "model", "created": state.created, "owned_by": "bindery", "root": name,
        "parent": null, "max_model_len": max_model_len,
    })
}

pub(crate) async fn tokenize(
    State(state): State<Arc<ApiState>>,
    Body { bytes, room: _room }: Body,
) -> Result<Json<Value>, ApiError> {
    let (loaded, mut fields) = begin(&state, &bytes)?;
    let wants_text = fields.bool("return_token_strs", false)?;
    let tokens = match fields.string("prompt", state.limits.body_bytes)? {
        Some(prompt) => {
            let special = if fields.bool("add_special_tokens", true)? {
                AddSpecial::Yes
            } else {
                AddSpecial::No
            };
            ask::tokenize(loaded, prompt, special).await?
        }
        None => Conversation::read(&mut fields)?.prompt(loaded).await?,
    };
    fields.ignore_rest();
    let texts = wants_text
        .then(|| tokens.iter().map(|&token| loaded.text.token_text(token)).collect::<Vec<_>>());
    Ok(Json(json!({
        "count": tokens.len(), "max_model_len": loaded.handle.capacity().max_model_len,
        "tokens": shape::ids(&tokens), "token_strs": texts,
    })))
}

/// The model that a body asks for and the rest of its fields.
fn begin<'a>(state: &'a ApiState, body: &[u8]) -> Result<(&'a Loaded, Fields), ApiError> {
    let loaded = state.loaded()?;
    let mut fields = Fields::parse(body)?;
    state.served(fields.string("model", 4096)?)?;
    Ok((loaded, fields))
}

pub(crate) async fn detokenize(
    State(state): State<Arc<ApiState>>,
    Body { bytes, room: _room }: Body,
) -> Result<Json<Value>, ApiError> {
    let (loaded, mut fields) = begin(&state, &bytes)?;
    let most = loaded.handle.capacity().max_model_len as usize;
    let tokens = fields.tokens("tokens", most, loaded.text.vocab_size())?;
    fields.ignore_rest();
    Ok(Json(json!({"prompt": loaded.text.decode(&tokens, SpecialTokens::Keep)})))
}

pub(crate) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// Whether the process is worth keeping: it is loading, idle, or its step loop moves.
pub(crate) async fn healthz(State(state): State<Arc<ApiState>>) -> Response {
    let Ok(loaded) = state.loaded() else { return (StatusCode::OK, "loading\n").into_response() };
    let silent = loaded.handle.since_progress();
    match loaded.handle.state() {
        handle::State::Stopped => {
            (StatusCode::SERVICE_UNAVAILABLE, "the engine has stopped\n").into_response()
        }
        handle::State::Ready | handle::State::Draining if silent > MOST_SILENCE => {
            let reason = format!("the step loop has not moved for {} s\n", silent.as_secs());
            (StatusCode::SERVICE_UNAVAILABLE, reason).into_response()
        }
        handle::State::Ready | handle::State::Draining => (StatusCode::OK, "ok\n").into_response(),
    }
}

/// Whether the model can answer a request that comes now.
pub(crate) async fn readyz(State(state): State<Arc<ApiState>>) -> Response {
    let reason = match state.loaded().map(|loaded| loaded.handle.state()) {
        Ok(handle::State::Ready) => return (StatusCode::OK, "ready\n").into_response(),
        Ok(handle::State::Draining) => "draining\n",
        Ok(handle::State::Stopped) => "the engine has stopped\n",
        Err(_) => "loading\n",
    };
    (StatusCode::SERVICE_UNAVAILABLE, reason).into_response()
}

/// vLLM's `/health`: 200 when requests are answered.
pub(crate) async fn health(state: State<Arc<ApiState>>) -> Response {
    readyz(state).await
}

pub(crate) async fn metrics(State(state): State<Arc<ApiState>>) -> Response {
    if let Ok(loaded) = state.loaded() {
        state.metrics.set_since_progress(loaded.handle.since_progress());
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.metrics.render())
        .into_response()
}
