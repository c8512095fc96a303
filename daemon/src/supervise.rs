//! An engine under a node agent: one JSON command a line comes in on stdin, one JSON event a line goes out on stdout.
//! Says nothing of how a command is obeyed; `bindery serve --supervised` does that.

use std::collections::VecDeque;
use std::io::{BufRead, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::config::ApiKey;

/// The longest line that is read: the keys of the longest claim fit in.
const LONGEST_LINE: u64 = 2 * crate::claim::LONGEST_LINE as u64;

/// What the agent tells the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Finish the running requests; go on accepting new ones until stdin ends.
    Drain,
    /// From now on these keys are good, and no other.
    ApiKeys(Vec<ApiKey>),
}

/// What the engine tells the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// Weights that are in memory, of all.
    Loading { bytes: u64, total_bytes: u64 },
    /// The model can answer.
    Ready {},
    /// Requests inside the engine, waiting ones included.
    InFlight { requests: u64 },
    /// Requests that clients began since the start; probes and scrapes are not among them.
    Begun { requests: u64 },
    /// The engine ends.
    Failed { reason: FailureReason, message: String },
}

/// Why an engine ends; the words of a replica's termination message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureReason {
    EngineCrashed,
    UnsupportedModel,
    UnsupportedDevice,
    ChecksumMismatch,
    Unauthorized,
    MemoryGrantTooSmall,
    InvalidConfiguration,
}

impl From<FailureReason> for crds::Reason {
    fn from(reason: FailureReason) -> Self {
        match reason {
            FailureReason::EngineCrashed => Self::EngineCrashed,
            FailureReason::UnsupportedModel => Self::UnsupportedModel,
            FailureReason::UnsupportedDevice => Self::UnsupportedDevice,
            FailureReason::ChecksumMismatch => Self::ChecksumMismatch,
            FailureReason::Unauthorized => Self::Unauthorized,
            FailureReason::MemoryGrantTooSmall => Self::MemoryGrantTooSmall,
            FailureReason::InvalidConfiguration => Self::InvalidSpec,
        }
    }
}

/// A line that is no command.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    #[error("a command has at most {LONGEST_LINE} bytes, got more")]
    TooLong,
    #[error("wanted {{\"drain\":{{}}}} or {{\"api_keys\":[..]}}: {0}")]
    NotACommand(serde_json::Error),
    #[error("an API key has 1 to 1024 printable ASCII characters and no spaces")]
    BadKey,
}

/// A command as it stands on its line.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Line {
    Drain {},
    ApiKeys(Vec<String>),
}

impl Command {
    /// The line that says this, without its end.
    ///
    /// # Errors
    /// When a key cannot be written, which no key is.
    pub fn to_line(&self) -> serde_json::Result<String> {
        serde_json::to_string(&match self {
            Self::Drain => Line::Drain {},
            Self::ApiKeys(keys) => {
                Line::ApiKeys(keys.iter().map(|key| key.expose().to_owned()).collect())
            }
        })
    }

    /// Reads one line.
    ///
    /// # Errors
    /// When it is no command; the error does not repeat the line, which may hold a key.
    pub fn from_line(line: &str) -> Result<Self, LineError> {
        match serde_json::from_str(line).map_err(LineError::NotACommand)? {
            Line::Drain {} => Ok(Self::Drain),
            Line::ApiKeys(keys) => {
                let keys = keys.into_iter().map(ApiKey::new).collect::<Option<_>>();
                keys.map(Self::ApiKeys).ok_or(LineError::BadKey)
            }
        }
    }
}

/// Reads commands on a thread of its own. The channel closes when the input ends: the engine then ends too.
/// A line that is no command is logged and passed over. A full channel (16) stops the reading.
///
/// # Errors
/// When the thread cannot be started.
pub fn read_commands(
    input: impl Read + Send + 'static,
) -> std::io::Result<mpsc::Receiver<Command>> {
    let (sender, receiver) = mpsc::channel(16);
    let read = move || {
        let mut input = std::io::BufReader::new(input);
        while let Some(line) = next_line(&mut input) {
            match line.and_then(|line| Command::from_line(&line)) {
                Ok(command) => {
                    if sender.blocking_send(command).is_err() {
                        return;
                    }
                }
                Err(error) => tracing::error!(%error, "the agent sent a line that is no command"),
            }
        }
    };
    std::thread::Builder::new().name("commands".into()).spawn(read)?;
    Ok(receiver)
}

/// The next line that is not blank; `None` at the end of the input. Of a line that is too long the rest is passed over.
fn next_line(input: &mut impl BufRead) -> Option<Result<String, LineError>> {
    loop {
        let mut line = Vec::new();
        let read = input.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line).ok()?;
        if read == 0 {
            return None;
        }
        if line.last() != Some(&b'\n') && read as u64 == LONGEST_LINE {
            input.skip_until(b'\n').ok()?;
            return Some(Err(LineError::TooLong));
        }
        // Bytes that are no text are no JSON either.
        let text = String::from_utf8_lossy(&line);
        if !text.trim().is_empty() {
            return Some(Ok(text.trim().to_owned()));
        }
    }
}

/// Writes events on a thread of its own, so that a slow agent stops nobody.
/// Of each figure only the newest waits to be written; ready and failed always are. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Reporter {
    shared: Arc<Shared>,
}

