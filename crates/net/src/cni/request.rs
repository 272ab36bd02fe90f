//! What plugins are told of a pod: `CNI_ARGS` and `runtimeConfig`.
//!
//! The keys of `runtimeConfig` and their shapes are conventions (containernetworking/cni, CONVENTIONS.md). Offered is what
//! CRI tells of a pod. `ips`, `mac`, `aliases`, `deviceID` and `infinibandGUID` are not in it; plugins that take them from
//! annotations get all of these.

use std::collections::BTreeMap;
use std::path::PathBuf;

use a3s_box_core::BoxId;
use a3s_box_core::bandwidth::{BadBandwidth, Bandwidth};
use a3s_box_core::spec::{DnsSpec, PodIdentity, PortMapping, PortProtocol};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use thiserror::Error;

use super::conf::NetworkList;
use crate::names;

/// The capability under which plugins get the pod's annotations; containerd's name for it.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// A pod that cannot be described to plugins.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RequestError {
    /// `CNI_ARGS` has no way to quote.
    #[error(
        "the pod's {field} {value:?} cannot be passed to CNI plugins: it has `;`, `=` or control characters"
    )]
    Unquotable {
        /// Which part of the identity.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// An annotation is no bandwidth.
    #[error("the pod's annotation {}: {bad}", .0.annotation, bad = .0)]
    Bandwidth(#[from] BadBandwidth),
}

/// One attachment of a pod to a network, the same for ADD and for every later DEL.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`.
    pub netns: PathBuf,
    /// `CNI_IFNAME`.
    pub interface: String,
    /// `CNI_ARGS`.
    pub args: String,
    /// What `runtimeConfig` can offer; each plugin gets the keys it has asked for.
    pub capabilities: Map<String, Value>,
}

/// What is offered to the plugins besides the pod's identity.
#[derive(Debug, Clone, Copy)]
pub struct Offer<'a> {
    /// Ports to publish.
    pub port_mappings: &'a [PortMapping],
    /// The resolver's configuration.
    pub dns: Option<&'a DnsSpec>,
    /// The pod's annotations.
    pub annotations: &'a BTreeMap<String, String>,
    /// The pod's cgroup.
    pub cgroup_path: Option<&'a str>,
    /// The node's pod CIDRs; a pod gets an address of each.
    pub ip_ranges: &'a [String],
}

impl Attachment {
    /// Describes a pod.
    pub fn new(
        id: &BoxId,
        netns: PathBuf,
        pod: &PodIdentity,
        offer: Offer<'_>,
    ) -> Result<Self, RequestError> {
        Ok(Self {
            container_id: names::container_id(id).to_owned(),
            netns,
            interface: names::INTERFACE.to_owned(),
            args: args(id, pod)?,
            capabilities: capabilities(offer)?,
        })
    }

    /// What the pod asks for and no plugin of the network hears, each with what that means.
    pub fn unheard(&self, list: &NetworkList) -> impl Iterator<Item = (&'static str, &'static str)> {
        let asked = [
            ("portMappings", "the pod's host ports lead nowhere"),
            ("bandwidth", "the pod's traffic is not limited"),
        ];
        asked.into_iter().filter(|(name, _)| self.capabilities.contains_key(*name) && !list.wants(name))
    }

    /// A pod of which only the id is known, for DEL.
    ///
    /// It has a published port, whichever: portmap removes all that it made for a container, but without a port it takes
    /// the pod for one that had none, and its rules would win over those of later pods.
    pub fn anonymous(id: &BoxId, netns: PathBuf) -> Self {
        let some = PortMapping {
            protocol: PortProtocol::Tcp,
            container_port: 1,
            host_port: 1,
            host_ip: String::new(),
        };
        let ports = Value::Array(vec![port(&some)]);
        Self {
            container_id: names::container_id(id).to_owned(),
            netns,
            interface: names::INTERFACE.to_owned(),
            args: format!("IgnoreUnknown=1;K8S_POD_INFRA_CONTAINER_ID={id}"),
            capabilities: [("portMappings".to_owned(), ports)].into_iter().collect(),
        }
    }
}

/// `IgnoreUnknown` tells plugins to accept keys that they have never heard of.
fn args(id: &BoxId, pod: &PodIdentity) -> Result<String, RequestError> {
    let pairs = [
        ("K8S_POD_NAMESPACE", "namespace", pod.namespace.as_str()),
        ("K8S_POD_NAME", "name", pod.name.as_str()),
        ("K8S_POD_INFRA_CONTAINER_ID", "id", id.as_str()),
        ("K8S_POD_UID", "uid", pod.uid.as_str()),
    ];
    let mut text = "IgnoreUnknown=1".to_owned();
    for (key, field, value) in pairs {
        if value.contains(|c: char| matches!(c, ';' | '=') || c.is_control()) {
            return Err(RequestError::Unquotable { field, value: value.chars().take(80).collect() });
        }
        text.push_str(&format!(";{key}={value}"));
    }
    Ok(text)
}

