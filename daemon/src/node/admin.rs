//! The agent's own port: is it alive, is it ready, who holds which memory.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use prometheus::{Encoder, IntGaugeVec, Opts, Registry, TextEncoder};
use tokio::net::TcpListener;

use super::agent::{Agent, Phase};

/// Serves until the agent ends.
pub async fn serve(listener: TcpListener, agent: Arc<Agent>) {
    let router = Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(agent);
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "the admin port is closed");
    }
}

async fn readyz(State(agent): State<Arc<Agent>>) -> (StatusCode, &'static str) {
    match *agent.phase.borrow() {
        Phase::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        Phase::Serving if agent.has_returned() => (StatusCode::OK, "ok"),
        Phase::Serving => (StatusCode::SERVICE_UNAVAILABLE, "engines of before are not back yet"),
    }
}

async fn metrics(State(agent): State<Arc<Agent>>) -> Result<String, StatusCode> {
    exposition(&agent).map_err(|error| {
        tracing::error!(%error, "cannot write the metrics");
        StatusCode::INTERNAL_SERVER_ERROR
    })
}

/// Every figure is read from the ledger when it is asked for: there is nothing to keep up to date.
fn exposition(agent: &Agent) -> prometheus::Result<String> {
    let registry = Registry::new();
    let memory = IntGaugeVec::new(
        Opts::new(
            "bindery_node_memory_bytes",
            "Memory of each device: all of it, granted, used by engines, and neither.",
        ),
        &["device", "kind"],
    )?;
    registry.register(Box::new(memory.clone()))?;
    for usage in agent.read(super::ledger::Ledger::usage) {
        for (kind, gib) in [
            ("capacity", usage.capacity_gib),
            ("granted", usage.granted_gib),
            ("used", usage.used_gib),
            ("free", usage.free_gib),
        ] {
            memory.with_label_values(&[usage.device.as_str(), kind]).set(i64::from(gib) << 30);
        }
    }
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
}
