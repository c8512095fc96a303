//! From the engine's events to what a client is told: text whose UTF-8 is whole and whose stop strings are cut off.

use std::sync::Arc;
use std::time::Instant;

use super::error::ApiError;
use super::generation::Generation;
use crate::engine::command::{Beam, Event};
use crate::engine::handle::Submitted;
use crate::metrics::Metrics;
use crate::model::text::{Detokenizer, Held, IncludeStop, StopStrings, Text};
use crate::request::{Decoding, FinishReason, Request, TokenId, TokenLogprobs};

/// What ended a choice.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Finish {
    pub(crate) reason: FinishReason,
    pub(crate) cause: Option<StopCause>,
}

/// vLLM's `stop_reason`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum StopCause {
    Token(TokenId),
    Text(String),
}

/// What is new about one choice.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Delta {
    pub(crate) choice: u32,
    pub(crate) text: String,
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) finish: Option<Finish>,
}

/// What is new about one prompt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Update {
    Prompt(Vec<TokenLogprobs>),
    Delta(Delta),
    /// Whole choices of a beam search, best first.
    Beams(Vec<Answer>),
}

/// A choice as a whole.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) cumulative_logprob: f32,
    pub(crate) finish: Option<Finish>,
}

/// What a prompt cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Used {
    pub(crate) prompt_tokens: usize,
    pub(crate) cached_tokens: usize,
    pub(crate) output_tokens: usize,
    pub(crate) preemptions: usize,
    pub(crate) recomputed_tokens: usize,
}

/// One choice while it grows.
#[derive(Debug)]
struct Growing {
    detokenizer: Detokenizer,
    stops: StopStrings,
    n_tokens: u32,
    cumulative_logprob: f32,
    last_token: Option<Instant>,
    ended: bool,
}

/// Follows one request inside the engine.
#[derive(Debug)]
pub(crate) struct Gather {
    submitted: Submitted,
    text: Arc<Text>,
    choices: Vec<Growing>,
    stop_tokens: Arc<[TokenId]>,
    min_tokens: u32,
    include_stop: IncludeStop,
    wants_logprobs: bool,
    /// How many of the choices the client gets.
    returned: usize,
    /// Whether generated tokens are the client's: not where it asked for the prompt alone.
    counts_output: bool,
    pub(crate) used: Used,
    arrived: Instant,
    metrics: Arc<Metrics>,
}

impl Gather {
    /// Follows `submitted`, which is `request`.
    pub(crate) fn new(
        submitted: Submitted,
        request: &RequestView,
        generation: &Generation,
        text: &Arc<Text>,
        metrics: &Arc<Metrics>,
    ) -> Self {
        let growing = || Growing {
            detokenizer: Detokenizer::new(Arc::clone(text), &request.prompt, generation.special),
            stops: StopStrings::new(generation.stop.clone(), generation.include_stop),
            n_tokens: 0,
            cumulative_logprob: 0.0,
            last_token: None,
            ended: false,
        };
        Self {
            submitted,
            text: Arc::clone(text),
            choices: (0..request.choices).map(|_| growing()).collect(),
            stop_tokens: Arc::clone(&request.stop_tokens),
            min_tokens: generation.params.min_tokens,
            include_stop: generation.include_stop,
            wants_logprobs: generation.logprobs.is_some(),
            returned: generation.choices.returned().get() as usize,
            counts_output: generation.max_tokens != Some(0),
            used: Used { prompt_tokens: request.prompt.len(), ..Used::default() },
            arrived: Instant::now(),
            metrics: Arc::clone(metrics),
        }
    }

    /// The next thing to tell; `None` when every choice has ended.
    ///
    /// # Errors
    /// When the engine is gone.
    pub(crate) async fn next(&mut self) -> Result<Option<Update>, ApiError> {
        while !self.choices.iter().all(|choice| choice.ended) {
            let event = self.submitted.next().await.ok_or(ApiError::EngineStopped)?;
            if let Some(update) = self.take(event) {
                return Ok(Some(update));
            }
        }
        Ok(None)
    }

