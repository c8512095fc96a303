//! `bindery bench sweep`: which `--max-num-seqs` and how much KV memory suit a model on this machine.

use std::io::Write;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::load::random::Random;
use super::model::{BenchModel, NamedModel, TINY_VOCABULARY};
use super::percentile::{Percentile, milliseconds, sorted};
use super::stepped::{Answer, Ask, AskKind, Room};
use super::table::{Cell, Table, write_json};
use crate::config::ByteSize;
use crate::request::TokenId;
use crate::scheduler::PrefixCaching;
use crate::source::Location;

/// What to try.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchSweepArgs {
    /// A GGUF file, a folder in Hugging Face layout, or hf://org/name[@revision][/file.gguf]; default: made-up weights, two layers of SmolLM2-135M's shape
    pub model: Option<Location>,
    /// Values of --max-num-seqs to try
    #[arg(long, value_delimiter = ',', default_value = "4,16,64", value_name = "N")]
    pub max_num_seqs: Vec<NonZeroU32>,
    /// Sizes of the KV cache to try, such as 64MiB; default: a quarter, a half and all of what the requests fill at the largest --max-num-seqs
    #[arg(long, value_delimiter = ',', value_name = "BYTES")]
    pub kv_cache_memory_bytes: Vec<ByteSize>,
    /// Tokens per KV block
    #[arg(long, default_value = "16", value_name = "TOKENS")]
    pub block_size: NonZeroU32,
    /// Most tokens in one step
    #[arg(long, default_value = "128", value_name = "TOKENS")]
    pub max_num_batched_tokens: NonZeroU32,
    /// Requests of each run, all sent at once
    #[arg(long, default_value = "64", value_name = "N")]
    pub num_prompts: NonZeroUsize,
    /// Prompt tokens of each request
    #[arg(long, default_value = "128", value_name = "TOKENS")]
    pub random_input_len: NonZeroU32,
    /// Output tokens of each request
    #[arg(long, default_value = "128", value_name = "TOKENS")]
    pub random_output_len: NonZeroU32,
    /// Seed of the prompts
    #[arg(long, default_value = "0")]
    pub seed: u64,
    /// Threads that compute; default: the cores this process may use
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// Also write the table as JSON to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What one run showed.
#[derive(Debug, Default)]
struct Ran {
    answers: Vec<Answer>,
    tokens: usize,
    preemptions: usize,
    recomputed_tokens: usize,
    seconds: f64,
}

/// Runs every pair and writes the table to `out`, and as JSON where that was asked for.
///
/// # Errors
/// When the model is refused, a memory is too small for one request, or a file cannot be written.
pub async fn run(
    arguments: &BenchSweepArgs,
    model: Option<&NamedModel>,
    out: &mut impl Write,
) -> Result<()> {
    let model = match model {
        Some(model) => model.open(arguments.threads).await?,
        None => BenchModel::two_layers(TINY_VOCABULARY, arguments.threads)?,
    };
    let table = sweep(arguments, &model)?;
    table.write(out).context("write the table")?;
    match &arguments.json {
        Some(path) => write_json(path, Some(&model.name), arguments.seed, &[table]),
        None => Ok(()),
    }
}

fn sweep(arguments: &BenchSweepArgs, model: &BenchModel) -> Result<Table> {
    let columns = [
        "max-num-seqs",
        "KV memory, MiB",
        "blocks",
        "tok/s",
        "TTFT p99, ms",
        "ITL p99, ms",
        "preemptions",
        "tokens computed again",
    ];
    let mut table = Table::new("Sweep", columns);
    table.note(format!(
        "{}: {} requests at once, {} in, {} out, blocks of {}.",
        model.name,
        arguments.num_prompts,
        arguments.random_input_len,
        arguments.random_output_len,
        arguments.block_size
    ));
    let asks = arguments.asks(model.vocabulary()?);
    let block_bytes = model.kv_bytes_per_token()? as u64 * u64::from(arguments.block_size.get());
    for &max_num_seqs in &arguments.max_num_seqs {
        for blocks in arguments.block_counts(block_bytes)? {
            eprintln!("measuring {max_num_seqs} sequences in {blocks} blocks ...");
            let ran = arguments.try_one(model, &asks, max_num_seqs, blocks)?;
            let mib = (u64::from(blocks) + 1) as f64 * block_bytes as f64 / f64::from(1 << 20);
            let mut row = vec![Cell::Count(max_num_seqs.get() as usize), Cell::Real(mib, 1)];
            row.push(Cell::Count(blocks as usize));
            row.extend(ran.cells());
            table.push(row);
        }
    }
    Ok(table)
}

