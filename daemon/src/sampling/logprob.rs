//! Log-probabilities of raw logits, and the most likely tokens. NaN counts as impossible.

use super::survey::{Survey, count_above, count_reaching, with_survey};
use crate::request::{TokenId, TokenLogprob, TokenLogprobs};

/// `token`'s log-probability and rank, and the `top` most likely tokens, best first, equal ones in id order.
/// `logits`: [vocab], raw. A token outside of it has no probability.
pub fn score(logits: &[f32], token: TokenId, top: u32) -> TokenLogprobs {
    with_survey(|survey| score_with(logits, token, top, survey))
}

/// As [`score`], with the caller's survey.
pub(super) fn score_with(
    logits: &[f32],
    token: TokenId,
    top: u32,
    survey: &mut Survey,
) -> TokenLogprobs {
    let partition = log_partition(logits, survey);
    let own = logits.get(token.0 as usize).copied().map_or(f32::NEG_INFINITY, clean);
    let rank = u32::try_from(1 + count_before(logits, token, own)).unwrap_or(u32::MAX);
    TokenLogprobs {
        token: TokenLogprob { token, logprob: logprob(own, partition), rank },
        top: most_likely(logits, partition, top, survey),
    }
}

/// The `count` most likely tokens with their raw log-probabilities, best first, equal ones in id order.
pub fn candidates(logits: &[f32], count: u32) -> Vec<TokenLogprob> {
    with_survey(|survey| {
        let partition = log_partition(logits, survey);
        most_likely(logits, partition, count, survey)
    })
}

/// How many tokens are more likely than `token`, whose logit is `own`, or as likely with a lower id.
fn count_before(logits: &[f32], token: TokenId, own: f32) -> usize {
    let (before, after) = logits.split_at(logits.len().min(token.0 as usize));
    if own == f32::NEG_INFINITY {
        // All impossible ones are alike, NaN among them.
        return before.len() + count_above(after, own);
    }
    count_reaching(before, own) + count_above(after, own)
}

/// NaN as minus infinity.
#[inline(always)]
fn clean(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit }
}

/// Looks at raw logits; the natural logarithm of what their exponentials are divided by to be probabilities.
fn log_partition(logits: &[f32], survey: &mut Survey) -> f64 {
    survey.sum(logits, 1.0);
    let most = f64::from(survey.most);
    if survey.most.is_finite() { most + survey.total().ln() } else { most }
}

/// The log-probability of a logit.
#[allow(clippy::cast_possible_truncation, reason = "a logarithm needs no more digits than f32 has")]
fn logprob(logit: f32, log_partition: f64) -> f32 {
    let value = (f64::from(logit) - log_partition) as f32;
    if value.is_nan() { f32::NEG_INFINITY } else { value }
}

fn most_likely(
    logits: &[f32],
    partition: f64,
    count: u32,
    survey: &mut Survey,
) -> Vec<TokenLogprob> {
    let count = (count as usize).min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    let bound = survey.reached_by(count).unwrap_or(f32::MIN);
    survey.list(logits, bound);
    if let Some(least) = survey.kth_kept(count) {
        survey.retain(least);
    }
    let mut best: Vec<(u32, f32)> =
        survey.ids.iter().copied().zip(survey.kept.iter().copied()).collect();
    best.sort_unstable_by(|(a, a_logit), (b, b_logit)| {
        (b_logit + 0.0).total_cmp(&(a_logit + 0.0)).then(a.cmp(b))
    });
    best.truncate(count);
    let impossible = |(_, logit): &(u32, &f32)| clean(**logit) < f32::MIN;
    let rest = (0..).zip(logits).filter(impossible).take(count - best.len());
    best.extend(rest.map(|(id, _)| (id, f32::NEG_INFINITY)));
    let entry = |(rank, &(id, logit)): (u32, &(u32, f32))| TokenLogprob {
        token: TokenId(id),
        logprob: logprob(logit, partition),
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
