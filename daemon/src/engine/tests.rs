//! The loop on its own thread with a fake backend: what owners of requests see.

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::command::Event;
use super::handle::{Handle, QueueLimits, Refused, State, Submitted};
use super::run::{EngineConfig, start};
use super::stats::{BlockStats, ChoiceStats, Record, StepStats};
use crate::backend::fake::{FakeBackend, next_token};
use crate::backend::{Backend, BackendError};
use crate::kv::BlockSize;
use crate::model::batch::{Batch, BlockCopy, Output};
use crate::request::{FinishReason, Request, TokenId};
use crate::scheduler::{Limits, PrefixCaching};

/// Sends everything recorded to the test.
struct Recorder(mpsc::Sender<Recorded>);

#[derive(Debug)]
enum Recorded {
    Step(StepStats),
    Choice(ChoiceStats),
    Idle(BlockStats),
}

impl Record for Recorder {
    fn step(&mut self, stats: &StepStats) {
        let _ = self.0.send(Recorded::Step(*stats));
    }
    fn choice(&mut self, stats: &ChoiceStats) {
        let _ = self.0.send(Recorded::Choice(*stats));
    }
    fn idle(&mut self, blocks: &BlockStats) {
        let _ = self.0.send(Recorded::Idle(*blocks));
    }
}

/// Computes a step only when the test allows one, and fails when the test says so.
struct Gated {
    inner: FakeBackend,
    gate: mpsc::Receiver<bool>,
}

impl Backend for Gated {
    fn depth(&self) -> usize {
        self.inner.depth()
    }
    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<(), BackendError> {
        self.inner.copy_blocks(copies)
    }
    fn launch(&mut self, batch: &Batch) -> Result<(), BackendError> {
        match self.gate.recv() {
            Ok(true) => self.inner.launch(batch),
            Ok(false) | Err(_) => {
                Err(BackendError::Device { operation: "launch", reason: "told to fail".to_owned() })
            }
        }
    }
    fn collect(&mut self, output: &mut Output) -> Result<(), BackendError> {
        self.inner.collect(output)
    }
}

fn submit(handle: &Handle, request: Request) -> Result<Submitted, Refused> {
    handle.submit(vec![request]).map(|mut submitted| submitted.remove(0))
}

fn config(blocks: u32) -> EngineConfig {
    let limits = Limits {
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        block_size: BlockSize(NonZeroU32::new(4).unwrap()),
        blocks,
        watermark_blocks: 0,
        max_attended: usize::MAX,
        prefix_caching: PrefixCaching::Enabled,
    };
    let queue = QueueLimits {
        requests: NonZeroUsize::new(4).unwrap(),
        tokens: NonZeroUsize::new(100).unwrap(),
    };
    EngineConfig { limits, queue, max_model_len: 1000, secret: [1; 32] }
}

fn request(handle: &Handle, prompt: u32, max_tokens: u32, choices: u32) -> Request {
    let prompt: Arc<[TokenId]> = (0..prompt).map(TokenId).collect();
    let mut request = crate::scheduler::tests::sample(0, prompt, max_tokens, choices);
    request.id = handle.next_id();
    request.stop_tokens = Arc::new([]);
    request
}

fn next(submitted: &mut Submitted) -> Option<Event> {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(async { tokio::time::timeout(Duration::from_secs(20), submitted.next()).await })
        .expect("an event within 20 s")
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within 20 s");
        std::thread::yield_now();
    }
}

