//! Server-sent events: what is new about any prompt of a body, as it comes.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream, SelectAll};
use serde_json::Value;

use super::error::ApiError;
use super::gather::{Gather, Update, Used};
use super::generation::{PreemptionDetails, StreamUsage};
use super::shape;

/// How an endpoint writes its chunks.
pub(crate) trait Chunks: Send + 'static {
    /// Chunks before anything is computed.
    fn opening(&mut self) -> Vec<Value>;
    /// Chunks that tell what is new about a prompt.
    fn of(&mut self, prompt: usize, update: Update) -> Vec<Value>;
    /// A chunk without choices.
    fn empty(&self) -> Value;
}

/// When and how usage is told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UsagePlan {
    pub(crate) when: StreamUsage,
    pub(crate) preemptions: PreemptionDetails,
}

type Updates = SelectAll<BoxStream<'static, (usize, Used, Result<Update, ApiError>)>>;

struct Streaming<C> {
    updates: Updates,
    chunks: C,
    usage: UsagePlan,
    used: Vec<Used>,
    /// Events ready to be sent.
    ready: VecDeque<Event>,
    ended: bool,
}

/// Answers with a stream that ends with `[DONE]`, or with an error object when the engine is gone.
pub(crate) fn respond<C: Chunks>(
    gathers: Vec<Gather>,
    mut chunks: C,
    usage: UsagePlan,
) -> Response {
    let used = gathers.iter().map(|gather| gather.used).collect();
    let updates =
        gathers.into_iter().enumerate().map(|(index, gather)| follow(index, gather).boxed());
    let ready = chunks.opening().iter().map(event).collect();
    let updates = stream::select_all(updates);
    let streaming = Streaming { updates, chunks, usage, used, ready, ended: false };
    let events = stream::unfold(streaming, |mut streaming| async move {
        let event = streaming.next().await?;
        Some((Ok::<_, Infallible>(event), streaming))
    });
    Sse::new(events).into_response()
}

/// One prompt's updates, with what it has cost so far; ends after an error.
fn follow(
    index: usize,
    gather: Gather,
) -> impl futures_util::Stream<Item = (usize, Used, Result<Update, ApiError>)> + Send {
    stream::unfold(Some(gather), move |gather| async move {
        let mut gather = gather?;
        match gather.next().await {
            Ok(Some(update)) => Some(((index, gather.used, Ok(update)), Some(gather))),
            Ok(None) => None,
            Err(error) => Some(((index, gather.used, Err(error)), None)),
        }
    })
}

impl<C: Chunks> Streaming<C> {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match self.updates.next().await {
                Some((prompt, used, Ok(update))) => self.take(prompt, used, update),
                Some((_, _, Err(error))) => self.fail(&error),
                None => self.end(),
            }
        }
    }

    fn take(&mut self, prompt: usize, used: Used, update: Update) {
        self.used[prompt] = used;
        for mut chunk in self.chunks.of(prompt, update) {
            if self.usage.when == StreamUsage::Continuously {
                chunk["usage"] = shape::usage(self.total(), self.usage.preemptions);
            }
            self.ready.push_back(event(&chunk));
        }
    }

    fn end(&mut self) {
        if self.usage.when != StreamUsage::Never {
            let mut chunk = self.chunks.empty();
            chunk["usage"] = shape::usage(self.total(), self.usage.preemptions);
            self.ready.push_back(event(&chunk));
        }
        self.ready.push_back(Event::default().data("[DONE]"));
        self.ended = true;
    }

    fn fail(&mut self, error: &ApiError) {
        self.ready.push_back(event(&error.body()));
        self.ended = true;
    }

    fn total(&self) -> Used {
        self.used.iter().copied().fold(Used::default(), Used::plus)
    }
}

fn event(value: &Value) -> Event {
    Event::default().data(value.to_string())
}
