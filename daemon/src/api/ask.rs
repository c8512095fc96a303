//! From a checked body to requests inside the engine.

use std::sync::Arc;

use super::error::ApiError;
use super::gather::{Gather, RequestView};
use super::generation::Generation;
use super::state::{ApiState, Loaded};
use crate::engine::handle::Submitted;
use crate::model::text::{AddSpecial, Text};
use crate::request::{Request, TokenId};

/// Tokens of a text, which is refused before the work when it cannot fit the context.
///
/// # Errors
/// When the text is too long or cannot be tokenized.
pub(crate) async fn tokenize(
    loaded: &Loaded,
    text: String,
    special: AddSpecial,
) -> Result<Vec<TokenId>, ApiError> {
    let limit = loaded.handle.capacity().max_model_len as usize;
    let least = text.len() / loaded.longest_token.max(1);
    if least > limit {
        return Err(ApiError::ContextLength { prompt: least, output: 1, limit });
    }
    let tokenizer = Arc::clone(&loaded.text);
    let encode = move || Ok(tokenizer.encode(&text, special)?);
    off_thread(encode).await
}

/// Runs work on a thread where it holds up no connection. A panic in it is the input's failure.
///
/// # Errors
/// Those of `work`.
pub(crate) async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let failed = |_| ApiError::invalid("prompt", "the tokenizer failed on it");
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}

/// Refuses prompts that hold nothing.
///
/// # Errors
/// When there is no token.
pub(crate) fn check_prompt(tokens: Vec<TokenId>) -> Result<Vec<TokenId>, ApiError> {
    if tokens.is_empty() {
        Err(ApiError::invalid("prompt", "wanted at least one token, got none"))
    } else {
        Ok(tokens)
    }
}

/// Puts all requests of a body into the engine, or none.
///
/// # Errors
/// When the queue is full, the engine drains, or one can never fit.
pub(crate) fn submit(
    state: &ApiState,
    loaded: &Loaded,
    generation: &Generation,
    requests: Vec<Request>,
) -> Result<Vec<Gather>, ApiError> {
    let views: Vec<_> = requests.iter().map(RequestView::of).collect();
    let submitted = loaded.handle.submit(requests).map_err(|refused| {
        let error = ApiError::from(refused);
        if let ApiError::Overloaded { limit, .. } = &error {
            state.metrics.rejected(limit);
        }
        error
    })?;
    let follow = |(submitted, view): (Submitted, &RequestView)| {
        state.metrics.request_params(generation.choices.returned().get(), view.max_tokens);
        Gather::new(submitted, view, generation, &loaded.text, &state.metrics)
    };
    Ok(submitted.into_iter().zip(&views).map(follow).collect())
}

/// Bytes of the longest token of a vocabulary: what bounds the tokens of a text from below.
pub fn longest_token(text: &Text) -> usize {
    let ids = u32::try_from(text.vocab_size()).unwrap_or(u32::MAX);
    (0..ids).map(|id| text.token_bytes(TokenId(id)).len()).max().unwrap_or(1)
}
