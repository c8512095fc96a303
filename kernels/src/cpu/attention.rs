//! Paged attention: out = softmax(q K^T * scale) V over the positions that a token may see.
//!
//! The softmax is computed on the fly (Milakov and Gimelshein, arXiv 1805.02867) over tiles of 32 positions that begin
//! at multiples of 32, whatever the block size, the chunk or the batch: so a token's result is always the same to the
//! bit. A tile is gathered through the block table and widened once for the tokens and heads that share it. Scores of 16
//! positions are 16 lanes, and so are 16 numbers of an output.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::arena::{Ahead, KvArena, Place};
use super::error::{KernelError, expect_below, expect_len};
use super::exp::exp;
use super::instructions::{InstructionSet, by_lanes, instruction_set};
use super::lanes::{Lanes, ROWS};
use super::out::Out;

/// Positions of a tile.
const TILE: usize = 32;
/// Tokens that share a gathered tile.
const GROUP: usize = 8;
/// Heads whose scores and outputs are in registers together.
const HEADS: usize = 4;
/// Cache lines of the next tile that are asked for at a time: half of what a core of Emerald Rapids waits for at most.
const ASKED: usize = 8;
/// Multiply-adds that are worth another thread.
const TASK: usize = 1 << 17;

/// Scores, then weights, of a tile's positions.
type Weights = [f32; TILE];

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
    out: Out<'a>,
}

/// A task's buffers, kept by its thread.
#[derive(Debug, Default)]
struct Scratch {
    /// [head_dim][TILE]
    k: Vec<f32>,
    /// [TILE][head_dim rounded up to lanes]
    v: Vec<f32>,
    /// [queries][head_dim rounded up to lanes] weighted sums of V.
    sums: Vec<f32>,
    /// [queries]
    states: Vec<State>,
}

/// A query's softmax so far.
#[derive(Debug, Clone, Copy)]
struct State {
    most: f32,
    sum: f32,
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
        let shared = Shared { arena: self, attention: *attention, q, out: Out::new(out) };
        let kv_heads = self.shape().kv_heads as usize;
        let tasks = |span: &AttendSpan<'_>| span.tokens.len().div_ceil(GROUP) * kv_heads;
        let one = |span: &AttendSpan<'_>, index: usize| {
            let first = index / kv_heads * GROUP;
            let task = Task {
                table: span.table,
                first_token: span.tokens.start + first,
                first_position: span.start as usize + first,
                tokens: GROUP.min(span.tokens.len() - first),
                kv_head: index % kv_heads,
            };
            run(shared, task);
        };
        let seen: usize = spans
            .iter()
            .map(|span| span.tokens.len() * (span.start as usize + span.tokens.len()))
            .sum();
        let width = attention.heads as usize * self.shape().head_dim as usize;
        if 2 * seen * width < TASK {
            spans.iter().for_each(|span| (0..tasks(span)).for_each(|index| one(span, index)));
        } else {
            spans.par_iter().for_each(|span| {
                (0..tasks(span)).into_par_iter().for_each(|index| one(span, index));
            });
        }
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

    /// Gathers the positions of a tile that are before `to`. K's other columns hold what their slots hold, or nothing new.
    #[inline(always)]
    fn gather<L: Lanes>(
        &self,
        place: Place,
        table: &[u32],
        tile: usize,
        to: usize,
        at: Gathered<'_>,
    ) {
        let size = self.shape().block_size as usize;
        let mut position = tile;
        while position < to {
            let (index, offset) = (position / size, position % size);
            let place = Place { block: table[index], ..place };
            let first = position - tile;
            // As much of the block as the tile has room for: whole vectors.
            let keys = (size - offset).min(TILE - first);
            self.load_keys::<L>(place, offset..offset + keys, TILE, &mut at.k[first..]);
            let values = keys.min(to - position);
            let v = &mut at.v[first * at.stride..];
            self.load_values::<L>(place, offset..offset + values, at.stride, v);
            position += keys;
        }
    }

    /// The blocks of the tile that comes next; larger ones are long enough for the processor to see by itself.
    #[inline(always)]
    fn tile_ahead<'a>(
        &'a self,
        place: Place,
        table: &'a [u32],
        tile: usize,
        end: usize,
    ) -> Ahead<'a> {
        let size = self.shape().block_size as usize;
        if size > TILE || tile >= end {
            return self.ahead(place, &[]);
        }
        self.ahead(place, &table[tile / size..(tile + TILE).min(end).div_ceil(size)])
    }
}

/// Where a tile is gathered.
struct Gathered<'a> {
    k: &'a mut [f32],
    v: &'a mut [f32],
    /// Numbers from one row of V to the next.
    stride: usize,
}

fn run(shared: Shared<'_>, task: Task<'_>) {
    SCRATCH.with_borrow_mut(|scratch| run_with(instruction_set(), shared, task, scratch));
}

fn run_with(set: InstructionSet, shared: Shared<'_>, task: Task<'_>, scratch: &mut Scratch) {
    by_lanes!(set, [] [] body(shared: Shared<'_>, task: Task<'_>, scratch: &mut Scratch));
}

