//! The kubelet's side: the device plugin that it calls, the registration with it, and its list of what Pods hold.
//! One plugin is one resource; the ledger knows all.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::Stream;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};

use super::agent::{Agent, Holders};
use super::ledger::{Health, Unit};

/// The kubelet's messages, made from `proto/`.
#[allow(
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::too_many_lines,
    reason = "generated"
)]
mod v1beta1 {
    tonic::include_proto!("v1beta1");
}
#[allow(
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::too_many_lines,
    reason = "generated"
)]
mod v1 {
    tonic::include_proto!("v1");
}

use v1beta1::device_plugin_server::{DevicePlugin, DevicePluginServer};
use v1beta1::registration_client::RegistrationClient;

/// Where a grant's folder appears in the replica's container; `bindery replica` reads the variable of the same meaning.
const MOUNTED_AT: &str = "/run/bindery";
const MOUNT_VARIABLE: &str = "BINDERY_GRANT";
/// How often the plugin looks whether the kubelet has removed its socket, which it does when it starts.
const LOOK: Duration = Duration::from_millis(200);
/// How often the kubelet is asked what Pods hold.
const COMPARE: Duration = Duration::from_secs(5);
/// The longest that one call to the kubelet may take.
const CALL: Duration = Duration::from_secs(5);
/// One gRPC message of the kubelet at most; a full node lists some thousands of devices.
const LARGEST_MESSAGE: usize = 16 << 20;

/// One resource of this node.
#[derive(Debug, Clone)]
pub struct Plugin {
    pub agent: Arc<Agent>,
    /// Such as `bindery.dev/cpu-memory-gib`.
    pub resource: &'static str,
    /// Which devices are of it: those whose name begins so.
    pub prefix: &'static str,
}

impl Plugin {
    fn devices(&self) -> Vec<v1beta1::Device> {
        let is_mine = |unit: &Unit| unit.device.starts_with(self.prefix);
        self.agent.read(|ledger| {
            let device = |(unit, health): (Unit, &Health)| v1beta1::Device {
                id: unit.to_string(),
                health: match health {
                    Health::Healthy => "Healthy".into(),
                    Health::Unhealthy { .. } => "Unhealthy".into(),
                },
            };
            ledger.units().filter(|(unit, _)| is_mine(unit)).map(device).collect()
        })
    }

    /// Serves the kubelet for as long as the agent lives, again after each of its restarts.
    pub async fn run(self, plugins: PathBuf) {
        loop {
            if let Err(error) = self.serve_once(&plugins).await {
                tracing::warn!(resource = self.resource, error = %format!("{error:#}"), "the kubelet is not there");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }

    /// Serves and registers, until the kubelet removes the socket.
    async fn serve_once(&self, plugins: &Path) -> Result<()> {
        let name = format!("{}.sock", self.resource.replace('/', "-"));
        let path = plugins.join(&name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", path.display()));
            }
            Ok(()) | Err(_) => {}
        }
        let listener =
            UnixListener::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
        let service = DevicePluginServer::new(self.clone());
        let served = Server::builder()
            .add_service(service)
            .serve_with_incoming(UnixListenerStream::new(listener));
        let watched = async {
            self.register(plugins, name).await?;
            tracing::info!(resource = self.resource, "registered with the kubelet");
            while path.exists() {
                tokio::time::sleep(LOOK).await;
            }
            tracing::info!(resource = self.resource, "the kubelet has started again");
            Ok(())
        };
        tokio::select! {
            served = served => served.context("serve the kubelet"),
            watched = watched => watched,
        }
    }

    async fn register(&self, plugins: &Path, endpoint: String) -> Result<()> {
        let channel = connect(plugins.join("kubelet.sock")).await?;
        let request = v1beta1::RegisterRequest {
            version: "v1beta1".into(),
            endpoint,
            resource_name: self.resource.into(),
            options: Some(options()),
        };
        RegistrationClient::new(channel).register(request).await.context("register")?;
        Ok(())
    }
}

fn options() -> v1beta1::DevicePluginOptions {
    v1beta1::DevicePluginOptions {
        pre_start_required: false,
        get_preferred_allocation_available: true,
    }
}

async fn connect(socket: PathBuf) -> Result<Channel> {
    let connect = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The address is never resolved: the connector knows the socket.
    let endpoint = Endpoint::from_static("http://kubelet").connect_timeout(CALL).timeout(CALL);
    endpoint.connect_with_connector(connect).await.context("connect to the kubelet")
}

/// Units of ids as the kubelet sends them, in any order.
fn units<'a>(ids: impl IntoIterator<Item = &'a String>) -> Result<BTreeSet<Unit>, Status> {
    ids.into_iter()
        .map(|id| id.parse().map_err(|error| Status::invalid_argument(format!("{error}"))))
        .collect()
}

