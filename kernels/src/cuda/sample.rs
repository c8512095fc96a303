//! Tokens from logits: min-p, top-k, top-p and the draw, and log-probabilities; what a row keeps is in `sampling_rows`.

use super::SamplingState;

/// A token's log-probability by the raw logits, and its rank, 1 for the most likely.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TokenScore {
    pub token: u32,
    /// Natural logarithm.
    pub logprob: f32,
    pub rank: u32,
}

/// What the filters leave of a row, in id order.
#[derive(Debug, Clone, PartialEq)]
struct Kept {
    ids: Vec<u32>,
    weights: Vec<f64>,
}

impl Kept {
    /// The first token whose running sum exceeds u of the total.
    fn draw(&self, u: f32) -> u32 {
        let target = f64::from(u) * self.weights.iter().sum::<f64>();
        let mut sum = 0.0;
        let beyond = self.weights.iter().position(|weight| {
            sum += weight;
            sum > target
        });
        // Where rounding leaves the sum short it is the last possible one.
        let last = || self.weights.iter().rposition(|weight| *weight > 0.0);
        beyond.or_else(last).map_or(0, |at| self.ids[at])
    }

    /// Whether `u` is within `tolerance` of the token's part of [0, 1).
    fn is_near(&self, token: u32, u: f32, tolerance: f64) -> bool {
        let Ok(at) = self.ids.binary_search(&token) else { return false };
        let total: f64 = self.weights.iter().sum();
        let before = self.weights[..at].iter().sum::<f64>() / total;
        let through = before + self.weights[at] / total;
        (before - tolerance..=through + tolerance).contains(&f64::from(u))
    }
}

impl SamplingState {
    /// The meaning of `sample`: the token that is drawn of raw `logits`, [vocab]. NaN is impossible; where nothing is possible it
    /// is token 0.
    pub fn sample(&self, logits: &[f32]) -> u32 {
        self.kept(logits, self.params.top_p).draw(self.uniform())
    }

    /// Whether `token` is what [`Self::sample`] says, or `u` and the sums at the boundaries of the nucleus and of the token are
    /// within `tolerance` of each other, as a share of the total.
    pub fn could_sample(&self, logits: &[f32], token: u32, tolerance: f64) -> bool {
        let reach = self.params.top_p;
        let near = if reach < 1.0 {
            vec![reach, reach * (1.0 - 1e-5), reach * (1.0 + 1e-5)]
        } else {
            vec![reach]
        };
        token == self.sample(logits)
            || near
                .iter()
                .any(|reach| self.kept(logits, *reach).is_near(token, self.uniform(), tolerance))
    }

    fn kept(&self, raw: &[f32], top_p: f32) -> Kept {
        let mut logits = raw.to_vec();
        self.change(&mut logits);
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if self.params.is_greedy() || !most.is_finite() {
            let first = logits.iter().position(|logit| *logit == most && most > f32::NEG_INFINITY);
            return Kept { ids: vec![first.map_or(0, |at| at as u32)], weights: vec![1.0] };
        }
        let by = f64::from(1.0 / self.params.temperature);
        let weight = |logit: f32| ((f64::from(logit) - f64::from(most)) * by).exp();
        let mut order: Vec<u32> = (0..)
            .zip(&logits)
            .filter(|(_, logit)| **logit > f32::NEG_INFINITY)
            .map(|(id, _)| id)
            .collect();
        let logit = |id: u32| logits[id as usize];
        order.retain(|&id| logit(id) >= most + self.params.least());
        order.sort_by(|a, b| logit(*b).total_cmp(&logit(*a)));
        let retain = |order: &mut Vec<u32>, bar: Option<u32>| {
            if let Some(bar) = bar {
                order.retain(|&id| logit(id) >= logit(bar));
            }
        };
        let kth = self.params.top_k.and_then(|k| order.get(k.get() as usize - 1).copied());
        retain(&mut order, kth);
        if top_p < 1.0 {
            let wanted = f64::from(top_p) * order.iter().map(|&id| weight(logit(id))).sum::<f64>();
            let mut sum = 0.0;
            let bar = order.iter().copied().find(|&id| {
                sum += weight(logit(id));
                sum >= wanted
            });
            retain(&mut order, bar);
        }
        order.sort_unstable();
        Kept { weights: order.iter().map(|&id| weight(logit(id))).collect(), ids: order }
    }
}

impl TokenScore {
    /// The meaning of a report: `token`'s score by raw `logits`, [vocab].
    pub fn reference(logits: &[f32], token: u32) -> Self {
        let own = logits.get(token as usize).copied().map_or(f32::NEG_INFINITY, clean);
        let is_before = |(id, logit): &(u32, &f32)| {
            clean(**logit) > own || (clean(**logit) == own && *id < token)
        };
        let before = (0..).zip(logits).filter(is_before).count();
        Self { token, logprob: logprob(own, log_partition(logits)), rank: before as u32 + 1 }
    }

