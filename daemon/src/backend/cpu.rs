//! The CPU backend: computes a batch when it is launched and hands the results out when it is collected.

mod tensors;
#[cfg(test)]
mod tests;

use std::num::NonZeroUsize;

use kernels::cpu::{KernelError, KvArena, KvShape};
use rayon::prelude::*;

pub use tensors::{Head, Tensors};

use super::{Backend, BackendError};
use crate::model::batch::{Batch, BlockCopy, Input, Output, PromptScore, RowChange, RowId};
use crate::model::config::ModelConfig;
use crate::model::layer::{Activations, forward};
use crate::model::weights::Weights;
use crate::request::TokenId;
use crate::sampling::rows::{Rows, score};

/// The logits buffer stays below this, unless [`FEWEST_LOGIT_ROWS`] rows need more.
const MOST_LOGIT_BYTES: usize = 64 << 20;
const FEWEST_LOGIT_ROWS: usize = 16;

/// What a [`CpuBackend`] makes room for.
#[derive(Debug, Clone)]
pub struct CpuOptions {
    pub kv: KvShape,
    /// Most tokens of one batch.
    pub max_tokens: usize,
    /// Sampling rows: the engine's `max_num_seqs`.
    pub max_rows: usize,
    /// `None` takes as many as the machine runs at once.
    pub threads: Option<NonZeroUsize>,
}

/// A model on this machine's processors. Depth 1.
#[derive(Debug)]
pub struct CpuBackend {
    pool: rayon::ThreadPool,
    model: Model,
    /// The results of the batch that was launched and not collected.
    launched: Option<Output>,
    /// An output to fill next, whose memory is reused.
    spare: Output,
}

/// All that a batch is computed with.
#[derive(Debug)]
struct Model {
    config: ModelConfig,
    weights: Weights,
    tensors: Tensors,
    rows: Rows,
    workspace: Workspace,
    max_tokens: usize,
    max_rows: usize,
}

/// The arrays of a step, taken once.
#[derive(Debug)]
struct Workspace {
    hidden: [Vec<f32>; 3],
    query: [Vec<f32>; 2],
    kv: [Vec<f32>; 3],
    ffn: [Vec<f32>; 2],
    /// [logit rows, hidden]
    logit_normed: Vec<f32>,
    /// [logit rows, vocab]
    logits: Vec<f32>,
    tile: Tile,
}

/// The tokens whose logits are computed together.
#[derive(Debug)]
struct Tile {
    /// Tokens of the batch, each once; at most `most`.
    tokens: Vec<usize>,
    most: usize,
    /// [max_tokens] the logit row of a token in this tile.
    row_of: Vec<Option<usize>>,
    /// [draws of this tile] its logit row.
    draw_rows: Vec<usize>,
}

impl CpuBackend {
    /// Takes the memory for workspace and KV arena and starts the threads.
    ///
    /// # Errors
    /// When the arena's shape is not the model's, or threads or memory cannot be had.
    pub fn new(
        config: ModelConfig,
        weights: Weights,
        options: CpuOptions,
    ) -> Result<Self, BackendError> {
        check_kv(&config, &options.kv)?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(thread_count(options.threads))
            .thread_name(|index| format!("cpu-{index}"))
            .build()
            .map_err(|error| BackendError::Device {
                operation: "start threads",
                reason: error.to_string(),
            })?;
        let arena = KvArena::new(options.kv).map_err(device("map the KV arena"))?;
        let CpuOptions { max_tokens, max_rows, .. } = options;
        let model = Model {
            tensors: Tensors::new(&config, arena, max_tokens),
            rows: Rows::new(max_rows, config.vocab),
            workspace: Workspace::new(&config, max_tokens),
            config,
            weights,
            max_tokens,
            max_rows,
        };
        Ok(Self { pool, model, launched: None, spare: Output::default() })
    }

