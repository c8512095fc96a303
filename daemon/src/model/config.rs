//! What a model is made of, read from `config.json` or from GGUF metadata and checked: sizes, rotation, windows,
//! norms and biases. Nothing here knows where tensors lie.

use std::num::NonZeroU32;

use kernels::cpu::{Activation, KvDtype, KvShape};
use serde_json::Value as Json;

use super::error::ModelError;
use super::keys::Keys;
use super::rope::{Rope, RopeScaling};
use super::weights::gguf::Gguf;

const MOST_LAYERS: usize = 1024;
const MOST_WIDTH: usize = 1 << 20;
const MOST_HEADS: usize = 1 << 12;
const MOST_HEAD_DIM: usize = 1 << 12;
const MOST_VOCAB: usize = 1 << 24;
const MOST_POSITIONS: usize = 1 << 28;

/// A family of models that the forward pass computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2 and all that share their shape.
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    /// Text only.
    Gemma3,
}

/// Which norms a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerNorms {
    /// Before attention and before the feed-forward.
    Pre,
    /// Before and after both.
    PreAndPost,
}

/// Whether each head of Q and K is normed before it is rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadNorms {
    None,
    QueryAndKey,
}

/// Where the scores are computed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputHead {
    /// The embedding matrix serves as the head too.
    Tied,
    Own,
}

/// Which products add a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Biases {
    /// Q, K and V.
    pub qkv: bool,
    /// The projection after attention.
    pub output: bool,
    /// The three products of the feed-forward.
    pub ffn: bool,
}

/// How one layer attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerAttention {
    /// To every position before, with the model's rotation.
    Global,
    /// To the last `window` positions, its own included.
    Sliding { window: u32 },
}

/// A model's shape. Checked: no size is 0, heads divide by KV heads, every product of two sizes fits.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// Even.
    pub head_dim: usize,
    pub vocab: usize,
    /// The context: positions the model was made for.
    pub max_position: usize,
    pub rms_epsilon: f32,
    pub rope: Rope,
    /// The rotation of sliding layers where it differs.
    pub sliding_rope: Option<Rope>,
    /// [layers]
    pub attention: Vec<LayerAttention>,
    /// What scores are multiplied by before the softmax.
    pub attention_scale: f32,
    pub activation: Activation,
    /// What embeddings are multiplied by.
    pub embedding_scale: Option<f32>,
    pub head: OutputHead,
    pub layer_norms: LayerNorms,
    pub head_norms: HeadNorms,
    pub biases: Biases,
}

impl Architecture {
    /// Every architecture with the names that `config.json` and GGUF give it.
    const NAMES: [(Self, &'static str, &'static str); 5] = [
        (Self::Llama, "LlamaForCausalLM", "llama"),
        (Self::Mistral, "MistralForCausalLM", "mistral"),
        (Self::Qwen2, "Qwen2ForCausalLM", "qwen2"),
        (Self::Qwen3, "Qwen3ForCausalLM", "qwen3"),
        (Self::Gemma3, "Gemma3ForCausalLM", "gemma3"),
    ];

    fn of_class(class: &str) -> Result<Self, ModelError> {
        let found = Self::NAMES.iter().find(|(_, name, _)| *name == class);
        found.map(|(architecture, ..)| *architecture).ok_or_else(|| ModelError::Architecture {
            got: class.chars().take(100).collect(),
            wanted: Self::NAMES.map(|(_, name, _)| name).join(", "),
        })
    }

    fn of_word(word: &str) -> Result<Self, ModelError> {
        let found = Self::NAMES.iter().find(|(_, _, name)| *name == word);
        found.map(|(architecture, ..)| *architecture).ok_or_else(|| ModelError::Architecture {
            got: word.chars().take(100).collect(),
            wanted: Self::NAMES.map(|(_, _, name)| name).join(", "),
        })
    }

