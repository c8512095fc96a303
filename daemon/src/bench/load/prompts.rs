//! Random prompts as token ids: a prefix that all share, then tokens of their own.

use super::random::Random;

/// How long prompts and outputs are.
#[derive(Debug, Clone, Copy)]
pub(in crate::bench) struct Lengths {
    pub(in crate::bench) prefix: u32,
    pub(in crate::bench) prompt: u32,
    pub(in crate::bench) output: u32,
    /// Prompt and output lengths are drawn from length × (1 − ratio) to length × (1 + ratio).
    pub(in crate::bench) range_ratio: f64,
}

/// The tokens to draw from.
#[derive(Debug, Clone)]
pub(in crate::bench) enum Vocabulary {
    /// Every id below this.
    Below(u32),
    /// These ids, at least one.
    Known(Vec<u32>),
}

/// What one request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::bench) struct Prompt {
    pub(in crate::bench) tokens: Vec<u32>,
    pub(in crate::bench) output_tokens: u32,
}

/// Draws `count` prompts.
pub(in crate::bench) fn prompts(
    count: usize,
    lengths: Lengths,
    vocabulary: &Vocabulary,
    random: &mut Random,
) -> Vec<Prompt> {
    let prefix: Vec<u32> = (0..lengths.prefix).map(|_| vocabulary.draw(random)).collect();
    let prompt = |_| {
        let own = lengths.drawn(lengths.prompt, random);
        let mut tokens = prefix.clone();
        tokens.extend((0..own).map(|_| vocabulary.draw(random)));
        Prompt { tokens, output_tokens: lengths.drawn(lengths.output, random) }
    };
    (0..count).map(prompt).collect()
}

impl Lengths {
    fn drawn(self, length: u32, random: &mut Random) -> u32 {
        let spread = (f64::from(length) * self.range_ratio).floor();
        // The largest spread is not above the length, since the ratio is below 1.
        let spread = (0..=31).rev().fold(0u32, |found, bit| {
            let larger = found | (1 << bit);
            if f64::from(larger) <= spread { larger } else { found }
        });
        random.between(length.saturating_sub(spread).max(1), length.saturating_add(spread).max(1))
    }
}

impl Vocabulary {
    fn draw(&self, random: &mut Random) -> u32 {
        match self {
            Self::Below(size) => random.between(0, size.saturating_sub(1)),
            Self::Known(ids) => {
                let last = u32::try_from(ids.len().saturating_sub(1)).unwrap_or(u32::MAX);
                let drawn = usize::try_from(random.between(0, last)).unwrap_or_default();
                ids.get(drawn).copied().unwrap_or_default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(lengths: Lengths) -> Vec<Prompt> {
        prompts(200, lengths, &Vocabulary::Below(100), &mut Random::new(3))
    }

    #[test]
    fn lengths_are_exact_without_a_range() {
        let drawn = draw(Lengths { prefix: 5, prompt: 10, output: 7, range_ratio: 0.0 });
        assert!(drawn.iter().all(|prompt| prompt.tokens.len() == 15 && prompt.output_tokens == 7));
        assert!(drawn.iter().all(|prompt| prompt.tokens[..5] == drawn[0].tokens[..5]));
        assert!(drawn.iter().any(|prompt| prompt.tokens[5..] != drawn[0].tokens[5..]));
    }

    #[test]
    fn lengths_fill_their_range_and_are_never_zero() {
        let drawn = draw(Lengths { prefix: 0, prompt: 10, output: 1, range_ratio: 0.5 });
        let lengths: Vec<usize> = drawn.iter().map(|prompt| prompt.tokens.len()).collect();
        assert_eq!((lengths.iter().min(), lengths.iter().max()), (Some(&5), Some(&15)));
        assert!(drawn.iter().all(|prompt| prompt.output_tokens == 1));
    }

    #[test]
    fn tokens_come_from_the_vocabulary_and_from_the_seed() {
        let lengths = Lengths { prefix: 0, prompt: 10, output: 1, range_ratio: 0.0 };
        let known = Vocabulary::Known(vec![7, 9]);
        let drawn = prompts(3, lengths, &known, &mut Random::new(1));
        assert!(drawn.iter().flat_map(|prompt| &prompt.tokens).all(|token| [7, 9].contains(token)));
        assert_eq!(drawn, prompts(3, lengths, &known, &mut Random::new(1)));
    }
}
