//! Draws: tokens, log-probabilities, and what rows keep from one to the next.
#![allow(clippy::cast_possible_truncation, reason = "counts of a test are small")]
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::num::NonZeroU32;

use cudarc::driver::CudaSlice;
use fastrand::Rng;
use half::{bf16, f16};
use kernels::cuda::{
    Admission, Draw, Kernels, Logit, Sample, SampleOutput, SampleScratch, SamplingParams,
    SamplingRows, SamplingShape, SamplingState, TokenScore,
};

use crate::support::{cases, download, kernels, upload};

/// Between the kernel's sums and the reference's, as a share of the total: f32 exponents of 2^-24 relative, their 2^x of 2^-22.
const TOLERANCE: f64 = 1e-5;
const ROOM: u32 = 8;
const TOP: u32 = 20;
const VOCABS: [u32; 12] = [1, 2, 31, 64, 65, 1000, 2500, 8192, 49_152, 128_256, 131_072, 151_937];

fn choice<T: Copy>(random: &mut Rng, of: &[T]) -> T {
    of[random.usize(..of.len())]
}

/// Logits of every shape: flat, peaked, equal, of few values, impossible, no numbers.
fn logits(random: &mut Rng, vocab: u32) -> Vec<f32> {
    let spread = choice(random, &[0.0, 1e-3, 1.0, 4.0, 12.0]);
    let values = choice(random, &[2.0, 50.0, 1e6]);
    let offset = choice(random, &[0.0, -30.0, 200.0]);
    let peaks = choice(random, &[0, 1, 40]);
    let normal = |random: &mut Rng| (0..6).map(|_| random.f32() - 0.5).sum::<f32>() * 1.4;
    let mut logits: Vec<f32> =
        (0..vocab).map(|_| (normal(random) * values).round() / values * spread + offset).collect();
    for _ in 0..peaks {
        logits[random.usize(..vocab as usize)] += spread * 3.0 * random.f32();
    }
    let odd = match random.u32(..8) {
        0 => Some(f32::NAN),
        1 => Some(f32::NEG_INFINITY),
        _ => None,
    };
    let share = choice(random, &[0.01, 0.5, 1.0]);
    if let Some(odd) = odd {
        logits.iter_mut().filter(|_| random.f32() < share).for_each(|logit| *logit = odd);
    }
    if random.u32(..20) == 0 {
        logits[random.usize(..vocab as usize)] = f32::INFINITY;
    }
    if random.u32(..10) == 0 {
        logits.iter_mut().for_each(|logit| *logit *= 0.0);
    }
    logits
}

fn params(random: &mut Rng, vocab: u32) -> SamplingParams {
    let k = choice(random, &[0, 0, 1, 2, 50, 1000, 5000, vocab - 1, vocab, u32::MAX]);
    let is_penalized = random.u32(..3) == 0;
    let penalty = |random: &mut Rng| if is_penalized { random.f32() * 2.0 - 1.0 } else { 0.0 };
    SamplingParams {
        temperature: choice(random, &[0.0, 1e-5, 0.01, 0.3, 0.7, 1.0, 1.0, 2.0]),
        top_k: NonZeroU32::new(k),
        top_p: choice(random, &[1.0, 1.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 0.999_999]),
        min_p: choice(random, &[0.0, 0.0, 0.0, 1e-6, 0.05, 0.5, 1.0]),
        presence_penalty: penalty(random),
        frequency_penalty: penalty(random),
        repetition_penalty: if is_penalized { 0.5 + random.f32() } else { 1.0 },
        seed: random.u64(..),
        prompt_index: random.u32(..3),
        min_tokens: choice(random, &[0, 0, 4, 100]),
        logprobs: random.bool().then(|| random.u32(..=TOP)),
    }
}

/// A state and what it is admitted with.
struct Sequence {
    state: SamplingState,
    history: Vec<u32>,
    prompt_len: u32,
}

