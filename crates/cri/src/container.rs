//! Containers.

use std::collections::HashMap;

use a3s_box_core::seccomp::SeccompProfile;
use a3s_box_image::HeldImage;
use a3s_box_policy::seccomp::{SeccompFileError, read_seccomp_profile};
use a3s_box_runtime::SessionStatus;

use crate::convert::container::{Surroundings, image_of, seccomp_file, session_spec, volume_images};
use crate::convert::resources::changes;
use crate::convert::{InvalidRequest, required, status};
use crate::error::{CriError, gone_is_success};
use crate::filter::shows_container;
use crate::proto::{
    Container, ContainerConfig, ContainerFilter, ContainerStatusRequest, ContainerStatusResponse,
    CreateContainerRequest, CreateContainerResponse, PodSandboxConfig, RemoveContainerRequest,
    RemoveContainerResponse, ReopenContainerLogRequest, ReopenContainerLogResponse, StartContainerRequest,
    StartContainerResponse, StopContainerRequest, StopContainerResponse, UpdateContainerResourcesRequest,
    UpdateContainerResourcesResponse,
};
use crate::service::{CriService, seconds};

impl CriService {
    pub(crate) async fn create_container(
        &self,
        request: CreateContainerRequest,
    ) -> Result<CreateContainerResponse, CriError> {
        let box_id = self.box_id(request.pod_sandbox_id)?;
        let config = required(request.config, "config")?;
        let image_name = image_of(&config)?;
        check_privileged(&config, request.sandbox_config.as_ref())?;
        // Its files stay while it is held, even if somebody removes the image before they are attached.
        let held = self.images.hold(&image_name)?;
        let image = held.image.clone();
        let held_volumes = self.volumes(&config)?;
        let volumes = held_volumes.iter().map(|(name, held)| (name.clone(), held.image.clone())).collect();
        let filter = read_filter(&config).await?;
        let users = self.boxes.box_status(&box_id)?.spec.user_namespace;
        let surroundings = Surroundings { image: &image.config, volumes: &volumes, filter, users };
        let spec = session_spec(config, surroundings)?;
        let id = self.boxes.create_session(&box_id, spec, image).await?;
        Ok(CreateContainerResponse { container_id: id.into() })
    }

    /// The images that the container mounts, held, by the client's words for them.
    fn volumes(&self, config: &ContainerConfig) -> Result<HashMap<String, HeldImage>, CriError> {
        let hold = |(field, name): (String, &str)| match self.images.hold(name) {
            Ok(image) => Ok((name.to_owned(), image)),
            Err(source) => Err(CriError::VolumeImage { field, source }),
        };
        volume_images(config).map(hold).collect()
    }

    pub(crate) async fn start_container(
        &self,
        request: StartContainerRequest,
    ) -> Result<StartContainerResponse, CriError> {
        let id = self.session_id(request.container_id)?;
        self.boxes.start_session(&id).await?;
        Ok(StartContainerResponse {})
    }

    pub(crate) async fn stop_container(
        &self,
        request: StopContainerRequest,
    ) -> Result<StopContainerResponse, CriError> {
        let stop = async {
            let id = self.session_id(request.container_id)?;
            let grace = seconds(request.timeout, "timeout")?;
            Ok(self.boxes.stop_session(&id, grace).await?)
        };
        gone_is_success(stop.await)?;
        Ok(StopContainerResponse {})
    }

    pub(crate) async fn remove_container(
        &self,
        request: RemoveContainerRequest,
    ) -> Result<RemoveContainerResponse, CriError> {
        let remove = async {
            let id = self.session_id(request.container_id)?;
            Ok(self.boxes.remove_session(&id).await?)
        };
        gone_is_success(remove.await)?;
        Ok(RemoveContainerResponse {})
    }

    pub(crate) fn list_containers(&self, filter: Option<ContainerFilter>) -> Vec<Container> {
        let filter = filter.unwrap_or_default();
        self.boxes
            .list_sessions()
            .iter()
            .map(|state| status::container(state, self.shown_image(state)))
            .filter(|item| shows_container(&filter, item))
            .collect()
    }