    fn head_norms(self) -> HeadNorms {
        match self {
            Self::Qwen3 | Self::Gemma3 => HeadNorms::QueryAndKey,
            Self::Llama | Self::Mistral | Self::Qwen2 => HeadNorms::None,
        }
    }

    fn layer_norms(self) -> LayerNorms {
        match self {
            Self::Gemma3 => LayerNorms::PreAndPost,
            Self::Llama | Self::Mistral | Self::Qwen2 | Self::Qwen3 => LayerNorms::Pre,
        }
    }
}

impl ModelConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// Names the key that is missing, absurd or asks for what is not supported.
    pub fn from_json(config: &Json) -> Result<Self, ModelError> {
        let keys = Keys::Json { object: config, path: "" };
        let architecture = json_architecture(config, &keys)?;
        for key in ["quantization_config", "final_logit_softcapping", "attn_logit_softcapping"] {
            keys.refuse(key)?;
        }
        let layers = keys.count("num_hidden_layers", MOST_LAYERS)?;
        let hidden = keys.count("hidden_size", MOST_WIDTH)?;
        let heads = keys.count("num_attention_heads", MOST_HEADS)?;
        let kv_heads = keys.count_opt("num_key_value_heads", MOST_HEADS)?.unwrap_or(heads);
        check_divides(&keys, "num_key_value_heads", heads, kv_heads)?;
        let head_dim = match keys.count_opt("head_dim", MOST_HEAD_DIM)? {
            Some(head_dim) => head_dim,
            None => divide(&keys, "num_attention_heads", hidden, heads)?,
        };
        check_even(&keys, "head_dim", head_dim)?;
        let ropes = json_ropes(architecture, config, &keys)?;
        let scaled_by = keys
            .positive_opt("query_pre_attn_scalar")?
            .filter(|_| architecture == Architecture::Gemma3);
        Ok(Self {
            architecture,
            layers,
            hidden,
            ffn: keys.count("intermediate_size", MOST_WIDTH)?,
            heads,
            kv_heads,
            head_dim,
            vocab: keys.count("vocab_size", MOST_VOCAB)?,
            max_position: keys.count("max_position_embeddings", MOST_POSITIONS)?,
            rms_epsilon: keys.positive("rms_norm_eps")?,
            rope: ropes.global,
            sliding_rope: ropes.sliding,
            attention: json_attention(architecture, layers, config, &keys)?,
            attention_scale: scaled_by.unwrap_or(as_f32(head_dim)).sqrt().recip(),
            activation: json_activation(architecture, &keys)?,
            embedding_scale: embedding_scale(architecture, hidden),
            head: match keys
                .flag_opt("tie_word_embeddings")?
                .unwrap_or(architecture == Architecture::Gemma3)
            {
                true => OutputHead::Tied,
                false => OutputHead::Own,
            },
            layer_norms: architecture.layer_norms(),
            head_norms: architecture.head_norms(),
            biases: json_biases(architecture, &keys)?,
        })
    }

    /// Reads GGUF metadata. Which biases there are and whether the head is tied is told by the tensors' names.
    ///
    /// # Errors
    /// Names the key or tensor that is missing, absurd or asks for what is not supported.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let word = Keys::Gguf { gguf, architecture: "general" }.word_opt("architecture")?;
        let word =
            word.ok_or_else(|| ModelError::KeyMissing { key: "general.architecture".to_owned() })?;
        let architecture = Architecture::of_word(&word)?;
        // Files of Mistral models say `llama`; one that says otherwise follows no known convention.
        if architecture == Architecture::Mistral {
            return Err(ModelError::Architecture {
                got: word,
                wanted: "gemma3, llama, qwen2, qwen3".to_owned(),
            });
        }
        let keys = Keys::Gguf { gguf, architecture: &word };
        for key in ["expert_count", "attn_logit_softcapping", "final_logit_softcapping"] {
            refuse_unless_zero(&keys, key)?;
        }
        let layers = keys.count("block_count", MOST_LAYERS)?;
        let hidden = keys.count("embedding_length", MOST_WIDTH)?;
        let heads = keys.count("attention.head_count", MOST_HEADS)?;
        let kv_heads = keys.count_opt("attention.head_count_kv", MOST_HEADS)?.unwrap_or(heads);
        check_divides(&keys, "attention.head_count_kv", heads, kv_heads)?;
        let head_dim = gguf_head_dim(&keys, hidden, heads)?;
        let has = |name: &str| gguf.tensors.contains_key(name);
        Ok(Self {
            architecture,
            layers,
            hidden,
            ffn: keys.count("feed_forward_length", MOST_WIDTH)?,
            heads,
            kv_heads,
            head_dim,
            vocab: gguf_vocab(gguf)?,
            max_position: keys.count("context_length", MOST_POSITIONS)?,
            rms_epsilon: keys.positive("attention.layer_norm_rms_epsilon")?,
            rope: gguf_rope(&keys)?,
            sliding_rope: (architecture == Architecture::Gemma3)
                .then_some(Rope { base: GEMMA_SLIDING_BASE, scaling: RopeScaling::None }),
            attention: gguf_attention(architecture, layers, &keys)?,
            attention_scale: gguf_attention_scale(
                architecture,
                layers,
                as_f32(head_dim),
                as_f32(hidden / heads),
            ),
            activation: activation_of(architecture),
            embedding_scale: embedding_scale(architecture, hidden),
            head: if has("output.weight") { OutputHead::Own } else { OutputHead::Tied },
            layer_norms: architecture.layer_norms(),
            head_norms: architecture.head_norms(),
            biases: Biases {
                qkv: architecture == Architecture::Qwen2 || has("blk.0.attn_q.bias"),
                output: has("blk.0.attn_output.bias"),
                ffn: has("blk.0.ffn_down.bias"),
            },
        })
    }

    /// Values of Q of one token.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Values of K, and of V, of one token in one layer.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The shape of this model's KV arena, the null block among its `blocks`; `None` where a size passes 32 bits.
    pub fn kv_shape(&self, blocks: u32, block_size: NonZeroU32, dtype: KvDtype) -> Option<KvShape> {
        let figure = |size: usize| u32::try_from(size).ok();
        Some(KvShape {
            blocks,
            block_size: block_size.get(),
            layers: figure(self.layers)?,
            kv_heads: figure(self.kv_heads)?,
            head_dim: figure(self.head_dim)?,
            dtype,
        })
    }
}

