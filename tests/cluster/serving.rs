//! From apply to an answer; two models on a node and a third that waits.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::Test;
use crate::cluster::{Cluster, Namespace, SYSTEM, WHOLE};

pub(crate) const TESTS: &[Test] = &[
    ("apply_ready_chat_scale_delete", apply_ready_chat_scale_delete),
    ("a_model_named_bindery_serves", a_model_named_bindery_serves),
    ("what_people_type_first_helps_them", what_people_type_first_helps_them),
    ("prometheus_finds_every_replica_by_itself", prometheus_finds_every_replica_by_itself),
    ("a_third_model_waits_for_memory_and_starts_by_itself", a_third_model_waits),
    ("api_keys_come_from_a_secret", api_keys_come_from_a_secret),
];

fn apply_ready_chat_scale_delete(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("first")?;
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/smollm2.yaml");
    space.kubectl(&["apply", "-f", example])?;
    space.kubectl(&["wait", "--for=condition=Ready", "imodel/smollm2", "--timeout=90s"])?;
    let answer = space.chat("smollm2", "What is the capital of Germany?")?;
    ensure!(answer.contains("Berlin"), "{answer}");
    stream_says_the_same(&space, &answer)?;

    space.kubectl(&["scale", "imodel/smollm2", "--replicas=3"])?;
    space.kubectl(&[
        "wait",
        "--for=jsonpath={.status.readyReplicas}=3",
        "imodel/smollm2",
        "--timeout=90s",
    ])?;
    let pods = space.pods("smollm2")?;
    let on = |node: &str| pods.iter().filter(|pod| pod["spec"]["nodeName"] == node).count();
    ensure!(
        on("node1") > 0 && on("node2") > 0,
        "replicas are spread: {} {}",
        on("node1"),
        on("node2")
    );
    let log = space.kubectl(&["logs", "deployment/smollm2"])?;
    ensure!(log.contains("KV blocks"), "the engine's log: {log}");

    space.kubectl(&["delete", "imodel", "smollm2"])?;
    cluster.wait_until("all children are gone", || {
        let left = space.kubectl(&["get", "all,pdb,networkpolicy", "-o", "name"])?;
        Ok(left.trim().is_empty())
    })?;
    cluster.wait_until_empty()
}

/// The answer as a stream, put together.
fn stream_says_the_same(space: &Namespace, answer: &str) -> Result<()> {
    let body = json!({
        "model": "smollm2", "temperature": 0, "max_tokens": 24, "stream": true,
        "messages": [{"role": "user", "content": "What is the capital of Germany?"}],
    });
    let url = format!("{}/v1/chat/completions", space.service("smollm2")?);
    let (status, text) = space.cluster.post(&url, &body)?;
    ensure!(status == 200 && text.contains("data: [DONE]"), "{status}: {text}");
    let words = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str().map(str::to_owned));
    let streamed: String = words.collect();
    ensure!(streamed == answer, "{streamed:?} is not {answer:?}");
    Ok(())
}

/// Kubernetes would give its Pods BINDERY_PORT=tcp://..., which is no port.
fn a_model_named_bindery_serves(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("named")?;
    let whole = json!({"source": {"uri": WHOLE}, "engine": {"maxModelLen": 1024}});
    space.model("bindery", &whole)?;
    space.wait_until_ready("bindery")?;
    space.kubectl(&["rollout", "restart", "deployment/bindery"])?;
    space.kubectl(&["rollout", "status", "deployment/bindery", "--timeout=90s"])?;
    space.wait_until_ready("bindery")?;
    let answer = space.chat("bindery", "What is the capital of Germany?")?;
    ensure!(answer.contains("Berlin"), "{answer}");
    Ok(())
}

