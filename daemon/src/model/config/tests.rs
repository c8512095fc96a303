use std::num::NonZeroUsize;

use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::*;
use crate::backend::cpu::CpuBackend;

fn llama() -> Json {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null,
    })
}

fn with(changes: Json) -> Json {
    let mut config = llama();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn windows(config: &ModelConfig) -> Vec<Option<u32>> {
    config.attention.iter().map(|attention| attention.window()).collect()
}

#[track_caller]
fn check_refused(changes: Json, wanted: &str) {
    let error = ModelConfig::from_json(&with(changes)).unwrap_err().to_string();
    assert!(error.contains(wanted), "{error}");
}

#[test]
fn llama_reads_its_sizes() {
    let config = ModelConfig::from_json(&llama()).unwrap();
    assert_eq!((config.layers, config.hidden, config.head_dim, config.kv_heads), (2, 64, 16, 2));
    assert_eq!(config.head, OutputHead::Own);
    assert_eq!(config.attention_scale, 0.25);
    assert_eq!(config.rope.scaling, RopeScaling::None);
}

#[test]
fn impossible_or_unsupported_keys_are_refused_by_name() {
    check_refused(json!({"num_hidden_layers": 0}), "num_hidden_layers");
    check_refused(json!({"num_hidden_layers": 1_000_000}), "num_hidden_layers");
    check_refused(json!({"num_attention_heads": 5}), "num_key_value_heads");
    check_refused(
        json!({"num_attention_heads": 6, "num_key_value_heads": 6}),
        "num_attention_heads",
    );
    check_refused(json!({"head_dim": 15}), "head_dim");
    check_refused(json!({"hidden_size": -64}), "hidden_size");
    check_refused(json!({"hidden_size": 64.5}), "hidden_size");
    check_refused(json!({"vocab_size": null}), "vocab_size is missing");
    check_refused(json!({"rms_norm_eps": 0}), "rms_norm_eps");
    check_refused(json!({"rope_theta": "NaN"}), "rope_theta");
    check_refused(json!({"hidden_act": "relu"}), "hidden_act");
    check_refused(json!({"architectures": ["MixtralForCausalLM"]}), "MixtralForCausalLM");
    check_refused(json!({"quantization_config": {}}), "quantization_config");
    check_refused(json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), "yarn");
    check_refused(json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor");
    check_refused(json!({"rope_scaling": "linear"}), "rope_scaling");
    check_refused(json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor");
    check_refused(json!({"tie_word_embeddings": 1}), "tie_word_embeddings");
    check_refused(json!({"sliding_window": 8, "layer_types": ["full_attention"]}), "layer_types");
}

#[test]
fn rope_scalings_are_read_in_both_spellings() {
    let linear =
        ModelConfig::from_json(&with(json!({"rope_scaling": {"type": "linear", "factor": 2.0}})))
            .unwrap();
    assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    });
    let config = ModelConfig::from_json(&with(json!({"rope_parameters": llama3}))).unwrap();
    assert_eq!(config.rope.base, 500_000.0);
    assert!(matches!(config.rope.scaling, RopeScaling::Llama3 { factor: 8.0, .. }));
}

#[test]
fn gemma3_slides_in_all_layers_but_every_sixth() {
    let gemma = json!({
        "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 7, "head_dim": 32, "sliding_window": 8,
        "query_pre_attn_scalar": 64, "hidden_activation": "gelu_pytorch_tanh", "rope_theta": null,
    });
    let config = ModelConfig::from_json(&with(gemma.clone())).unwrap();
    let wanted = [Some(8), Some(8), Some(8), Some(8), Some(8), None, Some(8)];
    assert_eq!(windows(&config), wanted);
    assert_eq!(config.attention_scale, 0.125);
    assert_eq!(config.embedding_scale, Some(8.0));
    assert_eq!(config.head, OutputHead::Tied);
    assert_eq!((config.rope.base, config.sliding_rope.unwrap().base), (1e6, 1e4));
    let mut without = with(gemma);
    without["sliding_window"] = Json::Null;
    assert!(ModelConfig::from_json(&without).unwrap_err().to_string().contains("sliding_window"));
}

