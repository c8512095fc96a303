//! The engine's thread.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::clients::{Clients, Fact, Left};
use super::command::Command;
use super::handle::{Capacity, Handle, QueueLimits, Shared, State};
use super::stats::{BlockStats, Record, StepStats};
use crate::backend::{Backend, BackendError};
use crate::model::batch::{Batch, Output};
use crate::request::{FinishReason, RequestId};
use crate::scheduler::step::Step;
use crate::scheduler::{Limits, Scheduler};

/// Commands beside one for each request that the queue takes: cancels and stops of running requests.
const SPARE_COMMANDS: usize = 4096;

/// Most commands that wait for the loop, however long the queue of requests: their places are allocated at once.
const MAX_COMMANDS: usize = 1 << 16;

/// What an engine is started with.
#[derive(Debug, Clone, Copy)]
pub struct EngineConfig {
    pub limits: Limits,
    pub queue: QueueLimits,
    /// Most tokens of a sequence.
    pub max_model_len: u32,
    /// Keys the prefix cache; random for each process.
    pub secret: [u8; 32],
}

/// An engine's thread: it ends when every handle is dropped, or when the backend fails.
#[derive(Debug)]
pub struct Running {
    thread: JoinHandle<()>,
}

impl Running {
    /// Waits for the thread to end; `false` when it panicked.
    pub fn join(self) -> bool {
        self.thread.join().is_ok()
    }
}

/// Why the loop ended while there was work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(
        "the scheduler has {running} running and {waiting} waiting sequences and computes none of them"
    )]
    Stalled { running: usize, waiting: usize },
}

#[derive(Debug)]
pub(crate) struct Engine<B, R> {
    backend: B,
    recorder: R,
    scheduler: Scheduler,
    clients: Clients,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    limits: Limits,
    /// Launched and not collected, oldest first.
    in_flight: VecDeque<Step>,
    /// Steps whose memory is used again.
    spare: Vec<Step>,
    batch: Batch,
    output: Output,
    stats: StepStats,
    discarded_before: usize,
    /// Tokens that were reported as output before their choice turned out to have ended: to be taken off what comes.
    surplus_tokens: usize,
    step_ended: Instant,
}

/// Starts an engine on a thread of its own.
///
/// # Errors
/// When the thread cannot be started.
pub fn start<B: Backend + 'static, R: Record + 'static>(
    backend: B,
    config: EngineConfig,
    recorder: R,
) -> std::io::Result<(Handle, Running)> {
    let (state, _) = watch::channel(State::Ready);
    let (handle, engine) = assemble(backend, config, recorder, state.clone());
    let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
        // Also when the thread unwinds: whoever watches the state learns that the engine is gone.
        let _stopped = SaysStopped(state);
        engine.run();
    })?;
    Ok((handle, Running { thread }))
}

/// An engine that its caller drives by [`Engine::try_turn`] on a thread of its own choice: for measurements in steps.
pub(crate) fn stepped<B: Backend, R: Record>(
    backend: B,
    config: EngineConfig,
    recorder: R,
) -> (Handle, Engine<B, R>) {
    let (state, _) = watch::channel(State::Ready);
    assemble(backend, config, recorder, state)
}

fn assemble<B: Backend, R: Record>(
    backend: B,
    config: EngineConfig,
    recorder: R,
    state: watch::Sender<State>,
) -> (Handle, Engine<B, R>) {
    let n_commands = config.queue.requests.get().saturating_add(SPARE_COMMANDS);
    let (sender, commands) = sync_channel(n_commands.min(MAX_COMMANDS));
    let shared = Arc::new(Shared::new());
    let capacity = Capacity {
        max_model_len: config.max_model_len,
        max_num_seqs: config.limits.max_num_seqs,
        block_size: config.limits.block_size,
        blocks: config.limits.blocks,
    };
    let handle = Handle::new(sender, Arc::clone(&shared), state, config.queue, capacity);
    let engine = Engine {
        backend,
        recorder,
        scheduler: Scheduler::new(config.limits, config.secret),
        clients: Clients::default(),
        commands,
        shared,
        limits: config.limits,
        in_flight: VecDeque::new(),
        spare: Vec::new(),
        batch: Batch::default(),
        output: Output::default(),
        stats: StepStats::default(),
        discarded_before: 0,
        surplus_tokens: 0,
        step_ended: Instant::now(),
    };
    (handle, engine)
}

