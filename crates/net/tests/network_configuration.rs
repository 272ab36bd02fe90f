//! Which configuration is the node's network, and what the status says of it.

mod common;

use std::fs;

use a3s_box_net::cni::{ConfError, conf};
use a3s_box_net::{NetMode, NetworkStatus};
use common::Site;

fn write(site: &Site, name: &str, text: &str) {
    let path = site.path("net.d").join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

async fn not_ready(site: &Site) -> (String, String) {
    match site.networking().status().await {
        NetworkStatus::NotReady { reason, remedy } => (reason, remedy),
        NetworkStatus::Ready { detail } => panic!("ready: {detail}"),
    }
}

#[test]
fn the_lexically_first_configuration_is_the_network_whatever_its_kind() {
    let site = Site::new();
    write(&site, "20-b.conflist", r#"{ "cniVersion": "1.0.0", "name": "b", "plugins": [{ "type": "x" }] }"#);
    write(&site, "05-readme.txt", "no configuration");
    write(&site, "06-old.conflist.bak", "no configuration either");
    assert_eq!(conf::discover(&site.config.conf_dir).unwrap().name, "b");
    write(&site, "10-a.conf", r#"{ "cniVersion": "0.3.1", "name": "a", "type": "y" }"#);
    let list = conf::discover(&site.config.conf_dir).unwrap();
    assert_eq!((list.name.as_str(), list.plugins.len(), list.plugins[0].kind.as_str()), ("a", 1, "y"));
}

#[tokio::test]
async fn the_status_follows_the_files() {
    let site = Site::new();
    let (reason, remedy) = not_ready(&site).await;
    assert!(reason.starts_with("no CNI configuration in"), "{reason}");
    assert!(remedy.contains("network.mode = \"none\""), "{remedy}");

    let network = r#"{ "cniVersion": "1.0.0", "name": "n", "plugins": [{ "type": "fake", "ipam": { "type": "pool" } }] }"#;
    site.conflist(network);
    assert!(not_ready(&site).await.0.contains("\"fake\" is not in"));
    site.plugin("fake", "true");
    assert!(not_ready(&site).await.0.contains("\"pool\" is not in"), "IPAM plugins are needed too");
    site.plugin("pool", "true");
    assert!(
        matches!(site.networking().status().await, NetworkStatus::Ready { detail } if detail.contains("\"n\""))
    );

    site.conflist("{ \"cniVersion\": ");
    let (reason, remedy) = not_ready(&site).await;
    assert!(reason.contains("10-test.conflist is not valid JSON: EOF"), "{reason}");
    assert!(remedy.contains("correct"), "{remedy}");
    fs::remove_dir_all(&site.config.conf_dir).unwrap();
    assert!(
        not_ready(&site).await.0.starts_with("no CNI configuration in"),
        "a directory that is not there is an empty one"
    );
}

#[test]
fn a_broken_first_file_is_not_skipped_for_the_next_one() {
    let site = Site::new();
    write(&site, "10-broken.conflist", "not json");
    write(
        &site,
        "20-other.conflist",
        r#"{ "cniVersion": "1.0.0", "name": "other", "plugins": [{ "type": "sh" }] }"#,
    );
    assert!(matches!(conf::discover(&site.config.conf_dir), Err(ConfError::NotJson { .. })));
}

#[tokio::test]
async fn configurations_that_are_json_but_no_networks_say_what_is_wrong() {
    let site = Site::new();
    for (text, expected) in [
        ("[]", "the file must be an object"),
        (
            r#"{ "cniVersion": 1, "name": "n", "plugins": [{ "type": "x" }] }"#,
            "CNI version \"1\" is not supported",
        ),
        (r#"{ "cniVersions": [], "name": "n", "plugins": [{ "type": "x" }] }"#, "CNI version \"nothing\""),
        (
            r#"{ "cniVersion": "9.0.0", "name": "n", "plugins": [{ "type": "x" }] }"#,
            "\"9.0.0\" is not supported",
        ),
        (r#"{ "cniVersion": "1.0.0", "plugins": [{ "type": "x" }] }"#, "`name` must start"),
        (r#"{ "cniVersion": "1.0.0", "name": "../n", "plugins": [{ "type": "x" }] }"#, "`name` must start"),
        (r#"{ "cniVersion": "1.0.0", "name": "n", "plugins": [] }"#, "`plugins` must be a list"),
        (r#"{ "cniVersion": "1.0.0", "name": "n", "plugins": {} }"#, "`plugins` must be a list"),
        (r#"{ "cniVersion": "1.0.0", "name": "n", "plugins": [3] }"#, "a plugin must be an object"),
        (
            r#"{ "cniVersion": "1.0.0", "name": "n", "plugins": [{ "type": "../sh" }] }"#,
            "`type` must name a plugin binary",
        ),
        (r#"{ "cniVersion": "1.0.0", "name": "n", "plugins": [{}] }"#, "found nothing"),
        (r#"{ "cniVersion": "1.0.0", "name": "n" }"#, "`type` must name"),
    ] {
        site.conflist(text);
        let (reason, _) = not_ready(&site).await;
        assert!(reason.contains(expected), "{text}: {expected:?} is not in {reason:?}");
    }
}

#[test]
fn of_several_versions_the_highest_that_we_speak_is_taken() {
    let site = Site::new();
    for (versions, expected) in [
        (r#""cniVersion": "0.4.0""#, "0.4.0"),
        // The specification's own first examples; other runtimes take them, and a node with one was not ready.
        (r#""cniVersion": "0.2.0""#, "0.2.0"),
        (r#""cniVersion": "0.1.0""#, "0.1.0"),
        (r#""cniVersion": """#, "0.1.0"),
        (r#""type": "x""#, "0.1.0"),
        (r#""cniVersion": "0.4.0", "cniVersions": ["0.3.1", "1.1.0", "7.0.0"]"#, "1.1.0"),
        (r#""cniVersions": ["0.3.1", "1.0.0"]"#, "1.0.0"),
        (r#""cniVersion": "7.0.0", "cniVersions": ["1.0.0", "7.0.0"]"#, "1.0.0"),
    ] {
        site.conflist(&format!(r#"{{ {versions}, "name": "n", "plugins": [{{ "type": "x" }}] }}"#));
        assert_eq!(conf::discover(&site.config.conf_dir).unwrap().version.as_str(), expected);
    }
}

#[test]
fn plugins_in_the_networks_own_folder_join_the_list_unless_it_declines() {
    let site = Site::new();
    write(&site, "n/20-b.conf", r#"{ "type": "b" }"#);
    write(&site, "n/10-a.conf", r#"{ "type": "a" }"#);
    let list = |only: bool| {
        site.conflist(&format!(
            r#"{{ "cniVersion": "1.1.0", "name": "n", "loadOnlyInlinedPlugins": {only}, "plugins": [{{ "type": "x" }}] }}"#
        ));
        let list = conf::discover(&site.config.conf_dir).unwrap();
        list.plugins.iter().map(|p| p.kind.clone()).collect::<Vec<_>>()
    };
    assert_eq!(list(false), ["x", "a", "b"]);
    assert_eq!(list(true), ["x"]);
}

#[tokio::test]
async fn without_cni_the_network_is_ready_and_says_what_that_means() {
    let mut site = Site::new();
    site.config.mode = NetMode::None;
    assert!(
        matches!(site.networking().status().await, NetworkStatus::Ready { detail } if detail.contains("loopback"))
    );
}
