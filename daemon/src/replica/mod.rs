//! The process of a replica Pod: claims an engine, forwards bytes to it, says how it is, drains.
//! What passes it waits for; for what does not it ends with one line of JSON as its termination message.

mod claiming;
mod forward;
mod health;
mod splice;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use crds::{Reason, ReplicaState};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::claim::Claim;
use crate::config::LogConfig;

/// kube-proxies may send new connections for a moment after a Pod began to end.
const ACCEPT_AT_LEAST: Duration = Duration::from_secs(5);
/// The listener stays until no connection came for this long.
const QUIET: Duration = Duration::from_secs(2);
/// How often a draining replica looks at its figures.
const LOOK: Duration = Duration::from_millis(50);

/// Everything `bindery replica` needs to know, checked.
#[derive(Debug, Clone)]
pub struct ReplicaConfig {
    pub claim: Claim,
    /// The grant's folder.
    pub grant: PathBuf,
    pub host: IpAddr,
    pub port: u16,
    pub health_port: u16,
    pub drain: Duration,
    pub termination_log: PathBuf,
    pub log: LogConfig,
}

/// How the replica is, seen by its parts.
#[derive(Debug, Clone)]
struct Status {
    state: ReplicaState,
    /// The engine's socket while it answers.
    engine: Option<PathBuf>,
    in_flight: u64,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    /// The Pod ends: still accepting.
    Draining,
    /// The listener is closed.
    Closing,
}

type Shared = Arc<watch::Sender<Status>>;

/// Runs the replica until a signal or a failure that does not pass.
///
/// # Errors
/// When it cannot start.
pub fn run(config: ReplicaConfig) -> Result<ExitCode> {
    crate::serve::start_log(&config.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the replica's threads")?;
    let done = runtime.block_on(live(config));
    runtime.shutdown_background();
    done
}

async fn live(config: ReplicaConfig) -> Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let state = ReplicaState::new(Reason::Waiting, "waiting for the node agent");
    let status = Status { state, engine: None, in_flight: 0, phase: Phase::Serving };
    let status: Shared = Arc::new(watch::Sender::new(status));
    let listen = |port| async move {
        let listener = TcpListener::bind((config.host, port)).await;
        listener.with_context(|| format!("listen on {}:{port}", config.host))
    };
    let health = listen(config.health_port).await?;
    let traffic = listen(config.port).await?;
    tokio::spawn(health::serve(health, Arc::clone(&status)));
    let connections = forward::Connections::default();
    tokio::spawn(forward::serve(traffic, Arc::clone(&status), connections.clone()));
    let claiming = claiming::hold(config.claim, &config.grant, &status);
    tokio::pin!(claiming);
    let failed = tokio::select! {
        failed = &mut claiming => Some(failed),
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
    };
    if let Some(failed) = failed {
        return Ok(end(&config.termination_log, &failed));
    }
    tokio::select! {
        () = drain(&status, &connections, config.drain) => {}
        // The engine is gone, and with it everything that could be waited for.
        _ = &mut claiming => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Says why a replica cannot even claim.
pub(crate) fn refuse(termination_log: &Path, error: &dyn std::error::Error) {
    let failed = ReplicaState::new(crds::Reason::InvalidSpec, error.to_string());
    // The process ends with a failure either way.
    let _ = end(termination_log, &failed);
}

/// Writes the termination message.
fn end(path: &Path, failed: &ReplicaState) -> ExitCode {
    tracing::error!(reason = %failed.reason, message = failed.message, "the claim has failed");
    let line = serde_json::to_string(failed).unwrap_or_default();
    if let Err(error) = std::fs::write(path, line) {
        tracing::error!(%error, path = %path.display(), "cannot write the termination message");
    }
    ExitCode::FAILURE
}

/// Ends without a dropped stream: the engine is told by the claim; the listener stays while connections may still come.
async fn drain(status: &Shared, connections: &forward::Connections, most: Duration) {
    tracing::info!("draining");
    let start = Instant::now();
    status.send_modify(|status| status.phase = Phase::Draining);
    let quiet = || connections.newest().is_none_or(|newest| newest.elapsed() >= QUIET);
    while start.elapsed() < ACCEPT_AT_LEAST.min(most) || (!quiet() && start.elapsed() < most) {
        tokio::time::sleep(LOOK).await;
    }
    status.send_modify(|status| status.phase = Phase::Closing);
    while (status.borrow().in_flight > 0 || connections.open() > 0) && start.elapsed() < most {
        tokio::time::sleep(LOOK).await;
    }
    let broken_off = connections.open();
    if broken_off > 0 {
        tracing::warn!(
            broken_off,
            "connections are broken off: they took longer than the drain may"
        );
    }
    tracing::info!(seconds = start.elapsed().as_secs_f64(), "drained");
}
