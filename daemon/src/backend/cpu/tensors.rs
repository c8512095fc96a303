//! The operations that the forward pass is written in, on arrays in this machine's memory.
//! They see the step that was uploaded, never the batch's owners.

use kernels::cpu::{
    self as kernel, Activation, AttendSpan, Attention, KernelError, KvArena, Map, Matrix,
    Multiplier,
};
use rayon::prelude::*;

use crate::model::batch::{Batch, BlockCopy, Span};
use crate::model::config::{LayerAttention, ModelConfig};
use crate::model::rope::{Rope, rotations};
use crate::model::weights::Linear;

/// The KV arena and the step that is being computed.
#[derive(Debug)]
pub struct Tensors {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    epsilon: f32,
    attention_scale: f32,
    /// [layers]
    attention: Vec<LayerAttention>,
    arena: KvArena,
    multiplier: Multiplier,
    rotation: Rotation,
    /// For sliding layers, where theirs differs.
    sliding_rotation: Option<Rotation>,
    /// [tokens]
    tokens: Vec<u32>,
    /// [tokens]
    slots: Vec<u32>,
    spans: Vec<Span>,
    /// Block tables of the spans, one after the other.
    tables: Vec<u32>,
}

/// What the positions of the step turn by.
#[derive(Debug)]
struct Rotation {
    /// [head_dim / 2]
    frequencies: Vec<f32>,
    /// [tokens, head_dim / 2]
    cos: Vec<f32>,
    /// [tokens, head_dim / 2]
    sin: Vec<f32>,
}

impl Tensors {
    /// Operations for steps of at most `max_tokens` tokens.
    pub(super) fn new(config: &ModelConfig, arena: KvArena, max_tokens: usize) -> Self {
        let rotation = |rope: &Rope| Rotation::new(rope, config.head_dim, max_tokens);
        Self {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            epsilon: config.rms_epsilon,
            attention_scale: config.attention_scale,
            attention: config.attention.clone(),
            arena,
            multiplier: Multiplier::default(),
            rotation: rotation(&config.rope),
            sliding_rotation: config.sliding_rope.as_ref().map(rotation),
            tokens: Vec::with_capacity(max_tokens),
            slots: Vec::with_capacity(max_tokens),
            spans: Vec::new(),
            tables: Vec::new(),
        }
    }

    /// Takes over the step's arrays. `tokens` are the batch's inputs, all known.
    pub(super) fn upload(&mut self, batch: &Batch, tokens: impl Iterator<Item = u32>) {
        self.tokens.clear();
        self.tokens.extend(tokens);
        self.slots.clone_from(&batch.slots);
        self.spans.clone_from(&batch.spans);
        self.tables.clear();
        self.tables.extend(batch.tables.iter().map(|block| block.0));
        self.rotation.turn_to(&batch.positions);
        if let Some(rotation) = &mut self.sliding_rotation {
            rotation.turn_to(&batch.positions);
        }
    }

    /// `out` [tokens, hidden] = the rows of `table` that the step's tokens name, times `scale`.
    ///
    /// # Errors
    /// When a token has no row.
    pub fn embed(
        &self,
        table: &Matrix,
        scale: Option<f32>,
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        let rows = out.par_chunks_exact_mut(table.cols());
        rows.zip(&self.tokens)
            .try_for_each(|(row, token)| table.dequantize_row(*token as usize, row))?;
        if let Some(scale) = scale {
            kernel::scale(out, scale);
        }
        Ok(())
    }

