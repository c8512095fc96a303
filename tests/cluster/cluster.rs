//! What the tests do to a cluster: kubectl, requests, processes of its machines.

use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::api::Api;

/// How long anything may take on a slow machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(150);
const LOOK: Duration = Duration::from_millis(100);
pub(crate) const SYSTEM: &str = "bindery-system";
/// The whole model, and one of its layers alone, below the model folder of every node.
pub(crate) const WHOLE: &str = "file://SmolLM2-135M-Instruct.Q4_1.gguf";
pub(crate) const SMALL: &str = "file://small.gguf";

/// What nodes lend.
pub(crate) const CPU_GIB: &str = "bindery.dev/cpu-memory-gib";
pub(crate) const GPU_GIB: &str = "bindery.dev/gpu-memory-gib";

/// The label of the tests' namespaces.
const OURS: &str = "bindery.dev/test=true";

/// A cluster that runs.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) state: PathBuf,
    runtime: tokio::runtime::Runtime,
    http: reqwest::Client,
    api: Api,
}

impl Cluster {
    pub(crate) fn new(state: PathBuf) -> Result<Self> {
        let state = state.canonicalize()?;
        let runtime = tokio::runtime::Runtime::new()?;
        let http = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build()?;
        let api = Api::new(&state.join("pki"))?;
        let cluster = Self { state, runtime, http, api };
        // Of a run that was broken off.
        cluster.kubectl(&["delete", "namespace", "-l", OURS, "--timeout=120s"])?;
        Ok(cluster)
    }

