//! The operators themselves: one writes, nothing is written in a steady state, another takes over.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use rustix::process::Signal;

use crate::Test;
use crate::cluster::{Cluster, Namespace, SYSTEM, signal};

pub(crate) const TESTS: &[Test] = &[
    ("one_operator_leads_and_another_takes_over", one_leads_and_another_takes_over),
    ("an_operator_that_was_stopped_writes_nothing_when_it_goes_on", a_stopped_one_writes_nothing),
    ("nothing_is_written_in_a_steady_state", nothing_is_written_in_a_steady_state),
    ("the_chart_is_what_the_api_server_takes", the_chart_is_what_the_api_server_takes),
    ("the_operator_may_do_what_the_readme_lists_and_no_more", the_operator_may_do_no_more),
    ("people_have_their_usual_roles", people_have_their_usual_roles),
    ("of_a_list_of_namespaces_each_is_served_and_no_other", of_a_list_of_namespaces),
];

/// How the command line of an operator begins.
const OPERATOR: &str = "/usr/bin/bindery-operator ";

/// The Pod that holds the lease.
pub(crate) fn leader(cluster: &Cluster) -> Result<String> {
    let lease = cluster.get(&["-n", SYSTEM, "lease", "bindery-operator"])?;
    let holder = lease["spec"]["holderIdentity"].as_str().filter(|holder| !holder.is_empty());
    Ok(holder.context("nobody leads")?.to_owned())
}

fn one_leads_and_another_takes_over(cluster: &Cluster) -> Result<()> {
    let first = cluster.wait("a leader", crate::cluster::PATIENCE, || leader(cluster).map(Some))?;
    let pods =
        cluster.items(&["-n", SYSTEM, "pods", "-l", "app.kubernetes.io/component=operator"])?;
    ensure!(pods.len() == 2, "{} operators", pods.len());
    // Ended without a farewell: the lease runs out.
    cluster.kubectl(&["-n", SYSTEM, "delete", "pod", &first, "--grace-period=0", "--force"])?;
    let start = std::time::Instant::now();
    cluster.wait_until("another leads", || Ok(leader(cluster)? != first))?;
    ensure!(start.elapsed() < Duration::from_secs(30), "it took {:?}", start.elapsed());
    let space = cluster.namespace("taken")?;
    space.model("m", &json!({}))?;
    space.wait_until_ready("m")
}

/// A leader that does not know that its lease has run out.
fn a_stopped_one_writes_nothing(cluster: &Cluster) -> Result<()> {
    let first = cluster.wait("a leader", crate::cluster::PATIENCE, || leader(cluster).map(Some))?;
    let pod = cluster.get(&["-n", SYSTEM, "pod", &first])?;
    let node = pod["spec"]["nodeName"].as_str().context("it is on no node")?;
    let pids = cluster.processes(node, OPERATOR)?;
    let is_of_pod = |pid: &&i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        String::from_utf8_lossy(&environment).contains(&first)
    };
    let pid = *pids.iter().find(is_of_pod).context("no process of the leader")?;
    signal(pid, Signal::STOP)?;
    let start = std::time::Instant::now();
    let taken = cluster.wait_until("another leads", || Ok(leader(cluster)? != first));
    let other = leader(cluster);
    signal(pid, Signal::CONT)?;
    taken?;
    ensure!(start.elapsed() < Duration::from_secs(30), "it took {:?}", start.elapsed());
    cluster.wait_until("the first one has noticed and ended", || {
        Ok(std::fs::metadata(format!("/proc/{pid}")).is_err())
    })?;
    ensure!(leader(cluster)? == other?, "the lease went back");
    Ok(())
}

/// Writes of a model and its children that the API server has answered, those that change nothing included. What the
/// controllers of Kubernetes write of a child's status is left out.
fn n_writes(cluster: &Cluster) -> Result<f64> {
    let metrics = cluster.kubectl(&["get", "--raw", "/metrics"])?;
    let figure =
        |line: &str| -> Result<f64> { Ok(line.rsplit_once(' ').context("no figure")?.1.parse()?) };
    metrics.lines().filter(|line| is_write(line)).map(figure).sum()
}

