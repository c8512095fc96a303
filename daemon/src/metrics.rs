//! Names, units and help of every metric. Copies figures that others computed; decides nothing.
//!
//! `vllm:` names, labels and buckets are vLLM's, so that its dashboards, autoscaler recipes and routers work unchanged;
//! `bindery_` ones say what those cannot.

mod process;

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Encoder, Error, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter,
    IntCounterVec, Opts, Registry, TextEncoder,
};

use crate::engine::stats::{BlockStats, ChoiceStats, Record, StepStats};
use crate::request::FinishReason;

const TTFT: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const PER_TOKEN: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
const REQUEST: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
const STEP_TOKENS: [f64; 13] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const STEP_SECONDS: [f64; 14] =
    [0.00005, 0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0];
const CHOICES: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

/// The labels of `vllm:cache_config_info`.
#[derive(Debug, Clone, PartialEq)]
pub struct CacheConfig {
    pub block_size: u32,
    pub num_gpu_blocks: u32,
    pub cache_dtype: String,
    pub gpu_memory_utilization: String,
    pub enable_prefix_caching: bool,
}

/// Memory by what it is for, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    pub weights: u64,
    pub kv: u64,
    pub workspace: u64,
    pub other: u64,
}

/// Every metric of the process. Children are resolved here, so that recording allocates nothing.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    gauges: Gauges,
    tokens: Tokens,
    latency: Latency,
    lengths: Lengths,
    ends: [IntCounter; 4],
    rejections: IntCounterVec,
    native: Native,
    http: Http,
    /// Requests of clients that began: for the agent, not shown.
    begun: AtomicU64,
    cache_config: GaugeVec,
}

#[derive(Debug)]
struct Gauges {
    running: Gauge,
    waiting: Gauge,
    waiting_for_capacity: Gauge,
    kv_usage: Gauge,
}

#[derive(Debug)]
struct Tokens {
    prompt: IntCounter,
    computed: IntCounter,
    hit: IntCounter,
    cached: IntCounter,
    cached_on_device: IntCounter,
    generated: IntCounter,
    preemptions: IntCounter,
    queries: IntCounter,
    hits: IntCounter,
}

#[derive(Debug)]
struct Latency {
    first_token: Histogram,
    inter_token: Histogram,
    per_output_token: Histogram,
    whole: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
}

#[derive(Debug)]
struct Lengths {
    prompt: Histogram,
    generation: Histogram,
    most_generation: Histogram,
    max_tokens: Histogram,
    prefill_computed: Histogram,
    choices: Histogram,
    step: Histogram,
}

#[derive(Debug)]
struct Blocks {
    used: Gauge,
    shared: Gauge,
    cached: Gauge,
    free: Gauge,
    saved: Gauge,
    filled_slots: Gauge,
    allocated_slots: Gauge,
    occupancy: Gauge,
}

#[derive(Debug)]
struct Native {
    blocks: Blocks,
    forked: IntCounter,
    copied_slots: IntCounter,
    preemptions: IntCounter,
    recomputed: IntCounter,
    discarded: IntCounter,
    host: Histogram,
    backend: Histogram,
    silence: Gauge,
    memory: GaugeVec,
    stages: GaugeVec,
    stalled: IntCounter,
    dropped: IntCounter,
    accepted: IntCounter,
}

#[derive(Debug)]
struct Http {
    requests: IntCounterVec,
    seconds: HistogramVec,
    fine_seconds: Histogram,
}

/// Makes and registers metrics with the labels that all of vLLM's carry.
struct Maker<'a> {
    registry: &'a Registry,
    model_name: &'a str,
}

