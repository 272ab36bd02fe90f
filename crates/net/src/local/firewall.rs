//! The one table of the local network, and handing it to `nft`.
//!
//! The table is what the leases say, all of it, each time it is applied: one transaction that empties it and fills it
//! again. So whatever was interrupted, or flushed by somebody else's firewall, is right again after the next pod
//! has come or gone, and a pod's rules vanish with its lease. Connections that exist are not disturbed: the kernel
//! remembers their translation apart from the rules.
//!
//! ```text
//!   guard        a box must not reach what listens on the host's loopback only (route_localnet would let it)
//!   prerouting   from others, and from boxes:  published ports of the host's addresses -> box
//!   output       from the host itself:         the same, 127.0.0.1 included
//!   postrouting  masquerade: boxes to the world; loopback to boxes; boxes to boxes through a published port
//!   forward      boxes out; in only what belongs to a connection or was published
//! ```

use std::fmt::Write as _;

use super::ports::{At, Published, protocol_name};
use super::state::{Lease, Lock, Network};
use super::{LocalConfig, LocalError, TABLE};
use crate::nft::Nft;

/// Finds `nft`.
pub(super) fn find(config: &LocalConfig) -> Result<Nft, LocalError> {
    Ok(Nft::find(&config.nft, config.nft_limit)?)
}

/// Makes the table say what the leases say.
pub(super) fn apply(
    config: &LocalConfig,
    network: &Network,
    leases: &[Lease],
    lock: &Lock,
) -> Result<(), LocalError> {
    run(config, &ruleset(network, leases)?, lock)
}

/// Removes the table, whether it is there or not.
pub(super) fn remove(config: &LocalConfig, lock: &Lock) -> Result<(), LocalError> {
    run(config, &format!("table {TABLE}\ndelete table {TABLE}\n"), lock)
}

const MAPS: [(&str, &str); 4] = [
    ("at4", "ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service"),
    ("every4", "inet_proto . inet_service : ipv4_addr . inet_service"),
    ("at6", "ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service"),
    ("every6", "inet_proto . inet_service : ipv6_addr . inet_service"),
];

fn ruleset(network: &Network, leases: &[Lease]) -> Result<String, LocalError> {
    let mut text = format!("table {TABLE} {{\n");
    for (name, kind) in MAPS {
        text.push_str(&format!("  map {name} {{ type {kind}; }}\n"));
    }
    text.push_str(
        "  chain published { }\n  \
         chain guard { type filter hook prerouting priority raw; policy accept; }\n  \
         chain prerouting { type nat hook prerouting priority dstnat; policy accept; }\n  \
         chain output { type nat hook output priority -100; policy accept; }\n  \
         chain postrouting { type nat hook postrouting priority srcnat; policy accept; }\n  \
         chain forward { type filter hook forward priority filter; policy accept; }\n}\n",
    );
    text.push_str(&format!("flush table {TABLE}\n"));
    for (name, _) in MAPS {
        text.push_str(&format!("flush map {TABLE} {name}\n"));
    }
    text.push_str(&rules(network));
    for lease in leases {
        elements(&mut text, lease)?;
    }
    Ok(text)
}

/// The rules, which are the same for any number of boxes.
///
/// Packets for 127.0.0.0/8 that come from outside are left alone: translated, they would pass for others. So are
/// the host's own for ::1, which a box could not answer: refused at once, clients go on to 127.0.0.1.
fn rules(network: &Network) -> String {
    let bridge = format!("\"{}\"", network.bridge);
    let mut masquerade = String::new();
    let families = [("ip", Some(network.subnet)), ("ip6", network.subnet6)];
    for (family, subnet) in families.into_iter().filter_map(|(f, s)| s.map(|s| (f, s))) {
        masquerade.push_str(&format!(
            "    oifname != {bridge} {family} saddr {subnet} masquerade\n    \
             oifname {bridge} {family} saddr {subnet} ct status dnat masquerade\n"
        ));
    }
    format!(
        "table {TABLE} {{
  chain guard {{
    iifname {bridge} ip daddr 127.0.0.0/8 drop
  }}
  chain published {{
    meta nfproto ipv4 dnat ip to ip daddr . meta l4proto . th dport map @at4
    meta nfproto ipv4 dnat ip to meta l4proto . th dport map @every4
    meta nfproto ipv6 dnat ip6 to ip6 daddr . meta l4proto . th dport map @at6
    meta nfproto ipv6 dnat ip6 to meta l4proto . th dport map @every6
  }}
  chain prerouting {{
    ip daddr 127.0.0.0/8 return
    fib daddr type local jump published
  }}
  chain output {{
    ip6 daddr ::1 return
    fib daddr type local jump published
  }}
  chain postrouting {{
    oifname {bridge} ip saddr 127.0.0.0/8 masquerade
{masquerade}  }}
  chain forward {{
    iifname {bridge} accept
    oifname {bridge} ct state established,related accept
    oifname {bridge} ct status dnat accept
    oifname {bridge} drop
  }}
}}
"
    )
}

