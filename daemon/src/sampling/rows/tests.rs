use std::num::NonZeroU32;

use proptest::prelude::*;

use super::*;
use crate::request::{RequestId, Salt};

fn params() -> Params {
    Params { temperature: 1.0, seed: 1, ..Params::greedy() }
}

fn request(params: Params) -> Arc<Request> {
    Arc::new(Request {
        id: RequestId(1),
        prompt: Arc::new([TokenId(1), TokenId(2)]),
        decoding: Decoding::Sample { params: Arc::new(params), choices: NonZeroU32::MIN },
        max_tokens: NonZeroU32::MIN,
        stop_tokens: Arc::new([]),
        priority: 0,
        salt: Salt::default(),
        prompt_logprobs: None,
    })
}

fn admit(rows: &mut Rows, row: u32, params: Params, choice: u32, output: &[u32]) {
    let request = request(params);
    let history =
        request.prompt.iter().copied().chain(output.iter().map(|&id| TokenId(id))).collect();
    rows.apply(&RowChange::Admit { row: RowId(row), request, choice, history });
}

fn sample(rows: &mut Rows, row: u32, logits: &[f32]) -> u32 {
    match rows.draw(&Draw { token: 0, row: RowId(row), kind: DrawKind::Sample }, logits) {
        Drawn::Token { token, .. } => token.0,
        Drawn::Candidates(_) => panic!("a token"),
    }
}

fn drawn_once(params: Params, logits: &[f32]) -> u32 {
    let mut rows = Rows::new(1, logits.len());
    admit(&mut rows, 0, params, 0, &[]);
    sample(&mut rows, 0, logits)
}

fn logits(len: usize, salt: u32) -> Vec<f32> {
    let value = |i: u32| {
        ((i.wrapping_mul(2_654_435_761).wrapping_add(salt.wrapping_mul(40_503))) >> 8) as f32
            / 4.0e6
    };
    (0..u32::try_from(len).unwrap()).map(value).collect()
}

/// Probabilities after temperature, min-p, top-k and top-p, by sorting.
fn plain_distribution(logits: &[f32], params: &Params) -> Vec<f64> {
    let weight = |logit: f32| f64::from(logit / params.temperature).exp();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let best = weight(logits[order[0]]);
    order.retain(|&i| weight(logits[i]) >= best * f64::from(params.min_p));
    order.truncate(params.top_k.map_or(usize::MAX, |k| k.get() as usize));
    let total: f64 = order.iter().map(|&i| weight(logits[i])).sum();
    let mut sum = 0.0;
    let cut = order.iter().position(|&i| {
        sum += weight(logits[i]);
        sum >= total * f64::from(params.top_p)
    });
    order.truncate(cut.map_or(usize::MAX, |cut| cut + 1));
    let total: f64 = order.iter().map(|&i| weight(logits[i])).sum();
    let mut probabilities = vec![0.0; logits.len()];
    order.iter().for_each(|&i| probabilities[i] = weight(logits[i]) / total);
    probabilities
}

#[test]
fn draws_follow_the_filtered_distribution() {
    let logits = logits(40, 3).iter().map(|logit| logit * 0.7).collect::<Vec<_>>();
    let variants = [
        params(),
        Params { temperature: 0.5, ..params() },
        Params { top_k: NonZeroU32::new(5), ..params() },
        Params { top_p: 0.7, ..params() },
        Params { min_p: 0.2, temperature: 1.5, ..params() },
        Params { top_k: NonZeroU32::new(9), top_p: 0.8, min_p: 0.05, ..params() },
    ];
    for variant in variants {
        let wanted = plain_distribution(&logits, &variant);
        let n = 20_000;
        let mut counts = vec![0_u32; logits.len()];
        (0..n).for_each(|seed| {
            counts[drawn_once(Params { seed, ..variant.clone() }, &logits) as usize] += 1
        });
        for (token, (&count, &probability)) in counts.iter().zip(&wanted).enumerate() {
            // Five standard deviations of a binomial count.
            let bound = 5.0 * (n as f64 * probability * (1.0 - probability)).sqrt() + 1e-9;
            let off = (f64::from(count) - n as f64 * probability).abs();
            assert!(
                off <= bound,
                "{variant:?}: token {token} came {count} times, wanted {}",
                n as f64 * probability
            );
        }
    }
}

