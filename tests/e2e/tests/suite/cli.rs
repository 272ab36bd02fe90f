//! The command line program, without Kubernetes.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::process::Command;

use crate::suite::Suite;

const LIMIT: Duration = Duration::from_secs(120);

async fn a3s_box(suite: &Suite, arguments: &[&str]) -> Result<std::process::Output> {
    let state = suite.state().join("cli");
    let mut command = Command::new(suite.layout().cli());
    command
        .arg("--config")
        .arg(suite.state().join("config.toml"))
        // An instance of its own: the daemon's records are the daemon's.
        .arg("--root")
        .arg(state.join("root"))
        .arg("--run-dir")
        .arg(state.join("run"))
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    tokio::time::timeout(LIMIT, command.output())
        .await
        .context("a3s-box did not end in time")?
        .context("starting a3s-box")
}

pub(crate) async fn run_gives_the_commands_output_and_exit_code(suite: &Suite) -> Result<()> {
    let script = "echo out; echo err >&2; echo $GREETING; exit 42";
    // The image's entrypoint is `sh -c`.
    let output = a3s_box(suite, &["run", "--env", "GREETING=hello", suite.shell(), "--", script]).await?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.code() == Some(42), "{}: {stdout}{stderr}", output.status);
    ensure!(stdout == "out\nhello\n", "stdout {stdout:?}, stderr {stderr:?}");
    ensure!(stderr.lines().any(|line| line == "err"), "stderr {stderr:?}");
    Ok(())
}

pub(crate) async fn doctor_reports_on_this_machine(suite: &Suite) -> Result<()> {
    let output = a3s_box(suite, &["doctor", "--json"]).await?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str::<serde_json::Value>(&stdout).with_context(|| format!("doctor's JSON: {stdout}"))?;
    ensure!(output.status.success(), "pods can run here, but doctor says {}: {stdout}", output.status);
    Ok(())
}
