//! What a pod's network is, once it is set up: the result of the network adapter and what the
//! guest is told of it.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::spec::DnsSpec;

/// An address with its prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Bits of the network part.
    pub prefix: u8,
}

/// A text that is no address with a prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("it is no IP address with a prefix length, such as 10.0.0.7/24 or fd00::7/64")]
pub struct NoAddress;

impl FromStr for Address {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let (ip, prefix) = text.split_once('/').ok_or(NoAddress)?;
        let ip: IpAddr = ip.parse().map_err(|_| NoAddress)?;
        let prefix: u8 = prefix.parse().map_err(|_| NoAddress)?;
        let longest = if ip.is_ipv4() { 32 } else { 128 };
        if prefix > longest { Err(NoAddress) } else { Ok(Self { ip, prefix }) }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

/// A route of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination; `0.0.0.0/0` or `::/0` is the default route.
    pub destination: Address,
    /// The next hop; without one the destination is on the link.
    pub gateway: Option<IpAddr>,
}

/// One interface, as the guest's NIC is to look.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The name in the guest, usually `eth0`.
    pub name: String,
    /// The MAC address that CNI gave the pod's end, six octets.
    pub mac: [u8; 6],
    /// Bytes.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// Routes through it.
    pub routes: Vec<Route>,
    /// The tap in the pod's network namespace that the VMM opens.
    pub tap: String,
}

/// What one of a pod's interfaces has carried since it was made, as the pod sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InterfaceUsage {
    /// The name in the guest.
    pub name: String,
    /// Into the pod.
    pub received: Traffic,
    /// Out of the pod.
    pub sent: Traffic,
}

/// Counters of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes.
    pub bytes: u64,
    /// Packets.
    pub packets: u64,
    /// Packets that were broken.
    pub errors: u64,
    /// Packets that there was no room for.
    pub dropped: u64,
}

/// The network namespace of a pod that may not be connected yet: all that its VM needs to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNamespace {
    /// A bind mount of the namespace, e.g. `/run/a3s-box/netns/a3s-…`; the VMM enters it.
    pub netns: PathBuf,
    /// The taps that are there for NICs of the guest, in the order of [`PodNetwork::interfaces`]. There may be one too many,
    /// if the pod gets fewer interfaces than was expected, or too few.
    pub taps: Vec<String>,
}

/// A pod's network after a successful set-up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetwork {
    /// A bind mount of the namespace, e.g. `/run/a3s-box/netns/a3s-…`; the VMM enters it.
    pub netns: PathBuf,
    /// The interfaces of the pod, primary first.
    pub interfaces: Vec<Interface>,
    /// The resolver for pods that were given none, where the network knows one.
    #[serde(default)]
    pub dns: Option<DnsSpec>,
}

impl PodNetwork {
    /// All addresses of the pod, the primary interface's first: CRI's `ip` and `additional_ips`.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.interfaces.iter().flat_map(|i| i.addresses.iter().map(|a| a.ip))
    }
}
