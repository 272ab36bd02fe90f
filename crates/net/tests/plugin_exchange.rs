//! What plugins are told and in which order they are called.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use a3s_box_core::bandwidth::{EGRESS, INGRESS};
use a3s_box_core::spec::{DnsSpec, PortMapping, PortProtocol};
use a3s_box_net::cni::request::Offer;
use a3s_box_net::cni::{Attachment, Chain, NetworkList, conf};
use serde_json::json;

use common::{Site, box_id, request};

const FIRST: &str = r#"[ $CNI_COMMAND = DEL ] || cat <<X
{ "cniVersion": "1.0.0", "interfaces": [{ "name": "eth0", "sandbox": "$CNI_NETNS" }], "vendor": { "kept": true },
  "ips": [{ "address": "10.0.0.2/24", "gateway": "10.0.0.1", "interface": 0 }] }
X"#;

/// Hands the previous result on, as chained plugins do.
const SECOND: &str = "[ $CNI_COMMAND = DEL ] || previous";

fn site(version: &str) -> (Site, NetworkList) {
    let site = Site::new();
    site.plugin("first", FIRST);
    site.plugin("second", SECOND);
    site.conflist(&format!(
        r#"{{ "cniVersion": "{version}", "name": "test", "plugins": [
            {{ "type": "first", "mine": 1, "capabilities": {{ "portMappings": true, "dns": false }} }},
            {{ "type": "second", "capabilities": {{ "dns": true, "io.kubernetes.cri.pod-annotations": true }} }} ] }}"#
    ));
    let list = conf::discover(&site.config.conf_dir).unwrap();
    (site, list)
}

fn attachment() -> Attachment {
    let port = PortMapping {
        protocol: PortProtocol::Tcp,
        container_port: 80,
        host_port: 8080,
        host_ip: "127.0.0.1".into(),
    };
    let dns = DnsSpec { servers: vec!["10.0.0.10".into()], ..DnsSpec::default() };
    let annotations = BTreeMap::from([("color".to_owned(), "blue".to_owned())]);
    let limits = [(INGRESS, "10M"), (EGRESS, "1Gi")].map(|(key, value)| (key.to_owned(), value.to_owned()));
    let annotations = annotations.into_iter().chain(limits).collect();
    let offer = Offer {
        port_mappings: &[port],
        dns: Some(&dns),
        annotations: &annotations,
        cgroup_path: Some("/kubepods/pod1"),
        ip_ranges: &["10.1.0.0/24".to_owned(), "fd00::/64".to_owned()],
    };
    Attachment::new(&box_id(1), "/netns/of/pod".into(), &request(1).identity, offer).unwrap()
}

fn chain<'a>(site: &'a Site, list: &'a NetworkList) -> Chain<'a> {
    Chain { list, bin_dirs: &site.config.bin_dirs, limit: Duration::from_secs(20) }
}

#[tokio::test]
async fn add_runs_forward_with_results_and_del_backward_with_the_last_result() {
    let (site, list) = site("1.0.0");
    let chain = chain(&site, &list);
    let result = chain.add(&attachment()).await.unwrap();
    let kept = result.for_next(list.version);
    let errors = chain.del(&attachment(), Some(Path::new("/netns/of/pod")), Some(&kept)).await;
    assert!(errors.is_empty(), "{errors:?}");

    assert_eq!(site.calls(), ["ADD first", "ADD second", "DEL second", "DEL first"]);
    assert!(site.stdin("first", "ADD").get("prevResult").is_none());
    let previous = site.stdin("second", "ADD")["prevResult"].clone();
    assert_eq!(previous["ips"][0]["address"], "10.0.0.2/24");
    assert_eq!(previous["vendor"], json!({ "kept": true }), "fields that we do not know are handed on");
    assert_eq!(site.stdin("second", "DEL")["prevResult"], kept);
    assert_eq!(site.stdin("first", "DEL")["prevResult"], kept);
}

