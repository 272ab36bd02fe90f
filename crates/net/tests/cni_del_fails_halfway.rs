//! Teardowns that cannot finish: all that can be undone is, the rest is reported and can be tried again.

mod common;

use std::fs;

use a3s_box_core::spec::{PortMapping, PortProtocol};
use a3s_box_net::cni::PluginError;
use a3s_box_net::{SetupRequest, TeardownError, TeardownRequest};
use common::{Node, SetUp, box_id, on_a_node, request, run};

const PASSES: &str = "[ $CNI_COMMAND = DEL ] || previous";
const FAILS_AT_DEL: &str = r#"if [ $CNI_COMMAND = DEL ]; then echo '{ "code": 11, "msg": "agent is not running" }'; exit 1; fi
    previous"#;

/// A network with a bridge between two plugins that can be made to fail.
fn network(node: &Node) {
    node.bridge_network("1.0.0", r#""ipMasq": true,"#, r#", { "type": "second" }, { "type": "third" }"#);
    node.site.plugin("second", PASSES);
    node.site.plugin("third", PASSES);
}

/// What is there when one pod has come and gone: the bridge, for one.
async fn baseline(node: &Node) -> common::Inventory {
    let networking = node.site.networking();
    networking.setup(request(9)).await.unwrap();
    assert!(networking.teardown(TeardownRequest::of(box_id(9))).await.is_empty());
    node.site.forget_calls();
    node.inventory()
}

#[test]
fn whichever_plugin_fails_the_others_are_called_and_a_retry_finishes() {
    on_a_node(async |node| {
        network(&node);
        let before = baseline(&node).await;
        for failing in ["second", "third"] {
            network(&node);
            let networking = node.site.networking();
            networking.setup(request(1)).await.unwrap();
            node.site.plugin(failing, FAILS_AT_DEL);
            node.site.forget_calls();
            let errors = networking.teardown(TeardownRequest::of(box_id(1))).await;
            let [TeardownError::Plugin(error @ PluginError::Refused { .. })] = errors.as_slice() else {
                panic!("{errors:?}")
            };
            assert!(
                error.to_string().contains(failing) && error.to_string().contains("agent is not running"),
                "{error}"
            );
            assert_eq!(node.site.calls(), ["DEL third", "DEL second"]);
            // The bridge plugin was called after them: its link, rules and addresses are gone already.
            let left = node.inventory();
            assert_eq!(
                (&left.links, &left.allocations, &left.firewall),
                (&before.links, &before.allocations, &before.firewall)
            );
            assert_eq!((left.namespaces.len(), left.records.len()), (1, 1), "kept for the retry");

            node.site.plugin(failing, PASSES);
            // A daemon that was started anew does it as well.
            assert!(node.site.networking().teardown(TeardownRequest::of(box_id(1))).await.is_empty());
            assert_eq!(node.inventory(), before);
        }
    });
}

#[test]
fn a_box_that_is_given_up_leaves_nothing_of_ours_and_says_what_the_plugin_did_not_do() {
    on_a_node(async |node| {
        network(&node);
        let before = baseline(&node).await;
        let networking = node.site.networking();
        networking.setup(request(1)).await.unwrap();
        node.site.plugin("third", FAILS_AT_DEL);
        let errors =
            networking.teardown(TeardownRequest { abandon: true, ..TeardownRequest::of(box_id(1)) }).await;
        assert!(matches!(errors.as_slice(), [TeardownError::Plugin(_)]), "{errors:?}");
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn a_namespace_that_was_removed_by_hand_does_not_keep_the_rest_from_being_released() {
    on_a_node(async |node| {
        network(&node);
        let before = baseline(&node).await;
        let networking = node.site.networking();
        // Unmounted and removed; only unmounted, so that a plain file lies there.
        for remove_file in [true, false] {
            let pod = networking.setup(request(1)).await.unwrap();
            run(&format!("umount {}", pod.netns.display()));
            if remove_file {
                fs::remove_file(&pod.netns).unwrap();
            }
            assert_eq!(networking.existing(&box_id(1)).await.unwrap(), None);
            let errors = networking.teardown(TeardownRequest::of(box_id(1))).await;
            assert!(errors.is_empty(), "{errors:?}");
            assert_eq!(node.site.env("third", "DEL")["CNI_NETNS"], "");
            let after = node.inventory();
            assert_eq!(after.allocations, before.allocations);
            assert_eq!((after.namespaces.len(), after.records.len()), (0, 0));
        }
    });
}

#[test]
fn del_undoes_what_add_did_even_if_the_network_has_been_reconfigured_since() {
    on_a_node(async |node| {
        network(&node);
        let before = baseline(&node).await;
        node.site.networking().setup(request(1)).await.unwrap();
        fs::remove_dir_all(&node.site.config.conf_dir).unwrap();
        assert!(node.site.networking().teardown(TeardownRequest::of(box_id(1))).await.is_empty());
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn a_damaged_record_does_not_keep_the_pod_from_being_undone() {
    on_a_node(async |node| {
        network(&node);
        let before = baseline(&node).await;
        let networking = node.site.networking();
        networking.setup(request(1)).await.unwrap();
        let record = node.site.config.cache_dir.join(format!("{}.json", box_id(1)));
        fs::write(&record, &fs::read(&record).unwrap()[..100]).unwrap();
        let errors = networking.teardown(TeardownRequest::of(box_id(1))).await;
        assert!(errors.is_empty(), "{errors:?}");
        assert_eq!(node.inventory(), before);
    });
}

/// portmap's DEL without a port answers success and removes nothing, so that the next pod with the same host port was never
/// reached; plugins like firewall's do so without the addresses that ADD gave.
#[test]
fn a_damaged_record_leaves_no_published_port_and_plugins_still_learn_the_pods_addresses() {
    on_a_node(async |node| {
        let more =
            r#", { "type": "noting" }, { "type": "portmap", "capabilities": { "portMappings": true } }"#;
        node.bridge_network("1.0.0", "", more);
        node.site.plugin("noting", PASSES);
        let publishing = |n| {
            let port = PortMapping {
                protocol: PortProtocol::Tcp,
                container_port: 80,
                host_port: 8080,
                host_ip: String::new(),
            };
            SetupRequest { port_mappings: vec![port], ..request(n) }
        };
        let networking = node.site.networking();
        // The plugin's own chains stay.
        networking.setup(publishing(9)).await.unwrap();
        assert!(networking.teardown(TeardownRequest::of(box_id(9))).await.is_empty());
        let before = node.inventory();

        let pod = networking.setup(publishing(1)).await.unwrap();
        assert!(node.inventory().firewall.len() > before.firewall.len(), "the port is published");
        let record = node.site.config.cache_dir.join(format!("{}.json", box_id(1)));
        fs::write(&record, &fs::read(&record).unwrap()[..100]).unwrap();
        let request = TeardownRequest { known: Some(pod.clone()), ..TeardownRequest::of(box_id(1)) };
        let errors = networking.teardown(request).await;
        assert!(errors.is_empty(), "{errors:?}");
        assert_eq!(node.inventory(), before);
        let told = node.site.stdin("noting", "DEL");
        let ips: Vec<_> =
            told["prevResult"]["ips"].as_array().unwrap().iter().map(|ip| ip["address"].clone()).collect();
        let expected: Vec<_> =
            pod.interfaces[0].addresses.iter().map(|address| address.to_string()).collect();
        assert_eq!(ips, expected);
        assert_eq!(told["prevResult"]["interfaces"][0]["name"], "eth0");
    });
}

#[test]
fn a_record_of_a_newer_version_is_left_to_that_version() {
    on_a_node(async |node| {
        network(&node);
        let networking = node.site.networking();
        networking.setup(request(1)).await.unwrap();
        let record = node.site.config.cache_dir.join(format!("{}.json", box_id(1)));
        fs::write(&record, "{\"schema\":7}").unwrap();
        node.site.forget_calls();
        let errors = networking.teardown(TeardownRequest::of(box_id(1))).await;
        assert!(matches!(errors.as_slice(), [TeardownError::Record(_)]), "{errors:?}");
        assert_eq!(node.site.calls(), [""; 0]);
        assert!(record.exists());
    });
}
