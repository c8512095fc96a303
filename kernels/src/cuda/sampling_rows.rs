//! Rows of sampling state, one for each sequence that runs: how its tokens are drawn, what it has drawn.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

/// How a row's tokens are drawn. Values are as whoever took the request checked them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingParams {
    /// Below 1e-5 it is greedy: the most likely token, the lowest id among equals.
    pub temperature: f32,
    /// Keep only this many of the most likely tokens, and all as likely as the last of them; 1 is greedy.
    pub top_k: Option<NonZeroU32>,
    /// Then keep the most likely tokens whose probabilities first reach this share, and all as likely as the last; 1 keeps all.
    pub top_p: f32,
    /// Before both, drop tokens less likely than this share of the most likely; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from tokens that are in the output.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    pub seed: u64,
    /// The first word of the random counter.
    pub prompt_index: u32,
    /// Stop tokens are not drawn before this many output tokens.
    pub min_tokens: u32,
    /// Report the drawn token's log-probability and so many of the most likely.
    pub logprobs: Option<u32>,
}

impl SamplingParams {
    /// Below this a temperature is greedy, as in vLLM.
    const GREEDY_BELOW: f32 = 1e-5;

    /// The most likely token, with nothing else asked for.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
            prompt_index: 0,
            min_tokens: 0,
            logprobs: None,
        }
    }

    /// Whether the most likely token is always drawn.
    pub fn is_greedy(&self) -> bool {
        self.temperature < Self::GREEDY_BELOW || self.top_k.is_some_and(|k| k.get() == 1)
    }

    /// Whether what was drawn changes logits.
    pub fn is_penalized(&self) -> bool {
        self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || self.repetition_penalty != 1.0
    }

    /// What min-p lets a logit be below the largest, at most; minus infinity where it keeps all. In f32, as everywhere.
    pub(super) fn least(&self) -> f32 {
        if self.min_p > 0.0 {
            self.min_p.ln() / (1.0 / self.temperature)
        } else {
            f32::NEG_INFINITY
        }
    }
}

/// The meaning of a row of the device: one sequence's state.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingState {
    pub params: SamplingParams,
    pub choice: u32,
    pub last: Option<u32>,
    /// Tokens of prompt and output.
    pub length: u32,
    pub output_length: u32,
    /// Occurrences in the output of tokens that prompt or output have; only where there are penalties.
    pub counts: BTreeMap<u32, u32>,
    /// Tokens, each once, and what is added to their logits.
    pub biases: Vec<(u32, f32)>,
    /// Tokens that `min_tokens` holds back.
    pub stops: Vec<u32>,
}

impl SamplingState {
    /// The state of a sequence whose known tokens are `history`, the first `prompt_len` of them its prompt.
    pub fn admitted(
        params: SamplingParams,
        choice: u32,
        (history, prompt_len): (&[u32], usize),
    ) -> Self {
        let mut counts = BTreeMap::new();
        for (position, token) in history.iter().enumerate().filter(|_| params.is_penalized()) {
            *counts.entry(*token).or_default() += u32::from(position >= prompt_len);
        }
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        Self {
            params,
            choice,
            last: history.last().copied(),
            length: count(history.len()),
            output_length: count(history.len().saturating_sub(prompt_len)),
            counts,
            biases: Vec::new(),
            stops: Vec::new(),
        }
    }

    /// The same sequence, which goes on as another choice.
    pub fn forked(&self, choice: u32) -> Self {
        Self { choice, ..self.clone() }
    }

    /// Follows a drawn token.
    pub fn take_up(&mut self, token: u32) {
        self.last = Some(token);
        self.length += 1;
        self.output_length += 1;
        if self.params.is_penalized() {
            *self.counts.entry(token).or_default() += 1;
        }
    }

