//! What a step costs beside the model: scheduling and committing for 256 sequences, and sampling against one read of
//! the logits. `cargo bench -p daemon --bench step -- MODEL.gguf`. Best of many; compare within one table only.

#![allow(clippy::print_stdout, reason = "the table is the product")]

use std::hint::black_box;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use daemon::kv::BlockSize;
use daemon::model::batch::{Batch, Draw};
use daemon::model::text::{Detokenizer, IncludeStop, SpecialTokens, StopStrings, Text};
use daemon::model::weights::gguf::Gguf;
use daemon::request::{Decoding, Request, RequestId, Salt, TokenId};
use daemon::sampling::Params;
use daemon::sampling::rows::Rows;
use daemon::scheduler::step::{DrawKind, Drawn, Output, RowChange, RowId, Step};
use daemon::scheduler::{Limits, PrefixCaching, Scheduler};
use rayon::prelude::*;

const SEQUENCES: u32 = 256;
/// Tokens of a prompt, and of one that waits for memory.
const PROMPT: u32 = 100;
const HEAD_PROMPT: u32 = 32_000;
const BLOCKS: u32 = 40_000;
const LOGIT_ROWS: usize = 64;

fn params() -> Params {
    Params { seed: 1, ..Params::greedy() }
}

fn request(id: u32, prompt: u32, params: Params) -> Arc<Request> {
    Arc::new(Request {
        id: RequestId(u64::from(id)),
        prompt: (0..prompt).map(|i| TokenId(id * 100 + i)).collect(),
        decoding: Decoding::Sample { params: Arc::new(params), choices: NonZeroU32::MIN },
        max_tokens: NonZeroU32::MIN.saturating_add(2000),
        stop_tokens: Arc::new([]),
        priority: 0,
        salt: Salt::default(),
        prompt_logprobs: None,
    })
}

/// What one step costs.
#[derive(Debug, Clone, Copy)]
struct StepCost {
    time: Duration,
    allocations: f64,
}

/// A scheduler and all that a step fills.
struct Stepping {
    scheduler: Scheduler,
    size: BlockSize,
    step: Step,
    batch: Batch,
    output: Output,
}

impl Stepping {
    /// [`SEQUENCES`] decodes and, behind them, `waiting` requests of which the first lacks memory for its long prompt.
    fn new(waiting: u32) -> Option<Self> {
        let size = BlockSize(NonZeroU32::new(16)?);
        // Between nothing and the head's blocks is free all along, so that each step looks the head up.
        let taken = SEQUENCES as usize * size.blocks_for(PROMPT as usize);
        let free = size.blocks_for(HEAD_PROMPT as usize) - 100;
        let limits = Limits {
            max_num_seqs: 2 * SEQUENCES,
            max_num_batched_tokens: 32 * SEQUENCES as usize * size.tokens(),
            block_size: size,
            blocks: BLOCKS,
            watermark_blocks: BLOCKS as usize - taken - free,
            max_attended: usize::MAX,
            prefix_caching: PrefixCaching::Enabled,
        };
        let mut scheduler = Scheduler::new(limits, [1; 32]);
        (0..SEQUENCES).for_each(|id| scheduler.submit(request(id, PROMPT, params())));
        let (step, batch, output) = (Step::default(), Batch::default(), Output::default());
        let mut stepping = Self { scheduler, size, step, batch, output };
        stepping.advance(10);
        let prompt = |index| if index == 0 { HEAD_PROMPT } else { PROMPT };
        (0..waiting).for_each(|index| {
            stepping.scheduler.submit(request(SEQUENCES + index, prompt(index), params()));
        });
        stepping.advance(10);
        Some(stepping)
    }

    /// Schedules, flattens and commits `steps` steps.
    fn advance(&mut self, steps: u32) {
        for _ in 0..steps {
            self.scheduler.schedule(&mut self.step);
            self.batch.fill(&self.step, self.size);
            let token = |(index, _)| Drawn::Token { token: TokenId(index), logprobs: None };
            self.output.drawn.extend((0..).zip(&self.step.draws).map(token));
            self.scheduler.commit(&self.step, &mut self.output);
            self.scheduler.take_effects().for_each(|effect| drop(black_box(effect)));
        }
    }
}

