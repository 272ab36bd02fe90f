//! The rules of a pod with an egress policy, as text for `nft`.
//!
//! ```text
//!   eth0 ──ingress──> network ── answers of name servers ─────────> dns tap ══ daemon, which pins
//!                        │ else: note what others have opened          │ ingress
//!                        └───────────────────────────────────> tap0 <──┘
//!   tap0 ──ingress──> guest ─── allowed, pinned, or an answer ───> eth0
//! ```
//!
//! The netdev family has no connection tracking. So what comes in is noted in `flows` and `pings`, and a packet of the
//! guest for which nothing is allowed has to be the answer to something noted there. Every chain that decides ends in
//! `fwd`, or else in the drop of the policy: the namespace's own stack sees no frame.
//!
//! An answer is never taken for a new connection: a SYN has to be allowed, a fragment too, as all but the first one
//! hide their ports, and so has whatever is neither TCP, UDP, SCTP nor an answer to a ping. Headers that name a further
//! destination (IPv4 options, IPv6 routing headers) are dropped. So are frames with a VLAN tag, and those that do not
//! come from the pod's own addresses.

use std::fmt::{Display, Write as _};
use std::net::{IpAddr, Ipv6Addr};

use a3s_box_core::egress::{Cidr, EgressPolicy};
use a3s_box_core::network::Interface;

/// What a pod may not reach by way of a larger network: link-local addresses, and where clouds hand out credentials.
const RESERVED: [&str; 5] =
    ["169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "fd20:ce::254/128", "64:ff9b::a9fe:0/112"];

/// How many addresses of names are open at a time.
pub(super) const MAX_PINS: usize = 4096;

/// Our table in a pod's namespace.
pub(super) const TABLE: &str = "netdev a3s_box_egress";

/// Whether no name and no large network leads to `ip`.
pub(super) fn is_reserved(ip: IpAddr) -> bool {
    reserved().any(|net| net.contains(&Cidr::host(ip)))
}

fn reserved() -> impl Iterator<Item = Cidr> {
    RESERVED.iter().filter_map(|text| text.parse().ok())
}

/// The table of a pod. `servers` are asked for names through the tap `dns`; `None`: the policy has no names.
pub(super) fn ruleset(
    policy: &EgressPolicy,
    interfaces: &[Interface],
    dns: Option<(&str, &[IpAddr])>,
) -> String {
    let (explicit, allowed): (Vec<Cidr>, Vec<Cidr>) =
        policy.networks.iter().partition(|net| reserved().any(|reserved| reserved.contains(net)));
    let servers: Vec<Cidr> =
        dns.iter().flat_map(|(_, servers)| servers.iter().copied().map(Cidr::host)).collect();
    let mut text = format!("table {TABLE} {{\n");
    for (family, kind, v4) in [("4", "ipv4_addr", true), ("6", "ipv6_addr", false)] {
        let own = own(interfaces, v4);
        let nets = |nets: &[Cidr]| elements(minimal(nets.iter().copied().filter(|net| net.is_ipv4() == v4)));
        let reserved: Vec<Cidr> = reserved().collect();
        // Writing into a String cannot fail.
        let _ = write!(
            text,
            "  set own{family} {{ type {kind}; {} }}
  set reserved{family} {{ type {kind}; flags interval; {} }}
  set explicit{family} {{ type {kind}; flags interval; {} }}
  set allowed{family} {{ type {kind}; flags interval; {} }}
  set servers{family} {{ type {kind}; flags interval; {} }}
  set pinned{family} {{ type {kind}; size {MAX_PINS}; flags timeout; }}
  set pings{family} {{ type {kind} . {kind}; size 4096; flags dynamic, timeout; }}
  set flows{family} {{ type inet_proto . {kind} . inet_service . {kind} . inet_service; size 65536; flags dynamic, timeout; }}
",
            elements(own),
            nets(&reserved),
            nets(&explicit),
            nets(&allowed),
            nets(&servers),
        );
    }
    let neighbours = elements(minimal(interfaces.iter().flat_map(on_link)));
    let _ = writeln!(text, "  set neighbours6 {{ type ipv6_addr; flags interval; {neighbours} }}");
    for (number, interface) in interfaces.iter().enumerate() {
        text.push_str(&of_guest(number, interface, dns.is_some()));
        text.push_str(&of_network(number, interface, dns.map(|(tap, _)| tap)));
    }
    if let Some((tap, _)) = dns {
        text.push_str(&of_answers(tap, interfaces));
    }
    text.push_str("}\n");
    text
}

/// From the guest to the network.
fn of_guest(number: usize, interface: &Interface, names: bool) -> String {
    let Interface { name, tap, .. } = interface;
    let mac = mac(interface);
    let own4 = anonymous(own(std::slice::from_ref(interface), true).chain(["0.0.0.0".to_owned()]));
    let own6 = own6(interface);
    // Compared as a number: this nft has no word for the field.
    let claimed = anonymous(own6.iter().map(|ip| format!("{:#034x}", ip.to_bits())));
    let link_local = link_local(interface);
    let (family4, family6) =
        (guest_family("ip", "4", number, names), guest_family("ip6", "6", number, names));
    format!(
        "  chain out{number} {{ fwd to \"{name}\"; }}
  chain arp{number} {{
    arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp operation {{ request, reply }} arp saddr ether {mac} arp saddr ip {own4} goto out{number}
  }}
  chain guest4_{number} {{
    ip saddr != @own4 drop
    ip hdrlength != 5 drop
    icmp type {{ redirect, router-advertisement }} drop
{family4}    ip frag-off & 0x3fff != 0 drop
    icmp type echo-reply ip daddr . ip saddr @pings4 goto out{number}
    tcp flags & (syn | ack) == syn drop
    meta l4proto {{ tcp, udp, sctp }} meta l4proto . ip daddr . th dport . ip saddr . th sport @flows4 goto out{number}
  }}
  chain guest6_{number} {{
    ip6 nexthdr 0 ip6 saddr {{ ::, {link_local} }} ip6 daddr ff02::/16 icmpv6 type {{ mld-listener-report, mld-listener-done, mld2-listener-report }} goto out{number}
    ip6 nexthdr {{ 0, 43, 60, 135, 139, 140 }} drop
    ip6 nexthdr 44 frag nexthdr != {{ tcp, udp, sctp, icmpv6 }} drop
    ip6 nexthdr icmpv6 icmpv6 type {{ nd-router-advert, nd-redirect }} drop
    ip6 nexthdr icmpv6 icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit }} ip6 saddr :: ip6 daddr ff02::/16 goto out{number}
    ip6 saddr != @own6 drop
    ip6 nexthdr icmpv6 icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit }} ip6 daddr @neighbours6 goto out{number}
    ip6 nexthdr icmpv6 icmpv6 type nd-neighbor-advert ip6 daddr @neighbours6 @th,64,128 {claimed} goto out{number}
    ip6 nexthdr icmpv6 icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert }} drop
{family6}    ip6 nexthdr icmpv6 icmpv6 type echo-reply ip6 daddr . ip6 saddr @pings6 goto out{number}
    tcp flags & (syn | ack) == syn drop
    ip6 nexthdr {{ tcp, udp, sctp }} meta l4proto . ip6 daddr . th dport . ip6 saddr . th sport @flows6 goto out{number}
  }}
  chain guest{number} {{
    type filter hook ingress device \"{tap}\" priority 0; policy drop;
    ether saddr != {mac} drop
    ether type vmap {{ arp : goto arp{number}, ip : goto guest4_{number}, ip6 : goto guest6_{number} }}
  }}
