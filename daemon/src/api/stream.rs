//! Server-sent events: what is new about any prompt of a body, as it comes.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream, SelectAll};
use serde_json::Value;
use tokio::time::Instant;

use super::error::ApiError;
use super::gather::{Gather, Update, Used};
use super::generation::{PreemptionDetails, StreamUsage};
use super::respond::Writer;
use super::shape;

/// When and how usage is told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UsagePlan {
    pub(crate) when: StreamUsage,
    pub(crate) preemptions: PreemptionDetails,
}

type Updates = SelectAll<BoxStream<'static, (usize, Used, Result<Update, ApiError>)>>;

struct Streaming<W> {
    updates: Updates,
    writer: W,
    /// Choices whose first chunk was made; `None` when all were.
    opened: Option<usize>,
    limit: Duration,
    deadline: Instant,
    usage: UsagePlan,
    used: Vec<Used>,
    /// Events ready to be sent.
    ready: VecDeque<Event>,
    ended: bool,
}

/// Answers with a stream that ends with `[DONE]`, or with an error object when the engine is gone or `limit` has passed.
pub(crate) fn respond<W: Writer>(
    gathers: Vec<Gather>,
    writer: W,
    usage: UsagePlan,
    limit: Duration,
) -> Response {
    let used = gathers.iter().map(|gather| gather.used).collect();
    let updates =
        gathers.into_iter().enumerate().map(|(index, gather)| follow(index, gather).boxed());
    let streaming = Streaming {
        updates: stream::select_all(updates),
        writer,
        opened: Some(0),
        limit,
        deadline: Instant::now() + limit,
        usage,
        used,
        ready: VecDeque::new(),
        ended: false,
    };
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

impl<W: Writer> Streaming<W> {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            if let Some(event) = self.open() {
                return Some(event);
            }
            match tokio::time::timeout_at(self.deadline, self.updates.next()).await {
                Ok(Some((prompt, used, Ok(update)))) => self.take(prompt, used, update),
                Ok(Some((_, _, Err(error)))) => self.fail(&error),
                Ok(None) => self.end(),
                Err(_) => self.fail(&ApiError::Timeout { limit: self.limit }),
            }
        }
    }

    /// The first chunk of the next choice, made when it is sent: a prompt that is echoed is held once.
    fn open(&mut self) -> Option<Event> {
        let index = self.opened.take()?;
        let chunk = self.writer.opening(index)?;
        self.opened = Some(index + 1);
        Some(self.of_choices(chunk))
    }

    fn take(&mut self, prompt: usize, used: Used, update: Update) {
        self.used[prompt] = used;
        for chunk in self.writer.chunks(prompt, update) {
            let event = self.of_choices(chunk);
            self.ready.push_back(event);
        }
    }

    /// A chunk that tells of a choice, with the usage so far where that is wanted.
    fn of_choices(&self, mut chunk: Value) -> Event {
        if self.usage.when == StreamUsage::Continuously {
            chunk["usage"] = shape::usage(self.total(), self.usage.preemptions);
        }
        event(&chunk)
    }

    fn end(&mut self) {
        if self.usage.when != StreamUsage::Never {
            let mut chunk = self.writer.empty();
            chunk["usage"] = shape::usage(self.total(), self.usage.preemptions);
            self.ready.push_back(event(&chunk));
        }
        self.ready.push_back(Event::default().data("[DONE]"));
        self.ended = true;
    }

    fn fail(&mut self, error: &ApiError) {
        // What still runs is cancelled.
        self.updates.clear();
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::gather::Whole;

    struct Openings(usize);

    impl Writer for Openings {
        fn whole(&self, _: Vec<Whole>) -> Value {
            Value::Null
        }
        fn opening(&mut self, index: usize) -> Option<Value> {
            (index < self.0).then(|| json!({"opening": index}))
        }
        fn chunks(&mut self, _: usize, _: Update) -> Vec<Value> {
            Vec::new()
        }
        fn empty(&self) -> Value {
            json!({"choices": []})
        }
    }

    /// A stream of a request of which nothing comes.
    fn silent(limit: Duration) -> Streaming<Openings> {
        Streaming {
            updates: stream::select_all([stream::pending().boxed()]),
            writer: Openings(2),
            opened: Some(0),
            limit,
            deadline: Instant::now() + limit,
            usage: UsagePlan { when: StreamUsage::AtEnd, preemptions: PreemptionDetails::Untold },
            used: Vec::new(),
            ready: VecDeque::new(),
            ended: false,
        }
    }

    #[tokio::test]
    async fn a_stream_that_takes_too_long_ends_with_an_error_and_cancels() {
        let mut streaming = silent(Duration::from_millis(50));
        let mut events = Vec::new();
        while let Some(event) = streaming.next().await {
            events.push(format!("{event:?}"));
        }
        assert_eq!(events.len(), 3, "{events:?}");
        assert!(events[0].contains("opening") && events[1].contains("opening"), "{events:?}");
        assert!(events[2].contains("timeout"), "{events:?}");
        assert!(streaming.updates.is_empty(), "what still ran was dropped");
    }
}
