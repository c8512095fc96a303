//! Flags, environment and configuration file into checked structs: the only reader of the environment.
//! A value is taken from the flag, else from `BINDERY_<FLAG>`, else from the file of `--config`, else it is the default.

mod cluster;
mod flags;
mod layers;
mod number;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::IpAddr;
use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use serde_json::json;

use crate::api::server::Keepalive;
use crate::bench::memory::{BenchMemoryArgs, NamedModel};
use crate::bench::serve::BenchServeArgs;
use crate::bench::sweep::BenchSweepArgs;
use crate::node::NodeConfig;
use crate::replica::ReplicaConfig;
use crate::source::reach::Reach;
use crate::source::{Location, Room, Token};

pub use number::ByteSize;

pub use flags::{CpuIsa, Dtype, KvCacheDtype, LoadFormat, LogFormat, PlanFormat, PrefixCacheScope};

/// What the command line asks for.
#[derive(Debug)]
pub enum Command {
    Serve(Box<ServeConfig>),
    Plan { config: Box<ServeConfig>, format: PlanFormat },
    Node(Box<NodeConfig>),
    Replica(Box<ReplicaConfig>),
    BenchServe(Box<BenchServeArgs>),
    BenchSweep { arguments: Box<BenchSweepArgs>, model: Option<NamedModel> },
    BenchMemory { arguments: Box<BenchMemoryArgs>, model: Option<NamedModel> },
}

/// Everything `bindery serve` and `bindery plan` need to know, checked.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    pub model: Location,
    pub hub: HubConfig,
    pub listen: Listen,
    /// At least one; the first is the one that answers carry.
    pub served_model_names: Vec<String>,
    /// Absent: what the model allows, lowered to fit the memory.
    pub max_model_len: Option<NonZeroU32>,
    pub max_num_seqs: NonZeroU32,
    pub max_num_batched_tokens: NonZeroU32,
    /// Tokens per block.
    pub block_size: NonZeroU32,
    /// Blocks of the pool, whatever the memory plan says.
    pub num_blocks_override: Option<NonZeroU32>,
    /// Bytes of the KV arena, whatever the memory plan says.
    pub kv_cache_memory_bytes: Option<NonZeroU64>,
    pub memory: MemoryLimit,
    /// Absent: no prefix cache.
    pub prefix_cache: Option<PrefixCacheScope>,
    pub dtype: Dtype,
    pub kv_cache_dtype: KvCacheDtype,
    pub load_format: LoadFormat,
    /// Seed of dummy weights, and of the seeds of requests that bring none. Absent: 0, and a new one each.
    pub seed: Option<u64>,
    /// None: every client may ask.
    pub api_keys: Vec<ApiKey>,
    pub queue: QueueConfig,
    pub shutdown_timeout: Duration,
    /// A client that accepts no byte for this long is cancelled.
    pub write_timeout: Duration,
    pub keepalive: Keepalive,
    pub max_body_bytes: NonZeroUsize,
    /// Absent: one thread per core that the process may use.
    pub threads: Option<NonZeroUsize>,
    /// The widest instructions that kernels use.
    pub max_cpu_isa: CpuIsa,
    pub compute: Compute,
    pub supervision: Supervision,
    pub log: LogConfig,
    /// `BINDERY_` variables that name no flag, for one warning at start.
    pub ignored_variables: Vec<String>,
}

/// Where the server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    Tcp { host: IpAddr, port: u16 },
    Unix(PathBuf),
}

impl Listen {
    /// A command to try a chat with. `port` is the bound one, which differs from the wanted one where that is 0.
    pub fn example(&self, port: u16, model: &str, keys: &[ApiKey], ask: Example) -> String {
        let (path, field, prompt) = match ask {
            Example::Chat => (
                "chat/completions",
                "messages",
                json!([{"role": "user", "content": "What is the capital of Germany?"}]),
            ),
            Example::Completion => ("completions", "prompt", json!("The capital of France is")),
        };
        // At temperature 0 a small model is at its most sensible.
        let body = json!({"model": model, field: prompt, "max_tokens": 64, "temperature": 0});
        // A single quote ends the shell's string, so it is written outside of it.
        let body = body.to_string().replace('\'', "'\\''");
        let (socket, host) = match self {
            Self::Tcp { host, .. } if host.is_unspecified() => {
                (String::new(), format!("127.0.0.1:{port}"))
            }
            Self::Tcp { host: IpAddr::V6(host), .. } => (String::new(), format!("[{host}]:{port}")),
            Self::Tcp { host: IpAddr::V4(host), .. } => (String::new(), format!("{host}:{port}")),
            Self::Unix(path) => {
                (format!(" --unix-socket '{}'", path.display()), "localhost".to_owned())
            }
        };
        let key = if keys.is_empty() { "" } else { " -H \"Authorization: Bearer $KEY\"" };
        format!(
            "curl -sS{socket} http://{host}/v1/{path} -H 'Content-Type: application/json'{key} -d '{body}'"
        )
    }
}

