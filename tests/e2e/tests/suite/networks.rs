//! Pods on a dual-stack CNI network: whom they reach, by which protocols, and what is left of them.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use a3s_box_cri::proto::{PodSandboxConfig, PortMapping, Protocol as CriProtocol};
use a3s_box_e2e::client::{Client, image as image_of};
use a3s_box_e2e::daemon::Daemon;
use a3s_box_e2e::network;
use a3s_box_e2e::processes::printed;
use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use crate::bad_machine::broken;
use crate::suite::{Suite, launch, logged};

const SUBNET: &str = "10.213.81.0/24";
const SUBNET6: &str = "fd00:a3:81::/64";
/// Where pods echo what they get, by TCP and by UDP.
const ECHO: u16 = 7007;
/// How long an echo may take; emulated in an emulator, everything takes longer.
const LIMIT: Duration = Duration::from_secs(20);

/// A daemon of its own on a network with both families, masquerading and published ports.
async fn dual_stack(suite: &Suite, name: &str) -> Result<(PathBuf, Daemon, Client)> {
    let folder = suite.state().join(name).join("dual");
    let conf = network::write_dual_stack(&folder, "a3s-box-dual", SUBNET, SUBNET6)?;
    let extra = [("network.conf_dir", &*conf.to_string_lossy())];
    let (daemon, client) = broken(suite, name, suite.backend(), &extra).await?;
    Ok((folder, daemon, client))
}

/// All addresses that PodSandboxStatus tells.
async fn addresses(client: &mut Client, pod: &str) -> Result<Vec<IpAddr>> {
    let network = client.pod_status(pod).await?.network.context("a network status")?;
    let all = std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|ip| ip.ip));
    all.map(|ip| ip.parse().with_context(|| format!("address {ip:?}"))).collect()
}

/// What the guest calls its host: the first address of the subnet.
fn gateway(pod: IpAddr) -> Result<IpAddr> {
    let text = if pod.is_ipv4() { "10.213.81.1" } else { "fd00:a3:81::1" };
    Ok(text.parse()?)
}

async fn tcp_echo(to: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(to).await?;
    stream.write_all(b"over tcp").await?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).await?;
    ensure!(&answer == b"over tcp", "{answer:?}");
    Ok(())
}

/// Datagrams may get lost: asks until there is an answer.
async fn udp_echo(to: SocketAddr) -> Result<()> {
    let any: IpAddr = if to.is_ipv4() { "0.0.0.0".parse()? } else { "::".parse()? };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(to).await?;
    let mut answer = [0; 64];
    loop {
        socket.send(b"over udp").await?;
        if let Ok(got) = tokio::time::timeout(Duration::from_secs(2), socket.recv(&mut answer)).await {
            let got = got?;
            ensure!(&answer[..got] == b"over udp", "{:?}", &answer[..got]);
            return Ok(());
        }
    }
}

async fn in_time<T>(what: String, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(LIMIT, work).await.with_context(|| format!("{what} took too long"))?.context(what)
}

/// Echoes on an address of this machine until it is dropped.
struct HostEcho(Vec<tokio::task::JoinHandle<()>>);

impl HostEcho {
    async fn on(ip: IpAddr) -> Result<Self> {
        let listener = TcpListener::bind((ip, ECHO)).await?;
        let socket = UdpSocket::bind((ip, ECHO)).await?;
        let tcp = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (mut from, mut to) = stream.split();
                // A client that breaks off has failed by itself.
                let _ = tokio::io::copy(&mut from, &mut to).await;
            }
        });
        let udp = tokio::spawn(async move {
            let mut datagram = [0; 2048];
            while let Ok((length, from)) = socket.recv_from(&mut datagram).await {
                let _ = socket.send_to(&datagram[..length], from).await;
            }
        });
        Ok(Self(vec![tcp, udp]))
    }
}

