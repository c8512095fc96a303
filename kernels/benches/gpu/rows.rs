//! The operations over rows, in the shapes of Llama-3.1-8B, against the bytes that they read and write.

use std::error::Error;

use cudarc::driver::CudaSlice;
use half::bf16;
use kernels::cuda::{
    Arena, ArenaShape, BlockPairs, Gate, GateActivation, Gather, RmsNorm, RopeInput, RopeStore,
};

use crate::table::Row;
use crate::timer::Timer;

const WIDTH: u32 = 4096;
const HEADS: u32 = 32;
const KV_HEADS: u32 = 8;
const HEAD_DIM: u32 = 128;
const INNER: u32 = 14_336;
const VOCAB: u32 = 128_256;
const BLOCK: u32 = 16;
/// Rows of a decode step and of one with prompts.
const ROWS: [u32; 2] = [256, 8192];
/// Launches of a graph.
const LAUNCHES: usize = 20;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

pub(crate) fn rows(timer: &Timer) -> Result<Vec<Row>> {
    let mut all = Vec::new();
    for rows in ROWS {
        all.extend(norms(timer, rows)?);
        all.push(gate(timer, rows)?);
        all.push(rope(timer, rows)?);
        all.push(gather(timer, rows)?);
    }
    all.push(copy(timer)?);
    Ok(all)
}

/// A row of the table for an operation that moves so many numbers of 16 bits.
fn row(timer: &Timer, operation: &'static str, (rows, time): (u32, f64), numbers: u32) -> Row {
    let bytes = 2.0 * f64::from(rows) * f64::from(numbers);
    Row {
        operation,
        shape: format!("{rows} rows"),
        time,
        floor: bytes / timer.copy_rate / 1e3,
        rival: None,
        figure: format!("{:.0} GB/s", bytes / time / 1e3),
    }
}

/// Random numbers, and room for as many.
fn pair(timer: &Timer, len: u32) -> Result<(CudaSlice<bf16>, CudaSlice<bf16>)> {
    Ok((timer.numbers(len as usize, 1)?, timer.numbers(len as usize, 2)?))
}

fn norms(timer: &Timer, rows: u32) -> Result<[Row; 2]> {
    let shape = RmsNorm { rows, width: WIDTH, epsilon: 1e-5 };
    let (x, mut out) = pair(timer, rows * WIDTH)?;
    let (weight, _) = pair(timer, WIDTH)?;
    let (_, mut residual) = pair(timer, rows * WIDTH)?;
    let plain =
        timer.time(LAUNCHES, |_| Ok(timer.kernels.rms_norm(&shape, (&x, &weight), &mut out)?))?;
    let added = timer.time(LAUNCHES, |_| {
        Ok(timer.kernels.add_rms_norm(&shape, (&x, &weight), &mut residual, &mut out)?)
    })?;
    Ok([
        row(timer, "rms_norm", (rows, plain), 2 * WIDTH),
        row(timer, "add_rms_norm", (rows, added), 4 * WIDTH),
    ])
}

fn gate(timer: &Timer, rows: u32) -> Result<Row> {
    let shape = Gate { rows, width: INNER, activation: GateActivation::Silu };
    let (x, _) = pair(timer, 2 * rows * INNER)?;
    let (_, mut out) = pair(timer, rows * INNER)?;
    let time = timer.time(LAUNCHES, |_| Ok(timer.kernels.gate(&shape, &x, &mut out)?))?;
    Ok(row(timer, "gate", (rows, time), 3 * INNER))
}

fn rope(timer: &Timer, rows: u32) -> Result<Row> {
    let arena_shape = ArenaShape {
        blocks: rows / BLOCK,
        block_size: BLOCK,
        layers: 1,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
    };
    let shape = RopeStore { tokens: rows, heads: HEADS, layer: 0, rotary: HEAD_DIM, epsilon: 1e-6 };
    let mut arena = Arena::<bf16>::new(&timer.kernels, arena_shape)?;
    let all = HEADS + 2 * KV_HEADS;
    let (qkv, _) = pair(timer, rows * all * HEAD_DIM)?;
    let (_, mut q) = pair(timer, rows * HEADS * HEAD_DIM)?;
    let places: Vec<u32> = (0..rows).collect();
    let frequencies: Vec<f32> =
        (0..HEAD_DIM / 2).map(|pair| 500_000_f32.powf(-2.0 * pair as f32 / 128.0)).collect();
    let stream = timer.kernels.stream();
    let (positions, slots) = (stream.clone_htod(&places)?, stream.clone_htod(&places)?);
    let frequencies = stream.clone_htod(&frequencies)?;
    let input = RopeInput { positions: &positions, slots: &slots, frequencies: &frequencies };
    let time = timer.time(LAUNCHES, |_| {
        Ok(timer.kernels.rope_store(&shape, (&qkv, None), &input, &mut arena, &mut q)?)
    })?;
    Ok(row(timer, "rope_store", (rows, time), 2 * all * HEAD_DIM))
}

fn gather(timer: &Timer, rows: u32) -> Result<Row> {
    let shape = Gather { rows, table_rows: VOCAB, width: WIDTH };
    let (table, _) = pair(timer, VOCAB * WIDTH)?;
    let (_, mut out) = pair(timer, rows * WIDTH)?;
    let mut random = fastrand::Rng::with_seed(6);
    let ids: Vec<u32> = (0..rows).map(|_| random.u32(..VOCAB)).collect();
    let ids = timer.kernels.stream().clone_htod(&ids)?;
    let time =
        timer.time(LAUNCHES, |_| Ok(timer.kernels.gather(&shape, (&table, &ids), &mut out)?))?;
    Ok(row(timer, "gather", (rows, time), 2 * WIDTH))
}

/// 64 blocks of 32 layers.
fn copy(timer: &Timer) -> Result<Row> {
    const PAIRS: u32 = 64;
    let shape = ArenaShape {
        blocks: 2 * PAIRS,
        block_size: BLOCK,
        layers: 32,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
    };
    let mut arena = Arena::<bf16>::new(&timer.kernels, shape)?;
    let pairs: Vec<u32> = (0..PAIRS).flat_map(|block| [block, PAIRS + block]).collect();
    let pairs = timer.kernels.stream().clone_htod(&pairs)?;
    let pairs = BlockPairs { pairs: &pairs, count: PAIRS };
    let time = timer.time(LAUNCHES, |_| Ok(timer.kernels.copy_blocks(&mut arena, &pairs)?))?;
    let numbers = 2 * u32::try_from(arena.block_len())?;
    Ok(Row {
        shape: format!("{PAIRS} blocks of 2 MiB"),
        ..row(timer, "copy_blocks", (PAIRS, time), numbers)
    })
}
