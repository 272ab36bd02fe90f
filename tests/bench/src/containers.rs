//! The life of a container in a running pod, beside containerd with runc: the same program, the same calls.

use std::path::Path;

use anyhow::{Context, Result};

use crate::pair::{Pair, Programs};
use crate::pod::{STEPS, Steps};
use crate::samples::Samples;

/// Containers before anything is measured: files and code are in memory then.
const WARM_UP: usize = 2;

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    programs: Programs,
    /// Containers of each runtime.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

pub(crate) async fn run(options: &Options, state: &Path) -> Result<()> {
    let mut pair = Pair::start(&options.programs, state).await?;
    let outcome = measure(options.rounds, &mut pair).await;
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
    println!("\n{rounds} container(s) of each, one at a time, a3s-box's in a box on QEMU; ms");
    println!(
        "{:<18}{:>10}{:>10}{:>20}{:>10}{:>16}",
        "", "median", "p90", "containerd median", "p90", "to containerd"
    );
    for (index, step) in STEPS.iter().enumerate() {
        let mine = step_of(&mine, index);
        print!("{step:<18}{:>10.1}{:>10.1}", mine.percentile(50), mine.percentile(90));
        if !theirs.is_empty() {
            let theirs = step_of(&theirs, index);
            let ratio = mine.ratio_to(&theirs);
            print!("{:>20.1}{:>10.1}{ratio:>16.2}", theirs.percentile(50), theirs.percentile(90));
        }
        println!();
    }
    Ok(())
}

fn step_of(cycles: &[Steps], index: usize) -> Samples {
    let mut samples = Samples::default();
    samples.extend(cycles.iter().map(|steps| steps[index]));
    samples
}