impl Maker<'_> {
    fn register<C: Collector + Clone + Debug + 'static>(&self, metric: C) -> Result<C, Error> {
        self.registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn vllm(&self, name: &str, help: &str) -> Opts {
        Opts::new(format!("vllm:{name}"), help)
            .const_label("model_name", self.model_name)
            .const_label("engine", "0")
    }

    fn gauge(&self, opts: Opts) -> Result<Gauge, Error> {
        self.register(Gauge::with_opts(opts)?)
    }

    fn counter(&self, opts: Opts) -> Result<IntCounter, Error> {
        self.register(IntCounter::with_opts(opts)?)
    }

    fn counters(&self, opts: Opts, labels: &[&str]) -> Result<IntCounterVec, Error> {
        self.register(IntCounterVec::new(opts, labels)?)
    }

    fn gauges(&self, opts: Opts, labels: &[&str]) -> Result<GaugeVec, Error> {
        self.register(GaugeVec::new(opts, labels)?)
    }

    fn histogram(&self, opts: Opts, buckets: &[f64]) -> Result<Histogram, Error> {
        self.register(Histogram::with_opts(HistogramOpts {
            common_opts: opts,
            buckets: buckets.to_vec(),
        })?)
    }
}

/// vLLM's buckets for counts of tokens: 1, 2, 5, 10, 20, 50 ... up to a million.
fn token_buckets() -> Vec<f64> {
    let decades = [1.0, 10.0, 100.0, 1e3, 1e4, 1e5];
    decades
        .iter()
        .flat_map(|decade| [1.0, 2.0, 5.0].map(|step| step * decade))
        .chain([1e6])
        .collect()
}

/// The method as a label. A client may invent methods, and each would be a series that never goes away.
fn known_method(method: &str) -> &str {
    match method {
        "GET" | "HEAD" | "POST" | "PUT" | "DELETE" | "CONNECT" | "OPTIONS" | "TRACE" | "PATCH" => {
            method
        }
        _ => "other",
    }
}

impl Metrics {
    /// Registers everything, before the model is loaded.
    ///
    /// # Errors
    /// When a name or label is not one that Prometheus takes.
    pub fn new(model_name: &str) -> Result<Self, Error> {
        let registry = Registry::new();
        let make = Maker { registry: &registry, model_name };
        let ends = make.counters(
            make.vllm("request_success_total", "Choices of requests that ended, by how."),
            &["finished_reason"],
        )?;
        let sleep = make.gauges(
            make.vllm("engine_sleep_state", "1 for the state the engine is in."),
            &["sleep_state"],
        )?;
        for (state, value) in [("awake", 1.0), ("weights_offloaded", 0.0), ("discard_all", 0.0)] {
            sleep.with_label_values(&[state]).set(value);
        }
        let build = make.gauges(
            Opts::new("bindery_build_info", "1, labelled with the version that runs."),
            &["version"],
        )?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
        registry.register(Box::new(process::ProcessFigures::new()?))?;
        let labels = [
            "block_size",
            "num_gpu_blocks",
            "cache_dtype",
            "gpu_memory_utilization",
            "enable_prefix_caching",
            "prefix_caching_hash_algo",
            "num_cpu_blocks",
        ];
        let cache_config = make.gauges(
            make.vllm("cache_config_info", "1, labelled with the KV cache's configuration."),
            &labels,
        )?;
        let rejections = make.counters(
            make.vllm(
                "admission_rejections_total",
                "Requests refused with 429, by the limit that was full.",
            ),
            &["reason"],
        )?;
        for reason in ["max_num_queued_reqs", "max_num_queued_tokens"] {
            rejections.with_label_values(&[reason]);
        }
        Ok(Self {
            gauges: Gauges::new(&make)?,
            tokens: Tokens::new(&make)?,
            latency: Latency::new(&make)?,
            lengths: Lengths::new(&make)?,
            ends: FinishReason::ALL.map(|reason| ends.with_label_values(&[reason.label()])),
            rejections,
            native: Native::new(&make)?,
            http: Http::new(&make)?,
            begun: AtomicU64::new(0),
            cache_config,
            registry,
        })
    }

    /// A request's first token came this long after it arrived.
    pub fn first_token(&self, since_arrival: Duration) {
        self.latency.first_token.observe(since_arrival.as_secs_f64());
    }

    /// A token came this long after the one before.
    pub fn inter_token(&self, since_last: Duration) {
        self.latency.inter_token.observe(since_last.as_secs_f64());
    }