#[test]
fn a_request_gets_its_tokens_and_one_end_and_the_figures_agree() {
    for depth in [1, 2] {
        let (sender, recorded) = mpsc::channel();
        let (handle, running) =
            start(FakeBackend::new(depth, 50, 4), config(50), Recorder(sender)).unwrap();
        let mut submitted = submit(&handle, request(&handle, 10, 5, 1)).unwrap();
        assert_eq!(next(&mut submitted), Some(Event::Admitted { cached_tokens: 0 }));
        let mut context: Vec<TokenId> = (0..10).map(TokenId).collect();
        for _ in 0..5 {
            let wanted = next_token(&context, 0);
            let Some(Event::Token { token, choice: 0, .. }) = next(&mut submitted) else {
                panic!("a token")
            };
            assert_eq!(token, wanted);
            context.push(token);
        }
        let end = Event::Finished { choice: 0, reason: FinishReason::Length, stop_token: None };
        assert_eq!(next(&mut submitted), Some(end));
        assert_eq!(next(&mut submitted), None);
        drop((submitted, handle));
        assert!(running.join());
        let recorded: Vec<_> = recorded.iter().collect();
        let tokens: usize = recorded
            .iter()
            .map(|entry| match entry {
                Recorded::Step(step) => step.generated_tokens,
                Recorded::Choice(choice) => {
                    assert_eq!((choice.output_tokens, choice.prompt_tokens), (5, 10));
                    0
                }
                Recorded::Idle(blocks) => {
                    assert_eq!(blocks.used, 0);
                    0
                }
            })
            .sum();
        assert_eq!(tokens, 5);
    }
}

#[test]
fn a_dropped_request_frees_its_blocks_and_is_counted_as_aborted() {
    let (sender, recorded) = mpsc::channel();
    let (handle, running) =
        start(FakeBackend::new(1, 200, 4), config(200), Recorder(sender)).unwrap();
    let mut submitted = submit(&handle, request(&handle, 10, 700, 2)).unwrap();
    assert!(matches!(next(&mut submitted), Some(Event::Admitted { .. })));
    drop(submitted);
    wait_until("the engine is empty", || handle.in_flight() == 0);
    drop(handle);
    assert!(running.join());
    let ends: Vec<_> = recorded
        .iter()
        .filter_map(|entry| match entry {
            Recorded::Choice(choice) => Some(choice.reason),
            Recorded::Step(_) | Recorded::Idle(_) => None,
        })
        .collect();
    assert!(
        ends.iter().all(|&reason| reason == FinishReason::Abort || reason == FinishReason::Length)
    );
    assert_eq!(ends.len(), 2);
}

#[test]
fn a_full_queue_refuses_by_requests_and_by_tokens_and_says_when_to_return() {
    let (open, gate) = mpsc::channel();
    let (sender, _recorded) = mpsc::channel();
    let backend = Gated { inner: FakeBackend::new(1, 50, 4), gate };
    let (handle, running) = start(backend, config(50), Recorder(sender)).unwrap();
    let first = submit(&handle, request(&handle, 90, 1, 1)).unwrap();
    let over = submit(&handle, request(&handle, 20, 1, 1));
    assert!(
        matches!(over, Ok(_) | Err(Refused::TooManyTokens { limit: 100, .. })),
        "the first may have been admitted by now: {over:?}"
    );
    drop(over);
    let small: Vec<_> = (0..6).map(|_| submit(&handle, request(&handle, 2, 1, 1))).collect();
    let refused = small.iter().filter(|result| matches!(result, Err(Refused::TooManyRequests { limit: 4, retry_after, .. }) if retry_after.as_secs() >= 1)).count();
    assert!(refused >= 1, "{small:?}");
    drop((first, small, open));
    drop(handle);
    assert!(running.join());
}

#[test]
fn requests_that_come_together_are_taken_together_or_not_at_all() {
    let (open, gate) = mpsc::channel();
    let (sender, _recorded) = mpsc::channel();
    let backend = Gated { inner: FakeBackend::new(1, 50, 4), gate };
    let (handle, running) = start(backend, config(50), Recorder(sender)).unwrap();
    let ask = |prompts: &[u32]| {
        handle.submit(prompts.iter().map(|&len| request(&handle, len, 1, 1)).collect())
    };
    let too_many = ask(&[2; 5]);
    assert!(
        matches!(too_many, Err(Refused::TooManyAtOnce { wanted: 5, limit: 4, .. })),
        "{too_many:?}"
    );
    let too_long = ask(&[60, 41]);
    assert!(
        matches!(too_long, Err(Refused::TooManyAtOnce { wanted: 101, limit: 100, .. })),
        "an empty queue is not enough for it: {too_long:?}"
    );
    assert_eq!(handle.in_flight(), 0, "nothing of them is inside");
    let all = ask(&[30, 30, 30, 10]).unwrap();
    assert_eq!((all.len(), handle.in_flight()), (4, 4));
    drop((all, open));
    drop(handle);
    assert!(running.join());
}

