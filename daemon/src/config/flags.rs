//! The flags as clap reads them; names and meanings are vLLM's where it has one.

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use clap::{Args, Parser, ValueEnum};

use super::number::{ByteSize, Count, Host, ModelLen, Seconds, Share, port, positive};
use crate::bench::memory::BenchMemoryArgs;
use crate::bench::serve::BenchServeArgs;
use crate::bench::sweep::BenchSweepArgs;
use crate::source::Location;

const LAYERS: &str = "Every flag can also be given as an environment variable (--max-num-seqs is \
    BINDERY_MAX_NUM_SEQS) or as a key of the YAML file named by --config (max-num-seqs: 64). \
    A flag wins over a variable, a variable over the file.";

/// Serves large language models with a paged KV cache.
#[derive(Debug, Parser)]
#[command(name = "bindery", version, args_override_self = true, arg_required_else_help = true)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Subcommand,
}

#[derive(Debug, clap::Subcommand)]
pub(super) enum Subcommand {
    /// Serves one model over an OpenAI-compatible HTTP API
    #[command(args_override_self = true, after_help = LAYERS)]
    Serve(Serve),
    /// Prints the memory plan of a model without starting anything; exit code 1 when it does not fit
    #[command(args_override_self = true, after_help = LAYERS)]
    Plan(Plan),
    /// Runs the node agent: lends this node's memory through the kubelet, runs an engine for each replica
    #[command(args_override_self = true, after_help = LAYERS)]
    Node(Node),
    /// Runs a replica Pod's process: claims an engine of the node agent and forwards to it
    #[command(args_override_self = true, after_help = LAYERS)]
    Replica(Replica),
    /// Measures a server, or the engine and its memory
    Bench(Bench),
}

/// What every long-running command logs and how.
#[derive(Debug, Args)]
pub(super) struct Log {
    /// What to log: error, warn, info, debug, trace, or directives such as daemon=debug
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub(super) log_level: String,
    /// How log lines look
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(super) log_format: LogFormat,
}

#[derive(Debug, Args)]
pub(super) struct Node {
    /// YAML file with the same keys as the flags
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Memory to lend as bindery.dev/cpu-memory-gib, in whole GiB: 16Gi
    #[arg(long, value_name = "BYTES")]
    pub(super) cpu_memory: Option<crds::Bytes>,
    /// File that lists GPUs (uuid, memoryGib) in place of the NVIDIA driver, which is asked where there is one
    #[arg(long, value_name = "FILE")]
    pub(super) gpu_inventory: Option<PathBuf>,
    /// Folder that file:// is below
    #[arg(long, value_name = "DIR", default_value = "/var/lib/bindery-models")]
    pub(super) model_dir: PathBuf,
    /// Folder for grants and downloads; it must have the same path on the node
    #[arg(long, value_name = "DIR", default_value = "/var/lib/bindery")]
    pub(super) state_dir: PathBuf,
    /// The kubelet's folder
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet")]
    pub(super) kubelet_dir: PathBuf,
    /// Where hf:// is
    #[arg(long, value_name = "URL", default_value = "https://huggingface.co")]
    pub(super) hub_endpoint: String,
    /// Bytes that downloaded weights may take together, such as 200Gi; what was not used for longest goes first (default: no limit)
    #[arg(long, value_name = "SIZE")]
    pub(super) cache_size: Option<crds::Bytes>,
    /// Let sources be at private, link-local and loopback addresses
    #[arg(long)]
    pub(super) allow_private_sources: bool,
    /// Address of health and metrics
    #[arg(long, default_value = "0.0.0.0")]
    pub(super) host: Host,
    /// Port of health and metrics
    #[arg(long, value_parser = port, default_value_t = 8002)]
    pub(super) port: u16,
    /// Seconds that running requests may take to finish after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value = "120")]
    pub(super) drain_seconds: Seconds,
    /// Let processes of this machine that are no Pods claim too, for development
    #[arg(long)]
    pub(super) allow_local_clients: bool,
    #[command(flatten)]
    pub(super) log: Log,
}

