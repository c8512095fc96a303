//! The loop on its own thread with a fake backend: what owners of requests see.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::command::Event;
use super::handle::{Handle, QueueLimits, Refused, State, Submitted};
use super::run::{EngineConfig, start};
use super::stats::{BlockStats, ChoiceStats, Record, StepStats};
use crate::backend::fake::{FakeBackend, next_token};
use crate::backend::{Backend, BackendError};
use crate::model::batch::{Batch, BlockCopy, Output};
use crate::request::{Decoding, FinishReason, Request, TokenId};
use crate::scheduler::Limits;
use crate::scheduler::tests::{Scenario, alone, beams_alone, fixed_scenarios};

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
    /// Steps that came to the gate.
    arrived: Arc<AtomicUsize>,
}

impl Backend for Gated {
    fn depth(&self) -> usize {
        self.inner.depth()
    }
    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<(), BackendError> {
        self.inner.copy_blocks(copies)
    }
    fn launch(&mut self, batch: &Batch) -> Result<(), BackendError> {
        self.arrived.fetch_add(1, Ordering::Relaxed);
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
    let limits = Limits { max_num_seqs: 8, ..Limits::small(blocks, 4) };
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

/// All that is left to hear.
fn rest(submitted: &mut Submitted) -> Vec<Event> {
    std::iter::from_fn(|| next(submitted)).collect()
}

/// A gated engine: it computes a step for each `true` that is sent.
struct GatedEngine {
    handle: Handle,
    running: super::run::Running,
    gate: mpsc::Sender<bool>,
    arrived: Arc<AtomicUsize>,
    recorded: mpsc::Receiver<Recorded>,
}

impl GatedEngine {
    fn start(depth: usize, blocks: u32) -> Self {
        let ((open, gate), (sender, recorded)) = (mpsc::channel(), mpsc::channel());
        let arrived = Arc::new(AtomicUsize::new(0));
        let inner = FakeBackend::new(depth, blocks, 4);
        let backend = Gated { inner, gate, arrived: Arc::clone(&arrived) };
        let (handle, running) = start(backend, config(blocks), Recorder(sender)).unwrap();
        Self { handle, running, gate: open, arrived, recorded }
    }

    /// Waits until the loop stands before its `step`th step, counted from 1.
    fn wait_at_gate(&self, step: usize) {
        wait_until("the gate is reached", || self.arrived.load(Ordering::Relaxed) == step);
    }

    fn allow(&self, steps: usize) {
        (0..steps).for_each(|_| self.gate.send(true).unwrap());
    }

    /// Waits until nothing is left, and for the end of the loop; what was recorded.
    fn end(self) -> Vec<Recorded> {
        let recorded = until_idle(&self.handle, &self.recorded);
        drop(self.handle);
        assert!(self.running.join());
        recorded
    }
}

/// What is recorded until the engine is empty and says so: it holds no block.
fn until_idle(handle: &Handle, recorded: &mpsc::Receiver<Recorded>) -> Vec<Recorded> {
    let seen = std::cell::RefCell::new(Vec::new());
    wait_until("the engine is idle", || {
        let empty = handle.in_flight() == 0;
        let mut seen = seen.borrow_mut();
        seen.extend(recorded.try_iter());
        empty && matches!(seen.last(), Some(Recorded::Idle(_)))
    });
    let seen = seen.into_inner();
    let Some(Recorded::Idle(blocks)) = seen.last() else { panic!("{seen:?}") };
    assert_eq!(blocks.used, 0);
    seen
}

fn ends(recorded: &[Recorded]) -> Vec<(FinishReason, usize)> {
    let end = |entry: &Recorded| match entry {
        Recorded::Choice(choice) => Some((choice.reason, choice.output_tokens)),
        Recorded::Step(_) | Recorded::Idle(_) => None,
    };
    recorded.iter().filter_map(end).collect()
}

fn generated(recorded: &[Recorded]) -> usize {
    let tokens = |entry: &Recorded| match entry {
        Recorded::Step(step) => step.generated_tokens,
        Recorded::Choice(_) | Recorded::Idle(_) => 0,
    };
    recorded.iter().map(tokens).sum()
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
fn a_dropped_request_is_gone_within_one_step_and_counted_as_aborted() {
    for depth in [1, 2] {
        let engine = GatedEngine::start(depth, 200);
        let mut submitted = submit(&engine.handle, request(&engine.handle, 10, 700, 2)).unwrap();
        engine.allow(depth);
        while !matches!(next(&mut submitted), Some(Event::Token { .. })) {}
        engine.wait_at_gate(depth + 1);
        drop(submitted);
        engine.allow(1);
        wait_until("the engine is empty", || engine.handle.in_flight() == 0);
        let recorded = engine.end();
        let reasons = ends(&recorded).into_iter().map(|(reason, _)| reason);
        assert_eq!(reasons.collect::<Vec<_>>(), [FinishReason::Abort; 2]);
    }
}

#[test]
fn a_full_queue_refuses_by_requests_and_says_when_to_return() {
    let engine = GatedEngine::start(1, 50);
    let ask = |prompt| submit(&engine.handle, request(&engine.handle, prompt, 1, 1));
    let running = ask(10).unwrap();
    engine.wait_at_gate(1);
    let waiting: Vec<_> = (0..4).map(|_| ask(2).unwrap()).collect();
    let Err(Refused::TooManyRequests { waiting: 4, limit: 4, retry_after }) = ask(2) else {
        panic!("the fifth is too many")
    };
    assert!(retry_after.as_secs() >= 1);
    engine.allow(100);
    drop((running, waiting));
    engine.end();
}

#[test]
fn a_full_queue_refuses_by_prompt_tokens() {
    let engine = GatedEngine::start(1, 50);
    let ask = |prompt| submit(&engine.handle, request(&engine.handle, prompt, 1, 1));
    let running = ask(10).unwrap();
    engine.wait_at_gate(1);
    let waiting = ask(90).unwrap();
    let over = ask(11);
    assert!(
        matches!(over, Err(Refused::TooManyTokens { waiting: 90, limit: 100, .. })),
        "{over:?}"
    );
    let just = ask(10).unwrap();
    engine.allow(100);
    drop((running, waiting, just));
    engine.end();
}

#[test]
fn requests_that_come_together_are_taken_together_or_not_at_all() {
    let (open, gate) = mpsc::channel();
    let (sender, _recorded) = mpsc::channel();
    let inner = FakeBackend::new(1, 50, 4);
    let backend = Gated { inner, gate, arrived: Arc::default() };
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
    let long = submit(&handle, request(&handle, 10, 12, 1));
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
    let inner = FakeBackend::new(1, 50, 4);
    let backend = Gated { inner, gate, arrived: Arc::default() };
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
    let engine = GatedEngine::start(1, 500);
    let mut submitted = submit(&engine.handle, request(&engine.handle, 4, 600, 2)).unwrap();
    engine.allow(1);
    while !matches!(next(&mut submitted), Some(Event::Token { choice: 1, .. })) {}
    // The next step is planned: its token of the choice comes too late.
    engine.wait_at_gate(2);
    submitted.finish(1, 1);
    engine.allow(600);
    let heard = rest(&mut submitted);
    let of_stopped = heard.iter().filter(|event| matches!(event, Event::Token { choice: 1, .. }));
    assert_eq!(of_stopped.count(), 1, "{heard:?}");
    drop(submitted);
    let recorded = engine.end();
    assert_eq!(ends(&recorded), [(FinishReason::Stop, 1), (FinishReason::Length, 600)]);
    assert_eq!(generated(&recorded), 601, "what came too late is no output");
}

/// Whichever comes first, the admission or the cancel: nothing stays counted as waiting.
#[test]
fn requests_whose_owner_left_before_they_were_admitted_leave_the_queue() {
    let engine = GatedEngine::start(1, 50);
    for _ in 0..20 {
        drop(submit(&engine.handle, request(&engine.handle, 30, 3, 2)).unwrap());
        engine.allow(4);
        wait_until("the engine is empty", || engine.handle.in_flight() == 0);
    }
    let full = submit(&engine.handle, request(&engine.handle, 100, 1, 1));
    assert!(full.is_ok(), "{full:?}");
    engine.allow(100);
    drop(full);
    engine.end();
}

/// What a scenario's requests get from an engine on its own thread.
fn play(scenario: &Scenario, depth: usize) {
    let limits = scenario.limits;
    let backend = FakeBackend::new(depth, limits.blocks, limits.block_size.0.get());
    let (requests, tokens) = (NonZeroUsize::new(64).unwrap(), NonZeroUsize::new(100_000).unwrap());
    let queue = QueueLimits { requests, tokens };
    let config = EngineConfig { limits, queue, max_model_len: 1000, secret: [1; 32] };
    let (sender, recorded) = mpsc::channel();
    let (handle, running) = start(backend, config, Recorder(sender)).unwrap();
    // A request that is too wide for the scenario's limits is not taken; every fifth owner leaves at once.
    let taken: Vec<(Request, Submitted)> = scenario
        .arrivals
        .iter()
        .filter_map(|arrival| {
            let submitted = submit(&handle, arrival.request.clone()).ok()?;
            (arrival.request.id.0 % 5 != 4).then(|| (arrival.request.clone(), submitted))
        })
        .collect();
    assert!(!taken.is_empty());
    for (request, mut submitted) in taken {
        expect(&request, &rest(&mut submitted));
    }
    until_idle(&handle, &recorded);
    drop(handle);
    assert!(running.join());
}

fn expect(request: &Request, heard: &[Event]) {
    match &request.decoding {
        Decoding::Sample { choices, .. } => {
            for wanted in 0..choices.get() {
                let token = |event: &Event| match event {
                    Event::Token { choice, token, .. } if *choice == wanted => Some(*token),
                    _ => None,
                };
                let own: Vec<TokenId> = heard.iter().filter_map(token).collect();
                assert_eq!(own, alone(request, wanted), "{:?}, {wanted}", request.id);
            }
        }
        Decoding::Beam(params) => {
            let beams = heard.iter().find_map(|event| match event {
                Event::Beams(beams) => Some(beams),
                _ => None,
            });
            assert_eq!(beams, Some(&beams_alone(request, *params)));
        }
    }
}

#[test]
fn an_engine_gives_every_request_the_tokens_that_it_gets_alone() {
    for scenario in fixed_scenarios(40) {
        [1, 2].into_iter().for_each(|depth| play(&scenario, depth));
    }
}
