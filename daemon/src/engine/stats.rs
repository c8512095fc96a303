//! What a step and a request were, in plain numbers. The engine fills these, `metrics` records them.

use std::time::Duration;

use crate::request::FinishReason;

/// The state of the engine after a step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepStats {
    pub running: usize,
    /// Sequences without memory.
    pub waiting: usize,
    /// Tokens of this step that belong to prompts or were computed before (more than one pending), and decodes.
    pub prefill_tokens: usize,
    pub decode_tokens: usize,
    pub blocks: BlockStats,
    /// Preemptions in this step, by sequences.
    pub preemptions: usize,
    /// Tokens whose KV was given back by those preemptions.
    pub preempted_tokens: usize,
    /// Tokens that this step computes a second time because of a preemption.
    pub recomputed_tokens: usize,
    /// Copy-on-write: blocks copied for forks, and slots copied from cached blocks into new ones.
    pub forked_blocks: usize,
    pub prefix_copied_slots: usize,
    /// Tokens drawn for sequences that had already ended, and those of earlier steps that came after a stop string.
    pub discarded_tokens: usize,
    /// Prompt tokens of requests admitted in this step that were not looked up: with caching off, or because their
    /// log-probabilities are wanted.
    pub unqueried_tokens: usize,
    /// Prefix-cache queries and hits of the requests admitted in this step, in tokens.
    pub prefix_queries: usize,
    pub prefix_hits: usize,
    /// Output tokens delivered by this step, less those of earlier steps that came after a stop string.
    pub generated_tokens: usize,
    /// Host time of scheduling, committing and delivering, without the backend's.
    pub host_time: Duration,
    pub backend_time: Duration,
}

/// How the pool's blocks are used. `used + cached + free` is the pool without its null block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockStats {
    pub total: usize,
    /// Referenced by at least one sequence (or a step in flight).
    pub used: usize,
    /// Of `used`: referenced by more than one.
    pub shared: usize,
    /// References beyond the first: the blocks that sharing saves.
    pub saved: usize,
    /// Unreferenced and findable.
    pub cached: usize,
    /// Unreferenced and empty.
    pub free: usize,
    /// Token slots of used blocks that hold a token, each counted once.
    pub filled_slots: usize,
    pub block_size: usize,
}

/// A finished choice of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChoiceStats {
    pub reason: FinishReason,
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub output_tokens: usize,
    pub max_tokens: usize,
    pub choices: usize,
    /// Times since the request was submitted. `None` where the choice ended before.
    pub admitted: Option<Duration>,
    pub first_token: Option<Duration>,
    pub finished: Duration,
}

/// Where the engine's figures go.
pub trait Record: Send {
    /// A step was committed.
    fn step(&mut self, stats: &StepStats);
    /// A choice of a request left the engine.
    fn choice(&mut self, stats: &ChoiceStats);
    /// Nothing runs and nothing waits.
    fn idle(&mut self, blocks: &BlockStats);
}