impl BenchSweepArgs {
    fn asks(&self, vocabulary: u32) -> Vec<Ask> {
        let mut random = Random::new(self.seed);
        let mut prompt = || {
            let token = |_| TokenId(random.between(0, vocabulary - 1));
            (0..self.random_input_len.get()).map(token).collect()
        };
        let kind = AskKind::Choices(NonZeroU32::MIN);
        let output_tokens = self.random_output_len.get();
        let ask = |user| Ask { user, prompt: prompt(), output_tokens, kind };
        (0..self.num_prompts.get()).map(ask).collect()
    }

    /// Blocks that each memory makes beside the null block.
    fn block_counts(&self, block_bytes: u64) -> Result<Vec<u32>> {
        let per_request = u64::from(self.random_input_len.get() + self.random_output_len.get() - 1)
            .div_ceil(self.block_size.get().into());
        let most = self.max_num_seqs.iter().map(|most| u64::from(most.get())).max();
        let together = most.unwrap_or(1).min(self.num_prompts.get() as u64);
        let counts: Vec<u64> = match self.kv_cache_memory_bytes.as_slice() {
            [] => [4, 2, 1]
                .map(|part| (per_request * together).div_ceil(part).max(per_request))
                .to_vec(),
            sizes => sizes
                .iter()
                .map(|bytes| (bytes.bytes().get() / block_bytes).saturating_sub(1))
                .collect(),
        };
        let checked = |blocks: u64| {
            ensure!(
                blocks >= per_request,
                "a memory makes {blocks} blocks, one request needs {per_request}"
            );
            u32::try_from(blocks).context("count the blocks")
        };
        counts.into_iter().map(checked).collect()
    }

    fn try_one(
        &self,
        model: &BenchModel,
        asks: &[Ask],
        max_num_seqs: NonZeroU32,
        blocks: u32,
    ) -> Result<Ran> {
        let budget = self.max_num_batched_tokens.max(max_num_seqs).get();
        let mut engine = model.engine(Room {
            block_size: self.block_size,
            blocks,
            max_num_seqs: max_num_seqs.get(),
            max_num_batched_tokens: budget as usize,
            prefix_caching: PrefixCaching::Enabled,
        })?;
        let started = Instant::now();
        asks.iter().try_for_each(|ask| engine.ask(ask))?;
        let mut ran = Ran::default();
        while let Some(step) = engine.step()? {
            ran.tokens += step.stats.generated_tokens;
            ran.preemptions += step.stats.preemptions;
            ran.recomputed_tokens += step.stats.recomputed_tokens;
            ran.answers.extend(step.ended);
        }
        ran.seconds = started.elapsed().as_secs_f64();
        Ok(ran)
    }
}

impl Ran {
    fn cells(&self) -> [Cell; 5] {
        let ttfts = sorted(milliseconds(self.answers.iter().map(|answer| answer.ttft)));
        let gaps = self.answers.iter().flat_map(|answer| answer.gaps.iter().copied());
        let gaps = sorted(milliseconds(gaps));
        [
            Cell::Real(self.tokens as f64 / self.seconds, 0),
            Cell::milliseconds(Percentile::P99.of(&ttfts)),
            Cell::milliseconds(Percentile::P99.of(&gaps)),
            Cell::Count(self.preemptions),
            Cell::Count(self.recomputed_tokens),
        ]
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        arguments: BenchSweepArgs,
    }

    fn arguments(line: &str) -> BenchSweepArgs {
        Line::parse_from(std::iter::once("bench").chain(line.split_whitespace())).arguments
    }

    #[test]
    fn memories_follow_from_the_requests_unless_they_are_stated() {
        // 255 tokens of each of 64 requests, in blocks of 16.
        assert_eq!(arguments("").block_counts(1024).unwrap(), [256, 512, 1024]);
        let stated = arguments("--kv-cache-memory-bytes 64KiB,1MiB").block_counts(1024).unwrap();
        assert_eq!(stated, [63, 1023]);
        let error = arguments("--kv-cache-memory-bytes 16KiB").block_counts(1024).unwrap_err();
        assert!(error.to_string().contains("15 blocks, one request needs 16"), "{error}");
    }

    #[tokio::test]
    async fn every_pair_is_a_row() {
        let arguments = arguments(
            "--max-num-seqs 1,2 --num-prompts 3 --random-input-len 20 --random-output-len 4 --threads 1",
        );
        let mut out = Vec::new();
        run(&arguments, None, &mut out).await.unwrap();
        let out = String::from_utf8(out).unwrap();
        assert_eq!(out.lines().filter(|line| line.starts_with("|")).count(), 2 + 2 * 3, "{out}");
    }
}
