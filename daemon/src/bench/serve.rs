//! `bindery bench serve`: a load generator for any OpenAI-compatible server, with the names of `vllm bench serve`.

use std::io::Write;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::load::arrivals::{RequestRate, arrivals};
use super::load::client::{EndpointType, Failure, Measured, Target};
use super::load::prompts::{Lengths, Prompt, Vocabulary, prompts};
use super::load::random::Random;
use super::percentile::Percentile;
use super::report::{Metric, Objective, Outcome, Wanted, write_table};

/// Ordinary text whose tokens make up random prompts where the size of the vocabulary is not given.
const ORDINARY_TEXT: &str = "The quick brown fox jumps over the lazy dog while seven wizards boxed 0 1 2 3 4 5 6 7 8 9 \
    apples, pears and grapes; a small river ran between old houses, where people talk about music, weather, science, \
    history, numbers and games. In spring they plant trees, in winter they read long books by the fire.";

/// What to send where, and what to report.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchServeArgs {
    /// Server to measure, such as http://127.0.0.1:8000
    #[arg(long, default_value = "http://127.0.0.1:8000", value_name = "URL")]
    pub base_url: String,
    /// Model to ask for; default: the first that the server lists
    #[arg(long)]
    pub model: Option<String>,
    /// API to use
    #[arg(long, visible_alias = "backend", value_enum, default_value_t = EndpointType::Completions)]
    pub endpoint_type: EndpointType,
    /// Path of the API; default: that of --endpoint-type
    #[arg(long, value_name = "PATH")]
    pub endpoint: Option<String>,
    /// Key to show to the server
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true, value_name = "KEY")]
    pub api_key: Option<String>,

    /// Requests to send
    #[arg(long, default_value = "1000", value_name = "N")]
    pub num_prompts: NonZeroUsize,
    /// Most requests at once (closed loop); default: no limit
    #[arg(long, value_name = "N")]
    pub max_concurrency: Option<NonZeroUsize>,
    /// Requests a second on average, as a Poisson process (open loop); inf sends all at once
    #[arg(long, default_value = "inf", value_name = "RATE")]
    pub request_rate: RequestRate,
    /// Seconds without a byte after which a request has failed
    #[arg(long, default_value = "600", value_name = "SECONDS")]
    pub read_timeout: NonZeroU32,

    /// Prompt tokens of each request, beside the shared prefix
    #[arg(long, default_value = "1024", value_name = "TOKENS")]
    pub random_input_len: NonZeroU32,
    /// Output tokens of each request
    #[arg(long, default_value = "128", value_name = "TOKENS")]
    pub random_output_len: NonZeroU32,
    /// Lengths are drawn from length × (1 − ratio) to length × (1 + ratio); from 0, below 1
    #[arg(long, default_value = "0", value_name = "RATIO", value_parser = range_ratio)]
    pub random_range_ratio: f64,
    /// Tokens that all prompts begin with
    #[arg(long, default_value = "0", value_name = "TOKENS")]
    pub random_prefix_len: u32,
    /// Draw token ids below this; default: the tokens of a text that the server's /tokenize gives
    #[arg(long, value_name = "TOKENS")]
    pub random_vocab_size: Option<NonZeroU32>,
    /// Seed of prompts and arrival times
    #[arg(long, default_value = "0")]
    pub seed: u64,
    /// Choices of each request
    #[arg(long, default_value = "1", value_name = "N")]
    pub n: NonZeroU32,
    /// Temperature of each request
    #[arg(long, default_value = "0", value_name = "T")]
    pub temperature: f64,
    /// Generate all output tokens, end tokens or not
    #[arg(long)]
    pub ignore_eos: bool,

    /// Latencies to report
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "ttft,tpot,itl,e2el",
        value_name = "METRICS"
    )]
    pub percentile_metrics: Vec<Metric>,
    /// Percentiles to report
    #[arg(long, value_delimiter = ',', default_value = "99", value_name = "PERCENTILES")]
    pub metric_percentiles: Vec<Percentile>,
    /// Count requests within these latencies in milliseconds: ttft:500 tpot:50 e2el:5000
    #[arg(long, num_args = 1.., value_name = "METRIC:MS")]
    pub goodput: Vec<Objective>,
    /// Write the figures as JSON to this file; - writes them to stdout instead of the table
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error("--base-url wants a URL that starts with http:// or https://, got {0:?}")]
    BaseUrl(String),
    #[error("the server at {0} lists no model: is it running? --model names one without asking")]
    NoModel(String),
    #[error("the server does not tokenize; --random-vocab-size tells which token ids exist")]
    NoTokens,
    #[error(
        "the server does not detokenize, so prompts for a chat cannot be made: use --endpoint-type openai"
    )]
    NoText,
    #[error("make the client: {0}")]
    Client(reqwest::Error),
    #[error("write {}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
}

