//! The host's own name servers, for pods that are told of none.

use a3s_box_core::spec::DnsSpec;

/// Where resolv.conf(5) is, and where systemd-resolved keeps the servers behind its stub.
const FILES: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// The host's resolver as a pod can use it; `None`: the host has none that a pod could reach.
///
/// What listens on the host's loopback cannot be reached from a pod. A stub there, such as systemd-resolved's, has its real
/// servers in a file of its own.
pub fn host_resolver() -> Option<DnsSpec> {
    resolver(|path| std::fs::read_to_string(path).ok())
}

fn resolver(read: impl Fn(&str) -> Option<String>) -> Option<DnsSpec> {
    FILES.iter().filter_map(|path| read(path)).map(|text| parse(&text)).find(|dns| !dns.servers.is_empty())
}

/// The last `search` or `domain` counts, `options` add up; servers on loopback are left out.
fn parse(text: &str) -> DnsSpec {
    let mut dns = DnsSpec::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                dns.servers.extend(words.next().filter(|server| !is_loopback(server)).map(str::to_owned));
            }
            Some("search" | "domain") => dns.searches = words.map(str::to_owned).collect(),
            Some("options") => dns.options.extend(words.map(str::to_owned)),
            Some(_) | None => {}
        }
    }
    dns
}

fn is_loopback(server: &str) -> bool {
    server.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_read_field_by_field() {
        let dns =
            parse("# x\nnameserver 10.0.0.1\ndomain old\nsearch a b\noptions ndots:5\nnameserver fd00::1\n");
        assert_eq!(dns.servers, ["10.0.0.1", "fd00::1"]);
        assert_eq!(dns.searches, ["a", "b"]);
        assert_eq!(dns.options, ["ndots:5"]);
    }

    #[test]
    fn a_stub_on_loopback_is_replaced_by_what_is_behind_it_or_by_nothing() {
        let servers = |own: &'static str, behind: Option<&'static str>| {
            let read = |path: &str| {
                if path == FILES[0] { Some(own.to_owned()) } else { behind.map(str::to_owned) }
            };
            resolver(read).map(|dns| dns.servers)
        };
        let real = Some("nameserver 192.0.2.53\nsearch lan\n");
        assert_eq!(servers("nameserver 127.0.0.53\n", real), Some(vec!["192.0.2.53".to_owned()]));
        assert_eq!(servers("nameserver 127.0.0.53\n", None), None);
        assert_eq!(servers("nameserver ::1\nnameserver 127.0.0.1\n", Some("nameserver 127.0.0.53")), None);
        let mixed = "nameserver 127.0.0.1\nnameserver 10.0.0.1\n";
        assert_eq!(servers(mixed, real), Some(vec!["10.0.0.1".to_owned()]));
        assert_eq!(servers("", None), None, "no server named means the one on loopback");
    }
}
