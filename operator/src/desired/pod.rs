//! A replica Pod: tiny, unprivileged, without a token of the API.

use std::collections::BTreeMap;

use crds::InferenceModel;
use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, HTTPGetAction, LocalObjectReference,
    PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements, SeccompProfile,
    SecretVolumeSource, SecurityContext, TopologySpreadConstraint, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::names::{HEALTH_PORT, HTTP_PORT, label_selector, labels, resource_of};
use crate::config::Config;

/// From the end of the drain to the kubelet's SIGKILL.
const GRACE_SECONDS: i64 = 15;
/// The user of replica Pods, as in distroless images.
const USER: i64 = 65_532;
const API_KEYS: &str = "/etc/bindery/api-keys";
const CREDENTIAL: &str = "/etc/bindery/credential";

pub(super) fn template(model: &InferenceModel, config: &Config, image: &str) -> PodTemplateSpec {
    let pod = &model.spec.pod;
    let scheduling = &model.spec.scheduling;
    // The operator's own labels come last: a user's cannot replace them.
    let mut all_labels = pod.labels.clone();
    all_labels.extend(labels(model));
    let mut annotations = pod.annotations.clone();
    for (key, value) in [("scrape", "true"), ("port", "8001"), ("path", "/metrics")] {
        annotations.entry(format!("prometheus.io/{key}")).or_insert_with(|| value.to_owned());
    }
    let pull_secrets: Vec<_> = pod
        .image_pull_secrets
        .iter()
        .map(|secret| LocalObjectReference { name: secret.name.clone() })
        .collect();
    let priority = scheduling.priority_class_name.clone().filter(|name| !name.is_empty());
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(all_labels),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            automount_service_account_token: Some(false),
            // A model named `bindery` would otherwise set BINDERY_PORT in every Pod of its namespace.
            enable_service_links: Some(false),
            termination_grace_period_seconds: Some(
                i64::from(model.spec.rollout.drain_seconds) + GRACE_SECONDS,
            ),
            // As process 1 of its own it would miss a SIGTERM that comes before it listens, and hold its grant for all of that time.
            share_process_namespace: Some(true),
            security_context: Some(pod_security()),
            priority_class_name: priority.or_else(|| config.priority_class.clone()),
            node_selector: (!scheduling.node_selector.is_empty())
                .then(|| scheduling.node_selector.clone()),
            tolerations: some(scheduling.tolerations.clone()),
            affinity: scheduling.affinity.clone(),
            topology_spread_constraints: Some(spread(model)),
            image_pull_secrets: some(pull_secrets),
            volumes: some(volumes(model)),
            containers: vec![container(model, config, image)],
            ..PodSpec::default()
        }),
    }
}

fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

fn pod_security() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        fs_group: Some(USER),
        seccomp_profile: Some(SeccompProfile {
            type_: "RuntimeDefault".into(),
            ..SeccompProfile::default()
        }),
        ..PodSecurityContext::default()
    }
}

/// Replicas spread over nodes where they can.
fn spread(model: &InferenceModel) -> Vec<TopologySpreadConstraint> {
    let wanted = &model.spec.scheduling.topology_spread_constraints;
    if !wanted.is_empty() {
        return wanted.clone();
    }
    vec![TopologySpreadConstraint {
        max_skew: 1,
        topology_key: "kubernetes.io/hostname".into(),
        when_unsatisfiable: "ScheduleAnyway".into(),
        label_selector: Some(label_selector(model)),
        // Of this template alone: what is about to end would push both new replicas to the other node.
        match_label_keys: Some(vec!["pod-template-hash".into()]),
        ..TopologySpreadConstraint::default()
    }]
}

