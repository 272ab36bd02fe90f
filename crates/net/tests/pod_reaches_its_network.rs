//! Real plugins, a real bridge, and a guest played by the test: frames written to the tap are answered by
//! the bridge, and whatever was made is gone afterwards.

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use a3s_box_core::network::{Address, Interface, Route};
use a3s_box_core::spec::{NetworkMode, PortMapping, PortProtocol};
use a3s_box_net::{NetMode, Redirect, TeardownRequest, tap};
use futures::future::join_all;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};

use common::{SetUp, box_id, chain, on_a_node, request, run};

const VNET_HEADER: usize = 10;
const BROADCAST: [u8; 6] = [0xff; 6];

/// The guest's end of a tap.
struct Guest {
    tap: File,
    mac: [u8; 6],
    ip: Ipv4Addr,
}

impl Guest {
    fn boot(path: &Path, nic: &Interface) -> Self {
        Self::come_up(path, open_tap(path, &nic.tap), nic)
    }

    /// Waits for the kernel to have noticed that somebody is at the tap's other end, which it does in the background; until
    /// then it drops what it should deliver. Guests take longer to boot and send again what was lost.
    fn come_up(path: &Path, tap: File, nic: &Interface) -> Self {
        let IpAddr::V4(ip) = nic.addresses[0].ip else { panic!("first address is IPv6") };
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let link = run(&format!("nsenter --net={} ip link show {}", path.display(), nic.tap));
            if link.contains("state UP") && !link.contains("qdisc noop") {
                break;
            }
            assert!(Instant::now() < deadline, "the tap does not come up: {link}");
        }
        Self { tap, mac: nic.mac, ip }
    }

    fn send(&mut self, to: [u8; 6], ethertype: u16, payload: &[u8]) {
        let mut frame = vec![0; VNET_HEADER];
        frame.extend(to);
        frame.extend(self.mac);
        frame.extend(ethertype.to_be_bytes());
        frame.extend(payload);
        self.tap.write_all(&frame).unwrap();
    }

    /// The first frame within two seconds that `pick` takes something from.
    fn receive<T>(&mut self, pick: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
        use std::os::fd::AsFd;
        let deadline = Instant::now() + Duration::from_secs(2);
        let mut buffer = [0; 4096];
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            let timeout = PollTimeout::try_from(left).unwrap();
            if poll(&mut [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)], timeout).unwrap() == 0 {
                return None;
            }
            let n = self.tap.read(&mut buffer).unwrap();
            if let Some(found) = pick(&buffer[VNET_HEADER..n]) {
                return Some(found);
            }
        }
        None
    }

    /// Who has `ip`?
    fn arp(&mut self, ip: Ipv4Addr) -> Option<[u8; 6]> {
        let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
        packet.extend(self.mac);
        packet.extend(self.ip.octets());
        packet.extend([0; 6]);
        packet.extend(ip.octets());
        self.send(BROADCAST, 0x0806, &packet);
        let is_answer =
            move |f: &[u8]| f[12..14] == [8, 6] && f[20..22] == [0, 2] && f[28..32] == ip.octets();
        self.receive(|f| (f.len() >= 42 && is_answer(f)).then(|| f[22..28].try_into().unwrap()))
    }

    /// Sends an ICMP echo request of `size` bytes and returns the payload that came back.
    fn ping(&mut self, gateway: [u8; 6], ip: Ipv4Addr, size: usize) -> Option<Vec<u8>> {
        let mut icmp = vec![8, 0, 0, 0, 0xa3, 0x05, 0, 1];
        icmp.extend((0..size).map(|i| i as u8));
        let sum = checksum(&icmp).to_be_bytes();
        icmp[2..4].copy_from_slice(&sum);
        let mut packet = vec![0x45, 0];
        packet.extend(u16::try_from(20 + icmp.len()).unwrap().to_be_bytes());
        packet.extend([0, 1, 0, 0, 64, 1, 0, 0]);
        packet.extend(self.ip.octets());
        packet.extend(ip.octets());
        let sum = checksum(&packet).to_be_bytes();
        packet[10..12].copy_from_slice(&sum);
        packet.extend(icmp);
        self.send(gateway, 0x0800, &packet);
        self.receive(|f| {
            (f.len() > 42 && f[12..14] == [8, 0] && f[23] == 1 && f[34] == 0).then(|| f[42..].to_vec())
        })
    }
}

