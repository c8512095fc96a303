//! A step's launches, one after the other: each begins beside the one before it and has to wait for what that one writes. In a
//! process of its own, since what other tests do to the device's context may end the capture of a graph.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "parity/support.rs"]
#[allow(dead_code, unused_imports, unused_macros, reason = "it is for more than this test")]
mod support;

use cudarc::driver::CudaSlice;
use fastrand::Rng;
use half::bf16;
use kernels::cuda::{
    Admission, Arena, ArenaShape, BlockPairs, DecodeInput, DecodeScratch, Draw, Gate,
    GateActivation, Gather, Kernels, LaunchError, Linear, Onto, PagedAttention, PagedDecode,
    PagedPrefill, PrefillInput, PrefixInput, Products, RmsNorm, RopeInput, RopeStore, Sample,
    SampleOutput, SampleScratch, SamplingParams, SamplingRows, SamplingShape, TokenScore,
};

use support::{KvCase, cases, download, kernels, numbers, poisoned, upload, widened};

const HEADS: u32 = 4;
const KV_HEADS: u32 = 2;
const HEAD_DIM: u32 = 64;
const WIDTH: u32 = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
const ATTENDED: u32 = HEADS * HEAD_DIM;
const VOCAB: u32 = 1000;
const BLOCK: u32 = 16;
const TOP: u32 = 4;
/// Blocks of a row: one that all rows share, its own, and a copy of that.
const TABLE_WIDTH: u32 = 3;
/// Steps of a graph, and its replays.
const STEPS: usize = 3;
const REPLAYS: usize = 5;

/// What no launch writes.
struct Given {
    embeddings: CudaSlice<bf16>,
    weights: [CudaSlice<bf16>; 2],
    unembedding: CudaSlice<bf16>,
    frequencies: CudaSlice<f32>,
    rows: CudaSlice<u32>,
    positions: CudaSlice<u32>,
    slots: CudaSlice<u32>,
    tables: CudaSlice<u32>,
    lengths: CudaSlice<u32>,
    pairs: CudaSlice<u32>,
    begins: CudaSlice<u32>,
    group: [CudaSlice<u32>; 2],
    draws: CudaSlice<Draw>,
    words: CudaSlice<u32>,
}

impl Given {
    fn random(random: &mut Rng, kernels: &Kernels, rows: u32) -> Self {
        let mut some = |len: u32| upload(kernels, &numbers::<bf16>(random, len as usize));
        let (embeddings, unembedding) = (some(VOCAB * WIDTH), some(VOCAB * ATTENDED / 2));
        let weights = [some(WIDTH), some(ATTENDED)];
        let words = |values: Vec<u32>| upload(kernels, &values);
        let lengths: Vec<u32> = (0..rows).map(|_| random.u32(17..=TABLE_WIDTH * BLOCK)).collect();
        let own = |row: u32| 1 + 2 * row;
        Self {
            embeddings,
            weights,
            unembedding,
            frequencies: upload(kernels, &[0.3_f32; HEAD_DIM as usize / 2]),
            rows: words((0..rows).collect()),
            positions: words(lengths.iter().map(|length| length - 1).collect()),
            slots: words((0..rows).map(|row| own(row) * BLOCK + random.u32(..BLOCK)).collect()),
            tables: words((0..rows).flat_map(|row| [0, own(row), own(row) + 1]).collect()),
            lengths: words(lengths),
            pairs: words((0..rows).flat_map(|row| [own(row), own(row) + 1]).collect()),
            begins: words((0..=rows).collect()),
            group: [words(vec![0, rows]), words(vec![1])],
            draws: upload(
                kernels,
                &(0..rows).map(|row| Draw { logits: row, row, candidates: 0 }).collect::<Vec<_>>(),
            ),
            words: words((0..8).map(|_| random.u32(..VOCAB)).collect()),
        }
    }
}