#[test]
fn the_token_is_the_first_whose_running_sum_exceeds_u() {
    let logits = logits(5000, 8);
    for seed in 0..50 {
        let weights: Vec<f64> = logits.iter().map(|&logit| f64::from(logit).exp()).collect();
        let u = f64::from(philox::uniform(seed, 0, 0, 2));
        let target = u * weights.iter().sum::<f64>();
        let mut sum = 0.0;
        let wanted = weights
            .iter()
            .position(|weight| {
                sum += weight;
                sum > target
            })
            .unwrap();
        assert_eq!(drawn_once(Params { seed, ..params() }, &logits) as usize, wanted);
    }
}

#[test]
fn hopeless_logits_draw_the_lowest_id_and_nan_is_never_drawn() {
    for temperature in [0.0, 1.0] {
        let hopeless = drawn_once(Params { temperature, ..params() }, &[f32::NEG_INFINITY; 40]);
        assert_eq!(hopeless, 0);
        let mixed = [f32::NAN, f32::NEG_INFINITY, f32::NAN];
        assert_eq!(drawn_once(Params { temperature, ..params() }, &mixed), 0);
        assert_eq!(
            drawn_once(Params { temperature, ..params() }, &[f32::NAN, f32::NAN, 0.5, f32::NAN]),
            2
        );
        assert_eq!(
            drawn_once(
                Params { temperature, top_k: NonZeroU32::new(2), top_p: 0.5, ..params() },
                &[f32::NAN; 40]
            ),
            0
        );
        assert_eq!(drawn_once(Params { temperature, ..params() }, &[0.0, f32::INFINITY, 1.0]), 1);
    }
    assert_eq!(drawn_once(params(), &[]), 0);
}

