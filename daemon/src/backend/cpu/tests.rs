use std::path::Path;

use kernels::cpu::{KvDtype, KvShape};
use serde_json::{Value as Json, json};

use super::*;
use crate::backend::reference::ReferenceBackend;
use crate::kv::BlockId;
use crate::model::batch::{Draw, DrawKind, Drawn, Span};
use crate::model::files::ModelFiles;
use crate::model::text::{AddSpecial, SpecialTokens};
use crate::model::{LoadFormat, Opened, WeightDtype};

const VOCAB: usize = 61;
const BLOCK: u32 = 4;

/// Small enough to be quick, odd enough that heads, widths and windows are not all alike.
fn config(architecture: &str, more: Json) -> Json {
    let mut config = json!({
        "architectures": [architecture], "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    });
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn architectures() -> Vec<Json> {
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    });
    vec![
        config(
            "LlamaForCausalLM",
            json!({"rope_scaling": llama3, "attention_bias": true, "mlp_bias": true}),
        ),
        config("MistralForCausalLM", json!({"sliding_window": 7, "tie_word_embeddings": true})),
        config("Qwen2ForCausalLM", json!({"rope_scaling": {"type": "linear", "factor": 2.0}})),
        config("Qwen3ForCausalLM", json!({"num_key_value_heads": 1})),
        config(
            "Gemma3ForCausalLM",
            json!({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5,
                "query_pre_attn_scalar": 24, "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "hidden_activation": "gelu_pytorch_tanh"}),
        ),
    ]
}

fn open(config: &Json) -> Opened {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let tokenizer = json!({"version": "1.0", "added_tokens": [], "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true}, "model": {
        "type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}});
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let files = ModelFiles::find(folder.path()).unwrap();
    Opened::open(&files, LoadFormat::Dummy { seed: 7 }, WeightDtype::Auto).unwrap()
}

fn options(config: &ModelConfig, dtype: KvDtype, threads: usize) -> CpuOptions {
    let size = |value: usize| u32::try_from(value).unwrap();
    let kv = KvShape {
        blocks: 64,
        block_size: BLOCK,
        layers: size(config.layers),
        kv_heads: size(config.kv_heads),
        head_dim: size(config.head_dim),
        dtype,
    };
    CpuOptions { kv, max_tokens: 128, max_rows: 8, threads: NonZeroUsize::new(threads) }
}

fn cpu(config: &Json, dtype: KvDtype, threads: usize) -> CpuBackend {
    let opened = open(config);
    let config = opened.config().clone();
    let options = options(&config, dtype, threads);
    CpuBackend::new(config, opened.load(&mut |_, _| {}).unwrap(), options).unwrap()
}

/// A sequence of known tokens with blocks of its own, scattered over the arena.
struct Sequence {
    tokens: Vec<u32>,
    computed: usize,
    table: Vec<BlockId>,
}

fn sequences(lengths: &[usize]) -> Vec<Sequence> {
    let sequence = |(index, len): (usize, &usize)| Sequence {
        tokens: (0..*len)
            .map(|token| u32::try_from((token * 17 + index * 29 + 3) % VOCAB).unwrap())
            .collect(),
        computed: 0,
        table: (0..12)
            .map(|block| BlockId(1 + block * 5 + u32::try_from(index).unwrap()))
            .collect(),
    };
    lengths.iter().enumerate().map(sequence).collect()
}

/// Adds the next `chunk` tokens of the sequence to the batch, and asks for all log-probabilities after the last.
fn push(batch: &mut Batch, row: u32, sequence: &mut Sequence, chunk: usize, vocab: usize) {
    let from = sequence.computed;
    let to = sequence.tokens.len().min(from + chunk);
    let (token, block) = (batch.inputs.len(), batch.tables.len());
    for position in u32::try_from(from).unwrap()..u32::try_from(to).unwrap() {
        batch.inputs.push(Input::Known(TokenId(sequence.tokens[position as usize])));
        batch.positions.push(position);
        batch.slots.push(sequence.table[(position / BLOCK) as usize].0 * BLOCK + position % BLOCK);
    }
    batch.tables.extend(&sequence.table);
    batch.spans.push(Span {
        tokens: token..token + to - from,
        start: u32::try_from(from).unwrap(),
        table: block..batch.tables.len(),
    });
    if to == sequence.tokens.len() {
        let kind = DrawKind::Candidates { count: u32::try_from(vocab).unwrap() };
        batch.draws.push(Draw { token: batch.inputs.len() - 1, row: RowId(row), kind });
    }
    sequence.computed = to;
}

/// The most likely tokens that follow each sequence: computed together, `chunk` tokens of each a step.
fn candidates(backend: &mut dyn Backend, lengths: &[usize], chunk: usize) -> Vec<Option<Drawn>> {
    let mut sequences = sequences(lengths);
    let mut results = vec![None; lengths.len()];
    while sequences.iter().any(|sequence| sequence.computed < sequence.tokens.len()) {
        let mut batch = Batch::default();
        for (row, sequence) in sequences.iter_mut().enumerate() {
            if sequence.computed < sequence.tokens.len() {
                push(&mut batch, u32::try_from(row).unwrap(), sequence, chunk, VOCAB);
            }
        }
        let mut output = Output::default();
        backend.launch(&batch).unwrap();
        backend.collect(&mut output).unwrap();
        for (draw, drawn) in batch.draws.iter().zip(output.drawn) {
            results[draw.row.0 as usize] = Some(drawn);
        }
    }
    results
}

/// Log-probabilities, by token, that follow each sequence of a model of [`VOCAB`] tokens.
fn logprobs(backend: &mut dyn Backend, lengths: &[usize], chunk: usize) -> Vec<Vec<f32>> {
    candidates(backend, lengths, chunk).into_iter().flatten().map(by_token).collect()
}

fn by_token(drawn: Drawn) -> Vec<f32> {
    let Drawn::Candidates(candidates) = drawn else { panic!("wanted candidates") };
    let mut scores = vec![f32::NAN; candidates.len()];
    for candidate in candidates {
        scores[candidate.token.0 as usize] = candidate.logprob;
    }
    scores
}

/// The largest difference, relative to values of size 1 and more.
fn difference(left: &[Vec<f32>], right: &[Vec<f32>]) -> f32 {
    let pairs = left.iter().flatten().zip(right.iter().flatten());
    pairs.map(|(left, right)| (left - right).abs() / right.abs().max(1.0)).fold(0.0, f32::max)
}

#[test]
fn every_architecture_agrees_with_the_reference_to_a_thousandth() {
    let lengths = [1, 9, 23, 40];
    for config in architectures() {
        let opened = open(&config);
        let options = options(opened.config(), KvDtype::F32, 2);
        let mut reference = ReferenceBackend::new(&opened, &options).unwrap();
        let wanted = logprobs(&mut reference, &lengths, 1000);
        assert!(wanted.iter().flatten().all(|score| score.is_finite()), "{config}");
        let got = logprobs(&mut cpu(&config, KvDtype::F32, 2), &lengths, 1000);
        let difference = difference(&got, &wanted);
        assert!(difference < 1e-3, "{difference} for {config}");
    }
}

#[test]
fn every_architecture_computes_the_same_bits_in_any_chunks_and_company() {
    for config in architectures() {
        for dtype in [KvDtype::F32, KvDtype::BF16] {
            let together = logprobs(&mut cpu(&config, dtype, 2), &[31, 8, 23, 40], 1000);
            for chunk in [1, 16] {
                assert_eq!(
                    logprobs(&mut cpu(&config, dtype, 1), &[31, 8, 23, 40], chunk),
                    together,
                    "{config}"
                );
            }
            let alone = logprobs(&mut cpu(&config, dtype, 2), &[31], 3);
            assert_eq!(alone[0], together[0], "{config}");
        }
    }
}

#[test]
fn drawn_token_feeds_the_next_step() {
    let config = config("LlamaForCausalLM", json!({}));
    let mut backend = cpu(&config, KvDtype::F32, 1);
    let mut sequence = sequences(&[9]).remove(0);
    let mut batch = Batch { rows: vec![admit(0)], ..Batch::default() };
    push(&mut batch, 0, &mut sequence, 100, VOCAB);
    batch.draws[0].kind = DrawKind::Sample;
    let mut output = Output::default();
    backend.launch(&batch).unwrap();
    backend.collect(&mut output).unwrap();
    let [Drawn::Token { token, .. }] = output.drawn[..] else { panic!("wanted a token") };
    let next = |backend: &mut CpuBackend, input| {
        let mut sequence =
            Sequence { computed: 9, table: sequence.table.clone(), tokens: vec![0; 10] };
        let mut batch = Batch::default();
        push(&mut batch, 0, &mut sequence, 1, VOCAB);
        batch.inputs[0] = input;
        let mut output = Output::default();
        backend.launch(&batch).unwrap();
        backend.collect(&mut output).unwrap();
        by_token(output.drawn.remove(0))
    };
    let known = next(&mut backend, Input::Known(token));
    assert_eq!(next(&mut backend, Input::Drawn(RowId(0))), known);
}

fn admit(row: u32) -> RowChange {
    use crate::request::{Decoding, Request, RequestId, Salt};
    let params = crate::sampling::Params::greedy();
    let one = std::num::NonZeroU32::MIN;
    let request = Request {
        id: RequestId(1),
        prompt: [TokenId(0)].into(),
        decoding: Decoding::Sample { params: params.into(), choices: one },
        max_tokens: one,
        stop_tokens: [].into(),
        priority: 0,
        salt: Salt::default(),
        prompt_logprobs: None,
    };
    RowChange::Admit {
        row: RowId(row),
        history: request.prompt.clone(),
        request: request.into(),
        choice: 0,
    }
}

#[test]
fn scores_of_prompt_tokens_are_the_same_in_any_chunks() {
    let config = config("Qwen3ForCausalLM", json!({}));
    let scored = |chunk: usize| {
        let mut backend = cpu(&config, KvDtype::F32, 2);
        let mut sequence = sequences(&[30]).remove(0);
        let mut scores = Vec::new();
        while sequence.computed < 30 {
            let mut batch = Batch::default();
            let from = sequence.computed;
            push(&mut batch, 0, &mut sequence, chunk, VOCAB);
            let next = (from..sequence.computed)
                .map(|token| TokenId(sequence.tokens[(token + 1) % 30]))
                .collect();
            batch.scores.push(PromptScore {
                row: RowId(0),
                tokens: 0..sequence.computed - from,
                next,
                count: 3,
            });
            let mut output = Output::default();
            backend.launch(&batch).unwrap();
            backend.collect(&mut output).unwrap();
            scores.extend(output.scores.remove(0));
        }
        scores
    };
    let whole = scored(30);
    assert_eq!(whole.len(), 30);
    assert_eq!(scored(1), whole);
    assert_eq!(scored(7), whole);
}

#[test]
fn copied_slots_give_the_same_result_as_the_originals() {
    let config = config("LlamaForCausalLM", json!({}));
    let mut backend = cpu(&config, KvDtype::F32, 1);
    let wanted = logprobs(&mut backend, &[10], 1000);
    let mut sequence = sequences(&[10]).remove(0);
    let last = sequence.table[2];
    backend.copy_blocks(&[BlockCopy { from: last, to: BlockId(63), slots: 1 }]).unwrap();
    sequence.table[2] = BlockId(63);
    sequence.computed = 9;
    let mut batch = Batch::default();
    push(&mut batch, 0, &mut sequence, 1, VOCAB);
    let mut output = Output::default();
    backend.launch(&batch).unwrap();
    backend.collect(&mut output).unwrap();
    assert_eq!(by_token(output.drawn.remove(0)), wanted[0]);
}

/// A word of the error, and what causes it.
type Spoilt = (&'static str, fn(&mut Batch));

#[test]
fn index_outside_its_limit_is_refused_and_the_backend_goes_on() {
    let config = config("LlamaForCausalLM", json!({}));
    let mut backend = cpu(&config, KvDtype::F32, 1);
    let spoilt: [Spoilt; 9] = [
        ("token ids", |batch| batch.inputs[0] = Input::Known(TokenId(61))),
        ("sampling rows", |batch| batch.inputs[0] = Input::Drawn(RowId(8))),
        ("slots", |batch| batch.slots[1] = 256),
        ("slots", |batch| batch.slots.truncate(1)),
        ("blocks of a table", |batch| batch.tables[1] = BlockId(64)),
        ("tokens of a span", |batch| batch.spans[0].tokens = 0..99),
        ("positions of a span", |batch| batch.spans[0].start = 46),
        ("tokens that are drawn", |batch| batch.draws[0].token = 3),
        ("sampling rows", |batch| batch.rows.push(RowChange::Release { row: RowId(8) })),
    ];
    for (wanted, spoil) in spoilt {
        let mut batch = Batch::default();
        push(&mut batch, 0, &mut sequences(&[3])[0], 100, VOCAB);
        spoil(&mut batch);
        let error = backend.launch(&batch).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
    assert!(matches!(backend.collect(&mut Output::default()), Err(BackendError::NothingLaunched)));
    assert_eq!(logprobs(&mut backend, &[3], 100).len(), 1);
}

#[test]
fn tile_holds_each_token_once_and_no_more_than_its_rows() {
    let mut tile =
        Tile { tokens: Vec::new(), most: 2, row_of: vec![None; 9], draw_rows: Vec::new() };
    assert_eq!(tile.take([4, 4, 7, 4, 8, 4].into_iter()), 4);
    assert_eq!((&tile.tokens[..], &tile.draw_rows[..]), (&[4, 7][..], &[0, 0, 1, 0][..]));
    assert_eq!(tile.take([8, 4].into_iter()), 2);
    assert_eq!(tile.tokens, [8, 4]);
}

#[test]
fn logits_buffer_is_bounded_but_never_below_sixteen_rows() {
    assert!(logit_rows(49_152, 8192) * 49_152 * 4 <= MOST_LOGIT_BYTES);
    assert_eq!(logit_rows(10_000_000, 8192), 16);
    assert_eq!(logit_rows(10_000_000, 4), 4);
}

const SMOLLM2: &str = "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const SAFETENSORS: &str = "smollm2-safetensors";
const GEMMA3: &str = "gemma3/gemma-3-270m-q4_k_m.gguf";
const QWEN2: &str = "qwen2.5-coder/Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf";

/// A real model, or `None` after a loud word on stderr.
#[expect(clippy::print_stderr, reason = "a test that does not run says so")]
fn real_model(file: &str) -> Option<std::path::PathBuf> {
    let folder = std::env::var_os("BINDERY_TEST_MODEL_DIR");
    let found = folder.map(|folder| Path::new(&folder).join(file)).filter(|path| path.exists());
    if found.is_none() {
        eprintln!("NOT RUN: BINDERY_TEST_MODEL_DIR does not name a folder that holds {file}");
    }
    found
}

/// The `count` most likely continuations of `prompt`, one token after the other.
fn greedy(backend: &mut dyn Backend, prompt: &[u32], count: usize) -> Vec<u32> {
    let table = (0..12).map(|block| BlockId(1 + block)).collect();
    let mut sequence = Sequence { tokens: prompt.to_vec(), computed: 0, table };
    for _ in 0..count {
        let mut batch = Batch::default();
        push(&mut batch, 0, &mut sequence, 100, 1);
        let mut output = Output::default();
        backend.launch(&batch).unwrap();
        backend.collect(&mut output).unwrap();
        let Drawn::Candidates(best) = output.drawn.remove(0) else { panic!("wanted candidates") };
        sequence.tokens.push(best[0].token.0);
    }
    sequence.tokens.split_off(prompt.len())
}

/// The tokens of a text.
fn tokens_of(opened: &Opened, text: &str) -> Vec<u32> {
    let tokens = opened.text().encode(text, AddSpecial::Yes).unwrap();
    tokens.iter().map(|token| token.0).collect()
}

fn open_real(model: &Path) -> Opened {
    let files = ModelFiles::find(model).unwrap();
    Opened::open(&files, LoadFormat::Auto, WeightDtype::Auto).unwrap()
}

/// Packs the weights, of which every byte was counted before.
fn packed(opened: Opened, options: CpuOptions) -> CpuBackend {
    let (mut packed, weight_bytes) = (0, opened.weight_bytes());
    let config = opened.config().clone();
    let weights = opened.load(&mut |done, _| packed = done).unwrap();
    assert_eq!(packed, weight_bytes as u64);
    CpuBackend::new(config, weights, options).unwrap()
}

/// Loads a model twice and asks both backends to continue a sentence: `same` tokens are the same. Near ties fall either way
/// once quantized weights have rounded the batch.
#[track_caller]
fn check_continues(file: &str, wanted: &str, same: usize) {
    let Some(model) = real_model(file) else { return };
    let opened = open_real(&model);
    let (text, prompt) = (opened.text(), tokens_of(&opened, "The capital of France is"));
    let options = options(opened.config(), KvDtype::F32, 2);
    let mut reference = ReferenceBackend::new(&opened, &options).unwrap();
    let answer = greedy(&mut packed(opened, options), &prompt, 8);
    let tokens: Vec<_> = answer.iter().copied().map(TokenId).collect();
    let said = text.decode(&tokens, SpecialTokens::Keep);
    assert!(said.contains(wanted), "{said}");
    let wished = greedy(&mut reference, &prompt, 8);
    assert_eq!(wished[..same], answer[..same], "{said}");
}

/// Log-probabilities of the whole vocabulary after a sentence.
fn scores_after(backend: &mut dyn Backend, prompt: &[u32], vocab: usize) -> Vec<f32> {
    let table = (0..12).map(|block| BlockId(1 + block)).collect();
    let mut sequence = Sequence { tokens: prompt.to_vec(), computed: 0, table };
    let mut batch = Batch::default();
    push(&mut batch, 0, &mut sequence, 100, vocab);
    let mut output = Output::default();
    backend.launch(&batch).unwrap();
    backend.collect(&mut output).unwrap();
    by_token(output.drawn.remove(0))
}

/// How far scores are from those wanted: Kullback and Leibler's divergence, in nats. Quantized weights meet a batch of 8 bits
/// a value, whose rounding no float reference has: its products are compared with exact ones in `kernels`, here it must
/// change little. A wrong layer or order of rows costs nats.
#[track_caller]
fn check_close(got: &[f32], wanted: &[f32]) {
    let lost = |(got, wanted): (&f32, &f32)| f64::from(wanted.exp() * (wanted - got));
    let divergence: f64 = got.iter().zip(wanted).map(lost).sum();
    assert!((-1e-4..0.03).contains(&divergence), "{divergence} nats");
}

const STORY: &str = "Once upon a time, 12 old foxes crossed the frozen river.";

#[track_caller]
fn check_scores(file: &str) {
    let Some(model) = real_model(file) else { return };
    let opened = open_real(&model);
    let prompt = tokens_of(&opened, STORY);
    let (options, vocab) = (options(opened.config(), KvDtype::F32, 2), opened.config().vocab);
    let mut reference = ReferenceBackend::new(&opened, &options).unwrap();
    let wanted = scores_after(&mut reference, &prompt, vocab);
    drop(reference);
    let got = scores_after(&mut packed(opened, options), &prompt, vocab);
    check_close(&got, &wanted);
}

#[test]
fn gemma3_scores_every_token_as_the_reference_does() {
    check_scores(GEMMA3);
}

#[test]
fn smollm2_scores_every_token_as_the_reference_does() {
    check_scores(SMOLLM2);
}

/// The folder was converted by a script that shares nothing with the reading of either. It holds rounded numbers.
#[test]
fn smollm2_in_safetensors_scores_every_token_as_its_gguf_does() {
    let (Some(folder), Some(gguf)) = (real_model(SAFETENSORS), real_model(SMOLLM2)) else { return };
    let scores = [folder, gguf].map(|model| {
        let opened = open_real(&model);
        let prompt = tokens_of(&opened, STORY);
        let (options, vocab) = (options(opened.config(), KvDtype::F32, 2), opened.config().vocab);
        scores_after(&mut packed(opened, options), &prompt, vocab)
    });
    let [folder, gguf] = scores;
    check_close(&folder, &gguf);
}

#[test]
fn smollm2_knows_the_capital_of_france_as_the_reference_does() {
    check_continues(SMOLLM2, "Paris", 2);
}

#[test]
fn smollm2_in_safetensors_knows_the_capital_of_france_as_the_reference_does() {
    check_continues(SAFETENSORS, "Paris", 8);
}

#[test]
fn gemma3_continues_a_sentence_as_the_reference_does() {
    check_continues(GEMMA3, "the country of France", 2);
}

/// The reference would take 7 GB for this model, so the wanted words stand here.
#[test]
fn qwen2_knows_the_capital_of_france() {
    let Some(model) = real_model(QWEN2) else { return };
    let opened = open_real(&model);
    let (text, prompt) = (opened.text(), tokens_of(&opened, "The capital of France is"));
    let options = options(opened.config(), KvDtype::F32, 2);
    let answer = greedy(&mut packed(opened, options), &prompt, 2);
    let tokens: Vec<_> = answer.into_iter().map(TokenId).collect();
    assert_eq!(text.decode(&tokens, SpecialTokens::Keep), " Paris.");
}

#[test]
fn smollm2_computes_the_same_bits_in_any_chunks_and_company() {
    let Some(path) = real_model(SMOLLM2) else { return };
    let files = ModelFiles::find(&path).unwrap();
    let backend = |threads| {
        let opened = Opened::open(&files, LoadFormat::Auto, WeightDtype::Auto).unwrap();
        let options = options(opened.config(), KvDtype::F16, threads);
        CpuBackend::new(opened.config().clone(), opened.load(&mut |_, _| {}).unwrap(), options)
            .unwrap()
    };
    let lengths = [31, 8, 23, 40];
    let together = candidates(&mut backend(2), &lengths, 1000);
    assert!(together.iter().all(Option::is_some));
    assert_eq!(candidates(&mut backend(1), &lengths, 1), together);
    assert_eq!(candidates(&mut backend(2), &lengths, 16), together);
    assert_eq!(candidates(&mut backend(2), &lengths[..1], 7), together[..1]);
}
