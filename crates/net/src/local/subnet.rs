//! Arithmetic on networks of both families.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use a3s_box_core::network::Address;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Where boxes live unless the operator says otherwise: private (RFC 1918), and nothing that podman (10.88
/// and up), docker or Kubernetes' add-ons take by default.
pub(super) const DEFAULT: Subnet = Subnet { network: IpAddr::V4(Ipv4Addr::new(10, 187, 0, 0)), prefix: 16 };
/// The same for IPv6: unique local (RFC 4193), with a random global id.
pub(super) const DEFAULT_V6: Subnet =
    Subnet { network: IpAddr::V6(Ipv6Addr::new(0xfda3, 0x5b08, 0x9c41, 0, 0, 0, 0, 0)), prefix: 64 };

/// The host number of the bridge's own address.
const GATEWAY: u32 = 1;
/// Subnets have between 4 and 24 bits for hosts in IPv4. IPv6 has at least as many, because a box has the same
/// host number in both.
const LONGEST_V4: u8 = 28;
const LONGEST_V6: u8 = 104;
const SHORTEST: u8 = 8;

/// A network in which boxes get addresses, such as `10.89.0.0/16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    network: IpAddr,
    prefix: u8,
}

/// A text that is no subnet for boxes.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{text:?} is not a network for boxes: expected a network address and a prefix length, /8 to /28 for IPv4 and /8 to /104 for IPv6"
)]
pub struct SubnetError {
    /// The text, cut to its first 80 characters.
    pub text: String,
}

impl FromStr for Subnet {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, SubnetError> {
        read(text).ok_or_else(|| SubnetError { text: text.chars().take(80).collect() })
    }
}

/// An address with host bits is refused, not rounded: one of the two numbers is a slip.
fn read(text: &str) -> Option<Subnet> {
    let Address { ip: network, prefix } = text.parse().ok()?;
    let longest = if network.is_ipv4() { LONGEST_V4 } else { LONGEST_V6 };
    let special = network.is_loopback() || network.is_multicast() || network.is_unspecified();
    let whole = bits(network) & host_mask(network, prefix) == 0;
    ((SHORTEST..=longest).contains(&prefix) && !special && whole).then_some(Subnet { network, prefix })
}

impl TryFrom<String> for Subnet {
    type Error = SubnetError;

    fn try_from(text: String) -> Result<Self, SubnetError> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl Subnet {
    /// Whether it is one of IPv4.
    pub fn is_ipv4(&self) -> bool {
        self.network.is_ipv4()
    }

    /// The bridge's address.
    pub(crate) fn gateway(&self) -> Address {
        self.host(GATEWAY)
    }

    /// The address with this host number, with the subnet's prefix.
    pub(crate) fn host(&self, number: u32) -> Address {
        let ip = match self.network {
            IpAddr::V4(ip) => IpAddr::V4((ip.to_bits() | number).into()),
            IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() | u128::from(number)).into()),
        };
        Address { ip, prefix: self.prefix }
    }

    /// The host number of an address in the subnet.
    pub(crate) fn number(&self, ip: IpAddr) -> Option<u32> {
        let number = bits(ip) & host_mask(ip, self.prefix);
        let inside = ip.is_ipv4() == self.is_ipv4() && bits(ip) ^ number == bits(self.network);
        u32::try_from(number).ok().filter(|_| inside)
    }

    /// The host numbers that boxes may have: not the network's, the gateway's and the broadcast address's.
    pub(crate) fn numbers(&self) -> std::ops::RangeInclusive<u32> {
        let last = u32::try_from(host_mask(self.network, self.prefix)).unwrap_or(u32::MAX);
        GATEWAY + 1..=last - 1
    }

    /// Whether a route's destination and this subnet have addresses in common. A default route has all, and so have the
    /// two halves that VPNs set instead of one: they are no claim on any address in particular.
    pub(crate) fn collides_with(&self, destination: Address) -> bool {
        let common = self.prefix.min(destination.prefix);
        let differ = bits(self.network) ^ bits(destination.ip);
        let same_family = self.is_ipv4() == destination.ip.is_ipv4();
        same_family && destination.prefix > 1 && differ & !host_mask(self.network, common) == 0
    }
}

fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => ip.to_bits().into(),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

/// Ones where a network of this family and prefix length has its hosts.
fn host_mask(family: IpAddr, prefix: u8) -> u128 {
    let length = if family.is_ipv4() { 32 } else { 128 };
    let hosts = u32::from(u8::saturating_sub(length, prefix));
    if hosts == 0 { 0 } else { u128::MAX >> (128 - hosts) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    #[test]
    fn what_boxes_cannot_live_in_is_refused() {
        for bad in [
            "10.89.0.0",
            "10.89.0.1/16",
            "10.89.0.0/29",
            "10.0.0.0/7",
            "127.0.0.0/8",
            "224.0.0.0/8",
            "0.0.0.0/8",
            "fd00::/105",
            "fd00::1/64",
            "x/16",
            "10.89.0.0/x",
            "",
        ] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
        for good in ["10.89.0.0/16", "10.0.0.0/8", "192.168.7.16/28", "fd00:1:2::/64", "fd00::/104"] {
            assert_eq!(subnet(good).to_string(), good);
        }
    }

    #[test]
    fn hosts_are_counted_from_the_network_address() {
        let small = subnet("192.168.7.16/28");
        assert_eq!(small.numbers(), 2..=14);
        assert_eq!(small.gateway(), address("192.168.7.17/28"));
        assert_eq!(small.host(14), address("192.168.7.30/28"));
        assert_eq!(small.number("192.168.7.30".parse().unwrap()), Some(14));
        assert_eq!(small.number("192.168.7.32".parse().unwrap()), None);
        assert_eq!(subnet("10.89.0.0/16").numbers(), 2..=65_534);
        let v6 = subnet("fd00:1::/64");
        assert_eq!(v6.host(0x1_0002), address("fd00:1::1:2/64"));
        assert_eq!(v6.number("10.0.0.1".parse().unwrap()), None);
    }

    #[test]
    fn a_route_collides_if_it_has_any_address_of_the_subnet() {
        let ours = subnet("10.89.0.0/16");
        for route in ["10.89.0.0/16", "10.89.7.0/24", "10.0.0.0/8", "10.89.1.1/32", "8.0.0.0/6"] {
            assert!(ours.collides_with(address(route)), "{route}");
        }
        for route in ["0.0.0.0/0", "0.0.0.0/1", "10.88.0.0/16", "10.90.0.0/24", "fd00::/8"] {
            assert!(!ours.collides_with(address(route)), "{route}");
        }
        let v6 = subnet("fd00:1::/64");
        assert!(v6.collides_with(address("fd00::/8")) && v6.collides_with(address("fd00:1::9/128")));
        assert!(!v6.collides_with(address("::/0")) && !v6.collides_with(address("fd00:2::/64")));
    }
}