#[tokio::test]
async fn a_plugin_gets_its_own_configuration_and_only_the_capabilities_it_asked_for() {
    let (site, list) = site("1.0.0");
    chain(&site, &list).add(&attachment()).await.unwrap();
    let first = site.stdin("first", "ADD");
    assert_eq!(
        (&first["name"], &first["cniVersion"], &first["mine"]),
        (&json!("test"), &json!("1.0.0"), &json!(1))
    );
    assert_eq!(
        first["runtimeConfig"],
        json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1" }] })
    );
    assert_eq!(
        site.stdin("second", "ADD")["runtimeConfig"],
        json!({
            "dns": { "servers": ["10.0.0.10"], "searches": [], "options": [] },
            "io.kubernetes.cri.pod-annotations": { "color": "blue", INGRESS: "10M", EGRESS: "1Gi" },
        })
    );
}

#[tokio::test]
async fn limits_ranges_and_the_cgroup_have_the_shapes_that_plugins_know() {
    let (site, _) = site("1.0.0");
    site.conflist(
        r#"{ "cniVersion": "1.0.0", "name": "test", "plugins": [{ "type": "first",
            "capabilities": { "bandwidth": true, "ipRanges": true, "cgroupPath": true } }] }"#,
    );
    let list = conf::discover(&site.config.conf_dir).unwrap();
    chain(&site, &list).add(&attachment()).await.unwrap();
    assert_eq!(
        site.stdin("first", "ADD")["runtimeConfig"],
        json!({
            "bandwidth": {
                "ingressRate": 10_000_000, "ingressBurst": 1_000_000,
                "egressRate": 1 << 30, "egressBurst": (1 << 30) / 10,
            },
            "ipRanges": [[{ "subnet": "10.1.0.0/24" }], [{ "subnet": "fd00::/64" }]],
            "cgroupPath": "/kubepods/pod1",
        })
    );
    let unheard: Vec<_> = attachment().unheard(&list).map(|(capability, _)| capability).collect();
    assert_eq!(unheard, ["portMappings"]);
}

#[tokio::test]
async fn the_environment_names_the_pod_and_a_vanished_namespace_is_empty() {
    let (site, list) = site("1.0.0");
    let chain = chain(&site, &list);
    chain.add(&attachment()).await.unwrap();
    chain.del(&attachment(), None, None).await;
    let env = site.env("first", "ADD");
    let id = box_id(1);
    assert_eq!(env["CNI_COMMAND"], "ADD");
    assert_eq!(env["CNI_CONTAINERID"], id.as_str());
    assert_eq!(env["CNI_IFNAME"], "eth0");
    assert_eq!(env["CNI_NETNS"], "/netns/of/pod");
    assert_eq!(env["CNI_PATH"], format!("{}:/usr/lib/cni", site.path("bin").display()));
    assert_eq!(
        env["CNI_ARGS"],
        format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod-1;K8S_POD_INFRA_CONTAINER_ID={id};K8S_POD_UID=uid-1"
        )
    );
    assert_eq!(site.env("first", "DEL")["CNI_NETNS"], "");
}

#[tokio::test]
async fn results_are_passed_on_in_the_shape_of_the_networks_version() {
    let (site, list) = site("0.3.1");
    let chain = chain(&site, &list);
    // The plugin answers in 1.0.0, which has no `version` in addresses; 0.3.1 wants it.
    let result = chain.add(&attachment()).await.unwrap();
    let previous = site.stdin("second", "ADD")["prevResult"].clone();
    assert_eq!((&previous["cniVersion"], &previous["ips"][0]["version"]), (&json!("0.3.1"), &json!("4")));
    let kept = result.for_next(list.version);
    chain.del(&attachment(), None, Some(&kept)).await;
    assert!(site.stdin("first", "DEL").get("prevResult").is_none(), "DEL has no prevResult before 0.4.0");
}
