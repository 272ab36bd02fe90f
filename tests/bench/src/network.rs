//! The last metre: a box behind its redirected tap, beside the same guest on a plain tap and beside containerd's veth.
//!
//! ```text
//!   redirected   host ── veth ══ eth0 ──> tap0 ══ guest
//!   plain tap    host ── tap ══ guest
//!   containerd   host ── veth ══ eth0 of the pod's namespace
//! ```

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use a3s_box_e2e::client::Client;
use a3s_box_e2e::processes::printed;
use a3s_box_e2e::wait;
use anyhow::{Context, Result};

use crate::pair::{Pair, Programs};
use crate::pod::{Direction, Pod, said};
use crate::samples::Samples;

/// Where pump answers in the pods.
const PORT: u16 = 7100;
const IPERF: &str = "/usr/bin/iperf3";
/// The pods' default gateway: an address of this machine.
const GATEWAY: &str = "10.213.80.1";
/// The plain tap's name on this machine.
const TAP: &str = "a3s-bench-tap";
/// A silence that means that bytes were lost.
const SILENCE: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    programs: Programs,
    /// Guests that are measured behind their redirected tap and then on a plain one.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=50))]
    guests: u32,
    /// Runs of every measurement, of each guest.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=50))]
    rounds: u32,
    /// MiB that are moved in each.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..=65536))]
    mib: u64,
    /// Requests that are answered in each.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    requests: u64,
}

/// What is measured of a pod: a TCP stream of iperf3's out of it and one into it, and requests of one byte that are answered
/// with one.
const MEASURES: [&str; 3] = ["out of the pod", "into the pod", "request and response"];

type Measured = [Samples; MEASURES.len()];

/// A pod that obeys orders on its address.
struct Server {
    pod: Pod,
    address: Ipv4Addr,
}

impl Server {
    async fn start(
        runtime: &'static str,
        client: &Client,
        pair: &Pair,
        logs: &str,
        name: &str,
    ) -> Result<Self> {
        let logs = pair.state.join(logs);
        let mut pod = Pod::start(runtime, client.clone(), &pair.reference, &logs, name, false).await?;
        let (_, log) = pod.launch(&["/pump", "serve", "net", &PORT.to_string()], false).await?;
        said(&log, "serving").await?;
        let (_, log) = pod.launch(&[IPERF, "--server", "--forceflush"], false).await?;
        wait::until("iperf3's server", SILENCE, || {
            let listens = fs::read_to_string(&log).map(|said| said.contains("Server listening"));
            async move { Ok(listens?.then_some(())) }
        })
        .await?;
        let address = pod.address().await?;
        Ok(Self { pod, address })
    }

    /// The client's command line for a stream.
    fn stream(&self, options: &Options, reverse: bool) -> Vec<String> {
        let (address, bytes) = (self.address.to_string(), format!("{}M", options.mib));
        let mut command: Vec<String> =
            [IPERF, "--client", &address, "--bytes", &bytes, "--json"].map(str::to_owned).to_vec();
        command.extend(reverse.then(|| "--reverse".to_owned()));
        command
    }

    /// One run of [`MEASURES`], asked for by this machine.
    async fn round(&self, options: &Options, into: &mut Measured) -> Result<()> {
        let [out, inward, requests] = into;
        for (samples, reverse) in [(out, true), (inward, false)] {
            let command = self.stream(options, reverse);
            let ask = async || printed(Command::new(&command[0]).args(&command[1..]));
            samples.push(streamed(ask).await?);
        }
        let to = SocketAddr::from((self.address, PORT));
        let mut connection = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
        connection.set_nodelay(true)?;
        connection.set_read_timeout(Some(SILENCE))?;
        connection.set_write_timeout(Some(SILENCE))?;
        let started = Instant::now();
        for _ in 0..options.requests {
            Direction::Out.run(&mut connection, 1)?;
        }
        requests.push(started.elapsed());
        Ok(())
    }

    /// The same, asked for by another pod.
    async fn round_from(&self, other: &mut Server, options: &Options, into: &mut Measured) -> Result<()> {
        let [out, inward, requests] = into;
        for (samples, reverse) in [(out, true), (inward, false)] {
            let command = self.stream(options, reverse);
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            samples.push(streamed(async || other.pod.output(&command).await).await?);
        }
        let (address, turns) = (format!("{}:{PORT}", self.address), options.requests.to_string());
        let command = ["/pump", "ask", &address, Direction::Out.letter(), "1", &turns];
        let took = other.pod.output(&command).await?;
        requests.push(Duration::from_micros(took.trim().parse().context("pump's time")?));
        Ok(())
    }
}

/// How long a stream took its receiver. `ask` runs a client and answers its report. Between two tests iperf3's server does
/// not listen for a moment, so a client that comes then asks again.
async fn streamed(mut ask: impl AsyncFnMut() -> Result<String>) -> Result<Duration> {
    const TRIES: u32 = 20;
    let mut tries = TRIES;
    loop {
        match ask().await.and_then(|report| taken(&report)) {
            Err(error) if tries == 0 => return Err(error.context("a stream of iperf3's")),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            taken => return taken,
        }
        tries -= 1;
    }
}

