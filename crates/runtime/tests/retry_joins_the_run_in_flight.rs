//! A client whose deadline passed asks again: it must get the pod that is already on its way.

mod support;

use std::time::Duration;

use a3s_box_runtime::ErrorKind;
use support::machine::Boot;
use support::{World, pod};

#[test]
fn a_retry_joins_the_run_in_flight() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        world.vmm.boot.send_replace(Boot::Hang);
        let spec = pod("p", &world.path("logs"));
        let gave_up = tokio::time::timeout(Duration::from_millis(200), m.run_box(spec.clone())).await;
        assert!(gave_up.is_err());
        let (a, b) = (m.clone(), m.clone());
        let (spec_a, spec_b) = (spec.clone(), spec.clone());
        let retries = tokio::spawn(async move { tokio::join!(a.run_box(spec_a), b.run_box(spec_b)) });
        tokio::time::sleep(Duration::from_millis(50)).await;
        world.vmm.boot.send_replace(Boot::Ready);
        let (first, second) = retries.await.unwrap();
        assert_eq!(first.clone().unwrap(), second.unwrap());
        assert_eq!(world.vmm.launched(), 1);
        assert_eq!(
            m.run_box(spec.clone()).await.unwrap(),
            first.unwrap(),
            "and one that comes late gets it too"
        );
        let mut other = spec;
        other.size.vcpus = 2;
        assert_eq!(m.run_box(other).await.unwrap_err().kind, ErrorKind::AlreadyExists);
    });
}

#[test]
fn everybody_who_joined_a_run_is_told_of_its_failure_and_the_name_is_free() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        world.vmm.boot.send_replace(Boot::Hang);
        let spec = pod("p", &world.path("logs"));
        let (a, b, sa, sb) = (m.clone(), m.clone(), spec.clone(), spec.clone());
        let both = tokio::spawn(async move { tokio::join!(a.run_box(sa), b.run_box(sb)) });
        tokio::time::sleep(Duration::from_millis(100)).await;
        world.vmm.boot.send_replace(Boot::Panic);
        let (first, second) = both.await.unwrap();
        assert_eq!(first.unwrap_err().to_string(), second.unwrap_err().to_string());
        world.vmm.boot.send_replace(Boot::Ready);
        m.run_box(spec).await.unwrap();
        assert_eq!(world.vmm.launched(), 2);
    });
}

/// Fifty guests that boot at once each take so long that all of them miss their limit.
#[test]
fn a_storm_of_pods_boots_a_few_at_a_time() {
    const PODS: usize = 50;
    const AT_ONCE: usize = 3;
    let world = World::new();
    let mut config = world.config();
    config.parallel_boots = AT_ONCE;
    let daemon = world.daemon_with(config).unwrap();
    world.vmm.boot.send_replace(Boot::Hang);
    let m = &daemon.manager;
    let starts = (0..PODS).map(|number| {
        let (m, spec) = (m.clone(), pod(&format!("p{number}"), &world.path("logs")));
        daemon.spawn(async move { m.run_box(spec).await })
    });
    let starts: Vec<_> = starts.collect();
    daemon.run(async {
        while world.vmm.launched() < AT_ONCE {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(world.vmm.launched(), AT_ONCE, "the others wait");
        world.vmm.boot.send_replace(Boot::Ready);
        let outcomes = futures::future::join_all(starts).await;
        for outcome in outcomes {
            outcome.unwrap().unwrap();
        }
        assert_eq!(world.vmm.launched(), PODS);
    });
}