fn capabilities(offer: Offer<'_>) -> Result<Map<String, Value>, RequestError> {
    let mut map = Map::new();
    // Host port 0 means "not published".
    let ports: Vec<Value> = offer.port_mappings.iter().filter(|p| p.host_port != 0).map(port).collect();
    if !ports.is_empty() {
        map.insert("portMappings".to_owned(), Value::Array(ports));
    }
    if let Some(dns) = offer.dns {
        let dns = json!({ "servers": dns.servers, "searches": dns.searches, "options": dns.options });
        map.insert("dns".to_owned(), dns);
    }
    if !offer.annotations.is_empty() {
        map.insert(ANNOTATIONS.to_owned(), json!(offer.annotations));
    }
    map.extend(bandwidth(Bandwidth::of(offer.annotations)?));
    if let Some(path) = offer.cgroup_path {
        map.insert("cgroupPath".to_owned(), path.into());
    }
    if !offer.ip_ranges.is_empty() {
        let ranges: Vec<_> = offer.ip_ranges.iter().map(|range| json!([{ "subnet": range }])).collect();
        map.insert("ipRanges".to_owned(), ranges.into());
    }
    Ok(map)
}

/// The least burst in bits: one packet of a large MTU, 16 KiB. What does not fit into the bucket is never sent.
const LEAST_BURST: u64 = 16 * 1024 * 8;

/// Plugins refuse a rate without a burst, and the annotations know none: it is what goes through in a tenth of a second.
/// The queue is as long as the burst, and the plugin counts the time of a burst in 32 bits, which ends at 274 seconds.
fn burst(rate: u64) -> u64 {
    (rate / 10).clamp(LEAST_BURST, u32::MAX.into())
}

fn bandwidth(limits: Bandwidth) -> Option<(String, Value)> {
    let mut value = Map::new();
    for (direction, limit) in [("ingress", limits.ingress), ("egress", limits.egress)] {
        if let Some(rate) = limit {
            value.insert(format!("{direction}Rate"), rate.into());
            value.insert(format!("{direction}Burst"), burst(rate).into());
        }
    }
    (!value.is_empty()).then(|| ("bandwidth".to_owned(), Value::Object(value)))
}

fn port(mapping: &PortMapping) -> Value {
    let protocol = match mapping.protocol {
        PortProtocol::Tcp => "tcp",
        PortProtocol::Udp => "udp",
        PortProtocol::Sctp => "sctp",
    };
    json!({
        "hostPort": mapping.host_port,
        "containerPort": mapping.container_port,
        "protocol": protocol,
        "hostIP": mapping.host_ip,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str) -> PodIdentity {
        PodIdentity { name: name.into(), namespace: "shop".into(), uid: "u-1".into(), attempt: 0 }
    }

    #[test]
    fn args_carry_the_identity_under_the_names_plugins_know() {
        let id = BoxId::from_random([1; 32]);
        let text = args(&id, &pod("web")).unwrap();
        assert_eq!(
            text,
            format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID={id};K8S_POD_UID=u-1"
            )
        );
    }

    #[test]
    fn a_name_cannot_smuggle_in_another_argument() {
        let id = BoxId::from_random([1; 32]);
        for name in ["a;IP=10.0.0.1", "a=b", "a\nb"] {
            let error = args(&id, &pod(name)).unwrap_err();
            assert_eq!(error, RequestError::Unquotable { field: "name", value: name.into() });
        }
    }

    /// The burst was the largest number there is, which the plugin's counter overflowed for rates below 15.6 Mbit/s: queues of
    /// minutes, and at 7,812,500 bit/s a bucket that no packet fitted into.
    #[test]
    fn a_burst_is_in_proportion_to_its_rate() {
        for rate in [1_000, 512 << 10, 1_000_000, 7_812_500, 15_000_000, 10_000_000_000, u64::MAX / 16] {
            let bits = burst(rate);
            assert!(u32::try_from(bits).is_ok(), "{rate}: the plugin's own bound");
            // 15.625 ticks of the kernel's token bucket are a microsecond.
            let ticks = u128::from(bits) * 1_000_000 / u128::from(rate) * 1000 / 64;
            assert!(u32::try_from(ticks).is_ok(), "{rate}: {ticks} ticks");
            assert!(bits / 8 >= 9_000, "{rate}: a jumbo frame fits");
            let in_proportion = bits * 10 <= rate || bits == LEAST_BURST;
            assert!(in_proportion, "{rate}: {bits}");
        }
        let annotations = BTreeMap::from([("kubernetes.io/egress-bandwidth".to_owned(), "10M".to_owned())]);
        let offer = Offer {
            port_mappings: &[],
            dns: None,
            annotations: &annotations,
            cgroup_path: None,
            ip_ranges: &[],
        };
        let map = capabilities(offer).unwrap();
        assert_eq!(map["bandwidth"], json!({ "egressRate": 10_000_000, "egressBurst": 1_000_000 }));
    }

    #[test]
    fn ports_that_are_not_published_are_not_offered() {
        let port = |host_port| PortMapping {
            protocol: PortProtocol::Udp,
            container_port: 53,
            host_port,
            host_ip: "127.0.0.1".into(),
        };
        let none = BTreeMap::new();
        let ports = [port(0), port(5353)];
        let offer =
            Offer { port_mappings: &ports, dns: None, annotations: &none, cgroup_path: None, ip_ranges: &[] };
        let map = capabilities(offer).unwrap();
        assert_eq!(
            Value::Object(map),
            json!({ "portMappings": [
                { "hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1" }
            ]})
        );
    }
}
