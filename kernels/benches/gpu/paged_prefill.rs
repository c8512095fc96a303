//! Paged prefill attention on 32 query and 8 KV heads of 128, blocks of 16 in random order, whole prompts. "Contiguous" is the largest
//! block that there is a kernel for, in order.

use std::error::Error;

use half::bf16;
use kernels::cuda::{ArenaShape, E4m3, KvReal, PagedAttention, PagedPrefill, PrefillInput};

use crate::table::Row;
use crate::timer::Timer;

const HEADS: u32 = 32;
const KV_HEADS: u32 = 8;
const HEAD_DIM: u32 = 128;
const BLOCK: u32 = 16;
const LARGEST_BLOCK: u32 = 64;
/// What the tensor cores do at most with random data, in TFLOP/s.
const PEAK: f64 = 790.0;

/// Sequences, tokens and what FlashAttention 3 reaches on an H200, in TFLOP/s.
const CASES: [(u32, u32, f64); 3] = [(1, 4096, 546.0), (8, 1024, 392.0), (1, 16_384, 606.0)];

/// What is attended to: whole prompts, in blocks of a size.
#[derive(Clone, Copy)]
struct Batch {
    sequences: u32,
    tokens: u32,
    block: u32,
    is_in_order: bool,
}

pub(crate) fn rows(timer: &Timer) -> Result<Vec<Row>, Box<dyn Error>> {
    let mut rows = Vec::new();
    for (sequences, tokens, rival) in CASES {
        let name = format!("{sequences} x {tokens}");
        // Half of the scores are masked; two products, a multiplication and an addition each.
        let scores = f64::from(sequences) * f64::from(tokens).powi(2) / 2.0;
        let operations = scores * f64::from(HEADS * HEAD_DIM) * 4.0;
        let batch = Batch { sequences, tokens, block: BLOCK, is_in_order: false };
        let time = measure(timer, batch, bf16::from_f32)?;
        let contiguous = Batch { block: LARGEST_BLOCK, is_in_order: true, ..batch };
        let contiguous = measure(timer, contiguous, bf16::from_f32)?;
        let half = measure(timer, batch, E4m3::from_f32)?;
        let rival = (operations / rival / 1e6, "FlashAttention 3");
        rows.push(row(name.clone(), (time, operations), rival));
        rows.push(row(format!("{name}, paged"), (time, operations), (contiguous, "contiguous")));
        rows.push(row(format!("{name}, e4m3"), (half, operations), (time, "bf16")));
    }
    Ok(rows)
}

fn row(shape: String, (time, operations): (f64, f64), rival: (f64, &'static str)) -> Row {
    Row {
        operation: "paged_prefill",
        shape,
        time,
        floor: operations / PEAK / 1e6,
        rival: Some(rival),
        figure: format!("{:.0} TFLOP/s", operations / time / 1e6),
    }
}

/// Microseconds of a launch.
fn measure<KV: KvReal<bf16>>(
    timer: &Timer,
    batch: Batch,
    stored: fn(f32) -> KV,
) -> Result<f64, Box<dyn Error>> {
    let Batch { sequences, tokens, block, is_in_order } = batch;
    let kernels = &timer.kernels;
    let width = tokens.div_ceil(block);
    let shape = ArenaShape {
        blocks: sequences * width,
        block_size: block,
        layers: 1,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
    };
    let arena = timer.arena(shape, stored)?;
    let mut tables: Vec<u32> = (0..shape.blocks).collect();
    if !is_in_order {
        fastrand::Rng::with_seed(3).shuffle(&mut tables);
    }
    let begins: Vec<u32> = (0..=sequences).map(|sequence| sequence * tokens).collect();
    let stream = kernels.stream();
    let (tables, begins) = (stream.clone_htod(&tables)?, stream.clone_htod(&begins)?);
    let starts = stream.clone_htod(&vec![0; sequences as usize])?;
    let rows = (sequences * tokens * HEADS * HEAD_DIM) as usize;
    let (q, mut out) = (timer.numbers(rows, 4)?, kernels.memory(rows)?);
    let prefill = PagedPrefill {
        sequences,
        tokens: sequences * tokens,
        attention: PagedAttention {
            table_width: width,
            layer: 0,
            heads: HEADS,
            scale: 1.0 / f64::from(HEAD_DIM).sqrt() as f32,
            window: None,
            soft_cap: None,
        },
    };
    timer.time(4, |_| {
        let input = PrefillInput { tables: &tables, begins: &begins, starts: &starts };
        Ok(kernels.paged_prefill(&prefill, &arena, &input, (&q, &mut out))?)
    })
}
