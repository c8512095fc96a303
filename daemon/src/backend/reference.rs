//! The oracle: the same models in plain floats on candle, one sequence after the other.
//! It shares the reading of files with the CPU backend and nothing of the computation. Slow on purpose.

use candle_core::quantized::{GgmlDType, ggml_file::qtensor_from_ggml};
use candle_core::{D, DType, Device, Result, Tensor};
use kernels::cpu::{Activation, Dtype};

use super::cpu::{CpuOptions, Limits, check};
use super::{Backend, BackendError};
use crate::model::batch::{Batch, BlockCopy, Input, Output, Span};
use crate::model::config::{LayerAttention, ModelConfig};
use crate::model::rope::{Rope, RopeScaling};
use crate::model::weights::{
    LayerWeights, Linear, Reader, RowOrder, Source, StoredDtype, VectorKind, WantedMatrix,
    WantedVector, Weights,
};
use crate::model::{ModelError, Opened};
use crate::sampling::rows::{Rows, score};

/// A model in single precision. Depth 1.
#[derive(Debug)]
pub struct ReferenceBackend {
    config: ModelConfig,
    weights: Weights<Tensor, Tensor>,
    /// [layers] K and V of every slot.
    kv: Vec<LayerKv>,
    block_size: usize,
    rows: Rows,
    limits: Limits,
    launched: Option<Output>,
}

#[derive(Debug)]
struct LayerKv {
    /// [slots, kv_heads, head_dim]
    key: Vec<f32>,
    /// [slots, kv_heads, head_dim]
    value: Vec<f32>,
}

/// Where the tokens of a span stand.
struct Place {
    /// Position of each token.
    positions: Vec<u32>,
    /// Slot of each position from 0 to the last.
    slots: Vec<usize>,
}

impl ReferenceBackend {
    /// Dequantizes the whole model to single precision.
    ///
    /// # Errors
    /// Names the tensor at fault.
    pub fn new(opened: &Opened, options: &CpuOptions) -> std::result::Result<Self, ModelError> {
        let config = opened.config().clone();
        let slots = options.kv.blocks as usize * options.kv.block_size as usize;
        let zeroed = || vec![0.0; slots * config.kv_width()];
        Ok(Self {
            weights: opened.read(|source| Dequantizer { source })?,
            kv: (0..config.layers).map(|_| LayerKv { key: zeroed(), value: zeroed() }).collect(),
            block_size: options.kv.block_size as usize,
            rows: Rows::new(options.max_rows, config.vocab),
            limits: Limits {
                tokens: options.max_tokens,
                rows: options.max_rows,
                vocab: config.vocab,
                kv: options.kv,
            },
            config,
            launched: None,
        })
    }
}

impl Backend for ReferenceBackend {
    fn depth(&self) -> usize {
        1
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> std::result::Result<(), BackendError> {
        let width = self.config.kv_width();
        for copy in copies {
            let got = copy.from.0.max(copy.to.0);
            if got >= self.limits.kv.blocks || copy.slots as usize > self.block_size {
                let limit = self.limits.kv.blocks as usize;
                return Err(BackendError::OutOfRange {
                    what: "blocks of a copy",
                    limit,
                    got: got as usize,
                });
            }
            let [from, to] =
                [copy.from, copy.to].map(|block| block.0 as usize * self.block_size * width);
            for layer in &mut self.kv {
                layer.key.copy_within(from..from + copy.slots as usize * width, to);
                layer.value.copy_within(from..from + copy.slots as usize * width, to);
            }
        }
        Ok(())
    }

    fn launch(&mut self, batch: &Batch) -> std::result::Result<(), BackendError> {
        if self.launched.is_some() {
            return Err(BackendError::OutOfRange { what: "batches in flight", limit: 1, got: 2 });
        }
        check(batch, &self.limits)?;
        batch.rows.iter().for_each(|change| self.rows.apply(change));
        let device = |operation| {
            move |error: candle_core::Error| BackendError::Device {
                operation,
                reason: error.to_string(),
            }
        };
        let tokens = self.known(batch)?;
        let mut hidden = Vec::new();
        for span in &batch.spans {
            hidden
                .push(self.span(batch, span, &tokens).map_err(device("compute the forward pass"))?);
        }
        self.launched = Some(self.results(batch, &hidden).map_err(device("compute logits"))?);
        Ok(())
    }

    fn collect(&mut self, output: &mut Output) -> std::result::Result<(), BackendError> {
        *output = self.launched.take().ok_or(BackendError::NothingLaunched)?;
        Ok(())
    }
}

impl ReferenceBackend {
    fn known(&self, batch: &Batch) -> std::result::Result<Vec<u32>, BackendError> {
        let reason = "its row drew none".to_owned();
        let unknown = BackendError::Device { operation: "take a drawn token", reason };
        let known = batch.inputs.iter().map(|input| match input {
            Input::Known(token) => Some(token.0),
            Input::Drawn(row) => self.rows.last_token(*row).map(|token| token.0),
        });
        known.collect::<Option<_>>().ok_or(unknown)
    }

