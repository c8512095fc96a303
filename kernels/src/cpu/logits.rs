//! One pass over a row of logits at a time: what sampling needs to know of all of them. NaN counts as impossible.

use super::exp::exp2;
use super::instructions::dispatched;

/// Logits of a block: their exponentials are added up in f32, those of blocks in f64.
pub const LOGIT_BLOCK: usize = 1024;
/// Lanes of a block: lane `i` holds its logits `i`, `i + 16`, ...
pub const LOGIT_LANES: usize = 16;

dispatched! {
    /// The largest logit of every lane of every block: [blocks, 16]; minus infinity where a lane has none.
    pub fn lane_maxima(logits: &[f32], maxima: &mut Vec<f32>) => lane_maxima_body
}

#[inline(always)]
fn lane_maxima_body(logits: &[f32], maxima: &mut Vec<f32>) {
    maxima.clear();
    for block in logits.chunks(LOGIT_BLOCK) {
        maxima.extend_from_slice(&block_maxima(block));
    }
}

/// NaN is passed over.
#[inline(always)]
fn block_maxima(block: &[f32]) -> [f32; LOGIT_LANES] {
    let mut lanes = [f32::NEG_INFINITY; LOGIT_LANES];
    let chunks = block.chunks_exact(LOGIT_LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LOGIT_LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    for i in 0..rest.len() {
        lanes[i] = if rest[i] > lanes[i] { rest[i] } else { lanes[i] };
    }
    lanes
}

dispatched! {
    /// As [`lane_maxima`], and in the same pass the sum of e^((logit - most) * by) of every block, `most` being the
    /// block's largest logit: 16 lanes in order, then the lanes in order. `by`: above 0. The sum over blocks after
    /// Milakov and Gimelshein, arXiv 1805.02867.
    pub fn exp_sums(logits: &[f32], by: f32, maxima: &mut Vec<f32>, sums: &mut Vec<f32>) => exp_sums_body
}

#[inline(always)]
fn exp_sums_body(logits: &[f32], by: f32, maxima: &mut Vec<f32>, sums: &mut Vec<f32>) {
    maxima.clear();
    sums.clear();
    for block in logits.chunks(LOGIT_BLOCK) {
        let lanes = block_maxima(block);
        maxima.extend_from_slice(&lanes);
        let mut most = f32::NEG_INFINITY;
        for lane in lanes {
            most = if lane > most { lane } else { most };
        }
        sums.push(exp_sum(block, most, by));
    }
}

#[inline(always)]
fn exp_sum(block: &[f32], most: f32, by: f32) -> f32 {
    let scale = by * std::f32::consts::LOG2_E;
    let shift = -most * scale;
    let mut lanes = [0.0_f32; LOGIT_LANES];
    let chunks = block.chunks_exact(LOGIT_LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LOGIT_LANES {
            lanes[i] += exp2(chunk[i].mul_add(scale, shift));
        }
    }
    for i in 0..rest.len() {
        lanes[i] += exp2(rest[i].mul_add(scale, shift));
    }
    let mut sum = 0.0;
    for lane in lanes {
        sum += lane;
    }
    sum
}

dispatched! {
    /// e^((logit - most) * by) of every logit, 0 for NaN. `most`: at least the largest logit; `by`: above 0.
    pub fn exp_weights(logits: &[f32], most: f32, by: f32, weights: &mut Vec<f32>) => exp_weights_body
}

#[inline(always)]
fn exp_weights_body(logits: &[f32], most: f32, by: f32, weights: &mut Vec<f32>) {
    let scale = by * std::f32::consts::LOG2_E;
    let shift = -most * scale;
    weights.clear();
    weights.resize(logits.len(), 0.0);
    for i in 0..logits.len() {
        weights[i] = exp2(logits[i].mul_add(scale, shift));
    }
}

dispatched! {
    /// The sum of the weights whose logits reach `bar`: blocks of 1,024 in f32, their sums in f64.
    pub fn sum_reaching(logits: &[f32], weights: &[f32], bar: f32) -> f64 => sum_reaching_body
}

#[inline(always)]
fn sum_reaching_body(logits: &[f32], weights: &[f32], bar: f32) -> f64 {
    let mut total = 0.0_f64;
    for (logits, weights) in logits.chunks(LOGIT_BLOCK).zip(weights.chunks(LOGIT_BLOCK)) {
        let mut lanes = [0.0_f32; LOGIT_LANES];
        let (logits, weights) =
            (logits.chunks_exact(LOGIT_LANES), weights.chunks_exact(LOGIT_LANES));
        let (rest, rest_weights) = (logits.remainder(), weights.remainder());
        for (logits, weights) in logits.zip(weights) {
            for i in 0..LOGIT_LANES {
                let (reaches, weight) = (logits[i] >= bar, weights[i]);
                lanes[i] += if reaches { weight } else { 0.0 };
            }
        }
        for i in 0..rest.len().min(rest_weights.len()) {
            lanes[i] += if rest[i] >= bar { rest_weights[i] } else { 0.0 };
        }
        let mut sum = 0.0;
        for lane in lanes {
            sum += lane;
        }
        total += f64::from(sum);
    }
    total
}

dispatched! {
    /// How many logits reach `bar`.
    pub fn count_reaching(logits: &[f32], bar: f32) -> usize => count_reaching_body
}

#[inline(always)]
fn count_reaching_body(logits: &[f32], bar: f32) -> usize {
    let mut total = 0;
    for block in logits.chunks(LOGIT_BLOCK) {
        let mut count = 0_u32;
        for &logit in block {
            count += u32::from(logit >= bar);
        }
        total += count as usize;
    }
    total
}

dispatched! {
    /// How many logits are above `bar`.
    pub fn count_above(logits: &[f32], bar: f32) -> usize => count_above_body
}

#[inline(always)]
fn count_above_body(logits: &[f32], bar: f32) -> usize {
    let mut total = 0;
    for block in logits.chunks(LOGIT_BLOCK) {
        let mut count = 0_u32;
        for &logit in block {
            count += u32::from(logit > bar);
        }
        total += count as usize;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(len: usize) -> Vec<f32> {
        let value = |i: usize| ((i * 7919 + len) % 10_007) as f32 * 0.003 - 12.0;
        let mut row: Vec<f32> = (0..len).map(value).collect();
        for (at, odd) in [(3, f32::NAN), (20, f32::NEG_INFINITY), (1030, -0.0)] {
            if let Some(logit) = row.get_mut(at) {
                *logit = odd;
            }
        }
        row
    }

    const LENGTHS: [usize; 8] = [0, 1, 15, 17, 1023, 1024, 1041, 5000];

    #[test]
    fn lanes_have_their_largest_logit() {
        for len in LENGTHS {
            let row = row(len);
            let mut maxima = vec![7.0];
            lane_maxima(&row, &mut maxima);
            assert_eq!(maxima.len(), len.div_ceil(LOGIT_BLOCK) * LOGIT_LANES);
            for (at, &most) in maxima.iter().enumerate() {
                let block = row.chunks(LOGIT_BLOCK).nth(at / LOGIT_LANES).unwrap();
                let lane = block.iter().skip(at % LOGIT_LANES).step_by(LOGIT_LANES);
                let wanted = lane.copied().fold(f32::NEG_INFINITY, f32::max);
                assert_eq!(most, wanted, "{len}: {at}");
            }
        }
    }

    #[test]
    fn sums_weights_and_counts_are_their_formulas() {
        for len in LENGTHS {
            let row = row(len);
            let wanted = |logit: f32, most: f32| {
                let weight = ((f64::from(logit) - f64::from(most)) * 0.7).exp();
                if weight.is_nan() { 0.0 } else { weight }
            };
            let close = |got: f32, wanted: f64| (f64::from(got) - wanted).abs() <= 1e-5 * wanted;
            let (mut sums, mut maxima, mut weights) = (Vec::new(), Vec::new(), Vec::new());
            exp_sums(&row, 0.7, &mut maxima, &mut sums);
            assert_eq!(sums.len(), len.div_ceil(LOGIT_BLOCK));
            for (block, &sum) in row.chunks(LOGIT_BLOCK).zip(&sums) {
                let most = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let whole: f64 = block.iter().map(|&logit| wanted(logit, most)).sum();
                assert!(close(sum, whole), "{len}: {sum} {whole}");
            }
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            exp_weights(&row, most, 0.7, &mut weights);
            assert_eq!(weights.len(), len);
            for (&logit, &weight) in row.iter().zip(&weights) {
                assert!(close(weight, wanted(logit, most)), "{logit}: {weight}");
            }
            for bar in [f32::NEG_INFINITY, -5.0, 3.0, f32::INFINITY] {
                assert_eq!(
                    count_above(&row, bar),
                    row.iter().filter(|&&logit| logit > bar).count()
                );
                let reaching = || row.iter().zip(&weights).filter(|(logit, _)| **logit >= bar);
                assert_eq!(count_reaching(&row, bar), reaching().count());
                let whole: f64 = reaching().map(|(_, &weight)| f64::from(weight)).sum();
                assert!((sum_reaching(&row, &weights, bar) - whole).abs() <= 1e-5 * whole);
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let row = row(5000);
        let (mut here, mut maxima, mut portable, mut other) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        exp_sums(&row, 0.7, &mut maxima, &mut here);
        exp_sums_body(&row, 0.7, &mut other, &mut portable);
        assert_eq!((&here, &maxima), (&portable, &other));
        lane_maxima(&row, &mut here);
        assert_eq!(here, maxima);
        exp_weights(&row, 18.0, 0.7, &mut here);
        exp_weights_body(&row, 18.0, 0.7, &mut portable);
        assert_eq!(here, portable);
        assert_eq!(sum_reaching(&row, &here, 1.0), sum_reaching_body(&row, &here, 1.0));
        assert_eq!(count_above(&row, 1.0), count_above_body(&row, 1.0));
        assert_eq!(count_reaching(&row, 1.0), count_reaching_body(&row, 1.0));
    }
}
