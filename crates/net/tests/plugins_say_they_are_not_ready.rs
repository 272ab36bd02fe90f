//! STATUS: the node is not ready when its plugins say so, in their words, and nobody is kept waiting by them.

mod common;

use std::time::{Duration, Instant};

use a3s_box_net::{NetworkStatus, PodNetworking};
use common::Site;

fn site(version: &str) -> Site {
    let site = Site::new();
    site.plugin("first", "true");
    site.plugin("second", "true");
    site.conflist(&format!(
        r#"{{ "cniVersion": "{version}", "name": "test", "plugins": [{{ "type": "first", "mine": 1 }}, {{ "type": "second" }}] }}"#
    ));
    site
}

/// Asks until the answer is `wanted`: what plugins say may be some seconds old.
async fn until(networking: &PodNetworking, wanted: bool) -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match networking.status().await {
            NetworkStatus::Ready { detail } if wanted => return detail,
            NetworkStatus::NotReady { reason, .. } if !wanted => return reason,
            other => assert!(Instant::now() < deadline, "{other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn readiness_follows_the_plugins_and_has_their_words() {
    let site = site("1.1.0");
    let networking = site.networking();
    until(&networking, true).await;
    assert_eq!(site.calls(), ["STATUS first", "STATUS second"]);
    let stdin = site.stdin("first", "STATUS");
    assert_eq!((&stdin["name"], &stdin["mine"], stdin.get("prevResult")), (&"test".into(), &1.into(), None));
    let env = site.env("first", "STATUS");
    assert_eq!(env.keys().collect::<Vec<_>>(), ["CNI_COMMAND", "CNI_PATH"]);

    for (code, meaning) in
        [(50, "cannot connect pods: "), (51, "limited connectivity: "), (104, "cannot connect pods: ")]
    {
        site.plugin(
            "first",
            &format!(
                r#"echo '{{ "code": {code}, "msg": "agent is down", "details": "no socket" }}'; exit 1"#
            ),
        );
        let reason = until(&networking, false).await;
        for part in [meaning, "\"first\" STATUS", "agent is down: no socket", &format!("code {code}")] {
            assert!(reason.contains(part), "{part:?} is not in {reason:?}");
        }
        site.plugin("first", "true");
        until(&networking, true).await;
    }
}

#[tokio::test]
async fn plugins_are_asked_seldom_however_often_kubelet_asks() {
    let site = site("1.1.0");
    let networking = site.networking();
    let asked = futures::future::join_all((0..50).map(|_| networking.status())).await;
    assert!(asked.iter().all(|status| matches!(status, NetworkStatus::Ready { .. })));
    assert_eq!(site.calls(), ["STATUS first", "STATUS second"]);
}

#[tokio::test]
async fn an_older_network_is_not_asked() {
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        let site = site(version);
        site.plugin("first", "exit 1");
        until(&site.networking(), true).await;
        assert_eq!(site.calls(), [""; 0]);
    }
}

#[tokio::test]
async fn a_plugin_that_hangs_keeps_nobody_waiting_and_is_told_of_when_it_was_ended() {
    let mut site = site("1.1.0");
    site.config.plugin_timeout = Duration::from_secs(4);
    let networking = site.networking();
    until(&networking, true).await;
    site.plugin("second", "sleep 1000");
    let started = Instant::now();
    let mut slowest = Duration::ZERO;
    let reason = loop {
        let asked = Instant::now();
        let status = networking.status().await;
        slowest = slowest.max(asked.elapsed());
        match status {
            NetworkStatus::Ready { .. } => assert!(started.elapsed() < Duration::from_secs(20)),
            NetworkStatus::NotReady { reason, .. } => break reason,
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert!(reason.contains("\"second\" STATUS took longer than 4s"), "{reason}");
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
}

#[tokio::test]
async fn a_network_that_has_not_answered_yet_is_not_ready() {
    let site = site("1.1.0");
    site.plugin("first", "sleep 1000");
    let NetworkStatus::NotReady { reason, .. } = site.networking().status().await else { panic!("ready") };
    assert!(reason.contains("have not answered STATUS yet"), "{reason}");
}

#[tokio::test]
async fn another_network_is_asked_at_once() {
    let site = site("1.1.0");
    let networking = site.networking();
    until(&networking, true).await;
    site.plugin("other", "echo 'no route to the fabric' >&2; exit 3");
    site.conflist(r#"{ "cniVersion": "1.1.0", "name": "other", "plugins": [{ "type": "other" }] }"#);
    let NetworkStatus::NotReady { reason, .. } = networking.status().await else { panic!("ready") };
    assert!(reason.contains("\"other\"") && reason.contains("no route to the fabric"), "{reason}");
}
