//! Who asked: the event channel and the clock of each request inside the engine.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::command::{Event, certain_events};
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
    /// Of preemptions that the owner, who reads slowly, was not told of.
    untold_tokens: u32,
    ended: bool,
}

/// An effect as the engine counts it, whether or not anybody listens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Fact {
    /// Nothing that is counted.
    Nothing,
    /// The request took memory for the first time: its prompt left the queue.
    Admitted { prompt_tokens: usize },
    /// So many output tokens were drawn.
    Tokens(usize),
    /// A choice ended; `last` is true when it was the request's last.
    Ended { stats: ChoiceStats, last: bool },
}

/// What delivering an effect showed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Delivered {
    pub(super) fact: Fact,
    /// The request, when nobody listens any more and it is to be removed.
    pub(super) gone: Option<RequestId>,
}

/// A choice that its owner ended.
#[derive(Debug)]
pub(super) struct Stopped {
    pub(super) stats: ChoiceStats,
    /// Whether it was the request's last.
    pub(super) last: bool,
    /// Tokens that were counted as output and turned out to come after the end.
    pub(super) surplus_tokens: usize,
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
        let choices = vec![Choice::default(); request.choices().get() as usize];
        let (submitted, id) = (Instant::now(), request.id);
        let client =
            Client { request, events, submitted, admitted: None, cached_tokens: 0, choices };
        self.clients.insert(id, client);
    }

    pub(super) fn len(&self) -> usize {
        self.clients.len()
    }

    /// Tells the owner of a request what happened to it, which the engine learnt at `at`.
    pub(super) fn deliver(&mut self, effect: Effect, at: Instant) -> Delivered {
        let (id, event) = event_of(effect, at);
        let Some(client) = self.clients.get_mut(&id) else {
            return Delivered { fact: Fact::Nothing, gone: None };
        };
        let fact = client.note(&event, at);
        let heard = client.tell(event);
        if let Fact::Ended { last: true, .. } = fact {
            self.clients.remove(&id);
            return Delivered { fact, gone: None };
        }
        Delivered { fact, gone: (heard == Heard::ByNobody).then_some(id) }
    }

    /// One choice ended because its owner found a stop string in its first `output_tokens` tokens.
    pub(super) fn finish(
        &mut self,
        id: RequestId,
        choice: u32,
        output_tokens: u32,
    ) -> Option<Stopped> {
        let client = self.clients.get_mut(&id)?;
        let own = client.choices.get_mut(choice as usize).filter(|choice| !choice.ended)?;
        let surplus_tokens = own.output_tokens.saturating_sub(output_tokens as usize);
        own.output_tokens -= surplus_tokens;
        let stats = client.end(choice as usize, FinishReason::Stop, Instant::now());
        let last = client.has_ended();
        if last {
            self.clients.remove(&id);
        }
        Some(Stopped { stats, last, surplus_tokens })
    }

    /// Forgets a request whose owner went away or that the engine failed.
    pub(super) fn remove(&mut self, id: RequestId, reason: FinishReason) -> Option<Left> {
        let mut client = self.clients.remove(&id)?;
        let open: Vec<usize> =
            (0..client.choices.len()).filter(|&choice| !client.choices[choice].ended).collect();
        let now = Instant::now();
        let stats = open.into_iter().map(|choice| client.end(choice, reason, now)).collect();
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
    fn note(&mut self, event: &Event, at: Instant) -> Fact {
        match event {
            Event::Admitted { cached_tokens } => {
                self.admitted = Some(at.saturating_duration_since(self.submitted));
                self.cached_tokens = *cached_tokens as usize;
                Fact::Admitted { prompt_tokens: self.request.prompt.len() }
            }
            Event::Token { choice, .. } => self.count(*choice, 1, at),
            Event::Beams(beams) => {
                self.count(0, beams.iter().map(|beam| beam.tokens.len()).sum(), at)
            }
            Event::Finished { choice, reason, .. } => {
                let stats = self.end(*choice as usize, *reason, at);
                Fact::Ended { stats, last: self.has_ended() }
            }
            Event::PromptLogprobs(_) | Event::Preempted { .. } => Fact::Nothing,
        }
    }

    fn count(&mut self, choice: u32, tokens: usize, at: Instant) -> Fact {
        let since = at.saturating_duration_since(self.submitted);
        if let Some(choice) = self.choices.get_mut(choice as usize) {
            choice.first_token.get_or_insert(since);
            choice.output_tokens += tokens;
        }
        Fact::Tokens(tokens)
    }

    /// Sends an event. Only preemptions have no bound: where they would take the place of what must be told, they are
    /// told with the next one.
    fn tell(&mut self, event: Event) -> Heard {
        let told = match event {
            Event::Preempted { choice, recomputed_tokens } => {
                self.preempted(choice, recomputed_tokens)
            }
            Event::Admitted { .. }
            | Event::PromptLogprobs(_)
            | Event::Token { .. }
            | Event::Beams(_)
            | Event::Finished { .. } => Some(event),
        };
        let Some(event) = told else { return Heard::BySomebody };
        match self.events.try_send(event) {
            Ok(()) => Heard::BySomebody,
            Err(TrySendError::Closed(_)) => Heard::ByNobody,
            Err(TrySendError::Full(event)) => {
                debug_assert!(false, "there is room for all but preemptions, not for {event:?}");
                Heard::ByNobody
            }
        }
    }

    fn preempted(&mut self, choice: u32, recomputed_tokens: u32) -> Option<Event> {
        let has_room = self.events.capacity() > certain_events(&self.request);
        let own = self.choices.get_mut(choice as usize)?;
        own.untold_tokens = own.untold_tokens.saturating_add(recomputed_tokens);
        (has_room || self.events.is_closed()).then(|| {
            let recomputed_tokens = std::mem::take(&mut own.untold_tokens);
            Event::Preempted { choice, recomputed_tokens }
        })
    }

    fn end(&mut self, choice: usize, reason: FinishReason, at: Instant) -> ChoiceStats {
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
            finished: at.saturating_duration_since(self.submitted),
        }
    }

    fn has_ended(&self) -> bool {
        self.choices.iter().all(|choice| choice.ended)
    }
}

