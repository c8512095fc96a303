//! Beam search: which continuations of the live beams go on. Pure: it sees candidates, never tensors or blocks.
//!
//! As vLLM's: of all live beams' candidates an end token finishes a beam, the best `width` others go on; a beam's score
//! is its summed log-probability divided by length ^ length_penalty, where the length counts prompt and output without
//! a final end token. When to stop early is Hugging Face's and vLLM's three-way choice.

use std::num::NonZeroU32;
use std::sync::Arc;

use crate::request::{Beam, BeamParams, EarlyStopping, FinishReason, TokenId, TokenLogprob};

/// A live beam of the next step: a live beam of this one and a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Continuation {
    /// Index into the beams that [`BeamSearch::advance`] returned last (0 at first: the prompt).
    pub parent: usize,
    pub token: TokenId,
}

/// A search in progress.
#[derive(Debug, Clone)]
pub struct BeamSearch {
    params: BeamParams,
    prompt_len: usize,
    max_tokens: usize,
    end_tokens: Arc<[TokenId]>,
    /// Best first.
    live: Vec<Live>,
    /// Best first, at most `width`.
    finished: Vec<Finished>,
}

#[derive(Debug, Clone, Default)]
struct Live {
    tokens: Vec<TokenId>,
    cumulative: f32,
}

#[derive(Debug, Clone)]
struct Finished {
    beam: Beam,
    score: f32,
}

impl BeamSearch {
    /// A search that begins with the prompt as its one beam. `end_tokens` are sorted.
    pub fn new(
        params: BeamParams,
        prompt_len: usize,
        max_tokens: NonZeroU32,
        end_tokens: Arc<[TokenId]>,
    ) -> Self {
        let (live, finished) = (vec![Live::default()], Vec::new());
        Self {
            params,
            prompt_len,
            max_tokens: max_tokens.get() as usize,
            end_tokens,
            live,
            finished,
        }
    }

    /// Takes what can follow each live beam (best first, 2 x width of them) and returns the live beams of the next step,
    /// best first. None: the search has ended.
    pub fn advance(&mut self, candidates: &[Vec<TokenLogprob>]) -> Vec<Continuation> {
        let mut all: Vec<(Continuation, f32)> = Vec::new();
        for (parent, (live, candidates)) in self.live.iter().zip(candidates).enumerate() {
            let next = |one: &TokenLogprob| {
                (Continuation { parent, token: one.token }, live.cumulative + one.logprob)
            };
            all.extend(candidates.iter().filter(|one| one.logprob > f32::NEG_INFINITY).map(next));
        }
        // Beams of one step have one length: their order is that of their sums.
        all.sort_by(|(a, a_sum), (b, b_sum)| {
            b_sum.total_cmp(a_sum).then(a.parent.cmp(&b.parent)).then(a.token.cmp(&b.token))
        });
        let width = self.params.width.get() as usize;
        let mut next: Vec<(Continuation, Live)> = Vec::with_capacity(width);
        for (continuation, cumulative) in all {
            let ends = self.ends(continuation.token);
            if !ends && next.len() == width {
                continue;
            }
            let mut tokens = self.live[continuation.parent].tokens.clone();
            tokens.push(continuation.token);
            if ends {
                self.add_finished(tokens, cumulative, Some(continuation.token));
            } else {
                next.push((continuation, Live { tokens, cumulative }));
            }
        }
        let (continuations, live): (Vec<_>, Vec<_>) = next.into_iter().unzip();
        self.live = live;
        if self.has_ended() {
            return Vec::new();
        }
        continuations
    }

    /// The results, best first, at most `width`.
    pub fn finish(mut self) -> Vec<Beam> {
        for live in std::mem::take(&mut self.live) {
            if live.tokens.len() >= self.max_tokens {
                self.add_finished(live.tokens, live.cumulative, None);
            }
        }
        self.finished.into_iter().map(|finished| finished.beam).collect()
    }

    fn ends(&self, token: TokenId) -> bool {
        self.end_tokens.binary_search(&token).is_ok()
    }

    fn add_finished(
        &mut self,
        tokens: Vec<TokenId>,
        cumulative_logprob: f32,
        stop_token: Option<TokenId>,
    ) {
        let length = self.prompt_len + tokens.len() - usize::from(stop_token.is_some());
        let score = self.score(cumulative_logprob, length);
        let finish = if stop_token.is_some() { FinishReason::Stop } else { FinishReason::Length };
        let beam = Beam { tokens, cumulative_logprob, finish, stop_token };
        let at = self.finished.partition_point(|other| other.score >= score);
        self.finished.insert(at, Finished { beam, score });
        self.finished.truncate(self.params.width.get() as usize);
    }

    fn score(&self, cumulative: f32, length: usize) -> f32 {
        cumulative / (length.max(1) as f32).powf(self.params.length_penalty)
    }