impl Sequence {
    fn random(random: &mut Rng, vocab: u32) -> Self {
        let history: Vec<u32> =
            (0..random.u32(1..40)).map(|_| random.u32(..vocab.min(50))).collect();
        let prompt_len = random.u32(1..=history.len() as u32);
        let params = params(random, vocab);
        let mut state =
            SamplingState::admitted(params, random.u32(..4), (&history, prompt_len as usize));
        if random.u32(..3) == 0 {
            let first = random.u32(..vocab);
            state.biases = (first..vocab)
                .take(random.usize(..5))
                .map(|token| (token, random.f32() * 10.0 - 5.0))
                .collect();
        }
        state.stops = (0..random.u32(..3)).map(|_| random.u32(..vocab)).collect();
        Self { state, history, prompt_len }
    }

    fn admit(&self, kernels: &Kernels, rows: &mut SamplingRows, row: u32) {
        let mut words = vec![7];
        let mut range = |values: &[u32]| {
            let begin = words.len() as u32;
            words.extend_from_slice(values);
            begin..words.len() as u32
        };
        let biases: Vec<u32> =
            self.state.biases.iter().flat_map(|(token, bias)| [*token, bias.to_bits()]).collect();
        let admission = Admission {
            row,
            choice: self.state.choice,
            params: self.state.params,
            history: range(&self.history),
            prompt_len: self.prompt_len,
            biases: range(&biases),
            stops: range(&self.state.stops),
        };
        kernels.admit_row(rows, &admission, &upload(kernels, &words)).unwrap();
    }
}

/// To and from the numbers that logits are.
type Rounding<T> = (fn(f32) -> T, fn(T) -> f32);

/// Rows of the device, their meaning, and logits of one kind.
struct Case<'a, T> {
    kernels: &'a Kernels,
    vocab: u32,
    narrowed: fn(f32) -> T,
    widened: fn(T) -> f32,
    rows: SamplingRows,
    scratch: SampleScratch,
    sequences: Vec<Sequence>,
}

impl<'a, T: Logit> Case<'a, T> {
    fn random(random: &mut Rng, kernels: &'a Kernels, (narrowed, widened): Rounding<T>) -> Self {
        let vocab = choice(random, &VOCABS);
        let sequences: Vec<Sequence> =
            (0..random.usize(1..12)).map(|_| Sequence::random(random, vocab)).collect();
        let count = sequences.len() as u32;
        let mut rows =
            SamplingRows::new(kernels, SamplingShape { rows: count, vocab, room: ROOM }).unwrap();
        for (row, sequence) in (0..).zip(&sequences) {
            sequence.admit(kernels, &mut rows, row);
        }
        let scratch = SampleScratch::new(kernels, count + 3, vocab).unwrap();
        Self { kernels, vocab, narrowed, widened, rows, scratch, sequences }
    }

    /// Draws for every sequence, some of the same logits, and compares.
    fn step(&mut self, random: &mut Rng) {
        let count = self.sequences.len() as u32;
        let logit_rows = random.u32(1..=count);
        let logits: Vec<T> =
            (0..logit_rows).flat_map(|_| logits(random, self.vocab)).map(self.narrowed).collect();
        let mut draws: Vec<Draw> = (0..count)
            .map(|row| Draw { logits: random.u32(..logit_rows), row, candidates: 0 })
            .collect();
        random.shuffle(&mut draws);
        // One has no state, one wants candidates, one has no logits.
        draws.push(Draw { logits: 0, row: u32::MAX, candidates: 0 });
        draws.push(Draw {
            logits: random.u32(..logit_rows),
            row: 0,
            candidates: random.u32(1..=TOP),
        });
        draws.push(Draw { logits: u32::MAX, row: 0, candidates: 0 });
        let (tokens, scores) = self.sample(logit_rows, &logits, &draws);
        let wide: Vec<f32> = logits.into_iter().map(self.widened).collect();
        let last = draws.len() - 1;
        assert_eq!(tokens[last], 0, "no logits");
        for ((draw, token), scores) in
            draws.iter().zip(tokens).zip(scores.chunks(1 + TOP as usize)).take(last)
        {
            let logits = &wide[draw.logits as usize * self.vocab as usize..][..self.vocab as usize];
            self.compare(*draw, logits, (token, scores));
        }
        let of = upload(self.kernels, &[0, u32::MAX]);
        let mut tokens = upload(self.kernels, &[5, 6]);
        self.kernels.last_tokens(&mut self.rows, &of, &mut tokens).unwrap();
        assert_eq!(download(self.kernels, &tokens), [self.sequences[0].state.last.unwrap(), 6]);
    }

