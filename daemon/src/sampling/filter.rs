//! Which tokens may be drawn, and the draw: temperature, min-p, top-k, top-p, in vLLM's order.
//!
//! Definition. With m the largest logit and w(i) = e^((logit(i) - m) / temperature): min-p keeps w(i) >= min_p; top-k
//! then keeps the k largest w (and all equal to the k-th); top-p then keeps the largest w whose sum first reaches
//! top_p of the sum of what was kept (and all equal to the last of them). The token is the first, in id order, whose
//! running sum of kept w exceeds u times their total. Sums go in blocks of 1,024 ids, f32 inside and f64 across.

use super::exp::exp;
use super::logprob::{block_sum, clean, largest};
use super::params::Params;
use crate::request::TokenId;

const BLOCK: usize = 1024;

/// Below this a temperature is greedy, as in vLLM.
const GREEDY_BELOW: f32 = 1e-5;

/// Whether the most likely token is always drawn, the lowest id among equals.
pub(super) fn is_greedy(params: &Params) -> bool {
    params.temperature < GREEDY_BELOW || params.top_k.is_some_and(|k| k.get() == 1)
}

/// The most likely token: the lowest id among equals, 0 when nothing is possible.
pub(super) fn most_likely(logits: &[f32]) -> TokenId {
    let most = largest(logits);
    let at = logits.iter().position(|&logit| logit == most).unwrap_or(0);
    TokenId(u32::try_from(at).unwrap_or(u32::MAX))
}

/// Draws a token. `logits` are biased and penalized already; `kept` is scratch; `u` is uniform in [0, 1).
pub(super) fn draw(logits: &[f32], params: &Params, u: f32, kept: &mut Vec<f32>) -> TokenId {
    let most = largest(logits);
    if !most.is_finite() {
        return most_likely(logits);
    }
    let by = 1.0 / params.temperature;
    let bar = threshold(logits, most, params, kept);
    let weight = |logit: f32| exp((logit - most) * by);
    match bar {
        None => draw_from(logits, u, kept, |block| block_sum(block, most, by), weight),
        Some(bar) => {
            let weight = |logit: f32| if logit >= bar { weight(logit) } else { 0.0 };
            let sum = |block: &[f32]| block.iter().map(|&logit| weight(logit)).sum();
            draw_from(logits, u, kept, sum, weight)
        }
    }
}

/// The first token whose running sum exceeds `u` of the total. `sums` is scratch.
fn draw_from(
    logits: &[f32],
    u: f32,
    sums: &mut Vec<f32>,
    sum: impl Fn(&[f32]) -> f32,
    weight: impl Fn(f32) -> f32,
) -> TokenId {
    sums.clear();
    sums.extend(logits.chunks(BLOCK).map(sum));
    let total: f64 = sums.iter().copied().map(f64::from).sum();
    let target = f64::from(u) * total;
    let mut before = 0.0_f64;
    let mut last = None;
    for (index, (block, &sum)) in logits.chunks(BLOCK).zip(sums.iter()).enumerate() {
        let reaches = before + f64::from(sum) > target;
        if sum > 0.0 {
            last = Some(index);
        }
        if reaches {
            return token(index * BLOCK + first_beyond(block, target - before, &weight));
        }
        before += f64::from(sum);
    }
    // Rounding left the running sum just short of the target: the last token that is possible is meant.
    match last.and_then(|index| logits.chunks(BLOCK).nth(index).map(|block| (index, block))) {
        Some((index, block)) => token(index * BLOCK + first_beyond(block, f64::INFINITY, &weight)),
        None => most_likely(logits),
    }
}

/// The first of a block's tokens whose running sum exceeds `target`, or the last one that is possible.
fn first_beyond(block: &[f32], target: f64, weight: &impl Fn(f32) -> f32) -> usize {
    let mut before = 0.0_f64;
    let mut last = 0;
    for (at, &logit) in block.iter().enumerate() {
        let one = f64::from(weight(logit));
        if one > 0.0 {
            last = at;
            before += one;
            if before > target {
                break;
            }
        }
    }
    last
}

fn token(at: usize) -> TokenId {
    TokenId(u32::try_from(at).unwrap_or(u32::MAX))
}

/// The smallest logit that may be drawn; `None` when all may.
fn threshold(logits: &[f32], most: f32, params: &Params, kept: &mut Vec<f32>) -> Option<f32> {
    let by = 1.0 / params.temperature;
    let least = (params.min_p > 0.0).then(|| most + params.min_p.ln() * params.temperature);
    let top_k = params.top_k.map(|k| k.get() as usize).filter(|&k| k < logits.len());
    if top_k.is_none() && params.top_p >= 1.0 {
        return least;
    }
    kept.clear();
    let possible =
        |logit: &f32| *logit > f32::NEG_INFINITY && least.is_none_or(|least| *logit >= least);
    kept.extend(logits.iter().map(|&logit| clean(logit)).filter(possible));
    let mut bar = least;
    if let Some(k) = top_k.filter(|&k| k < kept.len()) {
        let (_, kth, _) = kept.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        let kth = *kth;
        bar = Some(kth);
        kept.retain(|&logit| logit >= kth);
    }
    if params.top_p < 1.0 {
        let total: f64 =
            kept.chunks(BLOCK).map(|block| f64::from(block_sum(block, most, by))).sum();
        bar = Some(nucleus(kept, most, by, total * f64::from(params.top_p)));
    }
    bar
}

/// The smallest logit of the most likely ones whose weights first reach `wanted`: a selection that halves, no sort.
fn nucleus(kept: &mut [f32], most: f32, by: f32, wanted: f64) -> f32 {
    let mut rest = kept;
    let mut reached = 0.0_f64;
    loop {
        if rest.len() <= 32 {
            rest.sort_unstable_by(|a, b| b.total_cmp(a));
            for &logit in rest.iter() {
                reached += f64::from(exp((logit - most) * by));
                if reached >= wanted {
                    return logit;
                }
            }
            return rest.last().copied().unwrap_or(most);
        }
        // The nucleus is most often small, so the first look is at a small part.
        let middle = (rest.len() / 8).max(16);
        rest.select_nth_unstable_by(middle, |a, b| b.total_cmp(a));
        let (high, low) = rest.split_at_mut(middle);
        let sum: f64 = high.chunks(BLOCK).map(|block| f64::from(block_sum(block, most, by))).sum();
        if reached + sum >= wanted {
            rest = high;
        } else {
            reached += sum;
            rest = low;
        }
    }
}
