//! Paged attention: out = softmax(q K^T * scale) V over the positions that a token may see.
//!
//! The softmax is computed on the fly (Milakov and Gimelshein, arXiv 1805.02867) over tiles of 32 positions that begin
//! at multiples of 32, whatever the block size, the chunk or the batch: so a token's result is always the same to the
//! bit. A tile is gathered through the block table and widened once for the tokens and heads that share it.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::arena::{KvArena, Place, Side};
use super::error::{KernelError, expect_below, expect_len};
use super::exp::exp;
use super::instructions::dispatched;
use super::norm::dot;

/// Positions of a tile.
const TILE: usize = 32;
/// Tokens that share a gathered tile.
const GROUP: usize = 8;

/// How a layer attends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    pub layer: u32,
    /// Query heads; a multiple of the arena's KV heads, consecutive ones share a KV head.
    pub heads: u32,
    pub scale: f32,
    /// A token sees this many positions, its own included.
    pub window: Option<u32>,
    /// Scores become cap * tanh(score / cap).
    pub soft_cap: Option<f32>,
}

/// Consecutive tokens of one sequence: token `i` of `tokens` is at position `start + i` and sees all before it.
#[derive(Debug, Clone)]
pub struct AttendSpan<'a> {
    /// Its rows of q and out.
    pub tokens: Range<usize>,
    pub start: u32,
    /// Its blocks in position order.
    pub table: &'a [u32],
}

/// The work of one task: some tokens of a span and one KV head.
#[derive(Debug, Clone, Copy)]
struct Task<'a> {
    table: &'a [u32],
    first_token: usize,
    first_position: usize,
    tokens: usize,
    kv_head: usize,
}

/// What all tasks share.
#[derive(Debug, Clone, Copy)]
struct Shared<'a> {
    arena: &'a KvArena,
    attention: Attention,
    q: &'a [f32],
    out: Out,
}

/// Where tasks write: each the heads of its KV head in the rows of its tokens.
#[derive(Debug, Clone, Copy)]
struct Out {
    at: *mut f32,
    len: usize,
}

// SAFETY: tasks write disjoint ranges, see `Out::row`.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    /// # Safety
    /// No other task may use the range while the result lives.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row<'a>(self, range: Range<usize>) -> &'a mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len, "inside the output");
        // SAFETY: the range lies inside the slice that `at` was made from, which outlives the tasks, and is one task's.
        unsafe { std::slice::from_raw_parts_mut(self.at.wrapping_add(range.start), range.len()) }
    }
}

