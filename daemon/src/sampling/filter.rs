//! Which tokens may be drawn, and the draw: temperature, min-p, top-k, top-p, in vLLM's order.
//!
//! Definition. With m the largest logit and w(i) = e^((logit(i) - m) / temperature): min-p keeps w(i) >= min_p; top-k
//! then keeps the k largest w (and all equal to the k-th); top-p then keeps the largest w whose sum first reaches
//! top_p of the sum of what was kept (and all equal to the last of them). The token is the first, in id order, whose
//! running sum of kept w exceeds u times their total. Sums of all w go in blocks of 1,024 ids, f32 inside (relative to the
//! block's largest logit) and f64 across; sums of kept w are f64.

use super::params::Params;
use super::survey::{LOGIT_BLOCK, Scale, Survey, token};
use crate::request::TokenId;

/// Below this a temperature is greedy, as in vLLM.
const GREEDY_BELOW: f32 = 1e-5;

/// Whether the most likely token is always drawn, the lowest id among equals.
pub(super) fn is_greedy(params: &Params) -> bool {
    params.temperature < GREEDY_BELOW || params.top_k.is_some_and(|k| k.get() == 1)
}

/// Draws a token. `logits` are biased and penalized already; `u` is uniform in [0, 1).
pub(super) fn draw(logits: &[f32], params: &Params, u: f32, survey: &mut Survey) -> TokenId {
    let by = 1.0 / params.temperature;
    // What is summed over all tokens is summed in the first pass.
    if is_greedy(params) || keeps_few(params, logits.len()) {
        survey.look_at(logits);
    } else {
        survey.sum(logits, by);
    }
    if is_greedy(params) || !survey.most.is_finite() {
        return survey.most_likely(logits);
    }
    let scale = Scale { most: survey.most, by };
    if keeps_few(params, logits.len()) {
        keep_few(logits, params, scale, survey);
        draw_kept(u, scale, survey)
    } else if params.top_p < 1.0 {
        keep_nucleus(logits, params, scale, survey);
        draw_kept(u, scale, survey)
    } else {
        draw_any(logits, u, scale, survey)
    }
}

/// Whether min-p or top-k leaves out tokens, which takes no sum over all of them.
fn keeps_few(params: &Params, vocab: usize) -> bool {
    params.min_p > 0.0 || params.top_k.is_some_and(|k| (k.get() as usize) < vocab)
}

/// Puts in question what min-p, top-k and then top-p keep.
fn keep_few(logits: &[f32], params: &Params, scale: Scale, survey: &mut Survey) {
    let least =
        if params.min_p > 0.0 { scale.most + params.min_p.ln() / scale.by } else { f32::MIN };
    let top_k = params.top_k.map(|k| k.get() as usize);
    let bound = top_k.and_then(|k| survey.reached_by(k)).unwrap_or(f32::MIN);
    survey.list(logits, least.max(bound));
    if let Some(kth) = top_k.and_then(|k| survey.kth_kept(k)) {
        survey.retain(kth);
    }
    if params.top_p < 1.0 {
        let total: f64 = survey.kept_weights(scale).iter().copied().map(f64::from).sum();
        let bar = survey.nucleus_of_kept(scale, total * f64::from(params.top_p));
        survey.retain(bar);
    }
}

/// Puts in question what top-p keeps of all tokens, whose weights are summed.
fn keep_nucleus(logits: &[f32], params: &Params, scale: Scale, survey: &mut Survey) {
    let total = survey.total();
    let wanted = total * f64::from(params.top_p);
    let bound = survey.nucleus_bound(scale, wanted, total, logits.len());
    survey.list(logits, bound);
    let bar = survey.nucleus_of_kept(scale, wanted);
    survey.retain(bar);
}

/// Draws one of the tokens in question.
fn draw_kept(u: f32, scale: Scale, survey: &mut Survey) -> TokenId {
    let weights = survey.kept_weights(scale);
    let total: f64 = weights.iter().copied().map(f64::from).sum();
    let at = first_beyond(weights, f64::from(u) * total);
    TokenId(survey.ids.get(at).copied().unwrap_or(0))
}

/// Draws one of all tokens, whose weights are summed.
fn draw_any(logits: &[f32], u: f32, scale: Scale, survey: &mut Survey) -> TokenId {
    let target = f64::from(u) * survey.total();
    let block = first_beyond(&survey.sums, target);
    let before: f64 = survey.sums[..block].iter().copied().map(f64::from).sum();
    let first = block * LOGIT_BLOCK;
    let block = &logits[first..logits.len().min(first + LOGIT_BLOCK)];
    let at = first_beyond(survey.weights(block, scale), target - before);
    token(first + at)
}

