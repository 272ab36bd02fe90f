//! Daemons that end without a word, and what the next one makes of it.

mod support;

use std::time::Duration;

use a3s_box_core::lifecycle::{BoxPhase, SessionPhase, StopCause};
use a3s_box_vmm::MachineExit;
use support::machine::Boot;
use support::{World, container, image, launch, log_lines, pod, process};

#[test]
fn no_log_line_is_lost_or_doubled_over_ten_kills() {
    const LINES: usize = 6000;
    let world = World::new();
    let logs = world.path("logs");
    let mut daemon = world.daemon();
    let count = LINES.to_string();
    let (id, session) = daemon.run(async {
        let m = &daemon.manager;
        let id = m.run_box(pod("p", &logs)).await.unwrap();
        let session =
            launch(m, &id, container("c", &["count", &count]), image(world.dir.path())).await.unwrap();
        (id, session)
    });
    for kill in 0..10 {
        std::thread::sleep(Duration::from_millis(37 + 13 * kill));
        daemon.kill();
        daemon = world.daemon();
        let status = daemon.manager.session_status(&session).unwrap();
        assert!(matches!(status.phase, SessionPhase::Running { .. }), "{:?}", status.phase);
    }
    let path = logs.join("c/0.log");
    daemon.run(async {
        for _ in 0..2000 {
            if log_lines(&path).len() >= LINES {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let expected: Vec<String> = (0..LINES).map(|n| format!("line {n}")).collect();
    assert_eq!(log_lines(&path), expected);
    daemon.run(async {
        let m = &daemon.manager;
        assert_eq!(m.exec_sync(&session, process(&["fail", "3"]), None, 10).await.unwrap().exit_code, 3);
        m.remove_box(&id).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn what_ended_while_no_daemon_was_there_is_learned() {
    let world = World::new();
    let daemon = world.daemon();
    let (ending, dying) = daemon.run(async {
        let m = &daemon.manager;
        let mut pods = Vec::new();
        for name in ["ending", "dying"] {
            let id = m.run_box(pod(name, &world.path("logs"))).await.unwrap();
            let session = launch(m, &id, container(name, &["sleep"]), image(world.dir.path())).await.unwrap();
            pods.push((id, session));
        }
        (pods.remove(0), pods.remove(0))
    });
    let pid = |id| daemon.manager.box_status(id).unwrap().vmm_pid.unwrap();
    let machines = (world.vmm.machine(pid(&ending.0)), world.vmm.machine(pid(&dying.0)));
    daemon.kill();
    machines.0.guest.signal(ending.1.as_str(), 2);
    machines.1.end(MachineExit::Vanished);
    let daemon = world.daemon();
    daemon.run(async {
        let m = &daemon.manager;
        let ended = m.wait_session(&ending.1).await.unwrap().phase;
        assert!(matches!(ended, SessionPhase::Exited { code: 130, .. }), "{ended:?}");
        assert_eq!(m.box_status(&ending.0).unwrap().phase, BoxPhase::Ready);
        let died = m.wait_session(&dying.1).await.unwrap().phase;
        let SessionPhase::Exited { reason, .. } = &died else { panic!("{died:?}") };
        assert_eq!(reason, "VMKilled");
        let phase = m.box_status(&dying.0).unwrap().phase;
        assert!(matches!(phase, BoxPhase::Stopped(StopCause::VmmDied { .. })), "{phase:?}");
        m.remove_box(&ending.0).await.unwrap();
        m.remove_box(&dying.0).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn a_pod_that_was_still_starting_is_undone() {
    let world = World::new();
    let daemon = world.daemon();
    world.vmm.boot.send_replace(Boot::Hang);
    let (m, spec) = (daemon.manager.clone(), pod("p", &world.path("logs")));
    let starting = spec.clone();
    daemon.spawn(async move { m.run_box(starting).await });
    while world.vmm.running().is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    daemon.kill();
    world.vmm.boot.send_replace(Boot::Ready);
    let daemon = world.daemon();
    assert_eq!(world.leftovers(), Vec::<String>::new());
    daemon.run(async { daemon.manager.run_box(spec).await.unwrap() });
}

#[test]
fn directories_that_no_record_knows_are_removed() {
    let world = World::new();
    for parent in ["run/boxes", "state/boxes"] {
        std::fs::create_dir_all(world.path(parent).join("ab".repeat(32))).unwrap();
        std::fs::create_dir_all(world.path(parent).join("not-an-id")).unwrap();
    }
    let _daemon = world.daemon();
    for parent in ["run/boxes", "state/boxes"] {
        let left: Vec<_> =
            std::fs::read_dir(world.path(parent)).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["not-an-id"]);
    }
}

/// A state store that was lost, or put back from a backup: what its boxes held is not held for ever.
#[test]
fn what_no_record_knows_is_removed() {
    let world = World::new();
    let daemon = world.daemon();
    daemon.run(async {
        let id = daemon.manager.run_box(pod("p", &world.path("logs"))).await.unwrap();
        launch(&daemon.manager, &id, container("c", &["sleep"]), image(world.dir.path())).await.unwrap();
    });
    daemon.kill();
    assert_eq!(world.vmm.running().len(), 1);
    world.forget_records();
    let next = world.daemon();
    next.run(async {
        assert!(next.manager.list_boxes().is_empty());
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}