/// What a step's launches write, and the next one's read.
struct Chain<'a> {
    kernels: &'a Kernels,
    rows: u32,
    given: Given,
    before: KvCase<bf16>,
    arena: Arena<bf16>,
    states: SamplingRows,
    ids: CudaSlice<u32>,
    x: CudaSlice<bf16>,
    qkv: CudaSlice<bf16>,
    q: CudaSlice<bf16>,
    attended: CudaSlice<bf16>,
    again: CudaSlice<bf16>,
    residual: CudaSlice<bf16>,
    normed: CudaSlice<bf16>,
    gated: CudaSlice<bf16>,
    logits: CudaSlice<bf16>,
    tokens: CudaSlice<u32>,
    scores: CudaSlice<TokenScore>,
    products: Products,
    decoding: DecodeScratch,
    sampling: SampleScratch,
}

/// What is left of all steps.
#[derive(Debug, PartialEq)]
struct Left {
    tokens: Vec<u32>,
    scores: Vec<TokenScore>,
    residual: Vec<f32>,
    arena: Vec<f32>,
}

impl<'a> Chain<'a> {
    fn random(random: &mut Rng, kernels: &'a Kernels) -> Self {
        let rows = random.u32(1..=64);
        let shape = ArenaShape {
            blocks: 1 + 2 * rows,
            block_size: BLOCK,
            layers: 1,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
        };
        let before = KvCase::random::<bf16>(random, shape);
        let wide = |width: u32| poisoned::<bf16>(kernels, (rows * width) as usize);
        let decoding = DecodeScratch::new(kernels, shape, rows).unwrap();
        Self {
            kernels,
            rows,
            given: Given::random(random, kernels, rows),
            arena: before.upload(kernels),
            before,
            states: SamplingRows::new(kernels, SamplingShape { rows, vocab: VOCAB, room: 1 })
                .unwrap(),
            ids: upload(kernels, &vec![0; rows as usize]),
            x: wide(WIDTH),
            qkv: wide(WIDTH),
            q: wide(ATTENDED),
            attended: wide(ATTENDED),
            again: wide(ATTENDED),
            residual: wide(ATTENDED),
            normed: wide(ATTENDED),
            gated: wide(ATTENDED / 2),
            logits: wide(VOCAB),
            tokens: upload(kernels, &vec![0; rows as usize]),
            scores: upload(kernels, &vec![TokenScore::default(); (rows * (TOP + 1)) as usize]),
            products: Products::open(kernels, &[Self::product(rows)], None).unwrap(),
            decoding: decoding.with_prefixes(kernels, shape, (rows, HEADS)).unwrap(),
            sampling: SampleScratch::new(kernels, rows, VOCAB).unwrap(),
        }
    }

    fn product(rows: u32) -> Linear {
        Linear { rows, inputs: ATTENDED / 2, outputs: VOCAB, onto: Onto::Nothing }
    }

    /// Puts everything back where the first step begins.
    fn begin(&mut self) {
        let stream = self.kernels.stream();
        stream.memcpy_htod(&self.before.values, self.arena.values_mut()).unwrap();
        stream.memset_zeros(&mut self.residual).unwrap();
        (0..self.rows).for_each(|row| self.admit(row));
    }

    fn admit(&mut self, row: u32) {
        let params = SamplingParams {
            temperature: 1.0,
            seed: u64::from(row),
            frequency_penalty: 0.5,
            logprobs: Some(TOP),
            ..SamplingParams::greedy()
        };
        let admission = Admission {
            row,
            choice: 0,
            params,
            history: 0..8,
            prompt_len: 2,
            biases: 0..0,
            stops: 0..0,
        };
        self.kernels.admit_row(&mut self.states, &admission, &self.given.words).unwrap();
    }

    /// A step, with `pause` after each operation.
    fn step(&mut self, pause: impl Fn()) {
        self.embed(&pause);
        self.attend(&pause);
        self.leave(&pause);
        // A row is cleared, which is no launch, and begins anew.
        self.admit(0);
        pause();
    }

    fn embed(&mut self, pause: impl Fn()) {
        let (kernels, given, rows) = (self.kernels, &self.given, self.rows);
        kernels.last_tokens(&mut self.states, &given.rows, &mut self.ids).unwrap();
        pause();
        let gather = Gather { rows, table_rows: VOCAB, width: WIDTH };
        kernels.gather(&gather, (&given.embeddings, &self.ids), &mut self.x).unwrap();
        pause();
        let norm = RmsNorm { rows, width: WIDTH, epsilon: 1e-5 };
        kernels.rms_norm(&norm, (&self.x, &given.weights[0]), &mut self.qkv).unwrap();
        pause();
        let rope =
            RopeStore { tokens: rows, heads: HEADS, layer: 0, rotary: HEAD_DIM, epsilon: 1e-6 };
        let input = RopeInput {
            positions: &given.positions,
            slots: &given.slots,
            frequencies: &given.frequencies,
        };
        kernels.rope_store(&rope, (&self.qkv, None), &input, &mut self.arena, &mut self.q).unwrap();
        pause();
        let pairs = BlockPairs { pairs: &given.pairs, count: rows };
        kernels.copy_blocks(&mut self.arena, &pairs).unwrap();
        pause();
    }

