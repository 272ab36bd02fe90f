//! VMs that end when nobody asked them to.

mod support;

use std::time::{Duration, Instant};

use a3s_box_core::lifecycle::{BoxPhase, SessionPhase, StopCause};
use a3s_box_runtime::ErrorKind;
use a3s_box_vmm::MachineExit;
use support::machine::Boot;
use support::{World, container, image, launch, pod, process};

#[test]
fn vm_dies_while_booting() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        world.vmm.boot.send_replace(Boot::Panic);
        let error = m.run_box(pod("p", &world.path("logs"))).await.unwrap_err();
        assert!(error.to_string().starts_with("boot of pod sandbox "), "{error}");
        assert!(error.to_string().contains("Kernel panic"), "the last words are told: {error}");
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
    daemon.run(async {
        world.vmm.boot.send_replace(Boot::Ready);
        m.run_box(pod("p", &world.path("logs"))).await.unwrap();
    });
}

#[test]
fn agent_dies_mid_exec() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        let session = launch(&m, &id, container("c", &["sleep"]), image(world.dir.path())).await.unwrap();
        let exec = tokio::spawn({
            let (m, session) = (m.clone(), session.clone());
            async move { m.exec_sync(&session, process(&["sleep"]), None, 10).await }
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        let start = Instant::now();
        world.vmm.machine(world.vmm.running()[0]).end(MachineExit::Killed { signal: 9 });
        let error = exec.await.unwrap().unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
        let status = m.wait_session(&session).await.unwrap();
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        let SessionPhase::Exited { code, reason, message, .. } = status.phase else { panic!() };
        assert_eq!((code, reason.as_str()), (137, "VMKilled"));
        assert!(message.contains("signal 9") && message.ends_with("the test said so"), "{message}");
        let phase = m.box_status(&id).unwrap().phase;
        assert!(matches!(phase, BoxPhase::Stopped(StopCause::VmmDied { .. })), "{phase:?}");
        m.stop_box(&id).await.unwrap();
        m.remove_box(&id).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn a_pod_that_is_stopped_while_it_starts_is_undone_at_once() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        world.vmm.boot.send_replace(Boot::Hang);
        let starting = tokio::spawn({
            let (m, spec) = (m.clone(), pod("p", &world.path("logs")));
            async move { m.run_box(spec).await }
        });
        while world.vmm.running().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(m.list_boxes().is_empty(), "nobody is told of a pod that may never be");
        let id = std::fs::read_dir(world.path("run/boxes")).unwrap().next().unwrap().unwrap().file_name();
        let id = m.find_box(id.to_str().unwrap()).unwrap();
        m.remove_box(&id).await.unwrap();
        assert_eq!(starting.await.unwrap().unwrap_err().kind, ErrorKind::FailedPrecondition);
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn a_container_that_survives_sigkill_ends_with_its_vm() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        let session = launch(&m, &id, container("c", &["immortal"]), image(world.dir.path())).await.unwrap();
        m.stop_session(&session, Duration::from_millis(50)).await.unwrap();
        let SessionPhase::Exited { reason, message, .. } = m.session_status(&session).unwrap().phase else {
            panic!()
        };
        assert_eq!(reason, "AgentLost");
        assert!(message.contains("did not end within 500ms of being killed"), "{message}");
        assert!(world.vmm.running().is_empty());
        let phase = m.box_status(&id).unwrap().phase;
        assert!(matches!(phase, BoxPhase::Stopped(StopCause::AgentLost { .. })), "{phase:?}");
    });
}
