//! `InferenceModel`: a language model that is served by replicas, and what is known of them.
//! Doc comments here are what `kubectl explain` prints.

#![allow(unreachable_pub, reason = "the derive repeats the structs inside of functions")]
#![allow(clippy::duplicated_attributes, reason = "columns share their types")]

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Affinity, Toleration, TopologySpreadConstraint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::quantity::Bytes;

/// A language model, served by replicas behind a Service of the same name.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[kube(
    group = "bindery.dev",
    version = "v1alpha1",
    kind = "InferenceModel",
    plural = "inferencemodels",
    shortname = "imodel",
    category = "inference",
    namespaced,
    status = "InferenceModelStatus",
    derive = "PartialEq",
    doc = "A language model, served by replicas behind a Service of the same name."
)]
#[kube(scale(
    spec_replicas_path = ".spec.replicas",
    status_replicas_path = ".status.replicas",
    label_selector_path = ".status.selector"
))]
#[kube(printcolumn(
    name = "Ready",
    type_ = "string",
    json_path = ".status.conditions[?(@.type==\"Ready\")].status"
))]
#[kube(printcolumn(name = "Replicas", type_ = "string", json_path = ".status.summary"))]
#[kube(printcolumn(name = "Model", type_ = "string", json_path = ".spec.source.uri"))]
#[kube(printcolumn(name = "URL", type_ = "string", json_path = ".status.url"))]
#[kube(printcolumn(
    name = "Reason",
    type_ = "string",
    json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
))]
#[kube(printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"))]
#[kube(validation = Rule::new(
    "self.metadata.name.size() <= 52 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')"
).message(
    "the name becomes a Service: at most 52 lower-case letters, digits and dashes, the first a letter, the last no dash"
))]
#[serde(rename_all = "camelCase")]
pub struct InferenceModelSpec {
    /// Where the weights come from.
    pub source: Source,
    /// The model's name in requests and answers. Default: the name of this resource.
    #[schemars(length(min = 1, max = 256))]
    #[x_kube(validation = Rule::new("!self.startsWith('-') && !self.contains(',')").message(
        "servedName may not begin with a dash or hold a comma: it is the value of an engine's flag"
    ))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub served_name: Option<String>,
    /// What computes. It cannot be changed: create another model.
    #[x_kube(validation = Rule::new("self == oldSelf").message("the device cannot be changed: create another model"))]
    pub device: Device,
    /// Memory that each replica is granted, in whole GiB: weights, workspace, KV blocks and the process itself.
    /// `bindery plan MODEL` says how it would be divided.
    #[x_kube(validation = Rule::new(
        "isQuantity(string(self)) && quantity(string(self)).isInteger() && quantity(string(self)).asInteger() > 0 && quantity(string(self)).asInteger() % 1073741824 == 0 && quantity(string(self)).asInteger() <= 1125899906842624"
    ).message("memory is granted in whole GiB, at most 1Pi: write it as 24Gi"))]
    pub memory: Bytes,
    /// Replicas that are wanted. Absent means 1. Autoscalers read the number and need it stated once;
    /// `kubectl scale --replicas` states it.
    #[schemars(range(min = 0, max = 10_000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// How each replica's engine runs. What is absent is the engine's own default.
    #[serde(default)]
    pub engine: Engine,
    /// A Secret of this namespace whose values are the API keys that clients may show, one each. Absent: every client
    /// that reaches the Service may ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_secret_ref: Option<SecretName>,
    /// How replicas are replaced.
    #[serde(default)]
    pub rollout: Rollout,
    /// Where replicas may run.
    #[serde(default)]
    pub scheduling: Scheduling,
    /// What replica Pods carry beside what the operator gives them.
    #[serde(default)]
    pub pod: PodMetadata,
}