/// Base of the sliding layers' rotation, which GGUF files do not carry.
const GEMMA_SLIDING_BASE: f32 = 1e4;
/// Every so many layers of Gemma 3 one is global.
const GEMMA_PATTERN: usize = 6;
/// The layers of Gemma 3 27B, which alone scales attention by the width of hidden / heads.
const GEMMA_27B_LAYERS: usize = 62;

/// The rotations of a model.
struct Ropes {
    global: Rope,
    sliding: Option<Rope>,
}

fn json_architecture(config: &Json, keys: &Keys<'_>) -> Result<Architecture, ModelError> {
    let first = config.get("architectures").and_then(|names| names.get(0)).and_then(Json::as_str);
    match first {
        Some(class) => Architecture::of_class(class),
        None => match keys.word_opt("model_type")?.as_deref() {
            Some("gemma3_text") => Ok(Architecture::Gemma3),
            Some(word) => Architecture::of_word(word),
            None => Err(ModelError::KeyMissing { key: "architectures".to_owned() }),
        },
    }
}

fn json_activation(architecture: Architecture, keys: &Keys<'_>) -> Result<Activation, ModelError> {
    let key = match architecture {
        Architecture::Gemma3 => "hidden_activation",
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 | Architecture::Qwen3 => {
            "hidden_act"
        }
    };
    match keys.word_opt(key)?.as_deref() {
        None => Ok(activation_of(architecture)),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        Some(other) => Err(keys.wrong(key, "silu or gelu_pytorch_tanh".to_owned(), other)),
    }
}