#[test]
fn penalties_bias_and_min_tokens_are_their_formulas() {
    let greedy = Params { temperature: 0.0, ..params() };
    let logits = [1.0, 2.0, 1.9, 1.8, 0.1];
    let mut rows = Rows::new(1, 5);
    // Token 1 is in the prompt, 3 twice in the output.
    let with = |params: Params, rows: &mut Rows| {
        admit(rows, 0, params, 0, &[3, 3]);
        sample(rows, 0, &logits)
    };
    assert_eq!(with(greedy.clone(), &mut rows), 1);
    assert_eq!(
        with(Params { repetition_penalty: 2.5, ..greedy.clone() }, &mut rows),
        0,
        "2 / 2.5, 1.9 / 2.5, 1.8 / 2.5 and 1"
    );
    assert_eq!(
        with(Params { frequency_penalty: -0.2, ..greedy.clone() }, &mut rows),
        3,
        "1.8 + 2 * 0.2"
    );
    assert_eq!(
        with(Params { presence_penalty: -0.3, ..greedy.clone() }, &mut rows),
        3,
        "1.8 + 0.3"
    );
    assert_eq!(
        with(Params { logit_bias: vec![(TokenId(4), 5.0)], ..greedy.clone() }, &mut rows),
        4
    );
    let stop_tokens: Arc<[TokenId]> = Arc::new([TokenId(1)]);
    let held = Params { min_tokens: 3, stop_tokens, ..greedy };
    admit(&mut rows, 0, held, 0, &[3, 3]);
    assert_eq!(sample(&mut rows, 0, &logits), 2, "a stop token before min_tokens");
    assert_eq!(sample(&mut rows, 0, &logits), 1, "min_tokens is reached");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_row_draws_the_same_alone_among_others_forked_and_after_a_preemption(
        seed in any::<u64>(), temperature in 0.0..1.5_f32, top_p in 0.1..1.0_f32, frequency in -1.0..1.0_f32, choice in 0..4_u32,
    ) {
        let params = Params { seed, temperature, top_p, frequency_penalty: frequency, ..params() };
        let vocab = 3000;
        let all: Vec<Vec<f32>> = (0..6).map(|step| logits(vocab, step + 1)).collect();
        let mut alone = Rows::new(4, vocab);
        admit(&mut alone, 0, params.clone(), choice, &[]);
        let wanted: Vec<u32> = all.iter().map(|logits| sample(&mut alone, 0, logits)).collect();
        // Forked from another choice, and in company.
        let mut rows = Rows::new(40, vocab);
        admit(&mut rows, 7, params.clone(), 9, &[]);
        rows.apply(&RowChange::Fork { from: RowId(7), to: RowId(3), choice });
        (10..40).for_each(|row| admit(&mut rows, row, params.clone(), row, &[]));
        for (logits, &wanted) in all.iter().zip(&wanted).take(3) {
            let draw = |row| Draw { token: 0, row: RowId(row), kind: DrawKind::Sample };
            let draws: Vec<Draw> = (10..40).chain([3]).map(draw).collect();
            let mut out = Vec::new();
            rows.draw_all(&draws, &vec![0; draws.len()], logits, &mut out);
            let Some(Drawn::Token { token, .. }) = out.last() else { panic!("a token") };
            prop_assert_eq!(token.0, wanted);
            prop_assert_eq!(rows.last_token(RowId(3)), Some(TokenId(wanted)));
        }
        // Admitted again with what was drawn so far.
        admit(&mut rows, 5, params, choice, &wanted[..3]);
        for (logits, &wanted) in all.iter().zip(&wanted).skip(3) {
            prop_assert_eq!(sample(&mut rows, 5, logits), wanted);
        }
    }

    #[test]
    fn changed_logits_are_those_of_the_plain_formula(
        logits in prop::collection::vec(-8.0..8.0_f32, 12),
        output in prop::collection::vec(0..12_u32, 0..20),
        repetition in 0.5..2.0_f32, frequency in -2.0..2.0_f32, presence in -2.0..2.0_f32,
        bias in -5.0..5.0_f32, min_tokens in 0..20_u32,
    ) {
        let params = Params {
            repetition_penalty: repetition, frequency_penalty: frequency, presence_penalty: presence,
            logit_bias: vec![(TokenId(2), bias), (TokenId(7), -bias)],
            min_tokens, stop_tokens: Arc::new([TokenId(4)]), ..params()
        };
        let request = request(params.clone());
        let history: Vec<TokenId> = request.prompt.iter().copied().chain(output.iter().map(|&id| TokenId(id))).collect();
        let mut got = logits.clone();
        change_logits(&params, &State::admitted(&request, 0, &history), &mut got);
        for (id, (&logit, &got)) in (0..).zip(logits.iter().zip(&got)) {
            let mut wanted = logit;
            if id == 2 { wanted += bias }
            if id == 7 { wanted -= bias }
            if id == 4 && output.len() < min_tokens as usize { wanted = f32::NEG_INFINITY }
            let times = output.iter().filter(|&&token| token == id).count();
            if times > 0 || [1, 2].contains(&id) {
                wanted *= if wanted > 0.0 { 1.0 / repetition } else { repetition };
            }
            wanted -= frequency * times as f32 + if times > 0 { presence } else { 0.0 };
            prop_assert!(got == wanted || (got - wanted).abs() < 1e-4, "token {id}: {got}, wanted {wanted}");
        }
    }

    #[test]
    fn one_candidate_is_greedy(seed in any::<u64>(), salt in any::<u32>()) {
        let logits = logits(5000, salt);
        let greedy = drawn_once(Params { temperature: 0.0, ..params() }, &logits);
        prop_assert_eq!(drawn_once(Params { seed, top_k: NonZeroU32::new(1), ..params() }, &logits), greedy);
        prop_assert_eq!(drawn_once(Params { seed, top_p: 1e-6, ..params() }, &logits), greedy);
        prop_assert_eq!(drawn_once(Params { seed, min_p: 1.0, ..params() }, &logits), greedy);
    }
}

