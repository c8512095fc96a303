//! An engine under a node agent: confined, told what to do on stdin, telling how it is on stdout.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::{mpsc, watch};

use crate::api::server::Phase;
use crate::api::state::ApiState;
use crate::config::{Listen, ServeConfig};
use crate::confine::{self, Files, Missing};
use crate::engine::handle::Handle;
use crate::metrics::Metrics;
use crate::model::ModelError;
use crate::plan::PlanError;
use crate::source::Location;
use crate::source::hf::HubError;
use crate::supervise::{self, Command, Event, FailureReason, Reporter, Writer};

/// How often the figures that the agent follows are looked at.
const LOOK: Duration = Duration::from_millis(200);

/// The agent's two ends.
pub(super) struct Agent {
    commands: mpsc::Receiver<Command>,
    reporter: Reporter,
    writer: Writer,
    phase: Option<watch::Sender<Phase>>,
}

impl Agent {
    /// Confines the process and opens both ends. Before any other thread exists.
    pub(super) fn start(config: &ServeConfig) -> Result<Self> {
        say(confine::end_with_parent());
        say(confine::raise_oom_score());
        match &config.model {
            Location::Path(path) => say(confine::confine_files(&files(config, path)?)?),
            Location::Hub(_) => {
                tracing::error!(
                    "the model is downloaded by this process: its files are not confined"
                );
            }
        }
        let commands =
            supervise::read_commands(std::io::stdin()).context("read the agent's commands")?;
        let (reporter, writer) =
            supervise::write_events(std::io::stdout()).context("write events for the agent")?;
        Ok(Self { commands, reporter, writer, phase: None })
    }

    pub(super) fn reporter(&self) -> Reporter {
        self.reporter.clone()
    }

    /// Says that the model can answer, and from now on how many requests there are and were begun.
    pub(super) fn ready(
        &mut self,
        handle: &Handle,
        metrics: &Arc<Metrics>,
        phase: &watch::Sender<Phase>,
    ) {
        self.phase = Some(phase.clone());
        self.reporter.report(Event::Ready {});
        let (reporter, handle, metrics) =
            (self.reporter.clone(), handle.clone(), Arc::clone(metrics));
        tokio::spawn(async move {
            let mut told = (0, 0);
            loop {
                tokio::time::sleep(LOOK).await;
                let now = (handle.in_flight() as u64, metrics.begun_requests());
                if now.0 != told.0 {
                    reporter.report(Event::InFlight { requests: now.0 });
                }
                if now.1 != told.1 {
                    reporter.report(Event::Begun { requests: now.1 });
                }
                told = now;
            }
        });
    }

    /// Says why the engine ends.
    pub(super) fn failed(&self, error: &anyhow::Error) {
        self.reporter
            .report(Event::Failed { reason: reason_of(error), message: format!("{error:#}") });
    }

    /// Writes what is still to be said.
    pub(super) fn finish(self) {
        self.writer.finish();
    }
}

/// Obeys the agent until it closes stdin; without an agent for ever.
pub(super) async fn gone(agent: &mut Option<Agent>, state: &ApiState) {
    let Some(agent) = agent else { return std::future::pending().await };
    while let Some(command) = agent.commands.recv().await {
        match command {
            Command::ApiKeys(keys) => {
                state.set_keys(keys.iter().map(|key| key.expose().to_owned()).collect())
            }
            Command::Drain => {
                if let Some(phase) = &agent.phase {
                    phase.send_replace(Phase::Draining);
                }
            }
        }
    }
}

/// Lets every user connect who sees the socket: the grant's folder is what keeps others away.
pub(super) fn open_socket(listen: &Listen) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    match listen {
        Listen::Tcp { .. } => Ok(()),
        Listen::Unix(path) => {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))
                .with_context(|| format!("open {} to every user", path.display()))
        }
    }
}

/// No socket but the one that is bound.
pub(super) fn deny_sockets() {
    say(confine::deny_sockets());
}

fn say(missing: Option<Missing>) {
    if let Some(missing) = missing {
        tracing::error!(%missing, "a protection is missing");
    }
}

fn files(config: &ServeConfig, model: &Path) -> Result<Files> {
    let mut read = confine::paths_of(model).with_context(|| format!("find {}", model.display()))?;
    // Memory figures, for the plan and the metrics.
    read.extend(
        ["/proc", "/sys/fs/cgroup"].map(PathBuf::from).into_iter().filter(|path| path.exists()),
    );
    let write = match &config.listen {
        Listen::Tcp { .. } => Vec::new(),
        Listen::Unix(socket) => socket.parent().map(PathBuf::from).into_iter().collect(),
    };
    Ok(Files { read, write })
}

fn reason_of(error: &anyhow::Error) -> FailureReason {
    if let Some(error) = error.downcast_ref::<PlanError>() {
        return match error {
            PlanError::TooLong { .. } | PlanError::Overflow(_) => {
                FailureReason::InvalidConfiguration
            }
            PlanError::NoRoomForWeights { .. }
            | PlanError::SequenceDoesNotFit { .. }
            | PlanError::LargerThanMachine { .. } => FailureReason::MemoryGrantTooSmall,
        };
    }
    if error.downcast_ref::<ModelError>().is_some() {
        return FailureReason::UnsupportedModel;
    }
    match error.downcast_ref::<HubError>() {
        Some(HubError::TokenRefused { .. } | HubError::TokenMissing { .. }) => {
            FailureReason::Unauthorized
        }
        Some(HubError::WrongChecksum { .. }) => FailureReason::ChecksumMismatch,
        Some(_) | None => FailureReason::EngineCrashed,
    }
}