fn what_people_type_first_helps_them(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("words")?;
    // What is said where `replicas` was never stated: the scale subresource has nothing to read.
    space.model("m", &json!({}))?;
    space.wait_until_ready("m")?;
    let scale = "/apis/bindery.dev/v1alpha1/namespaces/words/inferencemodels/m/scale";
    let read = cluster.kubectl(&["get", "--raw", scale]).err().context("it was never stated")?;
    ensure!(read.to_string().contains("\".spec.replicas\" does not exist"), "{read}");
    let scaled = space.kubectl(&["scale", "imodel/m", "--replicas=2"])?;
    ensure!(scaled.trim() == "inferencemodel.bindery.dev/m scaled", "{scaled}");
    cluster.kubectl(&["get", "--raw", scale])?;
    space.kubectl(&[
        "wait",
        "--for=jsonpath={.status.readyReplicas}=2",
        "imodel/m",
        "--timeout=60s",
    ])?;

    let table = space.kubectl(&["get", "imodel"])?;
    for column in ["NAME", "READY", "REPLICAS", "URL", "REASON", "AGE"] {
        ensure!(table.contains(column), "no {column}: {table}");
    }
    let story = space.kubectl(&["describe", "imodel", "m"])?;
    ensure!(story.contains("AllReplicasReady") && story.contains("Events"), "{story}");
    ensure!(story.contains("Reconcile") || story.contains("bindery-operator"), "no event: {story}");
    for (field, word) in [
        ("imodel.spec.memory", "GiB"),
        ("imodel.spec.source.uri", "file://"),
        ("imodel.spec.engine.maxModelLen", "tokens"),
        ("imodel.status.conditions", "Ready"),
    ] {
        let text = cluster.kubectl(&["explain", field])?;
        ensure!(text.contains(word), "explain {field} lacks {word:?}: {text}");
    }
    ensure!(cluster.kubectl(&["get", "inference", "-n", "words", "-o", "name"])?.contains("/m"));
    Ok(())
}

fn prometheus_finds_every_replica_by_itself(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("watched")?;
    space.model("m", &json!({"replicas": 2}))?;
    space.wait_until_ready("m")?;
    space.chat("m", "Hello")?;
    let prometheus = Prometheus::start(cluster)?;
    let query = |query: &str| prometheus.query(query);
    cluster.wait_until("both replicas are found", || {
        Ok(query("count(vllm:kv_cache_usage_perc{namespace=\"watched\"})")? == Some(2.0))
    })?;
    cluster.wait_until("preemptions and blocks are there", || {
        let preemptions = query("sum(vllm:num_preemptions_total{namespace=\"watched\"})")?;
        let blocks = query("sum(bindery_blocks{namespace=\"watched\"})")?;
        Ok(preemptions == Some(0.0) && blocks.is_some_and(|blocks| blocks > 0.0))
    })?;
    cluster.wait_until("the agents and operators are found", || {
        let agents = query("count(bindery_node_memory_bytes{kind=\"granted\"})")?;
        let operators = query("sum(bindery_operator_leader)")?;
        Ok(agents == Some(2.0) && operators == Some(1.0))
    })
}

/// A Prometheus in the cluster's network, ended when it is dropped.
struct Prometheus<'a> {
    cluster: &'a Cluster,
    child: std::process::Child,
    _folder: tempfile::TempDir,
}

