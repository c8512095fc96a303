//! The models that are measured with: a named one, or made-up weights of a small shape.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result};
use kernels::cpu::KvDtype;
use serde_json::json;

use super::stepped::{Room, Stepping};
use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::config::HubConfig;
use crate::model::config::ModelConfig;
use crate::model::files::ModelFiles;
use crate::model::weights::Weights;
use crate::model::{LoadFormat, Opened, WeightDtype, dummy_weights};
use crate::source::{Location, Retry, hf};

/// What MODEL of a benchmark names, and how it is computed.
#[derive(Debug, Clone)]
pub struct NamedModel {
    pub location: Location,
    pub hub: HubConfig,
}

/// A model that engines of any memory can be made of.
#[derive(Debug, Clone)]
pub(super) struct BenchModel {
    pub(super) name: String,
    source: Source,
    config: ModelConfig,
    threads: Option<NonZeroUsize>,
}

#[derive(Debug, Clone)]
enum Source {
    Files(PathBuf),
    MadeUp,
}

/// The vocabulary of SmolLM2.
pub(super) const SMOLLM2_VOCABULARY: u32 = 49_152;

/// A vocabulary so small that the layers are what a step computes.
pub(super) const TINY_VOCABULARY: u32 = 1024;

impl NamedModel {
    /// Brings the model to this machine and reads its shape.
    pub(super) async fn open(&self, threads: Option<NonZeroUsize>) -> Result<BenchModel> {
        let path = match &self.location {
            Location::Path(path) => path.clone(),
            Location::Hub(model) => hf::fetch(model, &self.hub, Retry::USUAL, &|_| {}).await?,
        };
        let config = opened(&path)?.config().clone();
        let name = self.location.to_string();
        Ok(BenchModel { name, source: Source::Files(path), config, threads })
    }
}

fn opened(path: &std::path::Path) -> Result<Opened> {
    let files = ModelFiles::find(path)?;
    let opened = Opened::open(&files, LoadFormat::Auto, WeightDtype::Auto);
    opened.with_context(|| format!("open {}", path.display()))
}

impl BenchModel {
    /// Two layers of SmolLM2-135M's shape with made-up weights.
    pub(super) fn two_layers(vocabulary: u32, threads: Option<NonZeroUsize>) -> Result<Self> {
        let config = ModelConfig::from_json(&json!({
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 2,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": vocabulary,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100_000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": true,
        }))?;
        let name = format!("two layers of SmolLM2's shape, {vocabulary} token ids");
        Ok(Self { name, source: Source::MadeUp, config, threads })
    }

    /// Token ids that prompts are made of.
    pub(super) fn vocabulary(&self) -> Result<u32> {
        u32::try_from(self.config.vocab).context("count the token ids")
    }

    /// Bytes of K and V of one token in all layers, in half precision.
    pub(super) fn kv_bytes_per_token(&self) -> Result<usize> {
        let shape = self.config.kv_shape(1, std::num::NonZeroU32::MIN, KvDtype::F16);
        shape.and_then(|shape| shape.bytes_per_token()).context("the bytes of a token overflow")
    }

    /// An engine that computes this model in `room`.
    pub(super) fn engine(&self, room: Room) -> Result<Stepping<CpuBackend>> {
        let mut backend = self.backend(room)?;
        // Else the first tokens in each page would wait for the system.
        backend.touch();
        Ok(Stepping::new(backend, room))
    }

    fn backend(&self, room: Room) -> Result<CpuBackend> {
        let blocks = room.blocks.checked_add(1).context("too many blocks")?;
        let kv = self.config.kv_shape(blocks, room.block_size, KvDtype::F16);
        let options = CpuOptions {
            kv: kv.context("a size of the model does not fit 32 bits")?,
            max_tokens: room.max_num_batched_tokens,
            max_rows: room.max_num_seqs as usize,
            threads: self.threads,
        };
        Ok(CpuBackend::new(self.config.clone(), self.weights()?, options)?)
    }

    fn weights(&self) -> Result<Weights> {
        match &self.source {
            Source::Files(path) => Ok(opened(path)?.load(&mut |_, _| {})?),
            Source::MadeUp => Ok(dummy_weights(&self.config, 0)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::sync::Arc;

    use super::*;
    use crate::bench::stepped::{Ask, AskKind};
    use crate::request::TokenId;

    #[test]
    fn a_made_up_model_answers_on_the_engine() {
        let model = BenchModel::two_layers(64, NonZeroUsize::new(1)).unwrap();
        assert_eq!(model.kv_bytes_per_token().unwrap(), 2 * 2 * 2 * 3 * 64);
        let room = Room {
            max_num_seqs: 4,
            max_num_batched_tokens: 16,
            ..Room::of_slots(64, NonZeroU32::new(16).unwrap())
        };
        let mut engine = model.engine(room).unwrap();
        let prompt: Arc<[TokenId]> = (0..20).map(TokenId).collect();
        let kind = AskKind::Choices(NonZeroU32::MIN);
        engine.ask(&Ask { user: 5, prompt, output_tokens: 3, kind }).unwrap();
        let steps = engine.run().unwrap();
        let answers: Vec<_> = steps.iter().flat_map(|step| &step.ended).collect();
        assert_eq!((answers.len(), answers[0].user, answers[0].tokens.len()), (1, 5, 3));
        assert_eq!(answers[0].gaps.len(), 2);
    }
}