    fn has_ended(&self) -> bool {
        let Some(best) = self.live.first() else { return true };
        if best.tokens.len() >= self.max_tokens {
            return true;
        }
        let Some(worst) = self.finished.get(self.params.width.get() as usize - 1) else {
            return false;
        };
        let now = self.prompt_len + best.tokens.len();
        match self.params.early_stopping {
            EarlyStopping::Always => true,
            EarlyStopping::Heuristic => worst.score >= self.score(best.cumulative, now),
            EarlyStopping::Never => {
                // Sums only fall: the best score to come is at the longest length when length is rewarded.
                let longest = self.prompt_len + self.max_tokens;
                let length = if self.params.length_penalty > 0.0 { longest } else { now };
                worst.score >= self.score(best.cumulative, length)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VOCABULARY: u32 = 6;
    const END: TokenId = TokenId(5);

    /// A made-up model: the log-probabilities after a sequence.
    fn model(seed: u64, tokens: &[TokenId]) -> Vec<f32> {
        let mut state = tokens.iter().fold(seed | 1, |state, token| {
            (state ^ u64::from(token.0 + 1)).wrapping_mul(0x5851_F42D_4C95_7F2D).rotate_left(23)
        });
        let mut weight = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1 << 24) as f32 + 0.01
        };
        let weights: Vec<f32> = (0..VOCABULARY).map(|_| weight()).collect();
        let sum: f32 = weights.iter().sum();
        weights.iter().map(|weight| (weight / sum).ln()).collect()
    }

    fn top(logprobs: &[f32], count: usize) -> Vec<TokenLogprob> {
        let mut all: Vec<_> = (0..)
            .zip(logprobs)
            .map(|(id, &logprob)| TokenLogprob { token: TokenId(id), logprob, rank: 0 })
            .collect();
        all.sort_by(|a, b| b.logprob.total_cmp(&a.logprob).then(a.token.cmp(&b.token)));
        all.truncate(count);
        all
    }

    fn search(params: BeamParams, ends: &[TokenId], seed: u64, max_tokens: u32) -> Vec<Beam> {
        let max_tokens = NonZeroU32::new(max_tokens).unwrap();
        let mut search = BeamSearch::new(params, 3, max_tokens, ends.into());
        let mut live = vec![Vec::new()];
        while !live.is_empty() {
            let found: Vec<_> = live
                .iter()
                .map(|tokens| top(&model(seed, tokens), 2 * params.width.get() as usize))
                .collect();
            live = search
                .advance(&found)
                .iter()
                .map(|next| [&live[next.parent][..], &[next.token]].concat())
                .collect();
        }
        search.finish()
    }

    /// The same by whole sequences: every extension of every hypothesis, sorted, with nothing kept but the lists.
    fn plain(
        params: BeamParams,
        ends: &[TokenId],
        seed: u64,
        max_tokens: usize,
    ) -> Vec<(Vec<TokenId>, bool)> {
        let width = params.width.get() as usize;
        let score = |sum: f32, len: usize| sum / ((3 + len) as f32).powf(params.length_penalty);
        let mut hypotheses: Vec<(Vec<TokenId>, f32)> = vec![(vec![], 0.0)];
        let mut done: Vec<(Vec<TokenId>, f32, bool)> = Vec::new();
        for step in 1..=max_tokens {
            let mut extended = Vec::new();
            for (parent, (tokens, sum)) in hypotheses.iter().enumerate() {
                for one in top(&model(seed, tokens), 2 * width) {
                    extended.push((
                        parent,
                        [&tokens[..], &[one.token]].concat(),
                        sum + one.logprob,
                    ));
                }
            }
            extended.sort_by(|a, b| {
                b.2.total_cmp(&a.2).then(a.0.cmp(&b.0)).then(a.1.last().cmp(&b.1.last()))
            });
            let is_end = |tokens: &Vec<TokenId>| ends.contains(&tokens[tokens.len() - 1]);
            for (_, tokens, sum) in extended.iter().filter(|(_, tokens, _)| is_end(tokens)) {
                done.push((tokens.clone(), score(*sum, tokens.len() - 1), true));
            }
            done.sort_by(|a, b| b.1.total_cmp(&a.1));
            done.truncate(width);
            hypotheses = extended
                .into_iter()
                .filter(|(_, tokens, _)| !is_end(tokens))
                .map(|(_, tokens, sum)| (tokens, sum))
                .take(width)
                .collect();
            let Some((_, best)) = hypotheses.first() else { break };
            let full = done.len() == width;
            let worst = done.last().map_or(f32::MIN, |last| last.1);
            let stop = match params.early_stopping {
                EarlyStopping::Always => full,
                EarlyStopping::Heuristic => full && worst >= score(*best, step),
                EarlyStopping::Never if params.length_penalty > 0.0 => {
                    full && worst >= score(*best, max_tokens)
                }
                EarlyStopping::Never => full && worst >= score(*best, step),
            };
            if stop {
                break;
            }
        }
        for (tokens, sum) in hypotheses.into_iter().filter(|(tokens, _)| tokens.len() == max_tokens)
        {
            let len = tokens.len();
            done.push((tokens, score(sum, len), false));
        }
        done.sort_by(|a, b| b.1.total_cmp(&a.1));
        done.truncate(width);
        done.into_iter().map(|(tokens, _, ended)| (tokens, ended)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn beams_are_those_of_the_plain_search(
            seed in any::<u64>(), width in 1..5_u32, max_tokens in 1..8_u32, penalty in -1.0..2.0_f32, stopping in 0..3_usize, ignore_eos in any::<bool>(),
        ) {
            let early_stopping = [EarlyStopping::Always, EarlyStopping::Heuristic, EarlyStopping::Never][stopping];
            let params = BeamParams { width: NonZeroU32::new(width).unwrap(), length_penalty: penalty, early_stopping };
            let ends: &[TokenId] = if ignore_eos { &[] } else { &[END] };
            let got: Vec<_> = search(params, ends, seed, max_tokens).into_iter().map(|beam| (beam.tokens, beam.stop_token.is_some())).collect();
            prop_assert_eq!(got, plain(params, ends, seed, max_tokens as usize));
        }

        #[test]
        fn one_beam_is_greedy_until_an_end_token_would_win(seed in any::<u64>()) {
            let params = BeamParams { width: NonZeroU32::MIN, length_penalty: 1.0, early_stopping: EarlyStopping::Always };
            let mut greedy = Vec::new();
            for _ in 0..6 {
                greedy.push(top(&model(seed, &greedy), 1)[0].token);
            }
            prop_assert_eq!(&search(params, &[], seed, 6)[0].tokens, &greedy);
        }
    }
}