impl<'a> Prometheus<'a> {
    fn start(cluster: &'a Cluster) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let settings = folder.path().join("prometheus.yaml");
        std::fs::write(&settings, prometheus_settings(&cluster.state.join("pki")))?;
        let program = cluster.program("prometheus")?;
        let child = std::process::Command::new(program)
            .arg(format!("--config.file={}", settings.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg("--web.listen-address=127.0.0.1:9090")
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()?;
        Ok(Self { cluster, child, _folder: folder })
    }

    fn query(&self, query: &str) -> Result<Option<f64>> {
        let escaped = crate::api::escaped(query);
        let url = format!("http://127.0.0.1:9090/api/v1/query?query={escaped}");
        let (_, text) = self.cluster.http_get(&url)?;
        let answer: Value = serde_json::from_str(&text)?;
        let value = answer["data"]["result"][0]["value"][1].as_str();
        Ok(value.and_then(|value| value.parse().ok()))
    }
}

impl Drop for Prometheus<'_> {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The usual rules for annotated Pods.
fn prometheus_settings(pki: &std::path::Path) -> String {
    let pki = pki.display();
    format!(
        r#"
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: pods
    kubernetes_sd_configs: [{{role: pod, kubeconfig_file: "{pki}/admin.conf"}}]
    relabel_configs:
      - {{source_labels: [__meta_kubernetes_pod_annotation_prometheus_io_scrape], regex: "true", action: keep}}
      - {{source_labels: [__meta_kubernetes_pod_phase], regex: "Pending|Succeeded|Failed", action: drop}}
      - source_labels: [__meta_kubernetes_pod_ip, __meta_kubernetes_pod_annotation_prometheus_io_port]
        separator: ":"
        target_label: __address__
      - {{source_labels: [__meta_kubernetes_namespace], target_label: namespace}}
      - {{source_labels: [__meta_kubernetes_pod_name], target_label: pod}}
"#
    )
}

fn a_third_model_waits(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("shared")?;
    let of = |memory: &str| json!({"memory": memory, "scheduling": {"nodeSelector": {"kubernetes.io/hostname": "node1"}}});
    space.model("one", &of("2Gi"))?;
    space.model("two", &of("2Gi"))?;
    space.wait_until_ready("one")?;
    space.wait_until_ready("two")?;
    space.chat("one", "Hello")?;
    space.chat("two", "Hello")?;
    space.model("three", &of("3Gi"))?;
    let message = space.wait_for_reason("three", "InsufficientMemory")?;
    ensure!(
        message.contains("asked 3Gi")
            && message.contains("node1 0 of 4 GiB")
            && !message.contains("node2"),
        "{message}"
    );
    space.kubectl(&["wait", "--for=condition=Ready=False", "imodel/three", "--timeout=5s"])?;
    space.kubectl(&["wait", "--for=condition=Reconciling", "imodel/three", "--timeout=5s"])?;
    space.kubectl(&["delete", "imodel", "one"])?;
    // 2 of 3 GiB are free now: the figures follow.
    cluster.wait_until("the figures follow", || {
        let condition = space.condition("three", "Ready")?;
        Ok(condition.is_some_and(|found| found.message.contains("node1 2 of 4 GiB")))
    })?;
    space.kubectl(&["delete", "imodel", "two"])?;
    space.wait_until_ready("three")?;
    space.chat("three", "Hello").map(drop)
}

fn api_keys_come_from_a_secret(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("keys")?;
    space.kubectl(&[
        "create",
        "secret",
        "generic",
        "keys",
        "--from-literal=one=sk-one",
        "--from-literal=two=sk-two",
    ])?;
    space.model("m", &json!({"apiKeySecretRef": {"name": "keys"}}))?;
    space.wait_until_ready("m")?;
    let refused = space.chat("m", "Hello").err().context("it answered without a key")?;
    ensure!(refused.to_string().starts_with("401"), "{refused}");
    let url = format!("{}/v1/models", space.service("m")?);
    for key in ["sk-one", "sk-two"] {
        let said = cluster.run(
            "in",
            &["curl", "-s", "-H", &format!("Authorization: Bearer {key}"), &url],
            "",
        )?;
        ensure!(said.contains("\"id\":\"m\""), "{said}");
    }
    // Secrets stand in no command line and in no object of ours.
    let everything = cluster.kubectl(&["get", "deployments,pods", "-n", "keys", "-o", "yaml"])?;
    let logs = cluster.kubectl(&[
        "-n",
        SYSTEM,
        "logs",
        "-l",
        "app.kubernetes.io/component=node-cpu",
        "--tail=-1",
    ])?;
    ensure!(!everything.contains("sk-one") && !logs.contains("sk-one"), "a key is in the open");
    Ok(())
}