    pub(crate) fn container_status(
        &self,
        request: ContainerStatusRequest,
    ) -> Result<ContainerStatusResponse, CriError> {
        let id = self.session_id(request.container_id)?;
        let state = self.boxes.session_status(&id)?;
        let info = if request.verbose { status::container_info(&state) } else { HashMap::new() };
        Ok(ContainerStatusResponse {
            status: Some(status::container_status(&state, self.shown_image(&state))),
            info,
        })
    }

    /// `oom_score_adj` is a process's own and stays as it was.
    pub(crate) async fn update_container(
        &self,
        request: UpdateContainerResourcesRequest,
    ) -> Result<UpdateContainerResourcesResponse, CriError> {
        let id = self.session_id(request.container_id)?;
        let changes = changes(&request.linux.unwrap_or_default(), "linux")?;
        self.boxes.update_session(&id, changes).await?;
        Ok(UpdateContainerResourcesResponse {})
    }

    pub(crate) async fn reopen_log(
        &self,
        request: ReopenContainerLogRequest,
    ) -> Result<ReopenContainerLogResponse, CriError> {
        let id = self.session_id(request.container_id)?;
        self.boxes.reopen_log(&id).await?;
        Ok(ReopenContainerLogResponse {})
    }

    /// The name to show for a container's image: a client that asked by id is shown a tag, if there is one.
    pub(crate) fn shown_image(&self, state: &SessionStatus) -> String {
        let given = &state.spec.image_ref;
        if !names_id(given, &state.image_id) {
            return given.clone();
        }
        match self.images.find(&state.image_id) {
            Ok(Some(image)) => image.display_name().to_owned(),
            Ok(None) | Err(_) => given.clone(),
        }
    }
}

/// The system call filter that the container takes from a file of the node.
async fn read_filter(config: &ContainerConfig) -> Result<Option<SeccompProfile>, CriError> {
    let Some((field, path)) = seccomp_file(config) else { return Ok(None) };
    let shown = path.clone();
    let read = tokio::task::spawn_blocking(move || read_seccomp_profile(&path)).await;
    let aborted = |error| SeccompFileError::Read { path: shown, source: std::io::Error::other(error) };
    match read.unwrap_or_else(|error| Err(aborted(error))) {
        Ok(profile) => Ok(Some(profile)),
        Err(error) => Err(InvalidRequest::new(field, error.to_string()).into()),
    }
}

/// Whether a client's word for an image is its id, with or without the algorithm, or the start of it.
fn names_id(given: &str, id: &str) -> bool {
    let digits = id.split_once(':').map_or(id, |(_, digits)| digits);
    id.starts_with(given) || digits.starts_with(given)
}

/// A pod says beforehand that some container of it will be privileged.
fn check_privileged(
    config: &ContainerConfig,
    sandbox: Option<&PodSandboxConfig>,
) -> Result<(), InvalidRequest> {
    let linux = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let wanted = linux.is_some_and(|context| context.privileged);
    let announced = sandbox.is_none_or(|sandbox| {
        let linux = sandbox.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        linux.is_some_and(|context| context.privileged)
    });
    if wanted && !announced {
        let problem = "the pod sandbox was not made for privileged containers; \
                       set sandbox_config.linux.security_context.privileged too";
        return Err(InvalidRequest::new("config.linux.security_context.privileged", problem));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{
        LinuxContainerConfig, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
        LinuxSandboxSecurityContext,
    };

    #[test]
    fn ids_are_told_from_names() {
        for given in ["sha256:abcdef", "sha256:abc", "abcdef", "abc"] {
            assert!(names_id(given, "sha256:abcdef"), "{given}");
        }
        for given in ["abcdef:latest", "def", "docker.io/library/abc"] {
            assert!(!names_id(given, "sha256:abcdef"), "{given}");
        }
    }

    #[test]
    fn a_privileged_container_needs_a_sandbox_that_announced_it() {
        let container = |privileged| ContainerConfig {
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext { privileged, ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let sandbox = |privileged| PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext { privileged, ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert!(check_privileged(&container(true), Some(&sandbox(true))).is_ok());
        assert!(check_privileged(&container(false), Some(&sandbox(false))).is_ok());
        assert!(check_privileged(&container(true), None).is_ok());
        let error = check_privileged(&container(true), Some(&sandbox(false))).unwrap_err();
        assert_eq!(error.field, "config.linux.security_context.privileged");
    }
}