fn json_biases(architecture: Architecture, keys: &Keys<'_>) -> Result<Biases, ModelError> {
    let attention = keys.flag_opt("attention_bias")?.unwrap_or(false);
    let qwen2 = architecture == Architecture::Qwen2;
    Ok(Biases {
        qkv: attention || qwen2,
        output: attention && !qwen2,
        ffn: keys.flag_opt("mlp_bias")?.unwrap_or(false),
    })
}

/// `rope_parameters` (newer files) or `rope_theta` and `rope_scaling`.
fn json_ropes(
    architecture: Architecture,
    config: &Json,
    keys: &Keys<'_>,
) -> Result<Ropes, ModelError> {
    if keys.positive_opt("partial_rotary_factor")?.is_some_and(|share| share != 1.0) {
        keys.refuse("partial_rotary_factor")?;
    }
    let object = |path: &'static str| config.get(path).filter(|value| value.is_object());
    let gemma = architecture == Architecture::Gemma3;
    let global_base = if gemma { 1e6 } else { 1e4 };
    let parts = |path| {
        object("rope_parameters").and_then(|kinds| kinds.get(path)).filter(|kind| kind.is_object())
    };
    let rope = |object, path, base| {
        let keys = Keys::Json { object, path };
        Ok::<_, ModelError>(Rope {
            base: keys.positive_opt("rope_theta")?.unwrap_or(base),
            scaling: json_scaling(&keys)?,
        })
    };
    let global = match (parts("full_attention"), object("rope_parameters")) {
        (Some(part), _) => rope(part, "rope_parameters.full_attention", global_base)?,
        (None, Some(flat)) => {
            rope(flat, "rope_parameters", keys.positive_opt("rope_theta")?.unwrap_or(global_base))?
        }
        (None, None) => Rope {
            base: keys.positive_opt("rope_theta")?.unwrap_or(global_base),
            scaling: match object("rope_scaling") {
                Some(object) => json_scaling(&Keys::Json { object, path: "rope_scaling" })?,
                None if keys.has("rope_scaling") => {
                    return Err(keys.wrong("rope_scaling", "an object".to_owned(), "another type"));
                }
                None => RopeScaling::None,
            },
        },
    };
    let local = keys.positive_opt("rope_local_base_freq")?.unwrap_or(GEMMA_SLIDING_BASE);
    let sliding = match (gemma, parts("sliding_attention")) {
        (false, _) => None,
        (true, Some(part)) => Some(rope(part, "rope_parameters.sliding_attention", local)?),
        (true, None) => Some(Rope { base: local, scaling: RopeScaling::None }),
    };
    Ok(Ropes { global, sliding })
}

fn json_scaling(keys: &Keys<'_>) -> Result<RopeScaling, ModelError> {
    let (key, kind) = match keys.word_opt("rope_type")? {
        Some(kind) => ("rope_type", Some(kind)),
        None => ("type", keys.word_opt("type")?),
    };
    match kind.as_deref() {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: keys.positive("factor")? }),
        Some("llama3") => {
            let (low, high) =
                (keys.positive("low_freq_factor")?, keys.positive("high_freq_factor")?);
            if high <= low {
                return Err(keys.wrong(
                    "high_freq_factor",
                    format!("more than low_freq_factor ({low})"),
                    high,
                ));
            }
            Ok(RopeScaling::Llama3 {
                factor: keys.positive("factor")?,
                low_frequency: low,
                high_frequency: high,
                original_context: keys.positive("original_max_position_embeddings")?,
            })
        }
        Some(other) => Err(keys.wrong(key, "default, linear or llama3".to_owned(), other)),
    }
}

