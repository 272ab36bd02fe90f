//! One bridge for all who use it: the daemon and every `a3s-box run` have records of their own and share the rest.

mod common;

use std::collections::BTreeSet;
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use a3s_box_core::spec::{PortMapping, PortProtocol};
use a3s_box_net::cni::ConfError;
use a3s_box_net::{
    LocalError, NetMode, NetworkStatus, PodNetworking, SetupFailure, SetupRequest, TeardownRequest,
};
use futures::future::join_all;

use common::{Failed, Node, SetUp, box_id, chain, on_a_local_node, request, run};

fn publish(n: u8, protocol: PortProtocol, host_ip: &str, host_port: u16) -> SetupRequest {
    let port = PortMapping { protocol, container_port: 80, host_port, host_ip: host_ip.to_owned() };
    SetupRequest { port_mappings: vec![port], ..request(n) }
}

fn local(error: &Failed) -> &LocalError {
    assert!(error.left_behind.is_empty(), "{:?}", error.left_behind);
    match &error.cause {
        SetupFailure::Local(error) => error,
        other => panic!("{other:?}"),
    }
}

async fn tear_down(networking: &PodNetworking, n: u8) {
    let errors = networking.teardown(TeardownRequest::of(box_id(n))).await;
    assert!(errors.is_empty(), "box {n}: {errors:?}");
}

/// Somebody else with records of their own on the same host.
fn another(node: &Node, name: &str) -> PodNetworking {
    let mut config = node.site.config.clone();
    config.cache_dir = node.site.path(&format!("cache-{name}"));
    PodNetworking::new(config)
}