    /// Runs one of the small programs that `make cluster-up` leaves.
    pub(crate) fn run(&self, program: &str, arguments: &[&str], input: &str) -> Result<String> {
        let mut child = Command::new(self.state.join(program))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("stdin is piped")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), error.trim());
        Ok(String::from_utf8(output.stdout)?)
    }

    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.run("kubectl", arguments, "")
    }

    pub(crate) fn helm(&self, arguments: &[&str]) -> Result<String> {
        self.run("helm", arguments, "")
    }

    /// Upgrades the chart with some values changed.
    pub(crate) fn upgrade(&self, values: &[&str]) -> Result<()> {
        let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/bindery");
        let mut words = vec!["-n", SYSTEM, "upgrade", "bindery", chart, "--reuse-values"];
        words.extend(values.iter().flat_map(|value| ["--set", value]));
        self.helm(&words).map(drop)
    }

    pub(crate) fn apply(&self, namespace: &str, object: &Value) -> Result<String> {
        self.run("kubectl", &["-n", namespace, "apply", "-f", "-"], &object.to_string())
    }

    /// An object or list as JSON.
    pub(crate) fn get(&self, arguments: &[&str]) -> Result<Value> {
        if let Some(found) = self.block_on(self.api.get(arguments)) {
            return found.with_context(|| format!("get {}", arguments.join(" ")));
        }
        let mut all = vec!["get", "-o", "json"];
        all.extend(arguments);
        Ok(serde_json::from_str(&self.kubectl(&all)?)?)
    }

    pub(crate) fn items(&self, arguments: &[&str]) -> Result<Vec<Value>> {
        Ok(self.get(arguments)?["items"].as_array().cloned().unwrap_or_default())
    }

    /// Waits until `look` gives something; an error of the last look is told when it never does.
    pub(crate) fn wait<T>(
        &self,
        what: &str,
        patience: Duration,
        mut look: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let start = Instant::now();
        loop {
            let seen = look();
            if let Ok(Some(found)) = seen {
                return Ok(found);
            }
            if start.elapsed() > patience {
                let last = seen.err().map_or(String::new(), |error| format!(": {error:#}"));
                bail!("not within {patience:?}: {what}{last}");
            }
            std::thread::sleep(LOOK);
        }
    }

    pub(crate) fn wait_until(
        &self,
        what: &str,
        mut look: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        self.wait(what, PATIENCE, || Ok(look()?.then_some(())))
    }

    /// A namespace of the test's own, gone when the answer is dropped.
    pub(crate) fn namespace<'a>(&'a self, name: &'a str) -> Result<Namespace<'a>> {
        self.wait_until("an earlier namespace is gone", || {
            Ok(self.kubectl(&["get", "namespace", name]).is_err())
        })?;
        self.kubectl(&["create", "namespace", name])?;
        let restricted = "pod-security.kubernetes.io/enforce=restricted";
        self.kubectl(&["label", "namespace", name, restricted, OURS])?;
        Ok(Namespace { cluster: self, name })
    }

    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    pub(crate) fn spawn<F>(&self, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.runtime.spawn(future)
    }

    /// Status and text of a GET.
    pub(crate) fn http_get(&self, url: &str) -> Result<(u16, String)> {
        self.block_on(async {
            let answer = self.http.get(url).send().await?;
            Ok((answer.status().as_u16(), answer.text().await?))
        })
    }

    pub(crate) fn post(&self, url: &str, body: &Value) -> Result<(u16, String)> {
        self.block_on(async {
            let answer = self.http.post(url).json(body).send().await?;
            Ok((answer.status().as_u16(), answer.text().await?))
        })
    }

    /// What a person would look at first.
    pub(crate) fn picture(&self) -> Result<String> {
        let pods = self.kubectl(&["get", "pods,imodel", "-A", "-o", "wide"])?;
        let nodes = self.kubectl(&["get", "nodes"])?;
        Ok(format!("{pods}\n{nodes}"))
    }

    /// Processes of a machine, as the real machine sees them, whose command line begins with `program`.
    pub(crate) fn processes(&self, machine: &str, program: &str) -> Result<Vec<i32>> {
        let pid = std::fs::read_to_string(self.state.join("vm").join(machine).join("pid"))?;
        let machine = pid.trim().parse()?;
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
            let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&words).replace('\0', " ");
            if line.starts_with(program) && is_in(pid, machine) {
                found.push(pid);
            }
        }
        Ok(found)
    }

    /// The one such process of a model.
    pub(crate) fn process_of(&self, machine: &str, program: &str, model: &str) -> Result<i32> {
        let is_of = |pid: &i32| {
            let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&words).replace(['\0', '='], " ");
            line.contains(&format!(" --served-model-name {model} "))
        };
        let pids = self.processes(machine, program)?;
        let found: Vec<_> = pids.into_iter().filter(is_of).collect();
        ensure!(found.len() == 1, "{program} runs {found:?} for {model} on {machine}");
        Ok(found[0])
    }

    /// Ends every such process at once and gives their number.
    pub(crate) fn kill(&self, machine: &str, program: &str) -> Result<usize> {
        let pids = self.processes(machine, program)?;
        for pid in &pids {
            // It may have ended by itself.
            drop(signal(*pid, Signal::KILL));
        }
        Ok(pids.len())
    }

    /// Path of one of Kubernetes' own programs.
    pub(crate) fn program(&self, name: &str) -> Result<String> {
        let kubectl = std::fs::read_to_string(self.state.join("kubectl"))?;
        let path =
            kubectl.split('\'').find(|word| word.ends_with("/kubectl")).context("no kubectl")?;
        Ok(path.replace("/kubectl", &format!("/{name}")))
    }

    /// Ends the program of a machine at once and gives its command line, for [`Self::begin`].
    pub(crate) fn end(&self, machine: &str, program: &str) -> Result<Vec<String>> {
        let pids = self.processes(machine, program)?;
        ensure!(pids.len() == 1, "{program} runs {} times on {machine}", pids.len());
        let words = std::fs::read_to_string(format!("/proc/{}/cmdline", pids[0]))?;
        self.kill(machine, program)?;
        Ok(words.split_terminator('\0').map(str::to_owned).collect())
    }

    /// Starts a program in a machine as it ran before.
    pub(crate) fn begin(&self, machine: &str, words: &[String]) -> Result<()> {
        let folder = self.state.join("vm").join(machine);
        let pid = std::fs::read_to_string(folder.join("pid"))?;
        let log = std::fs::File::options()
            .append(true)
            .create(true)
            .open(folder.join("log/again.log"))?;
        Command::new("setsid")
            .args(["--fork", "nsenter", "-t", pid.trim(), "--net", "--mount", "--pid", "--"])
            .args(words)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .status()?;
        Ok(())
    }

    /// Runs a script of the harness with what it needs in its environment.
    pub(crate) fn script(&self, script: &str, arguments: &[&str]) -> Result<()> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/cluster");
        let bin = Command::new("sh").arg(format!("{folder}/build.sh")).output()?;
        // Started from the real machine's network, as `make cluster-up` does: the process that made a machine is in it.
        let pid = std::fs::read_to_string(self.state.join("vm/cp/pid"))?;
        let outer = parent(pid.trim().parse()?).context("the control plane is gone")?;
        let status = Command::new("nsenter")
            .args(["-t", &outer.to_string(), "--net", "--", "sh", &format!("{folder}/{script}")])
            .args(arguments)
            .env("state", &self.state)
            .env("bin", String::from_utf8(bin.stdout)?.trim())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()?;
        ensure!(status.success(), "{script} {arguments:?}: {status}");
        Ok(())
    }

    /// GiB of a resource that a node lends, as the scheduler sees it; none: it never did.
    pub(crate) fn lends(&self, node: &str, resource: &str) -> Result<Option<String>> {
        let node = self.get(&["node", node])?;
        Ok(node["status"]["allocatable"][resource].as_str().map(str::to_owned))
    }

    /// GiB used by engines and GiB granted on a node, as its agent says it.
    pub(crate) fn ledger(&self, node: &str) -> Result<(u64, u64)> {
        let agents =
            self.items(&["-n", SYSTEM, "pods", "-l", "app.kubernetes.io/component=node-cpu"])?;
        let agent = agents.iter().find(|pod| pod["spec"]["nodeName"] == node);
        let ip = agent.and_then(|pod| pod["status"]["podIP"].as_str()).context("no agent")?;
        let (_, text) = self.http_get(&format!("http://{ip}:8002/metrics"))?;
        let figure = |kind: &str| {
            let wanted = format!("bindery_node_memory_bytes{{device=\"cpu0\",kind=\"{kind}\"}} ");
            let value = text.lines().find_map(|line| line.strip_prefix(&wanted))?;
            Some(value.parse::<u64>().ok()? >> 30)
        };
        figure("used").zip(figure("granted")).with_context(|| format!("no figures in {text:?}"))
    }

    /// Nothing is granted, nothing runs, on any node.
    pub(crate) fn wait_until_empty(&self) -> Result<()> {
        self.wait_until("every grant ended and no engine is left", || {
            let engines =
                self.processes("node1", ENGINE)?.len() + self.processes("node2", ENGINE)?.len();
            Ok(engines == 0 && self.ledger("node1")? == (0, 0) && self.ledger("node2")? == (0, 0))
        })
    }
}

