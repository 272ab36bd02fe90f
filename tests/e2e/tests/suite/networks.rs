//! Pods on a dual-stack CNI network: whom they reach, by which protocols, and what is left of them.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
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
/// Where pods echo what they get, by TCP, UDP and SCTP.
const ECHO: u16 = 7007;
/// The host's port that leads to the first pod's echo; the next ones are the other pods'.
const PUBLISHED: u16 = 20_100;
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

/// A pod that publishes its echo.
fn publishing(suite: &Suite, name: &str, host_port: u16) -> Result<PodSandboxConfig> {
    let mut config = suite.pod(name)?;
    config.port_mappings = [CriProtocol::Tcp, CriProtocol::Udp, CriProtocol::Sctp]
        .map(|protocol| PortMapping {
            protocol: protocol.into(),
            container_port: i32::from(ECHO),
            host_port: i32::from(host_port),
            host_ip: String::new(),
        })
        .to_vec();
    Ok(config)
}

/// A pod that echoes on both families, by TCP, UDP and SCTP.
async fn echoing(
    suite: &Suite,
    client: &mut Client,
    image: &str,
    (name, host_port): (&str, u16),
) -> Result<Peer> {
    let config = publishing(suite, name, host_port)?;
    let id = client.run_pod(&config).await?;
    let script = format!(
        "socat TCP6-LISTEN:{ECHO},fork,ipv6only=0 PIPE & socat UDP6-RECVFROM:{ECHO},fork,ipv6only=0 PIPE & \
         socat SCTP6-LISTEN:{ECHO},fork,ipv6only=0 PIPE & \
         while ! netstat -lnt | grep -q :{ECHO} || ! netstat -lnu | grep -q :{ECHO} || \
             ! grep -q ' {ECHO} ' /proc/net/sctp/eps; do sleep 0.1; done; \
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

/// A pod's word comes back from all of these, asked side by side.
async fn echoes(client: &mut Client, from: &Peer, whom: &[(&str, IpAddr, u16)]) -> Result<()> {
    let ask = |(protocol, ip, port): &(&str, IpAddr, u16)| {
        let to = format!("{protocol}:{}", SocketAddr::new(*ip, *port));
        // Whoever asks ends when it has its answer: a flow of datagrams has no end, and SCTP no half-close.
        let say = r#"SYSTEM:'echo word; read answer; echo "$answer" >&2'"#;
        let once = format!("test \"$(socat -t 0.1 -T 5 {to} {say} 2>&1)\" = word");
        // A datagram may get lost.
        format!("({once} || {once} || {once} || echo {to}) & ")
    };
    let script: String = whom.iter().map(ask).collect();
    let said = client.exec(&from.container, &["sh", "-c", &format!("{script} wait")], 30).await?;
    let silent = String::from_utf8_lossy(&said.stdout);
    ensure!(silent.is_empty(), "{:?} heard nothing from {silent}", from.addresses);
    Ok(())
}

async fn pings(client: &mut Client, from: &Peer, ip: IpAddr) -> Result<()> {
    let ping = if ip.is_ipv4() { "ping" } else { "ping6" };
    let said = client.exec(&from.container, &[ping, "-c", "1", "-W", "5", &ip.to_string()], 30).await?;
    ensure!(said.exit_code == 0, "from {:?} to {ip}: {said:?}", from.addresses);
    Ok(())
}

pub(crate) async fn pods_reach_each_other_and_the_host_over_both_families(suite: &Suite) -> Result<()> {
    let image = a3s_box_e2e::sample::with_programs(&["/usr/bin/socat"])?;
    let image = suite.registry().push("e2e/socat", "1", &image)?;
    let (_, daemon, mut client) = dual_stack(suite, "dualstack").await?;
    client.pull(&image).await?;
    let mut peers = Vec::new();
    for name in ["dual-a", "dual-b", "dual-c"].into_iter().zip(PUBLISHED..) {
        peers.push(echoing(suite, &mut client, &image, name).await?);
    }
    let mut host = Vec::new();
    for ip in &peers[0].addresses {
        host.push(HostEcho::on(gateway(*ip)?).await?);
    }
    for (number, from) in peers.iter().enumerate() {
        let next = (number + 1) % peers.len();
        let published = PUBLISHED + u16::try_from(next)?;
        for ip in &peers[next].addresses {
            pings(&mut client, from, *ip).await?;
            let host = gateway(*ip)?;
            let mut whom = Vec::new();
            for protocol in ["TCP", "UDP", "SCTP"] {
                whom.extend([(protocol, *ip, ECHO), (protocol, host, published)]);
            }
            if number == 0 {
                // The host's own kernel need not have SCTP.
                whom.extend([("TCP", host, ECHO), ("UDP", host, ECHO)]);
                pings(&mut client, from, host).await?;
            }
            echoes(&mut client, from, &whom).await?;
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

/// A plugin that takes its time for two interfaces; both ends of each cable stay in the pod's namespace.
const TWINS: &str = r#"#!/bin/sh
[ $CNI_COMMAND = ADD ] || exit 0
for name in eth0 net1; do
    nsenter --net=$CNI_NETNS ip link add $name mtu 1400 type veth peer name p$name
done
nsenter --net=$CNI_NETNS ip link set net1 address 02:00:00:00:b0:0b
sleep 2
echo '{ "cniVersion": "1.0.0", "interfaces": [{ "name": "eth0", "sandbox": "/n" }, { "name": "net1", "sandbox": "/n" }],
    "ips": [{ "address": "10.213.82.7/24", "interface": 0 }, { "address": "10.213.83.7/24", "interface": 1 }] }'
"#;

/// One stage of a pod's start, in milliseconds: when it began and when it ended.
fn stages(info: &serde_json::Value, name: &str) -> Result<Vec<(f64, f64)>> {
    let timeline = info["timeline"].as_array().context("a timeline")?;
    let number = |stage: &serde_json::Value, key: &str| stage[key].as_f64().context("a number");
    timeline
        .iter()
        .filter(|stage| stage["stage"] == name)
        .map(|stage| {
            let at = number(stage, "atMs")?;
            Ok((at, at + number(stage, "ms")?))
        })
        .collect()
}

pub(crate) async fn a_guest_boots_while_a_slow_plugin_makes_two_interfaces(suite: &Suite) -> Result<()> {
    let folder = suite.state().join("twins/slow");
    let (conf, bin) = (folder.join("conf"), folder.join("bin"));
    for folder in [&conf, &bin] {
        fs::create_dir_all(folder)?;
    }
    let list = r#"{ "cniVersion": "1.0.0", "name": "twins", "plugins": [{ "type": "twins" }] }"#;
    fs::write(conf.join("10-twins.conflist"), list)?;
    fs::write(bin.join("twins"), TWINS)?;
    fs::set_permissions(bin.join("twins"), fs::Permissions::from_mode(0o755))?;
    let bin_dirs = format!("[{bin:?}]");
    let extra = [("network.conf_dir", &*conf.to_string_lossy()), ("network.bin_dirs", &bin_dirs)];
    let (daemon, mut client) = broken(suite, "twins", suite.backend(), &extra).await?;
    client.pull(suite.shell()).await?;
    // Of the first pod one interface is expected. The second one boots once.
    for (name, boots) in [("first-twin", 2), ("second-twin", 1)] {
        let config = suite.pod(name)?;
        let pod = client.run_pod(&config).await?;
        let info = client.pod_info(&pod).await?;
        let (vmm, boot) = (stages(&info, "vmm")?, stages(&info, "boot")?);
        ensure!((vmm.len(), boot.len()) == (boots, boots), "{name}: {}", info["timeline"]);
        let network = stages(&info, "network")?[0];
        ensure!(network.1 - network.0 > 2000.0 && vmm[0].0 < network.1, "{name}: {}", info["timeline"]);
        println!("{name}: network {network:.0?} beside boot {:.0?}", boot[0]);
        let container = launch(&mut client, &pod, suite.script("main", "sleep 1000"), &config).await?;
        let said = client.exec(&container, &["ip", "addr"], 10).await?;
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        for expected in [
            "eth0:",
            "net1:",
            "mtu 1400",
            "inet 10.213.82.7/",
            "inet 10.213.83.7/",
            "ether 02:00:00:00:b0:0b",
        ] {
            ensure!(said.contains(expected), "{name} has no {expected}: {said}");
        }
        client.remove_pod(&pod).await?;
    }
    let ended = daemon.stop().await?;
    ensure!(ended.success(), "the daemon ended with {ended}");
    Ok(())
}

pub(crate) async fn a_nic_has_a_queue_per_processor_where_they_run_side_by_side(suite: &Suite) -> Result<()> {
    // The machine that runs libkrun has KVM, and so QEMU has it too.
    let accel = if suite.backend() == "libkrun" { "kvm" } else { "tcg" };
    let (daemon, mut client) = broken(suite, "queues", "qemu", &[("vmm.qemu_accel", accel)]).await?;
    client.pull(suite.shell()).await?;
    let config = suite.pod("queues")?;
    let pod = client.run_pod(&config).await?;
    let container = launch(&mut client, &pod, suite.script("main", "sleep 1000"), &config).await?;
    let script = "cd /sys/class/net/eth0/queues && set rx-* && echo $(nproc) $#";
    let said = client.exec(&container, &["sh", "-c", script], 10).await?;
    let said = String::from_utf8(said.stdout)?;
    let (processors, queues) = said.trim().split_once(' ').with_context(|| format!("{script}: {said:?}"))?;
    let expected = if accel == "kvm" { processors } else { "1" };
    ensure!(
        queues == expected,
        "QEMU with {accel} and {processors} processor(s) gives a NIC {queues} queue(s)"
    );
    println!("QEMU with {accel}: {processors} processor(s), {queues} queue(s)");
    // Through the last metre and back.
    let gateway = client
        .exec(&container, &["sh", "-c", "ip route | sed -n 's/default via \\([^ ]*\\) .*/\\1/p'"], 10)
        .await?;
    let gateway = String::from_utf8(gateway.stdout)?;
    let said = client.exec(&container, &["ping", "-c", "1", "-W", "5", gateway.trim()], 20).await?;
    ensure!(said.exit_code == 0, "QEMU with {accel} does not reach {gateway:?}: {said:?}");
    client.remove_pod(&pod).await?;
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

/// As many pods with published ports come and go, some at a time; no rule and no address is left.
pub(crate) async fn come_and_go(suite: &Suite, pods: u32) -> Result<()> {
    const AT_ONCE: u32 = 5;
    let (folder, daemon, mut client) = dual_stack(suite, "comeandgo").await?;
    client.pull(suite.shell()).await?;
    // The first pod makes the plugins' own chains, which stay.
    let first = client.run_pod(&publishing(suite, "public-0", 20_000)?).await?;
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
            let (name, port) = (format!("public-{number}"), 20_000 + u16::try_from(number)?);
            let id = client.run_pod(&publishing(suite, &name, port)?).await?;
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
