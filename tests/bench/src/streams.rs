//! exec, port-forward and logs: of a box beside the raw vsock of the same box, and beside containerd with runc.
//!
//! Everything that sends or takes bytes in a container is one program, `pump`. Through CRI both runtimes are asked for
//! the same in the same way.

mod leaks;
mod log;
mod raw;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::pair::{Pair, Programs};
use crate::pod::{Direction, Pod};
use crate::samples::Samples;
use raw::Vsock;

/// Commands whose latency is measured, one after the other and side by side.
const ALONE: usize = 100;
const PARALLEL: usize = 50;

/// Bytes of each of the log lines.
const SHORT: u64 = 100;
const LONG: u64 = 16 * 1024;

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    programs: Programs,
    /// Runs of every measurement.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=50))]
    rounds: u32,
    /// MiB that are moved in each.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=65536))]
    mib: u64,
    /// Short commands, one after the other, after which nothing may be left of them.
    #[arg(long, default_value_t = 2000)]
    execs: u32,
}

/// Bytes that are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Exec,
    ForwardOut,
    ForwardIn,
    ShortLines,
    LongLines,
}

const FLOWS: [(Flow, &str); 5] = [
    (Flow::Exec, "exec stdout"),
    (Flow::ForwardOut, "port-forward, out of the pod"),
    (Flow::ForwardIn, "port-forward, into the pod"),
    (Flow::ShortLines, "log, lines of 100 bytes"),
    (Flow::LongLines, "log, lines of 16 KiB"),
];

impl Flow {
    async fn run(self, pod: &mut Pod, bytes: u64) -> Result<Duration> {
        match self {
            Self::Exec => pod.exec(bytes).await,
            Self::ForwardOut => pod.forward(Direction::Out, bytes).await,
            Self::ForwardIn => pod.forward(Direction::In, bytes).await,
            Self::ShortLines => pod.log(bytes, SHORT).await,
            Self::LongLines => pod.log(bytes, LONG).await,
        }
    }
}

/// What was measured of one runtime.
#[derive(Default)]
struct Measured {
    flows: [Samples; FLOWS.len()],
    alone: Samples,
    parallel: Samples,
}

impl Measured {
    async fn round(&mut self, pod: &mut Pod, bytes: u64) -> Result<()> {
        for ((flow, label), samples) in FLOWS.iter().zip(&mut self.flows) {
            samples.push(flow.run(pod, bytes).await.with_context(|| format!("{}: {label}", pod.runtime()))?);
        }
        Ok(())
    }

    async fn latency(&mut self, pod: &mut Pod) -> Result<()> {
        self.alone.extend(pod.latencies(1, ALONE).await?);
        self.parallel.extend(pod.latencies(PARALLEL, 1).await?);
        Ok(())
    }
}

pub(crate) async fn run(options: &Options, state: &Path) -> Result<()> {
    log::run(options.rounds, options.mib)?;
    let mut pair = Pair::start(&options.programs, &[], state).await?;
    let outcome = measure(options, &mut pair).await;
    pair.stop(outcome).await
}

async fn measure(options: &Options, pair: &mut Pair) -> Result<()> {
    let bytes = options.mib << 20;
    let Pair { daemon, state, ours, peer, .. } = pair;
    let mut vsock = Vsock::start(ours, state).await?;
    let mut peer = peer.as_mut().map(|peer| &mut peer.pod);
    let (mut raw_out, mut raw_piped, mut raw_in) =
        (Samples::default(), Samples::default(), Samples::default());
    let (mut mine, mut theirs) = (Measured::default(), Measured::default());
    for _ in 0..options.rounds {
        raw_out.push(vsock.run(Direction::Out, bytes)?);
        raw_piped.push(vsock.run(Direction::PipedOut, bytes)?);
        raw_in.push(vsock.run(Direction::In, bytes)?);
        mine.round(ours, bytes).await?;
        if let Some(peer) = peer.as_deref_mut() {
            theirs.round(peer, bytes).await?;
        }
    }
    let has_peer = peer.is_some();

    println!("\n{} MiB each, {} round(s), QEMU", options.mib, options.rounds);
    println!("{:<32}{:>10}{:>10}{:>18}", "", "MB/s", "to raw", "containerd MB/s");
    println!("{:<32}{:>10.0}{:>10.2}", "raw vsock, out of the box", raw_out.rate(bytes), 1.0);
    let (rate, ratio) = (raw_piped.rate(bytes), raw_out.ratio_to(&raw_piped));
    println!("{:<32}{rate:>10.0}{ratio:>10.2}", "raw vsock behind a pipe");
    println!("{:<32}{:>10.0}{:>10.2}", "raw vsock, into the box", raw_in.rate(bytes), 1.0);
    for (index, (flow, label)) in FLOWS.iter().enumerate() {
        let raw = if *flow == Flow::ForwardIn { &raw_in } else { &raw_out };
        let samples = &mine.flows[index];
        print!("{label:<32}{:>10.0}{:>10.2}", samples.rate(bytes), raw.ratio_to(samples));
        if has_peer {
            print!("{:>18.0}", theirs.flows[index].rate(bytes));
        }
        println!();
    }
    mine.latency(ours).await?;
    if let Some(peer) = peer {
        theirs.latency(peer).await?;
    }
    println!("\nexec, from connecting to the first byte, ms");
    println!("{:<32}{:>10}{:>10}{:>18}{:>10}", "", "median", "p99", "containerd median", "p99");
    for (label, mine, theirs) in
        [("one at a time", &mine.alone, &theirs.alone), ("50 at a time", &mine.parallel, &theirs.parallel)]
    {
        print!("{label:<32}{:>10.1}{:>10.1}", mine.percentile(50), mine.percentile(99));
        if has_peer {
            print!("{:>18.1}{:>10.1}", theirs.percentile(50), theirs.percentile(99));
        }
        println!();
    }
    leaks::check(daemon.pid(), ours, options.execs).await
}
