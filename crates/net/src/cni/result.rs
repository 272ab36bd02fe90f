//! Reading what plugins answer to ADD.
//!
//! The shapes of 0.3.0 to 0.4.0 and of 1.0.0 and later differ in one thing for us: older addresses carry a
//! `version`. Up to 0.2.0 there are at most two addresses, `ip4` and `ip6`, and no interfaces. The answer is kept as it came as well, since fields that we do not know belong into the next
//! plugin's `prevResult`.

use std::net::{AddrParseError, IpAddr};

use a3s_box_core::network::{Address, NoAddress, PodNetwork};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use thiserror::Error;

use super::conf::Version;

/// Why an answer cannot be used.
#[derive(Debug, Error)]
pub enum ResultError {
    /// It is not JSON, or not of the shape of a result.
    #[error("it is not a CNI result")]
    Shape(#[from] serde_json::Error),
    /// It is of a version that we do not speak.
    #[error(transparent)]
    Version(#[from] super::conf::UnsupportedVersion),
    /// An address or network is none.
    #[error("{text:?} is not an address with a prefix length")]
    Network {
        /// What is there.
        text: String,
    },
    /// A gateway is no address.
    #[error("gateway {text:?} is not an address")]
    Gateway {
        /// What is there.
        text: String,
        /// Why.
        #[source]
        source: AddrParseError,
    },
    /// An address belongs to an interface that is not in the list.
    #[error("an address belongs to interface number {index}, but there are {count}")]
    NoSuchInterface {
        /// The index.
        index: i64,
        /// How many there are.
        count: usize,
    },
}

/// A result, reduced to what a guest needs, and as it came.
#[derive(Debug, Clone, PartialEq)]
pub struct CniResult {
    /// Interfaces that were made, on both sides.
    pub interfaces: Vec<CniInterface>,
    /// Addresses of the pod.
    pub ips: Vec<CniAddress>,
    /// The answer itself.
    pub raw: Value,
}

/// An interface of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniInterface {
    /// Its name.
    pub name: String,
    /// The namespace it is in; `None` means the host's.
    pub sandbox: Option<String>,
}

/// An address of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniAddress {
    /// The address.
    pub address: Address,
    /// Its gateway.
    pub gateway: Option<IpAddr>,
    /// Index into the interfaces; without one it belongs to the interface that was asked for.
    pub interface: Option<usize>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    cni_version: Option<String>,
    #[serde(default)]
    interfaces: Option<Vec<WireInterface>>,
    #[serde(default)]
    ips: Option<Vec<WireAddress>>,
    #[serde(default)]
    ip4: Option<OldAddress>,
    #[serde(default)]
    ip6: Option<OldAddress>,
}

/// An address up to 0.2.0, always that of the interface that was asked for.
#[derive(Deserialize)]
struct OldAddress {
    ip: String,
    #[serde(default)]
    gateway: Option<String>,
}

impl From<OldAddress> for WireAddress {
    fn from(OldAddress { ip: address, gateway }: OldAddress) -> Self {
        Self { address, gateway, interface: None }
    }
}

#[derive(Deserialize)]
struct WireInterface {
    name: String,
    #[serde(default)]
    sandbox: Option<String>,
}

#[derive(Deserialize)]
struct WireAddress {
    address: String,
    #[serde(default)]
    gateway: Option<String>,
    #[serde(default)]
    interface: Option<i64>,
}

impl CniResult {
    /// What plugins may have answered for a pod that is connected so.
    pub fn of(network: &PodNetwork) -> Self {
        let sandbox = network.netns.to_string_lossy();
        let interfaces: Vec<_> = network
            .interfaces
            .iter()
            .map(|interface| json!({ "name": interface.name, "sandbox": sandbox }))
            .collect();
        let addresses =
            network.interfaces.iter().enumerate().flat_map(|(index, interface)| {
                interface.addresses.iter().map(move |address| (index, *address))
            });
        let addresses: Vec<_> = addresses.collect();
        let wire: Vec<_> = addresses
            .iter()
            .map(|(index, address)| json!({ "address": address.to_string(), "interface": index }))
            .collect();
        Self {
            interfaces: network
                .interfaces
                .iter()
                .map(|i| CniInterface { name: i.name.clone(), sandbox: Some(sandbox.clone().into_owned()) })
                .collect(),
            ips: addresses
                .into_iter()
                .map(|(index, address)| CniAddress { address, gateway: None, interface: Some(index) })
                .collect(),
            raw: json!({ "cniVersion": Version::V1_0_0.as_str(), "interfaces": interfaces, "ips": wire }),
        }
    }

    /// Reads a plugin's standard output.
    pub fn parse(bytes: &[u8]) -> Result<Self, ResultError> {
        Self::from_value(serde_json::from_slice(bytes)?)
    }