/// A task's buffers, kept by its thread.
#[derive(Debug, Default)]
struct Scratch {
    k: Vec<f32>,
    v: Vec<f32>,
    /// [queries] running maximum and sum of the softmax.
    states: Vec<[f32; 2]>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl KvArena {
    /// Attends. `q`, `out`: [tokens, heads * head_dim].
    ///
    /// # Errors
    /// When lengths do not fit, a table is too short, or a block or the layer is not there.
    pub fn attend(
        &self,
        attention: &Attention,
        spans: &[AttendSpan<'_>],
        q: &[f32],
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        self.check(attention, spans, q, out)?;
        let out = Out { at: out.as_mut_ptr(), len: out.len() };
        let shared = Shared { arena: self, attention: *attention, q, out };
        let kv_heads = self.shape().kv_heads as usize;
        let task = |span: &AttendSpan<'_>, first: usize, kv_head: usize| {
            let tokens = GROUP.min(span.tokens.len() - first);
            let first_position = span.start as usize + first;
            let table = span.table;
            run(
                shared,
                Task {
                    table,
                    first_token: span.tokens.start + first,
                    first_position,
                    tokens,
                    kv_head,
                },
            );
        };
        let seen: usize = spans
            .iter()
            .map(|span| span.tokens.len() * (span.start as usize + span.tokens.len()))
            .sum();
        if seen < 64 {
            for span in spans {
                for first in (0..span.tokens.len()).step_by(GROUP) {
                    (0..kv_heads).for_each(|kv_head| task(span, first, kv_head));
                }
            }
            return Ok(());
        }
        spans.par_iter().for_each(|span| {
            let groups = span.tokens.len().div_ceil(GROUP);
            (0..groups * kv_heads)
                .into_par_iter()
                .for_each(|index| task(span, index / kv_heads * GROUP, index % kv_heads));
        });
        Ok(())
    }

    fn check(
        &self,
        attention: &Attention,
        spans: &[AttendSpan<'_>],
        q: &[f32],
        out: &[f32],
    ) -> Result<(), KernelError> {
        let shape = self.shape();
        let width = attention.heads as usize * shape.head_dim as usize;
        expect_below("the layer", attention.layer as usize, shape.layers as usize)?;
        expect_below(
            "nothing in a window of no token",
            0,
            attention.window.map_or(1, |window| window as usize),
        )?;
        expect_len(
            "heads beyond a multiple of the KV heads",
            (attention.heads % shape.kv_heads.max(1)) as usize,
            0,
        )?;
        expect_len("the attention's output", out.len(), q.len())?;
        let mut next = 0;
        for span in spans {
            // In order and without overlap: two tasks never write one row.
            expect_below(
                "a span's first token behind the span before",
                next,
                span.tokens.start + 1,
            )?;
            expect_below("a span's first token", span.tokens.start, span.tokens.end + 1)?;
            next = span.tokens.end;
            expect_below("a span's last token", span.tokens.end * width, q.len() + 1)?;
            let end = span.start as usize + span.tokens.len();
            let blocks = end.div_ceil(shape.block_size as usize);
            expect_below("the blocks that a span needs", blocks, span.table.len() + 1)?;
            span.table[..blocks].iter().try_for_each(|&block| {
                expect_below("a block", block as usize, shape.blocks as usize)
            })?;
        }
        Ok(())
    }

    /// Gathers positions `from..to` of a sequence into `out`.
    #[inline(always)]
    fn gather(&self, place: Place, table: &[u32], from: usize, to: usize, out: &mut [f32]) {
        let size = self.shape().block_size as usize;
        let head_dim = self.shape().head_dim as usize;
        let mut position = from;
        while position < to {
            let offset = position % size;
            let len = (size - offset).min(to - position);
            let at = (position - from) * head_dim;
            let place = Place { block: table[position / size], ..place };
            self.load(place, offset, len, &mut out[at..at + len * head_dim]);
            position += len;
        }
    }
}

fn run(shared: Shared<'_>, task: Task<'_>) {
    SCRATCH.with_borrow_mut(|scratch| run_in(shared, task, scratch));
}

dispatched! {
    fn run_in(shared: Shared<'_>, task: Task<'_>, scratch: &mut Scratch) => run_body
}

#[inline(always)]
fn run_body(shared: Shared<'_>, task: Task<'_>, scratch: &mut Scratch) {
    let Scratch { k, v, states } = scratch;
    let shape = shared.arena.shape();
    let head_dim = shape.head_dim as usize;
    let group = (shared.attention.heads / shape.kv_heads) as usize;
    k.resize(TILE * head_dim, 0.0);
    v.resize(TILE * head_dim, 0.0);
    states.clear();
    states.resize(task.tokens * group, [f32::NEG_INFINITY, 0.0]);
    for token in 0..task.tokens {
        outputs(shared, task, token).fill(0.0);
    }
    let end = task.first_position + task.tokens;
    let begin = seen_from(shared.attention, task.first_position);
    for tile in (begin / TILE * TILE..end).step_by(TILE) {
        let to = end.min(tile + TILE);
        let place =
            Place { layer: shared.attention.layer, block: 0, side: Side::Key, head: task.kv_head };
        shared.arena.gather(place, task.table, tile, to, k);
        shared.arena.gather(Place { side: Side::Value, ..place }, task.table, tile, to, v);
        for token in 0..task.tokens {
            let position = task.first_position + token;
            let seen = seen_from(shared.attention, position).max(tile)..(position + 1).min(to);
            if !seen.is_empty() {
                let states = &mut states[token * group..(token + 1) * group];
                take_tile(
                    shared,
                    task,
                    token,
                    seen.start - tile..seen.end - tile,
                    Tile { k, v, states },
                );
            }
        }
    }
    for token in 0..task.tokens {
        let heads = outputs(shared, task, token).chunks_exact_mut(head_dim);
        for (out, [_, sum]) in heads.zip(&states[token * group..]) {
            out.iter_mut().for_each(|value| *value /= sum);
        }
    }
}

/// The first position that a token sees.
#[inline(always)]
fn seen_from(attention: Attention, position: usize) -> usize {
    attention.window.map_or(0, |window| (position + 1).saturating_sub(window as usize))
}

/// The heads of the task's KV head in a token's row of the output.
#[inline(always)]
fn outputs<'a>(shared: Shared<'a>, task: Task<'_>, token: usize) -> &'a mut [f32] {
    let range = queries(shared, task, token);
    // SAFETY: the rows of a task's tokens and the heads of its KV head are no other task's, spans do not overlap
    // (`check`), and the result is used before the next call.
    unsafe { shared.out.row(range) }
}

#[inline(always)]
fn queries(shared: Shared<'_>, task: Task<'_>, token: usize) -> Range<usize> {
    let shape = shared.arena.shape();
    let head_dim = shape.head_dim as usize;
    let group = (shared.attention.heads / shape.kv_heads) as usize;
    let row = (task.first_token + token) * shared.attention.heads as usize * head_dim;
    let first = row + task.kv_head * group * head_dim;
    first..first + group * head_dim
}

/// A gathered tile and the softmax of the heads that take it in.
struct Tile<'a> {
    k: &'a [f32],
    v: &'a [f32],
    states: &'a mut [[f32; 2]],
}

#[inline(always)]
fn take_tile(shared: Shared<'_>, task: Task<'_>, token: usize, seen: Range<usize>, tile: Tile<'_>) {
    let head_dim = shared.arena.shape().head_dim as usize;
    let q = &shared.q[queries(shared, task, token)];
    let outs = outputs(shared, task, token).chunks_exact_mut(head_dim);
    for ((q, out), state) in q.chunks_exact(head_dim).zip(outs).zip(tile.states) {
        let mut scores = [0.0_f32; TILE];
        let mut most = state[0];
        for j in seen.clone() {
            let score = dot(q, &tile.k[j * head_dim..(j + 1) * head_dim]) * shared.attention.scale;
            scores[j] = shared.attention.soft_cap.map_or(score, |cap| cap * tanh(score / cap));
            most = most.max(scores[j]);
        }
        let fade = exp(state[0] - most);
        let mut sum = state[1] * fade;
        out.iter_mut().for_each(|value| *value *= fade);
        for j in seen.clone() {
            let weight = exp(scores[j] - most);
            sum += weight;
            let v = &tile.v[j * head_dim..(j + 1) * head_dim];
            for (out, v) in out.iter_mut().zip(v) {
                *out = weight.mul_add(*v, *out);
            }
        }
        *state = [most, sum];
    }
}

#[inline(always)]
fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{KvDtype, KvShape};

