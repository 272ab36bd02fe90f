//! The node's addresses become its CNI configuration, where there is a template and nothing else.

mod common;

use std::fs;
use std::path::PathBuf;

use a3s_box_core::network::Address;
use a3s_box_net::cni::conf;
use a3s_box_net::{AssignError, NetworkStatus};
use common::{SetUp, Site, chain, on_a_node, request};

const TEMPLATE: &str = r#"{ "cniVersion": "1.0.0", "name": "kubenet", "plugins": [{ "type": "bridge", "bridge": "br-test", "isGateway": true,
    "ipam": { "type": "host-local", "dataDir": "IPAM",
        "ranges": [{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{ "subnet": "{{$range}}" }]{{end}}],
        "routes": [{{range $i, $route := .Routes}}{{if $i}}, {{end}}{ "dst": "{{$route}}" }{{end}}] } }] }"#;

fn cidrs(texts: &[&str]) -> Vec<Address> {
    let cidr = |text: &&str| {
        let (ip, prefix) = text.split_once('/').unwrap();
        Address { ip: ip.parse().unwrap(), prefix: prefix.parse().unwrap() }
    };
    texts.iter().map(cidr).collect()
}

fn with_template(site: &mut Site, text: &str) {
    let path = site.path("template");
    fs::write(&path, text.replace("IPAM", site.path("ipam").to_str().unwrap())).unwrap();
    site.config.conf_template = Some(path);
}

fn made(site: &Site) -> PathBuf {
    site.path("net.d/10-a3s-box.conflist")
}

#[test]
fn a_node_without_a_network_gets_one_and_pods_have_its_addresses() {
    on_a_node(async |mut node| {
        with_template(&mut node.site, TEMPLATE);
        // Nobody has made it yet.
        fs::remove_dir(&node.site.config.conf_dir).unwrap();
        let networking = node.site.networking();
        assert!(matches!(networking.status().await, NetworkStatus::NotReady { .. }));
        networking.assign_pod_cidrs(&cidrs(&["10.88.9.0/24", "fd00:99::/64"])).await.unwrap();
        assert!(
            matches!(networking.status().await, NetworkStatus::Ready { detail } if detail.contains("kubenet"))
        );
        let pod = networking.setup(request(1)).await.unwrap();
        let ips: Vec<_> = pod.ips().map(|ip| ip.to_string()).collect();
        assert_eq!(ips, ["10.88.9.2", "fd00:99::2"]);
        assert!(networking.teardown(a3s_box_net::TeardownRequest::of(common::box_id(1))).await.is_empty());
    });
}

#[tokio::test]
async fn other_addresses_replace_what_was_made_and_a_foreign_network_is_left_alone() {
    let mut site = Site::new();
    with_template(&mut site, TEMPLATE);
    let networking = site.networking();
    for range in ["10.1.0.0/24", "10.2.0.0/24"] {
        networking.assign_pod_cidrs(&cidrs(&[range])).await.unwrap();
        assert!(fs::read_to_string(made(&site)).unwrap().contains(range));
    }
    for foreign in [r#"{ "cniVersion": "1.0.0", "name": "n", "plugins": [{ "type": "x" }] }"#, "broken"] {
        fs::remove_file(made(&site)).unwrap();
        fs::write(site.path("net.d/99-addon.conflist"), foreign).unwrap();
        networking.assign_pod_cidrs(&cidrs(&["10.3.0.0/24"])).await.unwrap();
        assert!(!made(&site).exists());
        fs::remove_file(site.path("net.d/99-addon.conflist")).unwrap();
        networking.assign_pod_cidrs(&cidrs(&["10.3.0.0/24"])).await.unwrap();
        assert!(made(&site).exists());
    }
}

#[tokio::test]
async fn a_template_that_makes_no_network_is_told_and_nothing_is_written() {
    let mut site = Site::new();
    let told = cidrs(&["10.1.0.0/24"]);
    for (template, expected) in [
        ("{{.Subnet}}", "line 1: {{.Subnet}} is not understood"),
        ("{ \"cniVersion\": {{.PodCIDR}} }", "is not valid JSON"),
        ("{ \"cniVersion\": \"1.0.0\", \"name\": \"n\", \"plugins\": [] }", "`plugins` must be a list"),
    ] {
        with_template(&mut site, template);
        let error = site.networking().assign_pod_cidrs(&told).await.unwrap_err();
        assert!(
            chain(&error).contains(expected) && chain(&error).contains("correct the template"),
            "{}",
            chain(&error)
        );
    }
    site.config.conf_template = Some(site.path("missing"));
    let error = site.networking().assign_pod_cidrs(&told).await.unwrap_err();
    assert!(matches!(error, AssignError::Unreadable { .. }), "{error:?}");
    assert_eq!(fs::read_dir(&site.config.conf_dir).unwrap().count(), 0);
}

#[test]
fn plugins_that_ask_for_ranges_get_them_also_from_a_daemon_that_was_not_told() {
    on_a_node(async |node| {
        node.site.networking().assign_pod_cidrs(&cidrs(&["10.88.6.0/24"])).await.unwrap();
        assert!(conf::first(&node.site.config.conf_dir).is_err(), "without a template nothing is written");
        node.site.conflist(&format!(
            r#"{{ "cniVersion": "1.0.0", "name": "test", "plugins": [{{ "type": "bridge", "bridge": "br-test",
                "capabilities": {{ "ipRanges": true }}, "ipam": {{ "type": "host-local", "dataDir": "{}" }} }}] }}"#,
            node.site.path("ipam").display()
        ));
        let networking = node.site.networking();
        let pod = networking.setup(request(1)).await.unwrap();
        assert_eq!(pod.ips().map(|ip| ip.to_string()).collect::<Vec<_>>(), ["10.88.6.2"]);
        assert!(networking.teardown(a3s_box_net::TeardownRequest::of(common::box_id(1))).await.is_empty());
    });
}
