//! Egress policies against real stacks: what a guest may open, what it may answer, and what its names lead to.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use a3s_box_core::egress::EgressPolicy;
use a3s_box_core::spec::DnsSpec;
use a3s_box_net::{PodNetworking, SetupFailure, SetupRequest, TeardownRequest};
use hickory_proto::op::{Message, OpCode, Query};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use common::machine::{Machine, Server};
use common::{SetUp, box_id, chain, on_a_local_node, request, run};

const PATIENCE: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_millis(700);

fn policy(text: &str) -> SetupRequest {
    let cluster = ["10.0.0.0/8".parse().unwrap()];
    let dns =
        DnsSpec { servers: vec!["192.0.2.53".to_owned(), "2001:db8:2::53".to_owned()], ..DnsSpec::default() };
    SetupRequest { egress: Some(EgressPolicy::parse(text, &cluster).unwrap()), dns: Some(dns), ..request(1) }
}

/// Another host with more addresses: .2 and .3 serve, .53 answers names.
fn world() -> Machine {
    let world = Machine::neighbour();
    world.inside(|| {
        for address in
            ["192.0.2.3/24", "192.0.2.53/24", "192.0.2.54/24", "2001:db8:2::3/64", "2001:db8:2::53/64"]
        {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            run(&format!("ip addr add {address} dev eth0 {nodad}"));
        }
    });
    world
}

async fn teardown(networking: &PodNetworking) {
    let errors = networking.teardown(TeardownRequest::of(box_id(1))).await;
    assert!(errors.is_empty(), "{errors:?}");
}

