//! Deletion in every order: nothing hangs, nothing is left.

use anyhow::Result;
use serde_json::json;

use crate::Test;
use crate::cluster::{Cluster, SYSTEM};

pub(crate) const TESTS: &[Test] = &[
    ("a_namespace_with_models_is_deleted", a_namespace_with_models_is_deleted),
    ("the_chart_and_then_the_models_and_the_crd_are_deleted", the_chart_first),
];

fn a_namespace_with_models_is_deleted(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("dropped")?;
    space.model("one", &json!({}))?;
    space.model("two", &json!({"source": {"uri": "file://absent.gguf"}}))?;
    space.wait_until_ready("one")?;
    // Kubernetes deletes a namespace's Pods first and looks again after half their grace period.
    cluster.kubectl(&["delete", "namespace", "dropped", "--timeout=150s"])?;
    cluster.wait_until_empty()
}

fn the_chart_first(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("orphaned")?;
    space.model("m", &json!({}))?;
    space.wait_until_ready("m")?;
    let values = cluster.helm(&["-n", SYSTEM, "get", "values", "bindery", "-o", "json"])?;
    cluster.helm(&["-n", SYSTEM, "uninstall", "bindery", "--wait", "--timeout", "60s"])?;
    // The definition stays, and with it the models, unready since no agent is there.
    space.kubectl(&["get", "imodel", "m"])?;
    cluster.wait_until("its replica is not ready", || {
        let deployment = cluster.get(&["-n", "orphaned", "deployment", "m"])?;
        Ok(deployment["status"]["readyReplicas"].is_null())
    })?;
    // Installed anew, it takes up what is there.
    install(cluster, &values)?;
    space.wait_until_ready("m")?;
    space.chat("m", "Hello")?;

    // The definition before the chart, with a model that serves: it goes, and all that was of it.
    cluster.kubectl(&["delete", "crd", "inferencemodels.bindery.dev", "--timeout=30s"])?;
    cluster.wait_until("no child is left", || {
        Ok(space.kubectl(&["get", "all,pdb,networkpolicy", "-o", "name"])?.trim().is_empty())
    })?;
    cluster.wait_until_empty()?;
    nothing_is_left(cluster)?;
    cluster.helm(&["-n", SYSTEM, "uninstall", "bindery", "--wait", "--timeout", "60s"])?;
    install(cluster, &values)
}

/// Neither records nor sockets of grants.
fn nothing_is_left(cluster: &Cluster) -> Result<()> {
    for (node, folder) in
        ["node1", "node2"].into_iter().flat_map(|node| [(node, "grants"), (node, "sockets")])
    {
        let path = cluster.state.join("vm").join(node).join("var/lib/bindery").join(folder);
        let left = || std::fs::read_dir(&path).map_or(0, Iterator::count);
        cluster.wait_until(&format!("no {folder} are left on {node}"), || Ok(left() == 0))?;
    }
    Ok(())
}

fn install(cluster: &Cluster, values: &str) -> Result<()> {
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/bindery");
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), values)?;
    let values = file.path().display().to_string();
    cluster
        .helm(&[
            "-n",
            SYSTEM,
            "install",
            "bindery",
            chart,
            "-f",
            &values,
            "--wait",
            "--timeout",
            "90s",
        ])
        .map(drop)
}