/// Where weights come from.
#[derive(KubeSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new(
    "!has(self.sha256) || self.uri.startsWith('https://') || self.uri.startsWith('s3://') || self.uri.startsWith('file://')"
).message("sha256 is for single files: the hub has checksums of its own"))]
pub struct Source {
    /// `hf://org/name[/file.gguf][@revision]`, `https://host/path.gguf`, `s3://bucket/path.gguf`, or `file://path` below the
    /// node agent's model folder.
    #[schemars(length(min = 1, max = 2048))]
    #[x_kube(validation = Rule::new("!self.startsWith('pvc://')").message(
        "pvc:// is not supported: node agents mount no volumes; put the files into the nodes' model folder and use file://"
    ))]
    #[x_kube(validation = Rule::new("!self.startsWith('oci://')").message(
        "oci:// is not supported: use hf://, https:// or s3://"
    ))]
    #[x_kube(validation = Rule::new(
        "self.startsWith('pvc://') || self.startsWith('oci://') || self.matches('^(hf://[A-Za-z0-9][-A-Za-z0-9._]*/[A-Za-z0-9][-A-Za-z0-9._]*(/[-A-Za-z0-9._/]+)?(@[-A-Za-z0-9._/]+)?|https://[^/ ]+/.+|s3://[^/ ]+/.+|file://.+)$')"
    ).message("wanted hf://org/name[/file.gguf][@revision], https://host/path, s3://bucket/path or file://path"))]
    #[x_kube(validation = Rule::new("!self.matches('(^|/)[.][.](/|$)')").message("a path may not contain .."))]
    pub uri: String,
    /// SHA-256 of a single file, in hexadecimal digits.
    #[schemars(length(equal = 64), regex(pattern = "^[0-9a-f]{64}$"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// A Secret of this namespace with the source's credential. Keys: `token`; or `AWS_ACCESS_KEY_ID`,
    /// `AWS_SECRET_ACCESS_KEY`, `AWS_REGION` and `AWS_ENDPOINT_URL`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretName>,
}

/// A Secret in the namespace of the model.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct SecretName {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// What computes.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// One NVIDIA GPU, or a part of its memory.
    Gpu,
    /// The processors of a node.
    Cpu,
}

/// How an engine runs. The names and meanings are those of vLLM's flags.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Engine {
    /// Longest prompt and answer together, in tokens. Default: what the model allows, as far as memory goes.
    #[schemars(range(min = 1, max = 16_777_216))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u32>,
    /// Sequences that run at once.
    #[schemars(range(min = 1, max = 65_536))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_num_seqs: Option<u32>,
    /// Tokens that one step computes at most.
    #[schemars(range(min = 1, max = 1_048_576))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_num_batched_tokens: Option<u32>,
    /// Token slots of a KV block.
    #[schemars(range(min = 1, max = 65_536))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u32>,
    /// Type that weights are computed with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// Type that keys and values are kept in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_cache_dtype: Option<KvCacheDtype>,
    /// Whether requests with a common beginning share its KV blocks. Default: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enable_prefix_caching: Option<bool>,
}

/// Type that weights are computed with.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    Auto,
    Float16,
    Bfloat16,
    Float32,
}

impl Dtype {
    /// The word that stands in a manifest and in the engine's flag.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
            Self::Float32 => "float32",
        }
    }
}

/// Type that keys and values are kept in.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum KvCacheDtype {
    Auto,
    Float16,
    Bfloat16,
    Float32,
}

impl KvCacheDtype {
    /// The word that stands in a manifest and in the engine's flag.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
            Self::Float32 => "float32",
        }
    }
}

/// How replicas are replaced.
#[derive(KubeSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.maxSurge + self.maxUnavailable > 0").message(
    "maxSurge and maxUnavailable cannot both be 0: no replica could ever be replaced"
))]
pub struct Rollout {
    /// Replicas above the wanted number while they are replaced. Each needs memory of its own.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(default = "max_surge")]
    pub max_surge: i32,
    /// Replicas below the wanted number while they are replaced.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(default)]
    pub max_unavailable: i32,
    /// Seconds that a replica which ends may take to finish its running requests.
    #[schemars(range(min = 0, max = 86_400))]
    #[serde(default = "drain_seconds")]
    pub drain_seconds: u32,
    /// Seconds that a new replica may take to become ready while old ones serve; then the reason is RolloutStuck.
    /// Downloads and loading may take longer.
    #[schemars(range(min = 10, max = 86_400))]
    #[serde(default = "progress_deadline_seconds")]
    pub progress_deadline_seconds: u32,
}

fn max_surge() -> i32 {
    1
}

fn drain_seconds() -> u32 {
    120
}

fn progress_deadline_seconds() -> u32 {
    600
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            max_surge: max_surge(),
            max_unavailable: 0,
            drain_seconds: drain_seconds(),
            progress_deadline_seconds: progress_deadline_seconds(),
        }
    }
}

/// Where replicas may run, as in a Pod.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Scheduling {
    /// Labels that a node must have.
    #[schemars(extend("maxProperties" = 64))]
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that are tolerated.
    #[schemars(length(max = 64))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// Attraction to and repulsion from nodes and Pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
    /// PriorityClass of the Pods.
    #[schemars(length(max = 253))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
    /// Replaces the default, which spreads replicas over nodes where it can.
    #[schemars(length(max = 16))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub topology_spread_constraints: Vec<TopologySpreadConstraint>,
}