/// As a VMM does it.
fn open_tap(netns: &Path, name: &str) -> File {
    let (netns, name) = (File::open(netns).unwrap(), name.to_owned());
    let opened = std::thread::spawn(move || {
        setns(&netns, CloneFlags::CLONE_NEWNET).unwrap();
        tap::attach(&name).unwrap()
    });
    opened.join().unwrap()
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn address(text: &str) -> Address {
    text.parse().unwrap()
}

fn via(destination: &str, gateway: &str) -> Route {
    Route { destination: address(destination), gateway: Some(gateway.parse().unwrap()) }
}

#[test]
fn a_guest_on_the_tap_talks_to_the_bridge_and_leaves_no_trace() {
    on_a_node(async |node| {
        node.bridge_network("1.0.0", r#""mtu": 1450,"#, "");
        let before = node.inventory();
        let networking = node.site.networking();
        let pod = networking.setup(request(1)).await.unwrap();

        let [nic] = pod.interfaces.as_slice() else { panic!("{pod:?}") };
        assert_eq!((nic.name.as_str(), nic.mtu), ("eth0", 1450));
        assert_eq!(nic.addresses, [address("10.88.7.2/24"), address("fd00:88::2/64")]);
        assert_eq!(nic.routes, [via("0.0.0.0/0", "10.88.7.1"), via("::/0", "fd00:88::1")]);
        assert_eq!(pod.ips().next(), Some("10.88.7.2".parse().unwrap()));
        assert_eq!(networking.existing(&box_id(1)).await.unwrap().as_ref(), Some(&pod));

        let mut guest = Guest::boot(&pod.netns, nic);
        let gateway = Ipv4Addr::new(10, 88, 7, 1);
        let bridge = guest.arp(gateway).expect("the bridge answers ARP");
        assert!(run("ip link show br-test").contains(&mac_text(bridge)));
        let payload = guest.ping(bridge, gateway, 1400).expect("the bridge answers ping");
        assert_eq!(payload.len(), 1400);

        drop(guest);
        assert_eq!(networking.held().await.unwrap(), [box_id(1)]);
        let errors = networking.teardown(TeardownRequest::of(box_id(1))).await;
        assert!(errors.is_empty(), "{errors:?}");
        // The bridge belongs to the network and stays.
        run("ip link del br-test");
        assert_eq!(node.inventory(), before);
        let errors = networking.teardown(TeardownRequest::of(box_id(1))).await;
        assert!(errors.is_empty(), "a second teardown finds nothing to do: {errors:?}");
    });
}

/// Such configurations, the CNI project's own first example among them, made the node not ready.
#[test]
fn a_network_of_the_first_versions_of_the_specification_connects_pods() {
    on_a_node(async |node| {
        for version in ["0.2.0", "0.1.0"] {
            node.site.plugin("noting", "[ $CNI_COMMAND = DEL ] || previous");
            node.bridge_network(version, "", r#", { "type": "noting" }"#);
            let networking = node.site.networking();
            let pod = networking.setup(request(1)).await.unwrap();
            assert_eq!(pod.interfaces[0].addresses.len(), 2, "{version}: {pod:?}");
            let told = node.site.stdin("noting", "ADD");
            let of = |family: &str| told["prevResult"][family]["ip"].as_str().unwrap_or_default().to_owned();
            let addresses: Vec<_> = pod.interfaces[0].addresses.iter().map(ToString::to_string).collect();
            assert_eq!([of("ip4"), of("ip6")].as_slice(), addresses, "{version}");
            assert!(networking.teardown(TeardownRequest::of(box_id(1))).await.is_empty());
        }
    });
}

#[test]
fn a_vmm_may_hold_the_tap_before_there_is_a_network() {
    on_a_node(async |node| {
        node.bridge_network("1.0.0", "", "");
        let before = node.inventory();
        let networking = node.site.networking();
        let prepared = networking.prepare(request(1)).await.unwrap();
        let namespace = prepared.namespace().clone();
        assert_eq!((namespace.taps.as_slice(), node.site.calls()), (&["tap0".to_owned()][..], Vec::new()));
        let tap = open_tap(&namespace.netns, "tap0");

        let pod = prepared.connect().await.unwrap();
        assert_eq!((&pod.netns, &pod.interfaces[0].tap), (&namespace.netns, &namespace.taps[0]));
        let mut guest = Guest::come_up(&pod.netns, tap, &pod.interfaces[0]);
        guest.arp(Ipv4Addr::new(10, 88, 7, 1)).expect("the bridge answers ARP");
        drop(guest);

        // A pod that never came so far is taken down just so.
        drop(networking.prepare(request(2)).await.unwrap());
        for n in [1, 2] {
            assert!(networking.teardown(TeardownRequest::of(box_id(n))).await.is_empty());
        }
        run("ip link del br-test");
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn as_many_taps_are_ready_as_the_last_pod_of_the_network_had_interfaces() {
    on_a_node(async |node| {
        node.site.conflist(r#"{ "cniVersion": "1.0.0", "name": "test", "plugins": [{ "type": "twins" }] }"#);
        let add = r#"[ $CNI_COMMAND = DEL ] && exit
            for name in eth0 net1; do nsenter --net=$CNI_NETNS ip link add $name type veth peer name p$name; done
            echo '{ "cniVersion": "1.0.0", "interfaces": [{ "name": "eth0", "sandbox": "/n" }, { "name": "net1", "sandbox": "/n" }],
                    "ips": [{ "address": "10.1.0.7/24", "interface": 0 }, { "address": "10.2.0.7/24", "interface": 1 }] }'"#;
        node.site.plugin("twins", add);
        let networking = node.site.networking();
        for (n, ready) in [(1, 1), (2, 2)] {
            let prepared = networking.prepare(request(n)).await.unwrap();
            assert_eq!(prepared.namespace().taps.len(), ready);
            let pod = prepared.connect().await.unwrap();
            let taps: Vec<&str> = pod.interfaces.iter().map(|interface| interface.tap.as_str()).collect();
            assert_eq!(taps, ["tap0", "tap1"]);
            assert!(networking.teardown(TeardownRequest::of(box_id(n))).await.is_empty());
        }
    });
}

#[test]
fn nftables_can_redirect_in_the_place_of_traffic_control() {
    on_a_node(async |mut node| {
        node.bridge_network("1.0.0", "", "");
        node.site.config.redirect = Redirect::Nft;
        let networking = node.site.networking();
        let (a, b) = tokio::join!(networking.setup(request(1)), networking.setup(request(2)));
        let (a, b) = (a.unwrap(), b.unwrap());
        let filters = run(&format!("nsenter --net={} tc filter show dev eth0 ingress", a.netns.display()));
        assert_eq!(filters.trim(), "", "traffic control is not used");
        let mut guests = [&a, &b].map(|pod| Guest::boot(&pod.netns, &pod.interfaces[0]));
        let gateway = Ipv4Addr::new(10, 88, 7, 1);
        let bridge = guests[0].arp(gateway).expect("the bridge answers ARP");
        assert_eq!(guests[0].ping(bridge, gateway, 1400).expect("the bridge answers ping").len(), 1400);
        let (to, ip) = (guests[1].mac, guests[1].ip);
        guests[0].send(to, 0x88b5, b"hello");
        let hello = guests[1].receive(|f| (f[12..14] == [0x88, 0xb5]).then(|| f[14..19].to_vec()));
        assert_eq!(hello, Some(b"hello".to_vec()), "every protocol passes");
        assert_eq!(guests[0].arp(ip), None, "nobody answers in the guest's place");

        // Without nft a pod fails and says what is missing.
        node.site.config.local.nft = "/no/such/nft".into();
        let error = node.site.networking().setup(request(3)).await.unwrap_err();
        let text = chain(&error);
        assert!(text.contains("/no/such/nft") && text.contains("package nftables"), "{text}");
    });
}

#[test]
fn two_guests_reach_each_other_and_nobody_answers_in_their_place() {
    on_a_node(async |node| {
        node.bridge_network("0.3.1", "", "");
        let networking = node.site.networking();
        let (a, b) = tokio::join!(networking.setup(request(1)), networking.setup(request(2)));
        let (a, b) = (a.unwrap(), b.unwrap());
        let (mut guest_a, mut guest_b) =
            (Guest::boot(&a.netns, &a.interfaces[0]), Guest::boot(&b.netns, &b.interfaces[0]));
        guest_a.send(guest_b.mac, 0x88b5, b"hello");
        let hello =
            guest_b.receive(|f| (f[12..14] == [0x88, 0xb5]).then(|| (f[6..12].to_vec(), f[14..19].to_vec())));
        assert_eq!(hello, Some((guest_a.mac.to_vec(), b"hello".to_vec())));
        // The namespace's own stack must not answer in the guest's place: only guest b could, and it is silent.
        assert_eq!(guest_a.arp(guest_b.ip), None);
    });
}

#[test]
fn thirty_pods_come_and_go_side_by_side() {
    on_a_node(async |node| {
        node.bridge_network("1.0.0", "", "");
        let networking = node.site.networking();
        let before = node.inventory();
        let pods = join_all((1..=30).map(|n| networking.setup(request(n)))).await;
        let addresses: BTreeSet<IpAddr> = pods.iter().flat_map(|pod| pod.as_ref().unwrap().ips()).collect();
        assert_eq!(addresses.len(), 60, "no two pods share an address");
        let torn_down = join_all((1..=30).map(|n| networking.teardown(TeardownRequest::of(box_id(n))))).await;
        assert!(torn_down.iter().all(Vec::is_empty), "{torn_down:?}");
        run("ip link del br-test");
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn published_ports_and_masquerading_leave_no_rule_behind() {
    on_a_node(async |node| {
        let portmap = r#", { "type": "portmap", "capabilities": { "portMappings": true } }"#;
        node.bridge_network("0.4.0", r#""ipMasq": true,"#, portmap);
        let networking = node.site.networking();
        // portmap's own chains are made once per node: a first pod brings them.
        let port = |host_port| PortMapping {
            protocol: PortProtocol::Tcp,
            container_port: 80,
            host_port,
            host_ip: String::new(),
        };
        let publish = |n, host_port| {
            let mut request = request(n);
            request.port_mappings.push(port(host_port));
            request
        };
        networking.setup(publish(1, 8081)).await.unwrap();
        assert!(networking.teardown(TeardownRequest::of(box_id(1))).await.is_empty());
        let before = node.inventory();

        let pod = networking.setup(publish(2, 8082)).await.unwrap();
        let during = node.inventory().firewall.join("\n");
        assert!(during.contains("--dport 8082"), "{during}");
        assert!(during.contains("MASQUERADE"), "{during}");
        assert!(during.contains(&pod.ips().next().unwrap().to_string()), "{during}");
        assert!(networking.teardown(TeardownRequest::of(box_id(2))).await.is_empty());
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn a_point_to_point_pod_reaches_its_gateway_through_the_host_route() {
    on_a_node(async |node| {
        node.site.conflist(&format!(
            r#"{{ "cniVersion": "1.0.0", "name": "test", "plugins": [ {{ "type": "ptp",
                "ipam": {{ "type": "host-local", "dataDir": "{}", "subnet": "10.88.9.0/24",
                           "routes": [{{ "dst": "0.0.0.0/0" }}] }} }} ] }}"#,
            node.site.path("ipam").display()
        ));
        let before = node.inventory();
        let networking = node.site.networking();
        let pod = networking.setup(request(1)).await.unwrap();
        let nic = &pod.interfaces[0];
        assert_eq!(nic.addresses, [address("10.88.9.2/32")], "the network behind it is not on the link");
        assert_eq!(nic.routes[0], Route { destination: address("10.88.9.1/32"), gateway: None });
        assert_eq!(nic.routes.last().unwrap(), &via("0.0.0.0/0", "10.88.9.1"));
        let mut guest = Guest::boot(&pod.netns, nic);
        let gateway = Ipv4Addr::new(10, 88, 9, 1);
        let host = guest.arp(gateway).expect("the host's end answers ARP");
        assert!(guest.ping(host, gateway, 56).is_some());
        drop(guest);
        assert!(networking.teardown(TeardownRequest::of(box_id(1))).await.is_empty());
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn a_pod_without_a_network_has_a_namespace_with_loopback_up_and_nothing_else() {
    on_a_node(async |mut node| {
        let before = node.inventory();
        // Asked for by the pod, on a node whose network is not even configured…
        let mut wish = request(1);
        wish.mode = NetworkMode::None;
        let asked = node.site.networking().setup(wish).await.unwrap();
        // …and decided by the node.
        node.site.config.mode = NetMode::None;
        let networking = node.site.networking();
        let given = networking.setup(request(2)).await.unwrap();
        for pod in [&asked, &given] {
            assert_eq!(pod.interfaces, []);
            let links = run(&format!("nsenter --net={} ip -o link", pod.netns.display()));
            assert_eq!(links.lines().count(), 1, "{links}");
            assert!(links.contains("lo: <LOOPBACK,UP"), "{links}");
        }
        for n in [1, 2] {
            assert!(networking.teardown(TeardownRequest::of(box_id(n))).await.is_empty());
        }
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn taps_can_be_opened_by_the_user_that_the_vmm_runs_as_and_have_the_queues_that_it_opens() {
    on_a_node(async |mut node| {
        node.bridge_network("1.0.0", "", "");
        node.site.config.tap_owner = Some(64_055);
        let pod = node.site.networking().setup(request(1)).await.unwrap();
        let tap = run(&format!("nsenter --net={} ip -d link show tap0", pod.netns.display()));
        assert!(tap.contains("tun type tap pi off vnet_hdr on persist on user 64055"), "{tap}");
        assert!(!tap.contains("multi_queue"), "{tap}");
        node.site.config.multi_queue = true;
        let pod = node.site.networking().setup(request(2)).await.unwrap();
        let tap = run(&format!("nsenter --net={} ip -d link show tap0", pod.netns.display()));
        assert!(tap.contains("multi_queue"), "{tap}");
    });
}

#[test]
fn redirection_covers_every_protocol_in_both_directions() {
    on_a_node(async |node| {
        node.bridge_network("1.0.0", "", "");
        let pod = node.site.networking().setup(request(1)).await.unwrap();
        for (from, to) in [("eth0", "tap0"), ("tap0", "eth0")] {
            let line = format!("nsenter --net={} tc filter show dev {from} ingress", pod.netns.display());
            let filters = run(&line);
            assert!(filters.contains("protocol all"), "{filters}");
            assert!(filters.contains("match 00000000/00000000 at 0"), "{filters}");
            assert!(filters.contains(&format!("Egress Redirect to device {to}) stolen")), "{filters}");
        }
    });
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(":")
}
