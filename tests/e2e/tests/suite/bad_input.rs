//! Requests that cannot be served: each has its code and names its object.

use a3s_box_cri::proto::PodSandboxConfig;
use anyhow::{Context, Result, ensure};
use tonic::{Code, Status};

use crate::suite::Suite;

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
