//! An operator that is killed after its k-th write, for every k: the next one finishes what it began.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::Test;
use crate::cluster::{Cluster, SYSTEM};

pub(crate) const TESTS: &[Test] =
    &[("an_operator_killed_after_any_of_its_writes_does_no_harm", killed_after_any_write)];

/// Writes of one model's way to Ready are fewer.
const MOST_WRITES: usize = 40;
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
    let writes = Arc::new(AtomicUsize::new(0));
    let listener = TcpListener::bind(("127.0.0.1", COUNTED))?;
    std::thread::spawn({
        let writes = Arc::clone(&writes);
        move || count(&listener, &writes)
    });
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("config");
    std::fs::write(&config, kubeconfig())?;
    for k in 1..=MOST_WRITES {
        let name = format!("m{k}");
        writes.store(0, Ordering::SeqCst);
        space.model(&name, &json!({}))?;
        let mut operator = start(&config)?;
        let reached = cluster.wait("the k-th write, or Ready", crate::cluster::PATIENCE, || {
            let ready =
                space.condition(&name, "Ready")?.is_some_and(|found| found.status == "True");
            let reached = writes.load(Ordering::SeqCst) >= k;
            Ok((reached || ready).then_some(reached))
        })?;
        operator.0.kill()?;
        operator.0.wait()?;
        let _next = start(&config)?;
        space.wait_until_ready(&name).with_context(|| format!("killed after write {k}"))?;
        let children =
            space.kubectl(&["get", "deployment,service,pdb,networkpolicy", "-o", "name"])?;
        let ours = children.lines().filter(|line| line.ends_with(&format!("/{name}")));
        ensure!(ours.count() == 4, "killed after write {k}: {children}");
        space.kubectl(&["delete", "imodel", &name, "--wait=false"])?;
        if !reached {
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

/// Passes connections on and counts the requests that write, the lease's and the events' included.
fn count(listener: &TcpListener, writes: &Arc<AtomicUsize>) {
    for client in listener.incoming().flatten() {
        let writes = Arc::clone(writes);
        std::thread::spawn(move || -> std::io::Result<()> {
            let server = TcpStream::connect(("127.0.0.1", PLAIN))?;
            let (from, to) = (server.try_clone()?, client.try_clone()?);
            std::thread::spawn(move || pass(from, to, |_| ()));
            pass(client, server, |bytes| {
                // A client sends the head of a request in one piece, after the answer to the one before.
                let is_write = ["PATCH ", "POST ", "PUT ", "DELETE "]
                    .iter()
                    .any(|method| bytes.starts_with(method.as_bytes()));
                if is_write {
                    writes.fetch_add(1, Ordering::SeqCst);
                }
            })
        });
    }
}

fn pass(
    mut from: TcpStream,
    mut to: TcpStream,
    mut look: impl FnMut(&[u8]),
) -> std::io::Result<()> {
    let mut piece = vec![0; 64 << 10];
    loop {
        let n_bytes = from.read(&mut piece)?;
        if n_bytes == 0 {
            return to.shutdown(std::net::Shutdown::Both);
        }
        to.write_all(&piece[..n_bytes])?;
        look(&piece[..n_bytes]);
    }
}
