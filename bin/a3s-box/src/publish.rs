//! `--publish`, in docker's words: `[[HOSTIP:][HOSTPORT]:]PORT[/PROTOCOL]`, where ports may be ranges.

use std::net::{IpAddr, TcpListener, UdpSocket};
use std::ops::RangeInclusive;

use a3s_box_core::spec::{PortMapping, PortProtocol};
use anyhow::Context;

/// Ports of the host that lead to ports of the box. Port 0 of the host is one that is still to be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Publish(Vec<PortMapping>);

impl Publish {
    /// Reads the argument. Whether the ports can be had is seen later.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (ports, protocol) = match text.split_once('/') {
            None => (text, PortProtocol::Tcp),
            Some((ports, "tcp")) => (ports, PortProtocol::Tcp),
            Some((ports, "udp")) => (ports, PortProtocol::Udp),
            Some((ports, "sctp")) => (ports, PortProtocol::Sctp),
            Some((_, other)) => return Err(format!("the protocol {other:?} is not tcp, udp or sctp")),
        };
        let (host, boxes) = match ports.rsplit_once(':') {
            None => (None, ports),
            Some((host, boxes)) => (Some(host), boxes),
        };
        let boxes = range(boxes, "box")?;
        let (host_ip, hosts) = match host {
            None => (String::new(), None),
            Some(host) => match host.rsplit_once(':') {
                None => (String::new(), Some(range(host, "host")?)),
                Some((ip, "")) => (address(ip)?, None),
                Some((ip, ports)) => (address(ip)?, Some(range(ports, "host")?)),
            },
        };
        if let Some(hosts) = &hosts
            && hosts.len() != boxes.len()
        {
            return Err(format!(
                "{text:?} has {} ports of the host for {} of the box",
                hosts.len(),
                boxes.len()
            ));
        }
        let host_ports = hosts.map(|hosts| hosts.collect::<Vec<_>>());
        let mapping = |(at, container_port): (usize, u16)| PortMapping {
            protocol,
            container_port,
            host_port: host_ports.as_ref().map_or(0, |ports| ports[at]),
            host_ip: host_ip.clone(),
        };
        Ok(Self(boxes.enumerate().map(mapping).collect()))
    }

    /// Finds free ports of the host where none was named; what was found.
    pub(crate) fn choose(&mut self) -> anyhow::Result<Vec<String>> {
        let mut chosen = Vec::new();
        for mapping in self.0.iter_mut().filter(|mapping| mapping.host_port == 0) {
            let PortMapping { protocol, host_ip, container_port, .. } = &*mapping;
            let port = free_port(*protocol, host_ip)
                .with_context(|| format!("could not find a free port for the box's port {container_port}"))?;
            chosen.push(format!("port {port} leads to the box's port {container_port}"));
            mapping.host_port = port;
        }
        Ok(chosen)
    }

    /// As CRI would say it.
    pub(crate) fn mappings(&self) -> Vec<PortMapping> {
        self.0.clone()
    }
}

/// One that nobody listens on. Somebody else may take it before the box does; starting it fails then.
fn free_port(protocol: PortProtocol, host_ip: &str) -> std::io::Result<u16> {
    let ip = if host_ip.is_empty() { "0.0.0.0" } else { host_ip };
    let ip: IpAddr = ip.parse().map_err(std::io::Error::other)?;
    let bound = match protocol {
        PortProtocol::Udp => UdpSocket::bind((ip, 0))?.local_addr()?,
        // A port of the one is as good for the other.
        PortProtocol::Tcp | PortProtocol::Sctp => TcpListener::bind((ip, 0))?.local_addr()?,
    };
    Ok(bound.port())
}

/// Brackets tell the colons of an IPv6 address from the others.
fn address(text: &str) -> Result<String, String> {
    let bare = match text.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').filter(|ip| ip.contains(':')),
        None => Some(text).filter(|ip| !ip.contains(':')),
    };
    match bare.and_then(|ip| ip.parse::<IpAddr>().ok()) {
        Some(ip) => Ok(ip.to_string()),
        None if text.contains(':') => {
            Err(format!("{text:?} is not an IPv6 address in brackets such as [::]"))
        }
        None => Err(format!("{text:?} is not an IP address")),
    }
}

