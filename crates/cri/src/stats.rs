//! Statistics of containers and pods.

use std::collections::HashMap;

use a3s_box_core::lifecycle::BoxPhase;
use a3s_box_runtime::{BoxStatus, BoxUsage, SessionStatus};

use crate::convert::metrics;
use crate::convert::stats::{container_stats, pod_sandbox_stats};
use crate::error::CriError;
use crate::filter::{shows_sandbox_stats, shows_stats};
use crate::proto::{
    ContainerStats, ContainerStatsFilter, ContainerStatsRequest, ContainerStatsResponse, PodSandboxMetrics,
    PodSandboxStats, PodSandboxStatsFilter, PodSandboxStatsRequest, PodSandboxStatsResponse,
};
use crate::service::CriService;

impl CriService {
    pub(crate) async fn container_stats(
        &self,
        request: ContainerStatsRequest,
    ) -> Result<ContainerStatsResponse, CriError> {
        let id = self.session_id(request.container_id)?;
        let state = self.boxes.session_status(&id)?;
        let usage = self.boxes.session_usage(&id).await?;
        Ok(ContainerStatsResponse { stats: Some(container_stats(&state, &usage)) })
    }

    /// Oldest first, as all lists are.
    pub(crate) async fn list_container_stats(
        &self,
        filter: Option<ContainerStatsFilter>,
    ) -> Result<Vec<ContainerStats>, CriError> {
        let filter = filter.unwrap_or_default();
        let mut states = self.boxes.list_sessions();
        states.retain(|state| shows_stats(&filter, state));
        let wanted = states.iter().map(|state: &SessionStatus| state.id.clone()).collect();
        let usages = self.boxes.list_session_usage(&wanted).await;
        let by_id: HashMap<_, _> = usages.iter().map(|usage| (&usage.id, usage)).collect();
        let told = states.iter().filter_map(|state| Some(container_stats(state, by_id.get(&state.id)?)));
        Ok(told.collect())
    }

    pub(crate) async fn pod_sandbox_stats(
        &self,
        request: PodSandboxStatsRequest,
    ) -> Result<PodSandboxStatsResponse, CriError> {
        let id = self.box_id(request.pod_sandbox_id)?;
        let state = self.boxes.box_status(&id)?;
        let usage = self.boxes.box_usage(&id).await?;
        let stats = pod_sandbox_stats(&state, &self.boxes.list_sessions_of(&id), &usage);
        Ok(PodSandboxStatsResponse { stats: Some(stats) })
    }

    pub(crate) async fn list_pod_sandbox_stats(
        &self,
        filter: Option<PodSandboxStatsFilter>,
    ) -> Result<Vec<PodSandboxStats>, CriError> {
        let filter = filter.unwrap_or_default();
        let told = self.usage_of_pods(|state| shows_sandbox_stats(&filter, state)).await;
        let stats = told
            .iter()
            .map(|(state, usage)| pod_sandbox_stats(state, &self.boxes.list_sessions_of(&state.id), usage));
        Ok(stats.collect())
    }

    pub(crate) async fn list_pod_sandbox_metrics(&self) -> Result<Vec<PodSandboxMetrics>, CriError> {
        let told = self.usage_of_pods(|_| true).await;
        let metrics = told
            .iter()
            .map(|(state, usage)| metrics::of_pod(state, &self.boxes.list_sessions_of(&state.id), usage));
        Ok(metrics.collect())
    }

    /// Pods that run; of others nothing new can be said.
    async fn usage_of_pods(&self, shown: impl Fn(&BoxStatus) -> bool) -> Vec<(BoxStatus, BoxUsage)> {
        let mut states = self.boxes.list_boxes();
        states.retain(|state| matches!(state.phase, BoxPhase::Ready) && shown(state));
        let usages = self.boxes.list_box_usage(&states.iter().map(|state| state.id.clone()).collect()).await;
        let mut by_id: HashMap<_, _> = usages.into_iter().map(|usage| (usage.id.clone(), usage)).collect();
        let known = states.into_iter().filter_map(|state| {
            let usage = by_id.remove(&state.id)?;
            Some((state, usage))
        });
        known.collect()
    }
}
