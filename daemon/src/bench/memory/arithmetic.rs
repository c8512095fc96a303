//! The numbers that need no engine, by the product's own functions.

use std::num::NonZeroU32;

use anyhow::{Context, Result};
use kernels::cpu::KvDtype;
use serde_json::json;

use crate::bench::table::{Cell, Table};
use crate::kv::BlockSize;
use crate::model::config::ModelConfig;

const MIB: usize = 1 << 20;

/// The shape of Llama 2 with 7 billion parameters.
pub(super) fn llama_2_7b() -> Result<ModelConfig> {
    Ok(ModelConfig::from_json(&json!({
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32_000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": false,
    }))?)
}

/// Bytes of K and V of one token of it, in half precision.
pub(super) fn bytes_per_token() -> Result<usize> {
    let shape = llama_2_7b()?.kv_shape(1, NonZeroU32::MIN, KvDtype::F16);
    shape.and_then(|shape| shape.bytes_per_token()).context("the bytes of a token overflow")
}

/// What a shared prompt of `tokens` tokens saves between `users`.
#[derive(Debug, Clone, Copy)]
struct SharedPrompt {
    users: usize,
    tokens: usize,
}

impl SharedPrompt {
    /// Counted token by token.
    fn tokens_saved(self) -> usize {
        (self.users - 1) * self.tokens
    }

    /// In whole blocks, as they are shared.
    fn blocks_saved(self, size: BlockSize) -> usize {
        (self.users - 1) * size.full_blocks(self.tokens)
    }
}

pub(super) fn table() -> Result<Table> {
    let size = BlockSize(NonZeroU32::new(16).context("blocks hold tokens")?);
    let token = bytes_per_token()?;
    let shared = SharedPrompt { users: 10, tokens: 200 };
    let mut table = Table::new("Arithmetic", ["what", "figure", "unit"]);
    table.note("Llama-2-7B's shape in half precision, blocks of 16 tokens.");
    let mut row = |what: &str, figure: usize, unit: &str| {
        table.push(vec![Cell::text(what), Cell::Count(figure), Cell::text(unit)]);
    };
    row("KV of a token", token / 1024, "KiB");
    row("KV of 2,048 tokens", 2048 * token / MIB, "MiB");
    row("of which filled after 500 tokens", 500 * token / MIB, "MiB");
    row("blocks of 48 tokens", size.blocks_for(48), "");
    row("blocks of 320 tokens", size.blocks_for(320), "");
    let saved = shared.tokens_saved() * token / MIB;
    row("saved by 10 users that share 200 tokens, in tokens", saved, "MiB");
    let saved = shared.blocks_saved(size) * size.tokens() * token / MIB;
    row("saved by them in whole blocks", saved, "MiB");
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size() -> BlockSize {
        BlockSize(NonZeroU32::new(16).unwrap())
    }

    fn mib(tokens: usize) -> usize {
        tokens * bytes_per_token().unwrap() / MIB
    }

    #[test]
    fn a_token_of_llama_2_7b_takes_512_kib() {
        assert_eq!(bytes_per_token().unwrap(), 512 << 10);
    }

    #[test]
    fn two_thousand_and_forty_eight_tokens_take_1_gib() {
        assert_eq!(mib(2048), 1024);
    }

    #[test]
    fn after_500_tokens_250_mib_are_filled() {
        assert_eq!(mib(500), 250);
    }

    #[test]
    fn forty_eight_tokens_take_3_blocks() {
        assert_eq!(size().blocks_for(48), 3);
    }

    #[test]
    fn three_hundred_and_twenty_tokens_take_20_blocks() {
        assert_eq!(size().blocks_for(320), 20);
    }

    #[test]
    fn ten_users_that_share_200_tokens_save_900_mib_of_tokens() {
        assert_eq!(mib(SharedPrompt { users: 10, tokens: 200 }.tokens_saved()), 900);
    }

    #[test]
    fn ten_users_that_share_200_tokens_save_864_mib_of_whole_blocks() {
        let blocks = SharedPrompt { users: 10, tokens: 200 }.blocks_saved(size());
        assert_eq!((blocks, mib(blocks * 16)), (108, 864));
    }
}
