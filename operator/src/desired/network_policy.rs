//! Who may reach a replica: everybody its HTTP port; the operator and Prometheus its health port.

use std::collections::BTreeMap;

use crds::InferenceModel;
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
    NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::names::{HEALTH_PORT, HTTP_PORT, child, label_selector};
use crate::config::Config;

pub(super) fn network_policy(model: &InferenceModel, config: &Config) -> NetworkPolicy {
    let port = |number: i32| NetworkPolicyPort {
        port: Some(IntOrString::Int(number)),
        protocol: Some("TCP".into()),
        ..NetworkPolicyPort::default()
    };
    let clients = NetworkPolicyIngressRule { from: None, ports: Some(vec![port(HTTP_PORT)]) };
    let watchers = NetworkPolicyIngressRule {
        from: Some(vec![namespace(&config.own_namespace), namespace(&config.monitoring_namespace)]),
        ports: Some(vec![port(HEALTH_PORT)]),
    };
    NetworkPolicy {
        metadata: child(model),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(label_selector(model)),
            policy_types: Some(vec!["Ingress".into()]),
            ingress: Some(vec![clients, watchers]),
            ..NetworkPolicySpec::default()
        }),
    }
}

fn namespace(name: &str) -> NetworkPolicyPeer {
    let label = BTreeMap::from([("kubernetes.io/metadata.name".to_owned(), name.to_owned())]);
    NetworkPolicyPeer {
        namespace_selector: Some(LabelSelector {
            match_labels: Some(label),
            ..LabelSelector::default()
        }),
        ..NetworkPolicyPeer::default()
    }
}
