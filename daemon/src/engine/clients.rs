//! Who asked: the event channel and the clock of each request inside the engine.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::command::Event;
use super::stats::ChoiceStats;
use crate::request::{FinishReason, Request, RequestId};
use crate::scheduler::Effect;

/// The owner of a request and what it has been told.
#[derive(Debug)]
struct Client {
    request: Arc<Request>,
    events: mpsc::Sender<Event>,
    submitted: Instant,
    admitted: Option<Duration>,
    cached_tokens: usize,
    /// One for each choice.
    choices: Vec<Choice>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Choice {
    first_token: Option<Duration>,
    output_tokens: usize,
    ended: bool,
}

/// What delivering an effect showed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Delivered {
    /// Told.
    Told,
    /// The request took memory for the first time: its prompt left the queue.
    Admitted { prompt_tokens: usize },
    /// A token was told.
    Token,
    /// A choice ended; `last` is true when it was the request's last.
    Ended { stats: ChoiceStats, last: bool },
    /// Nobody listens any more.
    Gone(RequestId),
}

/// A request that left without an end of its own.
#[derive(Debug)]
pub(super) struct Left {
    pub(super) prompt_tokens: usize,
    pub(super) was_admitted: bool,
    /// One for each choice that had not ended.
    pub(super) stats: Vec<ChoiceStats>,
}

/// The requests inside the engine.
#[derive(Debug, Default)]
pub(super) struct Clients {
    clients: HashMap<RequestId, Client>,
}

impl Clients {
    pub(super) fn insert(&mut self, request: Arc<Request>, events: mpsc::Sender<Event>) {
        let choices = match &request.decoding {
            crate::request::Decoding::Sample { choices, .. } => choices.get() as usize,
            crate::request::Decoding::Beam(_) => 1,
        };
        let choices = vec![Choice::default(); choices];
        let (submitted, id) = (Instant::now(), request.id);
        let client =
            Client { request, events, submitted, admitted: None, cached_tokens: 0, choices };
        self.clients.insert(id, client);
    }

    pub(super) fn len(&self) -> usize {
        self.clients.len()
    }

    /// Tells the owner of a request what happened to it.
    pub(super) fn deliver(&mut self, effect: Effect) -> Delivered {
        let (id, event) = event_of(effect);
        let Some(client) = self.clients.get_mut(&id) else { return Delivered::Told };
        let delivered = client.note(&event);
        let told = client.events.try_send(event).is_ok();
        if let Delivered::Ended { last: true, .. } = delivered {
            self.clients.remove(&id);
            return delivered;
        }
        if told { delivered } else { Delivered::Gone(id) }
    }

    /// One choice ended because its owner found a stop string in its first `output_tokens` tokens.
    pub(super) fn finish(
        &mut self,
        id: RequestId,
        choice: u32,
        output_tokens: u32,
    ) -> Option<(ChoiceStats, bool)> {
        let client = self.clients.get_mut(&id)?;
        let own = client.choices.get_mut(choice as usize).filter(|choice| !choice.ended)?;
        own.output_tokens = output_tokens as usize;
        let ended = client.end(choice as usize, FinishReason::Stop);
        if client.has_ended() {
            self.clients.remove(&id);
            return Some((ended, true));
        }
        Some((ended, false))
    }

    /// Forgets a request whose owner went away or that the engine failed.
    pub(super) fn remove(&mut self, id: RequestId, reason: FinishReason) -> Option<Left> {
        let mut client = self.clients.remove(&id)?;
        let open: Vec<usize> =
            (0..client.choices.len()).filter(|&choice| !client.choices[choice].ended).collect();
        let stats = open.into_iter().map(|choice| client.end(choice, reason)).collect();
        Some(Left {
            prompt_tokens: client.request.prompt.len(),
            was_admitted: client.admitted.is_some(),
            stats,
        })
    }

    /// The ids of all requests.
    pub(super) fn ids(&self) -> Vec<RequestId> {
        self.clients.keys().copied().collect()
    }
}

impl Client {
    fn note(&mut self, event: &Event) -> Delivered {
        match event {
            Event::Admitted { cached_tokens } => {
                self.admitted = Some(self.submitted.elapsed());
                self.cached_tokens = *cached_tokens as usize;
                Delivered::Admitted { prompt_tokens: self.request.prompt.len() }
            }
            Event::Token { choice, .. } => {
                let at = self.submitted.elapsed();
                if let Some(choice) = self.choices.get_mut(*choice as usize) {
                    choice.first_token.get_or_insert(at);
                    choice.output_tokens += 1;
                }
                Delivered::Token
            }
            Event::Finished { choice, reason, .. } => {
                let stats = self.end(*choice as usize, *reason);
                Delivered::Ended { stats, last: self.has_ended() }
            }
            Event::Beams(beams) => {
                let tokens = beams.first().map_or(0, |beam| beam.tokens.len());
                self.choices[0].output_tokens = tokens;
                Delivered::Told
            }
            Event::PromptLogprobs(_) | Event::Preempted { .. } => Delivered::Told,
        }
    }

    fn end(&mut self, choice: usize, reason: FinishReason) -> ChoiceStats {
        let own = self.choices.get_mut(choice).map(|own| {
            own.ended = true;
            *own
        });
        let own = own.unwrap_or_default();
        ChoiceStats {
            reason,
            prompt_tokens: self.request.prompt.len(),
            cached_tokens: self.cached_tokens,
            output_tokens: own.output_tokens,
            max_tokens: self.request.max_tokens.get() as usize,
            choices: self.choices.len(),
            admitted: self.admitted,
            first_token: own.first_token,
            finished: self.submitted.elapsed(),
        }
    }

    fn has_ended(&self) -> bool {
        self.choices.iter().all(|choice| choice.ended)
    }
}

fn event_of(effect: Effect) -> (RequestId, Event) {
    let count = |tokens| u32::try_from(tokens).unwrap_or(u32::MAX);
    match effect {
        Effect::Admitted { id, cached_tokens } => {
            (id, Event::Admitted { cached_tokens: count(cached_tokens) })
        }
        Effect::Preempted { id, choice, tokens } => {
            (id, Event::Preempted { choice, recomputed_tokens: count(tokens) })
        }
        Effect::Token { id, choice, token, logprobs } => {
            (id, Event::Token { choice, token, logprobs })
        }
        Effect::PromptLogprobs { id, logprobs } => (id, Event::PromptLogprobs(logprobs)),
        Effect::Beams { id, beams } => (id, Event::Beams(beams)),
        Effect::Finished { id, choice, reason, stop_token } => {
            (id, Event::Finished { choice, reason, stop_token })
        }
    }
}
