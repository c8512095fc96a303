//! From a checked body to requests inside the engine.

use std::sync::Arc;

use super::error::ApiError;
use super::gather::{Gather, RequestView};
use super::generation::Generation;
use super::state::{ApiState, Loaded};
use crate::model::text::{AddSpecial, Text};
use crate::request::{Request, TokenId};

/// Texts with more bytes than this are tokenized on a thread of their own, so that no other client waits for them.
const INLINE_BYTES: usize = 4096;

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
    let encode = move || tokenizer.encode(&text, special);
    let tokens = if least * loaded.longest_token < INLINE_BYTES {
        encode()
    } else {
        tokio::task::spawn_blocking(encode).await.map_err(|_| ApiError::EngineStopped)?
    };
    Ok(tokens?)
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
    let reject = |error: ApiError| {
        if let ApiError::Overloaded { limit, .. } = &error {
            state.metrics.rejected(limit);
        }
        error
    };
    let tokens = requests.iter().map(|request| request.prompt.len()).sum();
    loaded.handle.check_room(requests.len(), tokens).map_err(|refused| reject(refused.into()))?;
    let one = |request: Request| {
        state.metrics.request_params(generation.n_returned(), request.max_tokens.get());
        let view = RequestView::of(&request);
        let submitted = loaded.handle.submit(request).map_err(|refused| reject(refused.into()))?;
        Ok(Gather::new(submitted, &view, generation, &loaded.text, &state.metrics))
    };
    // An error drops those that were submitted, which cancels them.
    requests.into_iter().map(one).collect()
}

/// Bytes of the longest token of a vocabulary: what bounds the tokens of a text from below.
pub fn longest_token(text: &Text) -> usize {
    let ids = u32::try_from(text.vocab_size()).unwrap_or(u32::MAX);
    (0..ids).map(|id| text.token_bytes(TokenId(id)).len()).max().unwrap_or(1)
}
