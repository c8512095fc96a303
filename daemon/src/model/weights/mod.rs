//! Where a model's numbers come from: file formats, read without trust, and the weights they become.

mod dummy;
pub mod gguf;
mod packed;
mod stored;
mod wanted;

use kernels::cpu::Matrix;

use super::error::ModelError;

pub(crate) use dummy::Dummy;
pub(crate) use packed::{Check, Packer, Source, floats};
pub(crate) use stored::{Catalogue, Stored, StoredDtype, map, safetensors};
pub(crate) use wanted::{Layout, RowOrder, VectorKind, WantedMatrix, WantedVector, wanted};

/// One linear map: `[rows, cols]` and, in some models, a bias `[rows]`.
#[derive(Debug)]
pub struct Linear<M = Matrix, V = Vec<f32>> {
    pub matrix: M,
    pub bias: Option<V>,
}

/// The weights of one layer. `M` and `V` are a matrix and a vector: packed ones, or what is wanted of a file.
#[derive(Debug)]
pub struct LayerWeights<M = Matrix, V = Vec<f32>> {
    pub attention_norm: V,
    pub query: Linear<M, V>,
    pub key: Linear<M, V>,
    pub value: Linear<M, V>,
    /// `[head_dim]`, for each head of Q.
    pub query_norm: Option<V>,
    /// `[head_dim]`, for each head of K.
    pub key_norm: Option<V>,
    pub output: Linear<M, V>,
    pub post_attention_norm: Option<V>,
    pub ffn_norm: V,
    pub gate: Linear<M, V>,
    pub up: Linear<M, V>,
    pub down: Linear<M, V>,
    pub post_ffn_norm: Option<V>,
}

/// The weights of a whole model.
#[derive(Debug)]
pub struct Weights<M = Matrix, V = Vec<f32>> {
    /// `[vocab, hidden]`
    pub embedding: M,
    pub layers: Vec<LayerWeights<M, V>>,
    pub norm: V,
    /// `[vocab, hidden]`; where it is absent the embedding serves.
    pub head: Option<M>,
}

/// Turns what is wanted into what it becomes: a check, a packed matrix, a candle tensor.
pub(crate) trait Reader {
    type Matrix;
    type Vector;
    /// # Errors
    /// Names the tensor at fault.
    fn matrix(&mut self, wanted: &WantedMatrix) -> Result<Self::Matrix, ModelError>;
    /// # Errors
    /// Names the tensor at fault.
    fn vector(&mut self, wanted: &WantedVector) -> Result<Self::Vector, ModelError>;
}

impl<M, V> Weights<M, V> {
    /// The matrix that scores are computed from.
    pub fn head(&self) -> &M {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

impl Weights<WantedMatrix, WantedVector> {
    /// Reads every tensor, one after the other.
    pub(crate) fn read<R: Reader>(
        &self,
        reader: &mut R,
    ) -> Result<Weights<R::Matrix, R::Vector>, ModelError> {
        Ok(Weights {
            embedding: reader.matrix(&self.embedding)?,
            layers: self.layers.iter().map(|layer| layer.read(reader)).collect::<Result<_, _>>()?,
            norm: reader.vector(&self.norm)?,
            head: self.head.as_ref().map(|head| reader.matrix(head)).transpose()?,
        })
    }
}

impl LayerWeights<WantedMatrix, WantedVector> {
    fn read<R: Reader>(
        &self,
        reader: &mut R,
    ) -> Result<LayerWeights<R::Matrix, R::Vector>, ModelError> {
        let optional = |norm: &Option<WantedVector>, reader: &mut R| {
            norm.as_ref().map(|norm| reader.vector(norm)).transpose()
        };
        Ok(LayerWeights {
            attention_norm: reader.vector(&self.attention_norm)?,
            query: self.query.read(reader)?,
            key: self.key.read(reader)?,
            value: self.value.read(reader)?,
            query_norm: optional(&self.query_norm, reader)?,
            key_norm: optional(&self.key_norm, reader)?,
            output: self.output.read(reader)?,
            post_attention_norm: optional(&self.post_attention_norm, reader)?,
            ffn_norm: reader.vector(&self.ffn_norm)?,
            gate: self.gate.read(reader)?,
            up: self.up.read(reader)?,
            down: self.down.read(reader)?,
            post_ffn_norm: optional(&self.post_ffn_norm, reader)?,
        })
    }
}

impl Linear<WantedMatrix, WantedVector> {
    fn read<R: Reader>(&self, reader: &mut R) -> Result<Linear<R::Matrix, R::Vector>, ModelError> {
        Ok(Linear {
            matrix: reader.matrix(&self.matrix)?,
            bias: self.bias.as_ref().map(|bias| reader.vector(bias)).transpose()?,
        })
    }
}
