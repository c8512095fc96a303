//! The forward pass, as the papers write it: embedding, layers of attention and feed-forward, each added to the
//! residual stream. The arrays and the operations on them belong to the backend.

use kernels::cpu::KernelError;

use super::config::ModelConfig;
use super::weights::{LayerWeights, Weights};
use crate::backend::cpu::Tensors;

/// The arrays of one step. All are row-major, one row a token.
#[derive(Debug)]
pub struct Activations<'a> {
    /// [tokens, hidden] the residual stream.
    pub hidden: &'a mut [f32],
    /// [tokens, hidden]
    pub normed: &'a mut [f32],
    /// [tokens, hidden] what attention or feed-forward will add.
    pub projected: &'a mut [f32],
    /// [tokens, heads, head_dim]
    pub query: &'a mut [f32],
    /// [tokens, heads, head_dim]
    pub attended: &'a mut [f32],
    /// [tokens, kv_heads, head_dim]
    pub key: &'a mut [f32],
    /// [tokens, kv_heads, head_dim]
    pub key_normed: &'a mut [f32],
    /// [tokens, kv_heads, head_dim]
    pub value: &'a mut [f32],
    /// [tokens, ffn]
    pub gate: &'a mut [f32],
    /// [tokens, ffn]
    pub up: &'a mut [f32],
}

/// Computes `hidden` for the step that was uploaded to `tensors`, and stores its K and V.
///
/// # Errors
/// When an array's length does not fit the model's shape.
pub fn forward(
    tensors: &mut Tensors,
    config: &ModelConfig,
    weights: &Weights,
    x: &mut Activations<'_>,
) -> Result<(), KernelError> {
    tensors.embed(&weights.embedding, config.embedding_scale, x.hidden)?;
    for (layer, weights) in weights.layers.iter().enumerate() {
        tensors.rms_norm(x.hidden, &weights.attention_norm, x.normed);
        attention(tensors, layer, weights, x)?;
        add_normed(tensors, weights.post_attention_norm.as_deref(), x);
        tensors.rms_norm(x.hidden, &weights.ffn_norm, x.normed);
        feed_forward(tensors, config, weights, x)?;
        add_normed(tensors, weights.post_ffn_norm.as_deref(), x);
    }
    Ok(())
}

/// `projected` = what the tokens see of the positions before them, from `normed`.
/// K and V of the whole batch are stored before any of it is attended to.
fn attention(
    tensors: &mut Tensors,
    layer: usize,
    weights: &LayerWeights,
    x: &mut Activations<'_>,
) -> Result<(), KernelError> {
    let maps = [
        (&weights.query, &mut *x.query),
        (&weights.key, &mut *x.key),
        (&weights.value, &mut *x.value),
    ];
    tensors.linear(x.normed, maps)?;
    if let Some(norm) = &weights.query_norm {
        tensors.rms_norm(x.query, norm, x.attended);
        std::mem::swap(&mut x.query, &mut x.attended);
    }
    if let Some(norm) = &weights.key_norm {
        tensors.rms_norm(x.key, norm, x.key_normed);
        std::mem::swap(&mut x.key, &mut x.key_normed);
    }
    tensors.rope_and_store(layer, x.query, x.key, x.value)?;
    tensors.attend(layer, x.query, x.attended)?;
    tensors.linear(x.attended, [(&weights.output, &mut *x.projected)])
}

/// `projected` = down(activation(gate(normed)) * up(normed)).
fn feed_forward(
    tensors: &mut Tensors,
    config: &ModelConfig,
    weights: &LayerWeights,
    x: &mut Activations<'_>,
) -> Result<(), KernelError> {
    tensors.linear(x.normed, [(&weights.gate, &mut *x.gate), (&weights.up, &mut *x.up)])?;
    tensors.gate(config.activation, x.gate, x.up);
    tensors.linear(x.gate, [(&weights.down, &mut *x.projected)])
}

/// Adds `projected` to the residual stream, through a norm where the model has one there.
fn add_normed(tensors: &Tensors, norm: Option<&[f32]>, x: &mut Activations<'_>) {
    match norm {
        Some(norm) => {
            tensors.rms_norm(x.projected, norm, x.normed);
            tensors.add(x.hidden, x.normed);
        }
        None => tensors.add(x.hidden, x.projected),
    }
}
