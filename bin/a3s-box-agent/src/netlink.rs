//! Configures NICs with rtnetlink: the handful of messages that are needed, written by hand, because the
//! general crates would be a fifth of the agent.
//!
//! Layouts: include/uapi/linux/netlink.h, rtnetlink.h, if_link.h and if_addr.h.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use a3s_box_protocol::proto::{IpNetwork, NetworkInterface};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use thiserror::Error;

/// A NIC that cannot be set up.
#[derive(Debug, Error)]
pub enum NetlinkError {
    /// No NIC has the address.
    #[error("no network interface has the MAC address {mac}")]
    NoInterface {
        /// `aa:bb:…`.
        mac: String,
    },
    /// A field of the request has the wrong length.
    #[error("interface {interface}: {what} is no address")]
    Malformed {
        /// Its name.
        interface: String,
        /// Which field.
        what: String,
    },
    /// The kernel refused a step.
    #[error("interface {interface}: {step}: {source}")]
    Refused {
        /// Its name.
        interface: String,
        /// What was tried.
        step: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_NET_NS_FD: u16 = 28;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;

const IFF_UP: u32 = 1;
/// Duplicate address detection would keep a new v6 address unusable for a second; CNI has given it to us alone.
const IFA_F_NODAD: u8 = 2;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;

const HEADER: usize = 16;
const IFINFO: usize = 16;

/// Finds the NIC by its first MAC address, names it, gives it addresses and routes, and brings it up. What is already so
/// stays so.
pub fn configure(interface: &NetworkInterface) -> Result<(), NetlinkError> {
    let refused = |step: String| {
        let interface = interface.name.clone();
        move |source| NetlinkError::Refused { interface, step, source }
    };
    let malformed =
        |what: &str| NetlinkError::Malformed { interface: interface.name.clone(), what: what.to_owned() };
    let (socket, link) = find(interface)?;
    if link.name != interface.name {
        // A NIC that is up cannot be renamed by older kernels, and ours may be in the way under its first name.
        socket
            .request(&rename(link.index, &interface.name))
            .map_err(refused(format!("rename {}", link.name)))?;
    }
    socket
        .request(&bring_up(link.index, interface.mtu).attribute(IFLA_ADDRESS, &interface.mac))
        .map_err(refused(format!("MAC address {}, mtu {} and up", colons(&interface.mac), interface.mtu)))?;
    for address in &interface.addresses {
        let (ip, prefix) = parse(address).ok_or_else(|| malformed("an address"))?;
        socket
            .request(&add_address(link.index, ip, prefix))
            .map_err(refused(format!("add the address {ip}/{prefix}")))?;
    }
    // Routes on the link first: gateways are reached through them.
    let mut routes: Vec<_> = interface.routes.iter().collect();
    routes.sort_by_key(|r| !r.gateway.is_empty());
    for route in routes {
        let destination =
            route.destination.as_ref().and_then(parse).ok_or_else(|| malformed("a destination"))?;
        let gateway = match route.gateway.as_slice() {
            [] => None,
            octets => Some(parse_ip(octets).ok_or_else(|| malformed("a gateway"))?),
        };
        let step = format!("add the route to {}/{}", destination.0, destination.1);
        socket.request(&add_route(link.index, destination, gateway)).map_err(refused(step))?;
    }
    Ok(())
}

/// Moves the NIC to another network namespace.
pub fn move_to(interface: &NetworkInterface, namespace: BorrowedFd<'_>) -> Result<(), NetlinkError> {
    let (socket, link) = find(interface)?;
    socket.request(&give_away(link.index, namespace)).map_err(|source| NetlinkError::Refused {
        interface: interface.name.clone(),
        step: "move to the pod's network namespace".to_owned(),
        source,
    })
}

/// The NIC, by the MAC address that it has or still has, and the socket that found it.
fn find(interface: &NetworkInterface) -> Result<(Socket, Link), NetlinkError> {
    let refused = |step: &str| {
        let (interface, step) = (interface.name.clone(), step.to_owned());
        move |source| NetlinkError::Refused { interface, step, source }
    };
    let socket = Socket::open().map_err(refused("open netlink"))?;
    let links = socket.links().map_err(refused("list interfaces"))?;
    let known = |link: &Link| [&interface.device_mac, &interface.mac].contains(&&link.mac);
    let link = links
        .into_iter()
        .find(known)
        .ok_or_else(|| NetlinkError::NoInterface { mac: colons(&interface.device_mac) })?;
    Ok((socket, link))
}

fn colons(mac: &[u8]) -> String {
    mac.iter().map(|octet| format!("{octet:02x}")).collect::<Vec<_>>().join(":")
}

/// Brings the loopback interface up.
pub fn loopback_up() -> io::Result<()> {
    // It is the first interface of every network namespace.
    Socket::open()?.request(&bring_up(1, 0))
}

fn parse(network: &IpNetwork) -> Option<(IpAddr, u8)> {
    let ip = parse_ip(&network.ip)?;
    let longest = if ip.is_ipv4() { 32 } else { 128 };
    u8::try_from(network.prefix).ok().filter(|p| *p <= longest).map(|p| (ip, p))
}

fn parse_ip(octets: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(octets) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(octets).ok().map(IpAddr::from)
}

struct Link {
    index: u32,
    name: String,
    mac: Vec<u8>,
}

/// One request under construction.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        bytes[8..12].copy_from_slice(&1_u32.to_ne_bytes());
        bytes.extend_from_slice(body);
        Self(bytes)
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).expect("names and addresses are short");
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn ip(self, kind: u16, ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => self.attribute(kind, &ip.octets()),
            IpAddr::V6(ip) => self.attribute(kind, &ip.octets()),
        }
    }

    fn finish(&self) -> Vec<u8> {
        let mut bytes = self.0.clone();
        let length = u32::try_from(bytes.len()).expect("requests are short");
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes
    }
}