    fn take(&mut self, event: Event) -> Option<Update> {
        match event {
            Event::Admitted { cached_tokens } => {
                self.used.cached_tokens = cached_tokens as usize;
                None
            }
            Event::Preempted { choice, recomputed_tokens } => {
                tracing::info!(
                    request = self.submitted.id().0,
                    choice,
                    recomputed_tokens,
                    "preempted"
                );
                self.used.preemptions += 1;
                self.used.recomputed_tokens += recomputed_tokens as usize;
                None
            }
            Event::PromptLogprobs(logprobs) => Some(Update::Prompt(logprobs)),
            Event::Beams(beams) => {
                // The search's own end says nothing more.
                self.choices.iter_mut().for_each(|own| own.ended = true);
                Some(Update::Beams(self.beams(beams)))
            }
            Event::Token { choice, token, logprobs, at } => {
                let logprob = logprobs.as_ref().map_or(0.0, |logprobs| logprobs.token.logprob);
                self.time(choice, at);
                let delta = self.token(choice, token, logprob)?;
                let logprobs = logprobs.filter(|_| self.wants_logprobs).map(|boxed| *boxed);
                Some(Update::Delta(Delta { logprobs: logprobs.into_iter().collect(), ..delta }))
            }
            Event::Finished { choice, reason, stop_token } => {
                self.finished(choice, reason, stop_token)
            }
        }
    }

    /// Measures by the engine's clock: how fast a client reads is its own affair.
    fn time(&mut self, choice: u32, at: Instant) {
        let own = self.choices.get_mut(choice as usize).filter(|own| !own.ended);
        match own.map(|own| own.last_token.replace(at)) {
            None => {}
            Some(None) => {
                self.metrics.first_token(at.saturating_duration_since(self.arrived));
            }
            Some(Some(before)) => {
                self.metrics.inter_token(at.saturating_duration_since(before));
            }
        }
    }

    /// `None` when the choice had ended by a stop string: its later tokens are nobody's.
    fn token(&mut self, choice: u32, token: TokenId, logprob: f32) -> Option<Delta> {
        let own = self.choices.get_mut(choice as usize).filter(|own| !own.ended)?;
        own.n_tokens += 1;
        own.cumulative_logprob += logprob;
        self.used.output_tokens += usize::from(self.counts_output);
        let ends =
            own.n_tokens >= self.min_tokens && self.stop_tokens.binary_search(&token).is_ok();
        let silent = ends && self.include_stop == IncludeStop::No;
        let piece = if silent { String::new() } else { own.detokenizer.push(token) };
        // As in vLLM: the text of the first min_tokens tokens is no part of a stop string.
        let held = match own.n_tokens <= self.min_tokens {
            true => Held::Text(piece),
            false => own.stops.push(&piece),
        };
        let (text, finish) = match held {
            Held::Text(text) => (text, None),
            Held::Stopped { text, stop } => {
                own.ended = true;
                self.submitted.finish(choice, own.n_tokens);
                (
                    text,
                    Some(Finish { reason: FinishReason::Stop, cause: Some(StopCause::Text(stop)) }),
                )
            }
        };
        Some(Delta { choice, text, tokens: vec![token], logprobs: Vec::new(), finish })
    }

    fn finished(
        &mut self,
        choice: u32,
        reason: FinishReason,
        stop_token: Option<TokenId>,
    ) -> Option<Update> {
        let own = self.choices.get_mut(choice as usize).filter(|own| !own.ended)?;
        own.ended = true;
        let rest = own.detokenizer.finish();
        let (text, cause) = match own.stops.push(&rest) {
            Held::Text(text) => (text + &own.stops.flush(), None),
            Held::Stopped { text, stop } => (text, Some(StopCause::Text(stop))),
        };
        // An end token of the model is no news; a stop token of the client's is.
        let stop_token = stop_token.filter(|token| !self.text.end_tokens().contains(token));
        let reason = if cause.is_some() { FinishReason::Stop } else { reason };
        let cause = cause.or(stop_token.map(StopCause::Token));
        let finish = Some(Finish { reason, cause });
        Some(Update::Delta(Delta {
            choice,
            text,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            finish,
        }))
    }

