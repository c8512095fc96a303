//! Chat templates: Jinja as Hugging Face renders it, within limits, since a client may bring its own.

mod functions;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind};
use regex::Regex;
use serde_json::{Map, Value};

use super::{ChatRequest, SpecialTexts, TextError};

/// Longest source of a template, in bytes.
const MAX_SOURCE_BYTES: usize = 64 << 10;
/// Longest prompt that a template may write, in bytes.
const MAX_PROMPT_BYTES: usize = 16 << 20;
/// Work that one rendering may do: about as many instructions, or 64 bytes of data each.
const FUEL: u64 = 500_000;
/// Stack of the thread that parses and renders. The engine recurses along chains of operators and nested values, which
/// the limits on source and fuel bound to some hundred thousand frames; the pages count only when they are touched.
const STACK_BYTES: usize = 256 << 20;
/// Parsing or rendering that takes longer has failed. Fuel does not count everything: lists that are joined with
/// themselves and comparisons of lists that share parts can take for ever. A long chat takes some 10 ms.
const DEADLINE: Duration = Duration::from_secs(5);
/// Threads that may be past the deadline at once. They cannot be ended; each takes a core, and memory that only the
/// process's own limit bounds. When so many are stuck, no template is rendered until one of them ends.
const MOST_STUCK: usize = 4;
static STUCK: AtomicUsize = AtomicUsize::new(0);
/// Depth of macros and loops that call themselves.
const MAX_RECURSION: usize = 100;
/// The name of the one template.
const NAME: &str = "chat";
/// What `continue_final_message` looks for. The space at its end tells whether the template trims.
const MARKER: &str = "\u{1}continue\u{1} ";
/// Variables that `chat_template_kwargs` may not set.
const RESERVED: [&str; 4] = ["messages", "add_generation_prompt", "bos_token", "eos_token"];

/// Hugging Face marks the assistant's tokens with these tags; they write nothing.
static GENERATION: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("the pattern is constant")
});

/// A template that parses.
#[derive(Debug)]
pub(super) struct Template {
    environment: Arc<Environment<'static>>,
    limit: Duration,
}

impl Template {
    /// Parses a template.
    ///
    /// # Errors
    /// [`TextError::Template`] with the place that is wrong.
    pub(super) fn parse(source: &str) -> Result<Self, TextError> {
        if source.len() > MAX_SOURCE_BYTES {
            let got = source.len();
            return Err(failed(format!("{got} bytes long, wanted at most {MAX_SOURCE_BYTES}")));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| failed(error.to_string()))?);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MAX_RECURSION);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        functions::add(&mut environment);
        let source = without_generation(source);
        let environment = on_own_thread(DEADLINE, move || {
            let added = environment.add_template_owned(NAME, source);
            added.map_err(|error| failed(message(&error)))?;
            Ok(environment)
        })?;
        Ok(Self { environment: Arc::new(environment), limit: DEADLINE })
    }

    /// Renders a chat.
    ///
    /// # Errors
    /// [`TextError::Template`] with the reason.
    pub(super) fn render(
        &self,
        chat: &ChatRequest<'_>,
        specials: &SpecialTexts,
    ) -> Result<String, TextError> {
        if !chat.continue_final_message {
            return self.prompt(chat, specials, chat.messages.clone());
        }
        if chat.add_generation_prompt {
            let reason = "continue_final_message excludes add_generation_prompt";
            return Err(failed(reason.to_owned()));
        }
        let prompt = self.prompt(chat, specials, marked(chat.messages)?)?;
        cut_at_marker(&prompt)
    }

    fn prompt(
        &self,
        chat: &ChatRequest<'_>,
        specials: &SpecialTexts,
        messages: Value,
    ) -> Result<String, TextError> {
        let variables = variables(chat, specials, messages)?;
        let environment = Arc::clone(&self.environment);
        let prompt = on_own_thread(self.limit, move || {
            let template = environment.get_template(NAME);
            let rendered = template.and_then(|template| template.render(variables));
            rendered.map_err(|error| failed(message(&error)))
        })?;
        if prompt.len() > MAX_PROMPT_BYTES {
            let got = prompt.len();
            return Err(failed(format!("wrote {got} bytes, wanted at most {MAX_PROMPT_BYTES}")));
        }
        Ok(prompt)
    }
}

fn failed(reason: String) -> TextError {
    TextError::Template { reason }
}

