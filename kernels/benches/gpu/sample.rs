//! Draws from 131,072 f32 logits a row; the floor is one read of them.

use std::error::Error;
use std::num::NonZeroU32;

use cudarc::driver::CudaSlice;
use kernels::cuda::{
    Admission, Draw, Sample, SampleOutput, SampleScratch, SamplingParams, SamplingRows,
    SamplingShape, TokenScore,
};

use crate::table::Row;
use crate::timer::Timer;

const VOCAB: u32 = 131_072;
/// So many bytes of logits at least are gone through in turn: several times the second cache.
const SPREAD: usize = 400 << 20;

/// Logits as a model's: a normal crowd with some that stand out; or all alike but for a little.
#[derive(Clone, Copy)]
enum Shape {
    Peaked,
    Normal,
    Flat,
    Equal,
}

impl Shape {
    fn logit(self, random: &mut fastrand::Rng) -> f32 {
        let normal = ((-2.0 * (1.0 - random.f32()).ln()).sqrt())
            * (std::f32::consts::TAU * random.f32()).cos();
        match self {
            Self::Peaked if random.u32(..2000) == 0 => 8.0 + 3.0 * normal,
            Self::Peaked | Self::Normal => 2.0 * normal,
            Self::Flat => 0.01 * normal,
            Self::Equal => 0.5,
        }
    }
}

pub(crate) fn rows(timer: &Timer) -> Result<Vec<Row>, Box<dyn Error>> {
    let drawn = SamplingParams { temperature: 1.0, seed: 1, ..SamplingParams::greedy() };
    let top_p = SamplingParams { top_p: 0.9, ..drawn };
    let both = SamplingParams { top_k: NonZeroU32::new(50), ..top_p };
    let cases = [
        ("top-k 50, top-p 0.9", 256, Shape::Peaked, both),
        ("top-k 50, top-p 0.9, normal", 256, Shape::Normal, both),
        ("greedy", 256, Shape::Peaked, SamplingParams::greedy()),
        ("no filter", 256, Shape::Peaked, drawn),
        ("top-p 0.9", 256, Shape::Peaked, top_p),
        ("top-p 0.9, normal", 256, Shape::Normal, top_p),
        ("top-p 0.9, flat", 256, Shape::Flat, top_p),
        ("top-p 0.9, equal", 256, Shape::Equal, top_p),
        ("min-p 0.05", 256, Shape::Peaked, SamplingParams { min_p: 0.05, ..drawn }),
        (
            "penalties, top-p 0.9",
            256,
            Shape::Peaked,
            SamplingParams { frequency_penalty: 0.5, ..top_p },
        ),
        (
            "logprobs 20, top-p 0.9",
            256,
            Shape::Peaked,
            SamplingParams { logprobs: Some(20), ..top_p },
        ),
        ("top-k 50, top-p 0.9", 1, Shape::Peaked, both),
        ("top-p 0.9, flat", 1, Shape::Flat, top_p),
    ];
    let row = |(name, count, shape, params): (&str, u32, Shape, SamplingParams)| {
        let time = measure(timer, count, shape, params)?;
        let bytes = f64::from(count) * f64::from(VOCAB) * 4.0;
        let floor = bytes / timer.copy_rate / 1e3;
        let figure = format!("{:.2} reads", time / floor);
        Ok(Row {
            operation: "sample",
            shape: format!("{count} {name}"),
            time,
            floor,
            rival: None,
            figure,
        })
    };
    cases.into_iter().map(row).collect()
}

/// Microseconds of a launch for `count` rows.
fn measure(
    timer: &Timer,
    count: u32,
    of: Shape,
    params: SamplingParams,
) -> Result<f64, Box<dyn Error>> {
    let (kernels, stream) = (&timer.kernels, timer.kernels.stream());
    let bytes = count as usize * VOCAB as usize * 4;
    let buffers = SPREAD.div_ceil(bytes).clamp(2, 64);
    let mut random = fastrand::Rng::with_seed(7);
    let piece: Vec<f32> = (0..16 * VOCAB).map(|_| of.logit(&mut random)).collect();
    let mut logits: Vec<CudaSlice<f32>> = Vec::new();
    for _ in 0..buffers {
        let mut values = kernels.memory::<f32>((count * VOCAB) as usize)?;
        for row in 0..count as usize {
            // Another part of the random numbers, so that no two rows are the same.
            let from = random.usize(..15) * VOCAB as usize + random.usize(..VOCAB as usize / 4) * 4;
            let begin = row * VOCAB as usize;
            stream.memcpy_htod(
                &piece[from..from + VOCAB as usize],
                &mut values.slice_mut(begin..begin + VOCAB as usize),
            )?;
        }
        logits.push(values);
    }
    let mut rows =
        SamplingRows::new(kernels, SamplingShape { rows: count, vocab: VOCAB, room: 1 })?;
    let history: Vec<u32> = (0..500).map(|_| random.u32(..VOCAB)).collect();
    let words = stream.clone_htod(&history)?;
    for row in 0..count {
        let params = SamplingParams { seed: u64::from(row), ..params };
        let admission = Admission {
            row,
            choice: 0,
            params,
            history: 0..500,
            prompt_len: 100,
            biases: 0..0,
            stops: 0..0,
        };
        kernels.admit_row(&mut rows, &admission, &words)?;
    }
    let draws: Vec<Draw> = (0..count).map(|row| Draw { logits: row, row, candidates: 0 }).collect();
    let draws = stream.clone_htod(&draws)?;
    let mut scratch = SampleScratch::new(kernels, count, VOCAB)?;
    let (mut tokens, mut scores) =
        (kernels.memory(count as usize)?, kernels.memory::<TokenScore>(count as usize * 21)?);
    let shape = Sample {
        logit_rows: count,
        draws: count,
        is_altered: params.is_penalized(),
        is_reported: params.logprobs.is_some(),
    };
    timer.time(buffers.max(8), |index| {
        let output = SampleOutput { tokens: &mut tokens, scores: &mut scores, top: 20 };
        Ok(kernels.sample(
            &shape,
            (&logits[index % buffers], &draws),
            &mut rows,
            &mut scratch,
            output,
        )?)
    })
}