/// The first weight at which the running sum exceeds `target`; the last one above 0 where rounding left the sum short.
fn first_beyond(weights: &[f32], target: f64) -> usize {
    let mut sum = 0.0_f64;
    let mut last = 0;
    for (at, &weight) in weights.iter().enumerate() {
        if weight > 0.0 {
            last = at;
            sum += f64::from(weight);
            if sum > target {
                break;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use proptest::prelude::*;

    use super::*;

    /// Logits of every shape: flat or peaked, with equal ones, impossible ones and NaN.
    fn rows() -> impl Strategy<Value = Vec<f32>> {
        (1..4000_usize, any::<u32>(), 0.01..20.0_f32, 1..2000_u32, any::<bool>()).prop_map(
            |(len, salt, spread, values, odd)| {
                let logit = |i: usize| {
                    let hash =
                        (i as u64 + 1).wrapping_mul(u64::from(salt) | 1).wrapping_mul(0x9E37_79B9);
                    let value = u32::try_from((hash >> 20) % u64::from(values)).unwrap_or(0);
                    match (odd, i % 5) {
                        (true, 1) => f32::NAN,
                        (true, 3) => f32::NEG_INFINITY,
                        // The cube makes a few stand out.
                        _ => spread * (value as f32 / values as f32).powi(3),
                    }
                };
                (0..len).map(logit).collect()
            },
        )
    }

    fn params(temperature: f32, top_k: u32, top_p: f32, min_p: f32) -> Params {
        Params { temperature, top_k: NonZeroU32::new(top_k), top_p, min_p, ..Params::greedy() }
    }

    /// The ids that the filters leave in question; `None`: all.
    fn kept(logits: &[f32], params: &Params) -> Option<Vec<u32>> {
        let mut survey = Survey::default();
        survey.sum(logits, 1.0 / params.temperature);
        let scale = Scale { most: survey.most, by: 1.0 / params.temperature };
        if !scale.most.is_finite() {
            return Some(Vec::new());
        }
        if keeps_few(params, logits.len()) {
            keep_few(logits, params, scale, &mut survey);
        } else if params.top_p < 1.0 {
            keep_nucleus(logits, params, scale, &mut survey);
        } else {
            return None;
        }
        Some(survey.ids.clone())
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 256, ..ProptestConfig::default() })]

        #[test]
        fn the_k_largest_and_their_equals_are_kept(logits in rows(), k in 1..3000_u32, temperature in 0.1..2.0_f32) {
            let got = kept(&logits, &params(temperature, k, 1.0, 0.0));
            let mut order: Vec<f32> = logits.iter().copied().filter(|logit| *logit > f32::NEG_INFINITY).collect();
            order.sort_by(|a, b| b.total_cmp(a));
            let least = order.get(k as usize - 1).or(order.last()).copied().unwrap_or(f32::INFINITY);
            let wanted: Vec<u32> = (0..).zip(&logits).filter(|(_, logit)| **logit >= least).map(|(id, _)| id).collect();
            prop_assert_eq!(got, if (k as usize) < logits.len() { Some(wanted) } else { order.is_empty().then(Vec::new) });
        }

        #[test]
        fn the_nucleus_just_reaches_its_share(
            logits in rows(), top_p in 0.001..0.999_f32, temperature in 0.1..2.0_f32, k in 0..60_u32, min_p in 0.0..0.3_f32,
            filters in 0..3_u32,
        ) {
            let (k, min_p) = (if filters == 1 { k } else { 0 }, if filters == 2 { min_p } else { 0.0 });
            let before = params(temperature, k, 1.0, min_p);
            let all = || (0..).zip(&logits).filter(|(_, logit)| **logit > f32::NEG_INFINITY).map(|(id, _)| id).collect();
            let before: Vec<u32> = kept(&logits, &before).unwrap_or_else(all);
            let got = kept(&logits, &params(temperature, k, top_p, min_p)).unwrap();
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weight = |id: &u32| ((f64::from(logits[*id as usize]) - f64::from(most)) / f64::from(temperature)).exp();
            let wanted = f64::from(top_p) * before.iter().map(weight).sum::<f64>();
            let least = got.iter().map(|&id| logits[id as usize]).fold(f32::INFINITY, f32::min);
            let reaching: Vec<u32> = before.iter().copied().filter(|&id| logits[id as usize] >= least).collect();
            prop_assert_eq!(&got, &reaching, "it holds all that reach its least");
            let sum: f64 = got.iter().map(weight).sum();
            let above: f64 = got.iter().filter(|&&id| logits[id as usize] > least).map(weight).sum();
            prop_assert!(got.is_empty() || sum >= wanted * (1.0 - 1e-4), "{sum} of {wanted}");
            prop_assert!(above <= wanted * (1.0 + 1e-4), "{above} of {wanted} were enough");
        }
    }
}