    /// Bytes of the arrays that a step of `max_tokens` tokens needs, drawing on `threads` threads included.
    pub fn workspace_bytes(
        config: &ModelConfig,
        max_tokens: usize,
        threads: Option<NonZeroUsize>,
    ) -> usize {
        let rotations = if config.sliding_rope.is_some() { 2 } else { 1 };
        let per_token = [
            3 * config.hidden,
            2 * config.query_width(),
            3 * config.kv_width(),
            2 * config.ffn,
            rotations * config.head_dim,
        ];
        let per_token: usize = per_token.iter().sum();
        let logits =
            logit_rows(config.vocab, max_tokens).saturating_mul(config.vocab + config.hidden);
        let floats = max_tokens.saturating_mul(per_token).saturating_add(logits);
        floats
            .saturating_mul(size_of::<f32>())
            .saturating_add(Rows::bytes(thread_count(threads), config.vocab))
    }

    /// Writes every page of the KV arena, so that its memory is taken now and not later.
    pub fn touch(&mut self) {
        self.model.tensors.touch();
    }
}

impl Backend for CpuBackend {
    fn depth(&self) -> usize {
        1
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<(), BackendError> {
        self.model.tensors.copy_blocks(copies).map_err(device("copy blocks"))
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), BackendError> {
        let Self { pool, model, launched, spare } = self;
        if launched.is_some() {
            return Err(BackendError::OutOfRange { what: "batches in flight", limit: 1, got: 2 });
        }
        let mut output = std::mem::take(spare);
        output.clear();
        pool.install(|| model.compute(batch, &mut output))?;
        *launched = Some(output);
        Ok(())
    }

    fn collect(&mut self, output: &mut Output) -> Result<(), BackendError> {
        let done = self.launched.take().ok_or(BackendError::NothingLaunched)?;
        self.spare = std::mem::replace(output, done);
        Ok(())
    }
}

impl Model {
    fn compute(&mut self, batch: &Batch, output: &mut Output) -> Result<(), BackendError> {
        check(batch, &self.limits())?;
        batch.rows.iter().for_each(|change| self.rows.apply(change));
        if !batch.inputs.is_empty() {
            self.step(batch)?;
        }
        self.draw(batch, output).map_err(device("compute logits"))?;
        self.score(batch, output).map_err(device("score a prompt"))
    }

    /// The forward pass; leaves the residual stream in the workspace.
    fn step(&mut self, batch: &Batch) -> Result<(), BackendError> {
        let Self { config, weights, tensors, rows, workspace, .. } = self;
        let unknown = BackendError::Device {
            operation: "take a drawn token",
            reason: "its row drew none".to_owned(),
        };
        let token = |input: &Input| match input {
            Input::Known(token) => Some(token.0),
            Input::Drawn(row) => rows.last_token(*row).map(|token| token.0),
        };
        if batch.inputs.iter().any(|input| token(input).is_none()) {
            return Err(unknown);
        }
        tensors.upload(batch, batch.inputs.iter().filter_map(token));
        let mut activations = workspace.activations(config, batch.inputs.len());
        forward(tensors, config, weights, &mut activations)
            .map_err(device("compute the forward pass"))
    }

    fn draw(&mut self, batch: &Batch, output: &mut Output) -> Result<(), KernelError> {
        let Self { config, weights, tensors, rows, workspace, .. } = self;
        let Workspace { hidden: [hidden, ..], logit_normed, logits, tile, .. } = workspace;
        let head = Head { matrix: weights.head(), norm: &weights.norm, hidden };
        let mut draws = batch.draws.as_slice();
        while !draws.is_empty() {
            let taken = tile.take(draws.iter().map(|draw| draw.token));
            let (now, later) = draws.split_at(taken);
            tensors.logits(&head, &tile.tokens, logit_normed, logits)?;
            let logits = &logits[..tile.tokens.len() * config.vocab];
            rows.draw_all(now, &tile.draw_rows, logits, &mut output.drawn);
            draws = later;
        }
        Ok(())
    }