    /// A request was refused because the queue was full.
    pub fn rejected(&self, limit: &'static str) {
        self.rejections.with_label_values(&[limit]).inc();
    }

    /// What a request asked for.
    pub fn request_params(&self, n: u32, max_tokens: u32) {
        self.lengths.choices.observe(f64::from(n));
        self.lengths.max_tokens.observe(f64::from(max_tokens));
    }

    /// A route answered.
    pub fn http(&self, method: &str, status: u16, path: &str, took: Duration) {
        let method = known_method(method);
        let class = format!("{}xx", status / 100);
        self.http.requests.with_label_values(&[method, &class, path]).inc();
        self.http.seconds.with_label_values(&[method, path]).observe(took.as_secs_f64());
        self.http.fine_seconds.observe(took.as_secs_f64());
    }

    /// How long the step loop has not moved although there is work.
    pub fn set_since_progress(&self, since: Duration) {
        self.native.silence.set(since.as_secs_f64());
    }

    /// How the KV cache is made.
    pub fn set_cache_config(&self, config: &CacheConfig) {
        self.cache_config.reset();
        let labels = [
            config.block_size.to_string(),
            config.num_gpu_blocks.to_string(),
            config.cache_dtype.clone(),
            config.gpu_memory_utilization.clone(),
            if config.enable_prefix_caching { "True" } else { "False" }.to_owned(),
            "blake3".to_owned(),
            "0".to_owned(),
        ];
        self.cache_config.with_label_values(&labels.each_ref().map(String::as_str)).set(1.0);
        self.native.blocks.free.set(f64::from(config.num_gpu_blocks));
    }

    /// Where the memory is.
    pub fn set_memory(&self, memory: MemoryUse) {
        let MemoryUse { weights, kv, workspace, other } = memory;
        for (kind, bytes) in
            [("weights", weights), ("kv", kv), ("workspace", workspace), ("other", other)]
        {
            // Exact below 2^53 bytes.
            self.native.memory.with_label_values(&[kind]).set(bytes as f64);
        }
    }

    /// A stage of loading took this long.
    pub fn load_stage(&self, stage: &str, took: Duration) {
        self.native.stages.with_label_values(&[stage]).set(took.as_secs_f64());
    }

    /// A client that accepted no byte for too long was cut off.
    pub fn client_stalled(&self) {
        self.native.stalled.inc();
    }

    /// A connection was accepted.
    pub fn connection_accepted(&self) {
        self.native.accepted.inc();
    }