/// Which layers slide: by `layer_types`, by Gemma's pattern, or by Qwen's and Mistral's switches.
fn json_attention(
    architecture: Architecture,
    layers: usize,
    config: &Json,
    keys: &Keys<'_>,
) -> Result<Vec<LayerAttention>, ModelError> {
    let window = keys.count_opt("sliding_window", MOST_POSITIONS)?;
    let sliding = match (architecture, window) {
        (_, None) => None,
        (Architecture::Qwen2 | Architecture::Qwen3, Some(window)) => {
            keys.flag_opt("use_sliding_window")?.unwrap_or(false).then_some(window)
        }
        (Architecture::Llama | Architecture::Mistral | Architecture::Gemma3, Some(window)) => {
            Some(window)
        }
    };
    let Some(window) = sliding else {
        return match architecture {
            Architecture::Gemma3 => {
                Err(ModelError::KeyMissing { key: "sliding_window".to_owned() })
            }
            _ if asks_to_slide(config) => {
                Err(ModelError::KeyMissing { key: "sliding_window".to_owned() })
            }
            _ => Ok(vec![LayerAttention::Global; layers]),
        };
    };
    let window = u32::try_from(window).map_err(|_| ModelError::TooLarge)?;
    if let Some(types) = config.get("layer_types").and_then(Json::as_array) {
        return layer_types(types, layers, window, keys);
    }
    let pattern = keys.count_opt("sliding_window_pattern", MOST_LAYERS)?.unwrap_or(GEMMA_PATTERN);
    // Qwen's first layers are global; where it does not say how many, all are.
    let first = match keys.has("max_window_layers") {
        true => keys.count_opt("max_window_layers", MOST_LAYERS)?.unwrap_or(layers),
        false => 0,
    };
    let slides = |layer: usize| match architecture {
        Architecture::Gemma3 => !(layer + 1).is_multiple_of(pattern),
        Architecture::Qwen2 | Architecture::Qwen3 => layer >= first,
        Architecture::Llama | Architecture::Mistral => true,
    };
    Ok((0..layers).map(|layer| LayerAttention::of(slides(layer), window)).collect())
}

fn asks_to_slide(config: &Json) -> bool {
    let types = config.get("layer_types").and_then(Json::as_array);
    types.is_some_and(|types| types.iter().any(|kind| kind.as_str() == Some("sliding_attention")))
}

fn layer_types(
    types: &[Json],
    layers: usize,
    window: u32,
    keys: &Keys<'_>,
) -> Result<Vec<LayerAttention>, ModelError> {
    if types.len() != layers {
        return Err(keys.wrong("layer_types", format!("{layers} entries"), types.len()));
    }
    let layer = |kind: &Json| match kind.as_str() {
        Some("full_attention") => Ok(LayerAttention::Global),
        Some("sliding_attention") => Ok(LayerAttention::Sliding { window }),
        _ => Err(keys.wrong("layer_types", "full_attention or sliding_attention".to_owned(), kind)),
    };
    types.iter().map(layer).collect()
}

fn gguf_head_dim(keys: &Keys<'_>, hidden: usize, heads: usize) -> Result<usize, ModelError> {
    let head_dim = match keys.count_opt("attention.key_length", MOST_HEAD_DIM)? {
        Some(head_dim) => head_dim,
        None => divide(keys, "attention.head_count", hidden, heads)?,
    };
    check_even(keys, "attention.key_length", head_dim)?;
    for key in ["attention.value_length", "rope.dimension_count"] {
        match keys.count_opt(key, MOST_HEAD_DIM)? {
            Some(other) if other != head_dim => {
                return Err(keys.wrong(key, head_dim.to_string(), other));
            }
            Some(_) | None => {}
        }
    }
    Ok(head_dim)
}

fn gguf_vocab(gguf: &Gguf) -> Result<usize, ModelError> {
    let name = "token_embd.weight";
    let missing = || ModelError::TensorMissing { name: name.to_owned() };
    let embed = gguf.tensors.get(name).ok_or_else(missing)?;
    match embed.shape.first() {
        Some(vocab) if (1..=MOST_VOCAB).contains(vocab) => Ok(*vocab),
        _ => Err(ModelError::TensorShape {
            name: name.to_owned(),
            wanted: vec![MOST_VOCAB],
            got: embed.shape.clone(),
        }),
    }
}

