//! A client whose deadline passed asks again: it must get the pod or container that is already on its way.

mod support;

use std::time::Duration;

use a3s_box_runtime::ErrorKind;
use support::machine::Boot;
use support::{World, container, image, launch, pod, with_volume};

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

/// The retry of a CreateContainer was refused for as long as the first one's container was there.
#[test]
fn a_retry_for_a_container_is_answered_with_the_first_ones() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        let image = image(world.dir.path());
        // kubelet makes a new file for the last words of each.
        let spec = |words: &str| with_volume(container("c", &["sleep"]), &world.path(words));
        let first = m.create_session(&id, spec("a"), image.clone()).await.unwrap();
        assert_eq!(m.create_session(&id, spec("b"), image.clone()).await.unwrap(), first);
        let other = m.create_session(&id, container("c", &["other"]), image.clone()).await.unwrap_err();
        assert_eq!(other.kind, ErrorKind::AlreadyExists);
        // One that has run is no longer in the making.
        m.start_session(&first).await.unwrap();
        let late = m.create_session(&id, spec("c"), image.clone()).await.unwrap_err();
        assert_eq!(late.kind, ErrorKind::AlreadyExists);
        assert_eq!(m.list_sessions().len(), 1);

        let (a, b) = (m.clone(), m.clone());
        let both = |m: a3s_box_runtime::BoxManager| {
            let (id, image) = (id.clone(), image.clone());
            async move { m.create_session(&id, container("both", &["sleep"]), image).await }
        };
        let (one, two) = tokio::join!(both(a), both(b));
        assert_eq!(one.unwrap(), two.unwrap());
    });
}

/// After a list that missed the pod kubelet started attempt 1 of a container beside attempt 0, for good.
#[test]
fn a_container_of_which_another_attempt_runs_is_not_made() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        let image = image(world.dir.path());
        let attempt = |attempt| {
            let mut spec = container("c", &["sleep"]);
            spec.attempt = attempt;
            spec
        };
        let first = launch(&m, &id, attempt(0), image.clone()).await.unwrap();
        let refused = m.create_session(&id, attempt(1), image.clone()).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::AlreadyExists);
        let told = refused.to_string();
        assert!(
            told.contains(first.short()) && told.contains("attempt 0") && told.contains("stop it"),
            "{told}"
        );
        // Another container, the same name in another pod, and attempts that do not run hinder nobody.
        launch(&m, &id, container("d", &["sleep"]), image.clone()).await.unwrap();
        let other = m.run_box(pod("other", &world.path("logs"))).await.unwrap();
        launch(&m, &other, attempt(1), image.clone()).await.unwrap();
        m.stop_session(&first, Duration::ZERO).await.unwrap();
        m.create_session(&id, attempt(1), image.clone()).await.unwrap();
        launch(&m, &id, attempt(2), image).await.unwrap();
    });
}
