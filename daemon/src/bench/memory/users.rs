//! The load of the memory experiments: users that each ask again as soon as they are answered. Every length depends on
//! seed, user and turn alone, so that all ways to hold the memory get the same requests.

use std::num::NonZeroU32;

use super::super::load::random::Random;
use super::super::made_up::VOCABULARY;
use super::super::stepped::{Ask, AskKind};
use crate::request::TokenId;

/// Prompt tokens of each request.
pub(super) const PROMPT: u32 = 32;
/// Fewest and most answer tokens: 500 on average.
pub(super) const ANSWERS: [u32; 2] = [250, 750];
/// The longest sequence that a request may become.
pub(super) const MAX_LENGTH: u32 = 2048;

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Users {
    pub(super) count: usize,
    pub(super) seed: u64,
    /// Token ids below this make up prompts.
    pub(super) vocabulary: u32,
}

/// How long a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lengths {
    pub(super) prompt: u32,
    pub(super) answer: u32,
}

impl Lengths {
    /// Slots that the sequence fills at its end: its last token needs none.
    pub(super) fn longest(self) -> usize {
        self.prompt as usize + self.answer as usize - 1
    }

    /// A request of these lengths whose prompt nobody else has.
    pub(super) fn ask(self, user: usize, vocabulary: u32, random: &mut Random) -> Ask {
        let prompt = random_tokens(self.prompt, vocabulary, random);
        let kind = AskKind::Choices(NonZeroU32::MIN);
        Ask { user, prompt: prompt.into(), output_tokens: self.answer, kind }
    }
}

/// `count` token ids below `vocabulary`.
pub(super) fn random_tokens(count: u32, vocabulary: u32, random: &mut Random) -> Vec<TokenId> {
    (0..count).map(|_| TokenId(random.between(0, vocabulary - 1))).collect()
}

impl Users {
    pub(super) fn new(count: usize, seed: u64) -> Self {
        Self { count, seed, vocabulary: VOCABULARY }
    }

    /// How long the request is that `user` asks in its `turn`.
    pub(super) fn lengths(self, user: usize, turn: usize) -> Lengths {
        let answer = self.random(user, turn).between(ANSWERS[0], ANSWERS[1]);
        Lengths { prompt: PROMPT, answer }
    }

    /// That request.
    pub(super) fn ask(self, user: usize, turn: usize) -> Ask {
        let mut random = self.random(user, turn);
        let answer = random.between(ANSWERS[0], ANSWERS[1]);
        Lengths { prompt: PROMPT, answer }.ask(user, self.vocabulary, &mut random)
    }

    /// Requests of `count` users' first turns.
    pub(super) fn first_asks(self) -> Vec<Ask> {
        (0..self.count).map(|user| self.ask(user, 0)).collect()
    }

    fn random(self, user: usize, turn: usize) -> Random {
        let mut seeds = Random::new(self.seed ^ (user as u64) << 32 ^ turn as u64);
        Random::new(seeds.next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_users_lengths_are_those_of_its_requests_and_come_from_the_seed() {
        let users = Users::new(200, 7);
        for user in 0..200 {
            let (lengths, ask) = (users.lengths(user, 3), users.ask(user, 3));
            assert_eq!(lengths.answer, ask.output_tokens);
            assert_eq!(ask.prompt.len(), 32);
            assert!((250..=750).contains(&lengths.answer));
        }
        assert_ne!(users.lengths(0, 0), Users::new(200, 8).lengths(0, 0));
    }
}
