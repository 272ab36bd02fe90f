//! A guest boots and its network is made side by side: whichever takes longer, and whichever fails.

mod support;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use a3s_box_core::lifecycle::BoxPhase;
use support::machine::Boot;
use support::{World, pod};

/// Waits until something is so.
async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !so() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn a_guest_is_up_before_its_network_answers() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    world.networks.answers.send_replace(false);
    daemon.run(async {
        let logs = world.path("logs");
        let (first, second) = (pod("p", &logs), pod("q", &logs));
        let runs = [first, second].map(|spec| {
            let m = m.clone();
            tokio::spawn(async move { m.run_box(spec).await })
        });
        until("both guests boot, also where only some may boot at once", || world.vmm.launched() == 2).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(m.list_boxes().iter().all(|status| status.phase == BoxPhase::Booting));
        world.networks.answers.send_replace(true);
        for run in runs {
            let id = run.await.unwrap().unwrap();
            let status = m.box_status(&id).unwrap();
            assert_eq!(status.ips, ["10.9.8.7".parse::<std::net::IpAddr>().unwrap()]);
            let at = |name: &str| status.timeline.iter().find(|stage| stage.name == name).unwrap();
            let (network, boot) = (at("network"), at("boot"));
            assert!(network.at < boot.at && boot.at < network.at + network.took, "{:?}", status.timeline);
            m.remove_box(&id).await.unwrap();
        }
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn a_network_that_fails_ends_a_boot_that_never_would() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    world.vmm.boot.send_replace(Boot::Hang);
    world.networks.answers.send_replace(false);
    daemon.run(async {
        let run = tokio::spawn({
            let (m, spec) = (m.clone(), pod("p", &world.path("logs")));
            async move { m.run_box(spec).await }
        });
        until("the guest boots", || world.vmm.launched() == 1).await;
        world.faults.fail_at(1);
        world.networks.answers.send_replace(true);
        let error = run.await.unwrap().unwrap_err();
        assert_eq!(world.faults.heal().as_deref(), Some("network connect"));
        assert!(error.to_string().starts_with("network of pod sandbox "), "{error}");
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn a_boot_that_fails_ends_a_network_that_never_answers() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    world.vmm.boot.send_replace(Boot::Panic);
    world.networks.answers.send_replace(false);
    daemon.run(async {
        let error = m.run_box(pod("p", &world.path("logs"))).await.unwrap_err();
        assert!(error.to_string().starts_with("boot of pod sandbox "), "{error}");
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn a_pod_with_more_interfaces_than_expected_boots_again_with_all_of_them() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    world.networks.interfaces.store(3, Ordering::Relaxed);
    daemon.run(async {
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        assert_eq!(world.vmm.launched(), 2);
        let [running] = world.vmm.running()[..] else { panic!("{:?}", world.vmm.running()) };
        assert_eq!(world.vmm.machine(running).taps, ["tap0", "tap1", "tap2"]);
        assert_eq!(m.box_status(&id).unwrap().ips.len(), 3);
        m.remove_box(&id).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}
