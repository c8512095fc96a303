//! The async side's way to the engine: submitting, cancelling, and knowing how full it is.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use super::command::{Command, Event, event_capacity};
use crate::kv::BlockSize;
use crate::request::{Request, RequestId};

/// What the queue takes before it answers "full".
#[derive(Debug, Clone, Copy)]
pub struct QueueLimits {
    pub requests: NonZeroUsize,
    /// Prompt tokens of all requests in the queue.
    pub tokens: NonZeroUsize,
}

/// Whether the engine takes requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Ready,
    /// Running requests finish, new ones are refused.
    Draining,
    /// The loop has ended.
    Stopped,
}

/// What the engine can hold, for checks at the door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    pub max_model_len: u32,
    pub max_num_seqs: u32,
    pub block_size: BlockSize,
    /// Blocks of the pool without the null block.
    pub blocks: u32,
}

/// The engine does not take the request now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the queue holds {waiting} requests, its limit is {limit}")]
    TooManyRequests { waiting: usize, limit: usize, retry_after: Duration },
    #[error("the queue holds {waiting} prompt tokens, its limit is {limit}")]
    TooManyTokens { waiting: usize, limit: usize, retry_after: Duration },
    #[error(
        "{wanted} {what} at once, the queue takes at most {limit}; send them in several requests"
    )]
    TooManyAtOnce { wanted: usize, limit: usize, what: &'static str },
    #[error("the engine is draining")]
    Draining { retry_after: Duration },
    #[error("the engine has stopped")]
    Stopped,
    #[error("the request needs {needed} blocks of KV memory at most at once, there are {blocks}")]
    NeverFits { needed: usize, blocks: usize },
    #[error("the request needs {needed} sequences at once, max-num-seqs is {limit}")]
    TooWide { needed: usize, limit: usize },
}

/// Figures shared by the engine's thread and its handles.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) waiting_requests: AtomicUsize,
    pub(super) waiting_tokens: AtomicUsize,
    /// Recent tokens a second, computed and generated; 0 before the first step.
    pub(super) tokens_per_second: AtomicU64,
    /// Milliseconds since `started` at which the last step ended, or the engine was last idle.
    pub(super) last_progress_ms: AtomicU64,
    /// Requests inside the engine.
    pub(super) in_flight: AtomicUsize,
    pub(super) started: Instant,
    next_id: AtomicU64,
}

/// Submits requests to one engine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    commands: SyncSender<Command>,
    shared: Arc<Shared>,
    state: watch::Sender<State>,
    limits: QueueLimits,
    capacity: Capacity,
}

/// A request inside the engine. Dropping it cancels what has not finished.
#[derive(Debug)]
pub struct Submitted {
    id: RequestId,
    events: mpsc::Receiver<Event>,
    commands: SyncSender<Command>,
}

impl Shared {
    pub(super) fn new() -> Self {
        Self {
            waiting_requests: AtomicUsize::new(0),
            waiting_tokens: AtomicUsize::new(0),
            tokens_per_second: AtomicU64::new(0),
            last_progress_ms: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            started: Instant::now(),
            next_id: AtomicU64::new(1),
        }
    }

    /// Says that the loop is alive.
    pub(super) fn progressed(&self) {
        let ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_progress_ms.store(ms, Ordering::Relaxed);
    }

    /// A request left the queue: it was admitted or ended there.
    pub(super) fn left_queue(&self, prompt_tokens: usize) {
        self.waiting_requests.fetch_sub(1, Ordering::Relaxed);
        self.waiting_tokens.fetch_sub(prompt_tokens, Ordering::Relaxed);
    }
}

impl Handle {
    pub(super) fn new(
        commands: SyncSender<Command>,
        shared: Arc<Shared>,
        state: watch::Sender<State>,
        limits: QueueLimits,
        capacity: Capacity,
    ) -> Self {
        Self { commands, shared, state, limits, capacity }
    }