/// What a model can be asked first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Example {
    Chat,
    /// It has no chat template.
    Completion,
}

/// What bounds weights, workspace, KV arena and process overhead together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MemoryLimit {
    /// The backend's own default.
    Unset,
    Total(NonZeroU64),
    /// A share of the device's memory, above 0 and at most 1.
    Utilization(f64),
}

/// What the queue takes before it answers 429.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueConfig {
    pub requests: NonZeroUsize,
    pub tokens: NonZeroUsize,
}

/// Which arithmetic computes the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compute {
    Kernels,
    /// The plain path on candle-core, slow and readable.
    Reference,
}

/// Who starts and ends this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Supervision {
    /// A person or an init system, by signals.
    Bare,
    /// A node agent, over stdin and stdout.
    Supervised,
}

/// What is logged to stderr and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// A directive of `tracing_subscriber::EnvFilter`, such as `info` or `daemon=debug`.
    pub filter: String,
    pub format: LogFormat,
}

/// Where the hub is and where its files are kept, from the variables of the hub's own clients.
#[derive(Debug, Clone)]
pub struct HubConfig {
    /// `HF_ENDPOINT`, without a slash at the end.
    pub endpoint: String,
    /// `HF_TOKEN`, else the file that the hub's own login writes.
    pub token: Option<Token>,
    /// `HF_HUB_CACHE`, else `$HF_HOME/hub`, else `~/.cache/huggingface/hub`.
    pub cache: PathBuf,
    /// `HF_HUB_OFFLINE`: only what is in the cache.
    pub offline: bool,
    /// While the hub cannot be reached, whether what is in the cache is used.
    pub trusts_cache: bool,
    pub reach: Reach,
    /// Asked before a download begins.
    pub room: Room,
}

/// A secret that clients show; never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// Takes a key that is not empty and fits in a header.
    pub fn new(key: String) -> Option<Self> {
        let fits =
            !key.is_empty() && key.len() <= 1024 && key.bytes().all(|b| b.is_ascii_graphic());
        fits.then_some(Self(key))
    }

    /// The key itself, for a comparison in constant time.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// The process environment as a value.
#[derive(Debug, Clone, Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// Reads the variables of this process; those that are not UTF-8 are left out.
    pub fn of_process() -> Self {
        let text = |(key, value): (OsString, OsString)| {
            Some((key.into_string().ok()?, value.into_string().ok()?))
        };
        Self(std::env::vars_os().filter_map(text).collect())
    }

    /// The value of a variable that is set and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .filter(move |(key, _)| key.starts_with(prefix))
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Environment {
    fn from(variables: [(&str, &str); N]) -> Self {
        Self(variables.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }
}

/// Why the command line asks for nothing that can be done.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Help, version, or a flag that clap refused.
    #[error("{0}")]
    Flags(Box<clap::Error>),
    #[error("environment variable {name}: {reason}")]
    Variable { name: String, reason: String },
    #[error("configuration file {}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("{0}")]
    Value(String),
}

impl ConfigError {
    /// Prints the error (or the help that was asked for) where it belongs, and gives the exit code: 2 for usage.
    pub fn report(&self) -> ExitCode {
        match self {
            Self::Flags(error) => {
                // A closed pipe leaves nobody to tell.
                let _ = error.print();
                match error.kind() {
                    ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                    _ => ExitCode::from(2),
                }
            }
            Self::Variable { .. } | Self::File { .. } | Self::Value(_) => {
                eprintln!("error: {self}\n\nFor more information, try '--help'.");
                ExitCode::from(2)
            }
        }
    }
}

