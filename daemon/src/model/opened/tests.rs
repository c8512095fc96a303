use std::collections::BTreeMap;
use std::path::Path;

use kernels::cpu::Matrix;
use serde_json::{Value as Json, json};

use super::*;
use crate::model::weights::gguf::GgmlType;

fn config() -> Json {
    json!({
        "architectures": ["Gemma3ForCausalLM"], "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 11,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "sliding_window": 4,
    })
}

/// A tensor of a file that a test writes.
#[derive(Clone)]
struct Written {
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

type Tensors = BTreeMap<String, Written>;

/// Collects what a dummy would be as bf16 tensors.
struct Write {
    dummy: Dummy,
    tensors: Tensors,
}

impl Reader for Write {
    type Matrix = ();
    type Vector = ();

    fn matrix(&mut self, wanted: &WantedMatrix) -> Result<(), ModelError> {
        let shape = vec![wanted.rows, wanted.cols];
        let written = Written { dtype: "BF16", shape, bytes: self.dummy.matrix(wanted)? };
        self.tensors.insert(wanted.name.clone(), written);
        Ok(())
    }

    fn vector(&mut self, wanted: &WantedVector) -> Result<(), ModelError> {
        let bytes =
            self.dummy.vector(wanted).iter().flat_map(|number| number.to_le_bytes()).collect();
        self.tensors
            .insert(wanted.name.clone(), Written { dtype: "F32", shape: vec![wanted.len], bytes });
        Ok(())
    }
}

fn tensors(config: &Json, layout: Layout) -> Tensors {
    let mut write = Write { dummy: Dummy { seed: 5 }, tensors: Tensors::new() };
    let config = ModelConfig::from_json(config).unwrap();
    wanted(&config, layout).read(&mut write).unwrap();
    write.tensors
}

fn safetensors<'a>(tensors: impl Iterator<Item = (&'a String, &'a Written)>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
    for (name, tensor) in tensors {
        let start = data.len();
        data.extend(&tensor.bytes);
        let offsets = [start, data.len()];
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets});
        header.insert(name.clone(), entry);
    }
    let mut header = Json::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    file
}

