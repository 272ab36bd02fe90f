//! Plugins that do not come back: their time is bounded, and nothing of them stays.

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use a3s_box_net::cni::{AddError, Attachment, Chain, NetworkList, PluginError, conf};
use common::{Site, box_id};

/// Starts a descendant, notes both process ids and hangs.
const HANGS: &str = r#"sleep 1000 & echo "waiting for the moon" >&2; echo $$ $! > "$0.pids"; wait"#;

fn site(does: &str) -> (Site, NetworkList) {
    let site = Site::new();
    site.plugin("hangs", does);
    site.plugin("fine", "true");
    site.conflist(
        r#"{ "cniVersion": "1.0.0", "name": "test", "plugins": [{ "type": "hangs" }, { "type": "fine" }] }"#,
    );
    let list = conf::discover(&site.config.conf_dir).unwrap();
    (site, list)
}

fn chain<'a>(site: &'a Site, list: &'a NetworkList, limit: Duration) -> Chain<'a> {
    Chain { list, bin_dirs: &site.config.bin_dirs, limit }
}

fn attachment() -> Attachment {
    Attachment::anonymous(&box_id(1), "/nowhere".into())
}

fn of_plugin(error: AddError) -> PluginError {
    match error {
        AddError::Plugin { source, .. } => *source,
        other @ AddError::NoAddress { .. } => panic!("{other}"),
    }
}

/// The plugin and its descendant are gone within two seconds (a zombie that waits for its reaper counts as gone).
async fn assert_gone(site: &Site) {
    let pids = std::fs::read_to_string(site.path("bin/hangs.pids")).expect("the plugin ran");
    let pids: Vec<&str> = pids.split_whitespace().collect();
    assert_eq!(pids.len(), 2);
    let deadline = Instant::now() + Duration::from_secs(2);
    for pid in pids {
        while is_running(pid) {
            assert!(Instant::now() < deadline, "process {pid} is still there");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn is_running(pid: &str) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid).join("stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).unwrap_or("");
    !matches!(state, "" | "Z" | "X")
}

async fn until_it_hangs(site: &Site) {
    // The file is there before its line is.
    let written =
        || std::fs::read_to_string(site.path("bin/hangs.pids")).is_ok_and(|pids| pids.ends_with('\n'));
    while !written() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_hanging_add_ends_at_its_limit_with_the_plugins_last_words() {
    let (site, list) = site(HANGS);
    let started = Instant::now();
    let error = chain(&site, &list, Duration::from_millis(500)).add(&attachment()).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(5));
    let PluginError::TimedOut { plugin, said, .. } = of_plugin(error) else { panic!("no time-out") };
    assert_eq!((plugin.as_str(), said.0.as_str()), ("hangs", "waiting for the moon"));
    assert_gone(&site).await;
    assert_eq!(site.calls(), ["ADD hangs"], "the next plugin is not called");
}

#[tokio::test]
async fn a_hanging_del_does_not_keep_the_other_plugins_from_their_turn() {
    let (site, list) = site(HANGS);
    let errors = chain(&site, &list, Duration::from_millis(500)).del(&attachment(), None, None).await;
    assert!(matches!(errors.as_slice(), [PluginError::TimedOut { .. }]), "{errors:?}");
    assert_eq!(site.calls(), ["DEL fine", "DEL hangs"]);
    assert_gone(&site).await;
}

#[tokio::test]
async fn a_caller_that_stops_waiting_takes_the_plugin_with_it() {
    let (site, list) = site(HANGS);
    let chain = chain(&site, &list, Duration::from_secs(100));
    let attachment = attachment();
    tokio::select! {
        result = chain.add(&attachment) => panic!("{result:?}"),
        () = until_it_hangs(&site) => {}
    }
    assert_gone(&site).await;
}

#[tokio::test]
async fn a_descendant_that_keeps_the_output_open_counts_as_hanging_and_is_killed() {
    let (site, list) =
        site(r#"sleep 1000 & echo $$ $! > "$0.pids"; echo '{ "ips": [{ "address": "10.0.0.2/24" }] }'"#);
    let error = chain(&site, &list, Duration::from_millis(500)).add(&attachment()).await.unwrap_err();
    assert!(matches!(of_plugin(error), PluginError::TimedOut { .. }));
    assert_gone(&site).await;
}
