//! The engine on this thread, one step at a time, and what became of each request: the real loop, scheduler and block
//! pool, so that experiments count in steps and repeat exactly.

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::backend::{Backend, BackendError};
use crate::engine::command::Event;
use crate::engine::handle::{Handle, QueueLimits, Submitted};
use crate::engine::stats::{BlockStats, ChoiceStats, Record, StepStats};
use crate::engine::{Engine, EngineConfig, stepped};
use crate::kv::BlockSize;
use crate::model::batch::{Batch, BlockCopy, Output};
use crate::request::{Decoding, Request, Salt, TokenId};
use crate::sampling::Params;
use crate::scheduler::{Limits, PrefixCaching};
use crate::serve::{MAX_ATTENDED, WATERMARK_PERCENT};

/// The KV memory of an engine and what may be in it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub(super) block_size: NonZeroU32,
    /// Blocks without the null block.
    pub(super) blocks: u32,
    pub(super) max_num_seqs: u32,
    pub(super) max_num_batched_tokens: usize,
    pub(super) prefix_caching: PrefixCaching,
}

/// What one request asks for.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    /// Who asks; comes back with the answer.
    pub(super) user: usize,
    pub(super) prompt: Arc<[TokenId]>,
    pub(super) output_tokens: u32,
    pub(super) kind: AskKind,
}

/// How many answers are wanted, and which.
#[derive(Debug, Clone, Copy)]
pub(super) enum AskKind {
    /// So many choices (`n`).
    Choices(NonZeroU32),
    Beams(crate::request::BeamParams),
}

/// What became of a request. Times count from when it was asked.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub(super) user: usize,
    pub(super) ttft: Duration,
    /// Between its tokens, those of all choices together.
    pub(super) gaps: Vec<Duration>,
    pub(super) preemptions: usize,
    pub(super) cached_tokens: u32,
    /// The tokens of choice 0; those of a beam search are not kept.
    pub(super) tokens: Vec<TokenId>,
}

/// A request inside the engine.
#[derive(Debug)]
struct Asked {
    submitted: Submitted,
    at: Instant,
    last: Option<Instant>,
    open_choices: u32,
    answer: Answer,
}

/// What one step was.
#[derive(Debug, Clone)]
pub(super) struct Stepped {
    pub(super) stats: StepStats,
    /// Requests that ended with it.
    pub(super) ended: Vec<Answer>,
}

/// Counts the sequences that a backend computes.
#[derive(Debug)]
struct Counted<B> {
    inner: B,
    launches: usize,
    sequences: usize,
}

/// Keeps what the last step reported.
#[derive(Debug, Default)]
struct Last(Option<StepStats>);

/// An engine and the requests inside it.
#[derive(Debug)]
pub(super) struct Stepping<B: Backend> {
    handle: Handle,
    engine: Engine<Counted<B>, Last>,
    asked: Vec<Asked>,
    block_size: usize,
}

impl<B: Backend> Backend for Counted<B> {
    fn depth(&self) -> usize {
        self.inner.depth()
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<(), BackendError> {
        self.inner.copy_blocks(copies)
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), BackendError> {
        self.launches += 1;
        self.sequences += batch.spans.len();
        self.inner.launch(batch)
    }

    fn collect(&mut self, output: &mut Output) -> Result<(), BackendError> {
        self.inner.collect(output)
    }
}

impl Record for Last {
    fn step(&mut self, stats: &StepStats) {
        self.0 = Some(*stats);
    }

    fn choice(&mut self, _stats: &ChoiceStats) {}

    fn idle(&mut self, _blocks: &BlockStats) {}
}

impl Room {
    /// As many blocks of `block_size` as `slots` make, and no other limit that matters.
    pub(super) fn of_slots(slots: u32, block_size: NonZeroU32) -> Self {
        Self {
            block_size,
            blocks: slots / block_size,
            max_num_seqs: 4096,
            max_num_batched_tokens: 1 << 16,
            prefix_caching: PrefixCaching::Enabled,
        }
    }

