//! NICs in a network namespace of the test's own. Needs root and ip(8).

use std::process::Command;

use a3s_box_agent::netlink;
use a3s_box_protocol::proto::{IpNetwork, NetworkInterface, Route};
use nix::sched::{CloneFlags, unshare};

fn ip(args: &[&str]) -> String {
    let output = Command::new("ip").args(args).output().unwrap();
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn network(octets: &[u8], prefix: u32) -> IpNetwork {
    IpNetwork { ip: octets.to_vec(), prefix }
}

#[test]
fn a_nic_gets_its_name_addresses_and_routes_and_a_repetition_changes_nothing() {
    if !rustix::process::geteuid().is_root() || Command::new("ip").arg("-V").output().is_err() {
        a3s_box_testing::skip("needs root and ip(8)");
        return;
    }
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    ip(&["link", "add", "first", "address", "02:00:00:00:00:99", "type", "veth", "peer", "name", "other"]);
    let v6 = |last: u8| {
        let mut octets = [0; 16];
        (octets[0], octets[1], octets[15]) = (0xfd, 0, last);
        octets
    };
    let interface = NetworkInterface {
        name: "eth0".to_owned(),
        mac: vec![2, 0, 0, 0, 0, 7],
        device_mac: vec![2, 0, 0, 0, 0, 0x99],
        mtu: 1400,
        addresses: vec![network(&[10, 88, 0, 5], 16), network(&v6(5), 64)],
        // The gateway's route comes first here and last in the kernel.
        routes: vec![
            Route { destination: Some(network(&[0; 4], 0)), gateway: vec![169, 254, 1, 1] },
            Route { destination: Some(network(&[169, 254, 1, 1], 32)), gateway: Vec::new() },
            Route { destination: Some(network(&[0; 16], 0)), gateway: v6(1).to_vec() },
        ],
    };
    netlink::loopback_up().unwrap();
    for _ in 0..2 {
        netlink::configure(&interface).unwrap();
        let addresses = ip(&["addr", "show", "eth0"]);
        for expected in [
            "link/ether 02:00:00:00:00:07",
            "mtu 1400",
            "UP",
            "inet 10.88.0.5/16 brd 10.88.255.255",
            "inet6 fd00::5/64",
        ] {
            assert!(addresses.contains(expected), "{expected}: {addresses}");
        }
        assert!(!addresses.contains("inet6 fd00::5/64 scope global tentative"), "{addresses}");
        // The link-local address is made from the MAC address.
        assert!(!addresses.contains(":99"), "{addresses}");
        assert!(ip(&["addr", "show", "lo"]).contains("inet 127.0.0.1/8"));
        let routes = ip(&["route"]);
        assert!(routes.contains("default via 169.254.1.1 dev eth0"), "{routes}");
        assert!(routes.contains("169.254.1.1 dev eth0"), "{routes}");
        assert!(ip(&["-6", "route"]).contains("default via fd00::1 dev eth0"));
    }
    let error = netlink::configure(&NetworkInterface {
        routes: vec![Route { destination: Some(network(&[10, 1, 0, 0], 16)), gateway: vec![8, 8, 8, 8] }],
        ..interface.clone()
    });
    // Reachable through the default route only: the kernel does not take it for a next hop.
    assert!(error.is_err_and(|e| e.to_string().contains("add the route to 10.1.0.0/16")));
}
