//! A guest with an egress policy that writes its own frames: what no policy allows does not get out of its namespace.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use a3s_box_core::egress::EgressPolicy;
use a3s_box_core::network::{Interface, PodNetwork};
use a3s_box_net::{SetupRequest, tap};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use common::{SetUp, on_a_local_node, request, run};

const PATIENCE: Duration = Duration::from_secs(5);
const HEADER: usize = 10;
const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 9];
const ALLOWED4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const DENIED4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 3);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// A raw guest, and everything that its node gets to see.
struct Lab {
    tap: File,
    seen: File,
    mac: [u8; 6],
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    sent: u32,
}

impl Lab {
    fn new(pod: &PodNetwork) -> Self {
        let nic: Interface = pod.interfaces[0].clone();
        let (netns, name) = (File::open(&pod.netns).unwrap(), nic.tap.clone());
        let opened = std::thread::spawn(move || {
            setns(&netns, CloneFlags::CLONE_NEWNET).unwrap();
            tap::attach(&name).unwrap()
        });
        let seen =
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, Some(SockProtocol::EthAll));
        let (mut v4, mut v6) = (Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED);
        for address in &nic.addresses {
            match address.ip {
                IpAddr::V4(ip) => v4 = ip,
                IpAddr::V6(ip) => v6 = ip,
            }
        }
        let lab =
            Self { tap: opened.join().unwrap(), seen: seen.unwrap().into(), mac: nic.mac, v4, v6, sent: 0 };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let link = run(&format!("nsenter --net={} ip link show {}", pod.netns.display(), nic.tap));
            if link.contains("state UP") && !link.contains("qdisc noop") {
                return lab;
            }
            assert!(Instant::now() < deadline, "{link}");
        }
    }

    fn frame(&self, ethertype: u16, packet: &[u8]) -> Vec<u8> {
        [&GATEWAY[..], &self.mac, &ethertype.to_be_bytes(), packet].concat()
    }

    fn v4(&self, protocol: u8, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
        self.frame(0x0800, &ipv4(self.v4, to, protocol, payload))
    }

    fn v6(&self, next: u8, to: &str, payload: &[u8]) -> Vec<u8> {
        self.frame(0x86dd, &ipv6(self.v6, to.parse().unwrap(), next, payload))
    }

    fn arp(&self, ip: Ipv4Addr, mac: [u8; 6]) -> Vec<u8> {
        let head = [0, 1, 8, 0, 6, 4, 0, 1];
        self.frame(0x0806, &[&head[..], &mac, &ip.octets(), &[0; 6], &[10, 187, 0, 1]].concat())
    }

    /// The address that the guest's kernel gives itself.
    fn link_local(&self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.mac;
        let pair = |high: u8, low: u8| u16::from_be_bytes([high, low]);
        Ipv6Addr::new(0xfe80, 0, 0, 0, pair(a ^ 2, b), pair(c, 0xff), pair(0xfe, d), pair(e, f))
    }

    /// Whether the node gets to see the frame, told by a mark behind it; a second one that always passes says when.
    fn passes(&mut self, frame: &[u8]) -> bool {
        self.sent += 2;
        let mark = |number: u32| [&b"mark"[..], &number.to_be_bytes(), b"kram"].concat();
        let (ours, control) = (mark(self.sent), mark(self.sent + 1));
        let arp = self.arp(self.v4, self.mac);
        for frame in [[frame, &ours].concat(), [arp, control.clone()].concat()] {
            self.tap.write_all(&[&[0; HEADER][..], &frame].concat()).unwrap();
        }
        let (mut buffer, mut passed) = ([0; 2048], false);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.checked_duration_since(Instant::now()).expect("the control frame arrives");
            let timeout = PollTimeout::try_from(left).unwrap();
            poll(&mut [PollFd::new(self.seen.as_fd(), PollFlags::POLLIN)], timeout).unwrap();
            let length = self.seen.read(&mut buffer).unwrap();
            let has = |mark: &[u8]| buffer[..length].windows(mark.len()).any(|part| part == mark);
            passed |= has(&ours);
            if has(&control) {
                return passed;
            }
        }
    }
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    // Marks are part of the packet.
    let length = u16::try_from(20 + payload.len() + 12).unwrap().to_be_bytes();
    let head = [0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, protocol, 0, 0];
    let mut packet = [&head[..], &from.octets(), &to.octets()].concat();
    let sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    [&packet[..], payload].concat()
}

