//! Each product against its floor: bytes over bandwidth for one row, multiply-adds over rate for 64.
//! `cargo bench -p kernels`. Best of several runs; compare within one table only.

#![allow(clippy::print_stdout, reason = "the table is the product")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use kernels::cpu::{
    AttendSpan, Attention, Dtype, KvArena, KvDtype, KvShape, Map, Matrix, Memory, Multiplier,
    instruction_set,
};

const ROWS: usize = 1536;
const COLS: usize = 1536;

fn best(mut work: impl FnMut()) -> Duration {
    let once = || {
        let started = Instant::now();
        work();
        started.elapsed()
    };
    std::iter::repeat_with(once).take(30).min().unwrap_or_default()
}

fn bandwidth() -> f64 {
    let bytes = vec![1_u64; 32 << 20];
    let threads = rayon::current_num_threads();
    let part = bytes.len() / threads;
    let sum = || {
        rayon::scope(|scope| {
            for part in bytes.chunks(part) {
                scope.spawn(move |_| {
                    black_box(part.iter().fold(0_u64, |sum, word| sum ^ word));
                });
            }
        });
    };
    (bytes.len() * 8) as f64 / best(sum).as_secs_f64() / 1e9
}

fn main() {
    println!(
        "{:?}, {} threads, read bandwidth {:.1} GB/s",
        instruction_set(),
        rayon::current_num_threads(),
        bandwidth()
    );
    println!(
        "{:<6}{:>16}{:>18}{:>18}{:>18}",
        "dtype", "m=1 GB/s", "m=1 Gmadd/s", "m=64 Gmadd/s", "m=256 Gmadd/s"
    );
    for dtype in Dtype::ALL {
        let bytes = vec![0; dtype.bytes_for(ROWS, COLS).unwrap_or_default()];
        let Ok(matrix) =
            Matrix::pack(&mut Memory::default(), dtype, ROWS, COLS, &bytes, &|row| row)
        else {
            continue;
        };
        let time = |m: usize| {
            let x = vec![0.5; m * COLS];
            let mut out = vec![0.0; m * ROWS];
            let mut multiplier = Multiplier::default();
            best(|| {
                multiplier
                    .multiply(black_box(&x), [Map { matrix: &matrix, out: &mut out }])
                    .unwrap_or_default()
            })
            .as_secs_f64()
        };
        let rate = |m: usize, seconds: f64| (m * ROWS * COLS) as f64 / seconds / 1e9;
        let (one, many, more) = (time(1), time(64), time(256));
        let gbs = matrix.bytes() as f64 / one / 1e9;
        println!(
            "{:<6}{gbs:>16.1}{:>18.1}{:>18.1}{:>18.1}",
            dtype.name(),
            rate(1, one),
            rate(64, many),
            rate(256, more)
        );
    }
    attention();
}

fn attention() {
    println!("{:<28}{:>14}{:>14}", "attention, 9/3 heads of 64", "us", "GB/s of KV");
    for context in [512_u32, 4096] {
        let shape = KvShape {
            blocks: context / 16,
            block_size: 16,
            layers: 1,
            kv_heads: 3,
            head_dim: 64,
            dtype: KvDtype::F16,
        };
        let Ok(arena) = KvArena::new(shape) else { continue };
        let table: Vec<u32> = (0..context / 16).collect();
        let attention =
            Attention { layer: 0, heads: 9, scale: 0.125, window: None, soft_cap: None };
        let (q, mut out) = (vec![0.1; 9 * 64], vec![0.0; 9 * 64]);
        let span = [AttendSpan { tokens: 0..1, start: context - 1, table: &table }];
        let seconds =
            best(|| arena.attend(&attention, &span, black_box(&q), &mut out).unwrap_or_default())
                .as_secs_f64();
        println!(
            "{:<28}{:>14.1}{:>14.1}",
            format!("context {context}"),
            seconds * 1e6,
            arena.bytes() as f64 / seconds / 1e9
        );
    }
}
