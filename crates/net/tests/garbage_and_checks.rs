//! GC tells plugins exactly what is still held, and never runs beside ADD or DEL; CHECK repeats what ADD was told.

mod common;

use std::fs;
use std::time::{Duration, Instant};

use a3s_box_net::{CheckError, GcError, PodNetworking, TeardownRequest};
use common::{Node, SetUp, Site, box_id, on_a_node, request};
use serde_json::{Value, json};

/// Hands the result on, and says yes to everything else.
const PASSES: &str = "[ $CNI_COMMAND != ADD ] || previous";

/// A bridge, and a plugin behind it that notes what it is told.
fn network(node: &Node, version: &str, more: &str) {
    node.bridge_network("1.0.0", "", r#", { "type": "noting" }"#);
    let path = node.site.path("net.d/10-test.conflist");
    let text = fs::read_to_string(&path).unwrap();
    let head = format!(r#""cniVersion": "{version}", {more}"#);
    fs::write(&path, text.replacen(r#""cniVersion": "1.0.0","#, &head, 1)).unwrap();
    node.site.plugin("noting", PASSES);
}

/// The real bridge plugin may be older than 1.1.0, and refuses what it does not know.
const BRIDGE: &str = r#"case $CNI_COMMAND in ADD|DEL)
    printf %s "$read_all" | sed 's/"cniVersion":"1.1.0"/"cniVersion":"1.0.0"/g' | /usr/lib/cni/bridge;; esac"#;

/// A network of fakes that knows all commands; no real plugin here does.
fn fakes(site: &Site, more: &str) {
    site.plugin("first", PASSES);
    site.plugin("second", PASSES);
    site.conflist(&format!(
        r#"{{ "cniVersion": "1.1.0", {more} "name": "test", "plugins": [{{ "type": "first" }}, {{ "type": "second" }}] }}"#
    ));
}

/// The record of a box, as an instance with its records in `cache` has it.
fn record(site: &Site, cache: &str, n: u8, connection: &Value) {
    let id = box_id(n);
    let record = json!({ "schema": 1, "netns": "/n", "connection": connection, "network": null });
    fs::create_dir_all(site.path(cache)).unwrap();
    fs::write(site.path(cache).join(format!("{id}.json")), record.to_string()).unwrap();
}

fn connected_to(network: &str, n: u8) -> Value {
    let id = box_id(n);
    json!({
        "list": { "name": network, "version": "1.1.0", "plugins": [], "source": "/c" },
        "attachment": { "container_id": id, "netns": "/n", "interface": "eth0", "args": "", "capabilities": {} },
        "result": null,
    })
}

fn valid(ids: &[u8]) -> Value {
    let mut ids: Vec<String> = ids.iter().map(|n| box_id(*n).to_string()).collect();
    ids.sort();
    ids.into_iter().map(|id| json!({ "containerID": id, "ifname": "eth0" })).collect()
}

#[tokio::test]
async fn a_collection_names_what_this_and_other_instances_hold_of_the_network() {
    let site = Site::new();
    fakes(&site, "");
    record(&site, "cache", 1, &connected_to("test", 1));
    record(&site, "cache", 2, &connected_to("another", 2));
    record(&site, "cache", 3, &Value::Null);
    record(&site, "others/run-1/cni", 4, &connected_to("test", 4));
    record(&site, "others/run-2/cni", 5, &connected_to("another", 5));
    fs::create_dir_all(site.path("others/run-3")).unwrap();
    // It may be of this network: taking its address away would be worse than leaving it.
    record(&site, "cache", 6, &json!("torn"));

    site.networking().collect_garbage().await.unwrap();
    assert_eq!(site.calls(), ["GC first", "GC second"]);
    for plugin in ["first", "second"] {
        let stdin = site.stdin(plugin, "GC");
        assert_eq!(stdin["cni.dev/valid-attachments"], valid(&[1, 4, 6]));
        assert_eq!(stdin["cni.dev/attachments"], valid(&[1, 4, 6]));
        assert_eq!((&stdin["name"], &stdin["cniVersion"]), (&json!("test"), &json!("1.1.0")));
        assert_eq!(site.env(plugin, "GC").keys().collect::<Vec<_>>(), ["CNI_COMMAND", "CNI_PATH"]);
    }
}

#[tokio::test]
async fn all_plugins_collect_whatever_the_others_say() {
    let site = Site::new();
    fakes(&site, "");
    site.plugin("first", r#"echo '{ "code": 11, "msg": "database is locked" }'; exit 1"#);
    let error = site.networking().collect_garbage().await.unwrap_err();
    assert!(matches!(&error, GcError::Plugins { errors, .. } if errors.len() == 1), "{error:?}");
    assert!(error.to_string().contains("\"first\" GC failed: database is locked"), "{error}");
    assert_eq!(site.calls(), ["GC first", "GC second"]);
    assert_eq!(site.stdin("second", "GC")["cni.dev/valid-attachments"], json!([]));
}

#[tokio::test]
async fn nothing_is_collected_where_the_network_does_not_want_it_or_nobody_knows_what_is_held() {
    let site = Site::new();
    site.networking().collect_garbage().await.unwrap();
    for switch in ["true", "\"true\""] {
        fakes(&site, &format!(r#""disableGC": {switch},"#));
        site.networking().collect_garbage().await.unwrap();
    }
    site.conflist(r#"{ "cniVersion": "1.0.0", "name": "test", "plugins": [{ "type": "first" }] }"#);
    site.networking().collect_garbage().await.unwrap();
    fakes(&site, "");
    fs::write(site.path("cache"), "no directory").unwrap();
    let error = site.networking().collect_garbage().await.unwrap_err();
    assert!(matches!(error, GcError::Records(_)), "{error:?}");
    assert_eq!(site.calls(), [""; 0]);
}

/// Lets go of it when the file `go` is there.
const STUCK: &str = r#"[ $CNI_COMMAND = ADD ] && previous
    if [ $CNI_COMMAND = $(cat "$0.stuck_at") ]; then while [ ! -e "$0.go" ]; do sleep 0.05; done; fi"#;

async fn until_called(site: &Site, call: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !site.calls().iter().any(|called| called == call) {
        assert!(Instant::now() < deadline, "{:?}", site.calls());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn collect(networking: &PodNetworking) -> tokio::task::JoinHandle<Result<(), GcError>> {
    let networking = networking.clone();
    tokio::spawn(async move { networking.collect_garbage().await })
}

/// A network that knows GC, with a plugin that is stuck at this command until `bin/noting.go` is there.
fn stuck_network(node: &Node, command: &str) {
    network(node, "1.1.0", "");
    node.site.plugin("bridge", BRIDGE);
    node.site.plugin("noting", STUCK);
    fs::write(node.site.path("bin/noting.stuck_at"), command).unwrap();
}

#[test]
fn a_teardown_that_is_stuck_holds_up_the_collection_and_no_other_pod() {
    on_a_node(async |node| {
        stuck_network(&node, "DEL");
        let networking = node.site.networking();
        networking.setup(request(1)).await.unwrap();
        let stuck = {
            let networking = networking.clone();
            tokio::spawn(async move { networking.teardown(TeardownRequest::of(box_id(1))).await })
        };
        until_called(&node.site, "DEL noting").await;
        let collecting = collect(&networking);
        // Long enough for the collection to have tried.
        tokio::time::sleep(Duration::from_secs(1)).await;
        tokio::time::timeout(Duration::from_secs(10), networking.setup(request(2))).await.unwrap().unwrap();
        assert!(!node.site.calls().iter().any(|call| call.starts_with("GC")), "{:?}", node.site.calls());

        fs::write(node.site.path("bin/noting.go"), "").unwrap();
        assert!(stuck.await.unwrap().is_empty());
        tokio::time::timeout(Duration::from_secs(10), collecting).await.unwrap().unwrap().unwrap();
        let told = node.site.stdin("noting", "GC")["cni.dev/valid-attachments"].clone();
        assert_eq!(told, valid(&[2]));
        assert!(networking.teardown(TeardownRequest::of(box_id(2))).await.is_empty());
    });
}

#[test]
fn pods_wait_while_a_collection_runs_also_those_of_another_instance() {
    on_a_node(async |node| {
        stuck_network(&node, "GC");
        let collecting = collect(&node.site.networking());
        until_called(&node.site, "GC noting").await;
        let other = node.site.networking();
        let setup = tokio::spawn(async move { (other.setup(request(1)).await, other) });
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(!node.site.calls().iter().any(|call| call == "ADD noting"), "{:?}", node.site.calls());
        fs::write(node.site.path("bin/noting.go"), "").unwrap();
        collecting.await.unwrap().unwrap();
        let (connected, other) = setup.await.unwrap();
        connected.unwrap();
        assert!(other.teardown(TeardownRequest::of(box_id(1))).await.is_empty());
    });
}

#[test]
fn a_check_repeats_what_add_was_told_with_its_result() {
    on_a_node(async |node| {
        for version in ["0.4.0", "1.0.0"] {
            network(&node, version, "");
            node.site.forget_calls();
            let networking = node.site.networking();
            networking.setup(request(1)).await.unwrap();
            // A daemon that has just started; the real bridge plugin finds its interface as it left it.
            node.site.networking().check(&box_id(1)).await.unwrap();
            assert_eq!(node.site.calls(), ["ADD noting", "CHECK noting"]);
            let (add, check) = (node.site.stdin("noting", "ADD"), node.site.stdin("noting", "CHECK"));
            assert_eq!(check["prevResult"]["ips"], add["prevResult"]["ips"]);
            assert_eq!(check["cniVersion"], version);
            let env = |command: &str| {
                let mut env = node.site.env("noting", command);
                env.remove("CNI_COMMAND");
                env
            };
            assert_eq!(env("CHECK"), env("ADD"));
            assert!(networking.teardown(TeardownRequest::of(box_id(1))).await.is_empty());
        }
    });
}

#[test]
fn a_network_that_somebody_took_apart_is_told_in_the_plugins_words_and_still_torn_down() {
    on_a_node(async |node| {
        network(&node, "1.0.0", "");
        let networking = node.site.networking();
        let pod = networking.setup(request(1)).await.unwrap();
        common::run(&format!("nsenter --net={} ip addr flush dev eth0", pod.netns.display()));
        let error = networking.check(&box_id(1)).await.unwrap_err();
        assert!(
            matches!(&error, CheckError::Plugin(_)) && error.to_string().contains("\"bridge\" CHECK"),
            "{error}"
        );
        assert!(!node.site.calls().contains(&"CHECK noting".to_owned()), "the first error ends it");
        assert!(networking.teardown(TeardownRequest::of(box_id(1))).await.is_empty());
    });
}

#[test]
fn what_cannot_be_checked_is_in_order() {
    on_a_node(async |node| {
        let networking = node.site.networking();
        networking.check(&box_id(1)).await.unwrap();
        for (version, more) in [("0.3.1", ""), ("1.0.0", r#""disableCheck": true,"#)] {
            network(&node, version, more);
            networking.setup(request(1)).await.unwrap();
            networking.check(&box_id(1)).await.unwrap();
            assert!(networking.teardown(TeardownRequest::of(box_id(1))).await.is_empty());
        }
        assert!(!node.site.calls().iter().any(|call| call.starts_with("CHECK")), "{:?}", node.site.calls());
    });
}

/// Debian's portmap says of every pod with a published port, right after it has connected it, that something is wrong.
#[test]
fn a_plugin_whose_check_proves_nothing_is_not_asked() {
    on_a_node(async |node| {
        node.bridge_network("1.0.0", "", r#", { "type": "portmap" }"#);
        let fails_at_check = |versions: &str| {
            format!(
                r#"case $CNI_COMMAND in
                    VERSION) echo '{{ "cniVersion": "1.0.0", "supportedVersions": [{versions}] }}';;
                    ADD) previous;;
                    CHECK) echo '{{ "code": 99, "msg": "could not check ipv6 dnat" }}'; exit 1;;
                esac"#
            )
        };
        node.site.plugin("portmap", &fails_at_check(r#""0.4.0", "1.0.0""#));
        let networking = node.site.networking();
        networking.setup(request(1)).await.unwrap();
        networking.check(&box_id(1)).await.unwrap();
        assert!(!node.site.calls().contains(&"CHECK portmap".to_owned()), "{:?}", node.site.calls());
        // Later ones are right.
        node.site.plugin("portmap", &fails_at_check(r#""1.0.0", "1.1.0""#));
        let error = networking.check(&box_id(1)).await.unwrap_err();
        assert!(error.to_string().contains("could not check"), "{error}");
        assert!(networking.teardown(TeardownRequest::of(box_id(1))).await.is_empty());
    });
}