    fn sample(
        &mut self,
        logit_rows: u32,
        logits: &[T],
        draws: &[Draw],
    ) -> (Vec<u32>, Vec<TokenScore>) {
        let shape =
            Sample { logit_rows, draws: draws.len() as u32, is_altered: true, is_reported: true };
        let mut tokens = upload(self.kernels, &vec![u32::MAX; draws.len()]);
        let mut scores =
            upload(self.kernels, &vec![TokenScore::default(); draws.len() * (1 + TOP as usize)]);
        let (logits, draws): (CudaSlice<T>, _) =
            (upload(self.kernels, logits), upload(self.kernels, draws));
        let output = SampleOutput { tokens: &mut tokens, scores: &mut scores, top: TOP };
        self.kernels
            .sample(&shape, (&logits, &draws), &mut self.rows, &mut self.scratch, output)
            .unwrap();
        (download(self.kernels, &tokens), download(self.kernels, &scores))
    }

    fn compare(&mut self, draw: Draw, logits: &[f32], (token, scores): (u32, &[TokenScore])) {
        let greedy = SamplingState::admitted(SamplingParams::greedy(), 0, (&[], 0));
        let state = self.sequences.get_mut(draw.row as usize).map(|sequence| &mut sequence.state);
        let mut top = draw.candidates;
        if draw.candidates == 0 {
            let meant = state.as_deref().unwrap_or(&greedy);
            let what = || {
                format!(
                    "{} of {} {draw:?} {:?}: got {token}, wanted {}",
                    T::NAME,
                    self.vocab,
                    meant.params,
                    meant.sample(logits)
                )
            };
            assert!(meant.could_sample(logits, token, TOLERANCE), "{}", what());
            let Some(state) = state else { return };
            state.take_up(token);
            let Some(count) = state.params.logprobs else { return };
            expect_scores(
                "the token's score",
                &scores[..1],
                &[TokenScore::reference(logits, token)],
            );
            top = count;
        }
        let wanted = TokenScore::most_likely(logits, top as usize);
        expect_scores("the most likely", &scores[1..=wanted.len()], &wanted);
        assert!(
            scores[1 + wanted.len()..].iter().all(|score| *score == TokenScore::default()),
            "no more than asked for"
        );
    }
}

fn expect_scores(what: &str, got: &[TokenScore], wanted: &[TokenScore]) {
    for (got, wanted) in got.iter().zip(wanted) {
        assert_eq!(
            (got.token, got.rank),
            (wanted.token, wanted.rank),
            "{what}: {got:?} {wanted:?}"
        );
        let is_close = got.logprob == wanted.logprob
            || (got.logprob - wanted.logprob).abs() <= 2e-5 + 1e-6 * wanted.logprob.abs();
        assert!(is_close, "{what}: {got:?} {wanted:?}");
    }
}

fn steps<T: Logit>(random: &mut Rng, kernels: &Kernels, of: Rounding<T>) {
    let mut case = Case::random(random, kernels, of);
    for _ in 0..3 {
        case.step(random);
    }
}

#[test]
fn drawn_tokens_and_their_scores_are_their_reference() {
    let kernels = kernels();
    cases(150, |random| match random.u32(..4) {
        0 | 1 => steps::<f32>(random, &kernels, (|x| x, |x| x)),
        2 => steps::<bf16>(random, &kernels, (bf16::from_f32, bf16::to_f32)),
        _ => steps::<f16>(random, &kernels, (f16::from_f32, f16::to_f32)),
    });
}

/// The same seed gives the same tokens whatever else is drawn: sums do not depend on the order in which threads come.
#[test]
fn a_draw_is_the_same_alone_and_again() {
    let kernels = kernels();
    cases(20, |random| {
        let mut case = Case::<f32>::random(random, &kernels, (|x| x, |x| x));
        let logits = logits(random, case.vocab);
        let draws: Vec<Draw> = (0..case.sequences.len() as u32)
            .map(|row| Draw { logits: 0, row, candidates: 0 })
            .collect();
        let (together, _) = case.sample(1, &logits, &draws);
        for (draw, together) in draws.iter().zip(together) {
            case.sequences[draw.row as usize].admit(&kernels, &mut case.rows, draw.row);
            let (alone, _) = case.sample(1, &logits, &[*draw]);
            assert_eq!(alone, [together], "{draw:?}");
        }
    });
}