impl Drop for HostEcho {
    fn drop(&mut self) {
        self.0.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

struct Peer {
    id: String,
    container: String,
    addresses: Vec<IpAddr>,
}

/// A pod that echoes on both families, by TCP and by UDP.
async fn echoing(suite: &Suite, client: &mut Client, image: &str, name: &str) -> Result<Peer> {
    let config = suite.pod(name)?;
    let id = client.run_pod(&config).await?;
    let script = format!(
        "socat TCP6-LISTEN:{ECHO},fork,ipv6only=0 PIPE & socat -T 10 UDP6-LISTEN:{ECHO},fork,ipv6only=0 PIPE & \
         while ! netstat -lnt | grep -q :{ECHO} || ! netstat -lnu | grep -q :{ECHO}; do sleep 0.1; done; \
         echo up; wait"
    );
    let mut container = suite.script("main", &script);
    container.image = Some(image_of(image));
    let container = launch(client, &id, container, &config).await?;
    logged(&config, "main", "up").await?;
    let addresses = addresses(client, &id).await?;
    ensure!(
        addresses.iter().any(IpAddr::is_ipv4) && addresses.iter().any(IpAddr::is_ipv6),
        "the status of {name} does not tell both addresses: {addresses:?}"
    );
    Ok(Peer { id, container, addresses })
}

/// ICMP, TCP and UDP from a pod to `ip`.
async fn reaches(client: &mut Client, from: &Peer, ip: IpAddr) -> Result<()> {
    let (ping, name) = if ip.is_ipv4() { ("ping", ip.to_string()) } else { ("ping6", format!("[{ip}]")) };
    let script = format!(
        "set -e; {ping} -c 1 -W 5 {ip} > /dev/null; \
         test \"$(echo over tcp | socat -t 5 - TCP:{name}:{ECHO})\" = 'over tcp'; \
         test \"$(echo over udp | socat -t 1 - UDP:{name}:{ECHO})\" = 'over udp'; echo reached"
    );
    let said = client.exec(&from.container, &["sh", "-c", &script], 30).await?;
    ensure!(said.stdout == b"reached\n", "from {:?} to {ip}: {said:?}", from.addresses);
    Ok(())
}

pub(crate) async fn pods_reach_each_other_and_the_host_over_both_families(suite: &Suite) -> Result<()> {
    let image = a3s_box_e2e::sample::with_programs(&["/usr/bin/socat"])?;
    let image = suite.registry().push("e2e/socat", "1", &image)?;
    let (_, daemon, mut client) = dual_stack(suite, "dualstack").await?;
    client.pull(&image).await?;
    let mut peers = Vec::new();
    for name in ["dual-a", "dual-b", "dual-c"] {
        peers.push(echoing(suite, &mut client, &image, name).await?);
    }
    let mut host = Vec::new();
    for ip in &peers[0].addresses {
        host.push(HostEcho::on(gateway(*ip)?).await?);
    }
    for (number, from) in peers.iter().enumerate() {
        for ip in &peers[(number + 1) % peers.len()].addresses {
            reaches(&mut client, from, *ip).await?;
            if number == 0 {
                reaches(&mut client, from, gateway(*ip)?).await?;
            }
        }
        for ip in &from.addresses {
            let to = SocketAddr::new(*ip, ECHO);
            in_time(format!("TCP from the host to {to}"), tcp_echo(to)).await?;
            in_time(format!("UDP from the host to {to}"), udp_echo(to)).await?;
            let family = if ip.is_ipv4() { "-4" } else { "-6" };
            let arguments = ["ping", family, "-c", "1", "-W", "5", &ip.to_string()];
            let ping = tokio::process::Command::new("/bin/busybox").args(arguments).output().await?;
            ensure!(ping.status.success(), "{arguments:?}: {ping:?}");
        }
    }
    drop(host);
    for peer in peers {
        client.remove_pod(&peer.id).await?;
    }
    let ended = daemon.stop().await?;
    ensure!(ended.success(), "the daemon ended with {ended}");
    Ok(())
}

/// Rules for packets on this machine, whoever made them; counters change by themselves.
fn rules() -> Result<BTreeSet<String>> {
    let text = printed(Command::new("nft").args(["--stateless", "list", "ruleset"]))?;
    Ok(text.lines().map(|line| line.trim().to_owned()).collect())
}

/// The addresses that host-local has given away.
fn allocated(folder: &Path) -> Result<usize> {
    let entries = fs::read_dir(folder.join("addresses/a3s-box-dual"))?.collect::<Result<Vec<_>, _>>()?;
    let addresses =
        entries.iter().filter(|entry| entry.file_name().to_string_lossy().parse::<IpAddr>().is_ok());
    Ok(addresses.count())
}

/// A pod that publishes a port by both protocols.
fn publishing(suite: &Suite, number: u16) -> Result<PodSandboxConfig> {
    let mut config = suite.pod(&format!("public-{number}"))?;
    config.port_mappings = [CriProtocol::Tcp, CriProtocol::Udp]
        .map(|protocol| PortMapping {
            protocol: protocol.into(),
            container_port: i32::from(ECHO),
            host_port: i32::from(20_000 + number),
            host_ip: String::new(),
        })
        .to_vec();
    Ok(config)
}

/// As many pods with published ports come and go, some at a time; no rule and no address is left.
pub(crate) async fn come_and_go(suite: &Suite, pods: u32) -> Result<()> {
    const AT_ONCE: u32 = 5;
    let (folder, daemon, mut client) = dual_stack(suite, "comeandgo").await?;
    client.pull(suite.shell()).await?;
    // The first pod makes the plugins' own chains, which stay.
    let first = client.run_pod(&publishing(suite, 0)?).await?;
    ensure!(allocated(&folder)? == 2, "the pod has {} addresses", allocated(&folder)?);
    let during = rules()?;
    client.remove_pod(&first).await?;
    let before = rules()?;
    ensure!(during.difference(&before).count() > 0, "a published port makes no rule");
    let next = AtomicU32::new(1);
    let worker = async || {
        let mut client = client.clone();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number > pods {
                return Ok::<_, anyhow::Error>(());
            }
            let id = client.run_pod(&publishing(suite, u16::try_from(number)?)?).await?;
            client.remove_pod(&id).await?;
        }
    };
    futures::future::try_join_all((0..AT_ONCE).map(|_| worker())).await?;
    let after = rules()?;
    let left: Vec<_> = after.difference(&before).collect();
    ensure!(left.is_empty(), "rules are left: {left:#?}");
    ensure!(allocated(&folder)? == 0, "{} addresses are left", allocated(&folder)?);
    let ended = daemon.stop().await?;
    ensure!(ended.success(), "the daemon ended with {ended}");
    println!("{pods} pods with published ports: no rule and no address is left");
    Ok(())
}
