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
fn the_networks_of_pods_that_are_taken_up_are_looked_at_and_a_complaint_ends_nobody() {
    let world = World::new();
    let daemon = world.daemon();
    let (good, broken, stopped) = daemon.run(async {
        let m = &daemon.manager;
        let [good, broken, stopped] =
            ["good", "broken", "stopped"].map(|name| pod(name, &world.path("logs")));
        let ids = (
            m.run_box(good).await.unwrap(),
            m.run_box(broken).await.unwrap(),
            m.run_box(stopped).await.unwrap(),
        );
        m.stop_box(&ids.2).await.unwrap();
        ids
    });
    daemon.kill();
    world.networks.broken.lock().unwrap().insert(broken.clone());
    let daemon = world.daemon();
    assert_eq!(
        *world.networks.asked.lock().unwrap(),
        [""; 0],
        "an instance that is not the node's leaves it"
    );
    daemon.run(async {
        let m = &daemon.manager;
        m.look_after_networks();
        while world.networks.asked.lock().unwrap().last().is_none_or(|last| last != "collect") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut asked = world.networks.asked.lock().unwrap().clone();
        asked.sort();
        let mut expected = vec![format!("check {good}"), format!("check {broken}"), "collect".to_owned()];
        expected.sort();
        assert_eq!(asked, expected);
        for id in [&good, &broken] {
            assert_eq!(m.box_status(id).unwrap().phase, BoxPhase::Ready);
        }
        let complaints = [&good, &broken, &stopped].map(|id| m.network_complaint(id));
        assert_eq!(complaints, [None, Some("its interface is gone".to_owned()), None]);
        for id in [&good, &broken, &stopped] {
            m.remove_box(id).await.unwrap();
        }
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

/// A record that is damaged: what it may have meant is ended, and the record is kept for people.
#[test]
fn a_record_that_cannot_be_read_is_set_apart_and_its_pod_ended() {
    let world = World::new();
    let daemon = world.daemon();
    let id = daemon.run(daemon.manager.run_box(pod("p", &world.path("logs")))).unwrap();
    daemon.kill();
    world.write_record("boxes", id.as_str(), b"{\"id\": torn");
    for _ in 0..2 {
        let next = world.daemon();
        let quarantined = next.manager.quarantined();
        assert_eq!(quarantined.len(), 1, "{quarantined:?}");
        assert_eq!(quarantined[0].record, format!("boxes/{id}"));
        assert_eq!(quarantined[0].content, "{\"id\": torn");
        assert!(quarantined[0].error.contains("line 1"), "{}", quarantined[0].error);
        assert!(next.manager.list_boxes().is_empty());
        next.run(async {
            let again = next.manager.run_box(pod("p", &world.path("logs"))).await.unwrap();
            next.manager.remove_box(&again).await.unwrap();
        });
        assert_eq!(world.leftovers(), Vec::<String>::new());
    }
}

/// Kubelet cannot see it, and starts another one of it.
#[test]
fn a_container_that_no_record_knows_is_ended() {
    let world = World::new();
    let daemon = world.daemon();
    let (id, kept, lost) = daemon.run(async {
        let m = &daemon.manager;
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        let kept = launch(m, &id, container("kept", &["sleep"]), image(world.dir.path())).await.unwrap();
        let lost = launch(m, &id, container("lost", &["sleep"]), image(world.dir.path())).await.unwrap();
        (id, kept, lost)
    });
    daemon.kill();
    world.write_record("sessions", lost.as_str(), b"torn");
    let next = world.daemon();
    let guest = world.vmm.machine(world.vmm.running()[0]).guest.clone();
    assert_eq!(*guest.sessions.lock().unwrap(), [kept.to_string()]);
    next.run(async {
        assert_eq!(next.manager.list_sessions().len(), 1);
        next.manager.remove_box(&id).await.unwrap();
    });
}

/// What cannot be given back at once is shown, and is tried again without anybody's asking.
#[test]
fn what_is_left_is_shown_and_tried_again() {
    let world = World::new();
    let daemon = world.daemon();
    let id = daemon.run(daemon.manager.run_box(pod("p", &world.path("logs")))).unwrap();
    daemon.kill();
    world.forget_records();
    // Of a start: two tables, the quarantine, the kill, the network.
    world.faults.fail_at(5);
    let next = world.daemon();
    assert_eq!(world.faults.heal().as_deref(), Some("network teardown"));
    let left = next.manager.leftovers();
    assert_eq!(left.iter().map(|left| (&left.id, left.attempts)).collect::<Vec<_>>(), [(&id, 1)]);
    assert!(left[0].error.contains("injected fault in network teardown"), "{}", left[0].error);
    assert_eq!(world.leftovers(), Vec::<String>::new());
    next.run(async {
        while !next.manager.leftovers().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
}

/// A start waited ten seconds for a box whose agent stood still, and all the while every pod's calls failed.
#[test]
fn a_box_that_does_not_answer_holds_up_neither_the_start_nor_other_pods() {
    let world = World::new();
    let daemon = world.daemon();
    let (dead, healthy) = daemon.run(async {
        let m = &daemon.manager;
        let mut pods = Vec::new();
        for name in ["dead", "healthy"] {
            let id = m.run_box(pod(name, &world.path("logs"))).await.unwrap();
            let session = launch(m, &id, container(name, &["sleep"]), image(world.dir.path())).await.unwrap();
            pods.push((id, session));
        }
        (pods.remove(0), pods.remove(0))
    });
    world.vmm.machine(daemon.manager.box_status(&dead.0).unwrap().vmm_pid.unwrap()).fall_silent();
    daemon.kill();
    let began = std::time::Instant::now();
    let mut config = world.config();
    config.lost_after = Duration::from_secs(4);
    let daemon = world.daemon_with(config).unwrap();
    assert!(began.elapsed() < Duration::from_secs(4), "the start took {:?}", began.elapsed());
    daemon.run(async {
        let m = &daemon.manager;
        assert_eq!(m.exec_sync(&healthy.1, process(&["fail", "3"]), None, 10).await.unwrap().exit_code, 3);
        assert_eq!(m.list_sessions().len(), 2);
        assert_eq!(m.box_status(&dead.0).unwrap().phase, BoxPhase::Ready, "it may still answer");
        let ended = m.wait_session(&dead.1).await.unwrap().phase;
        assert!(matches!(ended, SessionPhase::Exited { code: 255, .. }), "{ended:?}");
        let phase = m.box_status(&dead.0).unwrap().phase;
        assert!(matches!(phase, BoxPhase::Stopped(StopCause::AgentLost { .. })), "{phase:?}");
        assert_eq!(m.box_status(&healthy.0).unwrap().phase, BoxPhase::Ready);
        m.remove_box(&dead.0).await.unwrap();
        m.remove_box(&healthy.0).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

/// Every start of a daemon began to count anew, so that a dead box stayed ready for ever.
#[test]
fn a_box_that_does_not_answer_is_ended_however_often_the_daemon_starts() {
    let world = World::new();
    let config = || {
        let mut config = world.config();
        config.lost_after = Duration::from_secs(6);
        config
    };
    let mut daemon = world.daemon_with(config()).unwrap();
    // Without a container there is nobody but the box itself who would notice.
    let id = daemon.run(daemon.manager.run_box(pod("dead", &world.path("logs")))).unwrap();
    world.vmm.machine(daemon.manager.box_status(&id).unwrap().vmm_pid.unwrap()).fall_silent();
    let mut lives = 0;
    while daemon.manager.box_status(&id).unwrap().phase == BoxPhase::Ready {
        assert!(lives < 12, "it is never ended");
        daemon.kill();
        daemon = world.daemon_with(config()).unwrap();
        lives += 1;
        std::thread::sleep(Duration::from_millis(1500));
    }
    assert!(lives > 1, "no single daemon has lived long enough");
    daemon.run(daemon.manager.remove_box(&id)).unwrap();
}