    fn score(&mut self, batch: &Batch, output: &mut Output) -> Result<(), KernelError> {
        let Self { config, weights, tensors, workspace, .. } = self;
        let Workspace { hidden: [hidden, ..], logit_normed, logits, tile, .. } = workspace;
        let head = Head { matrix: weights.head(), norm: &weights.norm, hidden };
        for PromptScore { tokens, next, count, .. } in &batch.scores {
            let mut scores = Vec::with_capacity(next.len());
            let mut left = tokens.clone();
            while !left.is_empty() {
                let taken = tile.take(left.clone());
                tensors.logits(&head, &tile.tokens, logit_normed, logits)?;
                let rows =
                    logits.par_chunks_exact(config.vocab).zip(&next[scores.len()..][..taken]);
                scores.par_extend(rows.map(|(logits, next)| score(logits, *next, *count)));
                left.start += taken;
            }
            output.scores.push(scores);
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        Limits {
            tokens: self.max_tokens,
            rows: self.max_rows,
            vocab: self.config.vocab,
            kv: *self.tensors.arena().shape(),
        }
    }
}

impl Workspace {
    fn new(config: &ModelConfig, max_tokens: usize) -> Self {
        let zeroed = |width: usize| vec![0.0; max_tokens * width];
        let (query, kv) = (config.query_width(), config.kv_width());
        let most = logit_rows(config.vocab, max_tokens);
        Self {
            hidden: std::array::from_fn(|_| zeroed(config.hidden)),
            query: std::array::from_fn(|_| zeroed(query)),
            kv: std::array::from_fn(|_| zeroed(kv)),
            ffn: std::array::from_fn(|_| zeroed(config.ffn)),
            logit_normed: vec![0.0; most * config.hidden],
            logits: vec![0.0; most * config.vocab],
            tile: Tile {
                tokens: Vec::with_capacity(most),
                most,
                row_of: vec![None; max_tokens],
                draw_rows: Vec::new(),
            },
        }
    }

    fn activations(&mut self, config: &ModelConfig, tokens: usize) -> Activations<'_> {
        let (query_width, kv_width) = (config.query_width(), config.kv_width());
        let [hidden, normed, projected] =
            self.hidden.each_mut().map(|array| &mut array[..tokens * config.hidden]);
        let [query, attended] =
            self.query.each_mut().map(|array| &mut array[..tokens * query_width]);
        let [key, key_normed, value] =
            self.kv.each_mut().map(|array| &mut array[..tokens * kv_width]);
        let [gate, up] = self.ffn.each_mut().map(|array| &mut array[..tokens * config.ffn]);
        Activations { hidden, normed, projected, query, attended, key, key_normed, value, gate, up }
    }
}

impl Tile {
    /// Holds as many of the wanted tokens, from the first on, as there is room for; each once.
    /// Returns how many of them those are.
    fn take(&mut self, wanted: impl Iterator<Item = usize>) -> usize {
        for token in self.tokens.drain(..) {
            self.row_of[token] = None;
        }
        self.draw_rows.clear();
        for token in wanted {
            let row = match self.row_of[token] {
                Some(row) => row,
                None if self.tokens.len() == self.most => break,
                None => {
                    self.row_of[token] = Some(self.tokens.len());
                    self.tokens.push(token);
                    self.tokens.len() - 1
                }
            };
            self.draw_rows.push(row);
        }
        self.draw_rows.len()
    }
}

/// `threads`, or as many as the machine runs at once.
fn thread_count(threads: Option<NonZeroUsize>) -> usize {
    let all = || std::thread::available_parallelism().ok();
    threads.or_else(all).map_or(1, NonZeroUsize::get)
}

/// Rows of the logits buffer.
fn logit_rows(vocab: usize, max_tokens: usize) -> usize {
    let fit = MOST_LOGIT_BYTES / size_of::<f32>() / vocab.max(1);
    fit.max(FEWEST_LOGIT_ROWS).min(max_tokens.max(1))
}

/// The arena must be the model's.
fn check_kv(config: &ModelConfig, kv: &KvShape) -> Result<(), BackendError> {
    let wanted = [
        ("layers of the arena", config.layers, kv.layers),
        ("KV heads of the arena", config.kv_heads, kv.kv_heads),
        ("head size of the arena", config.head_dim, kv.head_dim),
    ];
    match wanted.iter().find(|(_, wanted, got)| *wanted != *got as usize) {
        Some((what, limit, got)) => {
            Err(BackendError::OutOfRange { what, limit: *limit, got: *got as usize })
        }
        None => Ok(()),
    }
}

/// What a batch may name.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    pub(super) tokens: usize,
    pub(super) rows: usize,
    pub(super) vocab: usize,
    pub(super) kv: KvShape,
}