    /// `out` = each row of `x`, of `weight`'s length, divided by its root mean square, times `weight`.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], out: &mut [f32]) {
        kernel::rms_norm(x, weight, self.epsilon, out);
    }

    /// Each output [tokens, rows] = `x` [tokens, cols] mapped. Maps of one input are one round of the threads.
    ///
    /// # Errors
    /// When the lengths do not fit the matrices.
    pub fn linear<const N: usize>(
        &mut self,
        x: &[f32],
        mut maps: [(&Linear, &mut [f32]); N],
    ) -> Result<(), KernelError> {
        let products = maps.each_mut().map(|(map, out)| Map { matrix: &map.matrix, out });
        self.multiplier.multiply(x, products)?;
        for (map, out) in maps {
            if let Some(bias) = &map.bias {
                kernel::add_rows(out, bias);
            }
        }
        Ok(())
    }

    /// Turns `query` [tokens, heads, head_dim] and `key` [tokens, kv_heads, head_dim] by their positions,
    /// and stores `key` and `value` in the step's slots.
    ///
    /// # Errors
    /// When a slot is outside the arena.
    pub fn rope_and_store(
        &mut self,
        layer: usize,
        query: &mut [f32],
        key: &mut [f32],
        value: &[f32],
    ) -> Result<(), KernelError> {
        let rotation = match (self.attention[layer], &self.sliding_rotation) {
            (LayerAttention::Sliding { .. }, Some(rotation)) => rotation,
            (LayerAttention::Sliding { .. } | LayerAttention::Global, _) => &self.rotation,
        };
        kernel::rope(query, self.heads, self.head_dim, &rotation.cos, &rotation.sin);
        kernel::rope(key, self.kv_heads, self.head_dim, &rotation.cos, &rotation.sin);
        self.arena.store(index(layer), &self.slots, key, value)
    }

    /// `out` [tokens, heads, head_dim] = what `query` sees of its own and the stored positions before it.
    ///
    /// # Errors
    /// When a block is outside the arena.
    pub fn attend(&self, layer: usize, query: &[f32], out: &mut [f32]) -> Result<(), KernelError> {
        let shape = Attention {
            layer: index(layer),
            heads: index(self.heads),
            scale: self.attention_scale,
            window: self.attention[layer].window(),
            soft_cap: None,
        };
        let span = |span: &Span| AttendSpan {
            tokens: span.tokens.clone(),
            start: span.start,
            table: &self.tables[span.table.clone()],
        };
        let spans: Vec<_> = self.spans.iter().map(span).collect();
        self.arena.attend(&shape, &spans, query, out)
    }

    /// `gate` = activation(`gate`) * `up`, both [tokens, ffn].
    pub fn gate(&self, activation: Activation, gate: &mut [f32], up: &[f32]) {
        kernel::gate(activation, gate, up);
    }

    /// `x` += `y`.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        kernel::add(x, y);
    }

    /// `out` [rows, vocab] = scores of the step's tokens `rows`, from their normed rows of `hidden`.
    /// `normed` is room for [rows, hidden].
    ///
    /// # Errors
    /// When the lengths do not fit the matrix.
    pub fn logits(
        &mut self,
        head: &Head<'_>,
        rows: &[usize],
        normed: &mut [f32],
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        let width = head.matrix.cols();
        for (row, normed) in rows.iter().zip(normed.chunks_exact_mut(width)) {
            self.rms_norm(&head.hidden[row * width..][..width], head.norm, normed);
        }
        let out = &mut out[..rows.len() * head.matrix.rows()];
        let map = Map { matrix: head.matrix, out };
        self.multiplier.multiply(&normed[..rows.len() * width], [map])
    }

    /// Copies slots between blocks, in all layers.
    ///
    /// # Errors
    /// When a block is outside the arena.
    pub(super) fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<(), KernelError> {
        copies.iter().try_for_each(|copy| self.arena.copy_slots(copy.from.0, copy.to.0, copy.slots))
    }

    /// Writes every page of the arena.
    pub(super) fn touch(&mut self) {
        self.arena.touch();
    }

    /// The arena itself, for its shape.
    pub(super) fn arena(&self) -> &KvArena {
        &self.arena
    }
}

/// What logits are computed from.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// [vocab, hidden]
    pub matrix: &'a Matrix,
    /// [hidden]
    pub norm: &'a [f32],
    /// [tokens, hidden] the residual stream after the last layer.
    pub hidden: &'a [f32],
}

impl Rotation {
    fn new(rope: &Rope, head_dim: usize, max_tokens: usize) -> Self {
        let room = max_tokens * head_dim / 2;
        let frequencies = rope.frequencies(head_dim);
        Self { frequencies, cos: Vec::with_capacity(room), sin: Vec::with_capacity(room) }
    }

    fn turn_to(&mut self, positions: &[u32]) {
        let len = positions.len() * self.frequencies.len();
        self.cos.resize(len, 0.0);
        self.sin.resize(len, 0.0);
        rotations(positions, &self.frequencies, &mut self.cos, &mut self.sin);
    }
}

/// A layer's or head's index, of which a configuration has a few thousand at most.
fn index(value: usize) -> u32 {
    u32::try_from(value).expect("ModelConfig bounds layers and heads")
}