/// Whether any request ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Measured,
    AllFailed,
}

fn range_ratio(text: &str) -> Result<f64, String> {
    let ratio = text.parse::<f64>().ok().filter(|ratio| (0.0..1.0).contains(ratio));
    ratio.ok_or_else(|| format!("wanted a ratio from 0, below 1, got {text:?}"))
}

/// Sends the load and writes what it showed: a table to `out`, or JSON where that was asked for.
///
/// # Errors
/// When the load cannot be made or the figures cannot be written; failed requests are counted instead.
pub async fn run(arguments: &BenchServeArgs, out: &mut impl Write) -> Result<Verdict, BenchError> {
    let target = target(arguments).await?;
    let mut random = Random::new(arguments.seed);
    let vocabulary = vocabulary(arguments, &target).await?;
    let lengths = Lengths {
        prefix: arguments.random_prefix_len,
        prompt: arguments.random_input_len.get(),
        output: arguments.random_output_len.get(),
        range_ratio: arguments.random_range_ratio,
    };
    let prompts = prompts(arguments.num_prompts.get(), lengths, &vocabulary, &mut random);
    let prompts = with_text(prompts, &target).await?;
    let times = arrivals(arguments.request_rate, prompts.len(), &mut random);
    let outcome = send_all(arguments, target.clone(), prompts, times).await;
    let wanted = Wanted {
        metrics: arguments.percentile_metrics.clone(),
        percentiles: arguments.metric_percentiles.clone(),
        objectives: arguments.goodput.clone(),
    };
    let mut figures = settings(arguments, &target.model);
    let measured = outcome.figures(&wanted);
    write_out(arguments.json.as_deref(), &mut figures, measured, out)?;
    Ok(if outcome.completed() > 0 { Verdict::Measured } else { Verdict::AllFailed })
}

async fn target(arguments: &BenchServeArgs) -> Result<Target, BenchError> {
    let base_url = arguments.base_url.trim_end_matches('/').to_owned();
    if !base_url.starts_with("http://") && !base_url.starts_with("https://") {
        return Err(BenchError::BaseUrl(base_url));
    }
    let client = reqwest::Client::builder()
        .read_timeout(Duration::from_secs(u64::from(arguments.read_timeout.get())))
        .connect_timeout(Duration::from_secs(10))
        .build()
        .map_err(BenchError::Client)?;
    let mut target = Target {
        client,
        path: arguments
            .endpoint
            .clone()
            .unwrap_or_else(|| arguments.endpoint_type.path().to_owned()),
        endpoint_type: arguments.endpoint_type,
        model: String::new(),
        api_key: arguments.api_key.clone(),
        shared: shared_fields(arguments),
        base_url,
    };
    target.model = match &arguments.model {
        Some(model) => model.clone(),
        None => match target.models().await.into_iter().next() {
            Some(first) => first,
            None => return Err(BenchError::NoModel(target.base_url)),
        },
    };
    Ok(target)
}

/// Fields of every request; those that not every server knows are sent only where asked for.
fn shared_fields(arguments: &BenchServeArgs) -> Map<String, Value> {
    let mut shared = Map::new();
    shared.insert("temperature".into(), json!(arguments.temperature));
    if arguments.n.get() > 1 {
        shared.insert("n".into(), json!(arguments.n));
    }
    if arguments.ignore_eos {
        shared.insert("ignore_eos".into(), json!(true));
    }
    shared
}

