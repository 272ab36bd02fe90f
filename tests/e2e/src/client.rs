//! A CRI client: the calls as functions with the arguments that matter here.

use std::path::Path;
use std::time::Duration;

use a3s_box_cri::proto::image_service_client::ImageServiceClient;
use a3s_box_cri::proto::runtime_service_client::RuntimeServiceClient;
use a3s_box_cri::proto::{
    ContainerConfig, ContainerStatus, ContainerStatusRequest, CreateContainerRequest, ExecSyncRequest,
    ExecSyncResponse, ImageSpec, ListContainersRequest, ListPodSandboxRequest, PodSandboxConfig,
    PodSandboxStatus, PodSandboxStatusRequest, PullImageRequest, RemoveContainerRequest, RemoveImageRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StatusRequest, StatusResponse,
    StopContainerRequest, StopPodSandboxRequest, VersionRequest, VersionResponse,
};
use anyhow::{Context, Result};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// No call of the suite may take longer; kubelet's own limit for most calls is two minutes.
const CALL_LIMIT: Duration = Duration::from_secs(120);

/// Both services on one connection.
#[derive(Clone)]
pub struct Client {
    /// The runtime service, for calls that have no function here.
    pub runtime: RuntimeServiceClient<Channel>,
    /// The image service, for calls that have no function here.
    pub images: ImageServiceClient<Channel>,
}

impl Client {
    /// Connects to a CRI socket.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let channel = Endpoint::try_from(format!("unix://{}", socket.display()))?
            .connect()
            .await
            .with_context(|| format!("connecting to {}", socket.display()))?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
        })
    }

    /// Version.
    pub async fn version(&mut self) -> Result<VersionResponse, Status> {
        Ok(self.runtime.version(limited(VersionRequest { version: String::new() })).await?.into_inner())
    }

    /// Status with the verbose part.
    pub async fn status(&mut self) -> Result<StatusResponse, Status> {
        Ok(self.runtime.status(limited(StatusRequest { verbose: true })).await?.into_inner())
    }

    /// PullImage; returns the image's id.
    pub async fn pull(&mut self, reference: &str) -> Result<String, Status> {
        let request = PullImageRequest { image: Some(image(reference)), ..Default::default() };
        Ok(self.images.pull_image(limited(request)).await?.into_inner().image_ref)
    }

    /// RemoveImage.
    pub async fn remove_image(&mut self, reference: &str) -> Result<(), Status> {
        let request = RemoveImageRequest { image: Some(image(reference)) };
        self.images.remove_image(limited(request)).await.map(drop)
    }

    /// RunPodSandbox with the default runtime handler; returns the sandbox's id.
    pub async fn run_pod(&mut self, config: &PodSandboxConfig) -> Result<String, Status> {
        self.run_pod_with_handler(config, "").await
    }

    /// RunPodSandbox.
    pub async fn run_pod_with_handler(
        &mut self,
        config: &PodSandboxConfig,
        handler: &str,
    ) -> Result<String, Status> {
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        Ok(self.runtime.run_pod_sandbox(limited(request)).await?.into_inner().pod_sandbox_id)
    }

    /// StopPodSandbox.
    pub async fn stop_pod(&mut self, id: &str) -> Result<(), Status> {
        let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.stop_pod_sandbox(limited(request)).await.map(drop)
    }

    /// RemovePodSandbox.
    pub async fn remove_pod(&mut self, id: &str) -> Result<(), Status> {
        let request = RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.remove_pod_sandbox(limited(request)).await.map(drop)
    }

    /// CreateContainer; returns its id.
    pub async fn create(
        &mut self,
        pod: &str,
        config: ContainerConfig,
        sandbox: &PodSandboxConfig,
    ) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox.clone()),
        };
        Ok(self.runtime.create_container(limited(request)).await?.into_inner().container_id)
    }

    /// StartContainer.
    pub async fn start(&mut self, id: &str) -> Result<(), Status> {
        let request = StartContainerRequest { container_id: id.to_owned() };
        self.runtime.start_container(limited(request)).await.map(drop)
    }

    /// StopContainer with a grace period in seconds.
    pub async fn stop(&mut self, id: &str, grace: i64) -> Result<(), Status> {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout: grace };
        self.runtime.stop_container(limited(request)).await.map(drop)
    }

    /// RemoveContainer.
    pub async fn remove(&mut self, id: &str) -> Result<(), Status> {
        let request = RemoveContainerRequest { container_id: id.to_owned() };
        self.runtime.remove_container(limited(request)).await.map(drop)
    }

    /// ExecSync with a limit in seconds; 0 means none.
    pub async fn exec(
        &mut self,
        id: &str,
        command: &[&str],
        timeout: i64,
    ) -> Result<ExecSyncResponse, Status> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout,
        };
        Ok(self.runtime.exec_sync(limited(request)).await?.into_inner())
    }

    /// ContainerStatus.
    pub async fn container_status(&mut self, id: &str) -> Result<ContainerStatus, Status> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let answer = self.runtime.container_status(limited(request)).await?.into_inner();
        answer.status.ok_or_else(|| Status::internal("ContainerStatus answered without a status"))
    }

    /// PodSandboxStatus.
    pub async fn pod_status(&mut self, id: &str) -> Result<PodSandboxStatus, Status> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let answer = self.runtime.pod_sandbox_status(limited(request)).await?.into_inner();
        answer.status.ok_or_else(|| Status::internal("PodSandboxStatus answered without a status"))
    }

    /// What PodSandboxStatus tells of a pod besides its status.
    pub async fn pod_info(&mut self, id: &str) -> Result<serde_json::Value, Status> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
        let mut answer = self.runtime.pod_sandbox_status(limited(request)).await?.into_inner();
        let info = answer.info.remove("info").unwrap_or_default();
        serde_json::from_str(&info)
            .map_err(|error| Status::internal(format!("verbose status of a pod: {error} in {info:?}")))
    }

    /// Ids of all containers.
    pub async fn containers(&mut self) -> Result<Vec<String>, Status> {
        let answer =
            self.runtime.list_containers(limited(ListContainersRequest { filter: None })).await?.into_inner();
        Ok(answer.containers.into_iter().map(|container| container.id).collect())
    }

    /// Ids of all sandboxes.
    pub async fn pods(&mut self) -> Result<Vec<String>, Status> {
        let answer = self
            .runtime
            .list_pod_sandbox(limited(ListPodSandboxRequest { filter: None }))
            .await?
            .into_inner();
        Ok(answer.items.into_iter().map(|pod| pod.id).collect())
    }

    /// Removes every sandbox with all that is in it: the way out after a failure.
    pub async fn remove_everything(&mut self) -> Result<(), Status> {
        for pod in self.pods().await? {
            self.stop_pod(&pod).await?;
            self.remove_pod(&pod).await?;
        }
        Ok(())
    }
}

/// An image by its reference.
pub fn image(reference: &str) -> ImageSpec {
    ImageSpec { image: reference.to_owned(), ..Default::default() }
}

fn limited<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_LIMIT);
    request
}
