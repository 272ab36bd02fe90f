//! The log path by itself: an agent on this side of the hardware boundary, the daemon's code, and a file.

#[path = "../../../../crates/runtime/tests/support/mod.rs"]
mod support;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use self::support::{World, container, image, launch, pod};
use super::{LONG, SHORT};
use crate::samples::Samples;

/// What the agent has in memory.
const MOST_MIB: u64 = 256;

/// Time and stream of a line (CRI log format).
const HEAD: u64 = 40;

const LIMIT: Duration = Duration::from_secs(120);

/// As the daemon's log is written.
const PIECE: usize = 256 * 1024;

/// Measures and prints, with the time for writing the same file and nothing else in each round.
pub(super) fn run(rounds: u32, mib: u64) -> Result<()> {
    let mib = mib.min(MOST_MIB);
    println!(
        "\nlog path from a fake agent on the host, {mib} MiB of output, {rounds} round(s); target 200 MB/s"
    );
    println!("{:<32}{:>10}{:>14}{:>10}", "", "MB/s", "a file's MB/s", "to that");
    for width in [SHORT, LONG] {
        let count = (mib << 20) / width;
        let (mut written, mut floor) = (Samples::default(), Samples::default());
        for _ in 0..rounds {
            // Threads of their own: the daemons in there bring their own runtimes.
            let measured = thread::spawn(move || one(count, width)).join();
            let (log, file) = measured.unwrap_or_else(|_| bail!("a measurement panicked"))?;
            written.push(log);
            floor.push(file);
        }
        println!(
            "{:<32}{:>10.0}{:>14.0}{:>10.2}",
            format!("lines of {width} bytes"),
            written.rate(count * width),
            floor.rate(count * width),
            floor.ratio_to(&written),
        );
    }
    Ok(())
}

/// The time for a log, and that for a plain file of its length.
fn one(count: u64, width: u64) -> Result<(Duration, Duration)> {
    let world = World::new();
    let daemon = world.daemon();
    let (length, logs) = (count * (width + HEAD), world.path("logs"));
    let log = logs.join("c/0.log");
    let written = daemon.run(async {
        let manager = &daemon.manager;
        let id = manager.run_box(pod("bench", &logs)).await?;
        let spec = container("c", &["pour", &count.to_string(), &width.to_string()]);
        launch(manager, &id, spec, image(world.dir.path())).await?;
        // The agent has made all output by now and sends it.
        let started = Instant::now();
        while fs::metadata(&log).map_or(0, |file| file.len()) < length {
            if started.elapsed() > LIMIT {
                bail!("the log is not complete after {LIMIT:?}");
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let taken = started.elapsed();
        manager.remove_box(&id).await?;
        anyhow::Ok(taken)
    })?;
    let floor = plain(&world.path("plain"), length)?;
    Ok((written, floor))
}

fn plain(path: &Path, mut length: u64) -> Result<Duration> {
    let piece = vec![b'x'; PIECE];
    let started = Instant::now();
    let mut file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    while length > 0 {
        let now = length.min(PIECE as u64);
        file.write_all(&piece[..now as usize])?;
        length -= now;
    }
    Ok(started.elapsed())
}
