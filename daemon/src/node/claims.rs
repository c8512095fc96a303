//! The socket of a grant: takes a claim, runs its engine, tells the replica. Whatever a client sends harms its own grant alone.

use std::collections::VecDeque;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::codec::{Framed, LinesCodec};

use super::agent::{Agent, Listeners, LocalClients, Phase, Running};
use super::engine::{Engine, FromEngine};
use super::gpus;
use super::grants::{ENGINE_FOLDER, ENGINE_SOCKET};
use super::ledger::{CannotStart, GrantId};
use super::weights::Fetched;
use crate::claim::{AgentLine, Claim, LONGEST_LINE, ReplicaLine};
use crate::config::ApiKey;
use crate::source::Downloaded;
use crate::supervise::{self, Event};

/// Connections that a grant's socket serves at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 4;
/// A client that has not claimed by then is cut off.
const FIRST_LINE: Duration = Duration::from_secs(10);
/// A client that takes no line for this long is gone.
const SLOW: Duration = Duration::from_secs(10);
/// How often what may not start yet is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// How often a source that is away is tried again.
const SOURCE_RETRY: Duration = Duration::from_secs(5);
/// How often an engine's memory is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Lines of an engine's log that explain its end.
const LAST_WORDS: usize = 8;
/// A client's connection ends after so many requests, or with the first answer after so long.
const KEEPALIVE_REQUESTS: &str = "1000";
const KEEPALIVE_SECONDS: &str = "300";
/// While the agent drains, an engine is kept for this long at least: endpoints follow with a delay.
const DRAIN_AT_LEAST: Duration = Duration::from_secs(5);
/// And until no request came for this long.
const QUIET: Duration = Duration::from_secs(2);

/// Serves every grant's socket until the agent ends.
pub async fn serve(agent: Arc<Agent>, mut listeners: Listeners) {
    let mut sockets = JoinSet::new();
    loop {
        tokio::select! {
            listener = listeners.recv() => match listener {
                Some((id, listener)) => drop(sockets.spawn(accept(Arc::clone(&agent), id, listener))),
                None => return,
            },
            // What has ended needs no more than its place back.
            Some(_) = sockets.join_next() => {}
        }
    }
}

/// Accepts until the grant ends.
async fn accept(agent: Arc<Agent>, id: GrantId, listener: UnixListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut changed = agent.watch();
    // Ends every connection with the grant.
    let mut clients = JoinSet::new();
    while agent.holds(&id) {
        let accepted = tokio::select! {
            accepted = async {
                let place = Arc::clone(&places).acquire_owned().await;
                (place, listener.accept().await)
            } => accepted,
            _ = changed.changed() => continue,
            Some(_) = clients.join_next() => continue,
        };
        match accepted {
            (Ok(place), Ok((stream, _))) => {
                let (agent, id) = (Arc::clone(&agent), id.clone());
                clients.spawn(async move {
                    client(agent, id, stream).await;
                    drop(place);
                });
            }
            (_, Err(error)) => {
                tracing::warn!(%id, %error, "cannot accept a client");
                tokio::time::sleep(RETRY).await;
            }
            (Err(_), Ok(_)) => return,
        }
    }
    // Engines end in order before their tasks do: a task that is aborted would leave its engine to the closing of stdin.
    while clients.join_next().await.is_some() {}
}

type Lines = Framed<UnixStream, LinesCodec>;

/// A claim that came to its end.
enum Over {
    /// The replica went away.
    Left,
    Failed {
        reason: crds::Reason,
        message: String,
    },
}

async fn client(agent: Arc<Agent>, id: GrantId, stream: UnixStream) {
    // Pods are in another pid namespace, so theirs reads 0; an engine's or another process's of this one does not.
    let pid = stream.peer_cred().ok().and_then(|credentials| credentials.pid());
    if agent.local_clients == LocalClients::Refused && pid != Some(0) {
        tracing::error!(%id, ?pid, "a process that is no replica asks for a grant");
        return;
    }
    let mut lines = Framed::new(stream, LinesCodec::new_with_max_length(LONGEST_LINE));
    let over = match first_line(&mut lines).await {
        Ok(claim) => serve_claim(&agent, &id, &claim, &mut lines).await,
        Err(over) => over,
    };
    if let Over::Failed { reason, message } = over {
        agent.settled(&id);
        tracing::warn!(%id, %reason, message, "a claim has failed");
        // Who has gone does not need to know.
        drop(say(&mut lines, AgentLine::Failed { reason, message }).await);
    }
}