/// One port or `FIRST-LAST`.
fn range(text: &str, whose: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let ports = port(first, whose)?..=port(last, whose)?;
    if ports.is_empty() {
        Err(format!("the {whose} ports {text:?} end before they begin"))
    } else {
        Ok(ports)
    }
}

/// Port 0 would be one that nobody is told.
fn port(text: &str, whose: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(number) if number != 0 && text.bytes().all(|b| b.is_ascii_digit()) => Ok(number),
        Ok(_) | Err(_) => Err(format!("the {whose} port {text:?} is not a number from 1 to 65535")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (String, u16, u16, PortProtocol) {
        let mappings = Publish::parse(text).unwrap().mappings();
        let [PortMapping { host_ip, host_port, container_port, protocol }] =
            <[_; 1]>::try_from(mappings).unwrap();
        (host_ip, host_port, container_port, protocol)
    }

    #[test]
    fn ports_are_read_as_docker_reads_them() {
        let (tcp, udp, sctp) = (PortProtocol::Tcp, PortProtocol::Udp, PortProtocol::Sctp);
        assert_eq!(read("8080:80"), (String::new(), 8080, 80, tcp));
        assert_eq!(read("127.0.0.1:8080:80"), ("127.0.0.1".into(), 8080, 80, tcp));
        assert_eq!(read("5353:53/udp"), (String::new(), 5353, 53, udp));
        assert_eq!(read("0.0.0.0:9:9/sctp"), ("0.0.0.0".into(), 9, 9, sctp));
        assert_eq!(read("[::]:65535:1/tcp"), ("::".into(), 65535, 1, tcp));
        assert_eq!(read("[2001:db8::1]:80:80"), ("2001:db8::1".into(), 80, 80, tcp));
        assert_eq!(read("80"), (String::new(), 0, 80, tcp));
        assert_eq!(read("127.0.0.1::80/udp"), ("127.0.0.1".into(), 0, 80, udp));
    }

    #[test]
    fn ranges_lead_one_to_one() {
        let pairs = |text: &str| {
            let mappings = Publish::parse(text).unwrap().mappings();
            mappings.iter().map(|pair| (pair.host_port, pair.container_port)).collect::<Vec<_>>()
        };
        assert_eq!(pairs("8000-8002:80-82"), [(8000, 80), (8001, 81), (8002, 82)]);
        assert_eq!(pairs("53-54/udp"), [(0, 53), (0, 54)]);
        assert_eq!(pairs("1-65535:1-65535").len(), 65535);
    }

    #[test]
    fn a_port_that_nobody_named_is_chosen_and_told() {
        let mut publish = Publish::parse("127.0.0.1::80").unwrap();
        let told = publish.choose().unwrap();
        let port = publish.mappings()[0].host_port;
        assert_ne!(port, 0);
        assert_eq!(told, [format!("port {port} leads to the box's port 80")]);
        assert!(Publish::parse("8080:80").unwrap().choose().unwrap().is_empty());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, problem) in [
            ("", "the box port \"\""),
            ("8080:80/icmp", "the protocol \"icmp\""),
            ("8080:80/", "the protocol \"\""),
            ("0:80", "the host port \"0\""),
            ("8080:0", "the box port \"0\""),
            ("8080:65536", "the box port \"65536\""),
            ("+1:80", "the host port \"+1\""),
            (":80", "the host port \"\""),
            ("8080:", "the box port \"\""),
            ("8000-8010:80", "has 11 ports of the host for 1 of the box"),
            ("9-8:9-8", "end before they begin"),
            ("8000-:80", "the host port \"\""),
            ("localhost:8080:80", "\"localhost\" is not an IP address"),
            ("::1:8080:80", "is not an IPv6 address in brackets"),
            ("[1.2.3.4]:8080:80", "\"[1.2.3.4]\" is not an IP address"),
            (":8080:80", "\"\" is not an IP address"),
            ("::80", "\"\" is not an IP address"),
        ] {
            let error = Publish::parse(text).unwrap_err();
            assert!(error.contains(problem), "{text}: {error}");
        }
    }
}