/// How the command lines of engines, replicas and agents begin.
pub(crate) const ENGINE: &str = "/usr/bin/bindery serve ";
pub(crate) const REPLICA: &str = "/usr/bin/bindery replica ";
pub(crate) const AGENT: &str = "/usr/bin/bindery node ";

pub(crate) fn signal(pid: i32, signal: Signal) -> Result<()> {
    let pid = rustix::process::Pid::from_raw(pid).context("pid 0")?;
    Ok(rustix::process::kill_process(pid, signal)?)
}

/// Whether a process runs in a machine: it or one above it sees the machine's mounts. Pods have mounts of their own.
fn is_in(pid: i32, machine: i32) -> bool {
    let mounts = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let of_machine = mounts(machine);
    let mut pid = pid;
    while pid > 1 && of_machine.is_some() {
        if mounts(pid) == of_machine {
            return true;
        }
        let Some(above) = parent(pid) else { return false };
        pid = above;
    }
    false
}

fn parent(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// A namespace of a test.
#[derive(Debug)]
pub(crate) struct Namespace<'a> {
    pub(crate) cluster: &'a Cluster,
    pub(crate) name: &'a str,
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        drop(self.cluster.kubectl(&["delete", "namespace", self.name, "--wait=false"]));
    }
}

/// A Pod that does nothing, on a node, with `limits` such as `bindery.dev/cpu-memory-gib`.
pub(crate) fn idle_pod(name: &str, node: &str, limits: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": false, "terminationGracePeriodSeconds": 1,
            "nodeSelector": {"kubernetes.io/hostname": node},
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "idle", "image": "localhost/pause:1", "resources": {"limits": limits},
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
            }],
        },
    })
}

