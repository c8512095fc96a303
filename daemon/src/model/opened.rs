//! From files to weights in two moves: open reads headers and refuses what is wrong; load takes the memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::cpu::{Dtype, Memory};

use super::config::ModelConfig;
use super::error::ModelError;
use super::files::{ModelFiles, read_config, safetensors_files};
use super::rope::RopeScaling;
use super::text::{Text, TextError};
use super::weights::gguf::Gguf;
use super::weights::{
    Catalogue, Check, Dummy, Layout, Packer, Reader, Source, StoredDtype, WantedMatrix,
    WantedVector, Weights, floats, map, wanted,
};

/// Where the weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadFormat {
    /// From the model's files.
    Auto,
    /// Made up: only the configuration and the tokenizer are read.
    Dummy { seed: u64 },
}

/// The dtype that unquantized matrices are held in. Quantized ones keep theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightDtype {
    /// As in the file.
    Auto,
    F32,
    F16,
    BF16,
}

/// A model whose headers were read: every tensor's name, shape, dtype and length fits the configuration.
/// Holds no weights yet.
#[derive(Debug)]
pub struct Opened {
    config: ModelConfig,
    source: Source,
    wanted: Weights<WantedMatrix, WantedVector>,
    dtype: Option<Dtype>,
    weight_bytes: usize,
    text: Arc<Text>,
}

/// What the files say, not yet checked against each other.
struct Headers<'a> {
    config: ModelConfig,
    source: Source,
    layout: Layout,
    tokenizer: TokenizerFiles<'a>,
}

/// Where the tokenizer is described.
enum TokenizerFiles<'a> {
    Gguf(Gguf),
    Folder(&'a Path),
}

impl Opened {
    /// Reads configuration and headers and checks every tensor.
    ///
    /// # Errors
    /// Names the file, key or tensor that is missing, wrong or not supported.
    pub fn open(
        files: &ModelFiles,
        format: LoadFormat,
        dtype: WeightDtype,
    ) -> Result<Self, ModelError> {
        let headers = match files {
            ModelFiles::Gguf(paths) => Headers::of_gguf(paths, format)?,
            ModelFiles::Folder(folder) => Headers::of_folder(folder, format)?,
        };
        let Headers { config, source, layout, tokenizer } = headers;
        let dtype = packed_dtype(layout, dtype);
        let wanted = wanted(&config, layout);
        let mut check = Check::new(&source, dtype);
        wanted.read(&mut check)?;
        let weight_bytes = check.finish()?;
        let text = Arc::new(tokenizer.read()?);
        Ok(Self { config, source, wanted, dtype, weight_bytes, text })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The model's tokenizer, chat template and special tokens.
    pub fn text(&self) -> Arc<Text> {
        Arc::clone(&self.text)
    }

    /// Bytes of memory that the weights take once loaded.
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// Packs the weights, one tensor after the other, and gives back the pages that each was read from.
    /// `progress` is told how many bytes of how many are done.
    ///
    /// # Errors
    /// Names the tensor at fault.
    pub fn load(self, progress: &mut dyn FnMut(u64, u64)) -> Result<Weights, ModelError> {
        let all_bytes = self.weight_bytes as u64;
        let memory = Memory::new(self.weight_bytes)
            .map_err(|source| ModelError::Kernel { name: "all weights".to_owned(), source })?;
        let mut packer = Packer {
            source: &self.source,
            dtype: self.dtype,
            memory,
            progress,
            packed_bytes: 0,
            all_bytes,
        };
        self.wanted.read(&mut packer)
    }

    /// Reads the weights by another reader; for the reference backend.
    pub(crate) fn read<'a, R: Reader>(
        &'a self,
        reader: impl FnOnce(&'a Source) -> R,
    ) -> Result<Weights<R::Matrix, R::Vector>, ModelError> {
        self.wanted.read(&mut reader(&self.source))
    }
}

/// Made-up weights of a shape, without any file: for measurements in which only the shape matters.
///
/// # Errors
/// When the memory cannot be had.
pub fn dummy_weights(config: &ModelConfig, seed: u64) -> Result<Weights, ModelError> {
    let source = Source::Dummy(Dummy { seed });
    let (memory, progress) = (Memory::default(), &mut |_, _| {});
    let mut packer =
        Packer { source: &source, dtype: None, memory, progress, packed_bytes: 0, all_bytes: 0 };
    wanted(config, Layout::Safetensors).read(&mut packer)
}

/// The dtype that unquantized matrices are packed in; `None` keeps the file's.
fn packed_dtype(layout: Layout, wanted: WeightDtype) -> Option<Dtype> {
    let dtype = match wanted {
        WeightDtype::Auto => return None,
        WeightDtype::F32 => Dtype::F32,
        WeightDtype::F16 => Dtype::F16,
        WeightDtype::BF16 => Dtype::BF16,
    };
    match layout {
        Layout::Safetensors => Some(dtype),
        Layout::Gguf => {
            let wanted = dtype.name();
            tracing::warn!(
                wanted,
                "dtype has no effect on a GGUF, whose matrices keep the dtypes of the file"
            );
            None
        }
    }
}

impl<'a> Headers<'a> {
    fn of_folder(folder: &'a Path, format: LoadFormat) -> Result<Self, ModelError> {
        let config = ModelConfig::from_json(&read_config(&folder.join("config.json"))?)?;
        let source = match format {
            LoadFormat::Auto => {
                Source::Files(Catalogue::of_safetensors(&safetensors_files(folder)?)?)
            }
            LoadFormat::Dummy { seed } => Source::Dummy(Dummy { seed }),
        };
        Ok(Self {
            config,
            source,
            layout: Layout::Safetensors,
            tokenizer: TokenizerFiles::Folder(folder),
        })
    }

