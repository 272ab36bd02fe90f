//! A process that is killed at any instant of a set-up or teardown on the built-in network, and another that knows
//! nothing but the box id.
//!
//! The victim is this test's own program, started again on the test's node: what it does in threads of its own dies
//! with it, unlike with a future that is given up.

mod common;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use a3s_box_core::spec::{PortMapping, PortProtocol};
use a3s_box_net::{Fallback, LocalConfig, NetConfig, PodNetworking, SetupRequest, TeardownRequest};

use common::{Node, SetUp, box_id, on_a_local_node, request, run};

const DIRECTORY: &str = "A3S_BOX_TEST_VICTIM";
const DEED: &str = "A3S_BOX_TEST_DEED";

fn wish(n: u8) -> SetupRequest {
    let port = PortMapping {
        protocol: PortProtocol::Tcp,
        container_port: 80,
        host_port: 8000 + u16::from(n),
        host_ip: String::new(),
    };
    SetupRequest { port_mappings: vec![port], ..request(n) }
}

fn config(dir: PathBuf) -> NetConfig {
    NetConfig {
        fallback: Fallback::Local,
        local: LocalConfig { state_dir: dir.join("local"), ..LocalConfig::default() },
        conf_dir: dir.join("net.d"),
        cache_dir: dir.join("cache"),
        netns_dir: dir.join("netns"),
        ..NetConfig::default()
    }
}

/// No test of its own: what the victim does.
#[test]
fn victim() {
    let Some(dir) = std::env::var_os(DIRECTORY) else { return };
    let networking = PodNetworking::new(config(dir.into()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        match std::env::var(DEED).unwrap().as_str() {
            "setup" => drop(networking.setup(wish(1)).await.unwrap()),
            "teardown" => drop(networking.teardown(TeardownRequest::of(box_id(1))).await),
            other => panic!("{other}"),
        }
    });
}

fn start(node: &Node, deed: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "victim", "--nocapture"])
        .env(DIRECTORY, node.site.path(""))
        .env(DEED, deed)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// How long the victim takes if it is let live.
fn duration(node: &Node, deed: &str) -> Duration {
    let began = Instant::now();
    assert!(start(node, deed).wait().unwrap().success());
    began.elapsed()
}

/// The whole of it in small steps, by the clock: some land before the beginning and some after the end.
async fn killed_at_every_instant(node: &Node, deed: &str, neighbour: bool) {
    let networking = node.site.networking();
    let prepare = async || {
        if deed == "teardown" {
            networking.setup(wish(1)).await.unwrap();
        }
    };
    prepare().await;
    let whole = duration(node, deed);
    assert!(networking.teardown(TeardownRequest::of(box_id(1))).await.is_empty());
    if neighbour {
        networking.setup(wish(2)).await.unwrap();
    }
    let before = node.inventory();
    let rules = || neighbour.then(|| run("nft list table inet a3s_box"));
    let rules_before = rules();
    let (steps, mut interrupted) = (40, 0);
    for step in 0..steps {
        prepare().await;
        let mut victim = start(node, deed);
        std::thread::sleep(whole * step / (steps - 4));
        victim.kill().unwrap();
        interrupted += u32::from(!victim.wait().unwrap().success());
        let errors = networking.teardown(TeardownRequest::of(box_id(1))).await;
        assert!(errors.is_empty(), "{deed} killed at step {step} of {steps}: {errors:?}");
        assert_eq!(node.inventory(), before, "{deed} killed at step {step} of {steps}");
        assert_eq!(rules(), rules_before, "{deed} killed at step {step} of {steps}");
    }
    assert!(interrupted > steps / 4, "only {interrupted} of {steps} were killed in time");
}

#[test]
fn a_setup_that_is_killed_at_any_instant_is_undone_by_id_alone() {
    on_a_local_node(async |node| {
        killed_at_every_instant(&node, "setup", false).await;
        killed_at_every_instant(&node, "setup", true).await;
    });
}

#[test]
fn a_teardown_that_is_killed_at_any_instant_is_finished_by_the_next() {
    on_a_local_node(async |node| {
        killed_at_every_instant(&node, "teardown", false).await;
        killed_at_every_instant(&node, "teardown", true).await;
    });
}

/// A reboot takes the bridge, the namespaces and the shared state along, and leaves the record.
#[test]
fn a_box_that_a_reboot_ended_is_torn_down_by_its_record() {
    on_a_local_node(async |node| {
        let before = node.inventory();
        let networking = node.site.networking();
        let pod = networking.setup(wish(1)).await.unwrap();
        run("nft flush ruleset");
        run("ip link del a3s0");
        run(&format!("umount {}", pod.netns.display()));
        std::fs::remove_dir_all(&node.site.config.netns_dir).unwrap();
        std::fs::remove_dir_all(&node.site.config.local.state_dir).unwrap();
        assert!(networking.teardown(TeardownRequest::of(box_id(1))).await.is_empty());
        assert_eq!(node.inventory(), before);
    });
}

/// A record that cannot be read says nothing of who connected the box; the leases do.
#[test]
fn a_box_with_a_damaged_record_is_let_go_all_the_same() {
    on_a_local_node(async |node| {
        let before = node.inventory();
        let networking = node.site.networking();
        networking.setup(wish(1)).await.unwrap();
        let record = node.site.config.cache_dir.join(format!("{}.json", box_id(1)));
        std::fs::write(record, "{\"schema\":1").unwrap();
        assert!(networking.teardown(TeardownRequest::of(box_id(1))).await.is_empty());
        assert_eq!(node.inventory(), before);
    });
}
