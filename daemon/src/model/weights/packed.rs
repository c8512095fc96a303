//! Tensors of a file or made-up ones become packed matrices, one after the other, so that each is resident once.

use std::borrow::Cow;
use std::collections::BTreeSet;

use half::{bf16, f16};
use kernels::cpu::{Dtype, Matrix, Memory};
use rayon::prelude::*;

use super::dummy::zeroed;
use super::{Catalogue, Dummy, Reader, Stored, StoredDtype, WantedMatrix, WantedVector};
use crate::model::error::ModelError;
use crate::model::weights::VectorKind;

/// Where the numbers come from.
#[derive(Debug)]
pub(crate) enum Source {
    Files(Catalogue),
    Dummy(Dummy),
}

/// Packs tensors, and gives back the pages that each was read from.
pub(crate) struct Packer<'a> {
    pub(crate) source: &'a Source,
    /// The dtype that unquantized matrices of safetensors are packed in; `None` keeps the file's.
    pub(crate) dtype: Option<Dtype>,
    pub(crate) memory: Memory,
    pub(crate) progress: &'a mut dyn FnMut(u64, u64),
    pub(crate) packed_bytes: u64,
    pub(crate) all_bytes: u64,
}

/// Checks tensors and sums the bytes that they will take, without reading them.
pub(crate) struct Check<'a> {
    source: &'a Source,
    dtype: Option<Dtype>,
    bytes: usize,
    checked: BTreeSet<String>,
}

impl<'a> Check<'a> {
    pub(crate) fn new(source: &'a Source, dtype: Option<Dtype>) -> Self {
        Self { source, dtype, bytes: 0, checked: BTreeSet::new() }
    }

    /// The bytes of all tensors as packed.
    ///
    /// # Errors
    /// Names a tensor that a layer of the file has and the model does not: its numbers would be ignored.
    pub(crate) fn finish(self) -> Result<usize, ModelError> {
        let Source::Files(catalogue) = self.source else { return Ok(self.bytes) };
        let in_layer = |name: &str| name.starts_with("model.layers.") || name.starts_with("blk.");
        // Older files carry the frequencies, which follow from the configuration.
        let unknown = |name: &&String| {
            in_layer(name)
                && !name.ends_with(".rotary_emb.inv_freq")
                && !self.checked.contains(*name)
        };
        match catalogue.tensors.keys().find(unknown) {
            Some(name) => Err(ModelError::TensorUnknown { name: name.clone() }),
            None => Ok(self.bytes),
        }
    }

    fn count(&mut self, name: &str, bytes: Option<usize>) -> Result<(), ModelError> {
        self.checked.insert(name.to_owned());
        self.bytes =
            bytes.and_then(|bytes| self.bytes.checked_add(bytes)).ok_or(ModelError::TooLarge)?;
        Ok(())
    }
}

impl Source {
    /// The tensor, if it has the shape that is wanted, and its dtype.
    fn find(&self, name: &str, shape: &[usize]) -> Result<(Option<&Stored>, Dtype), ModelError> {
        let catalogue = match self {
            Self::Dummy(_) => return Ok((None, Dtype::BF16)),
            Self::Files(catalogue) => catalogue,
        };
        let missing = || ModelError::TensorMissing { name: name.to_owned() };
        let stored = catalogue.tensors.get(name).ok_or_else(missing)?;
        if stored.shape != shape {
            return Err(ModelError::TensorShape {
                name: name.to_owned(),
                wanted: shape.to_vec(),
                got: stored.shape.clone(),
            });
        }
        match &stored.dtype {
            StoredDtype::Known(dtype) => Ok((Some(stored), *dtype)),
            StoredDtype::Unknown(got) => Err(ModelError::TensorDtype {
                name: name.to_owned(),
                wanted: "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K",
                got: got.clone(),
            }),
        }
    }
}

impl Reader for Check<'_> {
    type Matrix = ();
    type Vector = ();

    fn matrix(&mut self, wanted: &WantedMatrix) -> Result<(), ModelError> {
        let WantedMatrix { name, rows, cols, .. } = wanted;
        let (stored, dtype) = self.source.find(name, &[*rows, *cols])?;
        check_bytes(name, stored, dtype.bytes_for(*rows, *cols))?;
        let packed = Matrix::bytes_for(packed_dtype(dtype, self.dtype), *rows, *cols);
        self.count(name, packed)
    }

    fn vector(&mut self, wanted: &WantedVector) -> Result<(), ModelError> {
        let WantedVector { name, len, .. } = wanted;
        let (stored, dtype) = self.source.find(name, &[*len])?;
        if !is_float(dtype) {
            return Err(ModelError::TensorDtype {
                name: name.clone(),
                wanted: "F32, F16 or BF16",
                got: dtype.name().to_owned(),
            });
        }
        check_bytes(name, stored, dtype.bytes_for(1, *len))?;
        let packed = Dtype::F32.bytes_for(1, *len);
        self.count(name, packed)
    }
}

