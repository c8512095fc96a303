//! What a step costs beside the model: scheduling and committing for 256 sequences, and sampling against one read of
//! the logits. `cargo bench -p daemon --bench step`. Best of many; compare within one table only.

#![allow(clippy::print_stdout, reason = "the table is the product")]

use std::hint::black_box;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use daemon::kv::BlockSize;
use daemon::model::batch::{Batch, Draw};
use daemon::request::{Decoding, Request, RequestId, Salt, TokenId};
use daemon::sampling::Params;
use daemon::sampling::rows::Rows;
use daemon::scheduler::step::{DrawKind, Drawn, Output, RowChange, RowId, Step};
use daemon::scheduler::{Limits, PrefixCaching, Scheduler};

const SEQUENCES: u32 = 256;
const LOGIT_ROWS: usize = 64;

fn params() -> Params {
    Params {
        temperature: 0.0,
        top_k: None,
        top_p: 1.0,
        min_p: 0.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        repetition_penalty: 1.0,
        logit_bias: Vec::new(),
        seed: 1,
        prompt_index: 0,
        min_tokens: 0,
        stop_tokens: Arc::new([]),
        logprobs: None,
    }
}

fn request(id: u32, params: Params) -> Arc<Request> {
    Arc::new(Request {
        id: RequestId(u64::from(id)),
        prompt: (0..100).map(|i| TokenId(id * 100 + i)).collect(),
        decoding: Decoding::Sample { params: Arc::new(params), choices: NonZeroU32::MIN },
        max_tokens: NonZeroU32::MIN.saturating_add(2000),
        stop_tokens: Arc::new([]),
        priority: 0,
        salt: Salt::default(),
        prompt_logprobs: None,
    })
}

/// Schedules, flattens and commits steps of [`SEQUENCES`] decodes; the mean of the last 500.
fn scheduling() -> Option<Duration> {
    let limits = Limits {
        max_num_seqs: SEQUENCES,
        max_num_batched_tokens: 8192,
        block_size: BlockSize(NonZeroU32::new(16)?),
        blocks: 40_000,
        watermark_blocks: 0,
        max_attended: usize::MAX,
        prefix_caching: PrefixCaching::Enabled,
    };
    let mut scheduler = Scheduler::new(limits, [1; 32]);
    (0..SEQUENCES).for_each(|id| scheduler.submit(request(id, params())));
    let (mut step, mut batch, mut output) = (Step::default(), Batch::default(), Output::default());
    let mut spent = Duration::ZERO;
    for round in 0..600 {
        let started = Instant::now();
        scheduler.schedule(&mut step);
        batch.fill(&step, limits.block_size);
        let token = |(index, _)| Drawn::Token { token: TokenId(index), logprobs: None };
        output.drawn.extend((0..).zip(&step.draws).map(token));
        scheduler.commit(&step, &mut output);
        scheduler.take_effects().for_each(|effect| drop(black_box(effect)));
        if round >= 100 {
            spent += started.elapsed();
        }
    }
    Some(spent / 500)
}

fn best(mut work: impl FnMut()) -> Duration {
    let once = || {
        let started = Instant::now();
        work();
        started.elapsed()
    };
    std::iter::repeat_with(once).take(15).min().unwrap_or_default()
}

fn sampling(vocab: usize) {
    let logits: Vec<f32> =
        (0..LOGIT_ROWS * vocab).map(|i| (i * 7919 % 10_007) as f32 * 0.001).collect();
    let read = best(|| {
        let mut lanes = [0.0_f32; 16];
        for chunk in logits.chunks_exact(16) {
            (0..16).for_each(|i| lanes[i] += chunk[i]);
        }
        black_box(lanes);
    });
    println!(
        "{:<34}{:>12.2} ms",
        format!("one read, {LOGIT_ROWS} x {vocab}"),
        read.as_secs_f64() * 1e3
    );
    let variants = [
        ("greedy", params()),
        ("temperature", Params { temperature: 0.8, ..params() }),
        ("top-k 50", Params { temperature: 0.8, top_k: NonZeroU32::new(50), ..params() }),
        ("top-p 0.9", Params { temperature: 0.8, top_p: 0.9, ..params() }),
        ("min-p 0.05", Params { temperature: 0.8, min_p: 0.05, ..params() }),
        ("penalties", Params { frequency_penalty: 0.5, ..params() }),
        ("greedy, 20 logprobs", Params { logprobs: Some(20), ..params() }),
    ];
    for (name, params) in variants {
        let mut rows = Rows::new(LOGIT_ROWS, vocab);
        let row = |index: usize| RowId(u32::try_from(index).unwrap_or_default());
        for index in 0..LOGIT_ROWS {
            let request = request(0, params.clone());
            let history = Arc::clone(&request.prompt);
            rows.apply(&RowChange::Admit { row: row(index), request, choice: 0, history });
        }
        let draws: Vec<Draw> = (0..LOGIT_ROWS)
            .map(|index| Draw { token: index, row: row(index), kind: DrawKind::Sample })
            .collect();
        let logit_rows: Vec<usize> = (0..LOGIT_ROWS).collect();
        let mut out = Vec::new();
        let took = best(|| {
            out.clear();
            rows.draw_all(&draws, &logit_rows, &logits, &mut out);
        });
        let ratio = took.as_secs_f64() / read.as_secs_f64();
        println!("  {name:<32}{:>12.2} ms{ratio:>8.1} reads", took.as_secs_f64() * 1e3);
    }
}

fn main() {
    if let Some(step) = scheduling() {
        println!(
            "{:<34}{:>12.1} us a step",
            format!("schedule + commit, {SEQUENCES} decodes"),
            step.as_secs_f64() * 1e6
        );
    }
    [49_152, 151_936].into_iter().for_each(sampling);
}