/// Reads the command line `arguments` (the program's name first), completed from `environment` and a file.
///
/// # Errors
/// When a flag, variable or key is unknown or its value impossible; help and version come this way too.
pub fn parse(
    arguments: impl IntoIterator<Item = OsString>,
    environment: &Environment,
) -> Result<Command, ConfigError> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let layered = layers::complete(arguments, environment)?;
    let ignored = layered.ignored;
    match layered.cli.command {
        flags::Subcommand::Serve(serve) => {
            Ok(Command::Serve(Box::new(check(serve, environment, ignored)?)))
        }
        flags::Subcommand::Plan(plan) => Ok(Command::Plan {
            format: plan.format,
            config: Box::new(check(plan.serve, environment, ignored)?),
        }),
        flags::Subcommand::Node(node) => Ok(Command::Node(Box::new(cluster::node(node)?))),
        flags::Subcommand::Replica(replica) => {
            Ok(Command::Replica(Box::new(cluster::replica(replica)?)))
        }
        flags::Subcommand::Bench(bench) => self::bench(bench.command, environment),
    }
}

fn bench(command: flags::BenchCommand, environment: &Environment) -> Result<Command, ConfigError> {
    let named = |location: &Option<Location>| match location {
        Some(location) => {
            Ok(Some(NamedModel { location: location.clone(), hub: hub_config(environment)? }))
        }
        None => Ok(None),
    };
    match command {
        flags::BenchCommand::Serve(arguments) => Ok(Command::BenchServe(arguments)),
        flags::BenchCommand::Memory(arguments) => {
            Ok(Command::BenchMemory { model: named(&arguments.model)?, arguments })
        }
        flags::BenchCommand::Sweep(arguments) => {
            Ok(Command::BenchSweep { model: named(&arguments.model)?, arguments })
        }
    }
}

fn invalid<T>(message: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Value(message.into()))
}

/// Tokens of a step where nothing is stated: on a CPU twice as many take twice as long, so that no prompt is done earlier and every
/// other stream waits longer for its next token (measured, see README).
const BATCHED_TOKENS: NonZeroU32 = NonZeroU32::new(128).unwrap();

fn batched_tokens(flags: &flags::Serve) -> Result<NonZeroU32, ConfigError> {
    let (stated, seqs) = (flags.max_num_batched_tokens.map(|count| count.0), flags.max_num_seqs);
    let tokens = stated.unwrap_or(BATCHED_TOKENS.max(seqs));
    if tokens >= seqs {
        return Ok(tokens);
    }
    invalid(format!(
        "--max-num-batched-tokens {tokens} is not allowed: at least --max-num-seqs ({seqs}), so that every running sequence \
         gets a token in each step"
    ))
}

/// Turns flags into a configuration that cannot be wrong.
fn check(
    flags: flags::Serve,
    environment: &Environment,
    ignored_variables: Vec<String>,
) -> Result<ServeConfig, ConfigError> {
    let Some(model) = flags.model.clone() else {
        return invalid(
            "MODEL is missing: a GGUF file, a folder with config.json, or hf://org/name[@revision]",
        );
    };
    let max_num_batched_tokens = batched_tokens(&flags)?;
    check_counts(&flags)?;
    Ok(ServeConfig {
        listen: listen(&flags)?,
        memory: memory(&flags)?,
        api_keys: api_keys(&flags.api_key)?,
        served_model_names: served_names(&flags.served_model_name, &model)?,
        hub: hub_config(environment)?,
        model,
        max_model_len: flags.max_model_len.0,
        max_num_seqs: flags.max_num_seqs,
        max_num_batched_tokens,
        block_size: flags.block_size,
        num_blocks_override: flags.num_gpu_blocks_override,
        kv_cache_memory_bytes: flags.kv_cache_memory_bytes.map(|bytes| bytes.0),
        prefix_cache: (!flags.no_enable_prefix_caching).then_some(flags.prefix_cache_scope),
        dtype: flags.dtype,
        kv_cache_dtype: flags.kv_cache_dtype,
        load_format: flags.load_format,
        seed: flags.seed,
        queue: QueueConfig {
            requests: flags.max_num_queued_reqs,
            tokens: flags.max_num_queued_tokens,
        },
        shutdown_timeout: flags.shutdown_timeout.0,
        write_timeout: flags.write_timeout.0,
        keepalive: Keepalive {
            requests: flags.keepalive_requests,
            time: flags.keepalive_time.map(|time| time.0),
        },
        max_body_bytes: usize::try_from(flags.max_body_bytes.0.get())
            .ok()
            .and_then(NonZeroUsize::new)
            .unwrap_or(NonZeroUsize::MAX),
        threads: flags.threads,
        max_cpu_isa: flags.max_cpu_isa,
        compute: if flags.reference { Compute::Reference } else { Compute::Kernels },
        supervision: if flags.supervised { Supervision::Supervised } else { Supervision::Bare },
        log: LogConfig { filter: flags.log_level, format: flags.log_format },
        ignored_variables,
    })
}

