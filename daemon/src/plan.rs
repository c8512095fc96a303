//! The memory plan: what the weights, the workspace and the KV blocks take, computed and never measured by trial.

use std::num::NonZeroU64;

use serde::Serialize;

use crate::config::{MemoryLimit, ServeConfig};
use crate::kv::{BlockSize, KvBudget, plan_blocks};

/// What the process takes beside arrays: code, tokenizer, connections and their buffers.
pub const PROCESS_OVERHEAD_BYTES: u64 = 96 << 20;
/// The default of the KV arena is at most this and [`DEFAULT_SHARE_PERCENT`] of what is free.
const DEFAULT_KV_BYTES: u64 = 4 << 30;
const DEFAULT_SHARE_PERCENT: u64 = 40;

/// What the plan needs to know of a model and of the backend that will run it. Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    pub weights: u64,
    pub workspace: u64,
    /// K and V of one token in all layers.
    pub kv_per_token: u64,
    /// Positions that the model was made for.
    pub max_position: u32,
    /// Layers that attend to a window. Their blocks are held to the end all the same: windows are masks.
    pub sliding_layers: usize,
}

/// Memory of the machine, or of the cgroup that the process is in. Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    pub total: u64,
    pub free: u64,
}

/// Where every byte goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    pub weights_bytes: u64,
    pub workspace_bytes: u64,
    pub overhead_bytes: u64,
    pub kv_bytes_per_token: u64,
    pub kv_bytes_per_block: u64,
    pub block_size: u32,
    /// Blocks that hold tokens; the null block is one more.
    pub blocks: u32,
    /// Bytes of all blocks, the null block included.
    pub kv_bytes: u64,
    pub total_bytes: u64,
    pub max_model_len: u32,
    /// Whether `max_model_len` was lowered from the model's own so that one sequence fits.
    pub max_model_len_lowered: bool,
    /// Sequences of `max_model_len` tokens that fit at once.
    pub sequences_at_full_length: u32,
    pub sliding_layers: usize,
}

