//! What clients see of calls that need no virtual machine, or fail before there is one: over a real
//! socket with the generated clients.

#![allow(missing_docs)]

mod common;

use a3s_box_cri::proto::*;
use common::Served;
use tonic::Code;

const UNKNOWN: &str = "00000000000000000000000000000000000000000000000000000000000000aa";

fn pod(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: "uid".to_owned(),
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        ..Default::default()
    }
}

#[tokio::test]
async fn version_status_and_configuration_are_answered() {
    let mut served = Served::start().await;
    let version = served.runtime.version(VersionRequest::default()).await.unwrap().into_inner();
    assert_eq!((version.runtime_name.as_str(), version.runtime_version.as_str()), ("a3s-box", "1.2.3"));
    assert_eq!((version.version.as_str(), version.runtime_api_version.as_str()), ("0.1.0", "v1"));

    let status = served.runtime.status(StatusRequest { verbose: true }).await.unwrap().into_inner();
    let conditions = status.status.unwrap().conditions;
    assert_eq!(
        conditions.iter().map(|c| c.r#type.as_str()).collect::<Vec<_>>(),
        ["RuntimeReady", "NetworkReady", "A3sBoxHasNoLeftovers", "A3sBoxSpeaksToAllPods"]
    );
    assert!(conditions[0].status && conditions[2].status && conditions[3].status);
    assert_eq!(status.info["config"], "{}");
    assert_eq!(status.info["foreign"], "{}");
    assert_eq!((status.info["leftovers"].as_str(), status.info["quarantined"].as_str()), ("[]", "[]"));
    assert_eq!(status.runtime_handlers.len(), 2);
    let brief = served.runtime.status(StatusRequest { verbose: false }).await.unwrap().into_inner();
    assert!(brief.info.is_empty());

    let config = served.runtime.runtime_config(RuntimeConfigRequest {}).await.unwrap().into_inner();
    assert_eq!(config.linux.unwrap().cgroup_driver(), CgroupDriver::Systemd);
    served.stop().await;
}

/// Kubelet calls it on every node with pod addresses, and goes on calling until it is answered.
#[tokio::test]
async fn pod_addresses_are_taken_note_of_and_nonsense_is_refused() {
    let mut served = Served::start().await;
    let request = |pod_cidr: &str| UpdateRuntimeConfigRequest {
        runtime_config: Some(RuntimeConfig {
            network_config: Some(NetworkConfig { pod_cidr: pod_cidr.to_owned() }),
        }),
    };
    for told in ["10.244.1.0/24", "10.244.1.0/24,fd00:244::/64", ""] {
        served.runtime.update_runtime_config(request(told)).await.unwrap();
    }
    served.runtime.update_runtime_config(UpdateRuntimeConfigRequest::default()).await.unwrap();
    let refused = served.runtime.update_runtime_config(request("10.244.1.0")).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(
        refused.message().contains("runtime_config.network_config.pod_cidr: \"10.244.1.0\""),
        "{refused}"
    );
    served.stop().await;
}

#[tokio::test]
async fn unknown_objects_are_not_found_by_status_and_gone_for_stop_and_remove() {
    let mut served = Served::start().await;
    let runtime = &mut served.runtime;
    let pod_sandbox_id = UNKNOWN.to_owned();
    let container_id = UNKNOWN.to_owned();

    let status = PodSandboxStatusRequest { pod_sandbox_id: pod_sandbox_id.clone(), verbose: false };
    assert_eq!(runtime.pod_sandbox_status(status).await.unwrap_err().code(), Code::NotFound);
    let status = ContainerStatusRequest { container_id: container_id.clone(), verbose: false };
    assert_eq!(runtime.container_status(status).await.unwrap_err().code(), Code::NotFound);
    let start = StartContainerRequest { container_id: container_id.clone() };
    assert_eq!(runtime.start_container(start).await.unwrap_err().code(), Code::NotFound);
    let exec =
        ExecSyncRequest { container_id: container_id.clone(), cmd: vec!["true".to_owned()], timeout: 1 };
    assert_eq!(runtime.exec_sync(exec).await.unwrap_err().code(), Code::NotFound);
    let stats = ContainerStatsRequest { container_id: container_id.clone() };
    assert_eq!(runtime.container_stats(stats).await.unwrap_err().code(), Code::NotFound);
    let stats = runtime.list_container_stats(ListContainerStatsRequest::default()).await.unwrap();
    assert!(stats.into_inner().stats.is_empty());
    let reopen = ReopenContainerLogRequest { container_id: container_id.clone() };
    assert_eq!(runtime.reopen_container_log(reopen).await.unwrap_err().code(), Code::NotFound);

    runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() }).await.unwrap();
    runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id }).await.unwrap();
    runtime
        .stop_container(StopContainerRequest { container_id: container_id.clone(), timeout: 1 })
        .await
        .unwrap();
    runtime.remove_container(RemoveContainerRequest { container_id }).await.unwrap();
    served.stop().await;
}