#[test]
fn a_guest_reaches_what_is_listed_and_nothing_else() {
    on_a_local_node(async |node| {
        let before = node.inventory();
        let networking = node.site.networking();
        let world = world();
        let _web = world.serve_tcp(80);
        let at = ["192.0.2.2:90", "192.0.2.3:90", "[2001:db8:2::2]:90", "[2001:db8:2::3]:90"];
        let _servers = at.map(|at| world.answer_udp(at, |_| Some(b"192.0.2.1".to_vec())));
        let pod = networking.setup(policy("192.0.2.2, 2001:db8:2::2/128")).await.unwrap();
        let guest = Machine::guest(&pod);
        for ip in ["192.0.2.2", "[2001:db8:2::2]"] {
            assert!(guest.tcp(&format!("{ip}:80")).is_some(), "{ip}");
            assert!(guest.udp(&format!("{ip}:90")).is_some(), "{ip}");
            assert!(guest.ping(ip.trim_matches(['[', ']'])), "{ip}");
        }
        for ip in ["192.0.2.3", "[2001:db8:2::3]"] {
            assert!(guest.no_tcp(&format!("{ip}:80")), "{ip}");
            assert!(guest.no_udp(&format!("{ip}:90")), "{ip}");
            assert!(guest.no_ping(ip.trim_matches(['[', ']'])), "{ip}");
        }
        drop(guest);
        teardown(&networking).await;
        run("ip link del uplink");
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn a_guest_that_may_open_nothing_answers_what_others_open() {
    on_a_local_node(async |node| {
        let networking = node.site.networking();
        let pod = networking.setup(policy("none")).await.unwrap();
        let guest = Machine::guest(&pod);
        let here = Machine::here();
        let _servers = (guest.serve_tcp(80), guest.serve_udp(90), here.serve_tcp(81), here.serve_udp(53));
        let gateway = |ip: IpAddr| {
            if ip.is_ipv4() { "10.187.0.1".to_owned() } else { "[fda3:5b08:9c41::1]".to_owned() }
        };
        for ip in pod.ips() {
            let at = |port: u16| std::net::SocketAddr::new(ip, port).to_string();
            assert!(here.tcp(&at(80)).is_some(), "{ip}");
            assert!(here.udp(&at(90)).is_some(), "{ip}");
            assert!(here.ping(&ip.to_string()), "{ip}");
            let gateway = gateway(ip);
            assert!(guest.no_tcp(&format!("{gateway}:81")), "{ip}");
            assert!(guest.no_udp(&format!("{gateway}:53")), "{ip}");
            assert!(guest.no_ping(gateway.trim_matches(['[', ']'])), "{ip}");
        }
    });
}

/// A bulk of data, segmented and with checksums left to others, is what redirection must not break.
#[test]
fn streams_in_both_directions_are_whole() {
    on_a_local_node(async |node| {
        let networking = node.site.networking();
        let pod = networking.setup(policy("cluster")).await.unwrap();
        let guest = Machine::guest(&pod);
        let here = Machine::here();
        let ip = pod.ips().next().unwrap();
        for (server, client, to) in [(&guest, &here, ip), (&here, &guest, "10.187.0.1".parse().unwrap())] {
            let listener = server.inside(|| std::net::TcpListener::bind("0.0.0.0:0").unwrap());
            let to = (to, listener.local_addr().unwrap().port());
            let reader = std::thread::spawn(move || {
                let mut all = Vec::new();
                std::io::Read::read_to_end(&mut listener.accept().unwrap().0, &mut all).unwrap();
                all
            });
            let sent: Vec<u8> = (0..4_000_000_u32).map(|n| (n % 251) as u8).collect();
            let copy = sent.clone();
            client.inside(move || {
                std::io::Write::write_all(&mut TcpStream::connect(to).unwrap(), &copy).unwrap()
            });
            assert!(reader.join().unwrap() == sent);
        }
    });
}

type Zone = Arc<Mutex<BTreeMap<&'static str, Vec<Record>>>>;

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn at(owner: &str, ip: &str) -> Record {
    let rdata = match ip.parse().unwrap() {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    Record::from_rdata(name(owner), 1, rdata)
}

/// A name server that says of a name what its zone says, whatever type is asked for.
fn name_server(world: &Machine, zone: &Zone) -> [Server; 2] {
    ["192.0.2.53:53", "[2001:db8:2::53]:53"].map(|at| answering(world, at, Arc::clone(zone)))
}

fn answering(world: &Machine, at: &str, zone: Zone) -> Server {
    world.answer_udp(at, move |asked| {
        let asked = Message::from_vec(asked).ok()?;
        let question = asked.queries.first()?.clone();
        let mut answer = Message::response(asked.metadata.id, OpCode::Query);
        answer.add_answers(
            zone.lock().unwrap().get(question.name.to_ascii().as_str()).cloned().unwrap_or_default(),
        );
        answer.add_query(question);
        answer.to_vec().ok()
    })
}

/// Asks as a resolver does; how many records come back.
fn look_up(guest: &Machine, server: &str, asked: &str, patience: Duration) -> Option<usize> {
    let mut question = Message::query();
    question.add_query(Query::query(name(asked), RecordType::A));
    let said = guest.ask_udp(&format!("{server}:53"), question.to_vec().unwrap(), patience)?;
    Some(Message::from_vec(&said).unwrap().answers.len())
}

#[test]
fn a_name_opens_its_addresses_with_the_answer_and_not_before() {
    on_a_local_node(async |node| {
        let before = node.inventory();
        let networking = node.site.networking();
        let world = world();
        let zone = Zone::default();
        zone.lock().unwrap().extend([
            ("example.com.", vec![at("example.com.", "192.0.2.2"), at("example.com.", "2001:db8:2::2")]),
            ("evil.net.", vec![at("evil.net.", "192.0.2.3"), at("example.com.", "192.0.2.3")]),
            (
                "a.example.org.",
                vec![
                    Record::from_rdata(name("a.example.org."), 1, RData::CNAME(CNAME(name("cdn.net.")))),
                    at("cdn.net.", "192.0.2.3"),
                    at("other.net.", "192.0.2.1"),
                ],
            ),
        ]);
        let _servers = (name_server(&world, &zone), world.serve_tcp(80), Machine::here().serve_tcp(80));
        let _other = answering(&world, "192.0.2.54:53", Arc::clone(&zone));
        let pod = networking.setup(policy("example.com *.example.org")).await.unwrap();
        let guest = Machine::guest(&pod);

        assert!(guest.no_tcp("192.0.2.2:80"));
        assert_eq!(look_up(&guest, "192.0.2.53", "example.com.", PATIENCE), Some(2));
        assert!(guest.tcp("192.0.2.2:80").is_some() && guest.tcp("[2001:db8:2::2]:80").is_some());

        assert_eq!(
            look_up(&guest, "192.0.2.53", "evil.net.", PATIENCE),
            Some(2),
            "answers are never kept back"
        );
        assert!(guest.no_tcp("192.0.2.3:80"));
        assert_eq!(look_up(&guest, "[2001:db8:2::53]", "a.example.org.", PATIENCE), Some(3));
        assert!(guest.tcp("192.0.2.3:80").is_some(), "the name at the end of the aliases");
        assert!(guest.no_tcp("192.0.2.1:80"), "a name that was not asked for");

        assert_eq!(
            look_up(&guest, "192.0.2.54", "example.com.", SILENCE),
            None,
            "not one of the pod's name servers"
        );
        drop(guest);
        teardown(&networking).await;
        run("ip link del uplink");
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn a_connection_outlives_the_pin_that_opened_it_and_no_other_is_made() {
    on_a_local_node(async |node| {
        let networking = node.site.networking();
        let world = world();
        let zone = Zone::default();
        zone.lock().unwrap().insert("example.com.", vec![at("example.com.", "192.0.2.2")]);
        let _server = name_server(&world, &zone);
        let pod = networking.setup(policy("example.com")).await.unwrap();
        let guest = Machine::guest(&pod);
        assert_eq!(look_up(&guest, "192.0.2.53", "example.com.", PATIENCE), Some(1));
        let listener = world.inside(|| std::net::TcpListener::bind("0.0.0.0:80").unwrap());
        let mut stream = guest.inside(|| TcpStream::connect("192.0.2.2:80").unwrap());
        let mut other_end = listener.accept().unwrap().0;

        let netns = pod.netns.display();
        run(&format!(
            "nsenter --net={netns} nft delete element netdev a3s_box_egress pinned4 {{ 192.0.2.2 }}"
        ));
        assert!(guest.no_tcp("192.0.2.2:80"));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        other_end.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"still here").unwrap();
        other_end.read_exact(&mut [0; 10]).unwrap();
        other_end.write_all(b"so am I").unwrap();
        stream.read_exact(&mut [0; 7]).unwrap();
    });
}

#[test]
fn while_the_daemon_is_away_names_stay_as_they_were_and_the_next_one_goes_on() {
    on_a_local_node(async |node| {
        let world = world();
        let zone = Zone::default();
        zone.lock().unwrap().extend([
            ("example.com.", vec![at("example.com.", "192.0.2.2")]),
            ("b.example.com.", vec![at("b.example.com.", "192.0.2.3")]),
        ]);
        let _servers = (name_server(&world, &zone), world.serve_tcp(80));
        let networking = node.site.networking();
        let pod = networking.setup(policy("example.com *.example.com")).await.unwrap();
        let guest = Machine::guest(&pod);
        assert_eq!(look_up(&guest, "192.0.2.53", "example.com.", PATIENCE), Some(1));
        drop(networking);
        // The thread ends in its own time.
        wait_until(|| threads_in(&pod.netns) == 0);

        assert_eq!(look_up(&guest, "192.0.2.53", "b.example.com.", SILENCE), None);
        assert!(guest.tcp("192.0.2.2:80").is_some() && guest.no_tcp("192.0.2.3:80"));

        let networking = node.site.networking();
        networking.resume(&box_id(1)).await.unwrap();
        networking.resume(&box_id(1)).await.unwrap();
        assert_eq!(threads_in(&pod.netns), 1);
        // The tap's carrier is noticed in the background.
        wait_until(|| look_up(&guest, "192.0.2.53", "b.example.com.", SILENCE) == Some(1));
        assert!(guest.tcp("192.0.2.3:80").is_some());

        let netns = fs::File::open(&pod.netns).unwrap();
        drop(guest);
        teardown(&networking).await;
        assert_eq!(threads_of(&netns), 0, "nothing keeps the namespace alive");
        networking.resume(&box_id(1)).await.unwrap();
    });
}

fn wait_until(mut reached: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !reached() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn threads_in(netns: &std::path::Path) -> usize {
    threads_of(&fs::File::open(netns).unwrap())
}

/// How many threads of this process are in a namespace.
fn threads_of(netns: &fs::File) -> usize {
    use std::os::unix::fs::MetadataExt;
    let inode = netns.metadata().unwrap().ino();
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    tasks.filter(|task| fs::metadata(task.path().join("ns/net")).is_ok_and(|ns| ns.ino() == inode)).count()
}

#[test]
fn a_policy_that_cannot_be_enforced_stops_the_pod_and_leaves_nothing() {
    on_a_local_node(async |mut node| {
        let before = node.inventory();
        let mut nameless = policy("example.com");
        nameless.dns = Some(DnsSpec::default());
        let error = node.site.networking().setup(nameless).await.unwrap_err();
        assert!(matches!(&error.cause, SetupFailure::Egress(_)), "{}", chain(&error));
        assert!(chain(&error).contains("no name server"), "{}", chain(&error));
        // An nft that refuses what has to do with egress only.
        let nft = node.site.path("nft");
        let script = "#!/bin/sh\nread -r first\nrest=$(cat)\ncase $first in\n*a3s_box_egress*) echo 'Error: no fwd' >&2; exit 1 ;;\nesac\n\
                      printf '%s\\n%s\\n' \"$first\" \"$rest\" | exec nft -f -\n";
        fs::write(&nft, script).unwrap();
        fs::set_permissions(&nft, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        node.site.config.local.nft = nft;
        let networking = node.site.networking();
        let error = networking.setup(policy("10.0.0.0/8 example.com")).await.unwrap_err();
        let text = chain(&error);
        assert!(
            text.contains("NFT_FWD_NETDEV") && text.contains("package nftables") && text.contains("no fwd"),
            "{text}"
        );
        assert_eq!((error.left_behind.len(), node.inventory()), (0, before));
    });
}