/// Whether an owner is still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    BySomebody,
    ByNobody,
}

fn event_of(effect: Effect, at: Instant) -> (RequestId, Event) {
    let count = |tokens| u32::try_from(tokens).unwrap_or(u32::MAX);
    match effect {
        Effect::Admitted { id, cached_tokens } => {
            (id, Event::Admitted { cached_tokens: count(cached_tokens) })
        }
        Effect::Preempted { id, choice, tokens } => {
            (id, Event::Preempted { choice, recomputed_tokens: count(tokens) })
        }
        Effect::Token { id, choice, token, logprobs } => {
            (id, Event::Token { choice, token, logprobs, at })
        }
        Effect::PromptLogprobs { id, logprobs } => (id, Event::PromptLogprobs(logprobs)),
        Effect::Beams { id, beams } => (id, Event::Beams(beams)),
        Effect::Finished { id, choice, reason, stop_token } => {
            (id, Event::Finished { choice, reason, stop_token })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::command::event_capacity;
    use crate::request::TokenId;
    use crate::scheduler::tests::sample;

    const ID: RequestId = RequestId(1);

    fn client(max_tokens: u32, choices: u32) -> (Clients, mpsc::Receiver<Event>) {
        let request = Arc::new(sample(ID.0, [TokenId(9)].into(), max_tokens, choices));
        let (sender, events) = mpsc::channel(event_capacity(&request));
        let mut clients = Clients::default();
        clients.insert(request, sender);
        (clients, events)
    }

    fn token(choice: u32) -> Effect {
        Effect::Token { id: ID, choice, token: TokenId(1), logprobs: None }
    }

    fn length(choice: u32) -> Effect {
        Effect::Finished { id: ID, choice, reason: FinishReason::Length, stop_token: None }
    }

    #[test]
    fn what_nobody_hears_is_counted_all_the_same() {
        let (mut clients, events) = client(9, 2);
        drop(events);
        let now = Instant::now();
        let admitted = clients.deliver(Effect::Admitted { id: ID, cached_tokens: 0 }, now);
        let fact = Fact::Admitted { prompt_tokens: 1 };
        assert_eq!(admitted, Delivered { fact, gone: Some(ID) });
        assert_eq!(clients.deliver(token(0), now).fact, Fact::Tokens(1));
        let ended = clients.deliver(length(0), now);
        assert!(matches!(ended.fact, Fact::Ended { last: false, .. }), "{ended:?}");
        assert_eq!(ended.gone, Some(ID));
        let left = clients.remove(ID, FinishReason::Abort).unwrap();
        assert_eq!((left.was_admitted, left.stats.len()), (true, 1));
    }

    #[test]
    fn a_slow_reader_keeps_its_stream_whatever_is_preempted() {
        let (mut clients, mut events) = client(3, 2);
        let now = Instant::now();
        let preempted = || Effect::Preempted { id: ID, choice: 1, tokens: 5 };
        let flood = (0..1000).map(|_| preempted());
        let told = (0..3).flat_map(|_| [token(0), token(1)]).chain([length(0), length(1)]);
        for effect in flood.chain(told) {
            assert_eq!(clients.deliver(effect, now).gone, None);
        }
        assert_eq!(clients.len(), 0);
        let events: Vec<Event> = std::iter::from_fn(|| events.try_recv().ok()).collect();
        let n_tokens = events.iter().filter(|event| matches!(event, Event::Token { .. })).count();
        let n_ends = events.iter().filter(|event| matches!(event, Event::Finished { .. })).count();
        assert_eq!((n_tokens, n_ends), (6, 2));
    }

    #[test]
    fn preemptions_that_were_not_told_are_told_with_the_next() {
        let (mut clients, mut events) = client(3, 1);
        let mut preempt = || {
            let effect = Effect::Preempted { id: ID, choice: 0, tokens: 5 };
            assert_eq!(clients.deliver(effect, Instant::now()).gone, None);
        };
        (0..20).for_each(|_| preempt());
        let drain = |events: &mut mpsc::Receiver<Event>| -> u32 {
            std::iter::from_fn(|| events.try_recv().ok())
                .map(|event| match event {
                    Event::Preempted { recomputed_tokens, .. } => recomputed_tokens,
                    other => panic!("{other:?}"),
                })
                .sum()
        };
        let first = drain(&mut events);
        preempt();
        assert_eq!(first + drain(&mut events), 21 * 5);
        assert!(first < 20 * 5);
    }

    #[test]
    fn all_beams_of_a_search_are_output_with_one_first_token() {
        let (mut clients, _events) = client(9, 1);
        let beam = |len| crate::request::Beam {
            tokens: vec![TokenId(1); len],
            cumulative_logprob: -1.0,
            finish: FinishReason::Length,
            stop_token: None,
        };
        let beams = vec![beam(3), beam(4)];
        let delivered = clients.deliver(Effect::Beams { id: ID, beams }, Instant::now());
        assert_eq!(delivered.fact, Fact::Tokens(7));
        let Fact::Ended { stats, last: true } = clients.deliver(length(0), Instant::now()).fact
        else {
            panic!("the search has ended")
        };
        assert_eq!((stats.output_tokens, stats.first_token.is_some()), (7, true));
    }

    #[test]
    fn tokens_after_a_stop_string_are_surplus() {
        let (mut clients, _events) = client(9, 1);
        for _ in 0..5 {
            clients.deliver(token(0), Instant::now());
        }
        let stopped = clients.finish(ID, 0, 3).unwrap();
        assert_eq!((stopped.stats.output_tokens, stopped.surplus_tokens), (3, 2));
        assert!(stopped.last);
    }
}
