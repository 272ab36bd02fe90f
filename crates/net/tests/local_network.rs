//! The built-in network carries traffic: real bridges, nftables and stacks, with other namespaces as guests and
//! as another host.

mod common;

use std::net::IpAddr;

use a3s_box_core::network::PodNetwork;
use a3s_box_core::spec::{PortMapping, PortProtocol};
use a3s_box_net::{NetworkStatus, SetupRequest, TeardownRequest};

use common::machine::Machine;
use common::{Node, SetUp, box_id, on_a_local_node, request, run};

fn publish(n: u8, ports: &[(&str, PortProtocol, u16, u16)]) -> SetupRequest {
    let mapping = |&(host_ip, protocol, host_port, container_port): &(&str, _, _, _)| PortMapping {
        protocol,
        container_port,
        host_port,
        host_ip: host_ip.to_owned(),
    };
    SetupRequest { port_mappings: ports.iter().map(mapping).collect(), ..request(n) }
}

/// Its addresses, IPv4 first.
fn addresses(pod: &PodNetwork) -> [IpAddr; 2] {
    pod.ips().collect::<Vec<_>>().try_into().unwrap()
}

fn at(ip: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(ip, port).to_string()
}

fn ip(text: &str) -> Option<IpAddr> {
    Some(text.parse().unwrap())
}

async fn tear_down(node: &Node, boxes: impl IntoIterator<Item = u8>) {
    for n in boxes {
        let errors = node.site.networking().teardown(TeardownRequest::of(box_id(n))).await;
        assert!(errors.is_empty(), "box {n}: {errors:?}");
    }
}