/// Refuses counts that cannot be together, or that nothing could hold.
fn check_counts(flags: &flags::Serve) -> Result<(), ConfigError> {
    /// Places of the queue, which are taken at start.
    const MOST_QUEUED: usize = 1 << 20;
    if let Some(len) = flags.max_model_len.0
        && flags.block_size > len
    {
        return invalid(format!(
            "--block-size {} is not allowed: 1 to --max-model-len ({len})",
            flags.block_size
        ));
    }
    if flags.max_num_queued_reqs.get() > MOST_QUEUED {
        return invalid(format!(
            "--max-num-queued-reqs {} is not allowed: 1 to {MOST_QUEUED}",
            flags.max_num_queued_reqs
        ));
    }
    Ok(())
}

fn listen(flags: &flags::Serve) -> Result<Listen, ConfigError> {
    /// What the kernel's address of a Unix socket can hold.
    const LONGEST_SOCKET_PATH: usize = 107;
    match &flags.uds {
        Some(path) if path.as_os_str().len() > LONGEST_SOCKET_PATH => invalid(format!(
            "--uds has {} bytes, a socket's path has at most {LONGEST_SOCKET_PATH}",
            path.as_os_str().len()
        )),
        Some(path) => Ok(Listen::Unix(path.clone())),
        None => Ok(Listen::Tcp { host: flags.host.0, port: flags.port }),
    }
}

fn memory(flags: &flags::Serve) -> Result<MemoryLimit, ConfigError> {
    match (flags.memory_bytes, flags.gpu_memory_utilization) {
        (Some(_), Some(_)) => invalid(
            "--memory-bytes and --gpu-memory-utilization exclude each other: state one of them",
        ),
        (Some(bytes), None) => Ok(MemoryLimit::Total(bytes.0)),
        (None, Some(share)) => Ok(MemoryLimit::Utilization(share.0)),
        (None, None) => Ok(MemoryLimit::Unset),
    }
}

fn api_keys(keys: &[String]) -> Result<Vec<ApiKey>, ConfigError> {
    let key = |key: &String| {
        ApiKey::new(key.clone()).ok_or_else(|| {
            ConfigError::Value(
                "--api-key wants 1 to 1024 printable ASCII characters, no spaces".into(),
            )
        })
    };
    keys.iter().map(key).collect()
}

fn served_names(names: &[String], model: &Location) -> Result<Vec<String>, ConfigError> {
    if names.iter().any(|name| name.trim().is_empty() || name.len() > 512) {
        return invalid("--served-model-name wants 1 to 512 characters");
    }
    Ok(if names.is_empty() { vec![model.to_string()] } else { names.to_vec() })
}

/// Reads what the hub's own clients read.
fn hub_config(environment: &Environment) -> Result<HubConfig, ConfigError> {
    let home = match (
        environment.get("HF_HOME"),
        environment.get("XDG_CACHE_HOME"),
        environment.get("HOME"),
    ) {
        (Some(home), _, _) => PathBuf::from(home),
        (None, Some(cache), _) => Path::new(cache).join("huggingface"),
        (None, None, Some(home)) => Path::new(home).join(".cache/huggingface"),
        (None, None, None) => std::env::temp_dir().join("huggingface"),
    };
    let endpoint = environment
        .get("HF_ENDPOINT")
        .unwrap_or("https://huggingface.co")
        .trim_end_matches('/')
        .to_owned();
    if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
        let reason = format!("wanted a URL that starts with https:// or http://, got {endpoint:?}");
        return Err(ConfigError::Variable { name: "HF_ENDPOINT".into(), reason });
    }
    let token = match environment.get("HF_TOKEN") {
        Some(token) => Some(token.to_owned()),
        None => token_file(environment, &home),
    };
    Ok(HubConfig {
        endpoint,
        token: token.and_then(Token::new),
        cache: environment.get("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
        offline: environment.get("HF_HUB_OFFLINE").is_some_and(is_true),
        trusts_cache: true,
        reach: Reach::Everywhere,
        room: Room::default(),
    })
}

/// The token that the hub's own login stored; a file that is absent or unreadable is no token.
fn token_file(environment: &Environment, home: &Path) -> Option<String> {
    let path = environment.get("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
    std::fs::read_to_string(path).ok().map(|token| token.trim().to_owned())
}

fn is_true(value: &str) -> bool {
    ["1", "true", "yes", "on"].contains(&value.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests;
