//! A request's body, read within its limits of size and of time.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::response::IntoResponse;

use super::error::ApiError;
use super::state::{ApiLimits, ApiState};

/// The bytes of a body. One that is too long, too slow or cut off is refused.
#[derive(Debug)]
pub(crate) struct Body(pub(crate) Bytes);

impl FromRequest<Arc<ApiState>> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<ApiState>) -> Result<Self, ApiError> {
        let limits = &state.limits;
        let read = tokio::time::timeout(limits.body_timeout, Bytes::from_request(request, state));
        match read.await {
            Ok(Ok(bytes)) => Ok(Self(bytes)),
            Ok(Err(rejection)) => Err(refusal(rejection, limits)),
            Err(_) => Err(ApiError::SlowBody { limit: limits.body_timeout }),
        }
    }
}

fn refusal(rejection: BytesRejection, limits: &ApiLimits) -> ApiError {
    if rejection.into_response().status() == StatusCode::PAYLOAD_TOO_LARGE {
        ApiError::BodyTooLarge { limit: limits.body_bytes }
    } else {
        ApiError::BrokenBody
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::time::Duration;

    use futures_util::stream;

    use super::*;
    use crate::api::state::CacheScope;
    use crate::metrics::Metrics;

    fn state() -> Arc<ApiState> {
        let limits = ApiLimits {
            body_timeout: Duration::from_millis(50),
            ..ApiLimits::with_body_bytes(1 << 20)
        };
        let metrics = Arc::new(Metrics::new("tiny").unwrap());
        Arc::new(ApiState::new(vec![], vec![], limits, CacheScope::Key, metrics))
    }

    async fn read(body: axum::body::Body) -> Result<Bytes, ApiError> {
        Body::from_request(Request::new(body), &state()).await.map(|body| body.0)
    }

    #[tokio::test]
    async fn a_body_that_never_ends_is_refused_in_time() {
        let first = stream::iter([Ok::<_, io::Error>("{\"prompt\":")]);
        let stalled = futures_util::StreamExt::chain(first, stream::pending());
        let refused = read(axum::body::Body::from_stream(stalled)).await;
        assert_eq!(refused, Err(ApiError::SlowBody { limit: Duration::from_millis(50) }));
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_the_clients_fault() {
        let broken = stream::iter([Ok("{"), Err(io::Error::from(io::ErrorKind::ConnectionReset))]);
        let refused = read(axum::body::Body::from_stream(broken)).await;
        assert_eq!(refused, Err(ApiError::BrokenBody));
        assert_eq!(read("{}".into()).await, Ok(Bytes::from_static(b"{}")));
    }
}