fn is_write(line: &str) -> bool {
    let has = |label: &str, values: &[&str]| {
        values.iter().any(|value| line.contains(&format!("{label}=\"{value}\"")))
    };
    let children = ["deployments", "services", "poddisruptionbudgets", "networkpolicies"];
    line.starts_with("apiserver_request_total{")
        && has("verb", &["APPLY", "PATCH", "PUT", "POST", "DELETE"])
        && (has("resource", &["inferencemodels"])
            || has("resource", &children) && has("subresource", &[""]))
}

/// Versions of a model and all its children.
fn versions(cluster: &Cluster, namespace: &str) -> Result<BTreeMap<String, Value>> {
    let kinds = "imodel,deployment,service,pdb,networkpolicy";
    let items = cluster.items(&["-n", namespace, kinds])?;
    let version = |item: &Value| {
        let name = format!("{}/{}", item["kind"], item["metadata"]["name"]);
        (name, item["metadata"]["resourceVersion"].clone())
    };
    Ok(items.iter().map(version).collect())
}

fn nothing_is_written_in_a_steady_state(cluster: &Cluster) -> Result<()> {
    cluster.wait_until_empty()?;
    let space = cluster.namespace("steady")?;
    space.model("m", &json!({"replicas": 2}))?;
    space.wait_until_ready("m")?;
    std::thread::sleep(Duration::from_secs(2));
    let before = versions(cluster, "steady")?;
    ensure!(before.len() >= 5, "{before:?}");
    let writes = n_writes(cluster)?;
    ensure!(writes > 0.0, "the API server's metrics have other names");
    std::thread::sleep(Duration::from_secs(10));
    // A patch that changes nothing leaves every version as it is.
    let since = n_writes(cluster)? - writes;
    ensure!(since == 0.0, "{since} writes in a steady state");
    // All of them begin anew.
    cluster.kubectl(&["-n", SYSTEM, "rollout", "restart", "deployment/bindery-operator"])?;
    cluster.kubectl(&[
        "-n",
        SYSTEM,
        "rollout",
        "status",
        "deployment/bindery-operator",
        "--timeout=60s",
    ])?;
    let others = ["annotate", "node", "node1", "bindery.dev/noise=1", "--overwrite"];
    cluster.kubectl(&others)?;
    std::thread::sleep(Duration::from_secs(4));
    ensure!(
        versions(cluster, "steady")? == before,
        "{:?} from {before:?}",
        versions(cluster, "steady")?
    );
    // And what somebody else changes comes back.
    space.kubectl(&["delete", "service", "m"])?;
    space.kubectl(&[
        "patch",
        "pdb",
        "m",
        "--type=merge",
        "-p",
        "{\"spec\":{\"maxUnavailable\":2}}",
    ])?;
    cluster.wait_until("the children are as they should be", || {
        let pdb = cluster.get(&["-n", "steady", "pdb", "m"])?;
        Ok(space.service("m").is_ok() && pdb["spec"]["maxUnavailable"] == 1)
    })
}

fn the_chart_is_what_the_api_server_takes(cluster: &Cluster) -> Result<()> {
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/bindery");
    cluster.helm(&["lint", "--strict", chart])?;
    for values in [
        "gpuNodes.enabled=true,cpuNodes.enabled=true",
        // Its Roles are in these namespaces, which must be there.
        "networkPolicy.enabled=false,priorityClass.create=false,operator.namespaces={default,kube-system}",
    ] {
        let objects = cluster.helm(&["template", "other", chart, "-n", SYSTEM, "--set", values])?;
        // Each object says where it belongs: with a list of namespaces not all of them are in one.
        cluster.run("kubectl", &["apply", "--dry-run=server", "-f", "-"], &objects)?;
    }
    // Its kind is not in this cluster.
    let monitored =
        ["template", "other", chart, "--set", "podMonitor.enabled=true,node.minReadySeconds=7"];
    let objects = cluster.helm(&monitored)?;
    for part in ["kind: PodMonitor", "- {port: metrics}", "minReadySeconds: 7"] {
        ensure!(objects.contains(part), "{part:?} is not in {objects}");
    }
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples");
    cluster.kubectl(&["apply", "--dry-run=server", "-n", "default", "-f", examples])?;
    for nonsense in ["cpuNodes.memory=8GB", "operator.replicas=none", "nosuchvalue=1"] {
        let refused = cluster.helm(&["template", chart, "--set", nonsense]);
        ensure!(refused.is_err(), "{nonsense} was taken");
    }
    cluster.helm(&["-n", SYSTEM, "test", "bindery"]).map(drop)
}