/// Why there is no plan. Every variant says what is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("{flag} {wanted} is more than the {limit} positions that the model was made for")]
    TooLong { flag: &'static str, wanted: u32, limit: u32 },
    /// In the grant; `parts` end with the KV blocks where their number is stated.
    #[error(
        "{parts} need {needed} bytes ({} MiB), {limit} bytes ({} MiB) are granted: {} bytes ({} MiB) are missing",
        mib(*needed), mib(*limit), needed - limit, mib(needed - limit)
    )]
    NoRoomForWeights { parts: &'static str, needed: u64, limit: u64 },
    #[error(
        "one sequence of max-model-len {len} needs {needed} KV blocks, the memory makes {blocks}: {} bytes ({} MiB) \
         are missing, or a max-model-len of at most {fits}",
        missing_bytes, mib(*missing_bytes)
    )]
    SequenceDoesNotFit { len: u32, needed: u64, blocks: u64, missing_bytes: u64, fits: u64 },
    #[error(
        "the plan takes {needed} bytes ({} MiB), this machine or its cgroup has {total} bytes ({} MiB)",
        mib(*needed), mib(*total)
    )]
    LargerThanMachine { needed: u64, total: u64 },
    #[error("the sizes overflow: {0}")]
    Overflow(&'static str),
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

impl MemoryPlan {
    /// Divides the memory by the flags.
    ///
    /// # Errors
    /// When the weights, one sequence of the stated length, or all of it together do not fit, with what is missing.
    pub fn new(config: &ServeConfig, demand: Demand, machine: Machine) -> Result<Self, PlanError> {
        let wanted = wanted_len(config, demand)?;
        let fixed = fixed_bytes(demand)?;
        let size = BlockSize(config.block_size);
        let block_bytes = demand.kv_per_token.checked_mul(u64::from(config.block_size.get()));
        let block_bytes = block_bytes.ok_or(PlanError::Overflow("bytes of a block"))?;
        let pool = match config.num_blocks_override {
            Some(blocks) => u64::from(blocks.get()),
            None => {
                let bytes = kv_bytes(config, demand, machine, fixed, wanted)?;
                blocks_in(size, demand.kv_per_token, bytes)?.saturating_sub(1)
            }
        };
        let (len, lowered) = fit_len(config, wanted, pool, block_bytes)?;
        let per_sequence = size.blocks_for(len as usize) as u64;
        let blocks = u32::try_from(pool).map_err(|_| PlanError::Overflow("blocks"))?;
        let kv_bytes = (pool + 1)
            .checked_mul(block_bytes)
            .ok_or(PlanError::Overflow("bytes of all blocks"))?;
        let needed = fixed.saturating_add(kv_bytes);
        check_total(config.memory, machine, needed)?;
        Ok(Self {
            weights_bytes: demand.weights,
            workspace_bytes: demand.workspace,
            overhead_bytes: PROCESS_OVERHEAD_BYTES,
            kv_bytes_per_token: demand.kv_per_token,
            kv_bytes_per_block: block_bytes,
            block_size: config.block_size.get(),
            blocks,
            kv_bytes,
            total_bytes: needed,
            max_model_len: len,
            max_model_len_lowered: lowered,
            sequences_at_full_length: u32::try_from(pool / per_sequence.max(1)).unwrap_or(u32::MAX),
            sliding_layers: demand.sliding_layers,
        })
    }
}

/// Bytes beside the KV blocks.
fn fixed_bytes(demand: Demand) -> Result<u64, PlanError> {
    let sum = demand.weights.checked_add(demand.workspace);
    let sum = sum.and_then(|sum| sum.checked_add(PROCESS_OVERHEAD_BYTES));
    sum.ok_or(PlanError::Overflow("weights and workspace"))
}

/// A grant is the total, whichever flag sized the KV blocks.
fn check_total(memory: MemoryLimit, machine: Machine, needed: u64) -> Result<(), PlanError> {
    if let MemoryLimit::Total(limit) = memory
        && needed > limit.get()
    {
        let parts = "weights, workspace, process and KV blocks";
        return Err(PlanError::NoRoomForWeights { parts, needed, limit: limit.get() });
    }
    // Checked here: where the kernel overcommits, as on every Kubernetes node, no allocation fails before it kills.
    if needed > machine.total {
        return Err(PlanError::LargerThanMachine { needed, total: machine.total });
    }
    Ok(())
}

fn wanted_len(config: &ServeConfig, demand: Demand) -> Result<u32, PlanError> {
    let limit = demand.max_position;
    let len = config.max_model_len.map_or(limit, |len| len.get());
    for (flag, wanted) in [("max-model-len", len), ("block-size", config.block_size.get())] {
        if wanted > limit {
            return Err(PlanError::TooLong { flag, wanted, limit });
        }
    }
    Ok(len)
}

/// Bytes for the KV blocks, the null block included.
fn kv_bytes(
    config: &ServeConfig,
    demand: Demand,
    machine: Machine,
    fixed: u64,
    len: u32,
) -> Result<u64, PlanError> {
    if let Some(bytes) = config.kv_cache_memory_bytes {
        return Ok(bytes.get());
    }
    let limit = match config.memory {
        MemoryLimit::Total(bytes) => bytes.get(),
        MemoryLimit::Utilization(share) => share_of(machine.total, share),
        MemoryLimit::Unset => {
            // Whole blocks for each sequence, and the null block.
            let size = u64::from(config.block_size.get());
            let per_sequence = u64::from(len).next_multiple_of(size);
            let all = per_sequence
                .saturating_mul(u64::from(config.max_num_seqs.get()))
                .saturating_add(size)
                .saturating_mul(demand.kv_per_token);
            return Ok(all.min(DEFAULT_KV_BYTES).min(machine.free / 100 * DEFAULT_SHARE_PERCENT));
        }
    };
    limit.checked_sub(fixed).filter(|&left| left > 0).ok_or(PlanError::NoRoomForWeights {
        parts: "weights, workspace and process",
        needed: fixed,
        limit,
    })
}

fn share_of(total: u64, share: f64) -> u64 {
    // Thousandths are as exact as a share of memory needs to be, and keep the arithmetic in integers.
    let thousandths =
        (0..=1000_u32).rev().find(|&part| f64::from(part) <= share * 1000.0).unwrap_or(0);
    total / 1000 * u64::from(thousandths)
}

fn blocks_in(block_size: BlockSize, per_token: u64, bytes: u64) -> Result<u64, PlanError> {
    let overflow = |_| PlanError::Overflow("bytes of a token");
    let bytes_per_token = usize::try_from(per_token).map_err(overflow)?;
    let bytes = usize::try_from(bytes).map_err(overflow)?;
    let blocks = plan_blocks(KvBudget { block_size, bytes_per_token, bytes });
    Ok(blocks.ok_or(PlanError::Overflow("bytes of a block"))? as u64)
}

/// The length of a sequence that fits the pool: the stated one or an error, else the model's own, lowered if it must be.
fn fit_len(
    config: &ServeConfig,
    wanted: u32,
    pool: u64,
    block_bytes: u64,
) -> Result<(u32, bool), PlanError> {
    let size = u64::from(config.block_size.get());
    let needed = u64::from(wanted).div_ceil(size);
    if needed <= pool {
        return Ok((wanted, false));
    }
    let fits = pool.saturating_mul(size);
    match u32::try_from(fits) {
        // A sequence needs a prompt token and an output token.
        Ok(fits) if config.max_model_len.is_none() && fits >= 2 => Ok((fits, true)),
        Ok(_) | Err(_) => {
            let missing_bytes = (needed - pool).saturating_mul(block_bytes);
            Err(PlanError::SequenceDoesNotFit {
                len: wanted,
                needed,
                blocks: pool,
                missing_bytes,
                fits,
            })
        }
    }
}

impl Machine {
    /// Reads the machine's memory and the limits of the cgroups that the process is in.
    pub fn of_process() -> Self {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let figure = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim_start_matches(':')
                .split_whitespace()
                .next()?
                .parse::<u64>()
                .ok()
                .map(|kib| kib << 10)
        };
        let mut machine = Self {
            total: figure("MemTotal").unwrap_or(0),
            free: figure("MemAvailable").unwrap_or(0),
        };
        for (limit, used) in cgroup_limits() {
            machine.total = machine.total.min(limit.get());
            machine.free = machine.free.min(limit.get().saturating_sub(used));
        }
        machine
    }
}