fn gguf_rope(keys: &Keys<'_>) -> Result<Rope, ModelError> {
    let scaling = match keys.word_opt("rope.scaling.type")?.as_deref() {
        // Older files carry a factor alone.
        None => match keys.positive_opt("rope.scale_linear")? {
            Some(factor) if factor != 1.0 => RopeScaling::Linear { factor },
            Some(_) | None => RopeScaling::None,
        },
        Some("none") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: keys.positive("rope.scaling.factor")? },
        Some(other) => {
            return Err(keys.wrong("rope.scaling.type", "none or linear".to_owned(), other));
        }
    };
    Ok(Rope { base: keys.positive_opt("rope.freq_base")?.unwrap_or(1e4), scaling })
}

fn gguf_attention(
    architecture: Architecture,
    layers: usize,
    keys: &Keys<'_>,
) -> Result<Vec<LayerAttention>, ModelError> {
    let key = "attention.sliding_window";
    let gemma = architecture == Architecture::Gemma3;
    let window = if gemma {
        Some(keys.count(key, MOST_POSITIONS)?)
    } else {
        keys.count_opt(key, MOST_POSITIONS)?
    };
    let Some(window) = window else { return Ok(vec![LayerAttention::Global; layers]) };
    let window = u32::try_from(window).map_err(|_| ModelError::TooLarge)?;
    let slides = |layer: usize| !gemma || !(layer + 1).is_multiple_of(GEMMA_PATTERN);
    Ok((0..layers).map(|layer| LayerAttention::of(slides(layer), window)).collect())
}

fn gguf_attention_scale(
    architecture: Architecture,
    layers: usize,
    head_dim: f32,
    share: f32,
) -> f32 {
    let whole_width = architecture == Architecture::Gemma3 && layers == GEMMA_27B_LAYERS;
    (if whole_width { share } else { head_dim }).sqrt().recip()
}

fn activation_of(architecture: Architecture) -> Activation {
    match architecture {
        Architecture::Gemma3 => Activation::GeluTanh,
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 | Architecture::Qwen3 => {
            Activation::Silu
        }
    }
}

fn embedding_scale(architecture: Architecture, hidden: usize) -> Option<f32> {
    (architecture == Architecture::Gemma3).then(|| as_f32(hidden).sqrt())
}

impl LayerAttention {
    fn of(slides: bool, window: u32) -> Self {
        if slides { Self::Sliding { window } } else { Self::Global }
    }

    /// The window, where there is one.
    pub fn window(self) -> Option<u32> {
        match self {
            Self::Global => None,
            Self::Sliding { window } => Some(window),
        }
    }
}

fn refuse_unless_zero(keys: &Keys<'_>, key: &str) -> Result<(), ModelError> {
    match keys.is_zero(key) {
        true => Ok(()),
        false => keys.refuse(key),
    }
}

fn check_divides(
    keys: &Keys<'_>,
    key: &str,
    heads: usize,
    kv_heads: usize,
) -> Result<(), ModelError> {
    match heads.is_multiple_of(kv_heads) {
        true => Ok(()),
        false => Err(keys.wrong(key, format!("a divisor of the {heads} heads"), kv_heads)),
    }
}

fn check_even(keys: &Keys<'_>, key: &str, head_dim: usize) -> Result<(), ModelError> {
    match head_dim.is_multiple_of(2) {
        true => Ok(()),
        false => Err(keys.wrong(key, "an even number".to_owned(), head_dim)),
    }
}

fn divide(keys: &Keys<'_>, key: &str, hidden: usize, heads: usize) -> Result<usize, ModelError> {
    match hidden.is_multiple_of(heads) {
        true => Ok(hidden / heads),
        false => Err(keys.wrong(key, format!("a divisor of the width {hidden}"), heads)),
    }
}

/// A size as a float. Sizes here are at most 2^24 and so exact.
fn as_f32(size: usize) -> f32 {
    size as f32
}

#[cfg(test)]
mod tests;