    const HEADS: u32 = 4;
    const KV_HEADS: u32 = 2;
    const DIM: usize = 24;

    fn value(i: usize) -> f32 {
        let hash = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
        hash as f32 / (1 << 23) as f32 - 1.0
    }

    fn row(token: usize, width: usize, salt: usize) -> Vec<f32> {
        (0..width).map(|i| value(token * 977 + i * 31 + salt * 1_000_003)).collect()
    }

    /// An arena whose sequence of `len` tokens lies in blocks in a scattered order.
    fn arena(len: usize, block_size: u32, dtype: KvDtype) -> (KvArena, Vec<u32>) {
        let blocks = u32::try_from(len.div_ceil(block_size as usize)).unwrap();
        let head_dim = u32::try_from(DIM).unwrap();
        let shape = KvShape {
            blocks: blocks + 1,
            block_size,
            layers: 2,
            kv_heads: KV_HEADS,
            head_dim,
            dtype,
        };
        let mut arena = KvArena::new(shape).unwrap();
        let table: Vec<u32> = (0..blocks).map(|i| blocks - i).collect();
        let width = KV_HEADS as usize * DIM;
        for token in 0..len {
            let slot = table[token / block_size as usize] * block_size
                + u32::try_from(token).unwrap() % block_size;
            arena.store(1, &[slot], &row(token, width, 1), &row(token, width, 2)).unwrap();
        }
        (arena, table)
    }

    fn attend(arena: &KvArena, table: &[u32], attention: Attention, chunks: &[usize]) -> Vec<f32> {
        let width = HEADS as usize * DIM;
        let mut all = Vec::new();
        let mut start = 0;
        for &chunk in chunks {
            let q: Vec<f32> =
                (start..start + chunk).flat_map(|token| row(token, width, 3)).collect();
            let mut out = vec![f32::NAN; q.len()];
            let span = AttendSpan { tokens: 0..chunk, start: u32::try_from(start).unwrap(), table };
            arena.attend(&attention, &[span], &q, &mut out).unwrap();
            all.extend(out);
            start += chunk;
        }
        all
    }

    fn plain(len: usize, attention: Attention) -> Vec<f64> {
        let (width, kv_width) = (HEADS as usize * DIM, KV_HEADS as usize * DIM);
        let mut out = Vec::new();
        for position in 0..len {
            let q = row(position, width, 3);
            for head in 0..HEADS as usize {
                let kv = head / (HEADS / KV_HEADS) as usize * DIM;
                let first = seen_from(attention, position);
                let scores: Vec<f64> = (first..=position)
                    .map(|j| {
                        let k = row(j, kv_width, 1);
                        let dot: f64 = (0..DIM)
                            .map(|i| f64::from(q[head * DIM + i]) * f64::from(k[kv + i]))
                            .sum();
                        let score = dot * f64::from(attention.scale);
                        attention
                            .soft_cap
                            .map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                    })
                    .collect();
                let most = scores.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
                out.extend((0..DIM).map(|i| {
                    let weighted = |(at, score): (usize, &f64)| {
                        (score - most).exp() / sum * f64::from(row(first + at, kv_width, 2)[kv + i])
                    };
                    scores.iter().enumerate().map(weighted).sum::<f64>()
                }));
            }
        }
        out
    }