#[inline(always)]
fn body<L: Lanes>(shared: Shared<'_>, task: Task<'_>, scratch: &mut Scratch) {
    let shape = shared.arena.shape();
    let head_dim = shape.head_dim as usize;
    let stride = head_dim.next_multiple_of(ROWS);
    let group = (shared.attention.heads / shape.kv_heads) as usize;
    scratch.prepare(head_dim, stride, task.tokens * group);
    let Scratch { k, v, sums, states } = scratch;
    let end = task.first_position + task.tokens;
    let begin = seen_from(shared.attention, task.first_position);
    let place = Place { layer: shared.attention.layer, block: 0, head: task.kv_head };
    for tile in (begin / TILE * TILE..end).step_by(TILE) {
        let to = end.min(tile + TILE);
        let mut ahead = shared.arena.tile_ahead(place, task.table, tile + TILE, end);
        let gathered = Gathered { k: &mut *k, v: &mut *v, stride };
        shared.arena.gather::<L>(place, task.table, tile, to, gathered);
        for token in 0..task.tokens {
            let position = task.first_position + token;
            let seen = seen_from(shared.attention, position).max(tile)..(position + 1).min(to);
            if !seen.is_empty() {
                let of_token = token * group..(token + 1) * group;
                let taken = Taken {
                    attention: shared.attention,
                    head_dim,
                    stride,
                    seen: seen.start - tile..seen.end - tile,
                    k,
                    v,
                };
                let q = &shared.q[queries(shared, task, token)];
                let sums = &mut sums[of_token.start * stride..of_token.end * stride];
                taken.by_all::<L>(q, sums, &mut states[of_token], &mut ahead);
            }
        }
        // What a tile with few positions did not come to.
        ahead.ask(usize::MAX);
    }
    for token in 0..task.tokens {
        let range = queries(shared, task, token);
        // SAFETY: the rows of a task's tokens and the heads of its KV head are no other task's, and spans do not overlap
        // (`check`).
        let out = unsafe { shared.out.part(range) };
        let sums = sums.chunks_exact(stride).zip(&*states).skip(token * group);
        for (out, (sums, state)) in out.chunks_exact_mut(head_dim).zip(sums) {
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = sum / state.sum;
            }
        }
    }
}

impl Scratch {
    #[inline(always)]
    fn prepare(&mut self, head_dim: usize, stride: usize, queries: usize) {
        self.k.resize(TILE * head_dim, 0.0);
        self.v.resize(TILE * stride, 0.0);
        self.sums.clear();
        self.sums.resize(queries * stride, 0.0);
        self.states.clear();
        self.states.resize(queries, State { most: f32::NEG_INFINITY, sum: 0.0 });
    }
}

/// The first position that a token sees.
#[inline(always)]
fn seen_from(attention: Attention, position: usize) -> usize {
    attention.window.map_or(0, |window| (position + 1).saturating_sub(window as usize))
}

/// The heads of the task's KV head in a token's row of q and of the output.
#[inline(always)]
fn queries(shared: Shared<'_>, task: Task<'_>, token: usize) -> Range<usize> {
    let shape = shared.arena.shape();
    let head_dim = shape.head_dim as usize;
    let group = (shared.attention.heads / shape.kv_heads) as usize;
    let row = (task.first_token + token) * shared.attention.heads as usize * head_dim;
    let first = row + task.kv_head * group * head_dim;
    first..first + group * head_dim
}

/// A gathered tile and what a token sees of it.
struct Taken<'a> {
    attention: Attention,
    head_dim: usize,
    stride: usize,
    seen: Range<usize>,
    k: &'a [f32],
    v: &'a [f32],
}