/// What a model's `Ready` has said since this began, however short it was.
#[derive(Debug)]
pub(crate) struct Reasons {
    task: tokio::task::JoinHandle<()>,
    said: Arc<Mutex<Vec<String>>>,
}

impl Reasons {
    /// Waits until a reason with `word` in its message was said.
    pub(crate) fn wait_for(&self, cluster: &Cluster, reason: &str, word: &str) -> Result<()> {
        let is_it = |line: &String| line.starts_with(&format!("{reason}: ")) && line.contains(word);
        // It comes with the harm, or never.
        let seen = cluster.wait("the reason", Duration::from_secs(20), || {
            Ok(self.said().iter().any(is_it).then_some(()))
        });
        seen.with_context(|| format!("wanted {reason} with {word:?}, got {:#?}", self.said()))
    }

    fn said(&self) -> Vec<String> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Reasons {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a Pod or model says of one of its conditions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Condition {
    pub(crate) status: String,
    pub(crate) reason: String,
    pub(crate) message: String,
}

impl Namespace<'_> {
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let mut all = vec!["-n", self.name];
        all.extend(arguments);
        self.cluster.kubectl(&all)
    }

    /// Applies a model; `spec` goes over a small model of 1 GiB.
    pub(crate) fn model(&self, name: &str, spec: &Value) -> Result<String> {
        self.cluster.apply(self.name, &model(name, spec))
    }

