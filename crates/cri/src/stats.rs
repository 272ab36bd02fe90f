//! Statistics of containers.

use std::collections::HashMap;

use a3s_box_runtime::SessionStatus;

use crate::convert::stats::container_stats;
use crate::error::CriError;
use crate::filter::shows_stats;
use crate::proto::{
    ContainerStatsRequest, ContainerStatsResponse, ListContainerStatsRequest, ListContainerStatsResponse,
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
        request: ListContainerStatsRequest,
    ) -> Result<ListContainerStatsResponse, CriError> {
        let filter = request.filter.unwrap_or_default();
        let mut states = self.boxes.list_sessions();
        states.retain(|state| shows_stats(&filter, state));
        let wanted = states.iter().map(|state: &SessionStatus| state.id.clone()).collect();
        let usages = self.boxes.list_session_usage(&wanted).await;
        let by_id: HashMap<_, _> = usages.iter().map(|usage| (&usage.id, usage)).collect();
        let told = states.iter().filter_map(|state| Some(container_stats(state, by_id.get(&state.id)?)));
        Ok(ListContainerStatsResponse { stats: told.collect() })
    }
}