    /// The meaning of a report: the `count` most likely tokens, or all, best first, equal ones in id order.
    pub fn most_likely(logits: &[f32], count: usize) -> Vec<Self> {
        let partition = log_partition(logits);
        let mut order: Vec<(u32, f32)> =
            (0..).zip(logits).map(|(id, logit)| (id, clean(*logit) + 0.0)).collect();
        order.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        let entry = |(rank, &(token, logit)): (u32, &(u32, f32))| Self {
            token,
            logprob: logprob(logit, partition),
            rank,
        };
        (1..).zip(order.iter().take(count)).map(entry).collect()
    }
}

/// NaN as minus infinity.
fn clean(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit }
}

/// The natural logarithm of what exponentials of logits are divided by to be probabilities.
fn log_partition(logits: &[f32]) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    if !most.is_finite() {
        return most;
    }
    let sum: f64 = logits.iter().map(|logit| (f64::from(clean(*logit)) - most).exp()).sum();
    most + sum.ln()
}

fn logprob(logit: f32, partition: f64) -> f32 {
    let value = (f64::from(logit) - partition) as f32;
    if value.is_nan() { f32::NEG_INFINITY } else { value }
}

#[cfg(feature = "cuda")]
pub(super) use launch::MODULE;
#[cfg(feature = "cuda")]
pub use launch::{Draw, Logit, Sample, SampleOutput, SampleScratch};