struct SaysStopped(watch::Sender<State>);

impl Drop for SaysStopped {
    fn drop(&mut self) {
        self.0.send_replace(State::Stopped);
    }
}

impl<B: Backend, R: Record> Engine<B, R> {
    fn run(mut self) {
        while self.take_commands() {
            if let Err(failure) = self.turn() {
                tracing::error!(%failure, requests = self.clients.len(), "the engine failed");
                self.fail_all();
                return;
            }
            self.shared.progressed();
        }
    }

    /// Obeys the commands that are there and takes one turn, without sleeping. `false`: there is nothing to do.
    pub(crate) fn try_turn(&mut self) -> Result<bool, Failure> {
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
        if self.scheduler.is_empty() && self.in_flight.is_empty() {
            return Ok(false);
        }
        self.turn()?;
        Ok(true)
    }

    pub(crate) fn backend(&self) -> &B {
        &self.backend
    }

    pub(crate) fn recorder_mut(&mut self) -> &mut R {
        &mut self.recorder
    }

    /// The most slots that a running sequence holds and has not filled.
    pub(crate) fn most_empty_slots(&self) -> usize {
        self.scheduler.most_empty_slots()
    }

    /// Takes all commands that are there, and sleeps for one when nothing can be computed.
    /// `false`: nobody can send one any more.
    fn take_commands(&mut self) -> bool {
        if self.scheduler.is_empty() && self.in_flight.is_empty() {
            self.report_idle();
            match self.commands.recv() {
                Ok(command) => self.obey(command),
                Err(_) => return false,
            }
            self.step_ended = Instant::now();
            self.shared.progressed();
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return !self.scheduler.is_empty(),
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { request, events } => {
                self.clients.insert(Arc::clone(&request), events);
                self.scheduler.submit(request);
            }
            Command::Cancel(id) => self.remove(id, FinishReason::Abort),
            Command::Finish { id, choice, output_tokens } => {
                self.scheduler.finish(id, choice);
                if let Some(stopped) = self.clients.finish(id, choice, output_tokens) {
                    self.surplus_tokens += stopped.surplus_tokens;
                    self.recorder.choice(&stopped.stats);
                    self.ended(stopped.last);
                }
            }
        }
    }

    /// One turn: launches a step while the backend takes more, else collects the oldest.
    fn turn(&mut self) -> Result<(), Failure> {
        if self.in_flight.len() < self.backend.depth()
            && self.launch()?
            && self.in_flight.len() < self.backend.depth()
        {
            return Ok(());
        }
        match self.in_flight.pop_front() {
            Some(step) => self.collect(step),
            None if self.scheduler.is_empty() => Ok(()),
            None => Err(Failure::Stalled {
                running: self.scheduler.n_running(),
                waiting: self.scheduler.n_waiting(),
            }),
        }
    }

    fn launch(&mut self) -> Result<bool, Failure> {
        let started = Instant::now();
        let mut step = self.spare.pop().unwrap_or_default();
        let scheduled = self.scheduler.schedule(&mut step);
        self.deliver();
        if !scheduled {
            self.spare.push(step);
            return Ok(false);
        }
        self.batch.fill(&step, self.limits.block_size);
        let launched = Instant::now();
        self.stats.host_time += launched - started;
        self.backend.copy_blocks(&step.copies)?;
        self.backend.launch(&self.batch)?;
        self.stats.backend_time += launched.elapsed();
        self.in_flight.push_back(step);
        Ok(true)
    }

    fn collect(&mut self, step: Step) -> Result<(), Failure> {
        let started = Instant::now();
        self.output.clear();
        self.backend.collect(&mut self.output)?;
        let collected = Instant::now();
        self.stats.backend_time += collected - started;
        self.scheduler.commit(&step, &mut self.output);
        self.deliver();
        self.stats.host_time += collected.elapsed();
        self.report(&step);
        self.spare.push(step);
        Ok(())
    }