    fn attend(&mut self, pause: impl Fn()) {
        let (kernels, given, rows) = (self.kernels, &self.given, self.rows);
        let attention = PagedAttention {
            table_width: TABLE_WIDTH,
            layer: 0,
            heads: HEADS,
            scale: 1.0,
            window: None,
            soft_cap: None,
        };
        let decode = PagedDecode { sequences: rows, attention };
        let [begins, blocks] = &given.group;
        let (tables, lengths) = (&given.tables, &given.lengths);
        let input = DecodeInput { tables, lengths, prefixes: Some(PrefixInput { begins, blocks }) };
        let through = (&self.q, &mut self.attended);
        kernels.paged_decode(&decode, &self.arena, &input, through, &mut self.decoding).unwrap();
        pause();
        // The results are queries of chunks of one token.
        let prefill = PagedPrefill { sequences: rows, tokens: rows, attention };
        let input = PrefillInput { tables, begins: &given.begins, starts: &given.positions };
        let through = (&self.attended, &mut self.again);
        kernels.paged_prefill(&prefill, &self.arena, &input, through).unwrap();
        pause();
    }

    fn leave(&mut self, pause: impl Fn()) {
        let (kernels, given, rows) = (self.kernels, &self.given, self.rows);
        let norm = RmsNorm { rows, width: ATTENDED, epsilon: 1e-5 };
        let x = (&self.again, &given.weights[1]);
        kernels.add_rms_norm(&norm, x, &mut self.residual, &mut self.normed).unwrap();
        pause();
        let gate = Gate { rows, width: ATTENDED / 2, activation: GateActivation::Silu };
        kernels.gate(&gate, &self.normed, &mut self.gated).unwrap();
        pause();
        let x = (&self.gated, &given.unembedding);
        kernels.linear(&Self::product(rows), x, &mut self.logits, &mut self.products).unwrap();
        pause();
        let sample = Sample { logit_rows: rows, draws: rows, is_altered: true, is_reported: true };
        let output = SampleOutput { tokens: &mut self.tokens, scores: &mut self.scores, top: TOP };
        let logits = (&self.logits, &given.draws);
        kernels.sample(&sample, logits, &mut self.states, &mut self.sampling, output).unwrap();
        pause();
    }

    fn left(&mut self) -> Left {
        Left {
            tokens: download(self.kernels, &self.tokens),
            scores: download(self.kernels, &self.scores),
            residual: widened(&download(self.kernels, &self.residual)),
            arena: widened(&download(self.kernels, self.arena.values_mut())),
        }
    }
}

#[test]
fn a_chain_of_all_operations_is_the_same_every_time() {
    let kernels = kernels();
    cases(10, |random| {
        let stream = kernels.stream();
        let mut chain = Chain::random(random, &kernels);
        chain.begin();
        (0..STEPS * REPLAYS).for_each(|_| chain.step(|| stream.synchronize().unwrap()));
        let wanted = chain.left();
        assert!(wanted.residual.iter().all(|value| value.is_finite()), "{} rows", chain.rows);
        chain.begin();
        (0..STEPS * REPLAYS).for_each(|_| chain.step(|| ()));
        assert_eq!(chain.left(), wanted, "{} rows", chain.rows);
        let steps = || {
            (0..STEPS).for_each(|_| chain.step(|| ()));
            Ok::<_, LaunchError>(())
        };
        let graph = kernels.captured(steps).unwrap();
        for _ in 0..5 {
            chain.begin();
            (0..REPLAYS).for_each(|_| graph.launch().unwrap());
            assert_eq!(chain.left(), wanted, "{} rows, in a graph", chain.rows);
        }
    });
}