fn ipv6(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len() + 12).unwrap().to_be_bytes();
    let head = [0x60, 0, 0, 0, length[0], length[1], next, 255];
    [&head[..], &from.octets(), &to.octets(), payload].concat()
}

fn udp(from: u16, to: u16) -> Vec<u8> {
    [from.to_be_bytes(), to.to_be_bytes(), 20_u16.to_be_bytes(), [0, 0]].concat()
}

fn tcp(from: u16, to: u16, flags: u8) -> Vec<u8> {
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0; 8], &[0x50, flags, 1, 0, 0, 0, 0, 0]].concat()
}

/// A neighbour message: type, then the target.
fn neighbour(kind: u8, target: &str) -> Vec<u8> {
    [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target.parse::<Ipv6Addr>().unwrap().octets()].concat()
}

fn policy(text: &str) -> SetupRequest {
    SetupRequest { egress: Some(EgressPolicy::parse(text, &[]).unwrap()), ..request(1) }
}

fn with_ip_header(mut frame: Vec<u8>, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    change(&mut frame[14..34]);
    let header = &mut frame[14..34];
    header[10..12].copy_from_slice(&[0, 0]);
    let sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame
}

#[test]
fn ipv4_frames_get_out_to_allowed_addresses_from_the_pods_own() {
    on_a_local_node(async |node| {
        let networking = node.site.networking();
        let pod = networking.setup(policy("192.0.2.2")).await.unwrap();
        let mut lab = Lab::new(&pod);
        let fine = lab.v4(17, ALLOWED4, &udp(1, 2));
        let fragment = |frame: Vec<u8>| with_ip_header(frame, |header| header[7] = 1);
        let passing = [
            ("udp", fine.clone()),
            ("a later fragment", fragment(fine.clone())),
            ("another protocol", lab.v4(47, ALLOWED4, &[0; 8])),
            ("a question for a hardware address", lab.arp(lab.v4, lab.mac)),
        ];
        for (what, frame) in passing {
            assert!(lab.passes(&frame), "{what}");
        }
        let denied = lab.v4(17, DENIED4, &udp(1, 2));
        let tagged = |kind: [u8; 2], inner: &[u8]| [&fine[..12], &kind, &[0, 5], inner].concat();
        let mut strange_mac = fine.clone();
        strange_mac[11] ^= 1;
        let mut options = lab.v4(17, ALLOWED4, &[&[0x83, 3, 4, 0][..], &udp(1, 2)].concat());
        options = with_ip_header(options, |header| header[0] = 0x46);
        let dropped = [
            ("udp elsewhere", denied.clone()),
            ("a later fragment elsewhere", fragment(denied.clone())),
            ("a first fragment elsewhere", with_ip_header(denied.clone(), |header| header[6] = 0x20)),
            ("a SYN elsewhere", lab.v4(6, DENIED4, &tcp(1, 2, 2))),
            ("a stray ACK elsewhere", lab.v4(6, DENIED4, &tcp(1, 2, 16))),
            ("another protocol elsewhere", lab.v4(47, DENIED4, &[0; 8])),
            ("broadcast", lab.v4(17, Ipv4Addr::BROADCAST, &udp(68, 67))),
            ("multicast", lab.v4(17, Ipv4Addr::new(224, 0, 0, 251), &udp(5353, 5353))),
            ("an echo reply nobody asked for", lab.v4(1, DENIED4, &[0, 0, 0, 0, 0, 1, 0, 1])),
            ("an error for nobody", lab.v4(1, DENIED4, &[3, 3, 0, 0, 0, 0, 0, 0])),
            ("a redirect", lab.v4(1, ALLOWED4, &[5, 1, 0, 0, 10, 0, 0, 1])),
            ("options", options),
            (
                "another address",
                lab.frame(0x0800, &ipv4(Ipv4Addr::new(10, 187, 0, 99), ALLOWED4, 17, &udp(1, 2))),
            ),
            ("no address", lab.frame(0x0800, &ipv4(Ipv4Addr::UNSPECIFIED, ALLOWED4, 17, &udp(68, 67)))),
            ("another MAC address", strange_mac),
            ("another's ARP", lab.arp(Ipv4Addr::new(10, 187, 0, 1), lab.mac)),
            ("ARP for another", lab.arp(lab.v4, [2, 0, 0, 0, 0, 1])),
            ("a VLAN", tagged([0x81, 0x00], &fine[12..])),
            ("a service VLAN", tagged([0x88, 0xa8], &fine[12..])),
            ("two VLANs", tagged([0x88, 0xa8], &tagged([0x81, 0x00], &fine[12..])[12..])),
            ("a VLAN of priority", [&fine[..12], &[0x81, 0, 0, 0][..], &fine[12..]].concat()),
            ("another ethertype", lab.frame(0x88b5, b"hello there, whoever you are")),
            ("LLC", lab.frame(40, &[0xaa; 40])),
            (
                "IPv6 that says it is IPv4",
                lab.frame(0x0800, &ipv6(lab.v6, "2001:db8::1".parse().unwrap(), 17, &udp(1, 2))),
            ),
        ];
        for (what, frame) in dropped {
            assert!(!lab.passes(&frame), "{what}");
        }
    });
}

