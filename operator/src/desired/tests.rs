use kube::ResourceExt;
use serde_json::{Value, json};

use super::*;
use crate::config::{PullPolicy, Switch};

pub(crate) fn config() -> Config {
    Config {
        namespaces: Vec::new(),
        replica_image: "localhost/bindery:1".into(),
        node_agents: None,
        node_drain_seconds: None,
        pull_policy: PullPolicy::IfNotPresent,
        priority_class: Some("bindery-replica".into()),
        network_policies: Switch::On,
        monitoring_namespace: "monitoring".into(),
        own_namespace: "bindery-system".into(),
        own_name: "bindery-operator-0".into(),
        lease: "bindery-operator".into(),
        port: 8080,
        log_level: "info".into(),
    }
}

/// A model named `tiny` in `default`, with `spec` over the least that is needed.
pub(crate) fn model(spec: Value) -> InferenceModel {
    let mut whole = json!({"source": {"uri": "file://m.gguf"}, "device": "cpu", "memory": "2Gi"});
    for (key, value) in spec.as_object().into_iter().flatten() {
        whole[key] = value.clone();
    }
    serde_json::from_value(json!({
        "apiVersion": "bindery.dev/v1alpha1",
        "kind": "InferenceModel",
        "metadata": {"name": "tiny", "namespace": "default", "uid": "1234", "generation": 3},
        "spec": whole,
    }))
    .unwrap()
}

fn pod(spec: Value) -> Value {
    let children = Children::of(&model(spec), &config(), "localhost/bindery:1");
    serde_json::to_value(children.deployment).unwrap()["spec"]["template"].clone()
}

fn arguments(spec: Value) -> String {
    let pod = pod(spec);
    let words = pod["spec"]["containers"][0]["args"].as_array().unwrap().clone();
    words.iter().map(|word| word.as_str().unwrap()).collect::<Vec<_>>().join(" ")
}

#[test]
fn children_have_the_models_name_and_go_with_it() {
    let model = model(json!({}));
    let children = Children::of(&model, &config(), "localhost/bindery:1");
    let heads = [
        children.deployment.metadata,
        children.service.metadata,
        children.disruption_budget.metadata,
        children.network_policy.unwrap().metadata,
    ];
    for head in heads {
        assert_eq!(head.name.as_deref(), Some("tiny"));
        let owner = &head.owner_references.unwrap()[0];
        assert_eq!((owner.uid.as_str(), owner.controller), ("1234", Some(true)));
        assert_eq!(head.labels.unwrap()[MODEL_LABEL], model.name_any());
    }
}

#[test]
fn a_replica_is_restricted_and_knows_no_other_service() {
    let pod = pod(json!({}));
    assert_eq!(pod["spec"]["enableServiceLinks"], false);
    assert_eq!(pod["spec"]["automountServiceAccountToken"], false);
    assert_eq!(pod["spec"]["securityContext"]["runAsNonRoot"], true);
    assert_eq!(pod["spec"]["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    let container = &pod["spec"]["containers"][0];
    assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
    assert_eq!(container["securityContext"]["capabilities"]["drop"], json!(["ALL"]));
    let resources = &container["resources"];
    for part in ["requests", "limits"] {
        assert_eq!(resources[part]["bindery.dev/cpu-memory-gib"], "2", "{part}");
    }
    assert_eq!(pod["spec"]["priorityClassName"], "bindery-replica");
}

#[test]
fn what_a_model_says_reaches_its_replicas() {
    assert_eq!(
        arguments(json!({})),
        "replica file://m.gguf --served-model-name tiny --device cpu --drain-seconds 120"
    );
    let all = arguments(json!({
        "servedName": "T", "engine": {"maxModelLen": 64, "kvCacheDtype": "float16"},
        "source": {"uri": "file://m.gguf", "sha256": "0".repeat(64), "secretRef": {"name": "hf"}},
        "apiKeySecretRef": {"name": "keys"}, "rollout": {"drainSeconds": 5},
    }));
    for part in [
        "--served-model-name T",
        "--drain-seconds 5",
        "--engine {\"maxModelLen\":64,\"kvCacheDtype\":\"float16\"}",
        "--api-keys /etc/bindery/api-keys",
        "--credential /etc/bindery/credential",
        "--sha256 0000",
    ] {
        assert!(all.contains(part), "{part} is not in {all}");
    }
}

#[test]
fn secrets_are_mounted_and_never_said() {
    let pod = pod(json!({"apiKeySecretRef": {"name": "keys"}}));
    assert_eq!(pod["spec"]["volumes"][0]["secret"]["secretName"], "keys");
    assert_eq!(pod["spec"]["containers"][0]["volumeMounts"][0]["readOnly"], true);
    assert!(pod["spec"]["containers"][0].get("env").is_none());
}

#[test]
fn a_user_adds_labels_and_replaces_none_of_ours() {
    let pod = pod(json!({"pod": {"labels": {"team": "a", "bindery.dev/model": "other"}}}));
    let labels = &pod["metadata"]["labels"];
    assert_eq!((labels["team"].as_str(), labels[MODEL_LABEL].as_str()), (Some("a"), Some("tiny")));
}

#[test]
fn a_replica_that_is_told_to_end_before_it_listens_ends() {
    assert_eq!(pod(json!({}))["spec"]["shareProcessNamespace"], true);
}

#[test]
fn a_drain_fits_into_the_grace_period() {
    let pod = pod(json!({"rollout": {"drainSeconds": 300}}));
    assert_eq!(pod["spec"]["terminationGracePeriodSeconds"], 315);
}

#[test]
fn replicas_spread_among_those_of_their_own_template() {
    let spread = &pod(json!({}))["spec"]["topologySpreadConstraints"][0];
    assert_eq!(spread["matchLabelKeys"], json!(["pod-template-hash"]));
    let own = json!([{"maxSkew": 2, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}]);
    let pod = pod(json!({"scheduling": {"topologySpreadConstraints": own}}));
    assert_eq!(pod["spec"]["topologySpreadConstraints"], own, "a user's own stay as they are");
}
