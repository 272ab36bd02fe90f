//! Boxes and sessions as CRI's lists and statuses show them.

use std::collections::HashMap;

use a3s_box_core::lifecycle::{BoxPhase, SessionPhase};
use a3s_box_core::spec::{BoxSpec, Limits, MountSource, MountSpec, PodIdentity};
use a3s_box_runtime::{BoxStatus, ResolvedUser, SessionStatus};
use serde_json::json;

use super::{signal, unsorted, users};
use crate::proto;

/// A box as ListPodSandbox shows it.
pub fn sandbox(state: &BoxStatus) -> proto::PodSandbox {
    proto::PodSandbox {
        id: state.id.to_string(),
        metadata: Some(metadata(&state.spec.identity)),
        state: sandbox_state(&state.phase).into(),
        created_at: state.created_at_ns,
        labels: unsorted(&state.spec.labels),
        annotations: unsorted(&state.spec.annotations),
        runtime_handler: state.spec.runtime_handler.clone(),
    }
}

/// A box as PodSandboxStatus shows it.
pub fn sandbox_status(state: &BoxStatus) -> proto::PodSandboxStatus {
    proto::PodSandboxStatus {
        id: state.id.to_string(),
        metadata: Some(metadata(&state.spec.identity)),
        state: sandbox_state(&state.phase).into(),
        created_at: state.created_at_ns,
        network: Some(network(state)),
        linux: Some(proto::LinuxPodSandboxStatus {
            namespaces: Some(proto::Namespace { options: Some(namespaces(&state.spec)) }),
        }),
        labels: unsorted(&state.spec.labels),
        annotations: unsorted(&state.spec.annotations),
        runtime_handler: state.spec.runtime_handler.clone(),
    }
}

/// Every box has its own network, IPC and processes; the zero of the modes says so.
fn namespaces(spec: &BoxSpec) -> proto::NamespaceOption {
    proto::NamespaceOption {
        userns_options: spec.user_namespace.as_ref().map(users::to_cri),
        ..Default::default()
    }
}