    /// A client's request has begun; probes and scrapes are not counted.
    pub fn request_begun(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// Such requests since the start.
    pub fn begun_requests(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    /// A running stream was cut off by the server's end.
    pub fn dropped_streams(&self, count: usize) {
        self.native.dropped.inc_by(count as u64);
    }

    /// Everything in Prometheus' text format.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "metrics cannot be written");
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    fn blocks(&self, blocks: &BlockStats) {
        let native = &self.native;
        let slots = blocks.used * blocks.block_size;
        native.blocks.used.set(blocks.used as f64);
        native.blocks.shared.set(blocks.shared as f64);
        native.blocks.cached.set(blocks.cached as f64);
        native.blocks.free.set(blocks.free as f64);
        native.blocks.saved.set(blocks.saved as f64);
        native.blocks.filled_slots.set(blocks.filled_slots as f64);
        native.blocks.allocated_slots.set(slots as f64);
        native.blocks.occupancy.set(if slots == 0 {
            1.0
        } else {
            blocks.filled_slots as f64 / slots as f64
        });
        self.gauges.kv_usage.set(blocks.used as f64 / blocks.total.max(1) as f64);
    }

    fn step(&self, stats: &StepStats) {
        self.gauges.running.set(stats.running as f64);
        self.gauges.waiting.set(stats.waiting as f64);
        self.gauges.waiting_for_capacity.set(stats.waiting as f64);
        self.blocks(&stats.blocks);
        let tokens = &self.tokens;
        let prompt_tokens = stats.prefix_queries + stats.unqueried_tokens;
        tokens.prompt.inc_by(prompt_tokens as u64);
        tokens.computed.inc_by((prompt_tokens - stats.prefix_hits.min(prompt_tokens)) as u64);
        for counter in [&tokens.hit, &tokens.cached, &tokens.cached_on_device, &tokens.hits] {
            counter.inc_by(stats.prefix_hits as u64);
        }
        tokens.queries.inc_by(stats.prefix_queries as u64);
        tokens.generated.inc_by(stats.generated_tokens as u64);
        tokens.preemptions.inc_by(stats.preemptions as u64);
        let native = &self.native;
        native.preemptions.inc_by(stats.preemptions as u64);
        native.recomputed.inc_by(stats.recomputed_tokens as u64);
        native.forked.inc_by(stats.forked_blocks as u64);
        native.copied_slots.inc_by(stats.prefix_copied_slots as u64);
        native.discarded.inc_by(stats.discarded_tokens as u64);
        native.host.observe(stats.host_time.as_secs_f64());
        native.backend.observe(stats.backend_time.as_secs_f64());
        self.lengths.step.observe((stats.prefill_tokens + stats.decode_tokens) as f64);
    }

    fn choice(&self, stats: &ChoiceStats) {
        let reason = FinishReason::ALL.iter().position(|&reason| reason == stats.reason);
        if let Some(counter) = reason.and_then(|index| self.ends.get(index)) {
            counter.inc();
        }
        self.lengths.prompt.observe(stats.prompt_tokens as f64);
        self.lengths.generation.observe(stats.output_tokens as f64);
        self.lengths.most_generation.observe(stats.max_tokens as f64);
        self.lengths
            .prefill_computed
            .observe((stats.prompt_tokens - stats.cached_tokens.min(stats.prompt_tokens)) as f64);
        let latency = &self.latency;
        latency.whole.observe(stats.finished.as_secs_f64());
        let Some(admitted) = stats.admitted else { return };
        latency.queue.observe(admitted.as_secs_f64());
        latency.inference.observe(stats.finished.saturating_sub(admitted).as_secs_f64());
        let Some(first) = stats.first_token else { return };
        latency.prefill.observe(first.saturating_sub(admitted).as_secs_f64());
        let decode = stats.finished.saturating_sub(first).as_secs_f64();
        latency.decode.observe(decode);
        if stats.output_tokens > 1 {
            latency.per_output_token.observe(decode / (stats.output_tokens - 1) as f64);
        }
    }
}

/// Records what the engine did.
#[derive(Debug, Clone)]
pub struct Recorder(pub Arc<Metrics>);

impl Record for Recorder {
    fn step(&mut self, stats: &StepStats) {
        self.0.step(stats);
    }

    fn choice(&mut self, stats: &ChoiceStats) {
        self.0.choice(stats);
    }

    fn idle(&mut self, blocks: &BlockStats) {
        self.0.gauges.running.set(0.0);
        self.0.gauges.waiting.set(0.0);
        self.0.gauges.waiting_for_capacity.set(0.0);
        self.0.blocks(blocks);
    }
}

impl Gauges {
    fn new(make: &Maker<'_>) -> Result<Self, Error> {
        let reasons = make.gauges(
            make.vllm(
                "num_requests_waiting_by_reason",
                "Sequences without KV memory, by what they wait for.",
            ),
            &["reason"],
        )?;
        reasons.with_label_values(&["deferred"]).set(0.0);
        Ok(Self {
            running: make
                .gauge(make.vllm("num_requests_running", "Sequences that hold KV memory."))?,
            waiting: make
                .gauge(make.vllm("num_requests_waiting", "Sequences that wait for KV memory."))?,
            waiting_for_capacity: reasons.with_label_values(&["capacity"]),
            kv_usage: make
                .gauge(make.vllm("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1."))?,
        })
    }
}

impl Tokens {
    fn new(make: &Maker<'_>) -> Result<Self, Error> {
        let sources = make.counters(
            make.vllm(
                "prompt_tokens_by_source_total",
                "Prompt tokens by where their KV came from.",
            ),
            &["source"],
        )?;
        sources.with_label_values(&["external_kv_transfer"]);
        let places = make.counters(
            make.vllm(
                "prompt_tokens_cached_by_source_total",
                "Prompt tokens found cached, by the cache's place.",
            ),
            &["source"],
        )?;
        Ok(Self {
            prompt: make.counter(make.vllm(
                "prompt_tokens_total",
                "Prompt tokens of admitted requests, cached ones included.",
            ))?,
            computed: sources.with_label_values(&["local_compute"]),
            hit: sources.with_label_values(&["local_cache_hit"]),
            cached: make.counter(make.vllm(
                "prompt_tokens_cached_total",
                "Prompt tokens that were not computed again.",
            ))?,
            cached_on_device: places.with_label_values(&["device"]),
            generated: make.counter(make.vllm("generation_tokens_total", "Tokens generated."))?,
            preemptions: make.counter(
                make.vllm("num_preemptions_total", "Sequences that gave their KV memory back."),
            )?,
            queries: make.counter(
                make.vllm("prefix_cache_queries_total", "Tokens looked up in the prefix cache."),
            )?,
            hits: make.counter(
                make.vllm("prefix_cache_hits_total", "Tokens found in the prefix cache."),
            )?,
        })
    }
}

impl Latency {
    fn new(make: &Maker<'_>) -> Result<Self, Error> {
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            make.histogram(make.vllm(name, help), buckets)
        };
        Ok(Self {
            first_token: histogram(
                "time_to_first_token_seconds",
                "From arrival to the first token.",
                &TTFT,
            )?,
            inter_token: histogram(
                "inter_token_latency_seconds",
                "Between two tokens of a choice.",
                &PER_TOKEN,
            )?,
            per_output_token: histogram(
                "request_time_per_output_token_seconds",
                "Mean time between tokens of a choice.",
                &PER_TOKEN,
            )?,
            whole: histogram("e2e_request_latency_seconds", "From arrival to the end.", &REQUEST)?,
            queue: histogram(
                "request_queue_time_seconds",
                "From arrival to the first KV memory.",
                &REQUEST,
            )?,
            prefill: histogram(
                "request_prefill_time_seconds",
                "From the first KV memory to the first token.",
                &REQUEST,
            )?,
            decode: histogram(
                "request_decode_time_seconds",
                "From the first token to the end.",
                &REQUEST,
            )?,
            inference: histogram(
                "request_inference_time_seconds",
                "From the first KV memory to the end.",
                &REQUEST,
            )?,
        })
    }
}

impl Lengths {
    fn new(make: &Maker<'_>) -> Result<Self, Error> {
        let buckets = token_buckets();
        let tokens = |name: &str, help: &str| make.histogram(make.vllm(name, help), &buckets);
        Ok(Self {
            prompt: tokens("request_prompt_tokens", "Prompt tokens of a choice's request.")?,
            generation: tokens("request_generation_tokens", "Output tokens of a choice.")?,
            most_generation: tokens(
                "request_max_num_generation_tokens",
                "Most output tokens that a choice might have had.",
            )?,
            max_tokens: tokens(
                "request_params_max_tokens",
                "The max_tokens that requests ask for.",
            )?,
            prefill_computed: tokens(
                "request_prefill_kv_computed_tokens",
                "Prompt tokens computed, without cached ones.",
            )?,
            choices: make.histogram(
                make.vllm("request_params_n", "The n that requests ask for."),
                &CHOICES,
            )?,
            step: make.histogram(
                make.vllm("iteration_tokens_total", "Tokens that a step computes."),
                &STEP_TOKENS,
            )?,
        })
    }
}

impl Blocks {
    fn new(make: &Maker<'_>) -> Result<Self, Error> {
        let blocks = make.gauges(
            Opts::new(
                "bindery_blocks",
                "KV blocks by state; used + cached + free is the pool, shared is part of used.",
            ),
            &["state"],
        )?;
        let slots = make.gauges(
            Opts::new(
                "bindery_token_slots",
                "Token slots of used KV blocks: allocated, and filled with a token.",
            ),
            &["state"],
        )?;
        Ok(Self {
            used: blocks.with_label_values(&["used"]),
            shared: blocks.with_label_values(&["shared"]),
            cached: blocks.with_label_values(&["cached"]),
            free: blocks.with_label_values(&["free"]),
            saved: make
                .gauge(Opts::new("bindery_blocks_saved", "KV blocks that sharing saves now."))?,
            filled_slots: slots.with_label_values(&["filled"]),
            allocated_slots: slots.with_label_values(&["allocated"]),
            occupancy: make.gauge(Opts::new(
                "bindery_token_slot_occupancy_ratio",
                "Filled share of the allocated token slots: 1 minus the true fragmentation.",
            ))?,
        })
    }
}

impl Native {
    fn new(make: &Maker<'_>) -> Result<Self, Error> {
        let by_reason = |name: &str, help: &str| make.counters(Opts::new(name, help), &["reason"]);
        let counter = |name: &str, help: &str| make.counter(Opts::new(name, help));
        let seconds = |name: &str, help: &str| make.histogram(Opts::new(name, help), &STEP_SECONDS);
        Ok(Self {
            blocks: Blocks::new(make)?,
            forked: counter(
                "bindery_forked_blocks_total",
                "KV blocks copied because a shared one was written.",
            )?,
            copied_slots: counter(
                "bindery_prefix_copied_slots_total",
                "Token slots copied from the beginning of cached blocks instead of being computed.",
            )?,
            preemptions: by_reason("bindery_preemptions_total", "Preempted sequences by reason.")?
                .with_label_values(&["memory"]),
            recomputed: by_reason(
                "bindery_recomputed_tokens_total",
                "Tokens computed again by the reason they were lost for.",
            )?
            .with_label_values(&["memory"]),
            discarded: counter(
                "bindery_discarded_tokens_total",
                "Tokens drawn for sequences that had ended.",
            )?,
            host: seconds(
                "bindery_step_host_seconds",
                "Scheduling, committing and delivering a step.",
            )?,
            backend: seconds("bindery_step_backend_seconds", "Computing a step.")?,
            silence: make.gauge(Opts::new(
                "bindery_since_last_step_seconds",
                "How long the step loop has not moved although there is work.",
            ))?,
            memory: make.gauges(
                Opts::new("bindery_memory_bytes", "Memory by what it is for."),
                &["kind"],
            )?,
            stages: make.gauges(
                Opts::new("bindery_load_stage_seconds", "How long each stage of loading took."),
                &["stage"],
            )?,
            stalled: counter(
                "bindery_stalled_clients_total",
                "Clients cut off because they accepted no byte for too long.",
            )?,
            accepted: counter("bindery_accepted_connections_total", "Connections accepted.")?,
            dropped: counter(
                "bindery_dropped_streams_total",
                "Answers cut off because the server ended.",
            )?,
        })
    }
}

impl Http {
    fn new(make: &Maker<'_>) -> Result<Self, Error> {
        let labels = ["method", "handler"];
        let opts = Opts::new(
            "http_request_duration_seconds",
            "From a request's head to the head of its answer.",
        );
        let seconds = HistogramVec::new(
            HistogramOpts { common_opts: opts, buckets: vec![0.1, 0.5, 1.0] },
            &labels,
        )?;
        let fine = [
            0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5,
            5.0, 7.5, 10.0, 30.0, 60.0,
        ];
        Ok(Self {
            requests: make.counters(
                Opts::new("http_requests_total", "Answers by method, class of status and route."),
                &["method", "status", "handler"],
            )?,
            seconds: make.register(seconds)?,
            fine_seconds: make.histogram(
                Opts::new(
                    "http_request_duration_highr_seconds",
                    "As http_request_duration_seconds, over all routes, finer.",
                ),
                &fine,
            )?,
        })
    }
}

#[cfg(test)]
mod tests;