/// Ends the writing thread once all was written.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    pending: Mutex<Pending>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Pending {
    /// In the order of their arrival, at most one of each figure.
    events: VecDeque<Event>,
    closed: Closed,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Closed {
    #[default]
    No,
    Yes,
}

/// Starts to write events to `output`.
///
/// # Errors
/// When the thread cannot be started.
pub fn write_events(output: impl Write + Send + 'static) -> std::io::Result<(Reporter, Writer)> {
    let shared = Arc::new(Shared::default());
    let reporter = Reporter { shared: Arc::clone(&shared) };
    let thread = std::thread::Builder::new().name("events".into()).spawn({
        let shared = Arc::clone(&shared);
        move || shared.write_all(output)
    })?;
    Ok((reporter, Writer { shared, thread }))
}

impl Reporter {
    /// Queues an event; never waits for the agent.
    pub fn report(&self, event: Event) {
        let mut pending = self.shared.lock();
        let is_same =
            |other: &Event| std::mem::discriminant(other) == std::mem::discriminant(&event);
        match pending.events.iter_mut().find(|other| is_same(other)) {
            Some(older) => *older = event,
            None => pending.events.push_back(event),
        }
        self.shared.changed.notify_one();
    }
}

impl Writer {
    /// Waits until everything that was reported is written.
    pub fn finish(self) {
        self.shared.lock().closed = Closed::Yes;
        self.shared.changed.notify_one();
        // A panic of the thread has already been printed.
        let _ = self.thread.join();
    }
}

impl Shared {
    /// Nothing that holds this lock can leave it half changed, so a poisoned one is good.
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<Event> {
        let waits =
            |pending: &mut Pending| pending.events.is_empty() && pending.closed == Closed::No;
        let mut pending =
            self.changed.wait_while(self.lock(), waits).unwrap_or_else(PoisonError::into_inner);
        pending.events.pop_front()
    }

    fn write_all(&self, mut output: impl Write) {
        while let Some(event) = self.next() {
            let written = serde_json::to_writer(&mut output, &event).map_err(std::io::Error::from);
            let written =
                written.and_then(|()| output.write_all(b"\n")).and_then(|()| output.flush());
            if let Err(error) = written {
                // The agent is gone; the end of stdin ends this process.
                tracing::error!(%error, "cannot tell the agent what happens");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps what is written where the test can see it.
    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn commands(input: &str) -> Vec<Command> {
        let mut receiver = read_commands(std::io::Cursor::new(input.to_owned())).unwrap();
        std::iter::from_fn(|| receiver.blocking_recv()).collect()
    }

    #[test]
    fn commands_are_read_until_the_input_ends() {
        let keys = vec![ApiKey::new("a".into()).unwrap(), ApiKey::new("b".into()).unwrap()];
        let read = commands("{\"api_keys\":[\"a\",\"b\"]}\n\n{\"drain\":{}}");
        assert_eq!(read, [Command::ApiKeys(keys), Command::Drain]);
    }

    #[test]
    fn a_command_is_read_as_it_was_written() {
        for command in [Command::Drain, Command::ApiKeys(vec![ApiKey::new("sk-1".into()).unwrap()])]
        {
            assert_eq!(Command::from_line(&command.to_line().unwrap()).unwrap(), command);
        }
    }

    #[test]
    fn lines_that_are_no_command_are_passed_over() {
        let long = "x".repeat(1_200_000);
        let input = format!(
            "drain\n{{\"drain\":{{\"x\":1}}}}\n{{\"api_keys\":[\"\"]}}\n{{\"stop\":{{}}}}\n{long}\n{{\"drain\":{{}}}}\n"
        );
        assert_eq!(commands(&input), [Command::Drain]);
    }

    #[test]
    fn as_many_keys_as_a_claim_can_hold_are_read() {
        let key = |i: usize| ApiKey::new(format!("{i:01000}")).unwrap();
        let keys = Command::ApiKeys((0..256).map(key).collect());
        let line = keys.to_line().unwrap();
        assert!(line.len() > 250_000, "{}", line.len());
        assert_eq!(commands(&line), [keys]);
    }

    #[test]
    fn an_error_does_not_repeat_a_key() {
        let error = Command::from_line("{\"api_keys\":[\"sk secret\"]}").unwrap_err();
        assert!(!error.to_string().contains("secret"));
    }

    #[test]
    fn every_event_is_one_line_of_json() {
        let written = Written::default();
        let (reporter, writer) = write_events(written.clone()).unwrap();
        reporter.report(Event::Loading { bytes: 1, total_bytes: 2 });
        reporter.report(Event::Ready {});
        reporter.report(Event::Failed {
            reason: FailureReason::UnsupportedModel,
            message: "a\nb".into(),
        });
        writer.finish();
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        let wanted = "{\"loading\":{\"bytes\":1,\"total_bytes\":2}}\n{\"ready\":{}}\n\
            {\"failed\":{\"reason\":\"UnsupportedModel\",\"message\":\"a\\nb\"}}\n";
        assert_eq!(text, wanted);
    }

    #[test]
    fn a_slow_agent_sees_the_newest_figure_and_nothing_grows() {
        let shared = Arc::new(Shared::default());
        let reporter = Reporter { shared: Arc::clone(&shared) };
        for requests in 0..1000 {
            reporter.report(Event::InFlight { requests });
            reporter.report(Event::Begun { requests });
        }
        assert_eq!(shared.lock().events.len(), 2);
        assert_eq!(shared.next(), Some(Event::InFlight { requests: 999 }));
    }
}