/// What `crictl inspectp` shows besides.
pub fn sandbox_info(state: &BoxStatus) -> HashMap<String, String> {
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1000.0;
    let timeline: Vec<_> = state
        .timeline
        .iter()
        .map(|stage| json!({ "stage": stage.name, "atMs": ms(stage.at), "ms": ms(stage.took) }))
        .collect();
    let info = json!({
        "phase": state.phase,
        "pid": state.vmm_pid,
        "backend": state.backend,
        "guestKernel": state.kernel_release,
        "directory": state.dir,
        "timeline": timeline,
        "spec": state.spec,
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}

pub(super) fn metadata(identity: &PodIdentity) -> proto::PodSandboxMetadata {
    proto::PodSandboxMetadata {
        name: identity.name.clone(),
        uid: identity.uid.clone(),
        namespace: identity.namespace.clone(),
        attempt: identity.attempt,
    }
}

fn sandbox_state(phase: &BoxPhase) -> proto::PodSandboxState {
    if phase.is_ready() {
        proto::PodSandboxState::SandboxReady
    } else {
        proto::PodSandboxState::SandboxNotready
    }
}

/// Kubelet takes the pod's addresses from a sandbox only while it is ready.
fn network(state: &BoxStatus) -> proto::PodSandboxNetworkStatus {
    let mut ips = state.ips.iter().map(|ip| ip.to_string());
    let ip = ips.next().unwrap_or_default();
    proto::PodSandboxNetworkStatus { ip, additional_ips: ips.map(|ip| proto::PodIp { ip }).collect() }
}

/// A session as ListContainers shows it. `image` is the name to show for its image.
pub fn container(state: &SessionStatus, image: String) -> proto::Container {
    proto::Container {
        id: state.id.to_string(),
        pod_sandbox_id: state.box_id.to_string(),
        metadata: Some(container_metadata(state)),
        image: Some(image_spec(state, image)),
        image_ref: state.image_digest_ref.clone(),
        state: container_state(&state.phase).into(),
        created_at: state.created_at_ns,
        labels: unsorted(&state.spec.labels),
        annotations: unsorted(&state.spec.annotations),
        image_id: state.image_id.clone(),
    }
}

/// A session as ContainerStatus shows it. `image` is the name to show for its image.
pub fn container_status(state: &SessionStatus, image: String) -> proto::ContainerStatus {
    let times = times(&state.phase);
    proto::ContainerStatus {
        id: state.id.to_string(),
        metadata: Some(container_metadata(state)),
        state: container_state(&state.phase).into(),
        created_at: state.created_at_ns,
        started_at: times.started_at,
        finished_at: times.finished_at,
        exit_code: times.exit_code,
        image: Some(image_spec(state, image)),
        image_ref: state.image_digest_ref.clone(),
        reason: times.reason,
        message: times.message,
        labels: unsorted(&state.spec.labels),
        annotations: unsorted(&state.spec.annotations),
        mounts: state.spec.mounts.iter().filter_map(mount).collect(),
        log_path: state.log_path.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
        resources: Some(proto::ContainerResources {
            linux: Some(resources(&state.spec.limits, state.spec.process.oom_score_adj)),
            windows: None,
        }),
        image_id: state.image_id.clone(),
        user: state.user.as_ref().map(user),
        stop_signal: signal::name(state.spec.stop_signal).into(),
    }
}

/// What `crictl inspect` shows besides.
pub fn container_info(state: &SessionStatus) -> HashMap<String, String> {
    let info = json!({
        "sandboxID": state.box_id,
        "pid": state.pid,
        "phase": state.phase,
        "spec": state.spec,
        "facts": state.info,
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}

pub(super) fn container_metadata(state: &SessionStatus) -> proto::ContainerMetadata {
    proto::ContainerMetadata { name: state.spec.name.clone(), attempt: state.spec.attempt }
}

fn image_spec(state: &SessionStatus, shown: String) -> proto::ImageSpec {
    proto::ImageSpec {
        image: shown,
        user_specified_image: state.spec.image_ref.clone(),
        ..Default::default()
    }
}

fn container_state(phase: &SessionPhase) -> proto::ContainerState {
    match phase {
        SessionPhase::Created => proto::ContainerState::ContainerCreated,
        SessionPhase::Running { .. } => proto::ContainerState::ContainerRunning,
        SessionPhase::Exited { .. } => proto::ContainerState::ContainerExited,
    }
}

/// The part of a status that tells how far a session has come.
#[derive(Debug, Default, PartialEq, Eq)]
struct Times {
    started_at: i64,
    finished_at: i64,
    exit_code: i32,
    reason: String,
    message: String,
}

fn times(phase: &SessionPhase) -> Times {
    match phase {
        SessionPhase::Created => Times::default(),
        SessionPhase::Running { started_at_ns } => Times { started_at: *started_at_ns, ..Default::default() },
        SessionPhase::Exited { started_at_ns, finished_at_ns, code, reason, message } => Times {
            started_at: *started_at_ns,
            finished_at: *finished_at_ns,
            exit_code: *code,
            reason: reason.clone(),
            message: message.clone(),
        },
    }
}

fn mount(mount: &MountSpec) -> Option<proto::Mount> {
    let common = proto::Mount {
        container_path: mount.target.clone(),
        readonly: mount.readonly,
        mount_options: mount.options.clone(),
        ..Default::default()
    };
    let (path, propagate, recursive_readonly, id_mapped) = match &mount.source {
        MountSource::Host { path, propagate, recursive_readonly, id_mapped } => {
            (path, *propagate, *recursive_readonly, id_mapped)
        }
        MountSource::Image { reference, id, sub_path, .. } => {
            let image =
                proto::ImageSpec { image: reference.clone(), image_ref: id.clone(), ..Default::default() };
            return Some(proto::Mount { image: Some(image), image_sub_path: sub_path.clone(), ..common });
        }
        // No client of CRI asked for it.
        MountSource::Tmpfs { .. } => return None,
    };
    let propagation = if propagate {
        proto::MountPropagation::PropagationHostToContainer
    } else {
        proto::MountPropagation::PropagationPrivate
    };
    Some(proto::Mount {
        host_path: path.display().to_string(),
        propagation: propagation.into(),
        recursive_read_only: recursive_readonly,
        uid_mappings: id_mapped.iter().map(|users| users::id_mapping(users.uids)).collect(),
        gid_mappings: id_mapped.iter().map(|users| users::id_mapping(users.gids)).collect(),
        ..common
    })
}

fn resources(limits: &Limits, oom_score_adj: Option<i32>) -> proto::LinuxContainerResources {
    let signed = |value: Option<u64>| value.and_then(|value| i64::try_from(value).ok()).unwrap_or(0);
    proto::LinuxContainerResources {
        cpu_period: signed(limits.cpu_period_us),
        cpu_quota: limits.cpu_quota_us.unwrap_or(0),
        cpu_shares: signed(limits.cpu_shares),
        memory_limit_in_bytes: limits.memory_bytes.unwrap_or(0),
        oom_score_adj: i64::from(oom_score_adj.unwrap_or(0)),
        cpuset_cpus: limits.cpuset_cpus.clone(),
        cpuset_mems: limits.cpuset_mems.clone(),
        hugepage_limits: Vec::new(),
        unified: unsorted(&limits.unified),
        memory_swap_limit_in_bytes: limits.memory_swap_bytes.unwrap_or(0),
    }
}

fn user(user: &ResolvedUser) -> proto::ContainerUser {
    proto::ContainerUser {
        linux: Some(proto::LinuxContainerUser {
            uid: user.uid.into(),
            gid: user.gid.into(),
            supplemental_groups: user.groups.iter().map(|gid| i64::from(*gid)).collect(),
        }),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::PathBuf;

    use a3s_box_core::lifecycle::StopCause;
    use a3s_box_core::spec::{BoxSpec, SessionSpec};
    use a3s_box_core::{BoxId, SessionId};
    use a3s_box_runtime::Stage;

    use super::*;

    pub(in super::super) fn a_box(phase: BoxPhase) -> BoxStatus {
        BoxStatus {
            id: BoxId::from_random([7; 32]),
            spec: BoxSpec { runtime_handler: "a3s-box".to_owned(), ..Default::default() },
            phase,
            created_at_ns: 5,
            ips: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            backend: "qemu".to_owned(),
            kernel_release: "6.12.1".to_owned(),
            vmm_pid: Some(42),
            timeline: vec![Stage {
                name: "vmm".to_owned(),
                at: std::time::Duration::from_millis(5),
                took: std::time::Duration::from_millis(12),
            }],
            dir: PathBuf::from("/run/a3s-box/boxes/07"),
        }
    }

    pub(in super::super) fn a_session(phase: SessionPhase) -> SessionStatus {
        SessionStatus {
            id: SessionId::from_random([9; 32]),
            box_id: BoxId::from_random([7; 32]),
            spec: SessionSpec { name: "app".to_owned(), stop_signal: 3, ..Default::default() },
            image_id: "sha256:1".to_owned(),
            image_digest_ref: "r/app@sha256:2".to_owned(),
            phase,
            created_at_ns: 5,
            log_path: Some(PathBuf::from("/var/log/pods/x/app/0.log")),
            user: Some(ResolvedUser { uid: 1000, gid: 100, groups: vec![100, 200] }),
            pid: Some(17),
            info: Default::default(),
        }
    }

    #[test]
    fn only_a_ready_box_is_ready() {
        let phases = [
            BoxPhase::Reserved,
            BoxPhase::Prepared,
            BoxPhase::Booting,
            BoxPhase::Ready,
            BoxPhase::Stopping,
            BoxPhase::Stopped(StopCause::GuestPowerOff),
        ];
        for phase in phases {
            let ready = phase == BoxPhase::Ready;
            let status = sandbox_status(&a_box(phase));
            assert_eq!(status.state == i32::from(proto::PodSandboxState::SandboxReady), ready);
        }
    }

    #[test]
    fn the_first_address_is_the_pods_and_the_rest_are_additional() {
        let network = sandbox_status(&a_box(BoxPhase::Ready)).network.unwrap();
        assert_eq!(network.ip, "10.0.0.2");
        assert_eq!(network.additional_ips, [proto::PodIp { ip: "fd00::2".to_owned() }]);
    }

    #[test]
    fn verbose_information_is_json() {
        let info = sandbox_info(&a_box(BoxPhase::Ready));
        let parsed: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
        assert_eq!((&parsed["pid"], &parsed["backend"]), (&json!(42), &json!("qemu")));
        assert_eq!(parsed["timeline"][0], json!({ "stage": "vmm", "atMs": 5.0, "ms": 12.0 }));
        let info = container_info(&a_session(SessionPhase::Created));
        let parsed: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
        assert_eq!(parsed["pid"], 17);
    }

    #[test]
    fn a_status_tells_how_far_a_session_has_come() {
        let created = container_status(&a_session(SessionPhase::Created), "r/app:1".to_owned());
        assert_eq!((created.started_at, created.finished_at), (0, 0));
        let running = container_status(&a_session(SessionPhase::Running { started_at_ns: 6 }), String::new());
        assert_eq!(running.state, i32::from(proto::ContainerState::ContainerRunning));
        assert_eq!((running.started_at, running.finished_at), (6, 0));
        let exited = SessionPhase::Exited {
            started_at_ns: 6,
            finished_at_ns: 8,
            code: 137,
            reason: "OOMKilled".to_owned(),
            message: "out of memory".to_owned(),
        };
        let exited = container_status(&a_session(exited), String::new());
        assert_eq!(exited.state, i32::from(proto::ContainerState::ContainerExited));
        assert_eq!((exited.finished_at, exited.exit_code), (8, 137));
        assert_eq!((exited.reason.as_str(), exited.message.as_str()), ("OOMKilled", "out of memory"));
    }

    #[test]
    fn a_status_names_image_log_user_and_stop_signal() {
        let status = container_status(&a_session(SessionPhase::Created), "r/app:1".to_owned());
        assert_eq!(status.image.unwrap().image, "r/app:1");
        assert_eq!((status.image_ref.as_str(), status.image_id.as_str()), ("r/app@sha256:2", "sha256:1"));
        assert_eq!(status.log_path, "/var/log/pods/x/app/0.log");
        assert_eq!(status.user.unwrap().linux.unwrap().supplemental_groups, [100, 200]);
        assert_eq!(status.stop_signal, i32::from(proto::Signal::Sigquit));
    }

    #[test]
    fn mounts_are_shown_as_they_were_asked_for() {
        let asked = proto::Mount {
            container_path: "/data".to_owned(),
            host_path: "/var/lib/x".to_owned(),
            readonly: true,
            recursive_read_only: true,
            mount_options: vec!["noexec".to_owned()],
            ..Default::default()
        };
        let mut session = a_session(SessionPhase::Created);
        let host = MountSource::Host {
            path: "/var/lib/x".into(),
            propagate: false,
            recursive_readonly: true,
            id_mapped: None,
        };
        session.spec.mounts = vec![
            MountSpec {
                source: host,
                target: "/data".to_owned(),
                readonly: true,
                options: vec!["noexec".to_owned()],
            },
            MountSpec {
                source: MountSource::Tmpfs { size: 0 },
                target: "/tmp".to_owned(),
                readonly: false,
                options: vec![],
            },
            MountSpec {
                source: MountSource::Image {
                    reference: "model:1".to_owned(),
                    id: "sha256:77".to_owned(),
                    layers: vec![],
                    sub_path: "weights".to_owned(),
                },
                target: "/model".to_owned(),
                readonly: true,
                options: vec![],
            },
        ];
        let image = proto::ImageSpec {
            image: "model:1".to_owned(),
            image_ref: "sha256:77".to_owned(),
            ..Default::default()
        };
        let volume = proto::Mount {
            container_path: "/model".to_owned(),
            readonly: true,
            image: Some(image),
            image_sub_path: "weights".to_owned(),
            ..Default::default()
        };
        assert_eq!(container_status(&session, String::new()).mounts, [asked, volume]);
    }
}
