//! One pass over a row of logits, and the few logits that matter found by what it saw.

use std::cell::RefCell;

pub(super) use kernels::cpu::{LOGIT_BLOCK, count_above, count_reaching};
use kernels::cpu::{LOGIT_LANES, exp_sums, exp_weights, lane_maxima, sum_reaching};

use crate::request::TokenId;

thread_local! {
    /// Each thread's: its memory is taken once.
    static SURVEY: RefCell<Survey> = RefCell::default();
}

/// A block with no more lanes in question than this is read lane by lane.
const FEW_LANES: usize = 4;
/// So many logits are sorted at once.
const FEW: usize = 64;
/// The range of a selection shrinks to 1 part in 2 to this.
const HALVINGS: usize = 14;

/// Bytes that a thread's survey of rows of `vocab` logits comes to at most.
pub(super) const fn bytes(vocab: usize) -> usize {
    vocab.saturating_mul(7 * size_of::<f32>())
}

/// What is known of one row, and room to work on it.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// The largest logit of every lane of every block.
    maxima: Vec<f32>,
    /// The largest logit; minus infinity when none is possible.
    pub(super) most: f32,
    /// Sums of the weights of a row's blocks.
    pub(super) sums: Vec<f32>,
    /// Tokens that are still in question, by id.
    pub(super) ids: Vec<u32>,
    /// Their logits.
    pub(super) kept: Vec<f32>,
    weights: Vec<f32>,
    /// Values that a selection may reorder.
    order: Vec<f32>,
    /// Logits and weights that a selection sorts.
    between: Vec<(f32, f32)>,
    /// A copy of the row with bias and penalties.
    pub(super) changed: Vec<f32>,
}

/// Works with the thread's own survey, which has looked at another row.
pub(super) fn with_survey<T>(work: impl FnOnce(&mut Survey) -> T) -> T {
    SURVEY.with_borrow_mut(work)
}

/// How logits become weights: e^((logit - most) * by).
#[derive(Debug, Clone, Copy)]
pub(super) struct Scale {
    pub(super) most: f32,
    /// One over the temperature.
    pub(super) by: f32,
}

impl Survey {
    /// Forgets the row before and passes over this one.
    pub(super) fn look_at(&mut self, logits: &[f32]) {
        lane_maxima(logits, &mut self.maxima);
        self.most = largest(&self.maxima);
    }

    /// The most likely token: the lowest id among equals, 0 when nothing is possible.
    pub(super) fn most_likely(&self, logits: &[f32]) -> TokenId {
        if self.most == f32::NEG_INFINITY {
            return TokenId(0);
        }
        let block = self.maxima.chunks(LOGIT_LANES).position(|lanes| lanes.contains(&self.most));
        let first = block.unwrap_or(0) * LOGIT_BLOCK;
        let at = logits[first..].iter().position(|&logit| logit == self.most);
        token(first + at.unwrap_or(0))
    }

    /// As [`Survey::look_at`], and in the same pass sums the row's weights, block by block.
    pub(super) fn sum(&mut self, logits: &[f32], by: f32) {
        let Self { maxima, sums, weights, order, .. } = self;
        exp_sums(logits, by, maxima, sums);
        // Of each block: its largest logit.
        order.clear();
        order.extend(maxima.chunks(LOGIT_LANES).map(largest));
        self.most = largest(order);
        exp_weights(order, self.most, by, weights);
        sums.iter_mut().zip(weights).for_each(|(sum, weight)| *sum *= *weight);
    }

    /// The sum of all weights, of a row that was summed.
    pub(super) fn total(&self) -> f64 {
        self.sums.iter().copied().map(f64::from).sum()
    }

    /// The weights of some logits, in their order.
    pub(super) fn weights(&mut self, logits: &[f32], scale: Scale) -> &[f32] {
        exp_weights(logits, scale.most, scale.by, &mut self.weights);
        &self.weights
    }

    /// The weights of the logits in question.
    pub(super) fn kept_weights(&mut self, scale: Scale) -> &[f32] {
        exp_weights(&self.kept, scale.most, scale.by, &mut self.weights);
        &self.weights
    }

    /// Puts the tokens in question whose logits reach `bar`. NaN never does; minus infinity takes all but NaN.
    pub(super) fn list(&mut self, logits: &[f32], bar: f32) {
        self.ids.clear();
        let blocks = logits.chunks(LOGIT_BLOCK).zip(self.maxima.chunks(LOGIT_LANES));
        for (index, (block, lanes)) in blocks.enumerate() {
            let first = token(index * LOGIT_BLOCK).0;
            match lanes.iter().filter(|&&most| most >= bar).count() {
                0 => {}
                1..=FEW_LANES => list_lanes(block, lanes, bar, first, &mut self.ids),
                _ => list_block(block, bar, first, &mut self.ids),
            }
        }
        self.kept.clear();
        self.kept.extend(self.ids.iter().map(|&id| logits[id as usize]));
    }

