//! The life of a container in a running pod, beside containerd with runc: the same program, the same calls.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lists;
use crate::pair::{Pair, Programs};
use crate::pod::{STEPS, Steps};
use crate::samples::Samples;

/// Containers before anything is measured: files and code are in memory then.
const WARM_UP: usize = 2;

/// The agent's part of each of [`STEPS`].
const CALLS: [&str; STEPS.len()] =
    ["CreateSession", "StartSession", "Exec", "SignalSession", "DeleteSession"];

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    programs: Programs,
    /// Containers of each runtime.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Containers to be listed; 0 lists none.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(0..=1000))]
    listed: u32,
}

pub(crate) async fn run(options: &Options, state: &Path) -> Result<()> {
    let mut pair = Pair::start(&options.programs, &[], state).await?;
    let outcome = async {
        measure(options.rounds, &mut pair).await?;
        if options.listed > 0 { lists::run(options.listed, &mut pair).await } else { Ok(()) }
    }
    .await;
    pair.stop(outcome).await
}

async fn measure(rounds: u32, pair: &mut Pair) -> Result<()> {
    let (mut mine, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..rounds as usize + WARM_UP {
        let ours = pair.ours.cycle().await.context("a3s-box")?;
        let peers = match &mut pair.peer {
            Some(peer) => Some(peer.pod.cycle().await.context("containerd")?),
            None => None,
        };
        if round >= WARM_UP {
            mine.push(ours);
            theirs.extend(peers);
        }
    }
    let log = fs::read_to_string(pair.daemon.log()).context("reading the daemon's log")?;
    println!("\n{rounds} container(s) of each, one at a time, a3s-box's in a box on QEMU; ms");
    println!(
        "\"in guest\" is the share of the median that the guest's agent takes to answer, on its way included"
    );
    println!(
        "{:<18}{:>10}{:>10}{:>10}{:>20}{:>10}{:>16}",
        "", "median", "p90", "in guest", "containerd median", "p90", "to containerd"
    );
    for (index, step) in STEPS.iter().enumerate() {
        let mine = step_of(&mine, index);
        let guest = answers(&log, CALLS[index]).percentile(50) / mine.percentile(50) * 100.0;
        print!("{step:<18}{:>10.1}{:>10.1}{guest:>8.0} %", mine.percentile(50), mine.percentile(90));
        if !theirs.is_empty() {
            let theirs = step_of(&theirs, index);
            let ratio = mine.ratio_to(&theirs);
            print!("{:>20.1}{:>10.1}{ratio:>16.2}", theirs.percentile(50), theirs.percentile(90));
        }
        println!();
    }
    Ok(())
}

/// How long the agent took for each call of a name: an event of the daemon's at level debug.
fn answers(log: &str, call: &str) -> Samples {
    let mark = format!("call=\"{call}\"");
    let took = |line: &str| {
        let number = line.split("took_us=").nth(1)?.split_whitespace().next()?;
        number.parse().ok().map(Duration::from_micros)
    };
    let mut samples = Samples::default();
    samples.extend(log.lines().filter(|line| line.contains(&mark)).filter_map(took));
    samples
}

fn step_of(cycles: &[Steps], index: usize) -> Samples {
    let mut samples = Samples::default();
    samples.extend(cycles.iter().map(|steps| steps[index]));
    samples
}