type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl DevicePlugin for Plugin {
    type ListAndWatchStream =
        Pin<Box<dyn Stream<Item = Result<v1beta1::ListAndWatchResponse, Status>> + Send>>;

    async fn get_device_plugin_options(
        &self,
        _: Request<v1beta1::Empty>,
    ) -> Reply<v1beta1::DevicePluginOptions> {
        Ok(Response::new(options()))
    }

    async fn list_and_watch(&self, _: Request<v1beta1::Empty>) -> Reply<Self::ListAndWatchStream> {
        let plugin = self.clone();
        let state = (plugin.agent.watch(), None::<Vec<v1beta1::Device>>, plugin);
        let stream =
            futures_util::stream::unfold(state, |(mut changed, told, plugin)| async move {
                loop {
                    let devices = plugin.devices();
                    if told.as_ref() != Some(&devices) {
                        let answer = v1beta1::ListAndWatchResponse { devices: devices.clone() };
                        return Some((Ok(answer), (changed, Some(devices), plugin)));
                    }
                    changed.changed().await.ok()?;
                }
            });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn get_preferred_allocation(
        &self,
        request: Request<v1beta1::PreferredAllocationRequest>,
    ) -> Reply<v1beta1::PreferredAllocationResponse> {
        let prefer = |wanted: &v1beta1::ContainerPreferredAllocationRequest| {
            let available = units(&wanted.available_device_ids)?;
            let must = units(&wanted.must_include_device_ids)?;
            let size = usize::try_from(wanted.allocation_size).unwrap_or(0);
            let chosen = self.agent.read(|ledger| ledger.preferred(&available, &must, size));
            let device_ids = chosen.iter().map(Unit::to_string).collect();
            Ok(v1beta1::ContainerPreferredAllocationResponse { device_ids })
        };
        let answers: Result<_, Status> =
            request.get_ref().container_requests.iter().map(prefer).collect();
        Ok(Response::new(v1beta1::PreferredAllocationResponse { container_responses: answers? }))
    }

    /// Never refuses what the kubelet has decided: an error here would make the Pod Failed for ever. What may not start yet
    /// waits in its claim.
    async fn allocate(
        &self,
        request: Request<v1beta1::AllocateRequest>,
    ) -> Reply<v1beta1::AllocateResponse> {
        let allocate = |wanted: &v1beta1::ContainerAllocateRequest| {
            let folder = self.agent.allocate(units(&wanted.devices_ids)?).map_err(|error| {
                tracing::error!(%error, "cannot name a grant");
                Status::unavailable(format!("name the grant: {error}"))
            })?;
            Ok(v1beta1::ContainerAllocateResponse {
                envs: [(MOUNT_VARIABLE.into(), MOUNTED_AT.into())].into(),
                mounts: vec![v1beta1::Mount {
                    container_path: MOUNTED_AT.into(),
                    host_path: folder.display().to_string(),
                    read_only: true,
                }],
            })
        };
        let answers: Result<_, Status> =
            request.get_ref().container_requests.iter().map(allocate).collect();
        Ok(Response::new(v1beta1::AllocateResponse { container_responses: answers? }))
    }

    async fn pre_start_container(
        &self,
        _: Request<v1beta1::PreStartContainerRequest>,
    ) -> Reply<v1beta1::PreStartContainerResponse> {
        Ok(Response::new(v1beta1::PreStartContainerResponse {}))
    }
}

/// Compares the grants with what Pods hold, for as long as the agent lives, at once when somebody waits for it.
pub async fn compare(agent: Arc<Agent>, socket: PathBuf) {
    let mut told = None;
    loop {
        // An error of the time limit: nobody waits.
        drop(tokio::time::timeout(COMPARE, agent.compare_now.notified()).await);
        agent.open_late();
        match listed(&socket).await {
            Ok(listed) => {
                told = None;
                agent.compare(&listed, Instant::now());
            }
            Err(error) => {
                let message = format!("{error:#}");
                if told.replace(message.clone()) != Some(message.clone()) {
                    tracing::warn!(message, "cannot list what Pods hold: no grant ends");
                }
            }
        }
    }
}

/// Every unit of ours that a Pod holds.
async fn listed(socket: &Path) -> Result<Holders> {
    let channel = connect(socket.to_owned()).await?;
    let mut client = v1::pod_resources_lister_client::PodResourcesListerClient::new(channel)
        .max_decoding_message_size(LARGEST_MESSAGE);
    let answer =
        client.list(v1::ListPodResourcesRequest {}).await.context("list what Pods hold")?;
    let of_pod = |pod: v1::PodResources| {
        let devices = pod.containers.into_iter().flat_map(|container| container.devices);
        let ours = devices.filter(|devices| devices.resource_name.starts_with("bindery.dev/"));
        let units = ours.flat_map(|devices| devices.device_ids).filter_map(|id| id.parse().ok());
        units.map(|unit| (unit, pod.namespace.clone())).collect::<Vec<_>>()
    };
    Ok(answer.into_inner().pod_resources.into_iter().flat_map(of_pod).collect())
}
