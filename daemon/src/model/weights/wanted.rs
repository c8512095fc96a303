//! Which tensors a configuration wants: their names in each file layout, shapes and row orders.

use super::{LayerWeights, Linear, Weights};
use crate::model::config::{Architecture, HeadNorms, LayerNorms, ModelConfig, OutputHead};

/// How a file names its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    Safetensors,
    Gguf,
}

/// In which order a file holds the rows of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// The pairs that rotate together lie half a head apart.
    HalfSplit,
    /// The pairs that rotate together are neighbours: Q and K of a GGUF of architecture `llama`.
    Interleaved { head_dim: usize },
}

/// A tensor `[rows, cols]` that the model multiplies by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WantedMatrix {
    pub(crate) name: String,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) order: RowOrder,
}

/// What a vector is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VectorKind {
    Norm,
    /// A norm whose file holds the weight less 1.
    NormLessOne,
    Bias,
}

/// A tensor `[len]` of norm weights or biases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WantedVector {
    pub(crate) name: String,
    pub(crate) len: usize,
    pub(crate) kind: VectorKind,
    pub(crate) order: RowOrder,
}

impl RowOrder {
    /// The file's row that becomes row `row`.
    pub(crate) fn source(self, row: usize) -> usize {
        match self {
            Self::HalfSplit => row,
            Self::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + pair * 2 + half
            }
        }
    }
}

/// Every tensor of the model that `config` describes, as `layout` names them.
pub(crate) fn wanted(config: &ModelConfig, layout: Layout) -> Weights<WantedMatrix, WantedVector> {
    let names = Names { config, layout };
    let matrix = |name: &str| WantedMatrix {
        name: format!("{name}.weight"),
        rows: config.vocab,
        cols: config.hidden,
        order: RowOrder::HalfSplit,
    };
    let (embedding, norm, head) = match layout {
        Layout::Safetensors => ("model.embed_tokens", "model.norm", "lm_head"),
        Layout::Gguf => ("token_embd", "output_norm", "output"),
    };
    Weights {
        embedding: matrix(embedding),
        layers: (0..config.layers).map(|layer| names.layer(layer)).collect(),
        norm: names.norm(norm.to_owned(), config.hidden),
        head: match config.head {
            OutputHead::Tied => None,
            OutputHead::Own => Some(matrix(head)),
        },
    }
}

/// Names tensors of layers.
struct Names<'a> {
    config: &'a ModelConfig,
    layout: Layout,
}

impl Names<'_> {
    fn layer(&self, layer: usize) -> LayerWeights<WantedMatrix, WantedVector> {
        let ModelConfig { hidden, ffn, head_dim, biases, layer_norms, head_norms, .. } =
            *self.config;
        let (query, kv) = (self.config.query_width(), self.config.kv_width());
        let name = |hf: &str, gguf: &str| match self.layout {
            Layout::Safetensors => format!("model.layers.{layer}.{hf}"),
            Layout::Gguf => format!("blk.{layer}.{gguf}"),
        };
        let post = layer_norms == LayerNorms::PreAndPost;
        let per_head = head_norms == HeadNorms::QueryAndKey;
        let norm = |hf: &str, gguf: &str| self.norm(name(hf, gguf), hidden);
        let head_norm =
            |hf: &str, gguf: &str| per_head.then(|| self.norm(name(hf, gguf), head_dim));
        let linear = |name: String, shape: [usize; 2], bias: bool| self.linear(name, shape, bias);
        LayerWeights {
            attention_norm: norm("input_layernorm", "attn_norm"),
            query: self.rotated(name("self_attn.q_proj", "attn_q"), [query, hidden]),
            key: self.rotated(name("self_attn.k_proj", "attn_k"), [kv, hidden]),
            value: linear(name("self_attn.v_proj", "attn_v"), [kv, hidden], biases.qkv),
            query_norm: head_norm("self_attn.q_norm", "attn_q_norm"),
            key_norm: head_norm("self_attn.k_norm", "attn_k_norm"),
            output: linear(name("self_attn.o_proj", "attn_output"), [hidden, query], biases.output),
            post_attention_norm: post
                .then(|| norm("post_attention_layernorm", "post_attention_norm")),
            ffn_norm: match layer_norms {
                LayerNorms::Pre => norm("post_attention_layernorm", "ffn_norm"),
                LayerNorms::PreAndPost => norm("pre_feedforward_layernorm", "ffn_norm"),
            },
            gate: linear(name("mlp.gate_proj", "ffn_gate"), [ffn, hidden], biases.ffn),
            up: linear(name("mlp.up_proj", "ffn_up"), [ffn, hidden], biases.ffn),
            down: linear(name("mlp.down_proj", "ffn_down"), [hidden, ffn], biases.ffn),
            post_ffn_norm: post.then(|| norm("post_feedforward_layernorm", "post_ffw_norm")),
        }
    }

    fn norm(&self, name: String, len: usize) -> WantedVector {
        let kind = match (self.config.architecture, self.layout) {
            (Architecture::Gemma3, Layout::Safetensors) => VectorKind::NormLessOne,
            (Architecture::Gemma3, Layout::Gguf) => VectorKind::Norm,
            (
                Architecture::Llama
                | Architecture::Mistral
                | Architecture::Qwen2
                | Architecture::Qwen3,
                _,
            ) => VectorKind::Norm,
        };
        WantedVector { name: format!("{name}.weight"), len, kind, order: RowOrder::HalfSplit }
    }

    fn linear(
        &self,
        name: String,
        [rows, cols]: [usize; 2],
        bias: bool,
    ) -> Linear<WantedMatrix, WantedVector> {
        let order = RowOrder::HalfSplit;
        let bias = bias.then(|| WantedVector {
            name: format!("{name}.bias"),
            len: rows,
            kind: VectorKind::Bias,
            order,
        });
        Linear { matrix: WantedMatrix { name: format!("{name}.weight"), rows, cols, order }, bias }
    }

    /// A map whose output is rotated.
    fn rotated(&self, name: String, shape: [usize; 2]) -> Linear<WantedMatrix, WantedVector> {
        let order = match (self.config.architecture, self.layout) {
            (Architecture::Llama, Layout::Gguf) => {
                RowOrder::Interleaved { head_dim: self.config.head_dim }
            }
            _ => RowOrder::HalfSplit,
        };
        let mut linear = self.linear(name, shape, self.config.biases.qkv);
        linear.matrix.order = order;
        if let Some(bias) = &mut linear.bias {
            bias.order = order;
        }
        linear
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_come_back_half_split() {
        let order = RowOrder::Interleaved { head_dim: 6 };
        // Two heads of six rows: the file's neighbours 2j, 2j + 1 belong to j and j + 3.
        let rows: Vec<_> = (0..12).map(|row| order.source(row)).collect();
        assert_eq!(rows, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }
}