#[test]
fn ipv6_frames_get_out_to_allowed_addresses_from_the_pods_own() {
    on_a_local_node(async |node| {
        let networking = node.site.networking();
        let pod = networking.setup(policy("2001:db8:2::/64 64:ff9b::/96")).await.unwrap();
        let mut lab = Lab::new(&pod);
        let (own, local) = (lab.v6.to_string(), lab.link_local());
        let from = |lab: &Lab, from: &str, to: &str, next: u8, payload: &[u8]| {
            lab.frame(0x86dd, &ipv6(from.parse().unwrap(), to.parse().unwrap(), next, payload))
        };
        let local = local.to_string();
        let (solicit, advertise) = (neighbour(135, "fda3:5b08:9c41::1"), neighbour(136, &own));
        let mld = [&[58, 0, 5, 2, 0, 0, 1, 0][..], &[143, 0, 0, 0, 0, 0, 0, 0]].concat();
        let passing = [
            ("udp", lab.v6(17, "2001:db8:2::2", &udp(1, 2))),
            ("a question for a neighbour", lab.v6(58, "ff02::1:ff00:1", &solicit)),
            ("the same to itself", lab.v6(58, "fda3:5b08:9c41::1", &solicit)),
            ("from its link-local address", from(&lab, &local, "ff02::1:ff00:1", 58, &solicit)),
            ("an answer to a neighbour", lab.v6(58, "fda3:5b08:9c41::1", &advertise)),
            ("whether an address is free", from(&lab, "::", "ff02::1:ff00:2", 58, &neighbour(135, &own))),
            ("a question for routers", from(&lab, &local, "ff02::2", 58, &[133, 0, 0, 0, 0, 0, 0, 0])),
            ("a multicast report", from(&lab, &local, "ff02::16", 0, &mld)),
        ];
        for (what, frame) in passing {
            assert!(lab.passes(&frame), "{what}");
        }
        let behind = |kind: u8| [&[17, 0, 0, 0, 0, 0, 0, 0][..], &udp(1, 2)].concat().tap_kind(kind);
        let dropped = [
            ("udp elsewhere", lab.v6(17, "2001:db8:3::2", &udp(1, 2))),
            ("a SYN elsewhere", lab.v6(6, "2001:db8:3::2", &tcp(1, 2, 2))),
            ("a fragment elsewhere", lab.v6(44, "2001:db8:3::2", &behind(44))),
            ("a hop-by-hop header", lab.v6(0, "2001:db8:2::2", &behind(0))),
            ("a routing header", lab.v6(43, "2001:db8:2::2", &behind(43))),
            ("a destination header", lab.v6(60, "2001:db8:2::2", &behind(60))),
            (
                "a fragment with a routing header",
                lab.v6(44, "2001:db8:2::2", &[43, 0, 0, 1, 0, 0, 0, 0, 17, 0, 0, 0]),
            ),
            (
                "a router's advertisement",
                from(&lab, &local, "ff02::1", 58, &[134, 0, 0, 0, 64, 0, 0, 255, 0, 0, 0, 0]),
            ),
            ("a redirect", lab.v6(58, "2001:db8:2::2", &neighbour(137, "2001:db8::1"))),
            ("an answer for another", lab.v6(58, "fda3:5b08:9c41::1", &neighbour(136, "fda3:5b08:9c41::1"))),
            ("an answer for a router", from(&lab, &local, "ff02::1", 58, &neighbour(136, "fe80::1"))),
            ("a question beyond the link", lab.v6(58, "2001:db8:3::2", &solicit)),
            ("an answer beyond the link", lab.v6(58, "2001:db8:2::2", &advertise)),
            ("a multicast report beyond the link", from(&lab, &local, "2001:db8:2::2", 0, &mld)),
            ("an echo reply nobody asked for", lab.v6(58, "2001:db8:3::2", &[129, 0, 0, 0, 0, 1, 0, 1])),
            ("another address", from(&lab, "fda3:5b08:9c41::99", "2001:db8:2::2", 17, &udp(1, 2))),
            ("another link-local address", from(&lab, "fe80::1", "ff02::1:ff00:1", 58, &solicit)),
            ("no address", from(&lab, "::", "2001:db8:2::2", 17, &udp(1, 2))),
            ("multicast", lab.v6(17, "ff02::fb", &udp(5353, 5353))),
            ("credentials by NAT64, whatever else is allowed", lab.v6(17, "64:ff9b::a9fe:a9fe", &udp(1, 2))),
        ];
        for (what, frame) in dropped {
            assert!(!lab.passes(&frame), "{what}");
        }
    });
}