async fn vocabulary(arguments: &BenchServeArgs, target: &Target) -> Result<Vocabulary, BenchError> {
    if let Some(size) = arguments.random_vocab_size {
        return Ok(Vocabulary::Below(size.get()));
    }
    let body = json!({"model": target.model, "prompt": ORDINARY_TEXT, "add_special_tokens": false});
    let answer = target.ask("/tokenize", &body).await.ok_or(BenchError::NoTokens)?;
    let tokens = answer["tokens"].as_array().into_iter().flatten();
    let ids: Vec<u32> = tokens.filter_map(|token| u32::try_from(token.as_u64()?).ok()).collect();
    if ids.is_empty() { Err(BenchError::NoTokens) } else { Ok(Vocabulary::Known(ids)) }
}

/// A prompt and, for a chat, its text.
type Worded = (Prompt, Option<String>);

/// A chat takes no token ids, so the server is asked for their text before the clock starts.
async fn with_text(prompts: Vec<Prompt>, target: &Target) -> Result<Vec<Worded>, BenchError> {
    let mut worded = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let text = match target.endpoint_type {
            EndpointType::Completions => None,
            EndpointType::Chat => {
                let body = json!({"model": target.model, "tokens": prompt.tokens});
                let answer = target.ask("/detokenize", &body).await.ok_or(BenchError::NoText)?;
                Some(answer["prompt"].as_str().ok_or(BenchError::NoText)?.to_owned())
            }
        };
        worded.push((prompt, text));
    }
    Ok(worded)
}

async fn send_all(
    arguments: &BenchServeArgs,
    target: Target,
    prompts: Vec<Worded>,
    times: Vec<Duration>,
) -> Outcome {
    let target = Arc::new(target);
    let limit = arguments.max_concurrency.map_or(Semaphore::MAX_PERMITS, NonZeroUsize::get);
    let permits = Arc::new(Semaphore::new(limit.min(Semaphore::MAX_PERMITS)));
    let bar = progress_bar(prompts.len() as u64);
    let count = prompts.len();
    let started = Instant::now();
    let mut tasks: JoinSet<Result<Measured, Failure>> = JoinSet::new();
    for ((prompt, text), time) in prompts.into_iter().zip(times) {
        let (target, permits) = (Arc::clone(&target), Arc::clone(&permits));
        tasks.spawn(async move {
            tokio::time::sleep_until(started + time).await;
            let _permit = permits.acquire_owned().await.map_err(|_| Failure::Lost)?;
            target.send(&prompt, text.as_deref()).await
        });
    }
    let mut results = Vec::with_capacity(count);
    while let Some(result) = tasks.join_next().await {
        results.push(result.unwrap_or(Err(Failure::Lost)));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Outcome { results, duration: started.elapsed(), choices: arguments.n.get() }
}

/// On stderr, and only where that is a terminal.
fn progress_bar(count: u64) -> ProgressBar {
    let bar = ProgressBar::new(count);
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} requests {elapsed}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

fn settings(arguments: &BenchServeArgs, model: &str) -> Map<String, Value> {
    let mut settings = Map::new();
    let mut put = |name: &str, value: Value| settings.insert(name.to_owned(), value);
    put("model", json!(model));
    put("num_prompts", json!(arguments.num_prompts));
    put("request_rate", json!(arguments.request_rate.to_string()));
    put("max_concurrency", json!(arguments.max_concurrency));
    put("random_input_len", json!(arguments.random_input_len));
    put("random_output_len", json!(arguments.random_output_len));
    put("random_prefix_len", json!(arguments.random_prefix_len));
    put("random_range_ratio", json!(arguments.random_range_ratio));
    put("n", json!(arguments.n));
    put("seed", json!(arguments.seed));
    settings
}

fn write_out(
    json_path: Option<&Path>,
    settings: &mut Map<String, Value>,
    measured: Map<String, Value>,
    out: &mut impl Write,
) -> Result<(), BenchError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| BenchError::Write { path, source }
    };
    let stdout = Path::new("-");
    if json_path != Some(stdout) {
        write_table(&measured, out).map_err(failed(stdout))?;
    }
    let Some(path) = json_path else { return Ok(()) };
    settings.extend(measured);
    let text = format!("{:#}\n", Value::Object(std::mem::take(settings)));
    if path == stdout {
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(failed(path))
    } else {
        std::fs::write(path, text).map_err(failed(path))
    }
}

#[cfg(test)]
mod tests;
