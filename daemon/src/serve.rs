//! `bindery serve` and `bindery plan`: from a checked configuration to an engine behind its API, and to its orderly end.

mod load;
mod supervised;

pub(crate) use load::{MAX_ATTENDED, WATERMARK_PERCENT};

use std::io::{IsTerminal, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kernels::cpu::{InstructionSet, limit_instruction_set};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::api::server::{self, Listener, Phase, ServerOptions};
use crate::api::state::{ApiLimits, ApiState, CacheScope, Loaded, Seeds};
use crate::config::{
    ApiKey, CpuIsa, Example, Listen, LogConfig, LogFormat, PlanFormat, PrefixCacheScope,
    ServeConfig, Supervision,
};
use crate::engine::handle::{Handle, State};
use crate::metrics::Metrics;
use crate::model::text::Text;
use crate::plan::{Machine, MemoryPlan};

/// A request's head must come within this time.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a connection may be idle while the server drains.
const DRAIN_IDLE: Duration = Duration::from_secs(2);
/// Connections that are served at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 4096;
/// Threads that serve connections; the engine's are beside them.
const SERVER_THREADS: usize = 2;
/// How long connections have to end after the last answer.
const CLOSING: Duration = Duration::from_secs(2);

/// Serves until a signal, the end of stdin under an agent, or the engine's end.
///
/// # Errors
/// When the address cannot be had, the model cannot be loaded, or the engine fails.
pub fn run(config: ServeConfig) -> Result<()> {
    start_log(&config.log)?;
    for name in &config.ignored_variables {
        tracing::warn!(name, "environment variable names no flag and is ignored");
    }
    raise_file_limit();
    choose_instructions(config.max_cpu_isa);
    // Read before the process may be confined to its own files.
    let machine = Machine::of_process();
    let agent = match config.supervision {
        Supervision::Bare => None,
        Supervision::Supervised => Some(supervised::Agent::start(&config)?),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(SERVER_THREADS)
        .thread_name("server")
        .enable_all()
        .build()
        .context("start the server's threads")?;
    let served = runtime.block_on(serve(config, machine, agent));
    // What still runs on blocking threads, such as a load that a signal overtook, is not waited for.
    runtime.shutdown_background();
    served
}

/// Before the first kernel runs: they ask once.
fn choose_instructions(widest: CpuIsa) {
    let used = limit_instruction_set(match widest {
        CpuIsa::Portable => InstructionSet::Portable,
        CpuIsa::Avx2 => InstructionSet::Avx2Fma,
        CpuIsa::Avx512 => InstructionSet::Avx512,
    });
    tracing::info!(instructions = ?used, "kernels are chosen");
}

/// Lets the process have as many connections as its hard limit allows: the soft one is often below [`MAX_CONNECTIONS`].
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, ?limit, "the limit of open files stays");
    }
}

/// Prints the memory plan of a model without loading it.
///
/// # Errors
/// When the model is refused or does not fit, with the figure that is missing.
pub fn print_plan(config: &ServeConfig, format: PlanFormat, output: &mut impl Write) -> Result<()> {
    start_log(&config.log)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let path = runtime.block_on(load::locate(config, &|_| {}))?;
    let plan = load::open(config, &path)?.plan(config, Machine::of_process())?;
    match format {
        PlanFormat::Text => write!(output, "{plan}")?,
        PlanFormat::Json => writeln!(output, "{}", serde_json::to_string_pretty(&plan)?)?,
    }
    Ok(())
}

