//! `--publish`, in docker's words: `[HOSTIP:]HOSTPORT:PORT[/PROTOCOL]`.

use std::net::IpAddr;

use a3s_box_core::spec::{PortMapping, PortProtocol};

/// A port of the host that leads to the box.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Publish(PortMapping);

impl Publish {
    /// Reads the argument. Whether the port can be had is seen later.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (ports, protocol) = match text.split_once('/') {
            None => (text, PortProtocol::Tcp),
            Some((ports, "tcp")) => (ports, PortProtocol::Tcp),
            Some((ports, "udp")) => (ports, PortProtocol::Udp),
            Some((ports, "sctp")) => (ports, PortProtocol::Sctp),
            Some((_, other)) => return Err(format!("the protocol {other:?} is not tcp, udp or sctp")),
        };
        let form =
            || format!("{text:?} is not HOSTPORT:PORT or HOSTIP:HOSTPORT:PORT, with /tcp, /udp or /sctp");
        let (host, container_port) = ports.rsplit_once(':').ok_or_else(form)?;
        let (host_ip, host_port) = match host.rsplit_once(':') {
            None => (String::new(), host),
            Some((ip, port)) => (address(ip)?, port),
        };
        let (host_port, container_port) = (port(host_port, "host")?, port(container_port, "box")?);
        Ok(Self(PortMapping { protocol, container_port, host_port, host_ip }))
    }

    /// As CRI would say it.
    pub(crate) fn mapping(&self) -> PortMapping {
        self.0.clone()
    }
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

/// Ranges are not spoken: each pair is said by itself. Nor is port 0, which would be one that nobody is told.
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
        let PortMapping { host_ip, host_port, container_port, protocol } =
            Publish::parse(text).unwrap().mapping();
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
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, problem) in [
            ("80", "is not HOSTPORT:PORT"),
            ("", "is not HOSTPORT:PORT"),
            ("8080:80/icmp", "the protocol \"icmp\""),
            ("8080:80/", "the protocol \"\""),
            ("0:80", "the host port \"0\""),
            ("8080:0", "the box port \"0\""),
            ("8080:65536", "the box port \"65536\""),
            ("+1:80", "the host port \"+1\""),
            (":80", "the host port \"\""),
            ("8080:", "the box port \"\""),
            ("8000-8010:80", "the host port \"8000-8010\""),
            ("localhost:8080:80", "\"localhost\" is not an IP address"),
            ("::1:8080:80", "is not an IPv6 address in brackets"),
            ("[1.2.3.4]:8080:80", "\"[1.2.3.4]\" is not an IP address"),
            (":8080:80", "\"\" is not an IP address"),
        ] {
            let error = Publish::parse(text).unwrap_err();
            assert!(error.contains(problem), "{text}: {error}");
        }
    }
}
