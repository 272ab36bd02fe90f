//! Pod sandboxes.

use std::collections::HashMap;

use a3s_box_core::lifecycle::BoxPhase;

use crate::convert::{resources::changes, sandbox::box_spec, status};
use crate::error::{CriError, gone_is_success};
use crate::filter::shows_sandbox;
use crate::proto::{
    PodSandbox, PodSandboxFilter, PodSandboxStatusRequest, PodSandboxStatusResponse, RemovePodSandboxRequest,
    RemovePodSandboxResponse, RunPodSandboxRequest, RunPodSandboxResponse, StopPodSandboxRequest,
    StopPodSandboxResponse, UpdatePodSandboxResourcesRequest, UpdatePodSandboxResourcesResponse,
};
use crate::service::{CriService, json, now_ns};
use crate::settings::CriSettings;

impl CriService {
    pub(crate) async fn run_sandbox(
        &self,
        request: RunPodSandboxRequest,
    ) -> Result<RunPodSandboxResponse, CriError> {
        let CriSettings { runtime_handlers, size, cluster_cidrs, .. } = self.settings.as_ref();
        let spec = box_spec(request, runtime_handlers, size, cluster_cidrs)?;
        let id = self.boxes.run_box(spec).await?;
        Ok(RunPodSandboxResponse { pod_sandbox_id: id.into() })
    }

    pub(crate) async fn stop_sandbox(
        &self,
        request: StopPodSandboxRequest,
    ) -> Result<StopPodSandboxResponse, CriError> {
        let stop = async {
            let id = self.box_id(request.pod_sandbox_id)?;
            Ok(self.boxes.stop_box(&id).await?)
        };
        gone_is_success(stop.await)?;
        Ok(StopPodSandboxResponse {})
    }

    pub(crate) async fn remove_sandbox(
        &self,
        request: RemovePodSandboxRequest,
    ) -> Result<RemovePodSandboxResponse, CriError> {
        let remove = async {
            let id = self.box_id(request.pod_sandbox_id)?;
            Ok(self.boxes.remove_box(&id).await?)
        };
        gone_is_success(remove.await)?;
        Ok(RemovePodSandboxResponse {})
    }

    pub(crate) fn sandbox_status(
        &self,
        request: PodSandboxStatusRequest,
    ) -> Result<PodSandboxStatusResponse, CriError> {
        let id = self.box_id(request.pod_sandbox_id)?;
        let state = self.boxes.box_status(&id)?;
        let mut info = if request.verbose { status::sandbox_info(&state) } else { HashMap::new() };
        if request.verbose
            && let Some(complaint) = self.boxes.network_complaint(&id)
        {
            info.insert("networkCheck".to_owned(), json(&complaint));
        }
        if request.verbose
            && let Some((_, reason)) = self.boxes.foreign().into_iter().find(|(foreign, _)| *foreign == id)
        {
            info.insert("agent".to_owned(), json(&reason));
        }
        Ok(PodSandboxStatusResponse {
            status: Some(status::sandbox_status(&state)),
            info,
            containers_statuses: self.container_statuses(&id),
            timestamp: now_ns(),
        })
    }

    /// The box was sized for its overhead when it was made.
    pub(crate) async fn update_sandbox(
        &self,
        request: UpdatePodSandboxResourcesRequest,
    ) -> Result<UpdatePodSandboxResourcesResponse, CriError> {
        let id = self.box_id(request.pod_sandbox_id)?;
        let changes = changes(&request.resources.unwrap_or_default(), "resources")?;
        self.boxes.update_box(&id, &changes).await?;
        Ok(UpdatePodSandboxResourcesResponse {})
    }

    /// Boxes in the making are not shown: kubelet takes every listed sandbox that is not ready for a dead
    /// one, and would make another instead of joining the attempt in flight.
    pub(crate) fn list_sandboxes(&self, filter: Option<PodSandboxFilter>) -> Vec<PodSandbox> {
        let filter = filter.unwrap_or_default();
        self.boxes
            .list_boxes()
            .iter()
            .filter(|state| was_ready(&state.phase))
            .map(status::sandbox)
            .filter(|item| shows_sandbox(&filter, item))
            .collect()
    }
}

fn was_ready(phase: &BoxPhase) -> bool {
    match phase {
        BoxPhase::Reserved | BoxPhase::Prepared | BoxPhase::Booting => false,
        BoxPhase::Ready | BoxPhase::Stopping | BoxPhase::Stopped(_) => true,
    }
}