    pub(crate) fn condition(&self, model: &str, type_: &str) -> Result<Option<Condition>> {
        let found = self.cluster.get(&["-n", self.name, "imodel", model])?;
        let conditions = found["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let is_current = found["status"]["observedGeneration"] == found["metadata"]["generation"];
        let condition = conditions.iter().find(|condition| condition["type"] == type_);
        Ok(condition.filter(|_| is_current).map(|found| Condition {
            status: text(&found["status"]),
            reason: text(&found["reason"]),
            message: text(&found["message"]),
        }))
    }

    /// Waits for a reason of `Ready` and gives its message.
    pub(crate) fn wait_for_reason(&self, model: &str, reason: &str) -> Result<String> {
        let mut last = None;
        let seen = self.cluster.wait("the reason", PATIENCE, || {
            last = self.condition(model, "Ready")?;
            let found = last.clone().filter(|condition| condition.reason == reason);
            Ok(found.map(|condition| condition.message))
        });
        seen.with_context(|| format!("{model}: wanted {reason}, last {last:?}"))
    }

    /// Begins to write down what a model's `Ready` says.
    pub(crate) fn watch_reasons(&self, model: &str) -> Result<Reasons> {
        let said = Arc::<Mutex<Vec<String>>>::default();
        let (api, namespace) = (self.cluster.api.clone(), self.name.to_owned());
        let field = format!("--field-selector=metadata.name={model}");
        let task = self.cluster.spawn({
            let said = Arc::clone(&said);
            async move {
                let note = |model: &Value| {
                    let conditions = model["status"]["conditions"].as_array();
                    for ready in conditions.into_iter().flatten().filter(|it| it["type"] == "Ready")
                    {
                        let text = |key| ready[key].as_str().unwrap_or_default();
                        let line = format!("{}: {}", text("reason"), text("message"));
                        said.lock().unwrap_or_else(PoisonError::into_inner).push(line);
                    }
                };
                // What it has missed by then, the test says.
                drop(api.watch(&["-n", &namespace, "imodel", &field], note).await);
            }
        });
        let reasons = Reasons { task, said };
        self.cluster.wait_until("the watch has begun", || Ok(!reasons.said().is_empty()))?;
        Ok(reasons)
    }

    /// Waits until a model is Ready and its Service knows it. Endpoints follow the Pods: at once as a rule, seconds later where a
    /// busy controller manager has to try again.
    pub(crate) fn wait_until_ready(&self, model: &str) -> Result<()> {
        self.wait_for_reason(model, "AllReplicasReady")?;
        self.cluster.wait_until("every replica is an endpoint", || {
            let found = self.cluster.get(&["-n", self.name, "imodel", model])?;
            let replicas = found["status"]["readyReplicas"].as_u64().context("no readyReplicas")?;
            Ok(self.n_endpoints(model)? as u64 >= replicas)
        })
    }

    /// Ready endpoints of a model's Service.
    pub(crate) fn n_endpoints(&self, model: &str) -> Result<usize> {
        let label = format!("kubernetes.io/service-name={model}");
        let slices = self.cluster.items(&["-n", self.name, "endpointslices", "-l", &label])?;
        let all = slices.iter().filter_map(|slice| slice["endpoints"].as_array()).flatten();
        Ok(all.filter(|endpoint| endpoint["conditions"]["ready"] == true).count())
    }

    pub(crate) fn pods(&self, model: &str) -> Result<Vec<Value>> {
        let label = format!("bindery.dev/model={model}");
        self.cluster.items(&["-n", self.name, "pods", "-l", &label])
    }

    /// `http://IP:PORT` of a model's Service.
    pub(crate) fn service(&self, model: &str) -> Result<String> {
        let service = self.cluster.get(&["-n", self.name, "service", model])?;
        let ip: IpAddr = service["spec"]["clusterIP"].as_str().context("no clusterIP")?.parse()?;
        Ok(format!("http://{ip}"))
    }

    /// One chat through the Service; the answer's text.
    pub(crate) fn chat(&self, model: &str, question: &str) -> Result<String> {
        self.ask(model, question, 24)
    }

    pub(crate) fn ask(&self, model: &str, question: &str, max_tokens: u32) -> Result<String> {
        let body = json!({
            "model": model, "temperature": 0, "max_tokens": max_tokens,
            "messages": [{"role": "user", "content": question}],
        });
        let url = format!("{}/v1/chat/completions", self.service(model)?);
        let (status, text) = self.cluster.post(&url, &body)?;
        ensure!(status == 200, "{status}: {text}");
        let answer: Value = serde_json::from_str(&text)?;
        let words = answer["choices"][0]["message"]["content"].as_str();
        Ok(words.context("no content")?.to_owned())
    }
}

/// A spec whose replicas are on one node.
pub(crate) fn on(node: &str) -> Value {
    json!({"scheduling": {"nodeSelector": {"kubernetes.io/hostname": node}}})
}

/// A rollout that lets every answer of a busy machine come to its end.
pub(crate) fn patient() -> Value {
    json!({"drainSeconds": 120})
}

/// An InferenceModel of the small model on 1 GiB, with `spec` over it.
pub(crate) fn model(name: &str, spec: &Value) -> Value {
    let mut whole = json!({
        "source": {"uri": SMALL}, "device": "cpu", "memory": "1Gi", "engine": {"maxModelLen": 2048},
        "rollout": {"drainSeconds": 10},
    });
    for (key, value) in spec.as_object().into_iter().flatten() {
        whole[key] = value.clone();
    }
    json!({
        "apiVersion": "bindery.dev/v1alpha1", "kind": "InferenceModel",
        "metadata": {"name": name}, "spec": whole,
    })
}