/// Reads the claim.
async fn first_line(lines: &mut Lines) -> Result<Claim, Over> {
    let line = tokio::time::timeout(FIRST_LINE, lines.next()).await;
    let invalid = |message: String| Over::Failed { reason: crds::Reason::InvalidSpec, message };
    let line = match line {
        Ok(Some(Ok(line))) => line,
        Ok(None) => return Err(Over::Left),
        Ok(Some(Err(error))) => return Err(invalid(format!("read the claim: {error}"))),
        Err(_) => return Err(invalid(format!("no claim within {FIRST_LINE:?}"))),
    };
    // The error is not passed on as it is: it could repeat a secret.
    let claim = match serde_json::from_str(&line) {
        Ok(ReplicaLine::Claim(claim)) => *claim,
        Ok(ReplicaLine::Drain {}) => return Err(Over::Left),
        Err(error) => {
            let at = (error.line(), error.column());
            return Err(invalid(format!("wanted a claim, got something else at {at:?}")));
        }
    };
    claim.check().map_err(|error| invalid(error.to_string()))?;
    Ok(claim)
}

/// Writes a line; a client that does not take it in time is gone.
async fn say(lines: &mut Lines, line: AgentLine) -> Result<(), Over> {
    let text = serde_json::to_string(&line).map_err(|_| Over::Left)?;
    match tokio::time::timeout(SLOW, lines.send(text)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(Over::Left),
    }
}

/// Waits for `time`, or until the replica goes.
async fn pause(lines: &mut Lines, time: Duration) -> Result<(), Over> {
    let until = tokio::time::Instant::now() + time;
    loop {
        match tokio::time::timeout_at(until, lines.next()).await {
            Err(_) => return Ok(()),
            // A drain before there is an engine: nothing runs, and the replica goes by itself.
            Ok(Some(Ok(_))) => {}
            Ok(None | Some(Err(_))) => return Err(Over::Left),
        }
    }
}

async fn serve_claim(agent: &Arc<Agent>, id: &GrantId, claim: &Claim, lines: &mut Lines) -> Over {
    let done = async {
        let _claiming = loop {
            if *agent.phase.borrow() == Phase::Serving
                && let Some(claiming) = agent.claim(id)
            {
                break claiming;
            }
            if !agent.holds(id) {
                return Err(ended());
            }
            let message = "another claim of this grant is open, or the agent is ending".to_owned();
            say(lines, AgentLine::Waiting { reason: crds::Reason::Waiting, message }).await?;
            pause(lines, RETRY).await?;
        };
        check_device(agent, id, claim.device)?;
        if claim.device == crds::Device::Gpu {
            // Where the memory lies is told first: a grant over two devices is placed elsewhere.
            drop(place(agent, id, lines).await?);
            return Err(Over::Failed {
                reason: crds::Reason::UnsupportedDevice,
                message: "this build has no engine for device gpu; wanted cpu".into(),
            });
        }
        let fetched = fetch(agent, id, claim, lines).await?;
        let running = place(agent, id, lines).await?;
        run(agent, id, claim, Start { fetched, running }, lines).await
    };
    match done.await {
        Ok(over) | Err(over) => over,
    }
}

/// A grant is memory of its devices: an engine on another kind would use what was never lent.
fn check_device(agent: &Agent, id: &GrantId, claimed: crds::Device) -> Result<(), Over> {
    let granted = agent.read(|ledger| ledger.per_device(id));
    let is_claimed = |device: &str| match claimed {
        crds::Device::Cpu => !device.starts_with(gpus::PREFIX),
        crds::Device::Gpu => device.starts_with(gpus::PREFIX),
    };
    let other = granted.into_iter().map(|(device, _)| device).find(|device| !is_claimed(device));
    other.map_or(Ok(()), |device| {
        let message =
            format!("wanted a claim for {device}, whose memory is granted, got {claimed:?}");
        Err(Over::Failed { reason: crds::Reason::InvalidSpec, message })
    })
}

fn ended() -> Over {
    Over::Failed { reason: crds::Reason::Waiting, message: CannotStart::Ended.to_string() }
}