#[test]
fn a_forked_row_goes_on_as_another_choice_and_a_released_one_is_nobodys() {
    let kernels = kernels();
    cases(40, |random| {
        let mut case = Case::<f32>::random(random, &kernels, (|x| x, |x| x));
        let (mut rows, vocab) = (
            SamplingRows::new(&kernels, SamplingShape { rows: 3, vocab: case.vocab, room: ROOM })
                .unwrap(),
            case.vocab,
        );
        case.sequences.truncate(1);
        case.sequences[0].admit(&kernels, &mut rows, 2);
        kernels.fork_row(&mut rows, (2, 0), 9).unwrap();
        kernels.fork_row(&mut rows, (2, 1), 1).unwrap();
        kernels.release_row(&mut rows, 1).unwrap();
        // A fork of a row that nobody has is none.
        kernels.fork_row(&mut rows, (1, 2), 1).unwrap();
        case.rows = rows;
        let mut forked = case.sequences[0].state.forked(9);
        let greedy = SamplingState::admitted(SamplingParams::greedy(), 0, (&[], 0));
        for _ in 0..2 {
            let logits = logits(random, vocab);
            let draws = [0, 1, 2].map(|row| Draw { logits: 0, row, candidates: 0 });
            let (tokens, _) = case.sample(1, &logits, &draws);
            assert!(forked.could_sample(&logits, tokens[0], TOLERANCE), "{forked:?}: {tokens:?}");
            forked.take_up(tokens[0]);
            assert_eq!(tokens[1..], [greedy.sample(&logits); 2]);
        }
    });
}

#[test]
fn draws_that_do_not_fit_are_refused() {
    let kernels = kernels();
    let mut rows =
        SamplingRows::new(&kernels, SamplingShape { rows: 2, vocab: 100, room: 2 }).unwrap();
    let mut scratch = SampleScratch::new(&kernels, 2, 100).unwrap();
    let (logits, draws) = (
        upload(&kernels, &[0.0_f32; 200]),
        upload(&kernels, &[Draw { logits: 0, row: 0, candidates: 0 }; 2]),
    );
    let (mut tokens, mut scores) =
        (upload(&kernels, &[0; 2]), upload(&kernels, &[TokenScore::default(); 6]));
    let mut refuses = |shape: Sample, top: u32, word: &str| {
        let output = SampleOutput { tokens: &mut tokens, scores: &mut scores, top };
        let error =
            kernels.sample(&shape, (&logits, &draws), &mut rows, &mut scratch, output).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    };
    let shape = Sample { logit_rows: 2, draws: 2, is_altered: true, is_reported: true };
    refuses(Sample { logit_rows: 3, ..shape }, 2, "logits");
    refuses(Sample { draws: 1, ..shape }, 2, "draws");
    refuses(Sample { draws: 70_000, ..shape }, 2, "draws");
    refuses(shape, 3, "scores");
    refuses(shape, 2000, "most likely");
    let words = upload(&kernels, &[1, 2, 3, 4, 5, 6]);
    let admission = Admission {
        row: 0,
        choice: 0,
        params: SamplingParams::greedy(),
        history: 0..2,
        prompt_len: 1,
        biases: 0..4,
        stops: 4..6,
    };
    kernels.admit_row(&mut rows, &admission, &words).unwrap();
    let mut refuses = |admission: Admission, word: &str| {
        let error = kernels.admit_row(&mut rows, &admission, &words).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    };
    refuses(Admission { row: 2, ..admission.clone() }, "row");
    refuses(Admission { history: 0..7, ..admission.clone() }, "history");
    refuses(Admission { biases: 0..3, ..admission.clone() }, "pairs");
    refuses(Admission { biases: 0..6, ..admission.clone() }, "room for biases");
    refuses(Admission { stops: 2..5, ..admission }, "room for stop tokens");
    assert!(kernels.fork_row(&mut rows, (0, 2), 0).is_err());
    assert!(kernels.release_row(&mut rows, 2).is_err());
    let mut three = upload(&kernels, &[0; 3]);
    assert!(kernels.last_tokens(&mut rows, &words, &mut three).is_err());
}