/// Checks every index of the batch, so that nothing later can be out of range.
pub(super) fn check(batch: &Batch, limits: &Limits) -> Result<(), BackendError> {
    let tokens = batch.inputs.len();
    at_most("tokens of a batch", limits.tokens, tokens)?;
    exactly("positions of a batch", tokens, batch.positions.len())?;
    exactly("slots of a batch", tokens, batch.slots.len())?;
    let blocks = limits.kv.blocks as usize;
    for table in &batch.tables {
        below("blocks of a table", blocks, table.0 as usize)?;
    }
    for slot in &batch.slots {
        below(
            "slots of a batch",
            blocks.saturating_mul(limits.kv.block_size as usize),
            *slot as usize,
        )?;
    }
    for input in &batch.inputs {
        match input {
            Input::Known(TokenId(token)) => {
                below("token ids of a batch", limits.vocab, *token as usize)?
            }
            Input::Drawn(row) => below_rows(limits, *row)?,
        }
    }
    for span in &batch.spans {
        at_most("tokens of a span", tokens, span.tokens.end.max(span.tokens.start))?;
        at_most("blocks of a span", batch.tables.len(), span.table.end.max(span.table.start))?;
        let reach = (span.start as usize).saturating_add(span.tokens.len());
        let room = span.table.len().saturating_mul(limits.kv.block_size as usize);
        at_most("positions of a span", room, reach)?;
    }
    check_results(batch, limits)
}

fn check_results(batch: &Batch, limits: &Limits) -> Result<(), BackendError> {
    let tokens = batch.inputs.len();
    for draw in &batch.draws {
        below("tokens that are drawn from", tokens, draw.token)?;
        below_rows(limits, draw.row)?;
    }
    for score in &batch.scores {
        at_most("tokens that are scored", tokens, score.tokens.end.max(score.tokens.start))?;
        exactly("tokens that follow the scored", score.tokens.len(), score.next.len())?;
        for next in &score.next {
            below("token ids that are scored", limits.vocab, next.0 as usize)?;
        }
    }
    for change in &batch.rows {
        match change {
            RowChange::Admit { row, .. } | RowChange::Release { row } => below_rows(limits, *row)?,
            RowChange::Fork { from, to, .. } => {
                below_rows(limits, *from)?;
                below_rows(limits, *to)?;
            }
        }
    }
    Ok(())
}

fn below_rows(limits: &Limits, row: RowId) -> Result<(), BackendError> {
    below("sampling rows", limits.rows, row.0 as usize)
}

fn below(what: &'static str, limit: usize, got: usize) -> Result<(), BackendError> {
    if got < limit {
        Ok(())
    } else {
        Err(BackendError::OutOfRange { what, limit: limit.saturating_sub(1), got })
    }
}

fn at_most(what: &'static str, limit: usize, got: usize) -> Result<(), BackendError> {
    if got <= limit { Ok(()) } else { Err(BackendError::OutOfRange { what, limit, got }) }
}

fn exactly(what: &'static str, wanted: usize, got: usize) -> Result<(), BackendError> {
    if got == wanted { Ok(()) } else { Err(BackendError::OutOfRange { what, limit: wanted, got }) }
}

fn device(operation: &'static str) -> impl Fn(KernelError) -> BackendError {
    move |error| BackendError::Device { operation, reason: error.to_string() }
}
