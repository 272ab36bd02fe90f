//! Ports of the host that lead to boxes: what was asked for, and whether it can be had.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use a3s_box_core::spec::{PortMapping, PortProtocol};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage};

use super::LocalError;

/// At which of the host's addresses a port is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    /// All of them.
    Everywhere,
    /// All of IPv4.
    EveryV4,
    /// All of IPv6.
    EveryV6,
    /// This one.
    Only(IpAddr),
}

/// A published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Published {
    pub(super) at: At,
    pub(super) protocol: PortProtocol,
    pub(super) host_port: u16,
    pub(super) box_port: u16,
}

impl Published {
    /// Reads what CRI or the command line said. `None`: host port 0 means that it is not published.
    pub(super) fn read(mapping: &PortMapping) -> Result<Option<Self>, LocalError> {
        if mapping.host_port == 0 {
            return Ok(None);
        }
        let bad = |problem| LocalError::HostAddress { text: mapping.host_ip.clone(), problem };
        let at = match mapping.host_ip.parse::<IpAddr>() {
            _ if mapping.host_ip.is_empty() => At::Everywhere,
            Ok(IpAddr::V4(ip)) if ip.is_unspecified() => At::EveryV4,
            Ok(IpAddr::V6(ip)) if ip.is_unspecified() => At::EveryV6,
            // The kernel takes nothing from ::1 across another interface, and has no switch for it as IPv4 does.
            Ok(IpAddr::V6(ip)) if ip.is_loopback() => {
                return Err(bad("boxes cannot be reached through ::1; use 127.0.0.1"));
            }
            Ok(ip) => At::Only(ip),
            Err(_) => return Err(bad("it is not an IP address")),
        };
        let PortMapping { protocol, host_port, container_port: box_port, .. } = *mapping;
        Ok(Some(Self { at, protocol, host_port, box_port }))
    }

    /// Whether both cannot be had at once.
    pub(super) fn conflicts_with(&self, other: &Self) -> bool {
        let place = match (self.at, other.at) {
            (At::Everywhere, _) | (_, At::Everywhere) => true,
            (At::Only(one), At::Only(two)) => one == two,
            (one, two) => one.is_v4() == two.is_v4(),
        };
        place && self.protocol == other.protocol && self.host_port == other.host_port
    }

    /// Whether a program of the host has the port: seen by trying to have it.
    pub(super) fn probe(&self) -> Result<(), LocalError> {
        for ip in self.at.sockets() {
            match bind(self.protocol, SocketAddr::new(ip, self.host_port)) {
                Ok(()) => {}
                // No such family or protocol in this kernel: then nobody has the port there.
                Err(e) if unknown_kind(&e) && !matches!(self.at, At::Only(_)) => {}
                Err(source) => return Err(LocalError::PortInUse { port: self.to_string(), source }),
            }
        }
        Ok(())
    }
}

fn unknown_kind(error: &io::Error) -> bool {
    use nix::errno::Errno;
    let kinds = [
        Errno::EAFNOSUPPORT,
        Errno::EPROTONOSUPPORT,
        Errno::ESOCKTNOSUPPORT,
        Errno::ENOPROTOOPT,
        Errno::EADDRNOTAVAIL,
    ];
    error.raw_os_error().is_some_and(|code| kinds.contains(&Errno::from_raw(code)))
}

impl At {
    fn is_v4(self) -> bool {
        match self {
            Self::EveryV4 | Self::Everywhere => true,
            Self::EveryV6 => false,
            Self::Only(ip) => ip.is_ipv4(),
        }
    }

    /// Where a program of the host would have to listen to be in the way.
    fn sockets(self) -> Vec<IpAddr> {
        let (v4, v6) = (Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into());
        match self {
            Self::Everywhere => vec![v4, v6],
            Self::EveryV4 => vec![v4],
            Self::EveryV6 => vec![v6],
            Self::Only(ip) => vec![ip],
        }
    }
}

