//! Many short commands, and what they leave in the daemon.

use anyhow::{Result, ensure};

use crate::pod::Pod;
use a3s_box_e2e::processes::{descriptors, memory};

/// Commands that run at the same time.
const PARALLEL: usize = 10;

/// Buffers and tables that are as large as ever needed at once.
const WARM: usize = 20;

/// What a daemon may have more afterwards, KiB. Each exec that kept a buffer would be more after 2,000.
const ROOM: u64 = 16 * 1024;

pub(super) async fn check(daemon: u32, pod: &mut Pod, execs: u32) -> Result<()> {
    pod.latencies(PARALLEL, WARM).await?;
    let before = (memory(daemon, "VmRSS")?, descriptors(daemon)?);
    pod.latencies(PARALLEL, execs as usize / PARALLEL).await?;
    // The last connections end after their outcome was told.
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let after = (memory(daemon, "VmRSS")?, descriptors(daemon)?);
    println!(
        "\n{execs} short execs: the daemon's memory went from {} to {} KiB, its descriptors from {} to {}",
        before.0, after.0, before.1, after.1
    );
    ensure!(after.0 < before.0 + ROOM, "the daemon keeps something of every exec");
    ensure!(after.1 <= before.1 + PARALLEL, "the daemon keeps descriptors");
    Ok(())
}