/// Starts to log to stderr.
///
/// # Errors
/// When the filter is none.
pub(crate) fn start_log(config: &LogConfig) -> Result<()> {
    let filter =
        tracing_subscriber::EnvFilter::try_new(&config.filter).context("read --log-level")?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let log = if std::io::stderr().is_terminal() { log } else { log.with_ansi(false) };
    match config.format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

/// A bound address.
struct Bound {
    listener: Listener,
    port: u16,
}

/// What ends the server.
enum End {
    Signal,
    /// The agent closed stdin: everything stops now.
    AgentGone,
    EngineStopped,
}

async fn serve(
    config: ServeConfig,
    machine: Machine,
    agent: Option<supervised::Agent>,
) -> Result<()> {
    let mut signals = Signals::new()?;
    let bound = bind(&config.listen).await?;
    if agent.is_some() {
        supervised::open_socket(&config.listen)?;
        supervised::deny_sockets();
    }
    let metrics =
        Arc::new(Metrics::new(&config.served_model_names[0]).context("register the metrics")?);
    let mut state = ApiState::new(
        config.served_model_names.clone(),
        config.api_keys.iter().map(|key| key.expose().to_owned()).collect(),
        ApiLimits::with_body_bytes(config.max_body_bytes.get()),
        match config.prefix_cache {
            Some(PrefixCacheScope::All) => CacheScope::All,
            Some(PrefixCacheScope::Key) | None => CacheScope::Key,
        },
        Arc::clone(&metrics),
    );
    state.seeds = Seeds::new(config.seed);
    if agent.is_some() {
        state.await_keys();
    }
    let state = Arc::new(state);
    let (phase, watched) = watch::channel(Phase::Serving);
    let options = ServerOptions {
        write_timeout: config.write_timeout,
        header_timeout: HEADER_TIMEOUT,
        drain_idle: DRAIN_IDLE,
        max_connections: MAX_CONNECTIONS,
        keepalive: config.keepalive,
    };
    let app = crate::api::router(Arc::clone(&state));
    let server =
        tokio::spawn(server::serve(bound.listener, app, options, watched, Arc::clone(&metrics)));
    let mut agent = agent;
    let ended = live(&config, machine, &state, &mut signals, &mut agent, bound.port, &phase).await;
    if let (Some(agent), Err(error)) = (&agent, &ended) {
        agent.failed(error);
    }
    phase.send_replace(Phase::Closing);
    // Answers that are computed may still be on their way to clients that read slowly.
    let soon = Instant::now() + CLOSING;
    let until = ended.as_ref().map_or(soon, |until| soon.max(*until));
    if tokio::time::timeout_at(until.into(), server).await.is_err() {
        tracing::warn!("the time to finish is over, connections are cut off");
    }
    if let Listen::Unix(path) = &config.listen {
        // Nothing is lost when it is gone already.
        drop(std::fs::remove_file(path));
    }
    if let Some(agent) = agent {
        agent.finish();
    }
    ended.map(|_| ())
}

/// Loads the model, then serves until the end. Until the time in the result connections may finish.
#[allow(clippy::too_many_arguments, reason = "everything that a server's life is made of, once")]
async fn live(
    config: &ServeConfig,
    machine: Machine,
    state: &Arc<ApiState>,
    signals: &mut Signals,
    agent: &mut Option<supervised::Agent>,
    port: u16,
    phase: &watch::Sender<Phase>,
) -> Result<Instant> {
    let reporter = agent.as_ref().map(supervised::Agent::reporter);
    let loading = load::load(config.clone(), machine, Arc::clone(&state.metrics), reporter);
    let loaded = tokio::select! {
        loaded = loading => loaded?,
        _ = signals.next() => return Ok(Instant::now()),
        () = supervised::gone(agent, state) => return Ok(Instant::now()),
    };
    let handle = loaded.handle.clone();
    announce(config, &loaded.plan, port, &loaded.text);
    state.set_loaded(Loaded {
        handle: loaded.handle,
        longest_token: loaded.longest_token,
        text: loaded.text,
        fingerprint: loaded.fingerprint,
        readers: Loaded::readers(),
    });
    if let Some(agent) = agent {
        agent.ready(&handle, &state.metrics, phase);
    }
    let mut engine = handle.watch_state();
    let end = tokio::select! {
        _ = signals.next() => End::Signal,
        () = supervised::gone(agent, state) => End::AgentGone,
        _ = engine.wait_for(|state| *state == State::Stopped) => End::EngineStopped,
    };
    match end {
        End::Signal => Ok(drain(config, &handle, state, signals, phase).await),
        End::AgentGone => Ok(Instant::now()),
        End::EngineStopped => bail!("the engine has stopped; its log says why"),
    }
}

/// Refuses new requests and lets the running ones finish, up to the time that is given or a second signal.
/// Returns when that time ends.
async fn drain(
    config: &ServeConfig,
    handle: &Handle,
    state: &ApiState,
    signals: &mut Signals,
    phase: &watch::Sender<Phase>,
) -> Instant {
    handle.drain();
    phase.send_replace(Phase::Draining);
    tracing::info!(
        requests = handle.in_flight(),
        timeout_s = config.shutdown_timeout.as_secs(),
        "draining"
    );
    let deadline = Instant::now() + config.shutdown_timeout;
    let idle = async {
        while handle.in_flight() > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = idle => {}
        code = signals.next() => {
            tracing::warn!(requests = handle.in_flight(), "a second signal: ending at once");
            std::process::exit(128 + code);
        }
    }
    let dropped = handle.in_flight();
    if dropped > 0 {
        state.metrics.dropped_streams(dropped);
        tracing::warn!(
            requests = dropped,
            "the time to finish is over, running requests are dropped"
        );
    }
    deadline
}

fn announce(config: &ServeConfig, plan: &MemoryPlan, port: u16, text: &Text) {
    for line in plan.to_string().lines() {
        tracing::info!("{line}");
    }
    let place = match &config.listen {
        Listen::Tcp { host, .. } => format!("http://{host}:{port}"),
        Listen::Unix(path) => format!("unix:{}", path.display()),
    };
    tracing::info!(model = config.served_model_names[0], at = place, "ready");
    if config.supervision == Supervision::Bare {
        let keys: &[ApiKey] = &config.api_keys;
        let ask = if text.has_chat_template() { Example::Chat } else { Example::Completion };
        let example = config.listen.example(port, &config.served_model_names[0], keys, ask);
        eprintln!("\nTry:\n\n{example}\n");
    }
}

async fn bind(listen: &Listen) -> Result<Bound> {
    match listen {
        Listen::Tcp { host, port } => {
            let listener = TcpListener::bind((*host, *port)).await;
            let listener = listener.with_context(|| format!("listen on {host}:{port}"))?;
            let port = listener.local_addr().context("read the bound address")?.port();
            Ok(Bound { listener: Listener::Tcp(listener), port })
        }
        Listen::Unix(path) => {
            remove_stale_socket(path)?;
            let listener = UnixListener::bind(path)
                .with_context(|| format!("listen on {}", path.display()))?;
            Ok(Bound { listener: Listener::Unix(listener), port: 0 })
        }
    }
}

/// A socket that nobody answers on is what an earlier process left behind. Anything else stays.
fn remove_stale_socket(path: &Path) -> Result<()> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if metadata.file_type().is_socket() && std::os::unix::net::UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)
            .with_context(|| format!("remove the stale socket {}", path.display()))?;
    }
    Ok(())
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("listen for signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    /// Waits for one; gives its number.
    async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.terminate.recv() => SignalKind::terminate().as_raw_value(),
            _ = self.interrupt.recv() => SignalKind::interrupt().as_raw_value(),
        }
    }
}
