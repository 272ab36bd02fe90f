//! Container logs as kubelet reads them.

use std::fs;
use std::path::Path;

use a3s_box_cri::proto::ReopenContainerLogRequest;
use anyhow::{Result, ensure};

use crate::suite::{Suite, exit_code, launch, log_lines, logged};

/// The longest piece that kubelet accepts as one line.
const PIECE: usize = 16 * 1024;

pub(crate) async fn streams_are_apart_and_partial_lines_are_marked(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("logs")?;
    let pod = client.run_pod(&config).await?;
    let script = "echo one; echo two >&2; head -c 40000 /dev/zero | tr '\\0' y; echo; printf 'no newline'";
    let container = launch(&mut client, &pod, suite.script("main", script), &config).await?;
    ensure!(exit_code(&client, &container).await? == 0);
    // Stopping the pod flushes what is under way: afterwards the log is complete.
    client.stop_pod(&pod).await?;

    let lines = log_lines(&config, "main")?;
    let of = |stream: &'static str| lines.iter().filter(move |line| line.0 == stream);
    ensure!(of("stderr").map(|line| line.2.as_str()).eq(["two"]), "stderr: {lines:?}");
    let stdout: Vec<_> = of("stdout").collect();
    ensure!(stdout[0].1 == "F" && stdout[0].2 == "one", "{:?}", stdout[0]);
    let pieces: Vec<_> = stdout.iter().filter(|line| line.2.starts_with('y')).collect();
    ensure!(
        pieces.iter().map(|line| line.2.len()).sum::<usize>() == 40_000,
        "bytes of the long line are missing"
    );
    ensure!(pieces.iter().all(|line| line.2.len() <= PIECE), "a piece is longer than kubelet takes");
    let tags: String = pieces.iter().map(|line| line.1.as_str()).collect();
    ensure!(tags.ends_with('F') && tags[..tags.len() - 1].bytes().all(|tag| tag == b'P'), "tags {tags}");
    ensure!(stdout.last().is_some_and(|line| line.2 == "no newline"), "{:?}", stdout.last());
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn a_rotated_log_is_reopened(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("rotation")?;
    let pod = client.run_pod(&config).await?;
    let script = "echo before; until [ -e /go ]; do sleep 0.1; done; echo after; sleep 3600";
    let container = launch(&mut client, &pod, suite.script("main", script), &config).await?;
    logged(&config, "main", "before").await?;

    let log = Path::new(&config.log_directory).join("main.log");
    let rotated = Path::new(&config.log_directory).join("main.log.1");
    fs::rename(&log, &rotated)?;
    client
        .runtime
        .reopen_container_log(ReopenContainerLogRequest { container_id: container.clone() })
        .await?;
    ensure!(log.exists(), "the log was not made anew");
    client.exec(&container, &["touch", "/go"], 10).await?;
    logged(&config, "main", "after").await?;
    ensure!(
        !fs::read_to_string(&log)?.contains("before") && !fs::read_to_string(&rotated)?.contains("after")
    );
    client.remove_pod(&pod).await?;
    Ok(())
}