    fn of_gguf(paths: &[PathBuf], format: LoadFormat) -> Result<Self, ModelError> {
        let files = paths.iter().map(|path| map(path)).collect::<Result<Vec<_>, _>>()?;
        let bytes: Vec<_> = files.iter().map(|file| file.bytes()).collect();
        let gguf = match bytes.as_slice() {
            [file] => Gguf::parse(file),
            files => Gguf::parse_split(files),
        };
        let path = paths.first().cloned().unwrap_or_default();
        let gguf = gguf.map_err(|source| ModelError::Gguf { path, source })?;
        let mut config = ModelConfig::from_gguf(&gguf)?;
        let catalogue = Catalogue::of_gguf(files, &gguf);
        read_rope_factors(&mut config, &catalogue)?;
        let source = match format {
            LoadFormat::Auto => Source::Files(catalogue),
            LoadFormat::Dummy { seed } => Source::Dummy(Dummy { seed }),
        };
        Ok(Self { config, source, layout: Layout::Gguf, tokenizer: TokenizerFiles::Gguf(gguf) })
    }
}

impl TokenizerFiles<'_> {
    fn read(&self) -> Result<Text, TextError> {
        match self {
            Self::Gguf(gguf) => Text::from_gguf(gguf),
            Self::Folder(folder) => Text::from_folder(folder),
        }
    }
}

/// `rope_freqs.weight`, where a file carries it, divides the frequency of each pair: that is how GGUF says llama3.
fn read_rope_factors(config: &mut ModelConfig, catalogue: &Catalogue) -> Result<(), ModelError> {
    let name = "rope_freqs.weight";
    let Some(stored) = catalogue.tensors.get(name) else { return Ok(()) };
    let shape = vec![config.head_dim / 2];
    if stored.shape != shape {
        return Err(ModelError::TensorShape {
            name: name.to_owned(),
            wanted: shape,
            got: stored.shape.clone(),
        });
    }
    if stored.dtype != StoredDtype::Known(Dtype::F32) {
        let got = format!("{:?}", stored.dtype);
        return Err(ModelError::TensorDtype { name: name.to_owned(), wanted: "F32", got });
    }
    let factors = floats(catalogue.bytes(stored), Dtype::F32);
    match factors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
        Some(got) => Err(ModelError::TensorValue { name: name.to_owned(), got: *got }),
        None => {
            config.rope.scaling = RopeScaling::Factors(factors);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;