/// They were told that their arguments were wrong, from which nobody learns that the object is gone.
#[tokio::test]
async fn an_unknown_object_is_not_found_whatever_else_is_wrong_with_the_call() {
    let mut served = Served::start().await;
    let runtime = &mut served.runtime;
    let (pod_sandbox_id, container_id) = (UNKNOWN.to_owned(), UNKNOWN.to_owned());
    let create = CreateContainerRequest {
        pod_sandbox_id: pod_sandbox_id.clone(),
        ..CreateContainerRequest::default()
    };
    let exec_sync = ExecSyncRequest { container_id: container_id.clone(), cmd: Vec::new(), timeout: -1 };
    let exec = ExecRequest { container_id: container_id.clone(), ..ExecRequest::default() };
    let attach = AttachRequest { container_id: container_id.clone(), ..AttachRequest::default() };
    let forward = PortForwardRequest { pod_sandbox_id, port: vec![-1] };
    for (call, outcome) in [
        ("CreateContainer", runtime.create_container(create).await.map(drop)),
        ("ExecSync", runtime.exec_sync(exec_sync).await.map(drop)),
        ("Exec", runtime.exec(exec).await.map(drop)),
        ("Attach", runtime.attach(attach).await.map(drop)),
        ("PortForward", runtime.port_forward(forward).await.map(drop)),
    ] {
        assert_eq!(outcome.unwrap_err().code(), Code::NotFound, "{call}");
    }
    runtime.stop_container(StopContainerRequest { container_id, timeout: -1 }).await.unwrap();
    served.stop().await;
}

#[tokio::test]
async fn an_empty_id_is_refused_and_never_taken_for_a_prefix() {
    let mut served = Served::start().await;
    let runtime = &mut served.runtime;
    let refused = [
        runtime.stop_pod_sandbox(StopPodSandboxRequest::default()).await.map(drop),
        runtime.remove_pod_sandbox(RemovePodSandboxRequest::default()).await.map(drop),
        runtime.pod_sandbox_status(PodSandboxStatusRequest::default()).await.map(drop),
        runtime.stop_container(StopContainerRequest::default()).await.map(drop),
        runtime.remove_container(RemoveContainerRequest::default()).await.map(drop),
        runtime.start_container(StartContainerRequest::default()).await.map(drop),
        runtime.container_status(ContainerStatusRequest::default()).await.map(drop),
        runtime.container_stats(ContainerStatsRequest::default()).await.map(drop),
    ];
    for outcome in refused {
        let status = outcome.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains("_id: is required"), "{status}");
    }
    served.stop().await;
}

#[tokio::test]
async fn bad_pods_are_refused_by_field_before_anything_is_made() {
    let mut served = Served::start().await;
    let run = |config, handler: &str| RunPodSandboxRequest { config, runtime_handler: handler.to_owned() };
    let anonymous = PodSandboxConfig { metadata: None, ..pod("x") };
    for (request, field) in [
        (run(None, ""), "config"),
        (run(Some(anonymous), ""), "config.metadata"),
        (run(Some(pod("x")), "runc"), "runtime_handler"),
    ] {
        let status = served.runtime.run_pod_sandbox(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(&format!(" {field}: ")), "{status}");
    }
    let listed =
        served.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap().into_inner();
    assert!(listed.items.is_empty());
    served.stop().await;
}

#[tokio::test]
async fn a_box_that_cannot_start_says_why_and_leaves_its_name_free() {
    let mut served = Served::start().await;
    for _ in 0..2 {
        let request = RunPodSandboxRequest { config: Some(pod("x")), runtime_handler: String::new() };
        let status = served.runtime.run_pod_sandbox(request).await.unwrap_err();
        assert_ne!(status.code(), Code::AlreadyExists, "{status}");
        assert!(status.message().contains("the test's hypervisor is missing"), "{status}");
    }
    let listed =
        served.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap().into_inner();
    assert!(listed.items.is_empty(), "{:?}", listed.items);
    served.stop().await;
}