    /// Bias, then stop tokens that must not come yet, then penalties.
    pub fn change(&self, logits: &mut [f32]) {
        for (token, bias) in &self.biases {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        for stop in self.stops.iter().filter(|_| self.output_length < self.params.min_tokens) {
            if let Some(logit) = logits.get_mut(*stop as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        for (token, &count) in &self.counts {
            let Some(logit) = logits.get_mut(*token as usize) else { continue };
            let by = self.params.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / by } else { *logit * by };
            *logit -= self.params.frequency_penalty * count as f32;
            if count > 0 {
                *logit -= self.params.presence_penalty;
            }
        }
    }

    /// The number in [0, 1) that decides the next draw: 24 bits of Philox4x32-10 (Salmon et al., SC 2011).
    pub fn uniform(&self) -> f32 {
        let words = [self.params.seed & 0xffff_ffff, self.params.seed >> 32];
        let mut key = words.map(|word| word as u32);
        let mut state = [self.params.prompt_index, self.choice, self.length, 0];
        for _ in 0..10 {
            let product = |by: u32, word: u32| u64::from(by) * u64::from(word);
            let (a, b) = (product(0xD251_1F53, state[0]), product(0xCD9E_8D57, state[2]));
            let high = [a, b].map(|product| (product >> 32) as u32);
            let low = [a, b].map(|product| (product & 0xffff_ffff) as u32);
            state = [high[1] ^ state[1] ^ key[0], low[1], high[0] ^ state[3] ^ key[1], low[0]];
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        (state[0] >> 8) as f32 * (1.0 / 16_777_216.0)
    }
}

#[cfg(feature = "cuda")]
pub use launch::{Admission, SamplingRows, SamplingShape};
#[cfg(feature = "cuda")]
pub(super) use launch::{MODULE, Rows};

#[cfg(feature = "cuda")]
mod launch {
    use std::ops::Range;

    use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

    use super::SamplingParams;
    use crate::cuda::beside::Grid;
    use crate::cuda::device::Module;
    use crate::cuda::launch::{THREADS, at_least, below, launched, len, same};
    use crate::cuda::{DeviceError, Kernels, LaunchError};

    pub(in crate::cuda) const MODULE: Module = Module {
        image: include_bytes!(concat!(env!("OUT_DIR"), "/sampling_rows.fatbin")),
        functions: &["admit_row", "fork_row", "last_tokens"],
        most_shared: 0,
    };

    /// Words of a row.
    const WORDS: u32 = 20;
    /// Blocks that work on one row.
    const BLOCKS: u32 = 32;

    /// How many rows there are and what they have room for.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct SamplingShape {
        pub rows: u32,
        pub vocab: u32,
        /// Biased tokens of a row at most, and as many stop tokens.
        pub room: u32,
    }

    /// The state of all rows in device memory: 4 bytes a row and token for counts, 12 a row and room.
    #[derive(Debug)]
    pub struct SamplingRows {
        pub(in crate::cuda) shape: SamplingShape,
        states: CudaSlice<u32>,
        counts: CudaSlice<u32>,
        biases: CudaSlice<u32>,
        stops: CudaSlice<u32>,
    }

    /// What a row is admitted with. Ranges are of the words that come with it.
    #[derive(Debug, Clone, PartialEq)]
    pub struct Admission {
        pub row: u32,
        pub choice: u32,
        pub params: SamplingParams,
        /// All known tokens.
        pub history: Range<u32>,
        /// How many of them are the prompt's.
        pub prompt_len: u32,
        /// Pairs of a token, each token once, and the bits of the f32 that is added to its logit.
        pub biases: Range<u32>,
        /// Stop tokens, which `min_tokens` holds back.
        pub stops: Range<u32>,
    }

    /// As `SamplingRow` in sampling.cuh.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    struct State {
        seed: [u32; 2],
        prompt_index: u32,
        choice: u32,
        length: u32,
        output_length: u32,
        last: u32,
        min_tokens: u32,
        scale: f32,
        least: f32,
        top_k: u32,
        top_p: f32,
        presence: f32,
        frequency: f32,
        repetition: f32,
        biases: u32,
        stops: u32,
        logprobs: u32,
        is_admitted: u32,
        is_penalized: u32,
    }

    /// As `Admitted` in sampling_rows.cu.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    struct Admitted {
        all: Rows,
        state: State,
        words: u64,
        row: u32,
        history: u32,
        history_len: u32,
        prompt_len: u32,
        biases: u32,
        stops: u32,
    }