"
    )
}

/// What may be opened. A TCP connection that was opened while its address was pinned goes on when it no longer is.
fn guest_family(ip: &str, family: &str, number: usize, names: bool) -> String {
    let mut text = format!(
        "    {ip} daddr @explicit{family} goto out{number}
    {ip} daddr != @reserved{family} {ip} daddr @allowed{family} goto out{number}
"
    );
    if names {
        let _ = write!(
            text,
            "    {ip} daddr @servers{family} udp dport 53 goto out{number}
    {ip} daddr @pinned{family} tcp flags & (syn | ack) == syn update @flows{family} {{ meta l4proto . {ip} daddr . th dport . {ip} saddr . th sport timeout 1m }}
    {ip} daddr @pinned{family} goto out{number}
"
        );
    }
    text
}

/// From the network to the guest.
fn of_network(number: usize, interface: &Interface, dns: Option<&str>) -> String {
    let Interface { name, tap, .. } = interface;
    let mut text = format!("  chain in{number} {{ fwd to \"{tap}\"; }}\n");
    if let Some(dns) = dns {
        let _ = writeln!(text, "  chain answers{number} {{ fwd to \"{dns}\"; }}");
    }
    for (ip, family, icmp) in [("ip", "4", "icmp"), ("ip6", "6", "icmpv6")] {
        let _ = write!(
            text,
            "  chain opened{family}_{number} {{
    {icmp} type echo-request update @pings{family} {{ {ip} saddr . {ip} daddr timeout 1m }}
    meta l4proto {{ udp, sctp }} update @flows{family} {{ meta l4proto . {ip} saddr . th sport . {ip} daddr . th dport timeout 3m }}
    tcp flags & (syn | ack) == syn update @flows{family} {{ meta l4proto . {ip} saddr . th sport . {ip} daddr . th dport timeout 1m }} goto in{number}
    meta l4proto tcp meta l4proto . {ip} saddr . th sport . {ip} daddr . th dport @flows{family} jump seen{family}_{number}
    goto in{number}
  }}
  chain seen{family}_{number} {{
    tcp flags & (fin | rst) != 0 update @flows{family} {{ meta l4proto . {ip} saddr . th sport . {ip} daddr . th dport timeout 2m }} return
    update @flows{family} {{ meta l4proto . {ip} saddr . th sport . {ip} daddr . th dport timeout 1d }}
  }}
  chain network{family}_{number} {{
"
        );
        if dns.is_some() {
            let _ = writeln!(
                text,
                "    {ip} saddr @servers{family} udp sport 53 {ip} daddr @own{family} goto answers{number}"
            );
        }
        let _ = write!(
            text,
            "    {ip} daddr @own{family} goto opened{family}_{number}
    goto in{number}
  }}
"
        );
    }
    let _ = write!(
        text,
        "  chain network{number} {{
    type filter hook ingress device \"{name}\" priority 0; policy drop;
    ether type vmap {{ arp : goto in{number}, ip : goto network4_{number}, ip6 : goto network6_{number} }}
  }}
