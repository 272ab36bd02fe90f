//! The runtime itself: version, conditions, configuration.

use std::collections::HashMap;

use a3s_box_core::BoxId;
use a3s_box_runtime::Leftover;
use serde_json::json;

use crate::convert::sandbox::pod_cidrs;
use crate::error::CriError;
use crate::proto::{
    self, LinuxRuntimeConfiguration, RuntimeCondition, RuntimeConfigResponse, RuntimeFeatures,
    RuntimeHandler, RuntimeHandlerFeatures, RuntimeStatus, StatusRequest, StatusResponse,
    UpdateRuntimeConfigRequest, UpdateRuntimeConfigResponse, VersionResponse,
};
use crate::service::CriService;
use crate::settings::{CgroupDriver, Condition};

/// What kubelet expects `version` to be, and has expected since the interface exists.
const KUBELET_API_VERSION: &str = "0.1.0";
const RUNTIME_NAME: &str = "a3s-box";
const RUNTIME_API_VERSION: &str = "v1";
/// Whether this version speaks to the agents of all pods that run.
const SPEAKS_TO_ALL_PODS: &str = "A3sBoxSpeaksToAllPods";
/// Whether everything of the pods that are gone was given back.
const NO_LEFTOVERS: &str = "A3sBoxHasNoLeftovers";

impl CriService {
    pub(crate) fn version(&self) -> VersionResponse {
        VersionResponse {
            version: KUBELET_API_VERSION.to_owned(),
            runtime_name: RUNTIME_NAME.to_owned(),
            runtime_version: self.settings.runtime_version.clone(),
            runtime_api_version: RUNTIME_API_VERSION.to_owned(),
        }
    }

    pub(crate) async fn status(&self, request: &StatusRequest) -> Result<StatusResponse, CriError> {
        let network = self.boxes.network_status().await;
        let network = Condition { ready: network.ready, reason: network.reason, message: network.message };
        let conditions = vec![
            condition("RuntimeReady", &self.settings.runtime_condition),
            condition("NetworkReady", &network),
            condition(NO_LEFTOVERS, &no_leftovers(&self.boxes.leftovers())),
            condition(SPEAKS_TO_ALL_PODS, &speaks_to_all(&self.boxes.foreign())),
        ];
        let info = if request.verbose { self.info() } else { HashMap::new() };
        Ok(StatusResponse {
            status: Some(RuntimeStatus { conditions }),
            info,
            runtime_handlers: handlers(&self.settings.runtime_handlers),
            features: Some(RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: false,
                mount_options: true,
            }),
        })
    }

    /// What people and support want to know, as JSON.
    fn info(&self) -> HashMap<String, String> {
        let mut info: HashMap<_, _> = self.settings.info.clone().into_iter().collect();
        // The content of a record may hold a pod's secrets.
        let quarantined: Vec<_> = self
            .boxes
            .quarantined()
            .iter()
            .map(|apart| json!({ "record": apart.record, "error": apart.error, "since_ns": apart.since_ns }))
            .collect();
        let foreign: HashMap<_, _> = self.boxes.foreign().into_iter().collect();
        info.insert("foreign".to_owned(), json!(foreign).to_string());
        info.insert("leftovers".to_owned(), json!(self.boxes.leftovers()).to_string());
        info.insert("quarantined".to_owned(), json!(quarantined).to_string());
        info
    }

    /// Kubelet tells the node's pod addresses, once and again whenever it starts.
    pub(crate) async fn update_runtime_config(
        &self,
        request: UpdateRuntimeConfigRequest,
    ) -> Result<UpdateRuntimeConfigResponse, CriError> {
        let cidrs = pod_cidrs(request)?;
        if !cidrs.is_empty() {
            self.boxes.assign_pod_cidrs(&cidrs).await?;
        }
        Ok(UpdateRuntimeConfigResponse {})
    }

    pub(crate) fn runtime_config(&self) -> RuntimeConfigResponse {
        let driver = match self.settings.cgroup_driver {
            CgroupDriver::Systemd => proto::CgroupDriver::Systemd,
            CgroupDriver::Cgroupfs => proto::CgroupDriver::Cgroupfs,
        };
        RuntimeConfigResponse { linux: Some(LinuxRuntimeConfiguration { cgroup_driver: driver.into() }) }
    }
}

/// Kubelet overlooks conditions that it does not know; people see them in `crictl info`.
fn no_leftovers(leftovers: &[Leftover]) -> Condition {
    match leftovers {
        [] => Condition::met(),
        [first, ..] => Condition {
            ready: false,
            reason: "NotGivenBack".to_owned(),
            message: format!(
                "of {} pod sandboxes that are gone something is left and is tried again, first: {} after {} attempts: {}",
                leftovers.len(),
                first.id.short(),
                first.attempts,
                first.error
            ),
        },
    }
}

fn speaks_to_all(foreign: &[(BoxId, String)]) -> Condition {
    match foreign {
        [] => Condition::met(),
        [(first, reason), ..] => Condition {
            ready: false,
            reason: "OtherVersion".to_owned(),
            message: format!(
                "{} pod sandboxes run on, but nothing can be asked of them, first {} because {reason}",
                foreign.len(),
                first.short()
            ),
        },
    }
}

fn condition(kind: &str, state: &Condition) -> RuntimeCondition {
    RuntimeCondition {
        r#type: kind.to_owned(),
        status: state.ready,
        reason: state.reason.clone(),
        message: state.message.clone(),
    }
}

/// The default handler and those with names: all boxes can do the same.
fn handlers(names: &[String]) -> Vec<RuntimeHandler> {
    let features = RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: true };
    std::iter::once("")
        .chain(names.iter().map(String::as_str).filter(|name| !name.is_empty()))
        .map(|name| RuntimeHandler { name: name.to_owned(), features: Some(features) })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_handler_comes_first_and_has_no_name() {
        let names: Vec<String> = handlers(&["a3s-box".to_owned(), String::new()])
            .into_iter()
            .map(|handler| handler.name)
            .collect();
        assert_eq!(names, ["", "a3s-box"]);
    }

    #[test]
    fn pods_of_another_version_are_counted_and_the_first_is_named_with_its_reason() {
        assert!(speaks_to_all(&[]).ready);
        let pod = |byte| (BoxId::from_random([byte; 32]), "its guest agent speaks protocol 9".to_owned());
        let state = speaks_to_all(&[pod(7), pod(8)]);
        assert_eq!((state.ready, state.reason.as_str()), (false, "OtherVersion"));
        assert_eq!(
            state.message,
            "2 pod sandboxes run on, but nothing can be asked of them, first 070707070707 because its guest agent speaks \
             protocol 9"
        );
    }

    #[test]
    fn a_condition_that_does_not_hold_says_why() {
        let state = Condition { ready: false, reason: "NoCni".to_owned(), message: "put a file".to_owned() };
        let shown = condition("NetworkReady", &state);
        assert_eq!((shown.status, shown.reason.as_str()), (false, "NoCni"));
        assert!(condition("RuntimeReady", &Condition::met()).status);
    }
}
