//! Requests that cannot be served: each has its code and names its object.

use a3s_box_cri::proto::{
    Capability, ContainerConfig, Int64Value, KeyValue, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, Mount, PodSandboxConfig,
};
use anyhow::{Context, Result, ensure};
use tonic::{Code, Status};

use crate::suite::{Suite, exit_code, launch, log_lines};

/// The failure of a call that must fail, with its code and the word that its message must hold.
fn refused<T>(outcome: Result<T, Status>, code: Code, word: &str) -> Result<()> {
    let error = outcome.err().context("accepted")?;
    ensure!(error.code() == code, "{code:?} was expected: {error}");
    ensure!(error.message().contains(word), "the message does not name {word}: {error}");
    Ok(())
}

pub(crate) async fn a_pod_without_metadata_is_refused(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = PodSandboxConfig { metadata: None, ..suite.pod("nameless")? };
    refused(client.run_pod(&config).await, Code::InvalidArgument, "metadata")
}

pub(crate) async fn an_unknown_runtime_handler_is_named(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("handler")?;
    let outcome = client.run_pod_with_handler(&config, "no-such-handler").await;
    let error = outcome.err().context("accepted")?;
    ensure!(matches!(error.code(), Code::InvalidArgument | Code::NotFound), "{error}");
    ensure!(error.message().contains("no-such-handler"), "{error}");
    Ok(())
}

pub(crate) async fn an_unknown_image_is_not_found(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let missing = format!("{}/e2e/no-such-image:1", suite.registry().host());
    refused(client.pull(&missing).await, Code::NotFound, "no-such-image")?;
    let wrong = format!("{}/e2e/shell@sha256:{}", suite.registry().host(), "0".repeat(64));
    refused(client.pull(&wrong).await, Code::NotFound, "sha256:000")
}

pub(crate) async fn a_text_that_is_no_reference_is_refused(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    for text in ["", "UPPER", "name:tag:tag", "a@sha256:12"] {
        let error = client.pull(text).await.err().with_context(|| format!("{text:?} was pulled"))?;
        ensure!(error.code() == Code::InvalidArgument, "{text:?}: {error}");
    }
    Ok(())
}

pub(crate) async fn objects_that_do_not_exist_are_not_found(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let id = "f".repeat(64);
    refused(client.container_status(&id).await, Code::NotFound, &id)?;
    refused(client.start(&id).await, Code::NotFound, &id)?;
    refused(client.exec(&id, &["true"], 1).await, Code::NotFound, &id)?;
    let config = suite.pod("nowhere")?;
    refused(client.create(&id, suite.script("main", "true"), &config).await, Code::NotFound, &id)
}

pub(crate) async fn stopping_and_removing_what_does_not_exist_succeeds(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let id = "e".repeat(64);
    client.stop(&id, 1).await.context("StopContainer")?;
    client.remove(&id).await.context("RemoveContainer")?;
    client.stop_pod(&id).await.context("StopPodSandbox")?;
    client.remove_pod(&id).await.context("RemovePodSandbox")?;
    client.remove_image("127.0.0.1:1/not/here:1").await.context("RemoveImage")?;
    Ok(())
}

pub(crate) async fn containers_that_cannot_be_made_have_their_code_and_text(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("badcontainers")?;
    let pod = client.run_pod(&config).await?;
    let base = || suite.script("bad", "true");
    let context = |security_context: LinuxContainerSecurityContext| ContainerConfig {
        linux: Some(LinuxContainerConfig { security_context: Some(security_context), ..Default::default() }),
        ..base()
    };
    let resources = |resources: LinuxContainerResources| ContainerConfig {
        linux: Some(LinuxContainerConfig { resources: Some(resources), ..Default::default() }),
        ..base()
    };
    let capability = Capability { add_capabilities: vec!["NO_SUCH_POWER".to_owned()], ..Default::default() };
    let named =
        |name: &str| LinuxContainerSecurityContext { run_as_username: name.to_owned(), ..Default::default() };
    let group =
        LinuxContainerSecurityContext { run_as_group: Some(Int64Value { value: 5 }), ..Default::default() };
    let over = |path: &str| ContainerConfig {
        mounts: vec![Mount {
            host_path: "/tmp".to_owned(),
            container_path: path.to_owned(),
            ..Default::default()
        }],
        ..base()
    };
    let variable = |key: &str, value: &[u8]| ContainerConfig {
        envs: vec![KeyValue { key: key.to_owned(), value: value.to_vec() }],
        ..base()
    };
    let quota = LinuxContainerResources { cpu_quota: -5, ..Default::default() };
    let memory = LinuxContainerResources { memory_limit_in_bytes: i64::MIN, ..Default::default() };
    let adjustment = LinuxContainerResources { oom_score_adj: 100_000, ..Default::default() };
    for (container, word) in [
        (resources(quota), "resources.cpu_quota"),
        (resources(memory), "resources.memory_limit_in_bytes"),
        (resources(adjustment), "resources.oom_score_adj"),
        (
            context(LinuxContainerSecurityContext { capabilities: Some(capability), ..Default::default() }),
            "NO_SUCH_POWER",
        ),
        (context(named("nobody-here")), "nobody-here"),
        (context(group), "run_as_group"),
        (ContainerConfig { working_dir: "/etc/passwd".to_owned(), ..base() }, "/etc/passwd"),
        (over("/proc"), "mounts[0].container_path"),
        (over("/proc/sys"), "mounts[0].container_path"),
        (variable("A=B", b""), "envs[0].key"),
        (variable("A", b"\0"), "envs[0].value"),
        (ContainerConfig { args: vec!["x".repeat(1 << 20)], ..base() }, "config.command"),
    ] {
        let outcome = match client.create(&pod, container, &config).await {
            Ok(id) => {
                let started = client.start(&id).await;
                client.remove(&id).await?;
                started
            }
            Err(status) => Err(status),
        };
        refused(outcome, Code::InvalidArgument, word).context(word)?;
    }

    let many = (0..10_000).map(|index| KeyValue { key: format!("N{index}"), value: b"v".to_vec() }).collect();
    let many = ContainerConfig { envs: many, ..suite.script("many", "env | grep -c ^N") };
    let many = launch(&mut client, &pod, many, &config).await?;
    ensure!(exit_code(&client, &many).await? == 0, "10,000 variables");

    let main = client.create(&pod, suite.script("main", "sleep 3600"), &config).await?;
    let twin = client.create(&pod, suite.script("main", "true"), &config).await;
    refused(twin, Code::AlreadyExists, "main")?;
    client.start(&main).await?;
    refused(client.start(&main).await, Code::FailedPrecondition, "main")?;
    refused(client.exec(&many, &["true"], 5).await, Code::FailedPrecondition, "exited")?;
    client.stop_pod(&pod).await?;
    let counted = log_lines(&config, "many")?;
    ensure!(counted.iter().any(|line| line.2 == "10000"), "{counted:?}");
    let late = client.create(&pod, suite.script("late", "true"), &config).await;
    refused(late, Code::FailedPrecondition, "sandbox")?;
    client.remove_pod(&pod).await?;
    Ok(())
}