#[test]
fn the_one_candidate_among_equals_is_the_lowest_id() {
    for seed in 0..20 {
        assert_eq!(
            drawn_once(
                Params { seed, top_k: NonZeroU32::new(1), ..params() },
                &[0.0, 3.0, 3.0, 1.0]
            ),
            1
        );
    }
}

/// As the device knows the same state.
fn on_device(params: &Params, choice: u32, output: &[u32]) -> kernels::cuda::SamplingState {
    let history: Vec<u32> = [1, 2].iter().chain(output).copied().collect();
    let device = kernels::cuda::SamplingParams {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        repetition_penalty: params.repetition_penalty,
        seed: params.seed,
        prompt_index: params.prompt_index,
        min_tokens: params.min_tokens,
        logprobs: params.logprobs,
    };
    let mut state = kernels::cuda::SamplingState::admitted(device, choice, (&history, 2));
    state.biases = params.logit_bias.iter().map(|(token, bias)| (token.0, *bias)).collect();
    state.stops = params.stop_tokens.iter().map(|token| token.0).collect();
    state
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_device_means_the_same_tokens(
        seed in any::<u64>(), salt in any::<u32>(), choice in 0..4_u32, vocab in 30..6000_usize, values in 2..2000_u32,
        temperature in prop::sample::select(vec![0.0, 0.01, 0.5, 1.0, 2.0_f32]), k in prop::sample::select(vec![0, 1, 5, 50, 7000]),
        top_p in prop::sample::select(vec![1.0, 0.999, 0.9, 0.3, 1e-6_f32]), min_p in prop::sample::select(vec![0.0, 0.0, 0.02, 1.0_f32]),
        penalty in prop::sample::select(vec![0.0, 0.0, 0.3, -0.5_f32]),
    ) {
        let params = Params {
            seed, temperature, top_k: NonZeroU32::new(k), top_p, min_p, prompt_index: choice + 1,
            presence_penalty: penalty, frequency_penalty: penalty / 2.0, repetition_penalty: 1.0 + penalty / 4.0,
            logit_bias: vec![(TokenId(3), 2.0), (TokenId(20), -2.0)], min_tokens: 5, stop_tokens: Arc::new([TokenId(3)]),
            logprobs: Some(5),
        };
        let mut device = on_device(&params, choice, &[7, 7, 8]);
        let mut rows = Rows::new(1, vocab);
        admit(&mut rows, 0, params, choice, &[7, 7, 8]);
        for step in 0..4 {
            let mut logits = logits(vocab, salt.wrapping_add(step));
            // Many equal ones, and some that are no numbers or impossible.
            logits.iter_mut().for_each(|logit| *logit = (*logit * values as f32).round() / values as f32);
            (logits[9], logits[10]) = (f32::NAN, f32::NEG_INFINITY);
            let draw = Draw { token: 0, row: RowId(0), kind: DrawKind::Sample };
            let Drawn::Token { token, logprobs } = rows.draw(&draw, &logits) else { panic!("a token") };
            prop_assert!(device.could_sample(&logits, token.0, 1e-5), "{device:?}: {token:?}, wanted {}", device.sample(&logits));
            device.take_up(token.0);
            let got = logprobs.unwrap();
            let one = |score: &kernels::cuda::TokenScore| (score.token, score.rank);
            prop_assert_eq!(one(&kernels::cuda::TokenScore::reference(&logits, token.0)), (token.0, got.token.rank));
            let wanted = kernels::cuda::TokenScore::most_likely(&logits, 5);
            for (got, wanted) in got.top.iter().zip(&wanted) {
                prop_assert_eq!((got.token.0, got.rank), one(wanted));
                prop_assert!((got.logprob - wanted.logprob).abs() < 1e-4, "{got:?} {wanted:?}");
            }
        }
    }
}