/// Limit and use of every cgroup (version 2) from the process's own to the root.
fn cgroup_limits() -> Vec<(NonZeroU64, u64)> {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::")) else {
        return Vec::new();
    };
    let folder = std::path::Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/'));
    let read = |folder: &std::path::Path, file: &str| {
        std::fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok()
    };
    let limits = folder
        .ancestors()
        .take_while(|folder| folder.starts_with("/sys/fs/cgroup"))
        .filter_map(|folder| {
            let limit = NonZeroU64::new(read(folder, "memory.max")?)?;
            Some((limit, read(folder, "memory.current").unwrap_or(0)))
        });
    limits.collect()
}

impl std::fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut line = |name: &str, bytes: u64| writeln!(f, "{name:<28}{:>12} MiB", mib(bytes));
        line("weights", self.weights_bytes)?;
        line("workspace", self.workspace_bytes)?;
        line("process", self.overhead_bytes)?;
        line("KV blocks", self.kv_bytes)?;
        line("total", self.total_bytes)?;
        let mut count =
            |name: &str, count: u64, unit: &str| writeln!(f, "{name:<28}{count:>12} {unit}");
        count("KV of a token", self.kv_bytes_per_token, "bytes")?;
        count("KV of a block", self.kv_bytes_per_block, "bytes")?;
        count("block size", self.block_size.into(), "tokens")?;
        count("blocks", self.blocks.into(), "")?;
        count("max model length", self.max_model_len.into(), "tokens")?;
        count("sequences of that length", self.sequences_at_full_length.into(), "")?;
        if self.max_model_len_lowered {
            writeln!(
                f,
                "max-model-len was lowered so that one sequence fits; state it to be refused instead"
            )?;
        }
        if self.sliding_layers > 0 {
            writeln!(
                f,
                "{} layers attend to a window; no block is freed behind it yet",
                self.sliding_layers
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
