//! A backend without a model: it draws tokens at random and computes nothing. For experiments in which only the lengths
//! matter, and which then run in seconds.

use std::collections::VecDeque;

use super::load::random::Random;
use crate::backend::{Backend, BackendError};
use crate::model::batch::{Batch, BlockCopy, DrawKind, Drawn, Output};
use crate::request::{TokenId, TokenLogprob};

/// Token ids below this are drawn: so many that no two answers are alike.
pub(super) const VOCABULARY: u32 = 1 << 24;

/// Draws at random.
#[derive(Debug)]
pub(super) struct MadeUp {
    depth: usize,
    random: Random,
    launched: VecDeque<Output>,
}

impl MadeUp {
    /// `depth` batches may be launched before the oldest is collected.
    pub(super) fn new(depth: usize) -> Self {
        Self { depth, random: Random::new(0), launched: VecDeque::new() }
    }

    fn token(&mut self) -> TokenId {
        TokenId(self.random.between(0, VOCABULARY - 1))
    }

    fn draw(&mut self, kind: DrawKind) -> Drawn {
        match kind {
            DrawKind::Sample => Drawn::Token { token: self.token(), logprobs: None },
            DrawKind::Candidates { count } => Drawn::Candidates(self.candidates(count)),
        }
    }

    /// Best first. How far the best is ahead differs, so that some beams have several successors and some have none.
    fn candidates(&mut self, count: u32) -> Vec<TokenLogprob> {
        let best = -(self.random.between(1, 100) as f32) / 100.0;
        let logprob = |rank: u32| best - 0.3 * rank as f32;
        (1..=count)
            .map(|rank| TokenLogprob { token: self.token(), logprob: logprob(rank), rank })
            .collect()
    }
}

impl Backend for MadeUp {
    fn depth(&self) -> usize {
        self.depth
    }

    fn copy_blocks(&mut self, _copies: &[BlockCopy]) -> Result<(), BackendError> {
        Ok(())
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), BackendError> {
        let drawn = batch.draws.iter().map(|draw| self.draw(draw.kind)).collect();
        self.launched.push_back(Output { drawn, scores: Vec::new() });
        Ok(())
    }

    fn collect(&mut self, output: &mut Output) -> Result<(), BackendError> {
        *output = self.launched.pop_front().ok_or(BackendError::NothingLaunched)?;
        Ok(())
    }
}
