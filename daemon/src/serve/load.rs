//! From a model's name to an engine that can answer.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use kernels::cpu::{KvDtype, KvShape};

use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::reference::ReferenceBackend;
use crate::config::LoadFormat as ConfiguredFormat;
use crate::config::{Compute, Dtype, KvCacheDtype, MemoryLimit, ServeConfig};
use crate::engine::handle::{Handle, QueueLimits};
use crate::engine::{self, EngineConfig};
use crate::kv::BlockSize;
use crate::metrics::{CacheConfig, MemoryUse, Metrics, Recorder};
use crate::model::files::ModelFiles;
use crate::model::text::Text;
use crate::model::{LoadFormat, Opened, WeightDtype};
use crate::plan::{Demand, Machine, MemoryPlan, PROCESS_OVERHEAD_BYTES};
use crate::scheduler::{Limits, PrefixCaching};
use crate::source::hf;
use crate::source::{Downloaded, Location, Retry};
use crate::supervise::{Event, Reporter};

/// Tokens x context of one prefill chunk: 256 tokens after 4,000, fewer further on.
pub(crate) const MAX_ATTENDED: usize = 1 << 20;
/// Of 100 blocks this many stay free when a request is admitted beside others.
pub(crate) const WATERMARK_PERCENT: usize = 1;

/// A model whose engine runs.
pub(super) struct Ready {
    pub(super) handle: Handle,
    pub(super) text: Arc<Text>,
    pub(super) plan: MemoryPlan,
    pub(super) longest_token: usize,
    pub(super) fingerprint: String,
}

/// A model whose headers are read.
pub(super) struct Found {
    opened: Opened,
    kv_dtype: KvDtype,
}

/// The model's path on this machine, downloaded when it names the hub.
pub(super) async fn locate(
    config: &ServeConfig,
    report: &(dyn Fn(Downloaded) + Send + Sync),
) -> Result<PathBuf> {
    match &config.model {
        Location::Path(path) => Ok(path.clone()),
        Location::Hub(model) => Ok(hf::fetch(model, &config.hub, Retry::USUAL, report).await?),
    }
}

/// Reads and checks the model's headers.
pub(super) fn open(config: &ServeConfig, path: &Path) -> Result<Found> {
    let files = ModelFiles::find(path)?;
    let format = match config.load_format {
        ConfiguredFormat::Auto => LoadFormat::Auto,
        ConfiguredFormat::Dummy => LoadFormat::Dummy { seed: config.seed.unwrap_or(0) },
    };
    let dtype = match config.dtype {
        Dtype::Auto => WeightDtype::Auto,
        Dtype::Float16 => WeightDtype::F16,
        Dtype::BFloat16 => WeightDtype::BF16,
        Dtype::Float32 => WeightDtype::F32,
    };
    let kv_dtype = match config.kv_cache_dtype {
        KvCacheDtype::Auto | KvCacheDtype::Float16 => KvDtype::F16,
        KvCacheDtype::BFloat16 => KvDtype::BF16,
        KvCacheDtype::Float32 => KvDtype::F32,
    };
    let opened =
        Opened::open(&files, format, dtype).with_context(|| format!("open {}", path.display()))?;
    Ok(Found { opened, kv_dtype })
}

impl Found {
    /// Divides the memory.
    pub(super) fn plan(&self, config: &ServeConfig, machine: Machine) -> Result<MemoryPlan> {
        let model = self.opened.config();
        let workspace = CpuBackend::workspace_bytes(
            model,
            config.max_num_batched_tokens.get() as usize,
            config.threads,
        );
        let per_token =
            self.kv_shape(config, 0)?.bytes_per_token().context("the bytes of a token overflow")?;
        let demand = Demand {
            weights: self.opened.weight_bytes() as u64,
            workspace: workspace as u64,
            kv_per_token: per_token as u64,
            max_position: u32::try_from(model.max_position).unwrap_or(u32::MAX),
            sliding_layers: model.attention.iter().filter(|layer| layer.window().is_some()).count(),
        };
        Ok(MemoryPlan::new(config, demand, machine)?)
    }

    fn kv_shape(&self, config: &ServeConfig, blocks: u32) -> Result<KvShape> {
        let shape = self.opened.config().kv_shape(blocks, config.block_size, self.kv_dtype);
        shape.context("a size of the model does not fit 32 bits")
    }
}

/// Brings the model into memory and starts its engine.
pub(super) async fn load(
    config: ServeConfig,
    machine: Machine,
    metrics: Arc<Metrics>,
    reporter: Option<Reporter>,
) -> Result<Ready> {
    let started = Instant::now();
    let downloading = reporter.clone();
    let path = locate(&config, &move |downloaded| {
        report(downloading.as_ref(), downloaded.bytes, downloaded.total_bytes)
    })
    .await?;
    metrics.load_stage("locate", started.elapsed());
    tokio::task::spawn_blocking(move || {
        load_from(&config, &path, machine, &metrics, reporter.as_ref())
    })
    .await
    .context("load the model")?
}

