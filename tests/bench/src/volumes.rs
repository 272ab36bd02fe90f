//! Many small files in a box: on a volume, which is served by the host, and on the scratch disk, which the guest has to itself.
//!
//! The same program does the same in both, in turns. What it asks the host for is counted by the box's file server.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use a3s_box_vmm::share_requests::Snapshot;
use anyhow::{Context, Result, bail, ensure};

use crate::pair::{Alone, Programs};
use crate::samples::Samples;

/// What is done with the files, in this order.
const WORKS: [&str; 4] = ["make", "walk", "read", "remove"];

/// Where: below the volume, and below a directory of the container's own.
const VOLUME: &str = "/volume/files";
const SCRATCH: &str = "/tmp/files";

/// After this time a guest believes nothing that it was told of a file before: it is told to for a second.
const FORGOTTEN: Duration = Duration::from_millis(1200);

/// The longest for one piece of work.
const LIMIT: Duration = Duration::from_secs(300);

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    programs: Programs,
    /// Runs of every measurement.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=50))]
    rounds: u32,
    /// Files that are made, walked over and read.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    files: u64,
}

/// One of [`WORKS`], over all rounds.
#[derive(Default)]
struct Measured {
    volume: Samples,
    scratch: Samples,
    /// What the last round asked the file server for; the rounds do the same.
    asked: Option<Snapshot>,
    /// The same for the work on the scratch disk: what the box asks for anyhow.
    aside: Option<Snapshot>,
}

pub(crate) async fn run(options: &Options, state: &Path) -> Result<()> {
    let mut alone = Alone::start(&options.programs, &[], state).await?;
    let outcome = measure(options, &mut alone).await;
    alone.stop(outcome).await
}

async fn measure(options: &Options, alone: &mut Alone) -> Result<()> {
    let host = alone.state.join("volume");
    fs::create_dir(&host).with_context(|| format!("creating {}", host.display()))?;
    let mut container = Container {
        id: alone.pod.launch_with_volume(&host).await?,
        client: alone.pod.client(),
        dir: only_box(&alone.state.join("run/boxes"))?,
        files: options.files,
    };
    let mut measured: [Measured; WORKS.len()] = Default::default();
    // The first round is to warm up.
    for round in 0..=options.rounds {
        for (work, measured) in WORKS.iter().zip(&mut measured) {
            // The other one first in each round.
            let places = if round % 2 == 0 { [VOLUME, SCRATCH] } else { [SCRATCH, VOLUME] };
            for place in places {
                tokio::time::sleep(FORGOTTEN).await;
                let (took, asked) = container.work(work, place).await?;
                if round == 0 {
                    continue;
                }
                let (samples, requests) = match place == VOLUME {
                    true => (&mut measured.volume, &mut measured.asked),
                    false => (&mut measured.scratch, &mut measured.aside),
                };
                samples.push(took);
                *requests = Some(asked);
            }
        }
    }
    report(options, &measured);
    Ok(())
}

struct Container {
    id: String,
    client: a3s_box_e2e::client::Client,
    /// The box's directory.
    dir: PathBuf,
    files: u64,
}

impl Container {
    /// How long it took in the box, and what was asked of the file server meanwhile.
    async fn work(&mut self, work: &str, place: &str) -> Result<(Duration, Snapshot)> {
        let before = self.requests()?;
        let command = ["/pump", "files", work, place, &self.files.to_string()];
        let said = self.client.exec(&self.id, &command, LIMIT.as_secs().cast_signed()).await?;
        ensure!(said.exit_code == 0, "{command:?}: {}", String::from_utf8_lossy(&said.stderr));
        let micros = String::from_utf8(said.stdout)?.trim().parse().context("reading the time")?;
        Ok((Duration::from_micros(micros), self.requests()?.since(&before)))
    }

    fn requests(&self) -> Result<Snapshot> {
        Snapshot::read(&self.dir).context("reading the counts of requests")
    }
}

/// The one box there is.
fn only_box(boxes: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(boxes).with_context(|| format!("listing {}", boxes.display()))?;
    let dirs = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    match <[PathBuf; 1]>::try_from(dirs) {
        Ok([dir]) => Ok(dir),
        Err(dirs) => bail!("{} boxes instead of one", dirs.len()),
    }
}

fn report(options: &Options, measured: &[Measured]) {
    let (files, rounds) = (options.files, options.rounds);
    println!("\n{files} files of 4 KiB in a box on QEMU, {rounds} round(s); ms");
    println!(
        "{:<10}{:>10}{:>10}{:>12}{:>10}{:>12}",
        "", "volume", "scratch", "to scratch", "noise", "requests"
    );
    for (work, Measured { volume, scratch, asked, aside }) in WORKS.iter().zip(measured) {
        let asked = asked.as_ref().map_or(0, Snapshot::total);
        println!(
            "{work:<10}{:>10.1}{:>10.1}{:>12.2}{:>10.2}{asked:>12}",
            volume.percentile(50),
            scratch.percentile(50),
            volume.ratio_to(scratch),
            volume.noise(),
        );
        let aside = aside.as_ref().map_or(0, Snapshot::total);
        if aside > 0 {
            println!("{:<10}{aside} request(s) while the same was done on the scratch disk", "");
        }
    }
    println!("\nrequests by kind, for each file");
    for (work, Measured { asked, .. }) in WORKS.iter().zip(measured) {
        let kinds = asked.as_ref().map(Snapshot::kinds).unwrap_or_default();
        let each = |count: u64| count as f64 / files as f64;
        let kinds: Vec<_> =
            kinds.iter().map(|(kind, count)| format!("{} {:.2}", kind.name(), each(*count))).collect();
        println!("{work:<10}{}", kinds.join(", "));
    }
}
