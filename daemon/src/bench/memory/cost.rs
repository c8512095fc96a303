//! What paging costs: attention through a table of scattered blocks against attention over one piece, on the same data.

use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kernels::cpu::{AttendSpan, Attention, KvArena, KvDtype, KvShape};

use super::Found;
use crate::bench::load::random::Random;
use crate::bench::table::{Cell, Table};

const HEADS: u32 = 9;
const KV_HEADS: u32 = 3;
const HEAD_DIM: u32 = 64;
const BLOCK: u32 = 16;
/// Runs of each, in turn; the fastest counts.
const RUNS: usize = 60;

/// Some sequences of one length, decoding a token each.
#[derive(Debug, Clone, Copy)]
struct Case {
    sequences: u32,
    context: u32,
}

/// An arena that holds the case's K and V, and the table of each sequence.
struct Held {
    arena: KvArena,
    tables: Vec<Vec<u32>>,
}

impl Case {
    /// The data in blocks of `block_size`; `order` says which block holds which part.
    fn held(self, block_size: u32, order: impl Fn(u32) -> Vec<u32>) -> Result<Held> {
        let per_sequence = self.context / block_size;
        let blocks = per_sequence * self.sequences;
        let (layers, kv_heads, head_dim, dtype) = (1, KV_HEADS, HEAD_DIM, KvDtype::F16);
        let mut arena =
            KvArena::new(KvShape { blocks, block_size, layers, kv_heads, head_dim, dtype })?;
        let order = order(blocks);
        let tables: Vec<Vec<u32>> =
            order.chunks(per_sequence as usize).map(<[u32]>::to_vec).collect();
        let slot = |table: &[u32], position: u32| {
            table[(position / block_size) as usize] * block_size + position % block_size
        };
        for (sequence, table) in (0..).zip(&tables) {
            let slots: Vec<u32> = (0..self.context).map(|position| slot(table, position)).collect();
            let width = (self.context * KV_HEADS * HEAD_DIM) as usize;
            let (k, v) = (numbers(width, sequence * 2), numbers(width, sequence * 2 + 1));
            arena.store(0, &slots, &k, &v)?;
        }
        Ok(Held { arena, tables })
    }

    fn width(self) -> usize {
        (self.sequences * HEADS * HEAD_DIM) as usize
    }
}

impl Held {
    /// Attends once from the last position of each sequence.
    fn attend(&self, case: Case, q: &[f32], out: &mut [f32]) -> Result<Duration> {
        let attention =
            Attention { layer: 0, heads: HEADS, scale: 0.125, window: None, soft_cap: None };
        let span = |(index, table)| {
            let tokens: Range<usize> = index..index + 1;
            AttendSpan { tokens, start: case.context - 1, table }
        };
        let spans: Vec<AttendSpan<'_>> =
            (0..).zip(self.tables.iter().map(Vec::as_slice)).map(span).collect();
        let started = Instant::now();
        self.arena.attend(&attention, &spans, black_box(q), out)?;
        Ok(started.elapsed())
    }
}

/// Numbers from -1 to 1.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut random = Random::new(u64::from(seed));
    (0..count).map(|_| random.between(0, 2000) as f32 / 1000.0 - 1.0).collect()
}

fn in_order(blocks: u32) -> Vec<u32> {
    (0..blocks).collect()
}

/// Every block once, in an order that follows no line.
fn scattered(blocks: u32) -> Vec<u32> {
    let mut random = Random::new(9);
    let mut order: Vec<(u64, u32)> = (0..blocks).map(|block| (random.next(), block)).collect();
    order.sort_unstable();
    order.into_iter().map(|(_, block)| block).collect()
}

/// The fastest of many runs: scattered blocks, blocks in order and one piece, in turn. Their results are equal to the bit.
fn fastest(case: Case, runs: usize) -> Result<[Duration; 3]> {
    let layouts = [
        case.held(BLOCK, scattered)?,
        case.held(BLOCK, in_order)?,
        case.held(case.context, in_order)?,
    ];
    let q = numbers(case.width(), 77);
    let mut outs = [(); 3].map(|()| vec![0.0; case.width()]);
    let mut fastest = [Duration::MAX; 3];
    for _ in 0..runs {
        for ((held, out), best) in layouts.iter().zip(&mut outs).zip(&mut fastest) {
            *best = held.attend(case, &q, out)?.min(*best);
        }
    }
    ensure!(outs[0] == outs[2] && outs[1] == outs[2], "paged and contiguous attention differ");
    Ok(fastest)
}

pub(super) fn table() -> Result<Found> {
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let one_thread = one_thread.context("start a thread")?;
    let columns = [
        "sequences",
        "context",
        "contiguous, us",
        "blocks in order",
        "cost",
        "blocks scattered",
        "cost of scattered",
    ];
    let mut table = Table::new("Cost of paging", columns);
    table.note(format!(
        "Decode attention of one layer on one thread, {HEADS} heads over {KV_HEADS} of {HEAD_DIM}, half precision, the same K and V in one\n\
         piece a sequence and in blocks of {BLOCK}, as a fresh pool hands them out and in random order; the fastest of {RUNS} runs\n\
         each, in turn. Results are equal to the bit. Goal: at most 3 %."
    ));
    for (sequences, context) in [(1, 512), (1, 4096), (1, 32_768), (16, 512), (16, 4096), (64, 512)]
    {
        let times = one_thread.install(|| fastest(Case { sequences, context }, RUNS))?;
        let [scattered, in_order, contiguous] = times.map(|time| time.as_secs_f64() * 1e6);
        let mut row = vec![Cell::Count(sequences as usize), Cell::Count(context as usize)];
        row.push(Cell::Real(contiguous, 1));
        for paged in [in_order, scattered] {
            row.extend([Cell::Real(paged, 1), Cell::Share(paged / contiguous - 1.0)]);
        }
        table.push(row);
    }
    Ok(table.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paged_and_contiguous_attention_agree() {
        fastest(Case { sequences: 3, context: 96 }, 1).unwrap();
    }

    #[test]
    fn scattered_blocks_are_every_block_once() {
        let mut order = scattered(100);
        assert!(!order.is_sorted());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