fn ifinfo(index: u32, flags: u32, change: u32) -> [u8; IFINFO] {
    let mut body = [0; IFINFO];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..16].copy_from_slice(&change.to_ne_bytes());
    body
}

fn rename(index: u32, name: &str) -> Message {
    let mut text = name.as_bytes().to_vec();
    text.push(0);
    Message::new(RTM_NEWLINK, NLM_F_ACK, &ifinfo(index, 0, 0)).attribute(IFLA_IFNAME, &text)
}

fn give_away(index: u32, namespace: BorrowedFd<'_>) -> Message {
    let number = namespace.as_raw_fd().to_ne_bytes();
    Message::new(RTM_NEWLINK, NLM_F_ACK, &ifinfo(index, 0, 0)).attribute(IFLA_NET_NS_FD, &number)
}

/// An MTU of 0 leaves it as it is.
fn bring_up(index: u32, mtu: u32) -> Message {
    let message = Message::new(RTM_NEWLINK, NLM_F_ACK, &ifinfo(index, IFF_UP, IFF_UP));
    if mtu == 0 { message } else { message.attribute(IFLA_MTU, &mtu.to_ne_bytes()) }
}

fn family(ip: IpAddr) -> u8 {
    let family = if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    family as u8
}

fn add_address(index: u32, ip: IpAddr, prefix: u8) -> Message {
    let mut body = [family(ip), prefix, IFA_F_NODAD, RT_SCOPE_UNIVERSE, 0, 0, 0, 0];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    let message = Message::new(RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, &body)
        .ip(IFA_LOCAL, ip)
        .ip(IFA_ADDRESS, ip);
    match broadcast(ip, prefix) {
        Some(broadcast) => message.ip(IFA_BROADCAST, broadcast),
        None => message,
    }
}

/// The address of all hosts of a network: the kernel does not work it out. Networks of one or two hosts have none (RFC
/// 3021), and IPv6 knows none.
fn broadcast(ip: IpAddr, prefix: u8) -> Option<IpAddr> {
    match ip {
        IpAddr::V4(ip) if prefix < 31 => Some(Ipv4Addr::from(u32::from(ip) | u32::MAX >> prefix).into()),
        IpAddr::V4(_) | IpAddr::V6(_) => None,
    }
}

fn add_route(index: u32, (destination, prefix): (IpAddr, u8), gateway: Option<IpAddr>) -> Message {
    let scope = if gateway.is_some() || destination.is_ipv6() { RT_SCOPE_UNIVERSE } else { RT_SCOPE_LINK };
    let body =
        [family(destination), prefix, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST, 0, 0, 0, 0];
    let message = Message::new(RTM_NEWROUTE, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, &body)
        .attribute(RTA_OIF, &index.to_ne_bytes());
    let message = if prefix == 0 { message } else { message.ip(RTA_DST, destination) };
    match gateway {
        Some(gateway) => message.ip(RTA_GATEWAY, gateway),
        None => message,
    }
}

struct Socket(OwnedFd);

impl Socket {
    fn open() -> io::Result<Self> {
        let socket =
            rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        Ok(Self(socket))
    }

    fn send(&self, message: &Message) -> io::Result<()> {
        rustix::net::send(&self.0, &message.finish(), SendFlags::empty())?;
        Ok(())
    }