    fn config(&self) -> EngineConfig {
        let limits = Limits {
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            block_size: BlockSize(self.block_size),
            blocks: self.blocks,
            watermark_blocks: self.blocks as usize * WATERMARK_PERCENT / 100,
            max_attended: MAX_ATTENDED,
            prefix_caching: self.prefix_caching,
        };
        let queue = QueueLimits { requests: MOST_QUEUED, tokens: NonZeroUsize::MAX };
        EngineConfig { limits, queue, max_model_len: u32::MAX, secret: [0; 32] }
    }
}

/// More requests than any experiment asks at once.
const MOST_QUEUED: NonZeroUsize = NonZeroUsize::MIN.saturating_add((1 << 16) - 1);

impl Ask {
    fn request(&self, handle: &Handle) -> Result<Request> {
        let params = Arc::new(Params::greedy());
        let decoding = match self.kind {
            AskKind::Choices(choices) => Decoding::Sample { params, choices },
            AskKind::Beams(beams) => Decoding::Beam(beams),
        };
        Ok(Request {
            id: handle.next_id(),
            prompt: Arc::clone(&self.prompt),
            decoding,
            max_tokens: NonZeroU32::new(self.output_tokens).context("an answer has a token")?,
            stop_tokens: Arc::new([]),
            priority: 0,
            salt: Salt::default(),
            prompt_logprobs: None,
        })
    }
}

impl Asked {
    fn new(ask: &Ask, submitted: Submitted, open_choices: u32) -> Self {
        let answer = Answer {
            user: ask.user,
            ttft: Duration::ZERO,
            gaps: Vec::new(),
            preemptions: 0,
            cached_tokens: 0,
            tokens: Vec::new(),
        };
        Self { submitted, at: Instant::now(), last: None, open_choices, answer }
    }

    /// Reads what there is to hear; whether the last choice has ended.
    fn hear(&mut self) -> bool {
        while let Some(event) = self.submitted.try_next() {
            match event {
                Event::Admitted { cached_tokens } => self.answer.cached_tokens = cached_tokens,
                Event::Token { choice, token, at, .. } => {
                    self.note_token(at);
                    if choice == 0 {
                        self.answer.tokens.push(token);
                    }
                }
                Event::Preempted { .. } => self.answer.preemptions += 1,
                Event::Finished { .. } => self.open_choices -= 1,
                Event::PromptLogprobs(_) | Event::Beams(_) => {}
            }
        }
        self.open_choices == 0
    }

    fn note_token(&mut self, at: Instant) {
        match self.last.replace(at) {
            None => self.answer.ttft = at.saturating_duration_since(self.at),
            Some(last) => self.answer.gaps.push(at.saturating_duration_since(last)),
        }
    }
}

impl<B: Backend> Stepping<B> {
    pub(super) fn new(backend: B, room: Room) -> Self {
        let counted = Counted { inner: backend, launches: 0, sequences: 0 };
        let (handle, engine) = stepped(counted, room.config(), Last::default());
        let block_size = room.block_size.get() as usize;
        Self { handle, engine, asked: Vec::new(), block_size }
    }

    /// Puts a request into the engine's queue.
    pub(super) fn ask(&mut self, ask: &Ask) -> Result<()> {
        let request = ask.request(&self.handle)?;
        let open_choices = request.choices().get();
        let submitted = self.handle.submit(vec![request]).context("ask the engine")?;
        let asked = submitted.into_iter().map(|one| Asked::new(ask, one, open_choices));
        self.asked.extend(asked);
        Ok(())
    }

    /// Computes until the next step is collected; `None` when nothing is left to do.
    ///
    /// # Errors
    /// When the engine fails, or holds more empty slots for a sequence than paging promises.
    pub(super) fn step(&mut self) -> Result<Option<Stepped>> {
        loop {
            if !self.engine.try_turn().context("compute a step")? {
                return Ok(None);
            }
            if let Some(stats) = self.engine.recorder_mut().0.take() {
                let empty = self.engine.most_empty_slots();
                let most = self.block_size - 1;
                ensure!(empty <= most, "a sequence has {empty} empty slots, wanted at most {most}");
                return Ok(Some(Stepped { stats, ended: self.take_ended() }));
            }
        }
    }

    /// Steps until nothing is left to do; what each was, in order.
    pub(super) fn run(&mut self) -> Result<Vec<Stepped>> {
        std::iter::from_fn(|| self.step().transpose()).collect()
    }

    /// Batches that the backend was given.
    pub(super) fn launches(&self) -> usize {
        self.engine.backend().launches
    }

    /// Sequences in all those batches together.
    pub(super) fn computed_sequences(&self) -> usize {
        self.engine.backend().sequences
    }

    fn take_ended(&mut self) -> Vec<Answer> {
        let ended = self.asked.extract_if(.., Asked::hear);
        ended.map(|asked| asked.answer).collect()
    }
}