"
    );
    text
}

/// From the daemon to the guest.
fn of_answers(dns: &str, interfaces: &[Interface]) -> String {
    let to = interfaces.iter().enumerate().map(|(number, interface)| {
        let mac = mac(interface);
        format!("    ether daddr {mac} goto in{number}\n")
    });
    let to: String = to.collect();
    format!(
        "  chain answers {{\n    type filter hook ingress device \"{dns}\" priority 0; policy drop;\n{to}  }}\n"
    )
}

/// Opens the addresses for so many seconds, whether they are open already or not.
pub(super) fn pin(pins: &[(IpAddr, u64)]) -> String {
    let mut text = String::new();
    for (ip, seconds) in pins {
        let set = if ip.is_ipv4() { "pinned4" } else { "pinned6" };
        // An element's time is renewed by making it anew, in the one transaction that this is.
        let _ =
            writeln!(text, "add element {TABLE} {set} {{ {ip} }}\ndelete element {TABLE} {set} {{ {ip} }}");
        let _ = writeln!(text, "add element {TABLE} {set} {{ {ip} timeout {seconds}s }}");
    }
    text
}

fn mac(interface: &Interface) -> String {
    interface.mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn own(interfaces: &[Interface], v4: bool) -> impl Iterator<Item = String> {
    let addresses =
        interfaces.iter().flat_map(|interface| interface.addresses.iter().map(|address| address.ip));
    let link_local = interfaces.iter().map(|interface| IpAddr::V6(link_local(interface)));
    let mut own: Vec<IpAddr> = addresses.chain(link_local).filter(|ip| ip.is_ipv4() == v4).collect();
    own.sort_unstable();
    own.dedup();
    own.into_iter().map(|ip| ip.to_string())
}

fn own6(interface: &Interface) -> Vec<Ipv6Addr> {
    let addresses = interface.addresses.iter().filter_map(|address| match address.ip {
        IpAddr::V4(_) => None,
        IpAddr::V6(ip) => Some(ip),
    });
    let mut own: Vec<Ipv6Addr> = addresses.chain([link_local(interface)]).collect();
    own.sort_unstable();
    own.dedup();
    own
}

/// The address that Linux makes from the MAC address: RFC 4291, appendix A.
fn link_local(interface: &Interface) -> Ipv6Addr {
    let [a, b, c, d, e, f] = interface.mac;
    let half = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    Ipv6Addr::from_bits(0xfe80 << 112 | u128::from(half))
}

/// Who may be told of, and asked for, hardware addresses. A packet for anybody else would leave the link.
fn on_link(interface: &Interface) -> Vec<Cidr> {
    let link = [("ff02::", 16), ("fe80::", 10)]
        .into_iter()
        .filter_map(|(ip, prefix)| Some((ip.parse().ok()?, prefix)));
    let own = interface.addresses.iter().map(|address| (address.ip, address.prefix));
    let routes = interface.routes.iter().map(|route| match route.gateway {
        Some(gateway) => (gateway, 128),
        None => (route.destination.ip, route.destination.prefix),
    });
    let all = link.chain(own).chain(routes).filter(|(ip, prefix)| ip.is_ipv6() && *prefix > 0);
    all.map(|(ip, prefix)| Cidr::around(ip, prefix)).collect()
}

/// Without those that are inside of others: intervals must not overlap.
fn minimal(nets: impl Iterator<Item = Cidr>) -> impl Iterator<Item = Cidr> {
    let mut nets: Vec<Cidr> = nets.collect();
    nets.sort_by_key(|net| net.prefix());
    let mut kept: Vec<Cidr> = Vec::new();
    for net in nets {
        if !kept.iter().any(|other| other.contains(&net)) {
            kept.push(net);
        }
    }
    kept.into_iter()
}

fn elements(of: impl Iterator<Item = impl Display>) -> String {
    let all = listed(of);
    if all.is_empty() { all } else { format!("elements = {{ {all} }};") }
}

fn anonymous(of: impl Iterator<Item = String>) -> String {
    format!("{{ {} }}", listed(of))
}

fn listed(of: impl Iterator<Item = impl Display>) -> String {
    of.map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use a3s_box_core::network::{Address, Route};

    use super::*;

    fn interface() -> Interface {
        let address = |ip: &str, prefix| Address { ip: ip.parse().unwrap(), prefix };
        let via = |ip: &str| Route { destination: address("::", 0), gateway: Some(ip.parse().unwrap()) };
        Interface {
            name: "eth0".to_owned(),
            mac: [0x02, 0, 0x5e, 0x10, 0, 1],
            mtu: 1500,
            addresses: vec![address("10.9.8.7", 24), address("fd00:9::7", 64)],
            routes: vec![via("fd00:9::1"), via("fd00:8::1")],
            tap: "tap0".to_owned(),
        }
    }

    fn rules_of(text: &str, dns: Option<(&str, &[IpAddr])>) -> String {
        ruleset(&EgressPolicy::parse(text, &[]).unwrap(), &[interface()], dns)
    }

    fn set<'a>(rules: &'a str, name: &str) -> &'a str {
        let start = format!("set {name} {{");
        rules.lines().find(|line| line.contains(&start)).unwrap()
    }

    #[test]
    fn networks_do_not_overlap_and_reserved_ones_are_apart() {
        let rules = rules_of("10.1.0.0/16 10.0.0.0/8 10.0.0.0/8 192.0.2.1 169.254.169.254 ::/0", None);
        assert!(set(&rules, "allowed4").contains("elements = { 10.0.0.0/8, 192.0.2.1/32 };"), "{rules}");
        assert!(set(&rules, "explicit4").contains("elements = { 169.254.169.254/32 };"), "{rules}");
        assert!(set(&rules, "allowed6").contains("elements = { ::/0 };"), "{rules}");
        assert!(!set(&rules, "explicit6").contains("elements"), "{rules}");
    }

    #[test]
    fn neighbours_are_those_on_the_link_and_the_gateways() {
        let rules = rules_of("none", None);
        let expected = "elements = { fe80::/10, ff02::/16, fd00:9::/64, fd00:8::1/128 };";
        assert!(set(&rules, "neighbours6").contains(expected), "{rules}");
        assert!(set(&rules, "own6").contains("{ fd00:9::7, fe80::5eff:fe10:1 }"), "{rules}");
    }

    #[test]
    fn name_servers_are_asked_only_where_there_are_names() {
        let rules = rules_of("192.0.2.0/24", None);
        assert!(!rules.contains("dport 53") && !rules.contains("sport 53"), "{rules}");
        let servers = ["192.0.2.53".parse().unwrap(), "fd00::53".parse().unwrap()];
        let rules = rules_of("example.com", Some(("a3s-dns", &servers)));
        assert!(set(&rules, "servers4").contains("{ 192.0.2.53/32 }"), "{rules}");
        assert!(set(&rules, "servers6").contains("{ fd00::53/128 }"), "{rules}");
        assert!(
            rules.contains("fwd to \"a3s-dns\"") && rules.contains("ingress device \"a3s-dns\""),
            "{rules}"
        );
    }

    #[test]
    fn credentials_of_clouds_are_reserved() {
        for ip in ["169.254.169.254", "fe80::1", "fd00:ec2::254", "64:ff9b::a9fe:a9fe"] {
            assert!(is_reserved(ip.parse().unwrap()), "{ip}");
        }
        assert!(reserved().count() == RESERVED.len() && !is_reserved("10.0.0.1".parse().unwrap()));
    }
}