    /// Leaves in question only what reaches `bar`.
    pub(super) fn retain(&mut self, bar: f32) {
        let mut left = 0;
        for at in 0..self.kept.len() {
            (self.ids[left], self.kept[left]) = (self.ids[at], self.kept[at]);
            left += usize::from(self.kept[left] >= bar);
        }
        self.ids.truncate(left);
        self.kept.truncate(left);
    }

    /// A logit that at least `k` of the row reach; `None` where one pass tells too little.
    pub(super) fn reached_by(&mut self, k: usize) -> Option<f32> {
        self.order.clone_from(&self.maxima);
        kth_largest(&mut self.order, k)
    }

    /// The `k`-th largest of the logits in question; `None` when there are not as many.
    pub(super) fn kth_kept(&mut self, k: usize) -> Option<f32> {
        self.order.clone_from(&self.kept);
        kth_largest(&mut self.order, k)
    }

    /// The smallest of the most likely logits in question whose weights first reach `wanted`.
    pub(super) fn nucleus_of_kept(&mut self, scale: Scale, wanted: f64) -> f32 {
        exp_weights(&self.kept, scale.most, scale.by, &mut self.weights);
        nucleus(&self.kept, &self.weights, wanted, &mut self.between)
    }

    /// A logit that the nucleus does not go below. `total`: of all `n` weights.
    pub(super) fn nucleus_bound(&mut self, scale: Scale, wanted: f64, total: f64, n: usize) -> f32 {
        exp_weights(&self.maxima, scale.most, scale.by, &mut self.weights);
        if sum_reaching(&self.maxima, &self.weights, f32::MIN) >= wanted {
            // The largest of all lanes reach it, so the largest of all logits do so sooner.
            return nucleus(&self.maxima, &self.weights, wanted, &mut self.between);
        }
        // All weights below this come to less than what the nucleus leaves out. The margin is for rounding.
        let least = (total - wanted) / n as f64;
        #[allow(clippy::cast_possible_truncation, reason = "a bound with a margin")]
        let bound = scale.most + (least.ln() as f32) / scale.by - 1e-3;
        if bound.is_nan() { f32::NEG_INFINITY } else { bound }
    }
}

/// Appends the ids of a block that reach `bar`, where few of its lanes do.
fn list_lanes(block: &[f32], lanes: &[f32], bar: f32, first: u32, ids: &mut Vec<u32>) {
    let before = ids.len();
    for (lane, _) in lanes.iter().enumerate().filter(|(_, most)| **most >= bar) {
        let places = (lane..block.len()).step_by(LOGIT_LANES);
        ids.extend(places.filter(|&at| block[at] >= bar).map(|at| first + token(at).0));
    }
    ids[before..].sort_unstable();
}

/// Appends the ids of a block that reach `bar`, without a branch on what is hard to predict.
fn list_block(block: &[f32], bar: f32, first: u32, ids: &mut Vec<u32>) {
    let mut left = ids.len();
    ids.resize(left + block.len() + 1, 0);
    for (id, &logit) in (first..).zip(block) {
        ids[left] = id;
        left += usize::from(logit >= bar);
    }
    ids.truncate(left);
}

fn kth_largest(values: &mut [f32], k: usize) -> Option<f32> {
    let at = k.checked_sub(1).filter(|&at| at < values.len())?;
    let (_, kth, _) = values.select_nth_unstable_by(at, |a, b| b.total_cmp(a));
    Some(*kth)
}

/// The smallest of the largest logits whose weights first reach `wanted`: the range that holds it is halved again and
/// again, and what is left between is sorted. `between` is scratch.
fn nucleus(logits: &[f32], weights: &[f32], wanted: f64, between: &mut Vec<(f32, f32)>) -> f32 {
    let possible = logits.iter().copied().filter(|&logit| logit > f32::NEG_INFINITY);
    // What reaches `high` weighs `reached`, too little; what reaches `low` is enough.
    let (mut low, mut high) = (possible.fold(f32::INFINITY, f32::min), f32::INFINITY);
    let mut reached = 0.0;
    let mut middle = largest(logits);
    for _ in 0..if logits.len() > FEW { HALVINGS } else { 0 } {
        let sum = sum_reaching(logits, weights, middle);
        if sum >= wanted {
            low = middle;
        } else {
            (high, reached) = (middle, sum);
        }
        if high == f32::INFINITY {
            break;
        }
        middle = low * 0.5 + high * 0.5;
    }
    between.clear();
    let pairs = logits.iter().copied().zip(weights.iter().copied());
    between.extend(pairs.filter(|(logit, _)| *logit >= low && *logit < high));
    between.sort_unstable_by(|(a, _), (b, _)| b.total_cmp(a));
    let reaches = |&&(_, weight): &&(f32, f32)| {
        reached += f64::from(weight);
        reached >= wanted
    };
    between.iter().find(reaches).map_or(low, |(logit, _)| *logit)
}

fn largest(values: &[f32]) -> f32 {
    values.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The token at a place of the row.
pub(super) fn token(at: usize) -> TokenId {
    TokenId(u32::try_from(at).unwrap_or(u32::MAX))
}