    /// Calls `each` with every message of one answer until it says that the answer is complete.
    fn receive(&self, mut each: impl FnMut(u16, &[u8]) -> io::Result<bool>) -> io::Result<()> {
        let mut bytes = vec![0; 64 * 1024];
        loop {
            let (length, _) = rustix::net::recv(&self.0, bytes.as_mut_slice(), RecvFlags::empty())?;
            let mut rest = &bytes[..length];
            while let Some((kind, body, next)) = split_message(rest) {
                if each(kind, body)? {
                    return Ok(());
                }
                rest = next;
            }
        }
    }

    fn request(&self, message: &Message) -> io::Result<()> {
        self.send(message)?;
        self.receive(
            |kind, body| if kind == NLMSG_ERROR { acknowledged(body).map(|()| true) } else { Ok(false) },
        )
    }

    fn links(&self) -> io::Result<Vec<Link>> {
        self.send(&Message::new(RTM_GETLINK, NLM_F_DUMP, &ifinfo(0, 0, 0)))?;
        let mut links = Vec::new();
        self.receive(|kind, body| match kind {
            NLMSG_DONE => Ok(true),
            NLMSG_ERROR => acknowledged(body).map(|()| true),
            RTM_NEWLINK => {
                links.extend(link(body));
                Ok(false)
            }
            _ => Ok(false),
        })?;
        Ok(links)
    }
}

fn acknowledged(body: &[u8]) -> io::Result<()> {
    let code = body.first_chunk::<4>().map_or(-libc::EBADMSG, |c| i32::from_ne_bytes(*c));
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}

fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk::<4>()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk::<2>()?);
    let body = bytes.get(HEADER..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or(&[])))
}

fn link(body: &[u8]) -> Option<Link> {
    let index = u32::from_ne_bytes(*body.get(4..)?.first_chunk::<4>()?);
    let (mut name, mut mac) = (String::new(), Vec::new());
    let mut rest = body.get(IFINFO..)?;
    while let Some(length) = rest.first_chunk::<2>().map(|l| usize::from(u16::from_ne_bytes(*l))) {
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk::<2>()?);
        let value = rest.get(4..length)?;
        match kind {
            IFLA_IFNAME => name = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned(),
            IFLA_ADDRESS => mac = value.to_vec(),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Some(Link { index, name, mac })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_lists_a_loopback_interface() {
        let links = Socket::open().unwrap().links().unwrap();
        let first = links.iter().find(|l| l.index == 1).unwrap();
        assert_eq!((first.name.as_str(), first.mac.len()), ("lo", 6));
    }

    #[test]
    fn a_nic_that_does_not_exist_is_named_by_its_address() {
        let interface = NetworkInterface {
            name: "eth0".to_owned(),
            mac: vec![2, 0xfe, 1, 2, 3, 4],
            device_mac: vec![2, 0xff, 1, 2, 3, 4],
            ..Default::default()
        };
        let error = configure(&interface).unwrap_err();
        assert_eq!(error.to_string(), "no network interface has the MAC address 02:ff:01:02:03:04");
    }

    #[test]
    fn prefixes_and_octets_are_checked() {
        let network = |ip: &[u8], prefix| IpNetwork { ip: ip.to_vec(), prefix };
        assert!(parse(&network(&[10, 0, 0, 1], 33)).is_none());
        assert!(parse(&network(&[10, 0, 0], 8)).is_none());
        assert_eq!(parse(&network(&[10, 0, 0, 1], 8)), Some((IpAddr::from([10, 0, 0, 1]), 8)));
        assert!(parse(&network(&[0; 16], 128)).is_some());
    }

    #[test]
    fn networks_of_more_than_two_hosts_have_a_broadcast_address() {
        let of = |prefix| broadcast(IpAddr::from([10, 88, 5, 6]), prefix).map(|ip| ip.to_string());
        assert_eq!(of(0).as_deref(), Some("255.255.255.255"));
        assert_eq!(of(16).as_deref(), Some("10.88.255.255"));
        assert_eq!(of(30).as_deref(), Some("10.88.5.7"));
        assert_eq!((of(31), of(32)), (None, None));
        assert_eq!(broadcast(IpAddr::from([0; 16]), 64), None);
    }

    #[test]
    fn answers_cut_anywhere_are_no_messages_and_no_panics() {
        let message = rename(7, "eth0").finish();
        for length in 0..message.len() {
            assert!(split_message(&message[..length]).is_none());
            link(&message[..length]);
        }
    }
}
