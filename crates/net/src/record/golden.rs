//! Records of every build's making, read by this one: docs/versioning.md.
//!
//! The values here name every field, so that a field which is added must be given a meaning here too.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use a3s_box_core::network::{Address, Interface, Route};
use a3s_box_core::spec::DnsSpec;
use a3s_box_golden::{Goldens, with_unknown_fields};
use serde_json::json;

use super::*;
use crate::cni::{PluginConf, Version};
use crate::turns::Turns;

/// Keys below which there is data of plugins and clients.
const MAPS: [&str; 3] = ["raw", "capabilities", "result"];

fn goldens() -> Goldens {
    Goldens::of(env!("CARGO_MANIFEST_DIR"), "records")
}

fn id() -> BoxId {
    BoxId::from_random([0xb0; 32])
}

fn netns() -> PathBuf {
    "/run/a3s-box/netns/a3s-b0b0".into()
}

fn plugin(kind: &str, raw: Value) -> PluginConf {
    PluginConf { kind: kind.to_owned(), raw: raw.as_object().unwrap().clone() }
}

fn cni(version: Version, result: Option<Value>) -> Connection {
    let capabilities =
        json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }] });
    Connection::Cni(CniConnection {
        list: NetworkList {
            name: "pods".to_owned(),
            version,
            disable_check: true,
            disable_gc: true,
            plugins: vec![
                plugin(
                    "bridge",
                    json!({ "type": "bridge", "bridge": "cni0", "ipam": { "type": "host-local" } }),
                ),
                plugin("portmap", json!({ "type": "portmap", "capabilities": { "portMappings": true } })),
            ],
            source: "/etc/cni/net.d/10-pods.conflist".into(),
        },
        attachment: Attachment {
            container_id: id().to_string(),
            netns: netns(),
            interface: "eth0".to_owned(),
            args: "IgnoreUnknown=1;K8S_POD_NAME=web".to_owned(),
            capabilities: capabilities.as_object().unwrap().clone(),
        },
        result,
    })
}

fn local() -> Connection {
    Connection::Local {
        local: LocalConfig {
            bridge: "a3s0".to_owned(),
            subnet: "10.187.0.0/16".parse().unwrap(),
            subnet6: Some("fda3:5b08:9c41::/64".parse().unwrap()),
            state_dir: "/run/a3s-box/local-network".into(),
            nft: "/usr/sbin/nft".into(),
            nft_limit: Duration::from_millis(20_500),
        },
    }
}

fn network() -> PodNetwork {
    let ip = |last: u8| IpAddr::V4(Ipv4Addr::new(10, 9, 8, last));
    PodNetwork {
        netns: netns(),
        interfaces: vec![Interface {
            name: "eth0".to_owned(),
            mac: [2, 0, 0, 0, 0, 9],
            mtu: 1450,
            addresses: vec![Address { ip: ip(7), prefix: 24 }],
            routes: vec![
                Route {
                    destination: Address { ip: Ipv4Addr::UNSPECIFIED.into(), prefix: 0 },
                    gateway: Some(ip(1)),
                },
                Route { destination: Address { ip: ip(128), prefix: 25 }, gateway: None },
            ],
            tap: "a3s-tap0".to_owned(),
        }],
        dns: Some(DnsSpec {
            servers: vec!["10.9.8.1".to_owned()],
            searches: vec!["example.org".to_owned()],
            options: vec!["ndots:1".to_owned()],
        }),
    }
}

fn egress() -> EgressPolicy {
    EgressPolicy {
        networks: vec!["10.0.0.0/8".parse().unwrap()],
        names: vec!["*.example.org".parse().unwrap()],
    }
}

fn records() -> Vec<(&'static str, Record)> {
    let result = json!({ "cniVersion": "1.1.0", "ips": [{ "address": "10.9.8.7/24", "interface": 1 }] });
    let record =
        |connection, egress, network| Record { schema: 1, netns: netns(), connection, egress, network };
    vec![
        ("network-none.json", record(None, None, None)),
        ("network-cni-intent.json", record(Some(cni(Version::V0_4_0, None)), None, None)),
        (
            "network-cni-connected.json",
            record(Some(cni(Version::V1_1_0, Some(result))), Some(egress()), Some(network())),
        ),
        ("network-local.json", record(Some(local()), Some(EgressPolicy::default()), Some(network()))),
    ]
}

/// What the daemon cannot read of a pod's network it cannot give back: the pod's address stays taken for ever.
#[tokio::test]
async fn golden_records_are_what_this_build_writes() {
    let turns = Turns::default();
    for (name, record) in records() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_owned());
        records.write(&id(), &record, &turns.take(&id()).await).await.unwrap();
        goldens().check_json(name, &fs::read(records.path(&id())).unwrap());
    }
    let names: Vec<&str> = records().iter().map(|(name, _)| *name).collect();
    let others = ["local-network.json", "local-lease.json", "local-last.txt", "pod-cidrs.txt"];
    goldens().are_all_known(&[&names[..], &others[..]].concat());
}

#[tokio::test]
async fn golden_records_of_every_age_are_read_with_their_meaning() {
    for (name, record) in records() {
        for golden in goldens().ages(name) {
            for json in [golden.json(), with_unknown_fields(golden.json(), &MAPS)] {
                let dir = tempfile::tempdir().unwrap();
                let records = Records::new(dir.path().to_owned());
                fs::write(records.path(&id()), json.to_string()).unwrap();
                let read = records.read(&id()).await.unwrap().unwrap();
                assert_eq!(read, record, "{}", golden.path.display());
            }
        }
    }
}
