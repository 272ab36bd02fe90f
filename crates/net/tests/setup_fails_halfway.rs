//! A set-up that fails at each point in turn: the error says where, and nothing is left.

mod common;

use std::fs;

use a3s_box_net::cni::{AddError, ConfError, PluginError};
use a3s_box_net::{AttachError, NetworkStatus, RecordError, SetupFailure, TeardownError, TeardownRequest};
use common::{Failed, Node, SetUp, box_id, chain, on_a_node, request, run};
use nix::mount::{MsFlags, mount};

/// A plugin that hands on the result of the one before it, until it is told otherwise.
const PASSES: &str = "[ $CNI_COMMAND = DEL ] || previous";

async fn fails(node: &Node) -> Failed {
    let error = node.site.networking().setup(request(1)).await.unwrap_err();
    assert!(error.left_behind.is_empty(), "{:?}", error.left_behind);
    error
}

/// The bridge is the network's, not the pod's: it stays, and is no leak.
fn assert_clean(node: &Node, before: &common::Inventory) {
    if run("ip -o link").contains("br-test") {
        run("ip link del br-test");
    }
    assert_eq!(&node.inventory(), before);
}

#[test]
fn every_plugin_of_the_chain_may_fail_or_answer_nonsense() {
    on_a_node(async |node| {
        let before = node.inventory();
        let extra = r#", { "type": "middle" }, { "type": "portmap", "capabilities": { "portMappings": true } }, { "type": "last" }"#;
        node.bridge_network("1.0.0", r#""ipMasq": true,"#, extra);
        let failures = [
            r#"[ $CNI_COMMAND = DEL ] || { echo '{ "code": 100, "msg": "not today" }'; exit 1; }"#,
            "[ $CNI_COMMAND = DEL ] || echo nonsense",
            r#"[ $CNI_COMMAND = DEL ] || echo '{ "cniVersion": "1.0.0" }'"#,
        ];
        for plugin in ["middle", "last"] {
            for does in failures {
                node.site.plugin("middle", PASSES);
                node.site.plugin("last", PASSES);
                node.site.plugin(plugin, does);
                node.site.forget_calls();
                let error = fails(&node).await;
                assert!(matches!(error.cause, SetupFailure::Cni(_)), "{}", chain(&error));
                let calls = node.site.calls();
                assert!(calls.ends_with(&["DEL last".to_owned(), "DEL middle".to_owned()]), "{calls:?}");
                assert_clean(&node, &before);
            }
        }
    });
}

#[test]
fn addresses_that_are_all_taken_are_told_in_the_plugins_words() {
    on_a_node(async |node| {
        node.bridge_network("1.0.0", "", "");
        let path = node.site.path("net.d/10-test.conflist");
        let small = fs::read_to_string(&path).unwrap().replace("10.88.7.0/24", "10.88.7.0/30");
        fs::write(&path, small).unwrap();
        let networking = node.site.networking();
        networking.setup(request(9)).await.unwrap();
        let before = node.inventory();
        // The network has two addresses: the gateway's and that of the first pod.
        let error = fails(&node).await;
        assert!(
            chain(&error).contains("no IP addresses available in range set: 10.88.7.1-10.88.7.2"),
            "{}",
            chain(&error)
        );
        assert_eq!(node.inventory(), before);
        assert!(networking.teardown(TeardownRequest::of(box_id(9))).await.is_empty());
        networking.setup(request(1)).await.unwrap();
        assert!(networking.teardown(TeardownRequest::of(box_id(1))).await.is_empty());
    });
}

#[test]
fn a_result_that_lies_about_interfaces_fails_the_last_metre() {
    on_a_node(async |node| {
        let before = node.inventory();
        node.bridge_network("1.0.0", "", r#", { "type": "liar" }"#);
        node.site.plugin("liar", r#"[ $CNI_COMMAND = DEL ] || echo '{ "interfaces": [{ "name": "net7", "sandbox": "/x" }], "ips": [{ "address": "10.88.7.9/24", "interface": 0 }] }'"#);
        let error = fails(&node).await;
        assert!(
            matches!(&error.cause, SetupFailure::Attach(AttachError::Missing { interface }) if interface == "net7"),
            "{}",
            chain(&error)
        );
        assert_clean(&node, &before);
    });
}

#[test]
fn a_host_without_the_tun_driver_is_told_so() {
    on_a_node(async |node| {
        let before = node.inventory();
        node.bridge_network("1.0.0", "", "");
        mount(Some("tmpfs"), "/dev/net", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let error = fails(&node).await;
        assert!(matches!(&error.cause, SetupFailure::Attach(AttachError::Tap { .. })), "{}", chain(&error));
        assert!(chain(&error).contains("/dev/net/tun"));
        assert_clean(&node, &before);
    });
}

#[test]
fn no_namespace_directory_and_no_record_directory_fail_before_any_plugin_runs() {
    on_a_node(async |mut node| {
        node.site.conflist(r#"{ "cniVersion": "1.0.0", "name": "test", "plugins": [{ "type": "middle" }] }"#);
        node.site.plugin("middle", PASSES);
        fs::write(node.site.path("file"), "").unwrap();
        let good = node.site.config.clone();

        node.site.config.cache_dir = node.site.path("file/cache");
        let error = node.site.networking().setup(request(1)).await.unwrap_err();
        assert!(
            matches!(&error.cause, SetupFailure::Stale { .. } | SetupFailure::Record(RecordError::Io { .. })),
            "{error:?}"
        );

        node.site.config = good.clone();
        node.site.config.netns_dir = node.site.path("file/netns");
        let error = node.site.networking().setup(request(1)).await.unwrap_err();
        assert!(matches!(&error.cause, SetupFailure::Netns(_)), "{}", chain(&error));
        assert!(chain(&error).contains("file/netns"), "{}", chain(&error));
        assert!(!node.site.calls().iter().any(|call| call.starts_with("ADD")), "{:?}", node.site.calls());
    });
}

#[test]
fn what_is_missing_is_found_before_anything_is_made() {
    on_a_node(async |node| {
        let before = node.inventory();
        let error = fails(&node).await;
        assert!(
            matches!(&error.cause, SetupFailure::Configuration(ConfError::Missing { .. })),
            "{}",
            chain(&error)
        );
        node.site.conflist(r#"{ "cniVersion": "1.0.0", "name": "test", "plugins": [{ "type": "bridge", "ipam": { "type": "gone" } }] }"#);
        let error = fails(&node).await;
        assert!(
            matches!(&error.cause, SetupFailure::Plugins(PluginError::NotFound { .. })),
            "{}",
            chain(&error)
        );
        assert!(matches!(node.site.networking().status().await, NetworkStatus::NotReady { .. }));
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn a_plugin_that_fails_at_add_and_at_del_is_reported_twice_and_owed_a_teardown() {
    on_a_node(async |node| {
        let before = node.inventory();
        node.bridge_network("1.0.0", "", r#", { "type": "last" }"#);
        node.site.plugin("last", "echo broken >&2; exit 1");
        let networking = node.site.networking();
        let error = networking.setup(request(1)).await.unwrap_err();
        assert!(matches!(&error.cause, SetupFailure::Cni(AddError::Plugin { .. })), "{}", chain(&error));
        assert!(matches!(error.left_behind.as_slice(), [TeardownError::Plugin(PluginError::Failed { .. })]));
        assert_eq!(networking.held().await.unwrap(), [box_id(1)]);

        node.site.plugin("last", "true");
        assert!(networking.teardown(TeardownRequest::of(box_id(1))).await.is_empty());
        assert_clean(&node, &before);
    });
}