#[test]
fn a_hundred_pods_come_and_go_and_leave_nothing() {
    on_a_local_node(async |node| {
        let before = node.inventory();
        let networking = node.site.networking();
        let ports = |n: u8| publish(n, PortProtocol::Tcp, "", 8000 + u16::from(n));
        let pods = join_all((1..=100).map(|n| networking.setup(ports(n)))).await;
        let addresses: BTreeSet<IpAddr> = pods.iter().flat_map(|pod| pod.as_ref().unwrap().ips()).collect();
        assert_eq!(addresses.len(), 200, "no two pods share an address");
        let table = run("nft list map inet a3s_box every4");
        assert_eq!(table.matches("tcp . 80").count() + table.matches("tcp . 81").count(), 100, "{table}");
        join_all((1..=100).map(|n| tear_down(&networking, n))).await;
        assert_eq!(node.inventory(), before);
        let next = networking.setup(request(101)).await.unwrap();
        assert!(!addresses.contains(&next.ips().next().unwrap()), "a freed address waits its turn");
        tear_down(&networking, 101).await;
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn a_port_that_another_pod_publishes_is_refused_with_that_pods_name() {
    on_a_local_node(async |node| {
        let (one, two) = (another(&node, "one"), another(&node, "two"));
        one.setup(publish(1, PortProtocol::Tcp, "", 8080)).await.unwrap();
        let held = node.inventory();
        for host_ip in ["", "127.0.0.1", "::"] {
            let error = two.setup(publish(2, PortProtocol::Tcp, host_ip, 8080)).await.unwrap_err();
            assert!(matches!(local(&error), LocalError::PortTaken { pod, .. } if pod == "default/pod-1"));
            assert!(
                chain(&error).contains("8080/tcp is already published by pod default/pod-1"),
                "{}",
                chain(&error)
            );
            assert_eq!(node.inventory(), held, "a refusal leaves nothing");
        }
        two.setup(publish(2, PortProtocol::Udp, "", 8080)).await.unwrap();
        tear_down(&one, 1).await;
        two.setup(publish(3, PortProtocol::Tcp, "", 8080)).await.unwrap();
        let mut twice = publish(4, PortProtocol::Tcp, "", 8090);
        twice.port_mappings.push(twice.port_mappings[0].clone());
        let error = two.setup(twice).await.unwrap_err();
        assert!(matches!(local(&error), LocalError::PortTwice { .. }), "{}", chain(&error));
    });
}

#[test]
fn a_port_that_a_program_of_the_host_has_is_refused() {
    on_a_local_node(async |node| {
        let before = node.inventory();
        let networking = node.site.networking();
        let listener = TcpListener::bind("127.0.0.1:8080").unwrap();
        let socket = UdpSocket::bind("[::]:8080").unwrap();
        for protocol in [PortProtocol::Tcp, PortProtocol::Udp] {
            let error = networking.setup(publish(1, protocol, "", 8080)).await.unwrap_err();
            assert!(matches!(local(&error), LocalError::PortInUse { .. }), "{}", chain(&error));
            assert!(chain(&error).contains("a program of this host uses it"), "{}", chain(&error));
            assert_eq!(node.inventory(), before);
        }
        drop((listener, socket));
        let error = networking.setup(publish(1, PortProtocol::Tcp, "203.0.113.9", 8080)).await.unwrap_err();
        assert!(chain(&error).contains("Cannot assign requested address"), "{}", chain(&error));
        networking.setup(publish(1, PortProtocol::Tcp, "", 8080)).await.unwrap();
    });
}

#[test]
fn a_subnet_that_the_host_has_another_way_to_is_refused() {
    on_a_local_node(async |node| {
        run("ip link add uplink type bridge");
        run("ip link set uplink up");
        let before = node.inventory();
        let networking = node.site.networking();
        for (route, setting) in [
            ("10.0.0.0/8", "network.local_subnet"),
            ("10.187.3.0/24", "network.local_subnet"),
            ("fda3:5b08:9c41::7/128", "network.local_subnet6"),
        ] {
            run(&format!("ip route add {route} dev uplink"));
            let error = networking.setup(request(1)).await.unwrap_err();
            assert!(matches!(local(&error), LocalError::Overlap { setting: s, .. } if *s == setting));
            assert!(chain(&error).contains(route), "{}", chain(&error));
            match networking.status().await {
                NetworkStatus::NotReady { reason, .. } => assert!(reason.contains(route), "{reason}"),
                NetworkStatus::Ready { detail } => panic!("{detail}"),
            }
            assert_eq!(node.inventory(), before);
            run(&format!("ip route del {route} dev uplink"));
        }
        run("ip addr add 10.187.0.9/32 dev lo");
        let error = networking.setup(request(1)).await.unwrap_err();
        assert!(
            matches!(local(&error), LocalError::Overlap { .. }),
            "an address of the host: {}",
            chain(&error)
        );
        run("ip addr del 10.187.0.9/32 dev lo");
        run("ip route add default dev uplink");
        networking.setup(request(1)).await.unwrap();
    });
}

#[test]
fn a_network_in_use_is_not_changed_under_its_boxes() {
    on_a_local_node(async |mut node| {
        let first = node.site.networking();
        first.setup(request(1)).await.unwrap();
        node.site.config.local.subnet = "10.55.0.0/24".parse().unwrap();
        let changed = node.site.networking();
        let error = changed.setup(request(2)).await.unwrap_err();
        assert!(matches!(local(&error), LocalError::Different { .. }), "{}", chain(&error));
        assert!(chain(&error).contains("10.187.0.0/16"), "{}", chain(&error));
        assert!(matches!(changed.status().await, NetworkStatus::NotReady { .. }));
        // Torn down by what was recorded, not by what is configured now.
        tear_down(&changed, 1).await;
        let pod = changed.setup(request(2)).await.unwrap();
        assert!(pod.ips().next().unwrap().to_string().starts_with("10.55.0."));
    });
}

/// The last pod's end removes what the next pod's beginning makes: they must not meet.
#[test]
fn the_last_pod_goes_while_the_next_one_comes() {
    on_a_local_node(async |node| {
        let before = node.inventory();
        let (one, two) = (another(&node, "one"), another(&node, "two"));
        one.setup(request(1)).await.unwrap();
        let (mut leaving, mut coming) = ((&one, 1), (&two, 2));
        for round in 0..40 {
            let (pod, ()) = tokio::join!(
                coming.0.setup(publish(coming.1, PortProtocol::Tcp, "", 8080 + round)),
                tear_down(leaving.0, leaving.1)
            );
            pod.unwrap();
            let links = run("ip -o link show master a3s0");
            assert_eq!(links.lines().count(), 1, "round {round}: {links}");
            let map = run("nft list map inet a3s_box every4");
            assert!(map.contains(&format!("tcp . {}", 8080 + round)), "round {round}: {map}");
            std::mem::swap(&mut leaving, &mut coming);
        }
        tear_down(leaving.0, leaving.1).await;
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn without_nft_nothing_is_made_and_the_package_is_named() {
    on_a_local_node(async |mut node| {
        let before = node.inventory();
        node.site.config.local.nft = "/nonexistent/nft".into();
        let networking = node.site.networking();
        let error = networking.setup(request(1)).await.unwrap_err();
        assert!(matches!(local(&error), LocalError::NoNft { .. }), "{}", chain(&error));
        match networking.status().await {
            NetworkStatus::NotReady { reason, .. } => {
                assert!(reason.contains("package nftables"), "{reason}")
            }
            NetworkStatus::Ready { detail } => panic!("{detail}"),
        }
        assert_eq!(node.inventory(), before);
    });
}

/// What nft says is all that anybody can go by; and what it has not undone stays owed.
#[test]
fn an_nft_that_fails_is_quoted_and_the_teardown_stays_owed_until_it_works() {
    on_a_local_node(async |mut node| {
        let before = node.inventory();
        node.site.plugin("nft", "echo 'no such kernel' >&2; exit 1");
        node.site.config.local.nft = node.site.path("bin/nft");
        let networking = node.site.networking();
        let error = networking.setup(request(1)).await.unwrap_err();
        assert!(matches!(&error.cause, SetupFailure::Local(LocalError::Nft { .. })), "{}", chain(&error));
        assert!(chain(&error).contains("it said: no such kernel"), "{}", chain(&error));
        assert_eq!(error.left_behind.len(), 1, "{:?}", error.left_behind);
        assert_eq!(networking.held().await.unwrap(), [box_id(1)]);

        node.site.plugin("nft", r#"printf '%s' "$read_all" | nft -f -"#);
        tear_down(&networking, 1).await;
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn an_nft_that_hangs_is_killed_in_time_and_lets_others_in() {
    on_a_local_node(async |mut node| {
        let before = node.inventory();
        let good = node.site.config.local.clone();
        node.site.plugin("nft", "exec sleep 60");
        node.site.config.local.nft = node.site.path("bin/nft");
        node.site.config.local.nft_limit = Duration::from_millis(300);
        let began = Instant::now();
        let error = node.site.networking().setup(request(1)).await.unwrap_err();
        assert!(matches!(&error.cause, SetupFailure::Local(LocalError::NftSlow { .. })), "{}", chain(&error));
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());

        node.site.config.local = good;
        node.site.networking().setup(request(2)).await.unwrap();
        node.site.plugin("nft", r#"printf '%s' "$read_all" | nft -f -"#);
        for n in [1, 2] {
            tear_down(&node.site.networking(), n).await;
        }
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn only_a_configuration_that_is_not_there_is_replaced_and_only_where_wanted() {
    on_a_local_node(async |mut node| {
        node.site.conflist("{ broken");
        let error = node.site.networking().setup(request(1)).await.unwrap_err();
        assert!(
            matches!(&error.cause, SetupFailure::Configuration(ConfError::NotJson { .. })),
            "{}",
            chain(&error)
        );
        node.site.config.mode = NetMode::Local;
        node.site.networking().setup(request(1)).await.unwrap();
        tear_down(&node.site.networking(), 1).await;

        std::fs::remove_file(node.site.path("net.d/10-test.conflist")).unwrap();
        node.site.config.mode = NetMode::Cni;
        node.site.config.fallback = a3s_box_net::Fallback::None;
        let error = node.site.networking().setup(request(1)).await.unwrap_err();
        assert!(
            matches!(&error.cause, SetupFailure::Configuration(ConfError::Missing { .. })),
            "{}",
            chain(&error)
        );
        match node.site.networking().status().await {
            NetworkStatus::NotReady { remedy, .. } => {
                assert!(remedy.contains("network.fallback"), "{remedy}")
            }
            NetworkStatus::Ready { detail } => panic!("{detail}"),
        }
    });
}
