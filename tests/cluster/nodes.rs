//! Nodes that are drained, crash, and come back.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::Test;
use crate::cluster::{Cluster, ENGINE, PATIENCE, SYSTEM};
use crate::load::Load;

pub(crate) const TESTS: &[Test] = &[
    ("a_node_is_drained_under_load", a_node_is_drained_under_load),
    ("a_node_crashes_and_comes_back_with_its_disk", a_node_crashes_and_comes_back),
];

fn a_node_is_drained_under_load(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("drained")?;
    space.model("m", &json!({"replicas": 2}))?;
    space.wait_until_ready("m")?;
    let load = Load::start(&space, "m", 16, 16)?;
    std::thread::sleep(Duration::from_secs(1));
    let drained = cluster.kubectl(&[
        "drain",
        "node1",
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        "--timeout=120s",
        "--pod-selector=bindery.dev/model",
    ]);
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
    load.finish(cluster)?.ensure_nothing_failed()
}

fn a_node_crashes_and_comes_back(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("crashed")?;
    space.model("m", &json!({"replicas": 2}))?;
    space.wait_until_ready("m")?;
    let state = cluster.state.display().to_string();
    cluster.script("down.sh", &[&state, "node2"])?;
    let start = std::time::Instant::now();
    cluster.wait_until("its endpoints are gone", || {
        let slices = cluster.items(&[
            "-n",
            "crashed",
            "endpointslices",
            "-l",
            "kubernetes.io/service-name=m",
        ])?;
        let ready = slices
            .iter()
            .flat_map(|slice| slice["endpoints"].as_array().cloned().unwrap_or_default());
        Ok(ready.filter(|endpoint| endpoint["conditions"]["ready"] == true).count() == 1)
    })?;
    // The monitor's grace is 12 s here.
    ensure!(start.elapsed() < Duration::from_secs(40), "{:?}", start.elapsed());
    std::thread::sleep(Duration::from_secs(1));
    for _ in 0..5 {
        space.chat("m", "Hello")?;
    }
    cluster.script("node.sh", &["up", "2"])?;
    cluster.kubectl(&["wait", "--for=condition=Ready", "node/node2", "--timeout=60s"])?;
    // Pods with a grant end Failed there: the kubelet is up before the plugin. Someone must clear them.
    space.wait_until_ready("m")?;
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
