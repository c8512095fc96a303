//! Health and metrics of the operator; every replica of it serves them, whoever leads.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;

use crate::metrics::Metrics;

/// Serves until the process ends.
pub async fn serve(listener: TcpListener, metrics: Metrics) {
    let router = Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(|| async { "ok" }))
        .route("/metrics", get(exposition))
        .with_state(metrics);
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "the admin port is closed");
    }
}

async fn exposition(State(metrics): State<Metrics>) -> Result<String, StatusCode> {
    metrics.exposition().map_err(|error| {
        tracing::error!(%error, "cannot write the metrics");
        StatusCode::INTERNAL_SERVER_ERROR
    })
}
