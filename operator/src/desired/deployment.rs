//! The Deployment of a model's replica Pods.

use crds::InferenceModel;
use k8s_openapi::api::apps::v1::{
    Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::names::{GENERATION, child, label_selector};
use super::pod;
use crate::config::Config;

/// Old ReplicaSets that are kept for a look back.
const HISTORY: i32 = 2;
/// A download of hours is no failure; what is one, the operator says itself.
const DEADLINE_SECONDS: i32 = 24 * 3600;

pub(super) fn deployment(model: &InferenceModel, config: &Config, image: &str) -> Deployment {
    let rollout = &model.spec.rollout;
    let rolling = RollingUpdateDeployment {
        max_surge: Some(IntOrString::Int(rollout.max_surge)),
        max_unavailable: Some(IntOrString::Int(rollout.max_unavailable)),
    };
    let generation = model.metadata.generation.map(|it| (GENERATION.to_owned(), it.to_string()));
    Deployment {
        metadata: ObjectMeta {
            annotations: Some(generation.into_iter().collect()),
            ..child(model)
        },
        spec: Some(DeploymentSpec {
            replicas: Some(model.spec.replicas.unwrap_or(1)),
            selector: label_selector(model),
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".into()),
                rolling_update: Some(rolling),
            }),
            revision_history_limit: Some(HISTORY),
            progress_deadline_seconds: Some(DEADLINE_SECONDS),
            template: pod::template(model, config, image),
            ..DeploymentSpec::default()
        }),
        status: None,
    }
}