    fn beams(&mut self, beams: Vec<Beam>) -> Vec<Answer> {
        let text_of = |tokens: &[TokenId]| {
            let mut detokenizer = self.choices[0].detokenizer.clone();
            let pieces = tokens.iter().map(|&token| detokenizer.push(token)).collect::<String>();
            pieces + &detokenizer.finish()
        };
        let answer = |beam: Beam| {
            let shown = match (beam.stop_token, self.include_stop) {
                (Some(_), IncludeStop::No) => &beam.tokens[..beam.tokens.len().saturating_sub(1)],
                (Some(_), IncludeStop::Yes) | (None, _) => &beam.tokens[..],
            };
            let cause = beam
                .stop_token
                .filter(|token| !self.text.end_tokens().contains(token))
                .map(StopCause::Token);
            Answer {
                text: text_of(shown),
                logprobs: Vec::new(),
                cumulative_logprob: beam.cumulative_logprob,
                finish: Some(Finish { reason: beam.finish, cause }),
                tokens: beam.tokens,
            }
        };
        let mut answers: Vec<Answer> = beams.into_iter().map(answer).collect();
        self.used.output_tokens = answers.iter().map(|answer| answer.tokens.len()).sum();
        answers.truncate(self.returned);
        answers
    }

    /// Waits for everything: the answers (the most likely of them when not all are wanted), the prompt's
    /// log-probabilities and what it cost.
    ///
    /// # Errors
    /// When the engine is gone.
    pub(crate) async fn whole(mut self) -> Result<Whole, ApiError> {
        let mut answers = vec![Answer::default(); self.choices.len()];
        let mut prompt = Vec::new();
        while let Some(update) = self.next().await? {
            match update {
                Update::Prompt(logprobs) => prompt.extend(logprobs),
                Update::Beams(beams) => answers = beams,
                Update::Delta(delta) => {
                    if let Some(answer) = answers.get_mut(delta.choice as usize) {
                        answer.add(delta);
                    }
                }
            }
        }
        for (answer, own) in answers.iter_mut().zip(&self.choices) {
            if own.n_tokens > 0 {
                answer.cumulative_logprob = own.cumulative_logprob;
            }
        }
        if answers.len() > self.returned {
            answers.sort_by(|a, b| b.cumulative_logprob.total_cmp(&a.cumulative_logprob));
            answers.truncate(self.returned);
        }
        Ok(Whole { answers, prompt, used: self.used })
    }
}

/// All of one prompt's answers.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Whole {
    pub(crate) answers: Vec<Answer>,
    /// From the second prompt token on.
    pub(crate) prompt: Vec<TokenLogprobs>,
    pub(crate) used: Used,
}

impl Answer {
    fn add(&mut self, delta: Delta) {
        self.text.push_str(&delta.text);
        self.tokens.extend(delta.tokens);
        self.logprobs.extend(delta.logprobs);
        self.finish = delta.finish.or(self.finish.take());
    }
}

/// What following a request needs of it, kept when the request itself went to the engine.
#[derive(Debug, Clone)]
pub(crate) struct RequestView {
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) stop_tokens: Arc<[TokenId]>,
    pub(crate) choices: u32,
    pub(crate) max_tokens: u32,
}

impl RequestView {
    pub(crate) fn of(request: &Request) -> Self {
        let choices = match &request.decoding {
            Decoding::Sample { choices, .. } => choices.get(),
            Decoding::Beam(_) => 1,
        };
        let (prompt, stop_tokens) = (Arc::clone(&request.prompt), Arc::clone(&request.stop_tokens));
        Self { prompt, stop_tokens, choices, max_tokens: request.max_tokens.get() }
    }
}

impl Used {
    /// Adds what another prompt of the same body cost.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens + other.prompt_tokens,
            cached_tokens: self.cached_tokens + other.cached_tokens,
            output_tokens: self.output_tokens + other.output_tokens,
            preemptions: self.preemptions + other.preemptions,
            recomputed_tokens: self.recomputed_tokens + other.recomputed_tokens,
        }
    }
}