/// Secrets that the replica alone mounts.
fn secrets(model: &InferenceModel) -> Vec<(&'static str, &'static str, &str)> {
    let keys = model.spec.api_key_secret_ref.as_ref();
    let credential = model.spec.source.secret_ref.as_ref();
    [
        keys.map(|secret| ("api-keys", API_KEYS, secret.name.as_str())),
        credential.map(|secret| ("credential", CREDENTIAL, secret.name.as_str())),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn volumes(model: &InferenceModel) -> Vec<Volume> {
    let volume = |(name, _, secret): (&str, &str, &str)| Volume {
        name: name.to_owned(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(secret.to_owned()),
            default_mode: Some(0o440),
            ..SecretVolumeSource::default()
        }),
        ..Volume::default()
    };
    secrets(model).into_iter().map(volume).collect()
}

fn mounts(model: &InferenceModel) -> Vec<VolumeMount> {
    let mount = |(name, path, _): (&str, &str, &str)| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    };
    secrets(model).into_iter().map(mount).collect()
}

/// The command line: what the claim says.
fn arguments(model: &InferenceModel) -> Vec<String> {
    let spec = &model.spec;
    let served = spec.served_name.clone().unwrap_or_else(|| model.name_any());
    let device = match spec.device {
        crds::Device::Cpu => "cpu",
        crds::Device::Gpu => "gpu",
    };
    let mut arguments = vec!["replica".to_owned(), spec.source.uri.clone()];
    let mut flag = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    flag("--served-model-name", served);
    flag("--device", device.to_owned());
    flag("--drain-seconds", spec.rollout.drain_seconds.to_string());
    if let Some(sha256) = &spec.source.sha256 {
        flag("--sha256", sha256.clone());
    }
    // Its fields are numbers, words and truths, which JSON always takes.
    if let Ok(engine) = serde_json::to_string(&spec.engine)
        && engine != "{}"
    {
        flag("--engine", engine);
    }
    if spec.api_key_secret_ref.is_some() {
        flag("--api-keys", API_KEYS.to_owned());
    }
    if spec.source.secret_ref.is_some() {
        flag("--credential", CREDENTIAL.to_owned());
    }
    arguments
}

fn container(model: &InferenceModel, config: &Config, image: &str) -> Container {
    let port = |name: &str, number: i32| ContainerPort {
        name: Some(name.to_owned()),
        container_port: number,
        protocol: Some("TCP".into()),
        ..ContainerPort::default()
    };
    Container {
        name: "replica".into(),
        image: Some(image.to_owned()),
        image_pull_policy: Some(config.pull_policy.as_str().into()),
        args: Some(arguments(model)),
        ports: Some(vec![port("http", HTTP_PORT), port("metrics", HEALTH_PORT)]),
        resources: Some(resources(model)),
        readiness_probe: Some(probe("/readyz", 1)),
        liveness_probe: Some(probe("/healthz", 10)),
        volume_mounts: some(mounts(model)),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            run_as_non_root: Some(true),
            capabilities: Some(Capabilities {
                drop: Some(vec!["ALL".into()]),
                ..Capabilities::default()
            }),
            ..SecurityContext::default()
        }),
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        ..Container::default()
    }
}

fn probe(path: &str, period_seconds: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::Int(HEALTH_PORT),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period_seconds),
        timeout_seconds: Some(2),
        failure_threshold: Some(3),
        ..Probe::default()
    }
}

/// The grant, and the little that forwarding takes.
fn resources(model: &InferenceModel) -> ResourceRequirements {
    // The schema lets whole GiB through alone.
    let gib = model.spec.memory.whole_gib().unwrap_or_default().to_string();
    let grant = (resource_of(model.spec.device), Quantity(gib));
    let own = |cpu: &str, memory: &str| {
        BTreeMap::from([
            ("cpu".to_owned(), Quantity(cpu.into())),
            ("memory".to_owned(), Quantity(memory.into())),
            grant.clone(),
        ])
    };
    let mut limits = own("1", "128Mi");
    // Forwarding is bursty; a limit of processor time would only slow it.
    limits.remove("cpu");
    ResourceRequirements {
        requests: Some(own("10m", "16Mi")),
        limits: Some(limits),
        ..ResourceRequirements::default()
    }
}
