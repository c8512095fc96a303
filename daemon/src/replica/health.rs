//! The replica's health port: liveness, readiness, the claim's state, and the engine's own metrics.

use std::path::Path;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use crds::{Reason, ReplicaState};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, UnixStream};

use super::Shared;

/// Serves until the replica ends.
pub(super) async fn serve(listener: TcpListener, status: Shared) {
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/state", get(state))
        .route("/metrics", get(metrics))
        .with_state(status);
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "the health port is closed");
    }
}

/// While an engine is attached its health is the replica's; without one the replica waits, which is healthy.
async fn healthz(State(status): State<Shared>) -> Response {
    let engine = status.borrow().engine.clone();
    match engine {
        Some(engine) => ask(&engine, "/healthz").await,
        None => "ok".into_response(),
    }
}

async fn readyz(State(status): State<Shared>) -> (StatusCode, Json<ReplicaState>) {
    let state = status.borrow().state.clone();
    match state.reason {
        Reason::AllReplicasReady => (StatusCode::OK, Json(state)),
        _ => (StatusCode::SERVICE_UNAVAILABLE, Json(state)),
    }
}

async fn state(State(status): State<Shared>) -> Json<ReplicaState> {
    Json(status.borrow().state.clone())
}

async fn metrics(State(status): State<Shared>) -> Response {
    let engine = status.borrow().engine.clone();
    match engine {
        Some(engine) => ask(&engine, "/metrics").await,
        // Prometheus calls it up and without a series, which it is.
        None => "".into_response(),
    }
}

/// The engine's answer, passed on as it comes.
async fn ask(engine: &Path, path: &str) -> Response {
    match get_from(engine, path).await {
        Ok(answer) => answer,
        Err(error) => (StatusCode::BAD_GATEWAY, format!("the engine: {error}")).into_response(),
    }
}

async fn get_from(engine: &Path, path: &str) -> Result<Response, anyhow::Error> {
    let stream = UnixStream::connect(engine).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::get(path).header("host", "engine").body(Body::empty())?;
    Ok(sender.send_request(request).await?.map(Body::new))
}