#[tokio::test]
async fn a_pod_cannot_name_a_file_of_the_node_as_its_image() {
    let mut served = Served::start().await;
    for image in ["oci:/var/lib/secrets", "oci-archive:/root/x.tar", "docker-archive:/root/x.tar:a"] {
        let spec = ImageSpec { image: image.to_owned(), ..Default::default() };
        let request = PullImageRequest { image: Some(spec), ..Default::default() };
        let status = served.images.pull_image(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains("image.image: "), "{status}");
    }
    served.stop().await;
}

#[tokio::test]
async fn an_unknown_image_is_an_empty_answer_and_its_removal_success() {
    let mut served = Served::start().await;
    let image = || Some(ImageSpec { image: "registry.test/none:1".to_owned(), ..Default::default() });
    let status = ImageStatusRequest { image: image(), verbose: true };
    assert_eq!(served.images.image_status(status).await.unwrap().into_inner().image, None);
    served.images.remove_image(RemoveImageRequest { image: image() }).await.unwrap();
    let missing = served.images.pull_image(PullImageRequest::default()).await.unwrap_err();
    assert_eq!(
        (missing.code(), missing.message()),
        (Code::InvalidArgument, "invalid request: image: is required")
    );
    let listed = served.images.list_images(ListImagesRequest::default()).await.unwrap().into_inner();
    assert!(listed.images.is_empty());
    let info = served.images.image_fs_info(ImageFsInfoRequest {}).await.unwrap().into_inner();
    assert!(info.image_filesystems[0].timestamp > 0);
    assert_eq!(info.container_filesystems.len(), 1);
    served.stop().await;
}

/// A listener must not hold up the end of the server.
#[tokio::test]
async fn a_listener_of_events_waits_and_ends_with_the_server() {
    let mut served = Served::start().await;
    let mut events = served.runtime.get_container_events(GetEventsRequest {}).await.unwrap().into_inner();
    served.stop().await;
    assert_eq!(events.message().await.unwrap(), None);
}

#[tokio::test]
async fn calls_of_later_versions_say_their_name() {
    let mut served = Served::start().await;
    let runtime = &mut served.runtime;
    macro_rules! all {
        ($($method:ident($request:ident) => $rpc:literal),+ $(,)?) => {$(
            let status = runtime.$method($request::default()).await.map(drop).unwrap_err();
            assert_eq!(status.code(), Code::Unimplemented, $rpc);
            assert!(status.message().starts_with(concat!($rpc, " is not implemented")), "{status}");
        )+};
    }
    all!(
        checkpoint_container(CheckpointContainerRequest) => "CheckpointContainer",
        checkpoint_pod(CheckpointPodRequest) => "CheckpointPod",
        restore_pod(RestorePodRequest) => "RestorePod",
    );
    served.stop().await;
}

#[tokio::test]
async fn streamed_lists_of_nothing_end_at_once() {
    let mut served = Served::start().await;
    let runtime = &mut served.runtime;
    macro_rules! empty {
        ($($call:expr),+ $(,)?) => {$(
            let mut stream = $call.await.unwrap().into_inner();
            assert_eq!(stream.message().await.unwrap(), None);
        )+};
    }
    empty!(
        runtime.stream_pod_sandboxes(StreamPodSandboxesRequest::default()),
        runtime.stream_containers(StreamContainersRequest::default()),
        runtime.stream_container_stats(StreamContainerStatsRequest::default()),
        runtime.stream_pod_sandbox_stats(StreamPodSandboxStatsRequest::default()),
        runtime.stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest::default()),
        served.images.stream_images(StreamImagesRequest::default()),
    );
    served.stop().await;
}

#[tokio::test]
async fn statistics_of_an_unknown_pod_are_not_found() {
    let mut served = Served::start().await;
    let ask = |id: &str| PodSandboxStatsRequest { pod_sandbox_id: id.to_owned() };
    let code = |answer: Result<_, tonic::Status>| answer.map(drop).unwrap_err().code();
    assert_eq!(code(served.runtime.pod_sandbox_stats(ask(UNKNOWN)).await), Code::NotFound);
    assert_eq!(code(served.runtime.pod_sandbox_stats(ask("")).await), Code::InvalidArgument);
    served.stop().await;
}