#[cfg(feature = "cuda")]
mod launch {
    use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr};
    use half::{bf16, f16};

    use super::TokenScore;
    use crate::cuda::beside::Grid;
    use crate::cuda::device::Module;
    use crate::cuda::launch::{at_least, below, launched, len, same};
    use crate::cuda::sampling_rows::Rows;
    use crate::cuda::{DeviceError, Kernels, LaunchError, SamplingRows};

    /// As in the kernel.
    const GROUP: u32 = 64;
    const PIECE: u32 = 8192;
    const SURVEY_THREADS: u32 = 256;
    const THREADS: u32 = 512;
    /// Most likely tokens of a report: they fit the list.
    const MOST_TOP: u32 = 1024;
    /// Groups of a row: what is kept of them is in shared memory, beside 20,832 bytes that the kernel always has; sm_86 has 99 KiB.
    const MOST_GROUPS: u32 = 5752;
    /// Blocks a grid has in its second dimension at most.
    const MOST_DRAWS: u32 = 65_535;

    pub(in crate::cuda) const MODULE: Module = Module {
        image: include_bytes!(concat!(env!("OUT_DIR"), "/sample.fatbin")),
        functions: &[
            "alter_f32",
            "survey_f32",
            "choose_f32",
            "survey_raw_f32",
            "report_f32",
            "alter_bf16",
            "survey_bf16",
            "choose_bf16",
            "survey_raw_bf16",
            "report_bf16",
            "alter_f16",
            "survey_f16",
            "choose_f16",
            "survey_raw_f16",
            "report_f16",
        ],
        most_shared: shared(MOST_GROUPS),
    };

    /// Bytes of shared memory of a block that chooses, for its groups.
    const fn shared(groups: u32) -> u32 {
        groups * 14
    }

    /// Numbers that logits are.
    pub trait Logit: DeviceRepr + Copy {
        /// In the names of kernels.
        const NAME: &str;
    }
    impl Logit for f32 {
        const NAME: &str = "f32";
    }
    impl Logit for bf16 {
        const NAME: &str = "bf16";
    }
    impl Logit for f16 {
        const NAME: &str = "f16";
    }

    /// One draw. Draws of one launch name each row once.
    #[repr(C)]
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Draw {
        /// The row of the logits; one that is not there: nothing is drawn, and the token is 0.
        pub logits: u32,
        /// The row of the state, which takes up the token; one that is not admitted draws greedily.
        pub row: u32,
        /// Above 0: so many of the most likely are reported, nothing is drawn, and the token is 0.
        pub candidates: u32,
    }

    // SAFETY: numbers alone, laid out as in C.
    unsafe impl DeviceRepr for Draw {}
    // SAFETY: numbers alone, laid out as in C.
    unsafe impl DeviceRepr for TokenScore {}

    /// Draws from rows of logits.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Sample {
        pub logit_rows: u32,
        pub draws: u32,
        /// Whether any of the rows biases, penalizes or holds back stop tokens. Without, rows that do draw as if they did not.
        pub is_altered: bool,
        /// Whether any draw reports log-probabilities.
        pub is_reported: bool,
    }

    /// What a launch keeps between its kernels.
    #[derive(Debug)]
    pub struct SampleScratch {
        altered: CudaSlice<f32>,
        summary: CudaSlice<f32>,
        before: CudaSlice<u32>,
    }

    impl SampleScratch {
        /// For launches of at most `draws` draws of `vocab` logits: 4 bytes a draw and token, and a little.
        ///
        /// # Errors
        /// When the device has not as much memory.
        pub fn new(kernels: &Kernels, draws: u32, vocab: u32) -> Result<Self, DeviceError> {
            let groups = vocab.div_ceil(GROUP);
            Ok(Self {
                altered: kernels.memory(len(&[draws, groups, GROUP]).max(1))?,
                summary: kernels.memory(len(&[draws, groups, 2]).max(1))?,
                before: kernels.memory((draws as usize).max(1))?,
            })
        }
    }

    /// What draws give.
    #[derive(Debug)]
    pub struct SampleOutput<'a> {
        /// [draws]
        pub tokens: &'a mut CudaSlice<u32>,
        /// [draws, 1 + top]: the drawn token, then the most likely ones, best first, as many as there are tokens and are asked for.
        /// What a draw does not report is left as it was.
        pub scores: &'a mut CudaSlice<TokenScore>,
        /// Most of the most likely that are reported.
        pub top: u32,
    }

    /// As `Sample` in sample.cu.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    struct Argument {
        rows: Rows,
        draws: u64,
        tokens: u64,
        altered: u64,
        summary: u64,
        scores: u64,
        before: u64,
        logits: u64,
        logit_rows: u32,
        groups: u32,
        top: u32,
    }

    impl Sample {
        fn check(
            &self,
            rows: &SamplingRows,
            (logits, draws): (usize, usize),
            scratch: &SampleScratch,
            output: &SampleOutput<'_>,
        ) -> Result<(), LaunchError> {
            let vocab = rows.shape.vocab;
            let groups = vocab.div_ceil(GROUP);
            below("groups of 64 tokens", groups, MOST_GROUPS + 1)?;
            below("draws", self.draws, MOST_DRAWS + 1)?;
            below("most likely tokens", output.top, MOST_TOP + 1)?;
            same("logits", logits, len(&[self.logit_rows, vocab]))?;
            same("draws", draws, self.draws as usize)?;
            same("tokens", output.tokens.len(), draws)?;
            at_least("rows of scratch", scratch.before.len(), draws)?;
            at_least("altered logits", scratch.altered.len(), len(&[self.draws, groups, GROUP]))?;
            at_least("summary", scratch.summary.len(), len(&[self.draws, groups, 2]))?;
            if self.is_reported {
                same("scores", output.scores.len(), len(&[self.draws, output.top + 1]))?;
            }
            Ok(())
        }

        fn argument<T: Logit>(
            &self,
            kernels: &Kernels,
            rows: &mut SamplingRows,
            (logits, draws): (&CudaSlice<T>, &CudaSlice<Draw>),
            scratch: &mut SampleScratch,
            output: &mut SampleOutput<'_>,
        ) -> Argument {
            let stream = kernels.stream();
            Argument {
                rows: rows.argument(kernels),
                draws: draws.device_ptr(stream).0,
                tokens: output.tokens.device_ptr_mut(stream).0,
                altered: if self.is_altered { scratch.altered.device_ptr_mut(stream).0 } else { 0 },
                summary: scratch.summary.device_ptr_mut(stream).0,
                scores: output.scores.device_ptr_mut(stream).0,
                before: scratch.before.device_ptr_mut(stream).0,
                logits: logits.device_ptr(stream).0,
                logit_rows: self.logit_rows,
                groups: rows.shape.vocab.div_ceil(GROUP),
                top: output.top,
            }
        }
    }

    impl Kernels {
        /// Queues the draws. `logits`: [logit_rows, vocab]; a draw means [`super::SamplingState::sample`], its row takes the token
        /// up, and reports mean [`TokenScore::reference`] and [`TokenScore::most_likely`].
        ///
        /// # Errors
        /// When lengths do not fit, or there are more tokens, draws or scores than the kernels take.
        pub fn sample<T: Logit>(
            &self,
            shape: &Sample,
            (logits, draws): (&CudaSlice<T>, &CudaSlice<Draw>),
            rows: &mut SamplingRows,
            scratch: &mut SampleScratch,
            mut output: SampleOutput<'_>,
        ) -> Result<(), LaunchError> {
            shape.check(rows, (logits.len(), draws.len()), scratch, &output)?;
            if shape.draws == 0 {
                return Ok(());
            }
            let argument = shape.argument(self, rows, (logits, draws), scratch, &mut output);
            let pieces = (argument.groups * GROUP).div_ceil(PIECE).max(1);
            let all = Grid::of([pieces, shape.draws], SURVEY_THREADS);
            let each = Grid::of([shape.draws, 1], THREADS);
            let each = Grid { shared_bytes: shared(argument.groups), ..each };
            let stages = [
                ("alter", all, shape.is_altered),
                ("survey", all, true),
                ("choose", each, true),
                ("survey_raw", all, shape.is_reported),
                ("report", each, shape.is_reported),
            ];
            for (name, grid, _) in stages.into_iter().filter(|(_, _, is_wanted)| *is_wanted) {
                let function = self.kernel(&format!("{name}_{}", T::NAME))?;
                // SAFETY: the argument is that of the kernels of sample.cu, which stay within the lengths checked above, bound rows,
                // tokens and counts by them and wait first.
                launched(name, unsafe { grid.queue(self, function, &argument) })?;
            }
            Ok(())
        }
    }
}