/// Runs `work` on a thread with room for deep recursion, and waits for it until the deadline. A panic in it is the
/// template's failure.
fn on_own_thread<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> Result<T, TextError> + Send + 'static,
) -> Result<T, TextError> {
    if STUCK.load(Ordering::Relaxed) >= MOST_STUCK {
        return Err(failed(format!("{MOST_STUCK} chats are stuck in it, no other is tried")));
    }
    let (sender, done) = sync_channel(1);
    let given_up = Arc::new(AtomicBool::new(false));
    let ending = Ending(Arc::clone(&given_up));
    let thread = std::thread::Builder::new().name(NAME.to_owned()).stack_size(STACK_BYTES);
    let started = thread.spawn(move || {
        let _ending = ending;
        // Nobody waits for it any more when it cannot be sent.
        drop(sender.send(work()));
    });
    started.map_err(|error| failed(format!("start its thread: {error}")))?;
    match done.recv_timeout(limit) {
        Ok(done) => done,
        Err(RecvTimeoutError::Disconnected) => Err(failed("the renderer failed".to_owned())),
        Err(RecvTimeoutError::Timeout) => {
            STUCK.fetch_add(1, Ordering::Relaxed);
            drop(Ending(given_up));
            Err(failed(format!("did not end within {} s", limit.as_secs_f32())))
        }
    }
}

/// Dropped by the thread when it ends and by its owner when it gives up: the second of them says that the thread is
/// stuck no more.
struct Ending(Arc<AtomicBool>);

impl Drop for Ending {
    fn drop(&mut self) {
        if self.0.swap(true, Ordering::Relaxed) {
            STUCK.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// What went wrong and where, in one line, with the causes.
fn message(error: &minijinja::Error) -> String {
    let mut text = match error.kind() {
        ErrorKind::OutOfFuel => "it does more work than a chat template may".to_owned(),
        _ => error.to_string(),
    };
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

fn without_generation(source: &str) -> String {
    let tag = |found: &regex::Captures<'_>| {
        let word = if found.get(2).is_some() { "endif" } else { "if true" };
        let sign = |group| found.get(group).map_or("", |sign| sign.as_str());
        format!("{{%{} {word} {}%}}", sign(1), sign(3))
    };
    GENERATION.replace_all(source, tag).into_owned()
}

fn variables(
    chat: &ChatRequest<'_>,
    specials: &SpecialTexts,
    messages: Value,
) -> Result<minijinja::Value, TextError> {
    if let Some(key) = chat.kwargs.keys().find(|key| RESERVED.contains(&key.as_str())) {
        return Err(failed(format!("chat_template_kwargs may not set {key:?}")));
    }
    let mut variables = Map::new();
    for absent in ["tools", "documents"] {
        variables.insert(absent.to_owned(), Value::Null);
    }
    // A model without BOS or EOS writes nothing for them.
    for (key, text) in [("bos_token", &specials.bos), ("eos_token", &specials.eos)] {
        variables.insert(key.to_owned(), Value::String(text.clone().unwrap_or_default()));
    }
    for (key, text) in [("unk_token", &specials.unk), ("pad_token", &specials.pad)] {
        if let Some(text) = text {
            variables.insert(key.to_owned(), Value::String(text.clone()));
        }
    }
    variables.extend(chat.kwargs.clone());
    variables.insert("messages".to_owned(), messages);
    variables.insert("add_generation_prompt".to_owned(), chat.add_generation_prompt.into());
    Ok(minijinja::Value::from(minijinja::value::Serde(variables)))
}

/// The messages with [`MARKER`] at the end of the final one's text.
fn marked(messages: &Value) -> Result<Value, TextError> {
    let mut messages = messages.clone();
    let content = messages
        .as_array_mut()
        .and_then(|messages| messages.last_mut())
        .and_then(|message| message.get_mut("content"));
    let text = match content {
        Some(Value::Array(parts)) => parts.last_mut().and_then(|part| part.get_mut("text")),
        other => other,
    };
    match text {
        Some(Value::String(text)) => text.push_str(MARKER),
        _ => {
            let reason = "continue_final_message wants a final message with text";
            return Err(failed(reason.to_owned()));
        }
    }
    Ok(messages)
}

/// Ends the prompt where the marker stands; trims it there when the template trims.
fn cut_at_marker(prompt: &str) -> Result<String, TextError> {
    let Some((before, after)) = prompt.rsplit_once(MARKER.trim_end()) else {
        let reason = "the final message is not in the prompt, so it cannot be continued";
        return Err(failed(reason.to_owned()));
    };
    let kept = if after.starts_with(' ') { before } else { before.trim_end() };
    Ok(kept.to_owned())
}

#[cfg(test)]
mod tests;