#[derive(Debug, Args)]
pub(super) struct Replica {
    /// hf://org/name[/file.gguf][@revision], https://host/path.gguf, s3://bucket/path.gguf, or file://path below the node's model folder
    pub(super) model: Option<String>,
    /// YAML file with the same keys as the flags (and `model`)
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Folder of the grant, which the kubelet mounts
    #[arg(long, value_name = "DIR", default_value = "/run/bindery")]
    pub(super) grant: PathBuf,
    /// What computes: cpu or gpu
    #[arg(long, value_parser = word::<crds::Device>, default_value = "cpu")]
    pub(super) device: crds::Device,
    /// SHA-256 of a single file, in hexadecimal digits
    #[arg(long, value_name = "HEX")]
    pub(super) sha256: Option<String>,
    /// Name of the model in the API; default: MODEL
    #[arg(long, value_name = "NAME")]
    pub(super) served_model_name: Option<String>,
    /// The engine's settings as JSON, as in the resource: {"maxModelLen": 8192}
    #[arg(long, value_name = "JSON", value_parser = json::<crds::Engine>, default_value = "{}")]
    pub(super) engine: crds::Engine,
    /// Folder of a Secret: each file is a key that clients may show
    #[arg(long, value_name = "DIR")]
    pub(super) api_keys: Option<PathBuf>,
    /// Folder of a Secret with the source's credential: the file token, or AWS_ACCESS_KEY_ID and the like
    #[arg(long, value_name = "DIR")]
    pub(super) credential: Option<PathBuf>,
    /// Address to listen on
    #[arg(long, default_value = "0.0.0.0")]
    pub(super) host: Host,
    /// Port that is forwarded to the engine
    #[arg(long, value_parser = port, default_value_t = 8000)]
    pub(super) port: u16,
    /// Port of health, state and metrics
    #[arg(long, value_parser = port, default_value_t = 8001)]
    pub(super) health_port: u16,
    /// Seconds that running requests may take to finish after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value = "120")]
    pub(super) drain_seconds: Seconds,
    /// File that the reason of a failure is written to
    #[arg(long, value_name = "FILE", default_value = "/dev/termination-log")]
    pub(super) termination_log: PathBuf,
    #[command(flatten)]
    pub(super) log: Log,
}

/// A word of the resource's vocabulary.
fn word<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

fn json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

#[derive(Debug, Args)]
pub(super) struct Bench {
    #[command(subcommand)]
    pub(super) command: BenchCommand,
}

#[derive(Debug, clap::Subcommand)]
pub(super) enum BenchCommand {
    /// Sends random prompts to an OpenAI-compatible server and prints latencies and throughput
    #[command(args_override_self = true)]
    Serve(Box<BenchServeArgs>),
    /// Measures what a paged KV memory saves, against contiguous ones, on the engine in this process
    #[command(args_override_self = true)]
    Memory(Box<BenchMemoryArgs>),
    /// Tries values of --max-num-seqs and of KV memory on the engine in this process: throughput, latencies, preemptions
    #[command(args_override_self = true)]
    Sweep(Box<BenchSweepArgs>),
}

#[derive(Debug, Args)]
pub(super) struct Plan {
    /// How the plan is printed
    #[arg(long, value_enum, default_value_t = PlanFormat::Text)]
    pub(super) format: PlanFormat,
    #[command(flatten)]
    pub(super) serve: Serve,
}

/// How `bindery plan` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PlanFormat {
    Text,
    Json,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// The type that weights without quantization are computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// What the model's files hold.
    Auto,
    #[value(name = "float16", alias = "half")]
    Float16,
    #[value(name = "bfloat16")]
    BFloat16,
    #[value(name = "float32", alias = "float")]
    Float32,
}