    /// The normed residual stream of a span, [tokens, hidden].
    /// Spans are computed one after the other, so tokens of one may not attend to those of a later one.
    fn span(&mut self, batch: &Batch, span: &Span, tokens: &[u32]) -> Result<Tensor> {
        let blocks = &batch.tables[span.table.clone()];
        let reach = span.start as usize + span.tokens.len();
        let slot = |position: usize| {
            blocks[position / self.block_size].0 as usize * self.block_size
                + position % self.block_size
        };
        let place = Place {
            positions: (span.start..).take(span.tokens.len()).collect(),
            slots: (0..reach).map(slot).collect(),
        };
        let tokens = Tensor::new(&tokens[span.tokens.clone()], &Device::Cpu)?;
        let mut x = self.weights.embedding.index_select(&tokens, 0)?;
        if let Some(scale) = self.config.embedding_scale {
            x = (x * f64::from(scale))?;
        }
        let Self { config, weights, kv, .. } = self;
        for (index, (layer, kv)) in weights.layers.iter().zip(kv).enumerate() {
            let attended = attention(
                config,
                index,
                layer,
                kv,
                &place,
                &norm(config, &x, &layer.attention_norm)?,
            )?;
            x = (x + post_norm(config, attended, layer.post_attention_norm.as_ref())?)?;
            let fed = feed_forward(config, layer, &norm(config, &x, &layer.ffn_norm)?)?;
            x = (x + post_norm(config, fed, layer.post_ffn_norm.as_ref())?)?;
        }
        norm(config, &x, &weights.norm)
    }

    fn results(&mut self, batch: &Batch, hidden: &[Tensor]) -> Result<Output> {
        let mut output = Output::default();
        for draw in &batch.draws {
            let logits = self.logits(batch, hidden, draw.token)?;
            output.drawn.push(self.rows.draw(draw, &logits));
        }
        for wanted in &batch.scores {
            let scored = wanted.tokens.clone().zip(&wanted.next).map(|(token, next)| {
                let logits = self.logits(batch, hidden, token)?;
                Ok(score(&logits, *next, wanted.count))
            });
            output.scores.push(scored.collect::<Result<_>>()?);
        }
        Ok(output)
    }

    fn logits(&self, batch: &Batch, hidden: &[Tensor], token: usize) -> Result<Vec<f32>> {
        let span = batch.spans.iter().zip(hidden).find(|(span, _)| span.tokens.contains(&token));
        let (span, hidden) =
            span.ok_or_else(|| candle_core::Error::Msg(format!("token {token} is in no span")))?;
        let row = hidden.narrow(0, token - span.tokens.start, 1)?;
        row.matmul(&self.weights.head().t()?)?.squeeze(0)?.to_vec1()
    }
}

fn attention(
    config: &ModelConfig,
    index: usize,
    layer: &LayerWeights<Tensor, Tensor>,
    kv: &mut LayerKv,
    place: &Place,
    x: &Tensor,
) -> Result<Tensor> {
    let ModelConfig { heads, kv_heads, head_dim, .. } = *config;
    let tokens = place.positions.len();
    let reach = place.slots.len();
    let mut query = linear(&layer.query, x)?.reshape((tokens, heads, head_dim))?;
    let mut key = linear(&layer.key, x)?.reshape((tokens, kv_heads, head_dim))?;
    let value = linear(&layer.value, x)?;
    if let (Some(query_norm), Some(key_norm)) = (&layer.query_norm, &layer.key_norm) {
        query = norm(config, &query, query_norm)?;
        key = norm(config, &key, key_norm)?;
    }
    let (query, key) = (rotate(config, index, place, &query)?, rotate(config, index, place, &key)?);
    kv.store(
        &place.slots[reach - tokens..],
        &key.flatten_all()?.to_vec1()?,
        &value.flatten_all()?.to_vec1()?,
    );
    let seen = |stored: &[f32]| -> Result<Tensor> {
        let width = kv_heads * head_dim;
        let rows: Vec<f32> =
            place.slots.iter().flat_map(|slot| &stored[slot * width..][..width]).copied().collect();
        let rows = Tensor::from_vec(rows, (reach, kv_heads, 1, head_dim), &Device::Cpu)?;
        let groups = rows.broadcast_as((reach, kv_heads, heads / kv_heads, head_dim))?;
        groups.reshape((reach, heads, head_dim))?.transpose(0, 1)?.contiguous()
    };
    let query = query.transpose(0, 1)?.contiguous()?;
    let scores = (query.matmul(&seen(&kv.key)?.t()?)? * f64::from(config.attention_scale))?;
    let scores = scores.broadcast_add(&mask(config.attention[index], place)?)?;
    let attended = softmax(&scores)?.matmul(&seen(&kv.value)?)?;
    linear(&layer.output, &attended.transpose(0, 1)?.reshape((tokens, heads * head_dim))?)
}

impl LayerKv {
    fn store(&mut self, slots: &[usize], key: &[f32], value: &[f32]) {
        let width = key.len() / slots.len().max(1);
        for (token, slot) in slots.iter().enumerate() {
            self.key[slot * width..][..width].copy_from_slice(&key[token * width..][..width]);
            self.value[slot * width..][..width].copy_from_slice(&value[token * width..][..width]);
        }
    }
}

fn feed_forward(
    config: &ModelConfig,
    layer: &LayerWeights<Tensor, Tensor>,
    x: &Tensor,
) -> Result<Tensor> {
    let gate = linear(&layer.gate, x)?;
    let gate = match config.activation {
        Activation::Silu => gate.silu()?,
        Activation::GeluTanh => gate.gelu()?,
    };
    linear(&layer.down, &(gate * linear(&layer.up, x)?)?)
}

fn linear(map: &Linear<Tensor, Tensor>, x: &Tensor) -> Result<Tensor> {
    let out = x.matmul(&map.matrix.t()?)?;
    match &map.bias {
        Some(bias) => out.broadcast_add(bias),
        None => Ok(out),
    }
}

fn norm(config: &ModelConfig, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let variance = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(config.rms_epsilon))?;
    x.broadcast_div(&variance.sqrt()?)?.broadcast_mul(weight)
}

