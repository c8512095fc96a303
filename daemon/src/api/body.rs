//! A request's body, read within its limits of size and of time.
//!
//! Bodies that are read at the same time share room for the bytes of one of the largest: many large ones wait for each
//! other and take no more memory than one. Small ones do not wait, and with all connections are no more than that.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use tokio::sync::OwnedSemaphorePermit;

use super::error::ApiError;
use super::state::{ApiLimits, ApiState};

/// A body up to this size needs no room.
const SMALL: usize = 16 << 10;

/// The bytes of a body. One that is too long, too slow or cut off is refused.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) bytes: Bytes,
    /// To be held while the bytes and what is read from them are there.
    pub(crate) room: Option<OwnedSemaphorePermit>,
}

impl FromRequest<Arc<ApiState>> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<ApiState>) -> Result<Self, ApiError> {
        let limits = &state.limits;
        let room = room_for(size_of(&request, limits), state).await?;
        let read = tokio::time::timeout(limits.body_timeout, Bytes::from_request(request, state));
        match read.await {
            Ok(Ok(bytes)) => Ok(Self { bytes, room }),
            Ok(Err(rejection)) => Err(refusal(rejection, limits)),
            Err(_) => Err(ApiError::SlowBody { limit: limits.body_timeout }),
        }
    }
}

/// What a body says that it will take, within the limit; all that it may where it does not say.
fn size_of(request: &Request, limits: &ApiLimits) -> usize {
    let length = request.headers().get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
    length.unwrap_or(limits.body_bytes).min(limits.body_bytes)
}

/// Waits for room, for as long as a body may take.
async fn room_for(
    bytes: usize,
    state: &ApiState,
) -> Result<Option<OwnedSemaphorePermit>, ApiError> {
    if bytes <= SMALL {
        return Ok(None);
    }
    let room =
        Arc::clone(&state.bodies).acquire_many_owned(u32::try_from(bytes).unwrap_or(u32::MAX));
    match tokio::time::timeout(state.limits.body_timeout, room).await {
        Ok(room) => Ok(room.ok()),
        Err(_) => Err(ApiError::Overloaded {
            message: "too many large bodies come at once".to_owned(),
            limit: "max_body_bytes",
            retry_after: state.limits.body_timeout,
        }),
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
        Body::from_request(Request::new(body), &state()).await.map(|body| body.bytes)
    }

    #[tokio::test]
    async fn large_bodies_wait_for_room_and_small_ones_do_not() {
        let state = state();
        let send = |bytes: usize| {
            let body = Request::builder().header(header::CONTENT_LENGTH, bytes);
            Body::from_request(body.body("{}".into()).unwrap(), &state)
        };
        let first = send(1 << 20).await.unwrap();
        assert!(first.room.is_some());
        let refused = send(SMALL + 1).await.unwrap_err();
        assert!(
            matches!(refused, ApiError::Overloaded { limit: "max_body_bytes", .. }),
            "{refused}"
        );
        assert!(send(SMALL).await.unwrap().room.is_none());
        drop(first);
        assert!(send(SMALL + 1).await.unwrap().room.is_some());
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