#[test]
fn what_can_never_fit_is_refused_at_the_door() {
    let (sender, _recorded) = mpsc::channel();
    let (handle, _running) = start(FakeBackend::new(1, 5, 4), config(5), Recorder(sender)).unwrap();
    let long = submit(&handle, request(&handle, 10, 11, 1));
    assert!(matches!(long, Err(Refused::NeverFits { needed: 6, blocks: 5 })), "{long:?}");
    let wide = submit(&handle, request(&handle, 2, 2, 9));
    assert!(matches!(wide, Err(Refused::TooWide { needed: 9, limit: 8 })), "{wide:?}");
}

#[test]
fn a_draining_engine_finishes_what_runs_and_refuses_what_comes() {
    let (sender, _recorded) = mpsc::channel();
    let (handle, _running) =
        start(FakeBackend::new(1, 50, 4), config(50), Recorder(sender)).unwrap();
    let mut running = submit(&handle, request(&handle, 4, 50, 1)).unwrap();
    handle.drain();
    let refused = submit(&handle, request(&handle, 4, 50, 1));
    assert!(matches!(refused, Err(Refused::Draining { .. })), "{refused:?}");
    let mut tokens = 0;
    while let Some(event) = next(&mut running) {
        tokens += usize::from(matches!(event, Event::Token { .. }));
    }
    assert_eq!(tokens, 50);
}

#[test]
fn a_failing_backend_ends_the_loop_and_tells_every_owner() {
    let (open, gate) = mpsc::channel();
    let (sender, _recorded) = mpsc::channel();
    let backend = Gated { inner: FakeBackend::new(1, 50, 4), gate };
    let (handle, running) = start(backend, config(50), Recorder(sender)).unwrap();
    let mut submitted = submit(&handle, request(&handle, 4, 50, 1)).unwrap();
    open.send(true).unwrap();
    open.send(false).unwrap();
    while next(&mut submitted).is_some() {}
    assert!(running.join());
    assert_eq!(handle.state(), State::Stopped);
    let refused = submit(&handle, request(&handle, 4, 5, 1));
    assert!(matches!(refused, Err(Refused::Stopped)), "{refused:?}");
}

#[test]
fn a_stop_string_ends_one_choice_and_leaves_the_others() {
    let (sender, recorded) = mpsc::channel();
    let (handle, running) =
        start(FakeBackend::new(1, 500, 4), config(500), Recorder(sender)).unwrap();
    let mut submitted = submit(&handle, request(&handle, 4, 600, 2)).unwrap();
    let mut told = 0;
    while let Some(event) = next(&mut submitted) {
        if matches!(event, Event::Token { choice: 1, .. }) && told == 0 {
            submitted.finish(1, 1);
            told = 1;
        }
    }
    drop((submitted, handle));
    assert!(running.join());
    let ends: Vec<_> = recorded
        .iter()
        .filter_map(|entry| match entry {
            Recorded::Choice(choice) => Some((choice.reason, choice.output_tokens)),
            Recorded::Step(_) | Recorded::Idle(_) => None,
        })
        .collect();
    assert!(ends.contains(&(FinishReason::Length, 600)), "{ends:?}");
    assert!(
        ends.contains(&(FinishReason::Stop, 1)) || ends == vec![(FinishReason::Length, 600); 2],
        "{ends:?}"
    );
}