    /// A handle to no engine, for reading requests alone: what is submitted is refused as [`Refused::Stopped`].
    pub(crate) fn detached(capacity: Capacity) -> Self {
        let (commands, _) = std::sync::mpsc::sync_channel(1);
        let limits = QueueLimits { requests: NonZeroUsize::MIN, tokens: NonZeroUsize::MIN };
        let (state, _) = watch::channel(State::Stopped);
        Self::new(commands, Arc::new(Shared::new()), state, limits, capacity)
    }

    /// An id that no other request of this engine has.
    pub fn next_id(&self) -> RequestId {
        RequestId(self.shared.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// What the engine can hold.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Whether the engine takes requests now.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Follows the engine's state.
    pub fn watch_state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Requests inside the engine, waiting ones included.
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::Relaxed)
    }

    /// How long the step loop has not moved although there was work.
    pub fn since_progress(&self) -> Duration {
        let last = Duration::from_millis(self.shared.last_progress_ms.load(Ordering::Relaxed));
        match self.in_flight() {
            0 => Duration::ZERO,
            _ => self.shared.started.elapsed().saturating_sub(last),
        }
    }

    /// Refuses new requests from now on; what runs goes on.
    pub fn drain(&self) {
        self.state.send_if_modified(|state| {
            let ready = *state == State::Ready;
            if ready {
                *state = State::Draining;
            }
            ready
        });
    }

    /// Puts all requests in the queue, or none.
    ///
    /// # Errors
    /// When the queue is full, the engine drains or has stopped, or the requests can never fit.
    pub fn submit(&self, requests: Vec<Request>) -> Result<Vec<Submitted>, Refused> {
        self.check(&requests)?;
        self.reserve(requests.len(), prompt_tokens(&requests))?;
        let mut submitted = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter();
        while let Some(request) = requests.next() {
            match self.send(request) {
                Ok(one) => submitted.push(one),
                Err(refused) => {
                    // Those that were sent are dropped, which cancels them.
                    requests.for_each(|request| self.shared.left_queue(request.prompt.len()));
                    return Err(refused);
                }
            }
        }
        Ok(submitted)
    }

    /// Sends a request for which the queue has counted a place.
    fn send(&self, request: Request) -> Result<Submitted, Refused> {
        let (sender, events) = mpsc::channel(event_capacity(&request));
        let id = request.id;
        let prompt_tokens = request.prompt.len();
        if self.shared.in_flight.fetch_add(1, Ordering::Relaxed) == 0 {
            // The loop slept: its clock starts with this request.
            self.shared.progressed();
        }
        let command = Command::Submit { request: Arc::new(request), events: sender };
        if let Err(error) = self.commands.try_send(command) {
            self.shared.in_flight.fetch_sub(1, Ordering::Relaxed);
            self.shared.left_queue(prompt_tokens);
            return Err(match error {
                TrySendError::Disconnected(_) => Refused::Stopped,
                TrySendError::Full(_) => self.too_many_requests(),
            });
        }
        Ok(Submitted { id, events, commands: self.commands.clone() })
    }

    /// Refuses requests that cannot be queued now or ever, however empty the queue.
    fn check(&self, requests: &[Request]) -> Result<(), Refused> {
        requests.iter().try_for_each(|request| self.check_fits(request))?;
        let (limit, wanted) = (self.limits.requests.get(), requests.len());
        if wanted > limit {
            return Err(Refused::TooManyAtOnce { wanted, limit, what: "prompts" });
        }
        let (limit, wanted) = (self.limits.tokens.get(), prompt_tokens(requests));
        // One prompt may be longer: an empty queue takes it.
        if requests.len() > 1 && wanted > limit {
            return Err(Refused::TooManyAtOnce { wanted, limit, what: "prompt tokens" });
        }
        self.check_state()
    }

    fn check_state(&self) -> Result<(), Refused> {
        match self.state() {
            State::Ready => Ok(()),
            State::Draining => Err(Refused::Draining { retry_after: self.retry_after() }),
            State::Stopped => Err(Refused::Stopped),
        }
    }