impl Taken<'_> {
    /// Takes the tile into every head. `q`: [heads][head_dim], `sums`: [heads][stride].
    #[inline(always)]
    fn by_all<L: Lanes>(
        &self,
        q: &[f32],
        sums: &mut [f32],
        states: &mut [State],
        ahead: &mut Ahead<'_>,
    ) {
        let heads = states.chunks_mut(HEADS);
        let sums = sums.chunks_mut(HEADS * self.stride);
        for ((states, sums), q) in heads.zip(sums).zip(q.chunks(HEADS * self.head_dim)) {
            match states.len() {
                4 => self.by::<L, 4>(q, sums, states, ahead),
                3 => self.by::<L, 3>(q, sums, states, ahead),
                2 => self.by::<L, 2>(q, sums, states, ahead),
                _ => self.by::<L, 1>(q, sums, states, ahead),
            }
        }
    }

    #[inline(always)]
    fn by<L: Lanes, const H: usize>(
        &self,
        q: &[f32],
        sums: &mut [f32],
        states: &mut [State],
        ahead: &mut Ahead<'_>,
    ) {
        let mut weights = self.scores::<L, H>(q, ahead);
        let mut fades = [0.0; H];
        for ((weights, state), fade) in weights.iter_mut().zip(states).zip(&mut fades) {
            *fade = self.soften(weights, state);
        }
        // As many outputs as registers hold.
        let mut column = 0;
        while column + 4 * ROWS <= self.stride {
            self.weigh::<L, H, 4>(&weights, fades, column, sums, ahead);
            column += 4 * ROWS;
        }
        while column < self.stride {
            self.weigh::<L, H, 1>(&weights, fades, column, sums, ahead);
            column += ROWS;
        }
    }

    /// q K^T of all positions of the tile, seen or not.
    #[inline(always)]
    fn scores<L: Lanes, const H: usize>(&self, q: &[f32], ahead: &mut Ahead<'_>) -> [Weights; H] {
        let mut dots = [[L::splat(0.0); 2]; H];
        let q: [&[f32]; H] = std::array::from_fn(|h| &q[h * self.head_dim..][..self.head_dim]);
        for (dimension, k) in (0..self.head_dim).zip(self.k.chunks_exact(TILE)) {
            let k = [L::load(k), L::load(&k[ROWS..])];
            if dimension % ASKED == 0 {
                ahead.ask(ASKED);
            }
            for (h, dots) in dots.iter_mut().enumerate() {
                let q = L::splat(q[h][dimension]);
                dots[0] = L::multiply_add(q, k[0], dots[0]);
                dots[1] = L::multiply_add(q, k[1], dots[1]);
            }
        }
        let mut scores = [[0.0; TILE]; H];
        for (scores, dots) in scores.iter_mut().zip(dots) {
            L::store(dots[0], scores);
            L::store(dots[1], &mut scores[ROWS..]);
        }
        scores
    }

    /// Turns scores into weights and takes them into the state; returns what earlier sums are multiplied with.
    #[inline(always)]
    fn soften(&self, weights: &mut Weights, state: &mut State) -> f32 {
        for (j, weight) in weights.iter_mut().enumerate() {
            let mut score = *weight * self.attention.scale;
            if let Some(cap) = self.attention.soft_cap {
                score = cap * tanh(score / cap);
            }
            let is_seen = j >= self.seen.start && j < self.seen.end;
            *weight = if is_seen { score } else { f32::NEG_INFINITY };
        }
        let most = folded(*weights, |a, b| if a > b { a } else { b });
        let most = if most > state.most { most } else { state.most };
        for weight in weights.iter_mut() {
            *weight = exp(*weight - most);
        }
        let fade = exp(state.most - most);
        let sum = folded(*weights, |a, b| a + b);
        *state = State { most, sum: state.sum.mul_add(fade, sum) };
        fade
    }

    /// Adds the weighted V to `W` vectors of each head's sums, from `column` on.
    #[inline(always)]
    fn weigh<L: Lanes, const H: usize, const W: usize>(
        &self,
        weights: &[Weights; H],
        fades: [f32; H],
        column: usize,
        sums: &mut [f32],
        ahead: &mut Ahead<'_>,
    ) {
        let mut all = [[L::splat(0.0); W]; H];
        for (h, all) in all.iter_mut().enumerate() {
            for (w, sum) in all.iter_mut().enumerate() {
                let old = L::load(&sums[h * self.stride + column + w * ROWS..]);
                *sum = L::multiply(old, L::splat(fades[h]));
            }
        }
        for j in self.seen.clone() {
            let v = &self.v[j * self.stride + column..][..W * ROWS];
            if j % (ASKED / 2) == 0 {
                ahead.ask(ASKED);
            }
            for w in 0..W {
                let v = L::load(&v[w * ROWS..]);
                for h in 0..H {
                    all[h][w] = L::multiply_add(L::splat(weights[h][j]), v, all[h][w]);
                }
            }
        }
        for (h, all) in all.into_iter().enumerate() {
            for (w, sum) in all.into_iter().enumerate() {
                L::store(sum, &mut sums[h * self.stride + column + w * ROWS..]);
            }
        }
    }
}

/// Folds in halves: always the same order, and vectors as long as there are any.
#[inline(always)]
fn folded(mut lanes: Weights, fold: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = TILE / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = fold(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
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
    fn every_instruction_set_of_this_machine_gives_the_same_bits() {
        for (attention, dtype) in
            variants().into_iter().zip([KvDtype::F16, KvDtype::BF16, KvDtype::F32])
        {
            let (arena, table) = arena(100, 16, dtype);
            let width = HEADS as usize * DIM;
            let q: Vec<f32> = (92..100).flat_map(|token| row(token, width, 3)).collect();
            let attended = |set| {
                let mut out = vec![0.0; q.len()];
                let at = Out::new(&mut out);
                let shared = Shared { arena: &arena, attention, q: &q, out: at };
                let task = Task {
                    table: &table,
                    first_token: 0,
                    first_position: 92,
                    tokens: 8,
                    kv_head: 1,
                };
                run_with(set, shared, task, &mut Scratch::default());
                out
            };
            let wanted = attended(InstructionSet::Portable);
            assert!(wanted.iter().any(|value| *value != 0.0));
            for &set in InstructionSet::all_here() {
                assert_eq!(attended(set), wanted, "{set:?}, {attention:?}");
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
