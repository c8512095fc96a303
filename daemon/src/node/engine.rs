//! One engine process: started, fed, listened to, ended. Its parent is one thread that lives as long as the agent, since the
//! kernel ends an engine with the *thread* that started it.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{ChildStderr, ChildStdin, ChildStdout};
use tokio::sync::{mpsc, oneshot};

use crate::supervise::{self, Event};

/// Longest line of an engine's log or event, in bytes.
const LONGEST_LINE: u64 = 64 << 10;
/// Lines that may wait for a slow replica; then the engine waits too.
const WAITING_LINES: usize = 256;
/// From SIGTERM to SIGKILL.
const TERMINATION: Duration = Duration::from_secs(5);

/// Starts processes on one thread.
#[derive(Debug, Clone)]
pub struct Spawner {
    wanted: mpsc::Sender<Wanted>,
}

#[derive(Debug)]
struct Wanted {
    command: Command,
    started: oneshot::Sender<std::io::Result<Started>>,
}

#[derive(Debug)]
struct Started {
    pid: Pid,
    stdin: std::process::ChildStdin,
    stdout: std::process::ChildStdout,
    stderr: std::process::ChildStderr,
    ended: oneshot::Receiver<std::io::Result<ExitStatus>>,
}

impl Spawner {
    /// Starts the thread, which ends with the last clone of this.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start() -> std::io::Result<Self> {
        let (wanted, mut requests) = mpsc::channel::<Wanted>(16);
        std::thread::Builder::new().name("spawner".into()).spawn(move || {
            while let Some(Wanted { command, started }) = requests.blocking_recv() {
                // Who does not wait any more has dropped the process's pipes, which ends it.
                drop(started.send(spawn(command)));
            }
        })?;
        Ok(Self { wanted })
    }

    /// Starts an engine.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub async fn spawn(&self, command: Command) -> std::io::Result<Engine> {
        let gone = || std::io::Error::other("the spawning thread has ended");
        let (started, answer) = oneshot::channel();
        self.wanted.send(Wanted { command, started }).await.map_err(|_| gone())?;
        Engine::attach(answer.await.map_err(|_| gone())??)
    }
}

/// Starts a process in a group of its own and a thread that waits for its end.
fn spawn(mut command: Command) -> std::io::Result<Started> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let missing = || std::io::Error::other("a pipe of the engine is missing");
    let stdin = child.stdin.take().ok_or_else(missing)?;
    let stdout = child.stdout.take().ok_or_else(missing)?;
    let stderr = child.stderr.take().ok_or_else(missing)?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(missing)?;
    let (sender, ended) = oneshot::channel();
    std::thread::Builder::new().name("engine".into()).spawn(move || {
        // Nobody may be left to tell.
        drop(sender.send(child.wait()));
    })?;
    Ok(Started { pid, stdin, stdout, stderr, ended })
}

/// What an engine says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromEngine {
    Event(Event),
    Log(String),
}

/// A running engine. Dropping it closes its stdin, which ends it; [`Engine::end`] also waits.
#[derive(Debug)]
pub struct Engine {
    pid: Pid,
    stdin: Option<ChildStdin>,
    lines: mpsc::Receiver<FromEngine>,
    ended: oneshot::Receiver<std::io::Result<ExitStatus>>,
}

impl Engine {
    fn attach(started: Started) -> std::io::Result<Self> {
        let (sender, lines) = mpsc::channel(WAITING_LINES);
        read_events(ChildStdout::from_std(started.stdout)?, sender.clone());
        read_log(ChildStderr::from_std(started.stderr)?, sender);
        Ok(Self {
            pid: started.pid,
            stdin: Some(ChildStdin::from_std(started.stdin)?),
            lines,
            ended: started.ended,
        })
    }