    fn check_fits(&self, request: &Request) -> Result<(), Refused> {
        let Capacity { max_num_seqs, block_size, blocks, .. } = self.capacity;
        let width = request.width().get() as usize;
        if width > max_num_seqs as usize {
            return Err(Refused::TooWide { needed: width, limit: max_num_seqs as usize });
        }
        let needed = crate::scheduler::blocks_needed(request, block_size);
        let blocks = blocks as usize;
        if needed > blocks { Err(Refused::NeverFits { needed, blocks }) } else { Ok(()) }
    }

    /// Counts requests into the queue, or says which limit they would pass. An empty queue takes any one prompt.
    fn reserve(&self, requests: usize, prompt_tokens: usize) -> Result<(), Refused> {
        let count = |figure: &AtomicUsize, more: usize, fits: &dyn Fn(usize) -> bool| {
            figure
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |waiting| {
                    fits(waiting).then_some(waiting + more)
                })
                .is_ok()
        };
        let (most_requests, most_tokens) = (self.limits.requests.get(), self.limits.tokens.get());
        let fits = |waiting: usize| waiting + requests <= most_requests;
        if !count(&self.shared.waiting_requests, requests, &fits) {
            return Err(self.too_many_requests());
        }
        let fits = |waiting: usize| waiting == 0 || waiting + prompt_tokens <= most_tokens;
        if !count(&self.shared.waiting_tokens, prompt_tokens, &fits) {
            self.shared.waiting_requests.fetch_sub(requests, Ordering::Relaxed);
            return Err(self.too_many_tokens());
        }
        Ok(())
    }

    fn too_many_requests(&self) -> Refused {
        Refused::TooManyRequests {
            waiting: self.shared.waiting_requests.load(Ordering::Relaxed),
            limit: self.limits.requests.get(),
            retry_after: self.retry_after(),
        }
    }

    fn too_many_tokens(&self) -> Refused {
        Refused::TooManyTokens {
            waiting: self.shared.waiting_tokens.load(Ordering::Relaxed),
            limit: self.limits.tokens.get(),
            retry_after: self.retry_after(),
        }
    }

    /// How long the prompts in the queue take at the present speed: 1 s to 60 s.
    fn retry_after(&self) -> Duration {
        let tokens = self.shared.waiting_tokens.load(Ordering::Relaxed) as u64;
        let speed = self.shared.tokens_per_second.load(Ordering::Relaxed).max(1);
        Duration::from_secs((tokens / speed).clamp(1, 60))
    }
}

fn prompt_tokens(requests: &[Request]) -> usize {
    requests.iter().map(|request| request.prompt.len()).sum()
}

impl Submitted {
    /// The id that the engine knows the request by.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The next event; `None` when the engine is gone or every choice has ended.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// The next event if it is there already.
    pub(crate) fn try_next(&mut self) -> Option<Event> {
        self.events.try_recv().ok()
    }

    /// Ends one choice because of a stop string; see [`Command::Finish`].
    /// A full command queue loses the command: the choice then runs to its length and its owner ignores it.
    pub fn finish(&self, choice: u32, output_tokens: u32) {
        let _ = self.commands.try_send(Command::Finish { id: self.id, choice, output_tokens });
    }
}

impl Drop for Submitted {
    /// A full command queue loses the command: the engine then sees the closed channel at its next event.
    fn drop(&mut self) {
        let _ = self.commands.try_send(Command::Cancel(self.id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::TokenId;
    use std::num::NonZeroU32;

    /// The loop drops its end of the commands a moment before it says that it has stopped.
    #[test]
    fn a_dead_engine_says_so_and_never_that_its_queue_is_full() {
        let block_size = BlockSize(NonZeroU32::MIN);
        let capacity = Capacity { max_model_len: 9, max_num_seqs: 1, block_size, blocks: 9 };
        let handle = Handle::detached(capacity);
        handle.state.send_replace(State::Ready);
        let request = crate::scheduler::tests::sample(1, [TokenId(1)].into(), 1, 1);
        let refused = handle.submit(vec![request]);
        assert!(matches!(refused, Err(Refused::Stopped)), "{refused:?}");
        assert_eq!(handle.in_flight(), 0);
        assert_eq!(handle.shared.waiting_tokens.load(Ordering::Relaxed), 0);
    }
}