fn the_operator_may_do_no_more(cluster: &Cluster) -> Result<()> {
    let operator = format!("system:serviceaccount:{SYSTEM}:bindery-operator");
    let may = |words: &[&str]| {
        let mut all = vec!["auth", "can-i"];
        all.extend(words);
        all.extend(["--as", operator.as_str()]);
        cluster.kubectl(&all).is_ok_and(|said| said.trim() == "yes")
    };
    for words in [["patch", "deployments.apps"], ["delete", "pods"], ["list", "nodes"]] {
        ensure!(may(&words), "it may not {words:?}");
    }
    ensure!(may(&["patch", "inferencemodels.bindery.dev", "--subresource=status"]), "no status");
    for words in [
        ["get", "secrets"],
        ["list", "secrets"],
        ["create", "pods"],
        ["delete", "deployments.apps"],
        ["patch", "inferencemodels.bindery.dev"],
        ["delete", "services"],
        ["patch", "nodes"],
        ["create", "clusterroles.rbac.authorization.k8s.io"],
        ["get", "configmaps"],
    ] {
        ensure!(!may(&words), "it may {words:?}");
    }
    Ok(())
}

fn people_have_their_usual_roles(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("people")?;
    for (role, verb, may) in [
        ("view", "get", true),
        ("view", "create", false),
        ("edit", "create", true),
        ("edit", "delete", true),
    ] {
        let name = format!("{role}-{verb}");
        space.kubectl(&["create", "serviceaccount", &name])?;
        let account = format!("--serviceaccount=people:{name}");
        let role = format!("--clusterrole={role}");
        space.kubectl(&["create", "rolebinding", &name, &role, &account])?;
        let person = format!("--as=system:serviceaccount:people:{name}");
        let said = space.kubectl(&["auth", "can-i", verb, "inferencemodels.bindery.dev", &person]);
        let allowed = said.is_ok_and(|said| said.trim() == "yes");
        ensure!(allowed == may, "{role} {verb}: {allowed}, wanted {may}");
    }
    Ok(())
}

fn of_a_list_of_namespaces(cluster: &Cluster) -> Result<()> {
    cluster.wait_until_empty()?;
    let spaces = [cluster.namespace("left")?, cluster.namespace("right")?];
    let other = cluster.namespace("other")?;
    look_at(cluster, "{left,right}")?;
    let served = in_turn(&spaces, &other);
    look_at(cluster, "{}")?;
    served?;
    other.wait_until_ready("m")
}

fn look_at(cluster: &Cluster, namespaces: &str) -> Result<()> {
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/bindery");
    let set = format!("operator.namespaces={namespaces}");
    cluster.helm(&[
        "-n",
        SYSTEM,
        "upgrade",
        "bindery",
        chart,
        "--reuse-values",
        "--wait",
        "--timeout",
        "90s",
        "--set",
        &set,
    ])?;
    let operators = "deployment/bindery-operator";
    cluster.kubectl(&["-n", SYSTEM, "rollout", "status", operators, "--timeout=90s"]).map(drop)
}

fn in_turn(spaces: &[Namespace<'_>], other: &Namespace<'_>) -> Result<()> {
    other.model("m", &json!({}))?;
    for space in spaces {
        space.model("m", &json!({}))?;
    }
    for space in spaces {
        space.wait_until_ready("m")?;
    }
    // An edit of the one that was listed first is seen as well, and counts its Pods.
    for space in spaces {
        let patch = json!({"spec": {"replicas": 0}}).to_string();
        space.kubectl(&["patch", "imodel", "m", "--type=merge", "-p", &patch])?;
        space.cluster.wait_until("it has no replica", || Ok(space.pods("m")?.is_empty()))?;
    }
    ensure!(
        other.condition("m", "Ready")?.is_none(),
        "a namespace that is not in the list was served"
    );
    Ok(())
}
