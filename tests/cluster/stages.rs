//! What the time from `kubectl apply` to the first token is made of, on a warm node: printed, never asserted. And that a model
//! says how far its loading is.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::Test;
use crate::cluster::{AGENT, Cluster, ENGINE, Namespace, PATIENCE, REPLICA, WHOLE, signal};

pub(crate) const TESTS: &[Test] = &[
    ("from_apply_to_the_first_token_stage_by_stage", from_apply_to_the_first_token),
    ("a_model_that_loads_says_how_far_it_is", a_model_that_loads),
];

const PORT: u16 = 18_300;
const ROUNDS: usize = 3;

struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A stage is over when this first holds.
type Stage = (&'static str, fn(&Namespace, &Seen) -> bool);

/// What the API server and the replica say.
struct Seen {
    deployment: Value,
    pod: Value,
    state: String,
}

const STAGES: [Stage; 6] = [
    ("operator: Deployment written", |_, seen| seen.deployment["metadata"]["uid"].is_string()),
    ("Kubernetes: Pod made and bound", |_, seen| seen.pod["spec"]["nodeName"].is_string()),
    ("Kubernetes: container runs", |_, seen| !seen.state.is_empty()),
    ("agent: engine loads", |_, seen| {
        ["Loading", "AllReplicas"].iter().any(|word| seen.state.contains(word))
    }),
    ("engine: model loaded", |_, seen| seen.state.contains("AllReplicasReady")),
    ("Kubernetes: first token by the Service", |space, _| space.ask("m", "Hello", 1).is_ok()),
];

fn from_apply_to_the_first_token(cluster: &Cluster) -> Result<()> {
    let _proxy = Proxy(
        Command::new(cluster.program("kubectl")?)
            .env("KUBECONFIG", cluster.state.join("pki/admin.conf"))
            .args(["proxy", "--port", &PORT.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?,
    );
    let space = cluster.namespace("staged")?;
    let mut sums = [Duration::ZERO; STAGES.len()];
    let mut resident = Vec::new();
    for _ in 0..ROUNDS {
        for (sum, stage) in sums.iter_mut().zip(round(&space)?) {
            *sum += stage;
        }
        resident = residents(cluster)?;
        space.kubectl(&["delete", "imodel", "m"])?;
        cluster.wait_until("the round before is gone", || Ok(space.pods("m")?.is_empty()))?;
    }
    let mut total = Duration::ZERO;
    for (sum, (name, _)) in sums.iter().zip(STAGES) {
        let mean = *sum / u32::try_from(ROUNDS)?;
        total += mean;
        eprintln!("  {name:<40} {:>6.2} s", mean.as_secs_f64());
    }
    eprintln!("  {:<40} {:>6.2} s", "kubectl apply to the first token", total.as_secs_f64());
    for (program, mib) in resident {
        eprintln!("  {program:<40} {mib:>6} MiB resident");
    }
    Ok(())
}

/// The most that an agent and a replica of any node have resident, in MiB.
fn residents(cluster: &Cluster) -> Result<Vec<(&'static str, u64)>> {
    let of = |program: &'static str| {
        let mut most = 0;
        for node in ["node1", "node2"] {
            for pid in cluster.processes(node, program)? {
                let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
                let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
                let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
                most = most.max(kib.context("no VmRSS")? >> 10);
            }
        }
        Ok((program, most))
    };
    [AGENT, REPLICA].into_iter().map(of).collect()
}

/// How long each stage took.
fn round(space: &Namespace) -> Result<Vec<Duration>> {
    let spec = json!({"source": {"uri": WHOLE}, "engine": {"maxModelLen": 1024}});
    let mut since = Instant::now();
    space.model("m", &spec)?;
    let mut stages = Vec::new();
    for (name, is_over) in STAGES {
        let start = Instant::now();
        while !look(space).is_ok_and(|seen| is_over(space, &seen)) {
            if start.elapsed() > PATIENCE {
                bail!("{name} does not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        stages.push(since.elapsed());
        since = Instant::now();
    }
    Ok(stages)
}

fn look(space: &Namespace) -> Result<Seen> {
    let get = |path: &str| -> Result<Value> {
        let (_, text) = space.cluster.http_get(&format!("http://127.0.0.1:{PORT}{path}"))?;
        serde_json::from_str(&text).context("the API server's JSON")
    };
    let name = space.name;
    let deployment = get(&format!("/apis/apps/v1/namespaces/{name}/deployments/m"))?;
    let pods = get(&format!("/api/v1/namespaces/{name}/pods?labelSelector=bindery.dev/model%3Dm"))?;
    let pod = pods["items"][0].clone();
    let state = match pod["status"]["podIP"].as_str() {
        Some(ip) => space
            .cluster
            .http_get(&format!("http://{ip}:8001/state"))
            .map(|said| said.1)
            .unwrap_or_default(),
        None => String::new(),
    };
    Ok(Seen { deployment, pod, state })
}

/// Its engine is stopped in the midst of it: else it is over before the operator looks.
fn a_model_that_loads(cluster: &Cluster) -> Result<()> {
    cluster.wait_until_empty()?;
    let space = cluster.namespace("loading")?;
    let on_node1 = json!({"nodeSelector": {"kubernetes.io/hostname": "node1"}});
    space.model(
        "m",
        &json!({"source": {"uri": WHOLE}, "engine": {"maxModelLen": 1024}, "scheduling": on_node1}),
    )?;
    let engine = stop_while_it_loads(&space)?;
    let told = space.wait_for_reason("m", "Loading");
    let reconciling = space.condition("m", "Reconciling");
    signal(engine, Signal::CONT)?;
    let message = told?;
    ensure!(message.starts_with("loaded ") && message.contains(" of "), "{message}");
    ensure!(reconciling?.is_some_and(|found| found.reason == "Loading"), "it is not Reconciling");
    space.wait_until_ready("m")
}

/// Lets the engine run for a moment at a time until its replica says that it loads; gives the engine, stopped.
fn stop_while_it_loads(space: &Namespace) -> Result<i32> {
    const MOMENT: Duration = Duration::from_millis(3);
    let cluster = space.cluster;
    let start = Instant::now();
    let engine = loop {
        if let Some(engine) = cluster.processes("node1", ENGINE)?.first() {
            break *engine;
        }
        ensure!(start.elapsed() < PATIENCE, "no engine came");
    };
    signal(engine, Signal::STOP)?;
    let url = cluster.wait("the replica's address", PATIENCE, || {
        let pods = space.pods("m")?;
        let ip = pods[0]["status"]["podIP"].as_str();
        Ok(ip.map(|ip| format!("http://{ip}:8001/state")))
    })?;
    loop {
        let (_, state) = cluster.http_get(&url)?;
        if state.contains("Loading") {
            return Ok(engine);
        }
        ensure!(!state.contains("AllReplicasReady"), "it was over too soon");
        signal(engine, Signal::CONT)?;
        std::thread::sleep(MOMENT);
        signal(engine, Signal::STOP)?;
    }
}