/// Brings the weights, trying again for as long as the replica stays and the reason may pass.
async fn fetch(
    agent: &Arc<Agent>,
    id: &GrantId,
    claim: &Claim,
    lines: &mut Lines,
) -> Result<Fetched, Over> {
    // Only what a credential brought depends on whose it is.
    let namespace = if claim.credential.is_secret() { agent.namespace(id).await } else { None };
    loop {
        let (sender, mut downloaded) = watch::channel(None::<Downloaded>);
        let report = move |now: Downloaded| {
            sender.send_replace(Some(now));
        };
        let fetching = agent.weights.fetch(claim, namespace.as_deref(), &report);
        tokio::pin!(fetching);
        let mut tell = tokio::time::interval(LOOK);
        let fetched = loop {
            tokio::select! {
                fetched = &mut fetching => break fetched,
                _ = tell.tick() => {
                    let now = *downloaded.borrow_and_update();
                    if let Some(Downloaded { bytes, total_bytes }) = now {
                        say(lines, AgentLine::Downloading { bytes, total_bytes }).await?;
                    }
                    pause(lines, Duration::ZERO).await?;
                }
            }
        };
        match fetched {
            Ok(fetched) => return Ok(fetched),
            Err(error) if !error.reason().is_terminal() => {
                let (reason, message) = (error.reason(), error.to_string());
                say(lines, AgentLine::Waiting { reason, message }).await?;
                pause(lines, SOURCE_RETRY).await?;
            }
            Err(error) => {
                return Err(Over::Failed { reason: error.reason(), message: error.to_string() });
            }
        }
    }
}

/// Takes the grant's memory as soon as it is really free.
async fn place(agent: &Arc<Agent>, id: &GrantId, lines: &mut Lines) -> Result<Running, Over> {
    let mut told = None;
    loop {
        let why = match agent.start_engine(id) {
            Ok(running) => return Ok(running),
            Err(CannotStart::Ended) => return Err(ended()),
            Err(why) => why,
        };
        let reason = match why {
            CannotStart::Fragmented { .. } => crds::Reason::Fragmented,
            CannotStart::Unhealthy { .. }
            | CannotStart::Running
            | CannotStart::NotYetFree { .. }
            | CannotStart::Ended => crds::Reason::Waiting,
        };
        let message = why.to_string();
        if told.replace(message.clone()) != Some(message.clone()) {
            say(lines, AgentLine::Waiting { reason, message }).await?;
        }
        pause(lines, RETRY).await?;
    }
}

struct Start {
    /// Held for as long as the engine maps it.
    fetched: Fetched,
    running: Running,
}

/// Runs the engine until either side goes.
async fn run(
    agent: &Arc<Agent>,
    id: &GrantId,
    claim: &Claim,
    start: Start,
    lines: &mut Lines,
) -> Result<Over, Over> {
    let keys = claim.api_keys.iter().map(|key| ApiKey::new(key.0.clone())).collect();
    let Some(keys) = keys else {
        let message = "an API key has 1 to 1024 printable ASCII characters and no spaces".into();
        return Err(Over::Failed { reason: crds::Reason::InvalidSpec, message });
    };
    let command = command(agent, id, claim, &start);
    let crashed = |message: String| Over::Failed { reason: crds::Reason::EngineCrashed, message };
    let mut engine = agent
        .spawner
        .spawn(command)
        .await
        .map_err(|error| crashed(format!("start {}: {error}", agent.program.display())))?;
    tracing::info!(%id, model = claim.model, gib = start.running.place.gib, "engine started");
    // An engine that does not listen ends, which is seen below.
    drop(engine.tell(&supervise::Command::ApiKeys(keys)).await);
    let grant_bytes = u64::from(start.running.place.gib) << 30;
    let attending = Attending {
        agent,
        id,
        engine: &mut engine,
        lines,
        grant_bytes,
        draining: Draining::default(),
        last_words: VecDeque::new(),
    };
    let over = attending.until_over().await;
    let how = engine.end().await;
    tracing::info!(%id, how, "engine ended");
    // Reaped: only now is its memory free.
    drop(start.running);
    Ok(match over {
        Attended::Left => Over::Left,
        Attended::Ended { last_words } => crashed(format!("{how}: {last_words}")),
        Attended::Failed { reason, message } => Over::Failed { reason, message },
    })
}

