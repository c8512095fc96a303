//! How a model is reached, and how many of its replicas may be away.

use crds::InferenceModel;
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::names::{HEALTH_PORT, HTTP_PORT, child, label_selector};

pub(super) fn service(model: &InferenceModel) -> Service {
    let port = |name: &str, number: i32, target: i32| ServicePort {
        name: Some(name.to_owned()),
        port: number,
        target_port: Some(IntOrString::Int(target)),
        protocol: Some("TCP".into()),
        ..ServicePort::default()
    };
    Service {
        metadata: child(model),
        spec: Some(ServiceSpec {
            type_: Some("ClusterIP".into()),
            selector: label_selector(model).match_labels,
            ports: Some(vec![
                port("http", 80, HTTP_PORT),
                port("metrics", HEALTH_PORT, HEALTH_PORT),
            ]),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

pub(super) fn disruption_budget(model: &InferenceModel) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: child(model),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(label_selector(model)),
            // A replica that is not ready serves nobody: it must not hold up a drain.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".into()),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    }
}
