//! What can be said to the engine, and what it says back.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

pub use crate::request::Beam;
use crate::request::{FinishReason, Request, RequestId, TokenId, TokenLogprobs};

/// Everything that can make the engine do something. Nothing else can.
#[derive(Debug)]
pub enum Command {
    Submit {
        request: Arc<Request>,
        events: mpsc::Sender<Event>,
    },
    /// Every choice of the request ends within one step; no further event is sent.
    Cancel(RequestId),
    /// A stop string was found while detokenizing `choice`: it ends as [`FinishReason::Stop`].
    /// `output_tokens` is how many of its tokens count as output.
    Finish {
        id: RequestId,
        choice: u32,
        output_tokens: u32,
    },
}

/// What the engine tells the owner of a request.
/// Per choice: any number of `Token`, then one `Finished`. A beam search sends `Beams`, then one `Finished` (choice 0).
/// After a `Command::Finish` the engine sends no `Finished` for that choice: its owner knows.
/// When the channel closes before every choice has ended, the engine is gone.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The request took memory for the first time; `cached_tokens` of its prompt were not computed again.
    Admitted { cached_tokens: u32 },
    /// Log-probabilities of the next prompt tokens, in order, from the second prompt token on.
    PromptLogprobs(Vec<TokenLogprobs>),
    Token {
        choice: u32,
        token: TokenId,
        /// Present when the request's parameters ask for it.
        logprobs: Option<Box<TokenLogprobs>>,
        /// When the engine had it, however late it is read. Equal for all tokens of a step.
        at: Instant,
    },
    /// The choice gave its memory back; `recomputed_tokens` will be computed again. No token is lost or repeated.
    /// An owner that reads slowly is told of several at once.
    Preempted { choice: u32, recomputed_tokens: u32 },
    /// The finished beams, best first, at most the request's width.
    Beams(Vec<Beam>),
    Finished {
        choice: u32,
        reason: FinishReason,
        /// The token that ended the choice, which was also sent as a `Token`.
        stop_token: Option<TokenId>,
    },
}

/// How many events beside preemptions a request causes at most: its tokens and ends, log-probabilities of its prompt
/// in as many parts as there are tokens, its admission, its beams.
pub(crate) fn certain_events(request: &Request) -> usize {
    let choices = request.choices().get() as usize;
    choices * (request.max_tokens.get() as usize + 1) + request.prompt.len() + 2
}

/// The length of a request's queue: never full of what must be told, with some room for preemptions.
pub(crate) fn event_capacity(request: &Request) -> usize {
    let width = request.width().get() as usize;
    certain_events(request) + width * (request.max_tokens.get() as usize + 4)
}