#[test]
fn qwen2_has_biases_and_slides_only_where_it_is_switched_on() {
    let qwen = json!({
        "architectures": ["Qwen2ForCausalLM"], "sliding_window": 16, "use_sliding_window": false, "max_window_layers": 1,
    });
    let config = ModelConfig::from_json(&with(qwen.clone())).unwrap();
    assert_eq!(config.biases, Biases { qkv: true, output: false, ffn: false });
    assert_eq!(windows(&config), [None, None]);
    let mut on = with(qwen);
    on["use_sliding_window"] = json!(true);
    assert_eq!(windows(&ModelConfig::from_json(&on).unwrap()), [None, Some(16)]);
}

#[test]
fn mistral_slides_in_every_layer_where_it_has_a_window() {
    let config = json!({"architectures": ["MistralForCausalLM"], "sliding_window": 32});
    assert_eq!(windows(&ModelConfig::from_json(&with(config)).unwrap()), [Some(32), Some(32)]);
}

#[test]
fn gemma3_reads_a_rotation_for_each_kind_of_layer() {
    let config = json!({
        "architectures": ["Gemma3ForCausalLM"], "sliding_window": 8, "rope_theta": null,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    });
    let config = ModelConfig::from_json(&with(config)).unwrap();
    assert_eq!(config.rope, Rope { base: 5e5, scaling: RopeScaling::Linear { factor: 8.0 } });
    assert_eq!(config.sliding_rope, Some(Rope { base: 2e4, scaling: RopeScaling::None }));
    assert_eq!(windows(&config), [Some(8), None]);
}

/// Values that a hostile file may hold.
fn hostile() -> impl Strategy<Value = Json> {
    prop_oneof![
        Just(Json::Null),
        any::<i64>().prop_map(Json::from),
        any::<u64>().prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        (0..70i64).prop_map(Json::from),
        any::<bool>().prop_map(Json::from),
        "[a-z0-9_]{0,9}".prop_map(Json::from),
        prop_oneof![Just(json!([])), Just(json!({})), Just(json!(["sliding_attention"])), Just(json!([[1]]))],
        (any::<f32>(), "default|linear|llama3|yarn").prop_map(|(factor, kind)| json!({
            "rope_type": kind, "factor": factor, "low_freq_factor": 1, "high_freq_factor": factor,
            "original_max_position_embeddings": 16, "full_attention": {"type": kind}, "rope_theta": factor,
        })),
    ]
}

const KEYS: [&str; 22] = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_local_base_freq",
    "sliding_window",
    "sliding_window_pattern",
    "layer_types",
    "use_sliding_window",
    "max_window_layers",
    "query_pre_attn_scalar",
    "hidden_act",
    "attention_bias",
    "tie_word_embeddings",
];

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn hostile_values_give_an_error_or_a_consistent_model(
        changes in proptest::collection::vec((0..KEYS.len(), hostile()), 1..6),
        architecture in 0..Architecture::NAMES.len(),
    ) {
        let mut config = with(json!({"architectures": [Architecture::NAMES[architecture].1]}));
        for (key, value) in changes {
            config[KEYS[key]] = value;
        }
        if let Ok(config) = ModelConfig::from_json(&config) {
            prop_assert_eq!(config.attention.len(), config.layers);
            prop_assert_eq!(config.heads % config.kv_heads, 0);
            prop_assert_eq!(config.rope.frequencies(config.head_dim).len() * 2, config.head_dim);
            prop_assert!(config.attention_scale.is_finite() && config.attention_scale > 0.0);
            let _ = CpuBackend::workspace_bytes(&config, usize::MAX, NonZeroUsize::new(usize::MAX));
        }
    }
}