fn taken(report: &str) -> Result<Duration> {
    let report: serde_json::Value = serde_json::from_str(report).context("iperf3's report")?;
    let seconds = report["end"]["sum_received"]["seconds"].as_f64();
    let seconds = seconds.with_context(|| format!("iperf3 says {}", report["error"]))?;
    Ok(Duration::try_from_secs_f64(seconds)?)
}

pub(crate) async fn run(options: &Options, state: &Path) -> Result<()> {
    let mut pair = Pair::start(&options.programs, &[IPERF], state).await?;
    let outcome = measure(options, &mut pair).await;
    if Path::new("/sys/class/net").join(TAP).exists() {
        ip(&["link", "del", TAP])?;
    }
    pair.stop(outcome).await
}

async fn measure(options: &Options, pair: &mut Pair) -> Result<()> {
    let mut theirs = Vec::new();
    if let Some(peer) = &pair.peer {
        for name in ["first", "second"] {
            theirs.push(Server::start("containerd", &peer.client, pair, "c/logs", name).await?);
        }
    }
    let (mut redirected, mut tap, mut veth) = (Measured::default(), Measured::default(), Measured::default());
    for number in 0..options.guests {
        // One guest is faster than the next by more than what is looked for, so each is compared with itself.
        let name = format!("guest-{number}");
        let guest = Server::start("a3s-box", &pair.client, pair, "logs", &name).await?;
        guest.round(options, &mut Measured::default()).await.context("warming up")?;
        for _ in 0..options.rounds {
            guest.round(options, &mut redirected).await?;
            if let Some(first) = theirs.first() {
                first.round(options, &mut veth).await?;
            }
        }
        on_a_plain_tap(&pair.state, guest.pod.id(), guest.address)?;
        for _ in 0..options.rounds {
            guest.round(options, &mut tap).await.context("on a plain tap")?;
        }
        ip(&["link", "del", TAP])?;
        pair.client.remove_pod(guest.pod.id()).await.context("removing a guest")?;
    }

    let (mut boxes, mut namespaces) = (Measured::default(), Measured::default());
    let first = Server::start("a3s-box", &pair.client, pair, "logs", "first").await?;
    let mut second = Server::start("a3s-box", &pair.client, pair, "logs", "second").await?;
    for _ in 0..options.rounds {
        first.round_from(&mut second, options, &mut boxes).await.context("from pod to pod")?;
        if let [first, second] = &mut theirs[..] {
            let asked = first.round_from(second, options, &mut namespaces).await;
            asked.context("from containerd's pod to pod")?;
        }
    }
    let has_peer = !theirs.is_empty();

    println!(
        "\n{} MiB and {} requests each, {} guest(s) with {} round(s), a3s-box on QEMU; ratios are of times: above 1 is slower",
        options.mib, options.requests, options.guests, options.rounds
    );
    println!("{:<36}{:>12}{:>10}{:>14}{:>16}", "", "redirected", "noise", "to plain tap", "to containerd");
    for (place, mine, tap, veth) in
        [("host and pod", &redirected, Some(&tap), &veth), ("pod and pod", &boxes, None, &namespaces)]
    {
        for (index, measure) in MEASURES.iter().enumerate() {
            let samples = &mine[index];
            let figure = if index == 2 {
                format!("{:.0} us", samples.percentile(50) * 1e3 / options.requests as f64)
            } else {
                format!("{:.0} MB/s", samples.rate(options.mib << 20))
            };
            let to_tap = tap.map_or("-".to_owned(), |tap| format!("{:.2}", samples.ratio_to(&tap[index])));
            let to_veth =
                if has_peer { format!("{:.2}", samples.ratio_to(&veth[index])) } else { "-".to_owned() };
            let label = format!("{place}: {measure}");
            println!("{label:<36}{figure:>12}{:>10.2}{to_tap:>14}{to_veth:>16}", samples.noise());
        }
    }
    Ok(())
}

/// Takes the pod's tap out of its namespace, without the redirection, and leads its address there. The guest notices
/// nothing: its gateway keeps address and MAC.
fn on_a_plain_tap(state: &Path, pod: &str, address: Ipv4Addr) -> Result<()> {
    let route = ip(&["route", "get", &address.to_string()])?;
    let mut words = route.split_whitespace().skip_while(|word| *word != "dev");
    let veth = words.nth(1).with_context(|| format!("no device in {route:?}"))?.to_owned();
    let mac = fs::read_to_string(format!("/sys/class/net/{veth}/address"))?;
    let netns = format!("--net={}/run/netns/a3s-{pod}", state.display());
    let pid = std::process::id().to_string();
    printed(Command::new("nsenter").args([&netns, "ip", "link", "set", "tap0", "name", TAP, "netns", &pid]))?;
    ip(&["link", "set", TAP, "address", mac.trim()])?;
    ip(&["addr", "add", &format!("{GATEWAY}/32"), "dev", TAP])?;
    ip(&["link", "set", TAP, "up"])?;
    ip(&["route", "replace", &address.to_string(), "dev", TAP, "src", GATEWAY])?;
    Ok(())
}

fn ip(arguments: &[&str]) -> Result<String> {
    printed(Command::new("ip").args(arguments))
}
