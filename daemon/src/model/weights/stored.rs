//! The tensors that files hold: names, shapes, dtypes and byte ranges, read from headers alone and checked
//! against the files' lengths. No tensor's bytes are touched here.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use kernels::cpu::Dtype;
use kernels::mapping::Mapping;
use safetensors::tensor::TensorInfo;
use safetensors::{SafeTensorError, SafeTensors};

use super::gguf::{GgmlType, Gguf};
use crate::model::error::ModelError;

/// How a tensor's numbers are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StoredDtype {
    Known(Dtype),
    /// Named for the error message; an error only where the model wants the tensor.
    Unknown(String),
}

/// One tensor of a file.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    /// Outermost first.
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: StoredDtype,
    /// Which of [`Catalogue::files`].
    pub(crate) file: usize,
    /// Its bytes there; lies inside the file.
    pub(crate) range: Range<usize>,
}

/// The files of a model, mapped, and the tensors in them.
#[derive(Debug)]
pub(crate) struct Catalogue {
    pub(crate) files: Vec<Mapping>,
    pub(crate) tensors: BTreeMap<String, Stored>,
}

impl Catalogue {
    /// Lists the tensors of a GGUF whose files are `files`.
    pub(crate) fn of_gguf(files: Vec<Mapping>, gguf: &Gguf) -> Self {
        let stored = |info: &super::gguf::TensorInfo| Stored {
            shape: info.shape.clone(),
            dtype: StoredDtype::of_ggml(info.dtype),
            file: info.file,
            range: info.range.clone(),
        };
        let tensors =
            gguf.tensors.iter().map(|(name, info)| (name.clone(), stored(info))).collect();
        Self { files, tensors }
    }

    /// Lists the tensors of safetensors files.
    ///
    /// # Errors
    /// When a file cannot be mapped, is cut short or its header is wrong, or a tensor is there twice.
    pub(crate) fn of_safetensors(paths: &[PathBuf]) -> Result<Self, ModelError> {
        let mut catalogue = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for path in paths {
            catalogue.add_safetensors(path)?;
        }
        Ok(catalogue)
    }

    /// The bytes of a tensor.
    pub(crate) fn bytes(&self, stored: &Stored) -> &[u8] {
        &self.files[stored.file].bytes()[stored.range.clone()]
    }

    /// Gives the pages of a tensor back: it was read for the last time.
    pub(crate) fn release(&self, stored: &Stored) {
        self.files[stored.file].release(stored.range.clone());
    }

    fn add_safetensors(&mut self, path: &Path) -> Result<(), ModelError> {
        let mapping = map(path)?;
        let wrong = |source| ModelError::Safetensors { path: path.to_owned(), source };
        for (name, stored) in safetensors(mapping.bytes(), self.files.len()).map_err(wrong)? {
            if self.tensors.contains_key(&name) {
                return Err(wrong(SafeTensorError::InvalidOffset(name)));
            }
            self.tensors.insert(name, stored);
        }
        self.files.push(mapping);
        Ok(())
    }
}

/// Lists the tensors of one safetensors file, the one of index `file`, by its bytes.
///
/// # Errors
/// When the header is wrong, or a tensor lies outside the bytes.
pub(crate) fn safetensors(
    bytes: &[u8],
    file: usize,
) -> Result<BTreeMap<String, Stored>, SafeTensorError> {
    let (header, metadata) = SafeTensors::read_metadata(bytes)?;
    // The data begins after the header's length, 8 bytes, and the header itself.
    let data = header.checked_add(8).ok_or(SafeTensorError::InvalidHeaderLength)?;
    let stored = |(name, info): (String, &TensorInfo)| {
        let (start, end) = info.data_offsets;
        let range = match (start.checked_add(data), end.checked_add(data)) {
            (Some(start), Some(end)) if start <= end && end <= bytes.len() => start..end,
            _ => return Err(SafeTensorError::InvalidOffset(name)),
        };
        let dtype = StoredDtype::of_safetensors(info.dtype);
        Ok((name, Stored { shape: info.shape.clone(), dtype, file, range }))
    };
    metadata.tensors().into_iter().map(stored).collect()
}

/// Maps a file of a model.
///
/// # Errors
/// Names the file.
pub(crate) fn map(path: &Path) -> Result<Mapping, ModelError> {
    Mapping::open(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })
}

impl StoredDtype {
    fn of_ggml(dtype: GgmlType) -> Self {
        Self::Known(match dtype {
            GgmlType::F32 => Dtype::F32,
            GgmlType::F16 => Dtype::F16,
            GgmlType::BF16 => Dtype::BF16,
            GgmlType::Q8_0 => Dtype::Q8_0,
            GgmlType::Q4_0 => Dtype::Q4_0,
            GgmlType::Q4_1 => Dtype::Q4_1,
            GgmlType::Q5_0 => Dtype::Q5_0,
            GgmlType::Q5_1 => Dtype::Q5_1,
            GgmlType::Q4_K => Dtype::Q4K,
            GgmlType::Q5_K => Dtype::Q5K,
            GgmlType::Q6_K => Dtype::Q6K,
            other => return Self::Unknown(other.to_string()),
        })
    }

    fn of_safetensors(dtype: safetensors::Dtype) -> Self {
        match dtype {
            safetensors::Dtype::F32 => Self::Known(Dtype::F32),
            safetensors::Dtype::F16 => Self::Known(Dtype::F16),
            safetensors::Dtype::BF16 => Self::Known(Dtype::BF16),
            other => Self::Unknown(format!("{other:?}")),
        }
    }
}
