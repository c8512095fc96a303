//! Log-probabilities of raw logits, and the most likely tokens. NaN counts as impossible.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::exp::exp;
use crate::request::{TokenId, TokenLogprob, TokenLogprobs};

/// Values whose exponentials are added up in f32 before the sum goes on in f64.
const BLOCK: usize = 1024;
const LANES: usize = 16;

/// A logit that orders totally: NaN below all others.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Ordered {
    logit: f32,
    token: u32,
}

impl Eq for Ordered {}

impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ordered {
    /// The more likely is the greater; among equals the lower id.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.logit.total_cmp(&other.logit).then(other.token.cmp(&self.token))
    }
}

/// NaN as minus infinity, and minus zero as zero, so that comparisons are total.
#[inline(always)]
pub(super) fn clean(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit + 0.0 }
}

/// The largest logit; minus infinity when there is none. NaN is passed over.
pub(super) fn largest(logits: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, |most, logit| if logit > most { logit } else { most })
}

/// The sum of e^((logit - most) * by) over all logits: blocks of 1,024 in f32 lanes, their sums in f64.
pub(super) fn sum_of_exponentials(logits: &[f32], most: f32, by: f32) -> f64 {
    logits.chunks(BLOCK).map(|block| f64::from(block_sum(block, most, by))).sum()
}

/// One block's part of [`sum_of_exponentials`].
pub(super) fn block_sum(block: &[f32], most: f32, by: f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let chunks = block.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|&logit| exp((logit - most) * by)).sum();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += exp((chunk[i] - most) * by);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// The natural logarithm of what raw logits are divided by to be probabilities. `most` is the largest of them.
pub(super) fn log_partition(logits: &[f32], most: f32) -> f64 {
    if most.is_finite() {
        f64::from(most) + sum_of_exponentials(logits, most, 1.0).ln()
    } else {
        f64::from(most)
    }
}

/// The log-probability of a logit.
#[allow(clippy::cast_possible_truncation, reason = "a logarithm needs no more digits than f32 has")]
pub(super) fn logprob(logit: f32, log_partition: f64) -> f32 {
    let value = (f64::from(clean(logit)) - log_partition) as f32;
    if value.is_nan() { f32::NEG_INFINITY } else { value }
}

/// `token`'s log-probability and rank, and the `top` most likely tokens, best first, equal ones in id order.
/// `logits`: [vocab], raw. A token outside of it has no probability.
pub fn score(logits: &[f32], token: TokenId, top: u32) -> TokenLogprobs {
    let partition = log_partition(logits, largest(logits));
    let own = logits.get(token.0 as usize).copied().map_or(f32::NEG_INFINITY, clean);
    let before = |(id, &logit): (u32, &f32)| {
        let logit = clean(logit);
        logit > own || (logit == own && id < token.0)
    };
    let rank = 1 + (0..).zip(logits).filter(|&entry| before(entry)).count();
    let rank = u32::try_from(rank).unwrap_or(u32::MAX);
    TokenLogprobs {
        token: TokenLogprob { token, logprob: logprob(own, partition), rank },
        top: most_likely(logits, partition, top),
    }
}

/// The `count` most likely tokens with their raw log-probabilities, best first, equal ones in id order.
pub fn candidates(logits: &[f32], count: u32) -> Vec<TokenLogprob> {
    most_likely(logits, log_partition(logits, largest(logits)), count)
}

fn most_likely(logits: &[f32], partition: f64, count: u32) -> Vec<TokenLogprob> {
    let count = (count as usize).min(logits.len());
    let mut heap: BinaryHeap<Reverse<Ordered>> = BinaryHeap::with_capacity(count + 1);
    let mut bar = f32::NEG_INFINITY;
    for (token, &logit) in (0..).zip(logits) {
        let logit = clean(logit);
        if count == 0 || (heap.len() == count && logit <= bar) {
            continue;
        }
        heap.push(Reverse(Ordered { logit, token }));
        if heap.len() > count {
            heap.pop();
        }
        bar = heap.peek().map_or(bar, |Reverse(least)| least.logit);
    }
    let best = heap.into_sorted_vec();
    let entry = |(rank, Reverse(one)): (u32, &Reverse<Ordered>)| TokenLogprob {
        token: TokenId(one.token),
        logprob: logprob(one.logit, partition),
        rank,
    };
    (1..).zip(&best).map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_ranks_follow_them() {
        let logits: Vec<f32> =
            (0..5000).map(|i| ((i * 7919) % 5003) as f32 * 0.004 - 3.0).collect();
        let all = candidates(&logits, 5000);
        let sum: f64 = all.iter().map(|one| f64::from(one.logprob).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{sum}");
        assert!(all.is_sorted_by(|a, b| a.logprob >= b.logprob));
        let one = score(&logits, all[17].token, 3);
        assert_eq!((one.token, &one.top[..]), (all[17], &all[..3]));
    }

    #[test]
    fn equal_logits_rank_by_id_and_nan_is_last() {
        let logits = [1.0, f32::NAN, 1.0, 2.0];
        let order: Vec<u32> = candidates(&logits, 4).iter().map(|one| one.token.0).collect();
        assert_eq!(order, [3, 0, 2, 1]);
        assert_eq!(score(&logits, TokenId(2), 0).token.rank, 3);
        assert_eq!(score(&logits, TokenId(1), 0).token.logprob, f32::NEG_INFINITY);
        assert_eq!(score(&logits, TokenId(9), 0).token.logprob, f32::NEG_INFINITY);
        let hopeless = candidates(&[f32::NEG_INFINITY; 3], 1);
        assert_eq!(hopeless[0].token, TokenId(0));
    }
}
