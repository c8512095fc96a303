//! Holds the claim: connects, claims, listens, and does it again when the agent comes back.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use crds::{Reason, ReplicaState};
use futures_util::{SinkExt, StreamExt};
use tokio::net::UnixStream;
use tokio_util::codec::{Framed, LinesCodec};

use super::{Phase, Shared};
use crate::claim::{AgentLine, Claim, LONGEST_LINE, ReplicaLine};

/// Between two tries, the first and the longest.
const RETRY: Duration = Duration::from_millis(200);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// In the grant's folder.
const CLAIM_SOCKET: &str = "claim.sock";

/// Why a connection to the agent ended.
enum Ended {
    /// It is tried again.
    Lost(String),
    Failed(ReplicaState),
}

/// Claims until the claim fails for good, which is the answer.
pub(super) async fn hold(claim: Claim, grant: &Path, status: &Shared) -> ReplicaState {
    let mut retry = RETRY;
    loop {
        let ended = connect(&claim, grant, status, &mut retry).await;
        status.send_modify(|status| {
            status.engine = None;
            status.in_flight = 0;
        });
        match ended {
            Ended::Failed(state) => return state,
            Ended::Lost(why) => {
                let message = format!("waiting for the node agent: {why}");
                tell(status, Reason::Waiting, message);
            }
        }
        if status.borrow().phase != Phase::Serving {
            // Nothing will come back in time.
            return ReplicaState::new(Reason::Waiting, "the node agent went away during the drain");
        }
        tokio::time::sleep(retry).await;
        retry = (retry * 2).min(LONGEST_RETRY);
    }
}

fn tell(status: &Shared, reason: Reason, message: String) {
    let state = ReplicaState::new(reason, message);
    status.send_if_modified(|status| {
        let changed = status.state != state;
        if status.state.reason != state.reason {
            tracing::info!(reason = %state.reason, message = state.message, "state");
        }
        if changed {
            status.state = state;
        }
        changed
    });
}

async fn connect(claim: &Claim, grant: &Path, status: &Shared, retry: &mut Duration) -> Ended {
    let path = grant.join(CLAIM_SOCKET);
    let stream = match UnixStream::connect(&path).await {
        Ok(stream) => stream,
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            return Ended::Lost(format!("{}: {error}", path.display()));
        }
        Err(error) => return Ended::Lost(format!("connect to {}: {error}", path.display())),
    };
    let mut lines = Framed::new(stream, LinesCodec::new_with_max_length(LONGEST_LINE));
    if let Err(lost) = say(&mut lines, &ReplicaLine::Claim(Box::new(claim.clone()))).await {
        return lost;
    }
    let mut watched = status.subscribe();
    let mut told_drain = false;
    loop {
        let line = tokio::select! {
            line = lines.next() => line,
            // The guard of the answer must not live across an await.
            true = async { watched.wait_for(|status| status.phase != Phase::Serving).await.is_ok() },
                if !told_drain =>
            {
                told_drain = true;
                if let Err(lost) = say(&mut lines, &ReplicaLine::Drain {}).await {
                    return lost;
                }
                continue;
            }
        };
        let line = match line {
            Some(Ok(line)) => line,
            Some(Err(error)) => return Ended::Lost(error.to_string()),
            None => return Ended::Lost("the agent closed the claim".into()),
        };
        match serde_json::from_str(&line) {
            Ok(line) => {
                *retry = RETRY;
                if let Some(failed) = hear(line, grant, status) {
                    return Ended::Failed(failed);
                }
            }
            // A newer agent may say what this replica does not know.
            Err(error) => tracing::debug!(%error, "a line of the agent was passed over"),
        }
    }
}

async fn say(lines: &mut Framed<UnixStream, LinesCodec>, line: &ReplicaLine) -> Result<(), Ended> {
    let lost = |error: String| Ended::Lost(format!("tell the agent: {error}"));
    let text = serde_json::to_string(line).map_err(|error| lost(error.to_string()))?;
    lines.send(text).await.map_err(|error| lost(error.to_string()))
}

/// Takes a line to heart; the answer is a failure that does not pass.
fn hear(line: AgentLine, grant: &Path, status: &Shared) -> Option<ReplicaState> {
    match line {
        AgentLine::Waiting { reason, message } => tell(status, reason, message),
        AgentLine::Downloading { bytes, total_bytes } => {
            tell(status, Reason::Downloading, of("downloaded", bytes, total_bytes));
        }
        AgentLine::Loading { bytes, total_bytes } => {
            tell(status, Reason::Loading, of("loaded", bytes, total_bytes));
        }
        AgentLine::Ready { socket } => {
            let engine = grant.join(socket);
            status.send_modify(|status| status.engine = Some(engine));
            tell(status, Reason::AllReplicasReady, "the engine answers".into());
        }
        AgentLine::InFlight { requests } => {
            status.send_modify(|status| status.in_flight = requests);
        }
        AgentLine::Log { line } => eprintln!("{line}"),
        AgentLine::Draining {} => {
            tell(
                status,
                Reason::Waiting,
                "the node agent is ending; running requests finish".into(),
            );
        }
        AgentLine::Failed { reason, message } => {
            let state = ReplicaState::new(reason, message);
            if reason.is_terminal() {
                return Some(state);
            }
            tell(status, state.reason, state.message);
        }
    }
    None
}

fn of(verb: &str, bytes: u64, total_bytes: u64) -> String {
    let mib = |bytes: u64| bytes >> 20;
    format!("{verb} {} of {} MiB", mib(bytes), mib(total_bytes))
}