/// The engine's flags; a secret is never among them.
fn command(agent: &Agent, id: &GrantId, claim: &Claim, start: &Start) -> Command {
    let mut command = Command::new(&agent.program);
    command.env_clear().current_dir("/").arg("serve").arg(&start.fetched.path).arg("--supervised");
    command.arg("--uds").arg(agent.grants.engine_socket(id));
    // In one word: a name may begin like a flag.
    command.arg(format!("--served-model-name={}", claim.served_name));
    command.args(["--memory-bytes", &format!("{}GiB", start.running.place.gib)]);
    // kube-proxy spreads connections, not requests.
    command.args([
        "--keepalive-requests",
        KEEPALIVE_REQUESTS,
        "--keepalive-time",
        KEEPALIVE_SECONDS,
    ]);
    let engine = &claim.engine;
    for (flag, value) in [
        ("--max-model-len", engine.max_model_len),
        ("--max-num-seqs", engine.max_num_seqs),
        ("--max-num-batched-tokens", engine.max_num_batched_tokens),
        ("--block-size", engine.block_size),
    ] {
        if let Some(value) = value {
            command.args([flag, &value.to_string()]);
        }
    }
    if let Some(dtype) = engine.dtype {
        command.args(["--dtype", dtype.as_str()]);
    }
    if let Some(dtype) = engine.kv_cache_dtype {
        command.args(["--kv-cache-dtype", dtype.as_str()]);
    }
    if engine.enable_prefix_caching == Some(false) {
        command.arg("--no-enable-prefix-caching");
    }
    command
}

/// How attending to an engine came to its end.
enum Attended {
    Left,
    Ended { last_words: String },
    Failed { reason: crds::Reason, message: String },
}

/// Passes on what the engine and the replica say to each other, and watches the memory.
struct Attending<'a> {
    agent: &'a Agent,
    id: &'a GrantId,
    engine: &'a mut Engine,
    lines: &'a mut Lines,
    grant_bytes: u64,
    draining: Draining,
    last_words: VecDeque<String>,
}

impl Attending<'_> {
    async fn until_over(mut self) -> Attended {
        let mut phase = self.agent.phase.subscribe();
        let mut changed = self.agent.watch();
        let mut look = tokio::time::interval(LOOK);
        loop {
            let go_on = tokio::select! {
                said = self.engine.next() => match said {
                    Some(said) => self.pass_on(said).await,
                    None => Err(Attended::Ended { last_words: joined(&self.last_words) }),
                },
                heard = self.lines.next() => match heard {
                    Some(Ok(line)) => self.obey(&line).await,
                    None | Some(Err(_)) => Err(Attended::Left),
                },
                // The guard of the answer must not live across an await.
                true = async { phase.wait_for(|phase| *phase == Phase::Draining).await.is_ok() },
                    if self.draining.since.is_none() => self.drain().await,
                _ = changed.changed() => self.check_grant(),
                _ = look.tick() => self.look(),
            };
            if let Err(over) = go_on {
                return over;
            }
        }
    }

    async fn pass_on(&mut self, said: FromEngine) -> Result<(), Attended> {
        self.draining.hear(&said);
        if let FromEngine::Event(Event::Ready {}) = &said {
            self.agent.settled(self.id);
        }
        if let FromEngine::Log(line) = &said {
            if self.last_words.len() == LAST_WORDS {
                self.last_words.pop_front();
            }
            self.last_words.push_back(line.clone());
        }
        match line_for_replica(said)? {
            Some(line) => say(self.lines, line).await.map_err(|_| Attended::Left),
            None => Ok(()),
        }
    }

    async fn obey(&mut self, line: &str) -> Result<(), Attended> {
        if let Ok(ReplicaLine::Drain {}) = serde_json::from_str(line) {
            // An engine that does not listen ends, which is seen.
            drop(self.engine.tell(&supervise::Command::Drain).await);
        }
        Ok(())
    }

    async fn drain(&mut self) -> Result<(), Attended> {
        self.draining.since = Some(tokio::time::Instant::now());
        drop(self.engine.tell(&supervise::Command::Drain).await);
        say(self.lines, AgentLine::Draining {}).await.map_err(|_| Attended::Left)
    }

    fn check_grant(&self) -> Result<(), Attended> {
        match (self.agent.holds(self.id), ended()) {
            (false, Over::Failed { reason, message }) => Err(Attended::Failed { reason, message }),
            (true | false, _) => Ok(()),
        }
    }

    fn look(&self) -> Result<(), Attended> {
        if self.draining.is_over() {
            return Err(Attended::Left);
        }
        match self.engine.resident_bytes() {
            Some(bytes) if bytes > self.grant_bytes => Err(exceeded(bytes, self.grant_bytes)),
            Some(_) | None => Ok(()),
        }
    }
}

