//! Names and labels that children share.

use std::collections::BTreeMap;

use crds::{Device, GROUP, InferenceModel};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use kube::{Resource, ResourceExt};

/// The label by which children are found. Its value is the model's name, which the schema keeps short enough.
pub const MODEL_LABEL: &str = "bindery.dev/model";
/// Of a Deployment: the generation of the model that it was made of.
pub const GENERATION: &str = "bindery.dev/generation";
/// Where a replica answers.
pub const HTTP_PORT: i32 = 8000;
/// Where a replica says how it is, and has its engine's metrics.
pub const HEALTH_PORT: i32 = 8001;

/// The extended resource that a device's memory is requested by.
pub fn resource_of(device: Device) -> String {
    match device {
        Device::Cpu => format!("{GROUP}/cpu-memory-gib"),
        Device::Gpu => format!("{GROUP}/gpu-memory-gib"),
    }
}

/// The labels that select a model's Pods.
fn selecting(model: &InferenceModel) -> BTreeMap<String, String> {
    [(MODEL_LABEL.to_owned(), model.name_any())].into()
}

/// The same as a selector.
pub(super) fn label_selector(model: &InferenceModel) -> LabelSelector {
    LabelSelector { match_labels: Some(selecting(model)), ..LabelSelector::default() }
}

/// The same as text, for autoscalers.
pub fn selector(name: &str) -> String {
    format!("{MODEL_LABEL}={name}")
}

/// Labels of every child.
pub(super) fn labels(model: &InferenceModel) -> BTreeMap<String, String> {
    let mut labels = selecting(model);
    for (key, value) in [
        ("name", "bindery"),
        ("instance", model.name_any().as_str()),
        ("component", "replica"),
        ("part-of", "bindery"),
        ("managed-by", "bindery-operator"),
    ] {
        labels.insert(format!("app.kubernetes.io/{key}"), value.to_owned());
    }
    labels
}

/// The head of a child: it has the model's name and goes with the model.
pub(super) fn child(model: &InferenceModel) -> ObjectMeta {
    ObjectMeta {
        name: Some(model.name_any()),
        namespace: model.namespace(),
        labels: Some(labels(model)),
        owner_references: model.controller_owner_ref(&()).map(|owner| vec![owner]),
        ..ObjectMeta::default()
    }
}
