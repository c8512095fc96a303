//! Starts `bindery serve` and speaks with it. Everything waits for a condition with a deadline and ends what it started.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures_util::StreamExt;
use serde_json::Value;

/// How long anything may take on a slow machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The `bindery` binary beside the running test.
///
/// # Errors
/// When it was not built.
pub fn binary() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let folder = test
        .parent()
        .and_then(|deps| deps.parent())
        .context("the test runs in target/PROFILE/deps")?;
    let binary = folder.join("bindery");
    if !binary.exists() {
        bail!("{} is not there: build it with 'cargo build --bin bindery'", binary.display());
    }
    Ok(binary)
}

/// SmolLM2-135M-Instruct, or `None` and a loud line where it was not fetched.
pub fn model(test: &str) -> Option<PathBuf> {
    fetched(test, "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// The same model as a folder in Hugging Face layout, or `None` and a loud line where it was not made.
pub fn model_folder(test: &str) -> Option<PathBuf> {
    fetched(test, "smollm2-safetensors")
}

/// The same model as two files, of which this is the first, or `None` and a loud line where they were not made.
pub fn split_model(test: &str) -> Option<PathBuf> {
    fetched(test, "smollm2-split/model-00001-of-00002.gguf")
}

fn fetched(test: &str, name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("BINDERY_TEST_MODEL_DIR").filter(|folder| !folder.is_empty());
    let model = folder.map(|folder| PathBuf::from(folder).join(name));
    let found = model.filter(|model| model.exists());
    if found.is_none() {
        eprintln!("NOT RUN: {test}, BINDERY_TEST_MODEL_DIR names no folder with {name}");
    }
    found
}

/// A running server; ended when it is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    pub url: String,
    log: Arc<Mutex<String>>,
}

impl Server {
    /// Starts `bindery serve` with `flags` on a free port and waits until it is ready.
    ///
    /// # Errors
    /// When it ends or is not ready in time, with its log.
    pub async fn start(model: &std::path::Path, flags: &[&str]) -> Result<Self> {
        Self::spawn(model, flags, &[])?.ready().await
    }

    /// Waits until it listens on a port and is ready.
    ///
    /// # Errors
    /// When it ends or is not ready in time, with its log.
    pub async fn ready(self) -> Result<Self> {
        let mut server = self;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = server.child.try_wait()? {
                bail!("the server ended with {status}:\n{}", server.log());
            }
            if let Some(port) = server.port() {
                server.url = format!("http://127.0.0.1:{port}");
                return Ok(server);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("not ready in {PATIENCE:?}:\n{}", server.log())
    }

    /// Starts `bindery serve` with `flags` and `variables`, and waits for nothing.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(
        model: &std::path::Path,
        flags: &[&str],
        variables: &[(&str, &str)],
    ) -> Result<Self> {
        let mut child = Command::new(binary()?)
            .arg("serve")
            .arg(model)
            .args(["--served-model-name", "tiny", "--port", "0", "--log-level", "info"])
            .args(flags)
            .env("NO_COLOR", "1")
            .envs(variables.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .context("start bindery")?;
        let log = Arc::new(Mutex::new(String::new()));
        let stderr = child.stderr.take().context("read its log")?;
        let lines = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut log = lines.lock().unwrap_or_else(PoisonError::into_inner);
                log.push_str(&line);
                log.push('\n');
            }
        });
        Ok(Self { child, url: String::new(), log })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until its log contains `words`.
    ///
    /// # Errors
    /// When it does not in time.
    pub async fn wait_log(&self, words: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.log().contains(words) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("{words:?} is not in the log after {PATIENCE:?}:\n{}", self.log())
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The port of its "ready" line.
    fn port(&self) -> Option<u16> {
        let log = self.log();
        let line = log
            .lines()
            .find(|line| line.contains("ready") && line.contains("http://127.0.0.1:"))?;
        let digits: String = line
            .split("http://127.0.0.1:")
            .nth(1)?
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        digits.parse().ok()
    }

    /// Sends SIGTERM.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn terminate(&self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.context("a pid")?, rustix::process::Signal::TERM)?;
        Ok(())
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// When it has not in time.
    pub async fn wait(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("not ended in {PATIENCE:?}:\n{}", self.log())
    }

    /// Posts JSON; gives the status and the body (`null` when it is no JSON).
    ///
    /// # Errors
    /// When no answer comes.
    pub async fn post(&self, path: &str, body: &Value) -> Result<(u16, Value)> {
        let answer = reqwest::Client::new()
            .post(format!("{}{path}", self.url))
            .json(body)
            .timeout(PATIENCE)
            .send()
            .await?;
        let status = answer.status().as_u16();
        Ok((status, serde_json::from_str(&answer.text().await?).unwrap_or(Value::Null)))
    }

    /// Posts JSON and expects 200.
    ///
    /// # Errors
    /// When the answer is another.
    pub async fn ask(&self, path: &str, body: &Value) -> Result<Value> {
        match self.post(path, body).await? {
            (200, answer) => Ok(answer),
            (status, answer) => bail!("{path} answered {status}: {answer}\nto {body}"),
        }
    }

    /// Posts JSON with `stream: true`; gives the chunks, which must end with `[DONE]`.
    ///
    /// # Errors
    /// When the stream is cut off or holds what is no JSON.
    pub async fn stream(&self, path: &str, mut body: Value) -> Result<Vec<Value>> {
        body["stream"] = true.into();
        let url = format!("{}{path}", self.url);
        let answer =
            reqwest::Client::new().post(url).json(&body).timeout(PATIENCE * 3).send().await?;
        if answer.status() != 200 {
            bail!("{path} answered {}: {}", answer.status(), answer.text().await?);
        }
        let mut bytes = Vec::new();
        let mut chunks = answer.bytes_stream();
        while let Some(chunk) = chunks.next().await {
            bytes.extend_from_slice(&chunk?);
        }
        let text = String::from_utf8(bytes).context("a stream is UTF-8")?;
        let mut events: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        if events.pop() != Some("[DONE]") {
            bail!("the stream does not end with [DONE]: {text}");
        }
        events
            .into_iter()
            .map(|event| serde_json::from_str(event).with_context(|| event.to_owned()))
            .collect()
    }

    /// The value of a metric's first series that contains `labels`.
    ///
    /// # Errors
    /// When there is none.
    pub async fn metric(&self, name: &str, labels: &str) -> Result<f64> {
        let text = reqwest::get(format!("{}/metrics", self.url)).await?.text().await?;
        let series = text.lines().find(|line| {
            line.starts_with(name)
                && line[name.len()..].starts_with(['{', ' '])
                && line.contains(labels)
        });
        let value =
            series.and_then(|line| line.rsplit(' ').next()).context(format!("{name} {labels}"))?;
        Ok(value.parse()?)
    }

    /// Waits until a metric has a value.
    ///
    /// # Errors
    /// When it has not in time.
    pub async fn wait_metric(&self, name: &str, labels: &str, wanted: f64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut last = f64::NAN;
        while Instant::now() < deadline {
            last = self.metric(name, labels).await?;
            if (last - wanted).abs() < 1e-9 {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("{name} {labels} is {last}, wanted {wanted}")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Runs `bindery` to its end; gives its exit code and what it printed.
///
/// # Errors
/// When it cannot be started.
pub fn run(args: &[&str]) -> Result<(i32, String, String)> {
    let mut child =
        Command::new(binary()?).args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().context("stdout")?.read_to_string(&mut out)?;
    child.stderr.take().context("stderr")?.read_to_string(&mut err)?;
    Ok((child.wait()?.code().unwrap_or(-1), out, err))
}