/// The end of an agent: an engine goes when nothing runs in it.
#[derive(Debug, Default)]
struct Draining {
    since: Option<tokio::time::Instant>,
    /// When the newest request of a client began.
    newest: Option<tokio::time::Instant>,
    in_flight: u64,
}

impl Draining {
    fn hear(&mut self, line: &FromEngine) {
        match line {
            FromEngine::Event(Event::InFlight { requests }) => self.in_flight = *requests,
            FromEngine::Event(Event::Begun { .. }) => {
                self.newest = Some(tokio::time::Instant::now());
            }
            FromEngine::Event(_) | FromEngine::Log(_) => {}
        }
    }

    fn is_over(&self) -> bool {
        let quiet = self.newest.is_none_or(|newest| newest.elapsed() >= QUIET);
        let long = self.since.is_some_and(|since| since.elapsed() >= DRAIN_AT_LEAST);
        long && quiet && self.in_flight == 0
    }
}

fn exceeded(bytes: u64, grant_bytes: u64) -> Attended {
    Attended::Failed {
        reason: crds::Reason::MemoryGrantExceeded,
        message: format!("the engine used {bytes} bytes, granted were {grant_bytes}"),
    }
}

fn joined(words: &VecDeque<String>) -> String {
    words.iter().map(String::as_str).collect::<Vec<_>>().join("; ")
}

