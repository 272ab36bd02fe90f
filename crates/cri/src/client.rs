//! A client of the services, for people: the calls that a command line makes, in plain types.
//!
//! Who needs the messages themselves (kubelet's part in the end-to-end suite) uses the generated clients in
//! [`crate::proto`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use a3s_box_streaming::Pinned;
use a3s_box_streaming::backend::Wanted;
use a3s_box_streaming::client::Target;
use serde::Serialize;
use thiserror::Error;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::proto::image_service_client::ImageServiceClient;
use crate::proto::runtime_service_client::RuntimeServiceClient;
use crate::proto::{
    AttachRequest, ContainerConfig, ContainerState, ContainerStatusRequest, CreateContainerRequest,
    ExecRequest, ImageSpec, ImageStatusRequest, ListContainersRequest, ListPodSandboxRequest,
    PodSandboxConfig, PodSandboxState, PortForwardRequest, PullImageRequest, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StatusRequest, StatusResponse, StopContainerRequest,
    StopPodSandboxRequest,
};

/// None of these calls waits for a guest.
const LIMIT: Duration = Duration::from_secs(30);

/// Asking the daemon failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody answers.
    #[error(
        "no daemon answers at {}; start it (systemctl start a3s-box), name its socket (--socket, CRI_SOCKET_PATH), or \
         try again as root", .socket.display()
    )]
    Connect {
        /// Where.
        socket: PathBuf,
        /// Why not.
        #[source]
        source: tonic::transport::Error,
    },
    /// It answers no.
    #[error("the daemon refused {call}: {message}")]
    Refused {
        /// The RPC.
        call: &'static str,
        /// The daemon's words.
        message: String,
    },
}

/// A pod sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pod {
    /// The whole id.
    pub id: String,
    /// The pod's name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Whether its box runs.
    pub ready: bool,
    /// Nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// Which sandbox of this pod it is.
    pub attempt: u32,
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Not started yet.
    Created,
    /// Its process lives.
    Running,
    /// Its process has ended.
    Exited,
    /// The daemon does not say.
    Unknown,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Container {
    /// The whole id.
    pub id: String,
    /// The container's name within its pod.
    pub name: String,
    /// The image as the pod named it.
    pub image: String,
    /// Where it is in its life.
    pub state: State,
    /// Nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// Which container of this name it is.
    pub attempt: u32,
    /// The id of its sandbox.
    pub pod_id: String,
}

/// What only a look at one container tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Details {
    /// Where it is in its life.
    pub state: State,
    /// Once it has ended.
    pub exit_code: i32,
    /// Where its log is; none if it was created without one.
    pub log: Option<PathBuf>,
}

/// Records are in quarantine until somebody looks at them.
fn quarantined(info: &HashMap<String, String>) -> Option<(String, String)> {
    let records: Vec<serde_json::Value> = serde_json::from_str(info.get("quarantined")?).ok()?;
    let first = records.first()?;
    let message =
        format!("{} records could not be read, first {}: {}", records.len(), first["record"], first["error"]);
    Some(("records in quarantine".to_owned(), message))
}

/// A connection to the daemon.
#[derive(Debug, Clone)]
pub struct Client {
    runtime: RuntimeServiceClient<Channel>,
    /// For calls that wait for a guest or a registry. The daemon has limits of its own for those.
    patient: Channel,
    certificate: Option<Pinned>,
}