/// The means of 40 steps each; the free blocks last for no more.
fn scheduling(waiting: u32) -> Option<StepCost> {
    let mut stepping = Stepping::new(waiting)?;
    let started = Instant::now();
    stepping.advance(40);
    let time = started.elapsed() / 40;
    let counted = allocation_counter::measure(|| stepping.advance(40));
    let allocations = counted.count_total as f64 / 40.0;
    assert_eq!(stepping.scheduler.n_waiting(), waiting as usize, "the head stays blocked");
    Some(StepCost { time, allocations })
}

fn best(mut work: impl FnMut()) -> Duration {
    let once = || {
        let started = Instant::now();
        work();
        started.elapsed()
    };
    std::iter::repeat_with(once).take(15).min().unwrap_or_default()
}

/// How the values of a row are spread.
#[derive(Debug, Clone, Copy)]
enum Shape {
    /// Near a bell of deviation 2.5 with a few tokens far above it, as a language model's.
    Peaked,
    /// All between 0 and 10: the worst case of top-p.
    Flat,
}

fn logits(vocab: usize, shape: Shape) -> Vec<f32> {
    let uniform = |i: usize, salt: u64| {
        let hash = (i as u64 ^ (salt << 40)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        ((hash ^ (hash >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 40) as f32 / (1 << 24) as f32
    };
    let logit = |i: usize| match shape {
        Shape::Flat => uniform(i, 0) * 10.0,
        Shape::Peaked => {
            let bell: f32 = (0..4).map(|salt| uniform(i, salt) - 0.5).sum();
            bell * 4.3 + if i % 4801 == 7 { 14.0 - (i % 7) as f32 } else { 0.0 }
        }
    };
    (0..LOGIT_ROWS * vocab).map(logit).collect()
}

fn sampling(vocab: usize, shape: Shape) {
    let logits = logits(vocab, shape);
    // On the threads that sampling has.
    let read = best(|| {
        logits.par_chunks(vocab).for_each(|row| {
            let mut lanes = [0.0_f32; 32];
            for chunk in row.chunks_exact(32) {
                (0..32).for_each(|i| lanes[i] += chunk[i]);
            }
            black_box(lanes);
        });
    });
    println!(
        "{:<34}{:>12.2} ms",
        format!("one read, {LOGIT_ROWS} x {vocab}, {shape:?}"),
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
            let request = request(0, PROMPT, params.clone());
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

/// Turns a token of each of [`SEQUENCES`] choices into text and looks for two stop strings; the mean of 200 steps.
fn detokenizing(text: &Arc<Text>) -> Duration {
    let choice = || {
        let stops = StopStrings::new(vec!["\n\nUser:".into(), "###".into()], IncludeStop::No);
        (Detokenizer::new(Arc::clone(text), &[], SpecialTokens::Skip), stops)
    };
    let mut choices: Vec<_> = (0..SEQUENCES).map(|_| choice()).collect();
    let started = Instant::now();
    for step in 0..200 {
        for (id, (detokenizer, stops)) in (0..).zip(&mut choices) {
            let piece = detokenizer.push(TokenId((id * 131 + step * 7) % 40_000 + 300));
            black_box(stops.push(&piece));
        }
    }
    started.elapsed() / 200
}

/// The vocabulary of a GGUF file that the command line names.
fn named_text() -> Option<Arc<Text>> {
    let path = std::env::args().skip(1).find(|arg| !arg.starts_with("--"))?;
    let bytes = std::fs::read(path).ok()?;
    Text::from_gguf(&Gguf::parse(&bytes).ok()?).ok().map(Arc::new)
}

fn print_step(what: &str, took: Duration) {
    println!(
        "{:<48}{:>12.1} us a step",
        format!("{what}, {SEQUENCES} decodes"),
        took.as_secs_f64() * 1e6
    );
}

fn main() {
    for waiting in [0, 10_000] {
        if let Some(StepCost { time, allocations }) = scheduling(waiting) {
            print_step(&format!("schedule + commit, {waiting} wait"), time);
            println!("  {allocations:<32.1} allocations a step");
        }
    }
    match named_text() {
        Some(text) => print_step("detokenize", detokenizing(&text)),
        None => println!("detokenize: not run, name a GGUF file after --"),
    }
    for shape in [Shape::Peaked, Shape::Flat] {
        [49_152, 151_936].into_iter().for_each(|vocab| sampling(vocab, shape));
    }
}