    /// Tells the engine something.
    ///
    /// # Errors
    /// When it does not listen any more.
    pub async fn tell(&mut self, command: &supervise::Command) -> std::io::Result<()> {
        let line = command.to_line()? + "\n";
        match &mut self.stdin {
            Some(stdin) => stdin.write_all(line.as_bytes()).await,
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// The next thing it says; `None` once it has closed both of its outputs.
    pub async fn next(&mut self) -> Option<FromEngine> {
        self.lines.recv().await
    }

    /// Memory that is resident, in bytes; `None` when the process is gone.
    pub fn resident_bytes(&self) -> Option<u64> {
        let path = format!("/proc/{}/statm", self.pid.as_raw_nonzero());
        let text = std::fs::read_to_string(path).ok()?;
        let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
        Some(pages * rustix::param::page_size() as u64)
    }

    /// Ends the engine and everything it started, and gives how it ended once it is reaped.
    pub async fn end(mut self) -> String {
        self.stdin = None;
        // A process that has ended by itself is no longer there to be signalled.
        let _ = kill_process_group(self.pid, Signal::TERM);
        let ended = match tokio::time::timeout(TERMINATION, &mut self.ended).await {
            Ok(ended) => ended,
            Err(_) => {
                let _ = kill_process_group(self.pid, Signal::KILL);
                (&mut self.ended).await
            }
        };
        // What it started in its group goes with it.
        let _ = kill_process_group(self.pid, Signal::KILL);
        match ended {
            Ok(Ok(status)) => status.to_string(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "its end was not seen".to_owned(),
        }
    }
}

fn read_events(stdout: ChildStdout, sender: mpsc::Sender<FromEngine>) {
    tokio::spawn(async move {
        let mut stdout = BufReader::new(stdout);
        while let Some(line) = next_line(&mut stdout).await {
            let Ok(event) = serde_json::from_str(&line) else { continue };
            if sender.send(FromEngine::Event(event)).await.is_err() {
                return;
            }
        }
    });
}

/// The next line; `None` at the end of the pipe. One that is too long comes in several: reading goes on whatever is said,
/// since an engine whose pipe is closed fails at its next word.
async fn next_line(pipe: &mut (impl AsyncBufRead + Unpin)) -> Option<String> {
    let mut line = Vec::new();
    let read = pipe.take(LONGEST_LINE).read_until(b'\n', &mut line).await.ok()?;
    (read > 0).then(|| String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned())
}

fn read_log(stderr: ChildStderr, sender: mpsc::Sender<FromEngine>) {
    tokio::spawn(async move {
        let mut stderr = BufReader::new(stderr);
        while let Some(line) = next_line(&mut stderr).await {
            if sender.send(FromEngine::Log(line)).await.is_err() {
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn what_an_engine_says_arrives_and_its_end_is_told() {
        let spawner = Spawner::start().unwrap();
        let script = "echo a warning >&2; echo '{\"ready\":{}}'; echo nonsense; read line; echo \"got $line\" >&2; exit 3";
        let mut engine = spawner.spawn(shell(script)).await.unwrap();
        assert!(engine.resident_bytes().unwrap() > 0);
        engine.tell(&supervise::Command::Drain).await.unwrap();
        let mut said = Vec::new();
        while let Some(line) = engine.next().await {
            said.push(line);
        }
        assert!(said.contains(&FromEngine::Event(Event::Ready {})));
        assert!(said.contains(&FromEngine::Log("a warning".into())));
        assert!(said.contains(&FromEngine::Log("got {\"drain\":{}}".into())));
        assert_eq!(said.len(), 3);
        assert_eq!(engine.end().await, "exit status: 3");
    }

    #[tokio::test]
    async fn a_line_that_is_too_long_or_no_text_ends_no_log() {
        let spawner = Spawner::start().unwrap();
        let script = "head -c 200000 /dev/zero | tr '\\0' x >&2; printf '\\n\\377\\nlast\\n' >&2";
        let mut engine = spawner.spawn(shell(script)).await.unwrap();
        let mut said = Vec::new();
        while let Some(FromEngine::Log(line)) = engine.next().await {
            said.push(line);
        }
        assert_eq!(
            said.iter().filter(|line| line.starts_with('x')).map(String::len).sum::<usize>(),
            200_000
        );
        assert_eq!(said[said.len() - 2..], ["\u{FFFD}", "last"]);
        engine.end().await;
    }

    #[tokio::test]
    async fn an_engine_that_ignores_sigterm_is_killed_with_its_children() {
        let spawner = Spawner::start().unwrap();
        let script = "trap '' TERM; sleep 1000 & echo $! >&2; while :; do sleep 1; done";
        let mut engine = spawner.spawn(shell(script)).await.unwrap();
        let Some(FromEngine::Log(child)) = engine.next().await else { panic!("no pid") };
        assert_eq!(engine.end().await, "signal: 9 (SIGKILL)");
        let stat = format!("/proc/{child}/stat");
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        // Killed; whoever adopts it may not have reaped it yet.
        while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z")) {
            assert!(std::time::Instant::now() < deadline, "process {child} still runs");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