/// An extension header of eight bytes before UDP looks the same for all kinds but fragments, where it is a first one.
trait Kind {
    fn tap_kind(self, kind: u8) -> Self;
}

impl Kind for Vec<u8> {
    fn tap_kind(mut self, kind: u8) -> Self {
        match kind {
            // Padding of four bytes.
            0 | 60 => self[2..4].copy_from_slice(&[1, 4]),
            44 => self[3] = 1,
            _ => {}
        }
        self
    }
}

#[test]
fn credentials_are_reached_by_their_own_address_only() {
    on_a_local_node(async |node| {
        let networking = node.site.networking();
        let pod = networking.setup(policy("0.0.0.0/0")).await.unwrap();
        let mut lab = Lab::new(&pod);
        let frame = lab.v4(6, METADATA, &tcp(1, 80, 2));
        assert!(!lab.passes(&frame));
        let denied = lab.v4(6, DENIED4, &tcp(1, 80, 2));
        assert!(lab.passes(&denied), "everything else is allowed");
        drop(lab);
        let pod = networking.setup(policy("0.0.0.0/0 169.254.169.254")).await.unwrap();
        let mut lab = Lab::new(&pod);
        let frame = lab.v4(6, METADATA, &tcp(1, 80, 2));
        assert!(lab.passes(&frame));
    });
}

/// The node dials the guest. What the guest sends back passes, but no connection of its own to the same ports.
#[test]
fn an_answer_is_not_taken_for_a_new_connection() {
    on_a_local_node(async |node| {
        let networking = node.site.networking();
        let pod = networking.setup(policy("none")).await.unwrap();
        let mut lab = Lab::new(&pod);
        let mac = lab.mac.map(|byte| format!("{byte:02x}")).join(":");
        run(&format!("ip neigh replace {} lladdr {mac} dev a3s0 nud permanent", lab.v4));
        let gateway = Ipv4Addr::new(10, 187, 0, 1);
        let (before, syn, ack) = (tcp(7000, 7001, 18), tcp(7000, 7001, 2), tcp(7000, 7001, 16));
        let frame = |lab: &Lab, segment: &[u8]| lab.v4(6, gateway, segment);
        let early = frame(&lab, &before);
        assert!(!lab.passes(&early), "nobody has dialled");

        dial(lab.v4, 7000, 7001);
        let [answer, own, later] = [before, syn, ack].map(|segment| frame(&lab, &segment));
        assert!(lab.passes(&answer), "SYN and ACK");
        assert!(!lab.passes(&own), "a SYN of the guest's");
        for (flags, what) in [(0x0a, "SYN and PSH"), (0x03, "SYN and FIN"), (0xc2, "SYN with ECN")] {
            let other = frame(&lab, &tcp(7000, 7001, flags));
            assert!(!lab.passes(&other), "{what}");
        }
        assert!(lab.passes(&later), "what belongs to the connection");
        let elsewhere = frame(&lab, &tcp(7000, 7002, 16));
        assert!(!lab.passes(&elsewhere), "another port");
        let fragment = with_ip_header(frame(&lab, &tcp(7000, 7001, 16)), |header| header[6] = 0x20);
        assert!(!lab.passes(&fragment), "a fragment");
    });
}

/// A SYN from a port of the node, to which nothing answers.
fn dial(to: Ipv4Addr, port: u16, from: u16) {
    use nix::sys::socket::{SockaddrIn, bind, connect, sockopt};
    use std::os::fd::AsRawFd;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    nix::sys::socket::setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
    bind(socket.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, from)).unwrap();
    let [a, b, c, d] = to.octets();
    let _ = connect(socket.as_raw_fd(), &SockaddrIn::new(a, b, c, d, port));
    std::thread::sleep(Duration::from_millis(50));
    drop(TcpStream::from(socket));
}