fn elements(text: &mut String, lease: &Lease) -> Result<(), LocalError> {
    for port in lease.published()? {
        let Published { at, protocol, host_port, box_port } = port;
        let protocol = protocol_name(protocol);
        let mut add = |map: &str, key: String, to: String| {
            // Writing into a String cannot fail.
            let _ = writeln!(text, "add element {TABLE} {map} {{ {key} : {to} . {box_port} }}");
        };
        let every = format!("{protocol} . {host_port}");
        if matches!(at, At::Everywhere | At::EveryV4) {
            add("every4", every.clone(), lease.v4.to_string());
        }
        match (at, lease.v6) {
            (At::Everywhere | At::EveryV6, Some(v6)) => add("every6", every, v6.to_string()),
            (At::Only(ip), _) if ip.is_ipv4() => add("at4", format!("{ip} . {every}"), lease.v4.to_string()),
            (At::Only(ip), Some(v6)) => add("at6", format!("{ip} . {every}"), v6.to_string()),
            (At::Everywhere | At::EveryV4, _) => {}
            // Refused at set-up, see `connect`.
            (At::EveryV6 | At::Only(_), None) => {}
        }
    }
    Ok(())
}

/// Should this process be killed, nobody else gets the lock before `nft` has ended too.
fn run(config: &LocalConfig, script: &str, lock: &Lock) -> Result<(), LocalError> {
    let nft = find(config)?;
    let held = lock.share().map_err(|source| LocalError::NftStart { program: config.nft.clone(), source })?;
    Ok(nft.run(script, Some(held))?)
}

#[cfg(test)]
mod tests {
    use a3s_box_core::BoxId;
    use a3s_box_core::spec::{PortMapping, PortProtocol};

    use super::*;

    fn lease(host_ip: &str, v6: Option<&str>) -> Lease {
        Lease {
            box_id: BoxId::from_random([1; 32]),
            pod: "default/web".into(),
            v4: "10.89.0.2".parse().unwrap(),
            v6: v6.map(|ip| ip.parse().unwrap()),
            ports: vec![PortMapping {
                protocol: PortProtocol::Tcp,
                container_port: 80,
                host_port: 8080,
                host_ip: host_ip.into(),
            }],
        }
    }

    fn elements_of(host_ip: &str, v6: Option<&str>) -> Vec<String> {
        let mut text = String::new();
        elements(&mut text, &lease(host_ip, v6)).unwrap();
        text.lines().map(|l| l.replace("add element inet a3s_box ", "")).collect()
    }

    #[test]
    fn a_published_port_is_an_element_for_each_family_it_is_meant_for() {
        let v6 = Some("fd00::2");
        let every4 = "every4 { tcp . 8080 : 10.89.0.2 . 80 }";
        let every6 = "every6 { tcp . 8080 : fd00::2 . 80 }";
        assert_eq!(elements_of("", v6), [every4, every6]);
        assert_eq!(elements_of("", None), [every4]);
        assert_eq!(elements_of("0.0.0.0", v6), [every4]);
        assert_eq!(elements_of("::", v6), [every6]);
        assert_eq!(elements_of("127.0.0.1", v6), ["at4 { 127.0.0.1 . tcp . 8080 : 10.89.0.2 . 80 }"]);
        assert_eq!(elements_of("fd01::1", v6), ["at6 { fd01::1 . tcp . 8080 : fd00::2 . 80 }"]);
    }
}