/// The socket is closed at once: what is published is taken before any socket sees it, so none has to be kept.
fn bind(protocol: PortProtocol, address: SocketAddr) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let (kind, protocol) = match protocol {
        PortProtocol::Tcp => (SockType::Stream, Some(SockProtocol::Tcp)),
        PortProtocol::Udp => (SockType::Datagram, Some(SockProtocol::Udp)),
        PortProtocol::Sctp => (SockType::Stream, Some(SockProtocol::Sctp)),
    };
    let socket = socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol)?;
    if kind == SockType::Stream {
        // Connections of a server that has ended linger for a minute; they are in nobody's way.
        socket::setsockopt(&socket, socket::sockopt::ReuseAddr, &true)?;
    }
    if address.is_ipv6() {
        socket::setsockopt(&socket, socket::sockopt::Ipv6V6Only, &true)?;
    }
    socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    // With the option above a bind succeeds beside a listener; listening does not.
    if kind == SockType::Stream {
        socket::listen(&socket, socket::Backlog::new(1)?)?;
    }
    Ok(())
}

/// As the command line writes it: `127.0.0.1:8080/tcp`.
impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = protocol_name(self.protocol);
        match self.at {
            At::Everywhere => write!(f, "{}/{protocol}", self.host_port),
            At::EveryV4 => write!(f, "0.0.0.0:{}/{protocol}", self.host_port),
            At::EveryV6 => write!(f, "[::]:{}/{protocol}", self.host_port),
            At::Only(ip) => write!(f, "{}/{protocol}", SocketAddr::new(ip, self.host_port)),
        }
    }
}

pub(super) fn protocol_name(protocol: PortProtocol) -> &'static str {
    match protocol {
        PortProtocol::Tcp => "tcp",
        PortProtocol::Udp => "udp",
        PortProtocol::Sctp => "sctp",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(host_ip: &str, protocol: PortProtocol, host_port: u16) -> Published {
        let mapping = PortMapping { protocol, container_port: 80, host_port, host_ip: host_ip.into() };
        Published::read(&mapping).unwrap().unwrap()
    }

    fn tcp(host_ip: &str) -> Published {
        published(host_ip, PortProtocol::Tcp, 8080)
    }

    #[test]
    fn ports_conflict_where_their_addresses_meet() {
        for (one, two) in
            [("", ""), ("", "127.0.0.1"), ("", "::"), ("0.0.0.0", "10.0.0.1"), ("::", "fd00::1")]
        {
            assert!(tcp(one).conflicts_with(&tcp(two)) && tcp(two).conflicts_with(&tcp(one)), "{one} {two}");
        }
        for (one, two) in
            [("0.0.0.0", "::"), ("0.0.0.0", "fd00::1"), ("::", "10.0.0.1"), ("10.0.0.1", "10.0.0.2")]
        {
            assert!(
                !tcp(one).conflicts_with(&tcp(two)) && !tcp(two).conflicts_with(&tcp(one)),
                "{one} {two}"
            );
        }
        assert!(!tcp("").conflicts_with(&published("", PortProtocol::Udp, 8080)));
        assert!(!tcp("").conflicts_with(&published("", PortProtocol::Tcp, 8081)));
    }

    #[test]
    fn addresses_that_cannot_work_are_refused_and_port_0_is_not_published() {
        let read = |host_ip: &str, host_port| {
            let protocol = PortProtocol::Tcp;
            Published::read(&PortMapping { protocol, container_port: 80, host_port, host_ip: host_ip.into() })
        };
        assert!(matches!(read("::1", 80), Err(LocalError::HostAddress { .. })));
        assert!(matches!(read("localhost", 80), Err(LocalError::HostAddress { .. })));
        assert_eq!(read("", 0).unwrap(), None);
        assert_eq!(read("::", 80).unwrap().unwrap().to_string(), "[::]:80/tcp");
    }

    #[test]
    fn a_port_that_a_program_listens_on_is_in_use_until_it_ends() {
        for listener_at in ["127.0.0.1:0", "0.0.0.0:0"] {
            let listener = std::net::TcpListener::bind(listener_at).unwrap();
            let port = listener.local_addr().unwrap().port();
            for host_ip in ["", "0.0.0.0", "127.0.0.1"] {
                let taken = published(host_ip, PortProtocol::Tcp, port).probe().unwrap_err();
                assert!(matches!(taken, LocalError::PortInUse { .. }), "{taken}");
                assert!(taken.to_string().contains(&port.to_string()), "{taken}");
            }
            drop(listener);
            published("127.0.0.1", PortProtocol::Tcp, port).probe().unwrap();
        }
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        assert!(published("", PortProtocol::Udp, port).probe().is_err());
        published("", PortProtocol::Sctp, port).probe().unwrap();
    }
}