    fn variants() -> [Attention; 3] {
        let full = Attention { layer: 1, heads: HEADS, scale: 0.7, window: None, soft_cap: None };
        [full, Attention { window: Some(37), ..full }, Attention { soft_cap: Some(2.0), ..full }]
    }

    #[test]
    fn attention_is_softmax_over_what_a_token_sees() {
        for attention in variants() {
            let (arena, table) = arena(100, 16, KvDtype::F32);
            let got = attend(&arena, &table, attention, &[100]);
            for (got, wanted) in got.iter().zip(plain(100, attention)) {
                assert!(
                    (f64::from(*got) - wanted).abs() < 2e-6,
                    "{attention:?}: {got} is not {wanted}"
                );
            }
        }
    }

    #[test]
    fn the_bits_depend_on_neither_chunks_nor_block_size_nor_threads_nor_company() {
        for attention in variants() {
            for dtype in [KvDtype::F16, KvDtype::BF16, KvDtype::F32] {
                let (first, table) = arena(100, 16, dtype);
                let wanted = attend(&first, &table, attention, &[100]);
                for chunks in
                    [vec![1; 100], vec![16; 6].into_iter().chain([4]).collect(), vec![33, 1, 66]]
                {
                    assert_eq!(attend(&first, &table, attention, &chunks), wanted, "{chunks:?}");
                }
                for block_size in [1, 7, 64, 100] {
                    let (other, table) = arena(100, block_size, dtype);
                    assert_eq!(
                        attend(&other, &table, attention, &[100]),
                        wanted,
                        "blocks of {block_size}"
                    );
                }
                let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
                assert_eq!(single.install(|| attend(&first, &table, attention, &[100])), wanted);
                let width = HEADS as usize * DIM;
                let q: Vec<f32> = [99, 5].iter().flat_map(|&token| row(token, width, 3)).collect();
                let mut out = vec![f32::NAN; q.len()];
                let span =
                    |at: usize, start| AttendSpan { tokens: at..at + 1, start, table: &table };
                first.attend(&attention, &[span(0, 99), span(1, 5)], &q, &mut out).unwrap();
                assert_eq!(out[..width], wanted[99 * width..]);
                assert_eq!(out[width..], wanted[5 * width..6 * width]);
            }
        }
    }

    #[test]
    fn copied_slots_attend_like_their_source() {
        let (mut arena, mut table) = arena(40, 16, KvDtype::F16);
        let wanted = attend(&arena, &table, variants()[0], &[40]);
        arena.copy_slots(table[2], 0, 8).unwrap();
        table[2] = 0;
        assert_eq!(attend(&arena, &table, variants()[0], &[40]), wanted);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (mut arena, table) = arena(40, 16, KvDtype::F16);
        let width = HEADS as usize * DIM;
        let attention = variants()[0];
        let (q, mut out) = (vec![0.0; width], vec![0.0; width]);
        let span = |start, table| AttendSpan { tokens: 0..1, start, table };
        assert!(
            arena.attend(&attention, &[span(48, &table)], &q, &mut out).is_err(),
            "a short table"
        );
        assert!(
            arena.attend(&attention, &[span(0, &[9])], &q, &mut out).is_err(),
            "a block that is not there"
        );
        assert!(
            arena.attend(&attention, &[span(0, &table), span(0, &table)], &q, &mut out).is_err(),
            "an overlap"
        );
        assert!(
            arena
                .attend(&Attention { layer: 2, ..attention }, &[span(0, &table)], &q, &mut out)
                .is_err()
        );
        assert!(
            arena
                .attend(&Attention { heads: 3, ..attention }, &[span(0, &table)], &q, &mut out)
                .is_err()
        );
        assert!(arena.attend(&attention, &[span(0, &table)], &q, &mut []).is_err());
        assert!(
            arena.store(0, &[64], &row(0, 48, 1), &row(0, 48, 1)).is_err(),
            "a slot that is not there"
        );
        assert!(arena.copy_slots(0, 4, 1).is_err());
        assert!(arena.copy_slots(0, 1, 17).is_err());
    }
}