/// What a replica wants to hear of it.
fn line_for_replica(line: FromEngine) -> Result<Option<AgentLine>, Attended> {
    Ok(Some(match line {
        FromEngine::Log(line) => AgentLine::Log { line },
        FromEngine::Event(Event::Loading { bytes, total_bytes }) => {
            AgentLine::Loading { bytes, total_bytes }
        }
        FromEngine::Event(Event::Ready {}) => {
            AgentLine::Ready { socket: format!("{ENGINE_FOLDER}/{ENGINE_SOCKET}") }
        }
        FromEngine::Event(Event::InFlight { requests }) => AgentLine::InFlight { requests },
        FromEngine::Event(Event::Begun { .. }) => return Ok(None),
        FromEngine::Event(Event::Failed { reason, message }) => {
            return Err(Attended::Failed { reason: reason.into(), message });
        }
    }))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::os::unix::fs::PermissionsExt;
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::claim::{ClaimCredential, Secret, VERSION};
    use crate::node::agent::tests::agent;
    use crate::node::ledger::Unit;

    /// An agent whose engines run `script`, with a grant of 2 of its 4 GiB.
    struct Bench {
        _root: tempfile::TempDir,
        agent: Arc<Agent>,
        socket: PathBuf,
    }

    impl Bench {
        fn new(script: &str) -> Self {
            let root = tempfile::tempdir().unwrap();
            let program = root.path().join("engine");
            std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
            let (agent, listeners) = agent(root.path(), program.to_str().unwrap());
            std::fs::write(root.path().join("models/m.gguf"), "x").unwrap();
            tokio::spawn(serve(Arc::clone(&agent), listeners));
            let units: BTreeSet<Unit> =
                (0..2).map(|index| Unit { device: "cpu0".into(), index }).collect();
            let folder = agent.allocate(units).unwrap();
            Self { _root: root, agent, socket: folder.join("claim.sock") }
        }

        async fn connect(&self) -> Lines {
            let stream = UnixStream::connect(&self.socket).await.unwrap();
            Framed::new(stream, LinesCodec::new_with_max_length(LONGEST_LINE))
        }

        async fn claim(&self, change: impl FnOnce(&mut Claim)) -> Lines {
            let mut claim = Claim {
                version: VERSION,
                model: "file://m.gguf".into(),
                sha256: None,
                served_name: "m".into(),
                device: crds::Device::Cpu,
                engine: crds::Engine::default(),
                api_keys: vec![Secret("sk-1".into())],
                credential: ClaimCredential::default(),
            };
            change(&mut claim);
            let mut lines = self.connect().await;
            let line = serde_json::to_string(&ReplicaLine::Claim(Box::new(claim))).unwrap();
            lines.send(line).await.unwrap();
            lines
        }

        fn used_gib(&self) -> u32 {
            self.agent.read(|ledger| ledger.usage()[0].used_gib)
        }
    }

    /// The next line, or `None` when the agent has closed.
    async fn hear(lines: &mut Lines) -> Option<AgentLine> {
        let line = tokio::time::timeout(Duration::from_secs(30), lines.next()).await.unwrap();
        line.map(|line| serde_json::from_str(&line.unwrap()).unwrap())
    }

    async fn failure(lines: &mut Lines) -> (crds::Reason, String) {
        loop {
            let line = hear(lines).await.expect("a failure is told before the end");
            if let AgentLine::Failed { reason, message } = line {
                return (reason, message);
            }
        }
    }

    async fn eventually(what: &str, is_so: impl Fn() -> bool) {
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while !is_so() {
            assert!(std::time::Instant::now() < deadline, "not in time: {what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_claim_has_an_engine_until_it_closes() {
        let bench = Bench::new(
            "read keys; echo \"$keys\" >&2; echo '{\"ready\":{}}'; read line; echo \"$line\" >&2; read gone",
        );
        let mut lines = bench.claim(|_| {}).await;
        let keys = AgentLine::Log { line: "{\"api_keys\":[\"sk-1\"]}".into() };
        let ready = AgentLine::Ready { socket: "engine/http.sock".into() };
        let said = [hear(&mut lines).await.unwrap(), hear(&mut lines).await.unwrap()];
        assert!(said.contains(&keys) && said.contains(&ready), "{said:?}");
        assert_eq!(bench.used_gib(), 2);
        lines.send("{\"drain\":{}}".to_owned()).await.unwrap();
        let drained = AgentLine::Log { line: "{\"drain\":{}}".into() };
        assert_eq!(hear(&mut lines).await, Some(drained));
        drop(lines);
        eventually("the memory is back", || bench.used_gib() == 0).await;
    }

    #[tokio::test]
    async fn an_engine_gets_its_flags_and_no_secret() {
        let bench = Bench::new("echo \"$@\" >&2; env >&2; exit 1");
        let set = |claim: &mut Claim| {
            claim.engine.max_model_len = Some(64);
            claim.engine.enable_prefix_caching = Some(false);
        };
        let mut lines = bench.claim(set).await;
        let mut said = String::new();
        while let Some(line) = hear(&mut lines).await {
            said += &format!("{line:?}\n");
        }
        for part in [
            "--supervised",
            "--memory-bytes 2GiB",
            "--max-model-len 64",
            "--no-enable-prefix-caching",
        ] {
            assert!(said.contains(part), "{part} is not in {said}");
        }
        assert!(!said.contains("sk-1"), "{said}");
    }

    #[tokio::test]
    async fn a_crash_is_told_with_the_engines_last_words() {
        let bench = Bench::new("echo the disk is on fire >&2; exit 7");
        let (reason, message) = failure(&mut bench.claim(|_| {}).await).await;
        assert_eq!(reason, crds::Reason::EngineCrashed);
        assert_eq!(message, "exit status: 7: the disk is on fire");
        assert_eq!(bench.used_gib(), 0);
    }

    #[tokio::test]
    async fn an_engines_own_reason_is_passed_on() {
        let bench = Bench::new(
            "echo '{\"failed\":{\"reason\":\"UnsupportedModel\",\"message\":\"m\"}}'; sleep 1",
        );
        let failed = failure(&mut bench.claim(|_| {}).await).await;
        assert_eq!(failed, (crds::Reason::UnsupportedModel, "m".into()));
    }

    #[tokio::test]
    async fn claims_that_cannot_be_served_are_refused_with_the_reason() {
        let bench = Bench::new("exit 0");
        let gpu = |claim: &mut Claim| claim.device = crds::Device::Gpu;
        let outside = |claim: &mut Claim| claim.model = "file://../engine".into();
        let newer = |claim: &mut Claim| claim.version = VERSION + 1;
        use crds::Reason::InvalidSpec;
        assert_eq!(failure(&mut bench.claim(gpu).await).await.0, InvalidSpec);
        assert_eq!(failure(&mut bench.claim(outside).await).await.0, InvalidSpec);
        assert_eq!(failure(&mut bench.claim(newer).await).await.0, InvalidSpec);
    }

    #[tokio::test]
    async fn memory_of_a_gpu_is_not_for_an_engine_on_the_cpu() {
        let mut bench = Bench::new("echo '{\"ready\":{}}'; read keys; read gone");
        let units = [Unit { device: "GPU-a".into(), index: 0 }].into();
        bench.socket = bench.agent.allocate(units).unwrap().join("claim.sock");
        let (reason, message) = failure(&mut bench.claim(|_| {}).await).await;
        assert_eq!(reason, crds::Reason::InvalidSpec);
        assert!(message.contains("GPU-a"), "{message}");
        assert_eq!(bench.used_gib(), 0);
    }

    #[tokio::test]
    async fn garbage_is_refused_and_the_next_client_is_served() {
        let bench = Bench::new("echo '{\"ready\":{}}'; read keys; read gone");
        for garbage in [
            "GET / HTTP/1.1",
            "{\"claim\":{}}",
            "{\"claim\":{\"version\":1,\"model\":\"sk-secret\"}}",
            "",
        ] {
            let mut lines = bench.connect().await;
            lines.send(garbage.to_owned()).await.unwrap();
            let (reason, message) = failure(&mut lines).await;
            assert_eq!(reason, crds::Reason::InvalidSpec);
            assert!(!message.contains("secret"), "{message}");
            assert_eq!(hear(&mut lines).await, None);
        }
        let mut long = bench.connect().await;
        // The agent closes before all of it was sent.
        drop(long.send("x".repeat(LONGEST_LINE * 2)).await);
        drop(long);
        let mut lines = bench.claim(|_| {}).await;
        assert!(matches!(hear(&mut lines).await, Some(AgentLine::Ready { .. })));
    }

    #[tokio::test]
    async fn silent_clients_do_not_keep_a_replica_out_for_long() {
        let bench = Bench::new("echo '{\"ready\":{}}'; read keys; read gone");
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS * 2 {
            silent.push(bench.connect().await);
        }
        let mut lines = bench.claim(|_| {}).await;
        let first =
            tokio::time::timeout(FIRST_LINE * 4, lines.next()).await.expect("served in the end");
        assert!(first.unwrap().unwrap().contains("ready"));
    }

    #[tokio::test]
    async fn the_memory_of_a_grant_that_ended_is_waited_for() {
        let bench =
            Bench::new("trap '' TERM; echo '{\"ready\":{}}'; read keys; read gone; sleep 1");
        let mut first = bench.claim(|_| {}).await;
        assert!(matches!(hear(&mut first).await, Some(AgentLine::Ready { .. })));
        let units: BTreeSet<Unit> =
            (0..4).map(|index| Unit { device: "cpu0".into(), index }).collect();
        let folder = bench.agent.allocate(units).unwrap();
        let (reason, _) = failure(&mut first).await;
        assert_eq!(reason, crds::Reason::Waiting, "its grant has ended");
        let second = Bench { socket: folder.join("claim.sock"), ..bench };
        let mut lines = second.claim(|_| {}).await;
        while !matches!(hear(&mut lines).await, Some(AgentLine::Ready { .. })) {}
        assert_eq!(second.used_gib(), 4);
    }

    #[tokio::test]
    async fn an_engine_that_takes_more_than_its_grant_is_ended() {
        assert!(matches!(
            exceeded(3, 2),
            Attended::Failed { reason: crds::Reason::MemoryGrantExceeded, .. }
        ));
        // 2 GiB are granted; a program that holds 3 is ended by the agent, and says nothing of it itself.
        let bench =
            Bench::new("exec python3 -c 'x = bytearray(3 << 30); import time; time.sleep(60)'");
        if std::process::Command::new("python3").arg("-V").output().is_err() {
            eprintln!("NOT RUN: an_engine_that_takes_more_than_its_grant_is_ended wants python3");
            return;
        }
        let (reason, message) = failure(&mut bench.claim(|_| {}).await).await;
        assert_eq!(reason, crds::Reason::MemoryGrantExceeded, "{message}");
        assert!(Path::new(&bench.socket).exists());
    }
}