impl Reader for Packer<'_> {
    type Matrix = Matrix;
    type Vector = Vec<f32>;

    fn matrix(&mut self, wanted: &WantedMatrix) -> Result<Matrix, ModelError> {
        let WantedMatrix { name, rows, cols, order } = wanted;
        let (stored, from) = self.source.find(name, &[*rows, *cols])?;
        let to = packed_dtype(from, self.dtype);
        let bytes = match (self.source, stored) {
            (Source::Files(catalogue), Some(stored)) => Cow::Borrowed(catalogue.bytes(stored)),
            (Source::Dummy(dummy), _) => Cow::Owned(dummy.matrix(wanted)?),
            (Source::Files(_), None) => {
                return Err(ModelError::TensorMissing { name: name.clone() });
            }
        };
        let bytes = if from == to { bytes } else { Cow::Owned(converted(name, &bytes, from, to)?) };
        let source = |row| order.source(row);
        let matrix = Matrix::pack(&mut self.memory, to, *rows, *cols, &bytes, &source)
            .map_err(|source| ModelError::Kernel { name: name.clone(), source })?;
        self.finish(stored, matrix.bytes());
        Ok(matrix)
    }

    fn vector(&mut self, wanted: &WantedVector) -> Result<Vec<f32>, ModelError> {
        let WantedVector { name, len, kind, order } = wanted;
        let (stored, dtype) = self.source.find(name, &[*len])?;
        let numbers = match (self.source, stored) {
            (Source::Files(catalogue), Some(stored)) => floats(catalogue.bytes(stored), dtype),
            (Source::Dummy(dummy), _) => dummy.vector(wanted),
            (Source::Files(_), None) => {
                return Err(ModelError::TensorMissing { name: name.clone() });
            }
        };
        let more = match kind {
            VectorKind::NormLessOne => 1.0,
            VectorKind::Norm | VectorKind::Bias => 0.0,
        };
        let vector: Vec<f32> = (0..*len).map(|index| numbers[order.source(index)] + more).collect();
        self.finish(stored, vector.len() * 4);
        Ok(vector)
    }
}

impl Packer<'_> {
    fn finish(&mut self, stored: Option<&Stored>, bytes: usize) {
        if let (Source::Files(catalogue), Some(stored)) = (self.source, stored) {
            catalogue.release(stored);
        }
        self.packed_bytes = self.packed_bytes.saturating_add(bytes as u64).min(self.all_bytes);
        (self.progress)(self.packed_bytes, self.all_bytes);
    }
}

/// The dtype that a matrix is packed in.
fn packed_dtype(from: Dtype, wanted: Option<Dtype>) -> Dtype {
    match wanted {
        Some(to) if is_float(from) => to,
        Some(_) | None => from,
    }
}

/// Whether the dtype is written number by number.
pub(crate) fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

fn check_bytes(
    name: &str,
    stored: Option<&Stored>,
    wanted: Option<usize>,
) -> Result<(), ModelError> {
    let wanted = wanted.ok_or(ModelError::TooLarge)?;
    match stored {
        Some(stored) if stored.range.len() != wanted => {
            Err(ModelError::TensorBytes { name: name.to_owned(), wanted, got: stored.range.len() })
        }
        Some(_) | None => Ok(()),
    }
}

/// Little-endian numbers as singles; empty for a quantized dtype.
pub(crate) fn floats(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let halves = |number: fn([u8; 2]) -> f32| {
        bytes.as_chunks().0.iter().map(|bytes| number(*bytes)).collect()
    };
    match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        Dtype::F16 => halves(|bytes| f16::from_le_bytes(bytes).to_f32()),
        Dtype::BF16 => halves(|bytes| bf16::from_le_bytes(bytes).to_f32()),
        Dtype::Q8_0
        | Dtype::Q4_0
        | Dtype::Q4_1
        | Dtype::Q5_0
        | Dtype::Q5_1
        | Dtype::Q4K
        | Dtype::Q5K
        | Dtype::Q6K => Vec::new(),
    }
}

/// Numbers in another unquantized dtype, rounded to the nearest.
fn converted(name: &str, bytes: &[u8], from: Dtype, to: Dtype) -> Result<Vec<u8>, ModelError> {
    const NUMBERS: usize = 1 << 16;
    let (from_bytes, to_bytes) = (from.block_bytes(), to.block_bytes());
    let mut out = zeroed(name, bytes.len() / from_bytes * to_bytes)?;
    let chunks = out.par_chunks_mut(NUMBERS * to_bytes).zip(bytes.par_chunks(NUMBERS * from_bytes));
    chunks.for_each(|(out, bytes)| {
        for (out, number) in out.chunks_exact_mut(to_bytes).zip(floats(bytes, from)) {
            match to {
                Dtype::F16 => out.copy_from_slice(&f16::from_f32(number).to_le_bytes()),
                Dtype::BF16 => out.copy_from_slice(&bf16::from_f32(number).to_le_bytes()),
                _ => out.copy_from_slice(&number.to_le_bytes()),
            }
        }
    });
    Ok(out)
}
