//! What the replica between a client and its engine costs: `cargo bench -p tests --bench hop -- MODEL.gguf`
//! (after `cargo build --release --workspace --bins`). Both ways are measured in turn, in one run.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "it prints a table")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::Value;

const DIRECT: u16 = 18_100;
const THROUGH: u16 = 18_101;
const HEALTH: u16 = 18_102;
/// Requests each way.
const REQUESTS: usize = 10_000;
const ROUNDS: usize = 3;

/// Ended with this process's own end.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn main() -> Result<()> {
    let model = std::env::args().nth(1).filter(|word| !word.starts_with("--"));
    let Some(model) = model else {
        eprintln!("NOT RUN: name a model: cargo bench -p tests --bench hop -- MODEL.gguf");
        return Ok(());
    };
    let bindery = harness::binary()?;
    let grant = tempfile::tempdir()?;
    let socket = grant.path().join("engine.sock");
    let start = |words: &[&str]| -> Result<Ended> {
        let quiet =
            Command::new(&bindery).args(words).stderr(Stdio::null()).stdout(Stdio::null()).spawn();
        Ok(Ended(quiet.context("start bindery")?))
    };
    let common = [
        "serve",
        &model,
        "--served-model-name",
        "m",
        "--max-model-len",
        "1024",
        "--kv-cache-memory-bytes",
        "256MiB",
    ];
    let port = DIRECT.to_string();
    let path = socket.display().to_string();
    let _direct = start(&[&common[..], &["--port", &port]].concat())?;
    let _engine = start(&[&common[..], &["--uds", &path]].concat())?;
    wait_for(&socket)?;
    let listener = UnixListener::bind(grant.path().join("claim.sock"))?;
    std::thread::spawn(move || grant_engine(&listener));
    let (port, health) = (THROUGH.to_string(), HEALTH.to_string());
    let folder = grant.path().display().to_string();
    let _replica = start(&[
        "replica",
        "file://m",
        "--grant",
        &folder,
        "--host",
        "127.0.0.1",
        "--port",
        &port,
        "--health-port",
        &health,
        "--termination-log",
        "/dev/null",
    ])?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(ready(DIRECT))?;
    runtime.block_on(ready(THROUGH))?;
    latency(&runtime)?;
    throughput(&bindery, grant.path())
}

fn wait_for(path: &Path) -> Result<()> {
    let start = Instant::now();
    while !path.exists() {
        ensure!(start.elapsed() < harness::PATIENCE, "no {}", path.display());
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// The agent's side of the claim: the engine is ready.
fn grant_engine(listener: &UnixListener) {
    for stream in listener.incoming().flatten() {
        let mut reader = BufReader::new(&stream);
        let mut line = String::new();
        if reader.read_line(&mut line).is_ok() {
            drop((&stream).write_all(b"{\"ready\":{\"socket\":\"engine.sock\"}}\n"));
            while matches!(reader.read_line(&mut line), Ok(1..)) {}
        }
    }
}

async fn connect(port: u16) -> Result<SendRequest<Empty<Bytes>>> {
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn ask(sender: &mut SendRequest<Empty<Bytes>>, path: &str) -> Result<u16> {
    sender.ready().await?;
    let request = hyper::Request::get(path).header("host", "m").body(Empty::new())?;
    let answer = sender.send_request(request).await?;
    let status = answer.status().as_u16();
    answer.into_body().collect().await?;
    Ok(status)
}

async fn ready(port: u16) -> Result<()> {
    let start = Instant::now();
    loop {
        if let Ok(mut sender) = connect(port).await
            && matches!(ask(&mut sender, "/readyz").await, Ok(200))
        {
            return Ok(());
        }
        ensure!(start.elapsed() < harness::PATIENCE, "port {port} does not answer");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Times of small requests, one each way in turn, so that whatever slows the machine slows both.
async fn times() -> Result<[Vec<Duration>; 2]> {
    let mut senders = [connect(DIRECT).await?, connect(THROUGH).await?];
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..REQUESTS {
        for (sender, times) in senders.iter_mut().zip(&mut times) {
            let start = Instant::now();
            ensure!(ask(sender, "/version").await? == 200, "no version");
            times.push(start.elapsed());
        }
    }
    Ok(times)
}

fn latency(runtime: &tokio::runtime::Runtime) -> Result<()> {
    let [mut direct, mut through] = runtime.block_on(times())?;
    direct.sort();
    through.sort();
    println!("{:<24}{:>12}{:>12}{:>12}", "GET /version", "direct", "replica", "added");
    for (name, part) in [("p50", 2), ("p90", 10), ("p99", 100)] {
        let at = direct.len() - direct.len() / part;
        let (direct, through) = (direct[at], through[at]);
        let added = through.saturating_sub(direct);
        println!(
            "{name:<24}{:>9} us{:>9} us{:>9} us",
            direct.as_micros(),
            through.as_micros(),
            added.as_micros()
        );
    }
    Ok(())
}

fn throughput(bindery: &Path, folder: &Path) -> Result<()> {
    let mut sums = [0.0, 0.0];
    for round in 0..ROUNDS {
        for (index, port) in [DIRECT, THROUGH].into_iter().enumerate() {
            sums[index] += tokens_per_second(bindery, port, &folder.join("said.json"), round)?;
        }
    }
    let [direct, through] = sums.map(|sum| sum / ROUNDS as f64);
    println!("{:<24}{:>12}{:>12}{:>12}", "64 streams", "direct", "replica", "ratio");
    println!(
        "{:<24}{direct:>12.1}{through:>12.1}{:>12.3}",
        "output tokens a second",
        through / direct
    );
    Ok(())
}

fn tokens_per_second(bindery: &Path, port: u16, said: &Path, seed: usize) -> Result<f64> {
    let url = format!("http://127.0.0.1:{port}");
    let status = Command::new(bindery)
        .args([
            "bench",
            "serve",
            "--base-url",
            &url,
            "--num-prompts",
            "128",
            "--max-concurrency",
            "64",
        ])
        .args(["--random-input-len", "16", "--random-output-len", "64", "--ignore-eos"])
        .args(["--seed", &seed.to_string(), "--json"])
        .arg(said)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    ensure!(status.success(), "bench serve: {status}");
    let said: Value = serde_json::from_slice(&std::fs::read(said)?)?;
    said["output_throughput"].as_f64().context("no output_throughput")
}