fn post_norm(config: &ModelConfig, x: Tensor, weight: Option<&Tensor>) -> Result<Tensor> {
    match weight {
        Some(weight) => norm(config, &x, weight),
        None => Ok(x),
    }
}

fn softmax(scores: &Tensor) -> Result<Tensor> {
    let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

/// [1, tokens, positions]: 0 where the token sees the position, minus infinity elsewhere.
fn mask(attention: LayerAttention, place: &Place) -> Result<Tensor> {
    let hidden = |position: u32, other: u32| match attention {
        LayerAttention::Global => other > position,
        LayerAttention::Sliding { window } => other > position || other + window <= position,
    };
    let reach = place.slots.len();
    let others = || (0u32..).take(reach);
    let row = |position: &u32| {
        let position = *position;
        others()
            .map(move |other| if hidden(position, other) { f32::NEG_INFINITY } else { 0.0 })
            .collect::<Vec<_>>()
    };
    let mask: Vec<f32> = place.positions.iter().flat_map(row).collect();
    Tensor::from_vec(mask, (1, place.positions.len(), reach), &Device::Cpu)
}

/// x * cos + (-x2, x1) * sin, for `x` [tokens, heads, head_dim].
fn rotate(config: &ModelConfig, layer: usize, place: &Place, x: &Tensor) -> Result<Tensor> {
    let rope = match (config.attention[layer], &config.sliding_rope) {
        (LayerAttention::Sliding { .. }, Some(rope)) => rope,
        _ => &config.rope,
    };
    let half = config.head_dim / 2;
    let frequencies =
        Tensor::from_vec(inverse_frequencies(rope, config.head_dim), (1, half), &Device::Cpu)?;
    let positions: Vec<f32> = place.positions.iter().map(|position| *position as f32).collect();
    let angles = Tensor::from_vec(positions, (place.positions.len(), 1), &Device::Cpu)?
        .matmul(&frequencies)?;
    let angles = Tensor::cat(&[&angles, &angles], 1)?.unsqueeze(1)?;
    let turned = Tensor::cat(&[&x.narrow(2, half, half)?.neg()?, &x.narrow(2, 0, half)?], 2)?;
    x.broadcast_mul(&angles.cos()?)? + turned.broadcast_mul(&angles.sin()?)?
}

/// [head_dim / 2], by wavelengths as in the Llama 3.1 reference.
fn inverse_frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    let plain =
        (0..head_dim).step_by(2).map(|dim| 1.0 / rope.base.powf(dim as f32 / head_dim as f32));
    match &rope.scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
        RopeScaling::Factors(factors) => {
            plain.zip(factors).map(|(frequency, factor)| frequency / factor).collect()
        }
        RopeScaling::Llama3 { factor, low_frequency, high_frequency, original_context } => plain
            .map(|frequency| {
                let wavelength = std::f32::consts::TAU / frequency;
                if wavelength < original_context / high_frequency {
                    frequency
                } else if wavelength > original_context / low_frequency {
                    frequency / factor
                } else {
                    let smooth = (original_context / wavelength - low_frequency)
                        / (high_frequency - low_frequency);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            })
            .collect(),
    }
}

