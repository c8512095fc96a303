//! From a checked body to requests inside the engine.

use std::sync::Arc;

use super::error::ApiError;
use super::gather::{Gather, RequestView};
use super::generation::{Delivery, Generation};
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
    off_thread(loaded, encode).await
}

/// Runs work on one of few threads, where it holds up no connection. A panic in it is the input's failure.
///
/// # Errors
/// Those of `work`.
pub(crate) async fn off_thread<T: Send + 'static>(
    loaded: &Loaded,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let place = Arc::clone(&loaded.readers).acquire_owned().await;
    let work = move || {
        let _place = place;
        work()
    };
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
    check_answer(state, generation, &requests)?;
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

/// Refuses answers that would hold too many log-probabilities at once.
fn check_answer(
    state: &ApiState,
    generation: &Generation,
    requests: &[Request],
) -> Result<(), ApiError> {
    let (Delivery::Whole, Some(top)) = (generation.delivery, generation.params.logprobs) else {
        return Ok(());
    };
    let of_request =
        |request: &Request| u64::from(request.width().get()) * u64::from(request.max_tokens.get());
    let entries = requests.iter().map(of_request).sum::<u64>() * (u64::from(top) + 1);
    let most = state.limits.whole_logprobs;
    if entries > most {
        let message = format!(
            "the answer could hold {entries} of them, wanted at most {most}: ask for fewer tokens, or stream"
        );
        return Err(ApiError::invalid("logprobs", message));
    }
    Ok(())
}

/// Bytes of the longest token of a vocabulary: what bounds the tokens of a text from below.
pub fn longest_token(text: &Text) -> usize {
    let ids = u32::try_from(text.vocab_size()).unwrap_or(u32::MAX);
    (0..ids).map(|id| text.token_bytes(TokenId(id)).len()).max().unwrap_or(1)
}