/// What replica Pods carry.
#[derive(KubeSchema, Serialize, Deserialize, Debug, Clone, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct PodMetadata {
    /// Further labels. The operator's own cannot be replaced.
    #[schemars(extend("maxProperties" = 64))]
    #[x_kube(validation = Rule::new(
        "self.all(key, !key.startsWith('bindery.dev/') && !key.startsWith('app.kubernetes.io/'))"
    ).message("labels of bindery.dev/ and app.kubernetes.io/ are the operator's"))]
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Further annotations.
    #[schemars(extend("maxProperties" = 64))]
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Secrets with which the replica's image is pulled.
    #[schemars(length(max = 16))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<SecretName>,
}

/// What is known of a model.
#[derive(KubeSchema, Serialize, Deserialize, Debug, Clone, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct InferenceModelStatus {
    /// The generation of the resource that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Replicas that exist.
    #[serde(default)]
    pub replicas: i32,
    /// Replicas that answer.
    #[serde(default)]
    pub ready_replicas: i32,
    /// Replicas of the present generation.
    #[serde(default)]
    pub updated_replicas: i32,
    /// Ready and wanted replicas, for people.
    #[schemars(length(max = 32))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// Selects the replica Pods, for autoscalers.
    #[schemars(length(max = 512))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Where the model answers inside the cluster.
    #[schemars(length(max = 512))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Ready, Reconciling and Stalled, after kstatus.
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn model(spec: Value) -> Result<InferenceModel, serde_json::Error> {
        let mut whole = json!({
            "source": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"}, "device": "cpu", "memory": "2Gi",
        });
        for (key, value) in spec.as_object().into_iter().flatten() {
            whole[key] = value.clone();
        }
        let head = json!({"apiVersion": "bindery.dev/v1alpha1", "kind": "InferenceModel"});
        let mut resource = head;
        resource["metadata"] = json!({"name": "smollm2"});
        resource["spec"] = whole;
        serde_json::from_value(resource)
    }

    #[test]
    fn what_is_absent_has_the_documented_default_and_is_not_written() {
        let model = model(json!({})).unwrap();
        assert_eq!(model.spec.rollout, Rollout::default());
        assert_eq!((model.spec.memory, model.spec.replicas), (Bytes::from_gib(2), None));
        let written = serde_json::to_value(&model.spec).unwrap();
        assert_eq!(written["engine"], json!({}));
        assert!(
            written.get("replicas").is_none(),
            "whoever owns replicas must be able to leave them out"
        );
    }

    /// The API server names fields that do not exist. One that a newer definition has must not end an older operator's watch.
    #[test]
    fn fields_of_a_newer_definition_are_passed_over() {
        for spec in [
            json!({"autoscaling": {}}),
            json!({"engine": {"tensorParallel": 2}}),
            json!({"rollout": {"drain": 1}}),
        ] {
            assert!(model(spec.clone()).is_ok(), "{spec}");
        }
    }

    /// Calls `check` with every schema of our own and the path to it; those of Pods are Kubernetes' own.
    fn walk(schema: &Value, path: &str, check: &mut dyn FnMut(&Value, &str)) {
        let of_pods = ["affinity", "tolerations", "topologySpreadConstraints", "conditions"];
        if of_pods.iter().any(|name| path.ends_with(name)) {
            return;
        }
        check(schema, path);
        for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
            walk(inner, &format!("{path}.{name}"), check);
        }
        if schema["items"].is_object() {
            walk(&schema["items"], &format!("{path}[]"), check);
        }
    }

    #[test]
    fn every_list_string_and_map_is_bounded_and_explained() {
        let crd = serde_json::to_value(crate::all()).unwrap();
        let mut n_seen = 0;
        walk(
            &crd[0]["spec"]["versions"][0]["schema"]["openAPIV3Schema"],
            "",
            &mut |schema, path| {
                n_seen += 1;
                assert!(
                    path.is_empty() || path.ends_with("[]") || schema["description"].is_string(),
                    "{path} is not explained"
                );
                let has = |bound: &str| schema[bound].is_number();
                match schema["type"].as_str() {
                    Some("string") => {
                        assert!(has("maxLength") || schema["enum"].is_array(), "{path}")
                    }
                    Some("array") => assert!(has("maxItems"), "{path}"),
                    Some("integer") if path.starts_with(".spec") => {
                        assert!(has("maximum"), "{path}")
                    }
                    Some("object") if schema["additionalProperties"].is_object() => {
                        assert!(has("maxProperties"), "{path}")
                    }
                    _ => {}
                }
            },
        );
        assert!(n_seen > 40, "the schema has moved: {n_seen}");
    }
}
