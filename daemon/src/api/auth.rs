//! Who may ask, and the id by which a request is known to its client.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use super::state::ApiState;

/// The key that a client showed, which also separates its prefix cache.
#[derive(Debug, Clone)]
pub(crate) struct ShownKey(pub(crate) Option<Arc<str>>);

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const LONGEST_REQUEST_ID: usize = 128;

/// Lets requests with a key pass, or all where no key is wanted.
pub(crate) async fn check_key(
    State(state): State<Arc<ApiState>>,
    mut request: Request,
    next: Next,
) -> Response {
    let shown = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let shown = shown.and_then(|value| value.split_once(' '));
    let shown: Option<Arc<str>> = shown
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, key)| key.trim().into());
    if !state.admits(shown.as_deref()) {
        return ApiError::Unauthorized.into_response();
    }
    request.extensions_mut().insert(ShownKey(shown));
    next.run(request).await
}

/// Echoes `X-Request-Id`, or makes one up.
pub(crate) async fn name_request(request: Request, next: Next) -> Response {
    let given =
        request.headers().get(&REQUEST_ID).filter(|id| id.len() <= LONGEST_REQUEST_ID).cloned();
    let id = given.or_else(|| {
        let id = format!("req-{:016x}", getrandom::u64().unwrap_or_default());
        HeaderValue::from_str(&id).ok()
    });
    let mut response = next.run(request).await;
    if let Some(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}