#[test]
fn boxes_the_host_and_the_world_reach_each_other_and_nothing_is_left() {
    on_a_local_node(async |node| {
        let world = Machine::neighbour();
        let host = Machine::here();
        let before = node.inventory();
        let networking = node.site.networking();
        let pods = [networking.setup(request(1)).await.unwrap(), networking.setup(request(2)).await.unwrap()];
        let [one, two] = [Machine::guest(&pods[0]), Machine::guest(&pods[1])];
        let [ips_one, ips_two] = [addresses(&pods[0]), addresses(&pods[1])];
        assert_eq!(ips_one[0], "10.187.0.2".parse::<IpAddr>().unwrap());
        let gateways: [IpAddr; 2] = ["10.187.0.1".parse().unwrap(), "fda3:5b08:9c41::1".parse().unwrap()];
        let _servers = [&two, &host, &world].map(|machine| (machine.serve_tcp(80), machine.serve_udp(53)));

        for (from, to) in ips_one.into_iter().zip(ips_two) {
            assert_eq!(one.tcp(&at(to, 80)), Some(from), "box to box keeps its address");
            assert_eq!(one.udp(&at(to, 53)), Some(from));
            assert!(one.ping(&to.to_string()), "{to}");
        }
        for (from, gateway) in ips_one.into_iter().zip(gateways) {
            assert_eq!(one.tcp(&at(gateway, 80)), Some(from), "box to host");
            assert_eq!(one.udp(&at(gateway, 53)), Some(from));
            assert!(one.ping(&gateway.to_string()), "{gateway}");
        }
        for (to, gateway) in ips_two.into_iter().zip(gateways) {
            assert_eq!(host.tcp(&at(to, 80)), Some(gateway), "host to box");
            assert_eq!(host.udp(&at(to, 53)), Some(gateway));
            assert!(host.ping(&to.to_string()), "{to}");
        }
        for (world_ip, host_ip) in [("192.0.2.2", "192.0.2.1"), ("2001:db8:2::2", "2001:db8:2::1")] {
            let to = world_ip.parse().unwrap();
            assert_eq!(one.tcp(&at(to, 80)), ip(host_ip), "to the world under the host's address");
            assert_eq!(one.udp(&at(to, 53)), ip(host_ip));
            assert!(one.ping(world_ip), "{world_ip}");
        }
        for to in ips_two {
            assert!(world.no_tcp(&at(to, 80)), "what is not published is not reached from outside");
        }
        drop((one, two));
        tear_down(&node, [1, 2]).await;
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn published_ports_are_reached_from_everywhere_they_are_meant_to_be() {
    on_a_local_node(async |node| published_ports(node).await);
}

/// Kubernetes asks for br_netfilter, which shows the host's rules what goes from port to port of a bridge; other hosts
/// do without.
#[test]
fn published_ports_are_reached_whether_bridges_are_filtered_or_not() {
    on_a_local_node(async |node| {
        let switches = ["iptables", "ip6tables"].map(|t| format!("/proc/sys/net/bridge/bridge-nf-call-{t}"));
        if !switches.iter().all(|switch| std::path::Path::new(switch).exists()) {
            a3s_box_testing::skip("this kernel has no br_netfilter");
            return;
        }
        for switch in switches {
            let other = if std::fs::read_to_string(&switch).unwrap().trim() == "1" { "0" } else { "1" };
            std::fs::write(&switch, other).unwrap();
        }
        published_ports(node).await;
    });
}

async fn published_ports(node: Node) {
    let world = Machine::neighbour();
    let host = Machine::here();
    let before = node.inventory();
    let networking = node.site.networking();
    let (tcp, udp) = (PortProtocol::Tcp, PortProtocol::Udp);
    let ports = [
        ("", tcp, 8080, 80),
        ("", udp, 5353, 53),
        ("127.0.0.1", tcp, 8081, 80),
        ("192.0.2.1", tcp, 8082, 80),
        ("::", tcp, 8083, 80),
        ("", PortProtocol::Sctp, 8084, 80),
    ];
    let pod = networking.setup(publish(1, &ports)).await.unwrap();
    let other = networking.setup(request(2)).await.unwrap();
    let (guest, client) = (Machine::guest(&pod), Machine::guest(&other));
    let _servers = (guest.serve_tcp(80), guest.serve_udp(53));
    let gateway = ip("10.187.0.1");

    assert_eq!(world.tcp("192.0.2.1:8080"), ip("192.0.2.2"), "from outside, with the client's address");
    assert_eq!(world.tcp("[2001:db8:2::1]:8080"), ip("2001:db8:2::2"));
    assert_eq!(world.udp("192.0.2.1:5353"), ip("192.0.2.2"));
    assert_eq!(world.udp("[2001:db8:2::1]:5353"), ip("2001:db8:2::2"));
    assert_eq!(host.tcp("127.0.0.1:8080"), gateway, "from the host by loopback");
    assert_eq!(host.udp("127.0.0.1:5353"), gateway);
    assert!(host.tcp("192.0.2.1:8080").is_some(), "from the host by its own address");
    assert!(host.tcp("[2001:db8:2::1]:8080").is_some());
    assert!(host.udp("192.0.2.1:5353").is_some());
    assert!(host.tcp("10.187.0.1:8080").is_some());
    assert_eq!(client.tcp("192.0.2.1:8080"), gateway, "from another box");
    assert_eq!(guest.tcp("192.0.2.1:8080"), gateway, "from the box itself");
    assert!(guest.tcp("[2001:db8:2::1]:8080").is_some());
    assert_eq!(guest.udp("192.0.2.1:5353"), gateway);

    assert_eq!(host.tcp("127.0.0.1:8081"), gateway);
    assert!(world.no_tcp("192.0.2.1:8081"), "published on loopback only");
    assert!(host.no_tcp("192.0.2.1:8081"));
    assert!(world.tcp("192.0.2.1:8082").is_some());
    assert!(host.no_tcp("127.0.0.1:8082"), "published at another address only");
    assert!(world.tcp("[2001:db8:2::1]:8083").is_some());
    assert!(world.no_tcp("192.0.2.1:8083"), "published on IPv6 only");
    assert!(world.no_tcp("192.0.2.1:5353"), "published for UDP only");
    let refused = host.inside(|| std::net::TcpStream::connect("[::1]:8080").unwrap_err().kind());
    assert_eq!(refused, std::io::ErrorKind::ConnectionRefused, "clients go on to 127.0.0.1 at once");

    drop((guest, client));
    tear_down(&node, [1]).await;
    let table = run("nft list table inet a3s_box");
    assert!(!table.contains("808") && !table.contains("5353"), "the ports of one went with it: {table}");
    tear_down(&node, [2]).await;
    assert_eq!(node.inventory(), before);
}

/// Answers to 127.0.0.1 need `route_localnet`, which alone would open the host's loopback to every box (as in
/// CVE-2020-8558).
#[test]
fn a_box_does_not_reach_what_listens_on_the_hosts_loopback() {
    on_a_local_node(async |node| {
        let host = Machine::here();
        let pod = node.site.networking().setup(request(1)).await.unwrap();
        let guest = Machine::guest(&pod);
        let _server = host.serve_tcp(6000);
        guest.inside(|| {
            run("ip route del local 127.0.0.0/8 dev lo table local");
            run("ip addr del 127.0.0.1/8 dev lo");
            run("ip route add 127.0.0.0/8 via 10.187.0.1 dev eth0");
            std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "1").unwrap();
        });
        assert!(guest.no_tcp("127.0.0.1:6000"));
        // The same way is open without the guard: it is what closes it.
        run("nft flush chain inet a3s_box guard");
        assert!(guest.tcp("127.0.0.1:6000").is_some());
    });
}

/// Other tools flush all tables of a host when they load their own.
#[test]
fn a_firewall_that_somebody_flushed_is_whole_again_with_the_next_pod() {
    on_a_local_node(async |node| {
        let host = Machine::here();
        let networking = node.site.networking();
        let pod = networking.setup(publish(1, &[("", PortProtocol::Tcp, 8080, 80)])).await.unwrap();
        let guest = Machine::guest(&pod);
        let _server = guest.serve_tcp(80);
        run("nft flush ruleset");
        assert!(host.no_tcp("127.0.0.1:8080"));
        networking.setup(request(2)).await.unwrap();
        assert!(host.tcp("127.0.0.1:8080").is_some());
        run("nft flush ruleset");
        run("ip link del a3s0");
        drop(guest);
        tear_down(&node, [1, 2]).await;
    });
}

#[test]
fn a_host_without_ipv6_has_boxes_without_it() {
    on_a_local_node(async |node| {
        for scope in ["all", "default"] {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1").unwrap();
        }
        let networking = node.site.networking();
        let pod = networking.setup(publish(1, &[("", PortProtocol::Tcp, 8080, 80)])).await.unwrap();
        assert_eq!(pod.ips().map(|ip| ip.to_string()).collect::<Vec<_>>(), ["10.187.0.2"]);
        let guest = Machine::guest(&pod);
        let _server = guest.serve_tcp(80);
        assert!(Machine::here().tcp("127.0.0.1:8080").is_some());
        let only_v6 = networking.setup(publish(2, &[("::", PortProtocol::Tcp, 8081, 80)])).await.unwrap_err();
        assert!(common::chain(&only_v6).contains("has no IPv6"), "{}", common::chain(&only_v6));
        let detail = match networking.status().await {
            NetworkStatus::Ready { detail } => detail,
            NetworkStatus::NotReady { reason, .. } => panic!("{reason}"),
        };
        assert!(detail.starts_with("local bridge a3s0, 10.187.0.0/16 (no CNI configuration in"), "{detail}");
    });
}