    /// As `SamplingRows` in sampling.cuh.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    pub(in crate::cuda) struct Rows {
        states: u64,
        counts: u64,
        biases: u64,
        stops: u64,
        rows: u32,
        vocab: u32,
        room: u32,
    }

    /// As `Fork` in sampling_rows.cu.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    struct Fork {
        all: Rows,
        from: u32,
        to: u32,
        choice: u32,
    }

    /// As `LastTokens` in sampling_rows.cu.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    struct LastTokens {
        all: Rows,
        rows: u64,
        tokens: u64,
        count: u32,
    }

    const _: () = assert!(WORDS as usize * 4 == size_of::<State>());

    impl SamplingRows {
        /// Rows that nobody has.
        ///
        /// # Errors
        /// When the device has not as much memory.
        pub fn new(kernels: &Kernels, shape: SamplingShape) -> Result<Self, DeviceError> {
            let SamplingShape { rows, vocab, room } = shape;
            let mut states = kernels.memory(len(&[rows, WORDS]).max(1))?;
            let cleared = kernels.stream().memset_zeros(&mut states);
            cleared.map_err(|source| DeviceError::Driver { what: "clear memory", source })?;
            Ok(Self {
                shape,
                states,
                counts: kernels.memory(len(&[rows, vocab]).max(1))?,
                biases: kernels.memory(len(&[rows, room, 2]).max(1))?,
                stops: kernels.memory(len(&[rows, room]).max(1))?,
            })
        }

        /// How many rows there are and what they have room for.
        pub fn shape(&self) -> SamplingShape {
            self.shape
        }

        pub(in crate::cuda) fn argument(&mut self, kernels: &Kernels) -> Rows {
            let stream = kernels.stream();
            Rows {
                states: self.states.device_ptr_mut(stream).0,
                counts: self.counts.device_ptr_mut(stream).0,
                biases: self.biases.device_ptr_mut(stream).0,
                stops: self.stops.device_ptr_mut(stream).0,
                rows: self.shape.rows,
                vocab: self.shape.vocab,
                room: self.shape.room,
            }
        }
    }

    impl Admission {
        fn check(&self, shape: &SamplingShape, words: usize) -> Result<(), LaunchError> {
            below("row", self.row, shape.rows)?;
            for (what, range) in
                [("history", &self.history), ("biases", &self.biases), ("stop tokens", &self.stops)]
            {
                at_least(what, words, range.end as usize)?;
                at_least(what, range.end as usize, range.start as usize)?;
            }
            same("biases, in pairs", self.biases.len() % 2, 0)?;
            at_least("room for biases", shape.room as usize, self.biases.len() / 2)?;
            at_least("room for stop tokens", shape.room as usize, self.stops.len())?;
            Ok(())
        }

        fn state(&self) -> State {
            let params = &self.params;
            let length = self.history.end - self.history.start;
            let scale = 1.0 / params.temperature * std::f32::consts::LOG2_E;
            State {
                seed: [params.seed & 0xffff_ffff, params.seed >> 32].map(|word| word as u32),
                prompt_index: params.prompt_index,
                choice: self.choice,
                length,
                output_length: length.saturating_sub(self.prompt_len),
                last: 0,
                min_tokens: params.min_tokens,
                scale: if params.is_greedy() { 0.0 } else { scale },
                least: params.least(),
                top_k: params.top_k.map_or(0, std::num::NonZeroU32::get),
                top_p: params.top_p,
                presence: params.presence_penalty,
                frequency: params.frequency_penalty,
                repetition: params.repetition_penalty,
                biases: (self.biases.end - self.biases.start) / 2,
                stops: self.stops.end - self.stops.start,
                logprobs: params.logprobs.map_or(0, |top| top.saturating_add(1)),
                is_admitted: 1,
                is_penalized: u32::from(params.is_penalized()),
            }
        }
    }

    impl Kernels {
        /// Queues an admission: the row is [`super::SamplingState::admitted`] with these words.
        ///
        /// # Errors
        /// When there is no such row, a range is not of the words, or the row has no room for biases or stop tokens.
        pub fn admit_row(
            &self,
            rows: &mut SamplingRows,
            admission: &Admission,
            words: &CudaSlice<u32>,
        ) -> Result<(), LaunchError> {
            admission.check(&rows.shape, words.len())?;
            let state = admission.state();
            let vocab = rows.shape.vocab as usize;
            if state.is_penalized > 0 && vocab > 0 {
                let begin = admission.row as usize * vocab;
                let mut counts = rows.counts.slice_mut(begin..begin + vocab);
                launched("clear counts", self.stream().memset_zeros(&mut counts))?;
            }
            let argument = Admitted {
                all: rows.argument(self),
                state,
                words: words.device_ptr(self.stream()).0,
                row: admission.row,
                history: admission.history.start,
                history_len: state.length,
                prompt_len: admission.prompt_len,
                biases: admission.biases.start,
                stops: admission.stops.start,
            };
            let (grid, function) = (Grid::of([BLOCKS, 1], THREADS), self.kernel("admit_row")?);
            // SAFETY: the argument is that of `admit_row` in sampling_rows.cu, which stays within the row and the ranges checked
            // above, bounds tokens by the vocabulary and waits first.
            launched("admit_row", unsafe { grid.queue(self, function, &argument) })
        }

        /// Queues a fork: `to` becomes `from` as another choice, as [`super::SamplingState::forked`].
        ///
        /// # Errors
        /// When there is no such row.
        pub fn fork_row(
            &self,
            rows: &mut SamplingRows,
            (from, to): (u32, u32),
            choice: u32,
        ) -> Result<(), LaunchError> {
            below("row", from, rows.shape.rows)?;
            below("row", to, rows.shape.rows)?;
            let argument = Fork { all: rows.argument(self), from, to, choice };
            let (grid, function) = (Grid::of([BLOCKS, 1], THREADS), self.kernel("fork_row")?);
            // SAFETY: the argument is that of `fork_row` in sampling_rows.cu, which stays within the two rows checked above and
            // waits first.
            launched("fork_row", unsafe { grid.queue(self, function, &argument) })
        }

        /// Queues a release: nobody has the row.
        ///
        /// # Errors
        /// When there is no such row.
        pub fn release_row(&self, rows: &mut SamplingRows, row: u32) -> Result<(), LaunchError> {
            below("row", row, rows.shape.rows)?;
            let begin = row as usize * WORDS as usize;
            let mut state = rows.states.slice_mut(begin..begin + WORDS as usize);
            launched("release_row", self.stream().memset_zeros(&mut state))
        }

        /// Queues tokens[i] = the last token of rows[i], where that row is admitted; other tokens stay.
        ///
        /// # Errors
        /// When lengths differ.
        pub fn last_tokens(
            &self,
            rows: &mut SamplingRows,
            of: &CudaSlice<u32>,
            tokens: &mut CudaSlice<u32>,
        ) -> Result<(), LaunchError> {
            same("tokens", tokens.len(), of.len())?;
            let count = u32::try_from(of.len()).unwrap_or(u32::MAX);
            if count == 0 {
                return Ok(());
            }
            let argument = LastTokens {
                all: rows.argument(self),
                rows: of.device_ptr(self.stream()).0,
                tokens: tokens.device_ptr_mut(self.stream()).0,
                count,
            };
            let grid = Grid::of([count.div_ceil(THREADS), 1], THREADS);
            let function = self.kernel("last_tokens")?;
            // SAFETY: the argument is that of `last_tokens` in sampling_rows.cu, which bounds rows, stays within the length checked
            // and waits first.
            launched("last_tokens", unsafe { grid.queue(self, function, &argument) })
        }
    }
}
