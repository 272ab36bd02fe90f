//! What every build has left for others who use the bridge, read by this one: docs/versioning.md.

use a3s_box_core::spec::PortProtocol;
use a3s_box_golden::{Goldens, with_unknown_fields};

use super::*;

const NETWORK: &str = "local-network.json";
const LEASE: &str = "local-lease.json";
const LAST: &str = "local-last.txt";

fn goldens() -> Goldens {
    Goldens::of(env!("CARGO_MANIFEST_DIR"), "records")
}

fn network() -> Network {
    Network {
        bridge: "a3s0".to_owned(),
        subnet: "10.187.0.0/16".parse().unwrap(),
        subnet6: Some("fda3:5b08:9c41::/64".parse().unwrap()),
    }
}

fn holder() -> Holder {
    let port = |protocol, host_ip: &str| PortMapping {
        protocol,
        container_port: 80,
        host_port: 8080,
        host_ip: host_ip.to_owned(),
    };
    Holder {
        box_id: BoxId::from_random([0xb0; 32]),
        pod: "shop/web".to_owned(),
        ports: vec![
            port(PortProtocol::Tcp, ""),
            port(PortProtocol::Udp, "192.0.2.1"),
            port(PortProtocol::Sctp, "2001:db8::1"),
        ],
    }
}

fn lease() -> Lease {
    let Holder { box_id, pod, ports } = holder();
    let (v4, v6) = ("10.187.0.2".parse().unwrap(), Some("fda3:5b08:9c41::2".parse().unwrap()));
    Lease { box_id, pod, v4, v6, ports }
}

/// A daemon and `a3s-box run`s of different builds use one bridge at the same time.
#[test]
fn golden_files_of_the_bridge_are_what_this_build_writes() {
    let dir = tempfile::tempdir().unwrap();
    let state = State::new(dir.path().to_owned());
    let lock = state.lock().unwrap();
    state.begin(&network(), &lock).unwrap();
    assert_eq!(state.allocate(&network(), &[], holder(), &lock).unwrap(), lease());
    goldens().check_json(NETWORK, &fs::read(state.network_path()).unwrap());
    goldens().check_json(LEASE, &fs::read(state.lease_path(lease().v4)).unwrap());
    goldens().check(LAST, &fs::read(state.last_path()).unwrap());
}

#[test]
fn golden_files_of_the_bridge_of_every_age_are_read_with_their_meaning() {
    let dir = tempfile::tempdir().unwrap();
    let state = State::new(dir.path().to_owned());
    let lock = state.lock().unwrap();
    for golden in goldens().ages(NETWORK) {
        for json in [golden.json(), with_unknown_fields(golden.json(), &[])] {
            fs::write(state.network_path(), json.to_string()).unwrap();
            assert_eq!(state.network().unwrap(), Some(network()), "{}", golden.path.display());
        }
    }
    for golden in goldens().ages(LEASE) {
        for json in [golden.json(), with_unknown_fields(golden.json(), &[])] {
            fs::write(state.lease_path(lease().v4), json.to_string()).unwrap();
            assert_eq!(state.leases().unwrap(), [lease()], "{}", golden.path.display());
            assert_eq!(
                state.leases().unwrap()[0].published().unwrap().len(),
                3,
                "firewall rules are made of it"
            );
        }
    }
    for golden in goldens().ages(LAST) {
        fs::write(state.last_path(), golden.bytes).unwrap();
        let leases = state.leases().unwrap();
        let next = state.allocate(&network(), &leases, holder(), &lock).unwrap();
        assert_eq!(next.v4.to_string(), "10.187.0.3", "the one after the last");
        state.release(&next, &lock).unwrap();
    }
}