    /// Reads a result that was kept.
    pub fn from_value(raw: Value) -> Result<Self, ResultError> {
        let wire = Wire::deserialize(&raw)?;
        if let Some(text) = &wire.cni_version {
            text.parse::<Version>()?;
        }
        let interfaces: Vec<_> = wire.interfaces.unwrap_or_default().into_iter().map(interface).collect();
        let old = || [wire.ip4, wire.ip6].into_iter().flatten().map(WireAddress::from).collect();
        let ips = wire.ips.unwrap_or_else(old).into_iter().map(|ip| address(ip, interfaces.len()));
        Ok(Self { ips: ips.collect::<Result<_, _>>()?, interfaces, raw })
    }

    /// The names of the pod's interfaces, `primary` first whether the result lists it or not: plugins may omit
    /// `interfaces`. Loopback is the runtime's own business.
    pub fn pod_interfaces(&self, primary: &str) -> Vec<String> {
        let listed = self.interfaces.iter().filter(|i| i.sandbox.is_some()).map(|i| i.name.as_str());
        let mut names = vec![primary.to_owned()];
        for name in listed {
            if name != "lo" && !names.iter().any(|n| n == name) {
                names.push(name.to_owned());
            }
        }
        names
    }

    /// The addresses of the pod's interface `name`, in the plugin's order.
    pub fn addresses_of<'a>(&'a self, name: &'a str, primary: &'a str) -> impl Iterator<Item = Address> + 'a {
        let owner = move |ip: &CniAddress| match ip.interface.map(|index| &self.interfaces[index]) {
            Some(interface) => interface.sandbox.is_some() && interface.name == name,
            None => name == primary,
        };
        self.ips.iter().filter(move |ip| owner(ip)).map(|ip| ip.address)
    }

    /// The answer as `prevResult` in `version`.
    pub fn for_next(&self, version: Version) -> Value {
        if version < Version::V0_3_0 {
            return self.in_old_shape(version);
        }
        let mut value = self.raw.clone();
        if let Some(top) = value.as_object_mut() {
            top.insert("cniVersion".to_owned(), version.as_str().into());
        }
        let addresses = value.get_mut("ips").and_then(Value::as_array_mut).into_iter().flatten();
        for (wire, ip) in addresses.zip(&self.ips) {
            let Some(wire) = wire.as_object_mut() else { continue };
            if version < Version::V1_0_0 {
                wire.insert("version".to_owned(), if ip.address.ip.is_ipv4() { "4" } else { "6" }.into());
            } else {
                wire.remove("version");
            }
        }
        value
    }
}

impl CniResult {
    /// The first address of each family; there is no place for more, nor for interfaces.
    fn in_old_shape(&self, version: Version) -> Value {
        let mut top = Map::from_iter([("cniVersion".to_owned(), version.as_str().into())]);
        for (key, is_v4) in [("ip4", true), ("ip6", false)] {
            if let Some(known) = self.raw.get(key) {
                top.insert(key.to_owned(), known.clone());
            } else if let Some(ip) = self.ips.iter().find(|ip| ip.address.ip.is_ipv4() == is_v4) {
                let mut old = Map::from_iter([("ip".to_owned(), Value::from(ip.address.to_string()))]);
                old.extend(ip.gateway.map(|gateway| ("gateway".to_owned(), gateway.to_string().into())));
                top.insert(key.to_owned(), Value::Object(old));
            }
        }
        top.extend(self.raw.get("dns").map(|dns| ("dns".to_owned(), dns.clone())));
        Value::Object(top)
    }
}

fn interface(wire: WireInterface) -> CniInterface {
    CniInterface { name: wire.name, sandbox: wire.sandbox.filter(|s| !s.is_empty()) }
}

fn address(wire: WireAddress, interfaces: usize) -> Result<CniAddress, ResultError> {
    let gateway = wire.gateway.filter(|g| !g.is_empty());
    let gateway = match gateway {
        Some(text) => Some(text.parse().map_err(|source| ResultError::Gateway { text, source })?),
        None => None,
    };
    let interface = match wire.interface {
        None => None,
        Some(index) => match usize::try_from(index) {
            Ok(i) if i < interfaces => Some(i),
            // Some IPAM-only plugins say -1 for "whichever".
            Err(_) if index == -1 => None,
            _ => return Err(ResultError::NoSuchInterface { index, count: interfaces }),
        },
    };
    Ok(CniAddress { address: network(&wire.address)?, gateway, interface })
}

