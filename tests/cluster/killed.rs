//! An operator that is killed after its k-th write, for every k: the next one finishes what it began.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use rustix::process::{Pid, Signal, kill_process};

use crate::Test;
use crate::cluster::{Cluster, Namespace, PATIENCE, SYSTEM};

pub(crate) const TESTS: &[Test] =
    &[("an_operator_killed_after_any_of_its_writes_does_no_harm", killed_after_any_write)];

/// Writes for one model are fewer.
const MOST_WRITES: usize = 40;
/// An operator that has said how the model is and writes no more for this long has written all.
const QUIET: Duration = Duration::from_secs(2);
/// Of `kubectl proxy` and of the proxy before it.
const PLAIN: u16 = 18_200;
const COUNTED: u16 = 18_201;

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn killed_after_any_write(cluster: &Cluster) -> Result<()> {
    let deployment = ["-n", SYSTEM, "scale", "deployment/bindery-operator"];
    cluster.kubectl(&[&deployment[..], &["--replicas=0"]].concat())?;
    let done = each_write(cluster);
    cluster.kubectl(&[&deployment[..], &["--replicas=2"]].concat())?;
    cluster.kubectl(&[
        "-n",
        SYSTEM,
        "rollout",
        "status",
        "deployment/bindery-operator",
        "--timeout=60s",
    ])?;
    done
}

fn each_write(cluster: &Cluster) -> Result<()> {
    cluster.wait_until("no operator is left", || {
        let label = "app.kubernetes.io/component=operator";
        Ok(cluster.items(&["-n", SYSTEM, "pods", "-l", label])?.is_empty())
    })?;
    let space = cluster.namespace("interrupted")?;
    let _plain = Process(
        Command::new(cluster.program("kubectl")?)
            .env("KUBECONFIG", cluster.state.join("pki/admin.conf"))
            .args(["proxy", "--port", &PLAIN.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?,
    );
    let trap = Arc::new(Trap::default());
    let listener = TcpListener::bind(("127.0.0.1", COUNTED))?;
    std::thread::spawn({
        let trap = Arc::clone(&trap);
        move || guard(&listener, &trap)
    });
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("config");
    std::fs::write(&config, kubeconfig())?;
    for k in 1..=MOST_WRITES {
        let name = format!("m{k}");
        // Without replicas: what an operator writes is the same, but for later status.
        space.model(&name, &json!({"replicas": 0}))?;
        trap.writes.store(0, Ordering::SeqCst);
        trap.last.store(k, Ordering::SeqCst);
        let mut operator = start(&config)?;
        trap.operator.store(i32::try_from(operator.0.id())?, Ordering::SeqCst);
        let killed = is_killed(&space, &name, &mut operator)?;
        trap.last.store(0, Ordering::SeqCst);
        drop(operator);
        let _next = start(&config)?;
        let whole = space.wait_for_reason(&name, "ScaledToZero");
        whole.with_context(|| format!("killed after write {k}"))?;
        let children =
            space.kubectl(&["get", "deployment,service,pdb,networkpolicy", "-o", "name"])?;
        let ours = children.lines().filter(|line| line.ends_with(&format!("/{name}")));
        ensure!(ours.count() == 4, "killed after write {k}: {children}");
        space.kubectl(&["delete", "imodel", &name, "--wait=false"])?;
        if !killed {
            eprintln!("  killed after each of {} writes", k - 1);
            ensure!(k > 5, "only {k} writes were seen");
            return Ok(());
        }
    }
    anyhow::bail!("an operator that writes {MOST_WRITES} times for one model writes too often")
}

fn start(config: &Path) -> Result<Process> {
    let program = harness::binary()?.with_file_name("bindery-operator");
    let child = Command::new(program)
        .env("KUBECONFIG", config)
        .args([
            "--replica-image=localhost/bindery:dev",
            "--namespaces=interrupted",
            "--lease=interrupted",
        ])
        .args(["--port=18202", "--priority-class=bindery-replica"])
        .env("POD_NAMESPACE", SYSTEM)
        .env("POD_NAME", "interrupted")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    Ok(Process(child))
}

fn kubeconfig() -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": format!("http://127.0.0.1:{COUNTED}")}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    })
    .to_string()
}

/// Whether the trap has ended the operator; `false` once it has written all that it wants.
fn is_killed(space: &Namespace, name: &str, operator: &mut Process) -> Result<bool> {
    let mut said = None;
    space.cluster.wait("the k-th write, or no more", PATIENCE, || {
        if operator.0.try_wait()?.is_some() {
            return Ok(Some(true));
        }
        let is_told =
            space.condition(name, "Ready")?.is_some_and(|found| found.reason == "ScaledToZero");
        let since = is_told.then(|| *said.get_or_insert_with(Instant::now));
        Ok(since.is_some_and(|since| since.elapsed() > QUIET).then_some(false))
    })
}

/// Ends the operator as soon as the API server has answered its write number `last`, before it learns so.
#[derive(Debug, Default)]
struct Trap {
    writes: AtomicUsize,
    last: AtomicUsize,
    operator: AtomicI32,
}

impl Trap {
    /// Whether these bytes begin the last write. What keeps the lease and tells people is not counted.
    fn is_last(&self, bytes: &[u8]) -> bool {
        // A client sends the head of a request in one piece, after the answer to the one before.
        let line = bytes.split(|byte| *byte == b'\r').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        let is_write =
            ["PATCH ", "POST ", "PUT ", "DELETE "].iter().any(|method| line.starts_with(method));
        let is_counted = is_write && !line.contains("/leases") && !line.contains("/events");
        is_counted
            && self.writes.fetch_add(1, Ordering::SeqCst) + 1 == self.last.load(Ordering::SeqCst)
    }

    fn spring(&self) {
        let operator = Pid::from_raw(self.operator.load(Ordering::SeqCst));
        // It cannot have ended by itself, and is reaped by the test alone.
        operator.map(|operator| kill_process(operator, Signal::KILL).ok());
    }
}

/// Passes connections on until the trap springs.
fn guard(listener: &TcpListener, trap: &Arc<Trap>) {
    for client in listener.incoming().flatten() {
        let trap = Arc::clone(trap);
        std::thread::spawn(move || -> std::io::Result<()> {
            let server = TcpStream::connect(("127.0.0.1", PLAIN))?;
            let (from, to) = (server.try_clone()?, client.try_clone()?);
            let sprung = Arc::new(AtomicBool::new(false));
            std::thread::spawn({
                let (trap, sprung) = (Arc::clone(&trap), Arc::clone(&sprung));
                move || {
                    pass(from, to, |_| {
                        let is_answer = sprung.load(Ordering::SeqCst);
                        is_answer.then(|| trap.spring()).is_none()
                    })
                }
            });
            pass(client, server, |bytes| {
                if trap.is_last(bytes) {
                    sprung.store(true, Ordering::SeqCst);
                }
                true
            })
        });
    }
}

/// Passes bytes on for as long as `may_pass`.
fn pass(
    mut from: TcpStream,
    mut to: TcpStream,
    mut may_pass: impl FnMut(&[u8]) -> bool,
) -> std::io::Result<()> {
    let mut piece = vec![0; 64 << 10];
    loop {
        let n_bytes = from.read(&mut piece)?;
        if n_bytes == 0 || !may_pass(&piece[..n_bytes]) {
            return to.shutdown(std::net::Shutdown::Both);
        }
        to.write_all(&piece[..n_bytes])?;
    }
}
