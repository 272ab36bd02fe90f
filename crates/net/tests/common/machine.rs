//! Machines on the wire: network namespaces with a stack of their own, in place of guests and of other hosts.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use a3s_box_core::network::PodNetwork;
use a3s_box_net::tap;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sched::{CloneFlags, setns, unshare};

use super::run;

/// Longer than any answer on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long silence is listened to.
const SILENCE: Duration = Duration::from_millis(700);

/// A network namespace; gone when dropped.
pub struct Machine {
    netns: Arc<File>,
    _wire: Option<Wire>,
}

impl Machine {
    fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            run("ip link set lo up");
            std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Self { netns: Arc::new(made.join().unwrap()), _wire: None }
    }

    /// The node that the calling thread is on.
    pub fn here() -> Self {
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
        Self { netns: Arc::new(File::open("/proc/thread-self/ns/net").unwrap()), _wire: None }
    }

    /// A guest as the VMM and its agent would make it: on the pod's tap, with the NIC that the pod's network says.
    pub fn guest(pod: &PodNetwork) -> Self {
        let nic = pod.interfaces[0].clone();
        let pod_netns = Self { netns: Arc::new(File::open(&pod.netns).unwrap()), _wire: None };
        let name = nic.tap.clone();
        let outer = pod_netns.inside(move || tap::attach(&name).unwrap());
        let mut guest = Self::new();
        let mac = nic.mac.map(|byte| format!("{byte:02x}")).join(":");
        let inner = guest.inside(move || {
            let tap = tap::attach("eth0").unwrap();
            run(&format!("ip link set eth0 address {mac} mtu {} up", nic.mtu));
            for address in &nic.addresses {
                let nodad = if address.ip.is_ipv6() { "nodad" } else { "" };
                run(&format!("ip addr add {}/{} dev eth0 {nodad}", address.ip, address.prefix));
            }
            for route in &nic.routes {
                let via = route.gateway.map(|ip| format!("via {ip}")).unwrap_or_default();
                run(&format!(
                    "ip route add {}/{} {via} dev eth0",
                    route.destination.ip, route.destination.prefix
                ));
            }
            tap
        });
        guest._wire = Some(Wire::between(outer, inner));
        // The kernel notices in the background that somebody is at the other end, and drops frames until then.
        for (netns, link) in [(&pod_netns, pod.interfaces[0].tap.clone()), (&guest, "eth0".to_owned())] {
            netns.inside(move || {
                let deadline = Instant::now() + PATIENCE;
                loop {
                    let state = run(&format!("ip link show {link}"));
                    if state.contains("LOWER_UP")
                        && !state.contains("state DOWN")
                        && !state.contains("qdisc noop")
                    {
                        break;
                    }
                    assert!(Instant::now() < deadline, "{state}");
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
        }
        guest
    }

    /// Another host, on a wire with the node that the calling thread is on: 192.0.2.2 and 2001:db8:2::2, the node
    /// has .1 and ::1. It knows the way to boxes through the node.
    pub fn neighbour() -> Self {
        let machine = Self::new();
        let pid = nix::unistd::getpid();
        use std::os::fd::AsRawFd;
        let netns = format!("/proc/{pid}/fd/{}", machine.netns.as_raw_fd());
        run(&format!("ip link add uplink type veth peer name eth0 netns {netns}"));
        run("ip addr add 192.0.2.1/24 dev uplink");
        run("ip addr add 2001:db8:2::1/64 dev uplink nodad");
        run("ip link set uplink up");
        machine.inside(|| {
            run("ip addr add 192.0.2.2/24 dev eth0");
            run("ip addr add 2001:db8:2::2/64 dev eth0 nodad");
            run("ip link set eth0 up");
            run("ip route add 10.0.0.0/8 via 192.0.2.1");
            run("ip route add fd00::/8 via 2001:db8:2::1");
        });
        machine
    }

    /// Runs `work` on a thread of this machine.
    pub fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let netns = Arc::clone(&self.netns);
        let thread = std::thread::spawn(move || {
            setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        thread.join().unwrap()
    }

    /// A server here that answers everybody with who they are.
    pub fn serve_tcp(&self, port: u16) -> Server {
        let listener = self.inside(move || TcpListener::bind(("::", port)).unwrap());
        Server::new(move || {
            listener.set_nonblocking(true).unwrap();
            match listener.accept() {
                Ok((mut stream, from)) => {
                    let _ = stream.write_all(plain(from.ip()).to_string().as_bytes());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        })
    }

    /// The same by UDP.
    pub fn serve_udp(&self, port: u16) -> Server {
        let socket = self.inside(move || UdpSocket::bind(("::", port)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        Server::new(move || {
            if let Ok((_, from)) = socket.recv_from(&mut [0; 64]) {
                let _ = socket.send_to(plain(from.ip()).to_string().as_bytes(), from);
            }
        })
    }

    /// What answers datagrams to one of the addresses here as `reply` says.
    pub fn answer_udp(&self, at: &str, reply: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + 'static) -> Server {
        let at: SocketAddr = at.parse().unwrap();
        let socket = self.inside(move || UdpSocket::bind(at).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        Server::new(move || {
            let mut asked = [0; 1500];
            if let Ok((length, from)) = socket.recv_from(&mut asked)
                && let Some(said) = reply(&asked[..length])
            {
                let _ = socket.send_to(&said, from);
            }
        })
    }

    /// Sends a datagram; what comes back within `patience`.
    pub fn ask_udp(&self, to: &str, question: Vec<u8>, patience: Duration) -> Option<Vec<u8>> {
        let to: SocketAddr = to.parse().unwrap();
        self.inside(move || {
            let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
            let socket = UdpSocket::bind((any, 0)).unwrap();
            socket.connect(to).unwrap();
            socket.set_read_timeout(Some(patience)).unwrap();
            socket.send(&question).ok()?;
            let mut said = [0; 1500];
            let length = socket.recv(&mut said).ok()?;
            Some(said[..length].to_vec())
        })
    }

    /// Whether a datagram is answered by nobody for a while.
    pub fn no_udp(&self, to: &str) -> bool {
        self.ask_udp(to, b"who am I?".to_vec(), SILENCE).is_none()
    }

    /// Connects by TCP; what the server says.
    pub fn tcp(&self, to: &str) -> Option<IpAddr> {
        self.try_tcp(to, PATIENCE)
    }

    /// Whether a TCP connection finds nobody: refused, or no answer for a while.
    pub fn no_tcp(&self, to: &str) -> bool {
        self.try_tcp(to, SILENCE).is_none()
    }

    fn try_tcp(&self, to: &str, patience: Duration) -> Option<IpAddr> {
        let to: SocketAddr = to.parse().unwrap();
        self.inside(move || {
            let mut stream = TcpStream::connect_timeout(&to, patience).ok()?;
            stream.set_read_timeout(Some(patience)).unwrap();
            let mut said = String::new();
            stream.read_to_string(&mut said).ok()?;
            said.parse().ok()
        })
    }

    /// Asks by UDP; what the server says.
    pub fn udp(&self, to: &str) -> Option<IpAddr> {
        let to: SocketAddr = to.parse().unwrap();
        self.inside(move || {
            let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
            let socket = UdpSocket::bind((any, 0)).unwrap();
            socket.connect(to).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.send(b"who am I?").ok()?;
            let mut said = [0; 64];
            let n = socket.recv(&mut said).ok()?;
            String::from_utf8_lossy(&said[..n]).parse().ok()
        })
    }

    /// Whether an ICMP echo comes back.
    pub fn ping(&self, to: &str) -> bool {
        self.try_ping(to, PATIENCE)
    }

    /// Whether none comes back for a while.
    pub fn no_ping(&self, to: &str) -> bool {
        !self.try_ping(to, SILENCE)
    }

    fn try_ping(&self, to: &str, patience: Duration) -> bool {
        use nix::sys::socket::{self, AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage};
        use std::os::fd::AsRawFd;
        let to: IpAddr = to.parse().unwrap();
        self.inside(move || {
            let (family, protocol, request, answer) = match to {
                IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8, 0),
                IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129),
            };
            let socket =
                socket::socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, Some(protocol)).unwrap();
            let address = SockaddrStorage::from(SocketAddr::new(to, 0));
            socket::connect(socket.as_raw_fd(), &address).unwrap();
            let mut socket = File::from(socket);
            socket.write_all(&[request, 0, 0, 0, 0, 0, 0, 1, 0xa3]).unwrap();
            let timeout = nix::poll::PollTimeout::try_from(patience).unwrap();
            if poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout).unwrap() == 0 {
                return false;
            }
            let mut said = [0; 64];
            socket.read(&mut said).is_ok_and(|n| n == 9 && said[0] == answer && said[8] == 0xa3)
        })
    }
}

fn plain(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

/// A loop on a thread, until dropped.
pub struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn new(mut once: impl FnMut() + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                once();
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Carries frames between two taps, both with virtio-net headers.
struct Wire(Server);

impl Wire {
    fn between(mut one: File, mut two: File) -> Self {
        let mut frame = vec![0; 70_000];
        Self(Server::new(move || {
            let (a, b) = {
                let mut both = [
                    PollFd::new(one.as_fd(), PollFlags::POLLIN),
                    PollFd::new(two.as_fd(), PollFlags::POLLIN),
                ];
                poll(&mut both, 20_u8).unwrap();
                (both[0].any() == Some(true), both[1].any() == Some(true))
            };
            if a && let Ok(n) = one.read(&mut frame) {
                let _ = two.write(&frame[..n]);
            }
            if b && let Ok(n) = two.read(&mut frame) {
                let _ = one.write(&frame[..n]);
            }
        }))
    }
}
