//! The HTTP API: the only room that knows JSON and status codes.

mod admin;
pub mod ask;
mod auth;
mod body;
pub(crate) mod chat;
pub(crate) mod completions;
pub mod error;
mod fields;
mod gather;
mod generation;
mod prompt;
mod respond;
pub mod server;
mod shape;
pub mod state;
mod stream;

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};

use error::ApiError;
use state::ApiState;

/// Every route.
pub fn router(state: Arc<ApiState>) -> Router {
    let guarded = Router::new()
        .route("/v1/completions", post(completions::complete))
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/models", get(admin::models))
        .route("/v1/models/{*name}", get(admin::model))
        .route("/tokenize", post(admin::tokenize))
        .route("/detokenize", post(admin::detokenize))
        .route("/version", get(admin::version))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(state.limits.body_bytes))
        .layer(middleware::from_fn_with_state(Arc::clone(&state), auth::check_key))
        .layer(middleware::from_fn_with_state(Arc::clone(&state), count));
    Router::new()
        .route("/health", get(admin::health))
        .route("/healthz", get(admin::healthz))
        .route("/readyz", get(admin::readyz))
        .route("/metrics", get(admin::metrics))
        .method_not_allowed_fallback(method_not_allowed)
        .merge(guarded)
        .layer(middleware::from_fn(auth::name_request))
        .with_state(state)
}

async fn not_found(request: Request) -> ApiError {
    let path = request.uri().path().chars().take(200).collect();
    ApiError::NotFound { method: request.method().to_string(), path }
}

async fn method_not_allowed(request: Request) -> ApiError {
    let path = request.uri().path().chars().take(200).collect();
    ApiError::MethodNotAllowed { method: request.method().to_string(), path }
}

/// Counts answers by route, method and class of status.
async fn count(State(state): State<Arc<ApiState>>, request: Request, next: Next) -> Response {
    state.metrics.request_begun();
    let started = Instant::now();
    let method = request.method().clone();
    let path = request
        .extensions()
        .get::<MatchedPath>()
        .map_or("none".to_owned(), |path| path.as_str().to_owned());
    let response = next.run(request).await;
    state.metrics.http(method.as_str(), response.status().as_u16(), &path, started.elapsed());
    response
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use tower::ServiceExt;

    use super::*;
    use crate::metrics::Metrics;
    use state::CacheScope;

    #[tokio::test]
    async fn what_clients_ask_counts_as_begun_and_what_watchers_ask_does_not() {
        let metrics = Arc::new(Metrics::new("tiny").unwrap());
        let limits = state::ApiLimits::with_body_bytes(1 << 20);
        let state =
            Arc::new(ApiState::new(vec![], vec![], limits, CacheScope::Key, Arc::clone(&metrics)));
        let app = router(state);
        for path in ["/metrics", "/healthz", "/readyz", "/health", "/v1/models", "/nothing"] {
            let request = Request::get(path).body(Body::empty()).unwrap();
            app.clone().oneshot(request).await.unwrap();
        }
        assert_eq!(metrics.begun_requests(), 2);
    }
}