fn folder(config: &Json, files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let tokenizer = json!({"version": "1.0", "added_tokens": [], "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true}, "model": {
        "type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}});
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn open(path: &Path, format: LoadFormat, dtype: WeightDtype) -> Result<Opened, ModelError> {
    Opened::open(&ModelFiles::find(path)?, format, dtype)
}

/// The numbers of a model, in a fixed order.
fn numbers(weights: &Weights) -> Vec<f32> {
    let rows = |matrix: &Matrix| {
        let mut numbers = vec![0.0; matrix.rows() * matrix.cols()];
        for (row, out) in numbers.chunks_mut(matrix.cols()).enumerate() {
            matrix.dequantize_row(row, out).unwrap();
        }
        numbers
    };
    let mut all = rows(&weights.embedding);
    all.extend(&weights.norm);
    all.extend(rows(weights.head()));
    for layer in &weights.layers {
        let maps = [
            &layer.query,
            &layer.key,
            &layer.value,
            &layer.output,
            &layer.gate,
            &layer.up,
            &layer.down,
        ];
        maps.iter().for_each(|map| all.extend(rows(&map.matrix)));
        all.extend(&layer.attention_norm);
        all.extend(&layer.ffn_norm);
        [&layer.query_norm, &layer.post_ffn_norm]
            .iter()
            .for_each(|norm| all.extend(norm.iter().flatten()));
    }
    all
}

fn loaded(path: &Path, format: LoadFormat, dtype: WeightDtype) -> Vec<f32> {
    let opened = open(path, format, dtype).unwrap();
    let weight_bytes = opened.weight_bytes() as u64;
    let mut told = Vec::new();
    let weights = opened.load(&mut |done, all| told.push((done, all))).unwrap();
    assert!(told.is_sorted(), "{told:?}");
    assert_eq!(told.last(), Some(&(weight_bytes, weight_bytes)));
    numbers(&weights)
}

#[test]
fn one_file_many_shards_and_made_up_weights_are_the_same_model() {
    let config = config();
    let all = tensors(&config, Layout::Safetensors);
    let one = folder(&config, &[("model.safetensors", safetensors(all.iter()))]);
    let shard =
        |name: &str| if name.contains("layers.0") { "a.safetensors" } else { "b.safetensors" };
    let map: Json = all
        .keys()
        .map(|name| (name.clone(), Json::from(shard(name))))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let part = |file: &str| safetensors(all.iter().filter(|(name, _)| shard(name) == file));
    let shards = folder(
        &config,
        &[
            ("model.safetensors.index.json", json!({"weight_map": map}).to_string().into_bytes()),
            ("a.safetensors", part("a.safetensors")),
            ("b.safetensors", part("b.safetensors")),
        ],
    );
    let wanted =
        loaded(folder(&config, &[]).path(), LoadFormat::Dummy { seed: 5 }, WeightDtype::Auto);
    assert_eq!(loaded(one.path(), LoadFormat::Auto, WeightDtype::Auto), wanted);
    assert_eq!(loaded(shards.path(), LoadFormat::Auto, WeightDtype::Auto), wanted);
    assert_ne!(loaded(one.path(), LoadFormat::Dummy { seed: 6 }, WeightDtype::Auto), wanted);
}

#[test]
fn dtype_changes_the_memory_and_float32_keeps_every_number() {
    let config = config();
    let one = folder(
        &config,
        &[("model.safetensors", safetensors(tensors(&config, Layout::Safetensors).iter()))],
    );
    let bytes = |dtype| open(one.path(), LoadFormat::Auto, dtype).unwrap().weight_bytes();
    assert_eq!(bytes(WeightDtype::Auto), bytes(WeightDtype::F16));
    assert!(bytes(WeightDtype::F32) > bytes(WeightDtype::BF16));
    let kept = loaded(one.path(), LoadFormat::Auto, WeightDtype::Auto);
    assert_eq!(loaded(one.path(), LoadFormat::Auto, WeightDtype::F32), kept);
    let rounded = loaded(one.path(), LoadFormat::Auto, WeightDtype::F16);
    assert!(rounded.iter().zip(&kept).all(|(rounded, kept)| (rounded - kept).abs() < 1e-3));
}

#[track_caller]
fn check_refused(spoil: impl FnOnce(&mut Tensors), wanted: &str) {
    let config = config();
    let mut all = tensors(&config, Layout::Safetensors);
    spoil(&mut all);
    let one = folder(&config, &[("model.safetensors", safetensors(all.iter()))]);
    let error = open(one.path(), LoadFormat::Auto, WeightDtype::Auto).unwrap_err().to_string();
    assert!(error.contains(wanted), "{error}");
}

#[test]
fn tensor_that_is_missing_misshapen_or_of_another_dtype_is_refused_by_name() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let change = |name: &str, change: fn(&mut Written)| {
        let name = name.to_owned();
        move |all: &mut Tensors| change(all.get_mut(&name).unwrap())
    };
    check_refused(|all| drop(all.remove(name)), "model.layers.1.mlp.up_proj.weight is missing");
    let stray = "model.layers.0.self_attn.q_proj.bias";
    let more = Written { dtype: "BF16", shape: vec![1], bytes: vec![0; 2] };
    check_refused(|all| drop(all.insert(stray.to_owned(), more)), "q_proj.bias is no part");
    check_refused(
        change(name, |tensor| tensor.shape.swap(0, 1)),
        "wanted shape [24, 16], got [16, 24]",
    );
    check_refused(
        change(name, |tensor| tensor.dtype = "I16"),
        "model.layers.1.mlp.up_proj.weight: wanted dtype",
    );
    check_refused(
        change("model.norm.weight", |tensor| tensor.dtype = "I32"),
        "model.norm.weight: wanted dtype",
    );
}

#[test]
fn file_cut_short_anywhere_is_refused_by_name() {
    let config = config();
    let whole = safetensors(tensors(&config, Layout::Safetensors).iter());
    for len in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        let cut = folder(&config, &[("model.safetensors", whole[..len].to_vec())]);
        let error = open(cut.path(), LoadFormat::Auto, WeightDtype::Auto).unwrap_err().to_string();
        assert!(error.contains("model.safetensors"), "{error}");
    }
}

#[test]
fn missing_shard_is_refused_by_name() {
    let index =
        json!({"weight_map": {"model.norm.weight": "gone.safetensors"}}).to_string().into_bytes();
    let folder = folder(&config(), &[("model.safetensors.index.json", index)]);
    let error = open(folder.path(), LoadFormat::Auto, WeightDtype::Auto).unwrap_err().to_string();
    assert!(error.contains("gone.safetensors"), "{error}");
}

fn llama() -> Json {
    let mut config = config();
    config["architectures"] = json!(["LlamaForCausalLM"]);
    config["sliding_window"] = Json::Null;
    config
}

/// A GGUF, version 3, of a tiny llama with the tensors of `tensors`.
fn gguf(keys: &[(&str, u32)], tensors: &Tensors) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((keys.len() as u64 + 5).to_le_bytes());
    file.extend(
        [text("general.architecture"), 8u32.to_le_bytes().to_vec(), text("llama")].concat(),
    );
    let epsilon = text("llama.attention.layer_norm_rms_epsilon");
    file.extend([epsilon, 6u32.to_le_bytes().to_vec(), 1e-5f32.to_le_bytes().to_vec()].concat());
    let string =
        |key: &str, value: &str| [text(key), 8u32.to_le_bytes().to_vec(), text(value)].concat();
    let strings = |key: &str, values: &[&str]| {
        let head = [text(key), 9u32.to_le_bytes().to_vec(), 8u32.to_le_bytes().to_vec()].concat();
        let len = (values.len() as u64).to_le_bytes().to_vec();
        [head, len, values.iter().flat_map(|value| text(value)).collect()].concat()
    };
    file.extend(string("tokenizer.ggml.model", "gpt2"));
    file.extend(strings("tokenizer.ggml.tokens", &["a", "b", "ab"]));
    file.extend(strings("tokenizer.ggml.merges", &["a b"]));
    for (key, value) in keys {
        file.extend(
            [text(key), 4u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat(),
        );
    }
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        file.extend(text(name));
        file.extend(u32::try_from(tensor.shape.len()).unwrap().to_le_bytes());
        tensor.shape.iter().rev().for_each(|size| file.extend((*size as u64).to_le_bytes()));
        let dtype = if tensor.dtype == "BF16" { GgmlType::BF16 } else { GgmlType::F32 };
        file.extend(dtype.0.to_le_bytes());
        file.extend((data.len() as u64).to_le_bytes());
        data.extend(&tensor.bytes);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    file
}

const KEYS: [(&str, u32); 7] = [
    ("llama.block_count", 2),
    ("llama.embedding_length", 16),
    ("llama.feed_forward_length", 24),
    ("llama.attention.head_count", 2),
    ("llama.attention.head_count_kv", 1),
    ("llama.attention.key_length", 8),
    ("llama.context_length", 64),
];

#[track_caller]
fn check_gguf(
    keys: &[(&str, u32)],
    spoil: impl FnOnce(&mut Tensors),
) -> Result<Opened, ModelError> {
    let mut all = tensors(&llama(), Layout::Gguf);
    spoil(&mut all);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    std::fs::write(&path, gguf(keys, &all)).unwrap();
    open(&path, LoadFormat::Auto, WeightDtype::Auto)
}

#[test]
fn gguf_of_a_llama_has_its_rotated_rows_reordered() {
    let opened = check_gguf(&KEYS, |_| ()).unwrap();
    assert_eq!(opened.config().head_dim, 8);
    assert_eq!(opened.text().vocab_size(), 3);
    let weights = opened.load(&mut |_, _| ()).unwrap();
    let all = tensors(&llama(), Layout::Gguf);
    let row = |tensor: &str, row: usize| floats(&all[tensor].bytes[row * 32..][..32], Dtype::BF16);
    let mut packed = vec![0.0; 16];
    for (index, source) in [(1, 2), (4, 1), (12, 9)] {
        weights.layers[1].query.matrix.dequantize_row(index, &mut packed).unwrap();
        assert_eq!(packed, row("blk.1.attn_q.weight", source));
    }
    weights.layers[1].value.matrix.dequantize_row(4, &mut packed).unwrap();
    assert_eq!(packed, row("blk.1.attn_v.weight", 4));
}

#[test]
fn gguf_that_is_inconsistent_is_refused_by_key_or_tensor() {
    let refused = |keys: &[(&str, u32)], spoil: fn(&mut Tensors)| {
        check_gguf(keys, spoil).unwrap_err().to_string()
    };
    let with = |key: &str, value: u32| {
        let mut keys = KEYS.to_vec();
        keys.iter_mut().filter(|(name, _)| *name == key).for_each(|entry| entry.1 = value);
        keys
    };
    let keys = |key: &str, value: u32| refused(&with(key, value), |_| ());
    assert!(keys("llama.block_count", 0).contains("llama.block_count"));
    assert!(keys("llama.block_count", 3).contains("blk.2.attn_norm.weight is missing"));
    assert!(keys("llama.attention.head_count_kv", 3).contains("llama.attention.head_count_kv"));
    assert!(keys("llama.block_count", 1).contains("blk.1.attn_k.weight is no part"));
    assert!(
        keys("llama.feed_forward_length", 23)
            .contains("blk.0.ffn_gate.weight: wanted shape [23, 16]")
    );
    assert!(keys("llama.embedding_length", u32::MAX).contains("llama.embedding_length"));
    assert!(refused(&KEYS[1..], |_| ()).contains("llama.block_count is missing"));
    assert!(
        refused(&KEYS, |all| drop(all.remove("token_embd.weight")))
            .contains("token_embd.weight is missing")
    );
    let factors = |bytes: Vec<u8>| Written { dtype: "F32", shape: vec![bytes.len() / 4], bytes };
    let rope = check_gguf(&KEYS, |all| {
        drop(all.insert("rope_freqs.weight".to_owned(), factors(vec![0; 16])))
    });
    assert!(rope.unwrap_err().to_string().contains("rope_freqs.weight"));
    let rope = check_gguf(&KEYS, |all| {
        drop(all.insert("rope_freqs.weight".to_owned(), factors(vec![1; 8])))
    });
    assert!(rope.unwrap_err().to_string().contains("rope_freqs.weight: wanted shape [4], got [2]"));
}

#[test]
fn gguf_rope_factors_divide_the_frequencies() {
    let bytes: Vec<u8> =
        [1f32, 2.0, 4.0, 8.0].iter().flat_map(|factor| factor.to_le_bytes()).collect();
    let written = Written { dtype: "F32", shape: vec![4], bytes };
    let opened =
        check_gguf(&KEYS, |all| drop(all.insert("rope_freqs.weight".to_owned(), written))).unwrap();
    let plain = check_gguf(&KEYS, |_| ()).unwrap();
    let (scaled, plain) = (opened.config().rope.frequencies(8), plain.config().rope.frequencies(8));
    assert_eq!((scaled[0], scaled[3] * 8.0), (plain[0], plain[3]));
}

#[test]
fn made_up_model_beyond_all_memory_is_opened_without_taking_any() {
    let mut config = config();
    config["vocab_size"] = json!(1 << 24);
    config["hidden_size"] = json!(1 << 20);
    let opened =
        open(folder(&config, &[]).path(), LoadFormat::Dummy { seed: 1 }, WeightDtype::Auto)
            .unwrap();
    assert!(opened.weight_bytes() > 1 << 45);
}
