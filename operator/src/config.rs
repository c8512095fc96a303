//! Flags and environment into one struct.

use clap::{Parser, ValueEnum};

/// Turns InferenceModels into Deployments, Services and what belongs to them.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "bindery-operator",
    version,
    after_help = "`bindery-operator check URL` asks a running one for its health and metrics."
)]
pub struct Config {
    /// Namespaces to look at, with commas between them; default: all
    #[arg(long, env = "BINDERY_OPERATOR_NAMESPACES", value_delimiter = ',')]
    pub namespaces: Vec<String>,
    /// Image of replica Pods
    #[arg(long, env = "BINDERY_OPERATOR_REPLICA_IMAGE")]
    pub replica_image: String,
    /// Labels of the node agents' DaemonSets in the operator's namespace. Replicas follow to a new image once these run it;
    /// default: at once
    #[arg(long, env = "BINDERY_OPERATOR_NODE_AGENTS")]
    pub node_agents: Option<String>,
    /// Seconds that running requests may take when a node agent ends; models that drain longer are told so
    #[arg(long, env = "BINDERY_OPERATOR_NODE_DRAIN_SECONDS")]
    pub node_drain_seconds: Option<u32>,
    /// When that image is pulled
    #[arg(long, env = "BINDERY_OPERATOR_PULL_POLICY", value_enum, default_value_t = PullPolicy::IfNotPresent)]
    pub pull_policy: PullPolicy,
    /// PriorityClass of replica Pods that name none
    #[arg(long, env = "BINDERY_OPERATOR_PRIORITY_CLASS")]
    pub priority_class: Option<String>,
    /// Whether each model gets a NetworkPolicy
    #[arg(long, env = "BINDERY_OPERATOR_NETWORK_POLICIES", value_enum, default_value_t = Switch::On)]
    pub network_policies: Switch,
    /// Namespace of Prometheus, which the NetworkPolicies admit to the metrics
    #[arg(long, env = "BINDERY_OPERATOR_MONITORING_NAMESPACE", default_value = "monitoring")]
    pub monitoring_namespace: String,
    /// Namespace of the operator and its lease
    #[arg(long, env = "POD_NAMESPACE", default_value = "default")]
    pub own_namespace: String,
    /// Name of this operator among its replicas
    #[arg(long, env = "POD_NAME", default_value = "bindery-operator")]
    pub own_name: String,
    /// Name of the lease that one of the replicas holds
    #[arg(long, env = "BINDERY_OPERATOR_LEASE", default_value = "bindery-operator")]
    pub lease: String,
    /// Port of health and metrics
    #[arg(long, env = "BINDERY_OPERATOR_PORT", default_value_t = 8080)]
    pub port: u16,
    /// What to log: error, warn, info, debug, trace, or directives such as operator=debug
    #[arg(long, env = "BINDERY_OPERATOR_LOG_LEVEL", default_value = "info,kube_client=warn")]
    pub log_level: String,
}

/// When an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

impl PullPolicy {
    /// The word of a Pod's specification.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}