/// `10.0.0.7/24`
fn network(text: &str) -> Result<Address, ResultError> {
    text.parse().map_err(|NoAddress| ResultError::Network { text: text.chars().take(80).collect() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[0-9a-f.:/]{0,20}".prop_map(Value::from),
        ];
        let key = prop_oneof![
            Just("ips".to_owned()),
            Just("interfaces".to_owned()),
            Just("address".to_owned()),
            Just("gateway".to_owned()),
            Just("interface".to_owned()),
            Just("cniVersion".to_owned()),
            Just("ip4".to_owned()),
            Just("ip".to_owned()),
            "[a-z]{0,4}",
        ];
        leaf.prop_recursive(4, 40, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::hash_map(key.clone(), inner, 0..6)
                    .prop_map(|m| m.into_iter().collect::<Value>()),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_answer_makes_the_reader_panic(value in json_value()) {
            if let Ok(result) = CniResult::from_value(value) {
                for name in result.pod_interfaces("eth0") {
                    let _ = result.addresses_of(&name, "eth0").count();
                }
                let _ = result.for_next(Version::V0_3_1);
                let _ = result.for_next(Version::V0_2_0);
            }
        }

        #[test]
        fn a_result_means_the_same_in_every_version(
            octets in prop::collection::vec((any::<[u8; 4]>(), 0_u8..=32), 1..4),
            groups in prop::collection::vec((any::<[u16; 8]>(), 0_u8..=128), 0..3),
        ) {
            let v4 = octets.into_iter().map(|(ip, prefix)| Address { ip: ip.into(), prefix });
            let v6 = groups.into_iter().map(|(ip, prefix)| Address { ip: ip.into(), prefix });
            let expected: Vec<Address> = v4.chain(v6).collect();
            let ips: Vec<Value> =
                expected.iter().map(|a| json!({ "address": a.to_string() })).collect();
            let mut result = CniResult::from_value(json!({ "ips": ips })).unwrap();
            for version in [Version::V0_3_1, Version::V1_1_0, Version::V0_4_0] {
                result = CniResult::from_value(result.for_next(version)).unwrap();
                let found: Vec<Address> = result.addresses_of("eth0", "eth0").collect();
                prop_assert_eq!(&found, &expected);
            }
        }
    }

    /// Up to 0.2.0 addresses have a shape of their own; a pod of such a network was taken to have none.
    #[test]
    fn addresses_of_the_first_versions_are_read_and_handed_on_in_their_shape() {
        let old = json!({
            "cniVersion": "0.2.0",
            "ip4": { "ip": "10.0.0.2/24", "gateway": "10.0.0.1", "routes": [{ "dst": "0.0.0.0/0" }] },
            "ip6": { "ip": "fd00::2/64" },
            "dns": { "nameservers": ["10.0.0.53"] },
        });
        let result = CniResult::from_value(old.clone()).unwrap();
        let found: Vec<_> = result.addresses_of("eth0", "eth0").map(|a| a.to_string()).collect();
        assert_eq!(
            (found, result.pod_interfaces("eth0")),
            (vec!["10.0.0.2/24".into(), "fd00::2/64".into()], vec!["eth0".into()])
        );
        assert_eq!(result.for_next(Version::V0_2_0), old);
        assert_eq!(result.for_next(Version::V0_1_0)["cniVersion"], "0.1.0");
        // A plugin that answers in a newer shape than it was asked in.
        let new = json!({ "cniVersion": "0.4.0", "interfaces": [{ "name": "eth0", "sandbox": "/n" }], "ips": [
            { "version": "6", "address": "fd00::2/64", "interface": 0 },
            { "version": "4", "address": "10.0.0.2/24", "gateway": "10.0.0.1", "interface": 0 },
        ]});
        let new = CniResult::from_value(new).unwrap().for_next(Version::V0_2_0);
        let expected = json!({ "cniVersion": "0.2.0", "ip4": { "ip": "10.0.0.2/24", "gateway": "10.0.0.1" }, "ip6": { "ip": "fd00::2/64" } });
        assert_eq!(new, expected);
        assert!(CniResult::from_value(json!({ "ip4": { "ip": "10.0.0.2" } })).is_err());
    }

    #[test]
    fn interfaces_of_the_host_and_loopback_are_not_the_pods() {
        let result = CniResult::from_value(json!({
            "cniVersion": "1.0.0",
            "interfaces": [
                { "name": "br0" }, { "name": "veth1", "sandbox": "" }, { "name": "lo", "sandbox": "/n" },
                { "name": "net1", "sandbox": "/n" }, { "name": "eth0", "sandbox": "/n" },
            ],
            "ips": [
                { "address": "10.9.0.1/24", "interface": 3 }, { "address": "10.0.0.2/24", "interface": 4 },
                { "address": "10.0.0.1/24", "interface": 0 }, { "address": "10.0.0.3/24" },
                { "address": "10.0.0.4/24", "interface": -1 },
            ],
        }))
        .unwrap();
        assert_eq!(result.pod_interfaces("eth0"), ["eth0", "net1"], "the primary comes first");
        let of = |name| result.addresses_of(name, "eth0").map(|a| a.ip.to_string()).collect::<Vec<_>>();
        assert_eq!(of("eth0"), ["10.0.0.2", "10.0.0.3", "10.0.0.4"]);
        assert_eq!(of("net1"), ["10.9.0.1"]);
    }
}