/// The type that keys and values are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvCacheDtype {
    /// The backend's own choice.
    Auto,
    #[value(name = "float16")]
    Float16,
    #[value(name = "bfloat16")]
    BFloat16,
    #[value(name = "float32")]
    Float32,
}

/// Where the weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// The model's files, whatever their format.
    Auto,
    /// Random weights from `--seed`; only config.json and the tokenizer's files are read.
    Dummy,
}

/// Instructions of a processor, the narrowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CpuIsa {
    /// What every processor has.
    Portable,
    /// With FMA and F16C.
    Avx2,
    /// With VNNI.
    Avx512,
}

/// Whose requests share cached blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrefixCacheScope {
    /// Requests with the same API key.
    Key,
    /// All requests.
    All,
}

#[derive(Debug, Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag without a value; `ServeConfig` holds enums"
)]
pub(super) struct Serve {
    /// A GGUF file, a folder in Hugging Face layout, or hf://org/name[@revision][/file.gguf]
    pub(super) model: Option<Location>,

    /// YAML file with the same keys as the flags (and `model`)
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,

    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1", help_heading = "Server")]
    pub(super) host: Host,
    /// Port to listen on; 0 lets the system choose
    #[arg(long, value_parser = port, default_value_t = 8000, help_heading = "Server")]
    pub(super) port: u16,
    /// Unix socket to listen on instead of host and port
    #[arg(long, value_name = "PATH", help_heading = "Server")]
    pub(super) uds: Option<PathBuf>,
    /// Name of the model in the API, several are aliases; default: MODEL as given
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',', help_heading = "Server")]
    pub(super) served_model_name: Vec<String>,
    /// Key that clients must show; may be repeated
    #[arg(long, value_name = "KEY", help_heading = "Server")]
    pub(super) api_key: Vec<String>,
    /// Seconds that running requests may take to finish after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value = "30", help_heading = "Server")]
    pub(super) shutdown_timeout: Seconds,
    /// Seconds after which a client that accepts no byte is cancelled
    #[arg(long, value_name = "SECONDS", default_value = "60", help_heading = "Server")]
    pub(super) write_timeout: Seconds,
    /// Requests after which a connection is closed, so that clients spread over new replicas (default: no limit)
    #[arg(long, value_parser = positive::<NonZeroUsize>, value_name = "N", help_heading = "Server")]
    pub(super) keepalive_requests: Option<NonZeroUsize>,
    /// Seconds after which a connection is closed with its next answer (default: no limit)
    #[arg(long, value_name = "SECONDS", help_heading = "Server")]
    pub(super) keepalive_time: Option<Seconds>,
    /// Largest request body
    #[arg(long, value_name = "BYTES", default_value = "16MiB", help_heading = "Server")]
    pub(super) max_body_bytes: ByteSize,
    /// Requests that may wait; one more is answered 429
    #[arg(long, value_parser = positive::<NonZeroUsize>, value_name = "N", default_value = "1024", help_heading = "Server")]
    pub(super) max_num_queued_reqs: NonZeroUsize,
    /// Prompt tokens that may wait; a request that would pass it is answered 429 (an empty queue takes any prompt)
    #[arg(long, value_parser = positive::<NonZeroUsize>, value_name = "TOKENS", default_value = "1048576", help_heading = "Server")]
    pub(super) max_num_queued_tokens: NonZeroUsize,
    /// Run under a node agent: commands on stdin, events on stdout, confined, ended with the parent
    #[arg(long, help_heading = "Server")]
    pub(super) supervised: bool,
    /// What to log: error, warn, info, debug, trace, or directives such as daemon=debug
    #[arg(long, value_name = "FILTER", default_value = "info", help_heading = "Server")]
    pub(super) log_level: String,
    /// How log lines look
    #[arg(long, value_enum, default_value_t = LogFormat::Text, help_heading = "Server")]
    pub(super) log_format: LogFormat,

    /// Longest sequence, prompt and output together: 4096, 4k (4000), 4K (4096), or auto
    #[arg(
        long,
        value_name = "TOKENS",
        default_value = "auto",
        allow_hyphen_values = true,
        help_heading = "Scheduler"
    )]
    pub(super) max_model_len: ModelLen,
    /// Most sequences in one step
    #[arg(long, value_parser = positive::<NonZeroU32>, value_name = "N", default_value = "128", help_heading = "Scheduler")]
    pub(super) max_num_seqs: NonZeroU32,
    /// Most tokens in one step; longer prompts are computed in chunks; default: 128, or as many as --max-num-seqs
    #[arg(long, value_name = "TOKENS", help_heading = "Scheduler")]
    pub(super) max_num_batched_tokens: Option<Count>,

    /// Tokens per KV block, from 1 to --max-model-len
    #[arg(long, value_parser = positive::<NonZeroU32>, value_name = "TOKENS", default_value = "16", help_heading = "Memory")]
    pub(super) block_size: NonZeroU32,
    /// Number of KV blocks, instead of the planned one
    #[arg(long, value_parser = positive::<NonZeroU32>, value_name = "N", help_heading = "Memory")]
    pub(super) num_gpu_blocks_override: Option<NonZeroU32>,
    /// Memory of the KV cache, instead of the planned one: 4GiB, 512MiB or bytes
    #[arg(long, value_name = "BYTES", help_heading = "Memory")]
    pub(super) kv_cache_memory_bytes: Option<ByteSize>,
    /// Memory for weights, workspace, KV cache and process overhead together: 4GiB, 512MiB or bytes
    #[arg(long, value_name = "BYTES", help_heading = "Memory")]
    pub(super) memory_bytes: Option<ByteSize>,
    /// Share of the device's memory to use, above 0 and at most 1; excludes --memory-bytes
    #[arg(long, value_name = "SHARE", help_heading = "Memory")]
    pub(super) gpu_memory_utilization: Option<Share>,
    /// Share full blocks between requests that begin alike (the default)
    #[arg(long, overrides_with = "no_enable_prefix_caching", help_heading = "Memory")]
    pub(super) enable_prefix_caching: bool,
    /// Share no blocks between requests
    #[arg(long, overrides_with = "enable_prefix_caching", help_heading = "Memory")]
    pub(super) no_enable_prefix_caching: bool,
    /// Whose requests share cached blocks
    #[arg(long, value_enum, default_value_t = PrefixCacheScope::Key, help_heading = "Memory")]
    pub(super) prefix_cache_scope: PrefixCacheScope,

    /// Type that weights without quantization are computed in
    #[arg(long, value_enum, default_value_t = Dtype::Auto, help_heading = "Model")]
    pub(super) dtype: Dtype,
    /// Type that keys and values are kept in
    #[arg(long, value_enum, default_value_t = KvCacheDtype::Auto, help_heading = "Model")]
    pub(super) kv_cache_dtype: KvCacheDtype,
    /// Where the weights come from
    #[arg(long, value_enum, default_value_t = LoadFormat::Auto, help_heading = "Model")]
    pub(super) load_format: LoadFormat,
    /// Seed of dummy weights (default: 0) and of requests that bring none (default: a new one each)
    #[arg(long, help_heading = "Model")]
    pub(super) seed: Option<u64>,
    /// Compute the whole model on the plain path, slow and readable
    #[arg(long, help_heading = "Model")]
    pub(super) reference: bool,
    /// Threads that compute; default: the cores this process may use
    #[arg(long, value_parser = positive::<NonZeroUsize>, value_name = "N", help_heading = "Model")]
    pub(super) threads: Option<NonZeroUsize>,
    /// Widest instructions to use, where the processor has them; the answers are the same to the bit
    #[arg(long, value_enum, default_value_t = CpuIsa::Avx512, help_heading = "Model")]
    pub(super) max_cpu_isa: CpuIsa,
}
