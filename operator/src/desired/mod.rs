//! What should exist for a model, as Kubernetes objects. Pure.

mod deployment;
mod names;
mod network_policy;
mod pod;
mod service;

use crds::InferenceModel;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;

use crate::config::{Config, Switch};

pub use names::{GENERATION, HEALTH_PORT, HTTP_PORT, MODEL_LABEL, resource_of, selector};

/// The children of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Children {
    pub deployment: Deployment,
    pub service: Service,
    pub disruption_budget: PodDisruptionBudget,
    /// Absent: the operator was told to make none.
    pub network_policy: Option<NetworkPolicy>,
}

impl Children {
    /// Everything that a model should have, its replicas running `image`.
    pub fn of(model: &InferenceModel, config: &Config, image: &str) -> Self {
        Self {
            deployment: deployment::deployment(model, config, image),
            service: service::service(model),
            disruption_budget: service::disruption_budget(model),
            network_policy: (config.network_policies == Switch::On)
                .then(|| network_policy::network_policy(model, config)),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
