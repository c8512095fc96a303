//! Nodes that are drained, crash, and come back.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use crate::Test;
use crate::cluster::{Cluster, ENGINE, Namespace, PATIENCE, SYSTEM, patient};
use crate::load::Load;

pub(crate) const TESTS: &[Test] = &[
    ("a_node_is_drained_under_load", a_node_is_drained_under_load),
    ("a_node_crashes_and_comes_back_with_its_disk", a_node_crashes_and_comes_back),
];

fn a_node_is_drained_under_load(cluster: &Cluster) -> Result<()> {
    cluster.wait_until_empty()?;
    let space = cluster.namespace("drained")?;
    // Both replicas on the node that is drained: without its budget the model would be gone for a while.
    let on_node1 = json!({"replicas": 2, "rollout": patient()});
    cluster.kubectl(&["cordon", "node2"])?;
    let placed = space.model("m", &on_node1).and_then(|_| space.wait_until_ready("m"));
    cluster.kubectl(&["uncordon", "node2"])?;
    placed?;
    ensure!(space.pods("m")?.iter().all(|pod| pod["spec"]["nodeName"] == "node1"), "not on node1");
    let load = Load::start(&space, "m", 16, 16)?;
    std::thread::sleep(Duration::from_secs(1));
    let drain = [
        "drain",
        "node1",
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        "--timeout=150s",
        "--pod-selector=bindery.dev/model",
    ];
    let (drained, seen) = std::thread::scope(|scope| {
        let drained = scope.spawn(|| cluster.kubectl(&drain));
        let seen = watch_replicas(&space, || !drained.is_finished());
        (drained.join(), seen)
    });
    let drained = drained.unwrap_or_else(|_| Err(anyhow!("kubectl drain was not waited for")));
    let back = cluster.wait("both replicas are on the other node", PATIENCE, || {
        let pods = space.pods("m")?;
        let there = |pod: &&Value| {
            pod["spec"]["nodeName"] == "node2" && pod["metadata"]["deletionTimestamp"].is_null()
        };
        Ok((pods.len() == 2 && pods.iter().filter(there).count() == 2).then_some(()))
    });
    let ready = space.wait_until_ready("m");
    cluster.kubectl(&["uncordon", "node1"])?;
    drained?;
    back?;
    ready?;
    let done = load.finish(cluster)?.ensure_nothing_failed();
    let fewest = seen.iter().map(|(_, (n_endpoints, _))| *n_endpoints).min();
    ensure!(
        fewest == Some(1),
        "wanted 1 endpoint of 2 at the fewest: {seen:#?}; clients: {done:?}"
    );
    done
}

/// What was seen of a model's replicas: ready endpoints, and what each Pod says of itself.
type Look = (usize, Vec<String>);

/// Looks at the model `m` ten times a second while `go_on`; keeps what is not as before, and when it was seen.
fn watch_replicas(space: &Namespace, go_on: impl Fn() -> bool) -> Vec<(Duration, Look)> {
    let start = Instant::now();
    let look = || -> Result<Look> {
        Ok((space.n_endpoints("m")?, space.pods("m")?.iter().map(readiness).collect()))
    };
    let mut seen: Vec<(Duration, Look)> = Vec::new();
    while go_on() {
        if let Ok(now) = look()
            && seen.last().is_none_or(|(_, before)| *before != now)
        {
            seen.push((start.elapsed(), now));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    seen
}

/// A Pod's name, whether it is Ready and since when, and when it is to be gone.
fn readiness(pod: &Value) -> String {
    let mut conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    let ready = conditions.find(|condition| condition["type"] == "Ready").unwrap_or(&Value::Null);
    let (name, gone) = (&pod["metadata"]["name"], &pod["metadata"]["deletionTimestamp"]);
    format!("{name} {} {} {gone}", ready["status"], ready["lastTransitionTime"])
}

fn a_node_crashes_and_comes_back(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("crashed")?;
    space.model("m", &json!({"replicas": 2}))?;
    space.wait_until_ready("m")?;
    let pods = space.pods("m")?;
    let on_node2 = pods.iter().find(|pod| pod["spec"]["nodeName"] == "node2");
    let lost = on_node2.context("no replica on node2")?["metadata"]["name"].clone();
    let state = cluster.state.display().to_string();
    cluster.script("down.sh", &[&state, "node2"])?;
    let start = Instant::now();
    cluster.wait_until("its endpoints are gone", || Ok(space.n_endpoints("m")? == 1))?;
    // The monitor's grace is 12 s here, looked at once a second; the rest is this machine's.
    ensure!(start.elapsed() < Duration::from_secs(40), "{:?}", start.elapsed());
    std::thread::sleep(Duration::from_secs(1));
    let load = Load::start(&space, "m", 4, 4)?;
    cluster.script("node.sh", &["up", "2"])?;
    cluster.kubectl(&["wait", "--for=condition=Ready", "node/node2", "--timeout=60s"])?;
    load.finish(cluster)?.ensure_nothing_failed()?;
    // Pods with a grant end Failed there: the kubelet is up before the plugin. Someone must clear them.
    cluster.wait_until("the Pod of before has Failed", || {
        let refused = ["events", "--field-selector=reason=UnexpectedAdmissionError"];
        let events = cluster.items(&[&["-n", "crashed"], &refused[..]].concat())?;
        Ok(events.iter().any(|event| event["involvedObject"]["name"] == lost))
    })?;
    space.wait_until_ready("m")?;
    cluster.wait_until("it was cleared", || {
        Ok(space.pods("m")?.iter().all(|pod| pod["metadata"]["name"] != lost))
    })?;
    cluster.wait_until("nothing Failed is left, the agent is back", || {
        let failed = cluster.items(&["-A", "pods", "--field-selector=status.phase=Failed"])?;
        let ours = failed.iter().filter(|pod| pod["metadata"]["namespace"] == "crashed").count();
        Ok(ours == 0
            && cluster.processes("node2", ENGINE)?.len() <= 1
            && cluster.ledger("node2").is_ok())
    })?;
    cluster.kubectl(&[
        "-n",
        SYSTEM,
        "rollout",
        "status",
        "daemonset/bindery-node-cpu",
        "--timeout=60s",
    ])?;
    for _ in 0..5 {
        space.chat("m", "Hello")?;
    }
    drop(space);
    cluster.wait_until_empty()
}