    /// Tells the owners what happened. Never waits; a closed queue of events cancels its request.
    fn deliver(&mut self) {
        let now = Instant::now();
        let mut gone: Vec<RequestId> = Vec::new();
        let mut ended = Vec::new();
        for effect in self.scheduler.take_effects() {
            let delivered = self.clients.deliver(effect, now);
            match delivered.fact {
                Fact::Nothing => {}
                Fact::Tokens(tokens) => self.stats.generated_tokens += tokens,
                Fact::Admitted { prompt_tokens } => self.shared.left_queue(prompt_tokens),
                Fact::Ended { stats, last } => ended.push((stats, last)),
            }
            gone.extend(delivered.gone);
        }
        for (stats, last) in ended {
            self.recorder.choice(&stats);
            self.ended(last);
        }
        gone.into_iter().for_each(|id| self.remove(id, FinishReason::Abort));
    }

    fn ended(&self, last: bool) {
        if last {
            self.shared.in_flight.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn remove(&mut self, id: RequestId, reason: FinishReason) {
        let Some(Left { prompt_tokens, was_admitted, stats }) = self.clients.remove(id, reason)
        else {
            return;
        };
        self.scheduler.cancel(id);
        if !was_admitted {
            self.shared.left_queue(prompt_tokens);
        }
        stats.iter().for_each(|stats| self.recorder.choice(stats));
        self.ended(true);
    }

    /// Every owner learns by its closed channel.
    fn fail_all(&mut self) {
        self.clients.ids().into_iter().for_each(|id| self.remove(id, FinishReason::Error));
    }

    fn report(&mut self, step: &Step) {
        let counts = step.counts;
        let discarded = self.scheduler.discarded_tokens();
        let surplus = self.surplus_tokens.min(self.stats.generated_tokens);
        self.surplus_tokens -= surplus;
        let stats = StepStats {
            running: self.scheduler.n_running(),
            waiting: self.scheduler.n_waiting(),
            prefill_tokens: counts.prefill_tokens,
            decode_tokens: counts.decode_tokens,
            blocks: self.blocks(),
            preemptions: counts.preemptions,
            preempted_tokens: counts.preempted_tokens,
            recomputed_tokens: counts.recomputed_tokens,
            forked_blocks: counts.forked_blocks,
            prefix_copied_slots: counts.prefix_copied_slots,
            discarded_tokens: discarded - self.discarded_before + surplus,
            generated_tokens: self.stats.generated_tokens - surplus,
            prefix_queries: counts.prefix_queries,
            unqueried_tokens: counts.unqueried_tokens,
            prefix_hits: counts.prefix_hits,
            ..self.stats
        };
        self.discarded_before = discarded;
        self.stats = StepStats::default();
        self.recorder.step(&stats);
        self.measure_speed(stats.prefill_tokens + stats.decode_tokens);
    }

    /// Says that nothing runs: the gauges fall to zero.
    fn report_idle(&mut self) {
        #[cfg(debug_assertions)]
        self.scheduler.check();
        self.recorder.idle(&self.blocks());
    }

    fn blocks(&self) -> BlockStats {
        let usage = self.scheduler.usage();
        BlockStats {
            total: usage.total,
            used: usage.used,
            shared: usage.shared,
            saved: usage.saved,
            cached: usage.cached,
            free: usage.free,
            filled_slots: usage.filled_slots,
            block_size: self.limits.block_size.tokens(),
        }
    }

    /// Keeps a running mean of tokens a second, from which a full queue says when to come again.
    fn measure_speed(&mut self, tokens: usize) {
        let elapsed = self.step_ended.elapsed().max(Duration::from_micros(1));
        self.step_ended = Instant::now();
        let now = tokens as u128 * 1_000_000 / elapsed.as_micros();
        let before = u128::from(self.shared.tokens_per_second.load(Ordering::Relaxed));
        let mean = if before == 0 { now } else { (before * 15 + now) / 16 };
        self.shared
            .tokens_per_second
            .store(u64::try_from(mean).unwrap_or(u64::MAX).max(1), Ordering::Relaxed);
    }
}