impl Client {
    /// Connects to a CRI socket. Streams go to the server with that certificate, if it has one.
    pub async fn connect(socket: &Path, certificate: Option<Pinned>) -> Result<Self, ClientError> {
        let failed = |source| ClientError::Connect { socket: socket.to_owned(), source };
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display())).map_err(failed)?;
        let patient = endpoint.clone().connect_timeout(LIMIT).connect_lazy();
        let channel = endpoint.connect_timeout(LIMIT).timeout(LIMIT).connect().await.map_err(failed)?;
        Ok(Self { runtime: RuntimeServiceClient::new(channel), patient, certificate })
    }

    /// What the daemon says of itself, and is not as it should be: the condition's name and the reason.
    pub async fn complaints(&mut self) -> Result<Vec<(String, String)>, ClientError> {
        let answer = self.runtime.status(StatusRequest { verbose: true }).await.map_err(refused("Status"))?;
        let StatusResponse { status, info, .. } = answer.into_inner();
        let conditions = status.unwrap_or_default().conditions;
        let unmet = conditions.into_iter().filter(|condition| !condition.status);
        let mut complaints: Vec<_> = unmet.map(|condition| (condition.r#type, condition.message)).collect();
        complaints.extend(quarantined(&info));
        Ok(complaints)
    }

    /// All pod sandboxes, the newest first.
    pub async fn pods(&mut self) -> Result<Vec<Pod>, ClientError> {
        let request = ListPodSandboxRequest::default();
        let answer = self.runtime.list_pod_sandbox(request).await.map_err(refused("ListPodSandbox"))?;
        let pods = answer.into_inner().items.into_iter().map(|pod| {
            let ready = pod.state() == PodSandboxState::SandboxReady;
            let metadata = pod.metadata.unwrap_or_default();
            Pod {
                id: pod.id,
                name: metadata.name,
                namespace: metadata.namespace,
                ready,
                created_at_ns: pod.created_at,
                attempt: metadata.attempt,
            }
        });
        let mut pods: Vec<_> = pods.collect();
        pods.sort_by_key(|pod| std::cmp::Reverse(pod.created_at_ns));
        Ok(pods)
    }

    /// All containers, the newest first.
    pub async fn containers(&mut self) -> Result<Vec<Container>, ClientError> {
        let request = ListContainersRequest::default();
        let answer = self.runtime.list_containers(request).await.map_err(refused("ListContainers"))?;
        let containers = answer.into_inner().containers.into_iter().map(|container| {
            let state = state(container.state());
            let (metadata, image) =
                (container.metadata.unwrap_or_default(), container.image.unwrap_or_default());
            let named = !image.user_specified_image.is_empty();
            Container {
                id: container.id,
                name: metadata.name,
                image: if named { image.user_specified_image } else { image.image },
                state,
                created_at_ns: container.created_at,
                attempt: metadata.attempt,
                pod_id: container.pod_sandbox_id,
            }
        });
        let mut containers: Vec<_> = containers.collect();
        containers.sort_by_key(|container| std::cmp::Reverse(container.created_at_ns));
        Ok(containers)
    }

    /// A look at one container.
    pub async fn container(&mut self, id: &str) -> Result<Details, ClientError> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let answer = self.runtime.container_status(request).await.map_err(refused("ContainerStatus"))?;
        let status = answer.into_inner().status.unwrap_or_default();
        Ok(Details {
            state: state(status.state()),
            exit_code: status.exit_code,
            log: Some(status.log_path).filter(|path| !path.is_empty()).map(PathBuf::from),
        })
    }

    /// A URL for a command in a running container.
    pub async fn exec(
        &mut self,
        id: &str,
        command: &[String],
        tty: bool,
        wanted: Wanted,
    ) -> Result<Target, ClientError> {
        let Wanted { stdin, stdout, stderr } = wanted;
        let (container_id, cmd) = (id.to_owned(), command.to_owned());
        let request = ExecRequest { container_id, cmd, tty, stdin, stdout, stderr };
        let answer = self.runtime.exec(request).await.map_err(refused("Exec"))?.into_inner();
        Ok(self.target(answer.url))
    }

    /// A URL for the process of a running container.
    pub async fn attach(&mut self, id: &str, tty: bool, wanted: Wanted) -> Result<Target, ClientError> {
        let Wanted { stdin, stdout, stderr } = wanted;
        let request = AttachRequest { container_id: id.to_owned(), tty, stdin, stdout, stderr };
        let answer = self.runtime.attach(request).await.map_err(refused("Attach"))?.into_inner();
        Ok(self.target(answer.url))
    }

    /// A URL for ports of a running sandbox.
    pub async fn port_forward(&mut self, pod: &str, ports: &[u16]) -> Result<Target, ClientError> {
        let port = ports.iter().copied().map(i32::from).collect();
        let request = PortForwardRequest { pod_sandbox_id: pod.to_owned(), port };
        let answer = self.runtime.port_forward(request).await.map_err(refused("PortForward"))?.into_inner();
        Ok(self.target(answer.url))
    }

    /// Whether the daemon has an image by this name.
    pub async fn has_image(&mut self, name: &str) -> Result<bool, ClientError> {
        let request = ImageStatusRequest { image: Some(named(name)), verbose: false };
        let mut images = ImageServiceClient::new(self.patient.clone());
        let answer = images.image_status(request).await.map_err(refused("ImageStatus"))?;
        Ok(answer.into_inner().image.is_some())
    }

    /// Has the daemon fetch an image.
    pub async fn pull(&mut self, name: &str) -> Result<(), ClientError> {
        let request = PullImageRequest { image: Some(named(name)), ..Default::default() };
        let mut images = ImageServiceClient::new(self.patient.clone());
        images.pull_image(request).await.map_err(refused("PullImage"))?;
        Ok(())
    }

    /// Starts a pod with one container, whose id is answered. What fails leaves no pod behind.
    pub async fn run(
        &mut self,
        pod: PodSandboxConfig,
        container: ContainerConfig,
    ) -> Result<String, ClientError> {
        let mut runtime = RuntimeServiceClient::new(self.patient.clone());
        let request = RunPodSandboxRequest { config: Some(pod.clone()), runtime_handler: String::new() };
        let answer = runtime.run_pod_sandbox(request).await.map_err(refused("RunPodSandbox"))?;
        let pod_sandbox_id = answer.into_inner().pod_sandbox_id;
        let started = async {
            let request = CreateContainerRequest {
                pod_sandbox_id: pod_sandbox_id.clone(),
                config: Some(container),
                sandbox_config: Some(pod),
            };
            let answer = runtime.create_container(request).await.map_err(refused("CreateContainer"))?;
            let container_id = answer.into_inner().container_id;
            let request = StartContainerRequest { container_id: container_id.clone() };
            runtime.start_container(request).await.map_err(refused("StartContainer"))?;
            Ok(container_id)
        };
        let started = started.await;
        if started.is_err() {
            // The first failure is the one to tell.
            let _ = self.remove(&pod_sandbox_id).await;
        }
        started
    }

    /// Ends a container, with so many seconds between the signal and the kill, and then its pod's box.
    pub async fn stop(&mut self, pod: &str, container: &str, grace: u32) -> Result<(), ClientError> {
        let mut runtime = RuntimeServiceClient::new(self.patient.clone());
        let request = StopContainerRequest { container_id: container.to_owned(), timeout: grace.into() };
        runtime.stop_container(request).await.map_err(refused("StopContainer"))?;
        self.stop_pod(pod).await
    }

    async fn stop_pod(&mut self, pod: &str) -> Result<(), ClientError> {
        let mut runtime = RuntimeServiceClient::new(self.patient.clone());
        let request = StopPodSandboxRequest { pod_sandbox_id: pod.to_owned() };
        runtime.stop_pod_sandbox(request).await.map_err(refused("StopPodSandbox"))?;
        Ok(())
    }

    /// Removes a pod with all that is in it.
    pub async fn remove(&mut self, pod: &str) -> Result<(), ClientError> {
        self.stop_pod(pod).await?;
        let mut runtime = RuntimeServiceClient::new(self.patient.clone());
        let request = RemovePodSandboxRequest { pod_sandbox_id: pod.to_owned() };
        runtime.remove_pod_sandbox(request).await.map_err(refused("RemovePodSandbox"))?;
        Ok(())
    }

    fn target(&self, url: String) -> Target {
        Target { url, certificate: self.certificate.clone() }
    }
}

fn named(image: &str) -> ImageSpec {
    ImageSpec { image: image.to_owned(), ..Default::default() }
}

fn state(state: ContainerState) -> State {
    match state {
        ContainerState::ContainerCreated => State::Created,
        ContainerState::ContainerRunning => State::Running,
        ContainerState::ContainerExited => State::Exited,
        ContainerState::ContainerUnknown => State::Unknown,
    }
}

fn refused(call: &'static str) -> impl Fn(Status) -> ClientError {
    move |status| ClientError::Refused { call, message: status.message().to_owned() }
}
