//! What is asked of the network once a daemon has taken up its boxes.

use std::sync::{Arc, PoisonError};

use futures::StreamExt;

use a3s_box_core::lifecycle::BoxPhase;

use crate::network::{NetworkSetting, PodNetworks};
use crate::shared::Shared;

/// Boxes whose networks are checked side by side: programs run for each, on a node that is just starting.
const PARALLEL: usize = 4;

/// Goes on until all is done or the daemon ends; nothing depends on it.
pub(super) async fn look_after_networks(shared: Arc<Shared>) {
    let NetworkSetting::Pods(pods) = &shared.config.network else { return };
    let work = async {
        check(&shared, pods.as_ref()).await;
        if let Err(error) = pods.collect_garbage().await {
            tracing::warn!(%error, "what belongs to no pod was not collected from the network");
        }
    };
    tokio::select! {
        () = shared.closing.cancelled() => {}
        () = work => {}
    }
}

async fn check(shared: &Shared, pods: &dyn PodNetworks) {
    let boxes = shared.registry.boxes();
    let ready = boxes.iter().filter(|boxed| boxed.status.borrow().phase == BoxPhase::Ready);
    let ids: Vec<_> = ready.map(|boxed| boxed.id.clone()).collect();
    let checks = futures::stream::iter(ids).for_each_concurrent(PARALLEL, async |id| {
        if let Err(error) = pods.check(&id).await {
            tracing::warn!(%id, %error, "the network of a pod sandbox is not as it was set up; the pod runs on");
            let mut complaints = shared.network_complaints.lock().unwrap_or_else(PoisonError::into_inner);
            complaints.insert(id, error.to_string());
        }
    });
    checks.await;
}