fn load_from(
    config: &ServeConfig,
    path: &Path,
    machine: Machine,
    metrics: &Arc<Metrics>,
    reporter: Option<&Reporter>,
) -> Result<Ready> {
    let started = Instant::now();
    let found = open(config, path)?;
    let plan = found.plan(config, machine)?;
    metrics.load_stage("open", started.elapsed());
    let text = found.opened.text();
    let longest_token = crate::api::ask::longest_token(&text);
    let fingerprint = fingerprint(&found);
    let started = Instant::now();
    let options = CpuOptions {
        kv: found.kv_shape(config, plan.blocks.checked_add(1).context("too many blocks")?)?,
        max_tokens: config.max_num_batched_tokens.get() as usize,
        max_rows: config.max_num_seqs.get() as usize,
        threads: config.threads,
    };
    let handle = match config.compute {
        Compute::Reference => {
            start(config, &plan, ReferenceBackend::new(&found.opened, &options)?, metrics)?
        }
        Compute::Kernels => {
            let model = found.opened.config().clone();
            let weights = read_weights(found.opened, reporter)?;
            let mut backend = CpuBackend::new(model, weights, options)?;
            if matches!(config.memory, MemoryLimit::Total(_)) {
                backend.touch();
            }
            start(config, &plan, backend, metrics)?
        }
    };
    metrics.load_stage("weights", started.elapsed());
    tell_metrics(config, &plan, metrics);
    Ok(Ready { handle, text, plan, longest_token, fingerprint })
}

/// The same model and arithmetic have the same fingerprint.
fn fingerprint(found: &Found) -> String {
    let described =
        format!("{:?} {:?} {}", found.opened.config(), found.kv_dtype, found.opened.weight_bytes());
    let hash = blake3::hash(described.as_bytes()).to_hex();
    format!("bindery-{}-{}", env!("CARGO_PKG_VERSION"), &hash[..12])
}

fn read_weights(
    opened: Opened,
    reporter: Option<&Reporter>,
) -> Result<crate::model::weights::Weights> {
    let bar =
        if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("loading {wide_bar} {bytes}/{total_bytes}");
    bar.set_style(style.context("make the progress bar")?);
    let mut told = None;
    let weights = opened.load(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        // An agent needs a percentage, not every tensor.
        let percent = done.saturating_mul(100) / total.max(1);
        if told.replace(percent) != Some(percent) {
            report(reporter, done, total);
        }
    })?;
    bar.finish_and_clear();
    Ok(weights)
}

fn report(reporter: Option<&Reporter>, bytes: u64, total_bytes: u64) {
    if let Some(reporter) = reporter {
        reporter.report(Event::Loading { bytes, total_bytes });
    }
}

fn start<B: Backend + 'static>(
    config: &ServeConfig,
    plan: &MemoryPlan,
    backend: B,
    metrics: &Arc<Metrics>,
) -> Result<Handle> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).context("draw the prefix cache's key")?;
    let limits = Limits {
        max_num_seqs: config.max_num_seqs.get(),
        max_num_batched_tokens: config.max_num_batched_tokens.get() as usize,
        block_size: BlockSize(config.block_size),
        blocks: plan.blocks,
        watermark_blocks: plan.blocks as usize * WATERMARK_PERCENT / 100,
        max_attended: MAX_ATTENDED,
        prefix_caching: if config.prefix_cache.is_some() {
            PrefixCaching::Enabled
        } else {
            PrefixCaching::Disabled
        },
    };
    let queue = QueueLimits { requests: config.queue.requests, tokens: config.queue.tokens };
    let engine = EngineConfig { limits, queue, max_model_len: plan.max_model_len, secret };
    let (handle, _running) = engine::start(backend, engine, Recorder(Arc::clone(metrics)))
        .context("start the engine's thread")?;
    Ok(handle)
}

fn tell_metrics(config: &ServeConfig, plan: &MemoryPlan, metrics: &Metrics) {
    metrics.set_cache_config(&CacheConfig {
        block_size: plan.block_size,
        num_gpu_blocks: plan.blocks,
        cache_dtype: format!("{:?}", config.kv_cache_dtype).to_lowercase(),
        gpu_memory_utilization: match config.memory {
            MemoryLimit::Utilization(share) => share.to_string(),
            MemoryLimit::Unset | MemoryLimit::Total(_) => "None".to_owned(),
        },
        enable_prefix_caching: config.prefix_cache.is_some(),
    });
    metrics.set_memory(MemoryUse {
        weights: plan.weights_bytes,
        kv: plan.kv_bytes,
        workspace: plan.workspace_bytes,
        other: PROCESS_OVERHEAD_BYTES,
    });
}
