//! What makes a cached block findable: a chain of keyed hashes over full blocks.
//!
//! `key(block) = BLAKE3(process key; key of the block before, tokens of the block)`, 256 bits wide, so that nobody
//! outside can construct two prefixes with one key; the salt is folded into the root and reaches every block by the chain.

use crate::request::{Salt, TokenId};

/// Names the content of a full block and of all blocks before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockKey([u8; 32]);

/// Computes block keys under one secret.
#[derive(Debug, Clone)]
pub struct PrefixHasher {
    secret: [u8; 32],
}

impl PrefixHasher {
    /// Hashes under `secret`, which should be random for each process.
    pub fn new(secret: [u8; 32]) -> Self {
        Self { secret }
    }

    /// The key before the first block of every sequence with this salt.
    pub fn root(&self, salt: Salt) -> BlockKey {
        BlockKey(*blake3::keyed_hash(&self.secret, &salt.0).as_bytes())
    }

    /// The key of the block that holds `tokens` after `parent`.
    pub fn child(&self, parent: BlockKey, tokens: impl Iterator<Item = TokenId>) -> BlockKey {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(&parent.0);
        for token in tokens {
            hasher.update(&token.0.to_le_bytes());
        }
        BlockKey(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(hasher: &PrefixHasher, salt: u8, tokens: &[u32]) -> BlockKey {
        let root = hasher.root(Salt([salt; 32]));
        tokens
            .chunks(2)
            .fold(root, |key, block| hasher.child(key, block.iter().map(|&token| TokenId(token))))
    }

    #[test]
    fn equal_prefixes_under_one_salt_have_one_key() {
        let hasher = PrefixHasher::new([7; 32]);
        assert_eq!(chain(&hasher, 0, &[1, 2, 3, 4]), chain(&hasher, 0, &[1, 2, 3, 4]));
    }

    #[test]
    fn salt_secret_and_every_earlier_token_change_the_key() {
        let hasher = PrefixHasher::new([7; 32]);
        let key = chain(&hasher, 0, &[1, 2, 3, 4]);
        assert_ne!(key, chain(&hasher, 1, &[1, 2, 3, 4]));
        assert_ne!(key, chain(&hasher, 0, &[9, 2, 3, 4]));
        assert_ne!(key, chain(&hasher, 0, &[1, 2, 4, 3]));
        assert_ne!(key, chain(&PrefixHasher::new([8; 32]), 0, &[1, 2, 3, 4]));
    }
}