/// Reads tensors into single precision through candle's own dequantization.
struct Dequantizer<'a> {
    source: &'a Source,
}

impl Dequantizer<'_> {
    fn read(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let Source::Files(catalogue) = self.source else {
            return Err(candle_core::Error::Msg("a made-up model has no files".to_owned()));
        };
        let missing = || candle_core::Error::Msg(format!("tensor {name} is missing"));
        let stored = catalogue.tensors.get(name).ok_or_else(missing)?;
        let bytes = catalogue.bytes(stored);
        let StoredDtype::Known(dtype) = &stored.dtype else { return Err(missing()) };
        match float_dtype(*dtype) {
            Some(dtype) => {
                Tensor::from_raw_buffer(bytes, dtype, shape, &Device::Cpu)?.to_dtype(DType::F32)
            }
            None => {
                let quantized =
                    qtensor_from_ggml(ggml_dtype(*dtype), bytes, shape.to_vec(), &Device::Cpu)?;
                quantized.dequantize(&Device::Cpu)
            }
        }
    }
}

impl Reader for Dequantizer<'_> {
    type Matrix = Tensor;
    type Vector = Tensor;

    fn matrix(&mut self, wanted: &WantedMatrix) -> std::result::Result<Tensor, ModelError> {
        let WantedMatrix { name, rows, cols, order } = wanted;
        let shape = [*rows, *cols];
        let made_up = match self.source {
            Source::Files(_) => None,
            Source::Dummy(dummy) => Some(dummy.matrix(wanted)?),
        };
        let read = || match &made_up {
            None => ordered(self.read(name, &shape)?, *order),
            Some(bytes) => Tensor::from_raw_buffer(bytes, DType::BF16, &shape, &Device::Cpu)?
                .to_dtype(DType::F32),
        };
        read().map_err(|source| ModelError::Candle { name: name.clone(), source })
    }

    fn vector(&mut self, wanted: &WantedVector) -> std::result::Result<Tensor, ModelError> {
        let WantedVector { name, len, kind, order } = wanted;
        let read = || {
            let vector = match self.source {
                Source::Files(_) => ordered(self.read(name, &[*len])?, *order)?,
                Source::Dummy(dummy) => Tensor::new(dummy.vector(wanted), &Device::Cpu)?,
            };
            match kind {
                VectorKind::NormLessOne => vector + 1.0,
                VectorKind::Norm | VectorKind::Bias => Ok(vector),
            }
        };
        read().map_err(|source| ModelError::Candle { name: name.clone(), source })
    }
}

/// Rows of neighbouring pairs, brought half a head apart.
fn ordered(tensor: Tensor, order: RowOrder) -> Result<Tensor> {
    let RowOrder::Interleaved { head_dim } = order else { return Ok(tensor) };
    let shape = tensor.dims().to_vec();
    let rows = shape[0];
    let pairs = tensor.reshape((rows / head_dim, head_dim / 2, 2, tensor.elem_count() / rows))?;
    pairs.transpose(1, 2)?.contiguous()?.reshape(shape)
}

fn float_dtype(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        Dtype::Q8_0
        | Dtype::Q4_0
        | Dtype::Q4_1
        | Dtype::Q5_0
        | Dtype::Q5_1
        | Dtype::Q4K
        | Dtype::Q5K
        | Dtype::Q6K => None,
    }
}

fn ggml_dtype(dtype: Dtype) -> GgmlDType {
    match dtype {
        Dtype::F32 => GgmlDType::F32,
        Dtype::F16 => GgmlDType::F16,
        Dtype::BF16 => GgmlDType::BF16,
        Dtype::Q8_0 => GgmlDType::Q8_0,
        Dtype::Q4_0 => GgmlDType::Q4_0,
        Dtype::Q4_1 => GgmlDType::Q4_1,
        Dtype::Q5_0 => GgmlDType::Q5_0,
        Dtype::Q5_1 => GgmlDType::Q5_1,
        Dtype::Q4K => GgmlDType::Q4K,
        Dtype::Q5K => GgmlDType::Q5K,
        Dtype::Q6K => GgmlDType::Q6K,
    }
}

#[cfg(test)]
mod tests;
