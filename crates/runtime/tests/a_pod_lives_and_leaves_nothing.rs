//! The ordinary life of a pod, and what each step of it must show.

mod support;

use std::time::Duration;

use a3s_box_core::lifecycle::{BoxPhase, SessionPhase, StopCause};
use a3s_box_runtime::{ErrorKind, Happened, Subject};
use support::{World, container, image, launch, log_lines, pod, process, with_volume};

#[test]
fn from_run_to_remove() {
    let world = World::new();
    let daemon = world.daemon();
    let (m, logs) = (daemon.manager.clone(), world.path("logs"));
    daemon.run(async {
        let id = m.run_box(pod("p", &logs)).await.unwrap();
        let status = m.box_status(&id).unwrap();
        assert_eq!((status.phase, status.kernel_release.as_str()), (BoxPhase::Ready, "6.12.0-fake"));
        assert_eq!(status.ips, ["10.9.8.7".parse::<std::net::IpAddr>().unwrap()]);
        let stages: Vec<_> = status.timeline.iter().map(|stage| stage.name.as_str()).collect();
        assert_eq!(
            stages,
            [
                "reserve",
                "scratch",
                "netns",
                "network",
                "turn",
                "vmm",
                "boot",
                "guest/kernel [31m",
                "configure"
            ]
        );

        let spec = with_volume(container("c", &["print", "one\ntwo"]), &world.path("volume"));
        let session = launch(&m, &id, spec, image(world.dir.path())).await.unwrap();
        let status = m.wait_session(&session).await.unwrap();
        let SessionPhase::Exited { code, reason, .. } = status.phase else { panic!("{:?}", status.phase) };
        assert_eq!((code, reason.as_str()), (0, "Completed"));
        assert_eq!(log_lines(&logs.join("c/0.log")), ["one", "two"]);
        assert!(world.path("volume").is_dir(), "a missing host path becomes a directory");

        let second = launch(&m, &id, container("d", &["sleep"]), image(world.dir.path())).await.unwrap();
        let output = m.exec_sync(&second, process(&["print", "hello"]), None, 3).await.unwrap();
        assert_eq!((output.stdout.as_slice(), output.exit_code, output.truncated), (&b"hel"[..], 0, true));
        assert_eq!(m.exec_sync(&second, process(&["fail", "7"]), None, 100).await.unwrap().exit_code, 7);
        let late = m
            .exec_sync(&second, process(&["sleep"]), Some(Duration::from_millis(50)), 100)
            .await
            .unwrap_err();
        assert_eq!(late.kind, ErrorKind::DeadlineExceeded);
        let machine = world.vmm.machine(m.box_status(&id).unwrap().vmm_pid.unwrap());
        assert_eq!(*machine.guest.signalled.lock().unwrap(), [true], "with all that it had started");

        let same =
            m.create_session(&id, container("d", &["sleep"]), image(world.dir.path())).await.unwrap_err();
        assert_eq!(same.kind, ErrorKind::AlreadyExists);
        assert_eq!(m.find_session(&second.as_str()[..20]).unwrap(), second);

        m.remove_session(&session).await.unwrap();
        m.remove_session(&session).await.unwrap();
        m.stop_box(&id).await.unwrap();
        m.stop_box(&id).await.unwrap();
        assert_eq!(m.box_status(&id).unwrap().phase, BoxPhase::Stopped(StopCause::Requested));
        let SessionPhase::Exited { code, .. } = m.session_status(&second).unwrap().phase else { panic!() };
        assert_eq!(code, 137);
        let denied =
            m.create_session(&id, container("e", &["sleep"]), image(world.dir.path())).await.unwrap_err();
        assert_eq!(denied.kind, ErrorKind::FailedPrecondition);
        m.remove_box(&id).await.unwrap();
        m.remove_box(&id).await.unwrap();
        assert_eq!(m.box_status(&id).unwrap_err().kind, ErrorKind::NotFound);
        assert!(m.list_boxes().is_empty() && m.list_sessions().is_empty());
        m.shutdown().await;
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn a_running_pod_is_removed_by_force() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        launch(&m, &id, container("c", &["deaf"]), image(world.dir.path())).await.unwrap();
        m.remove_box(&id).await.unwrap();
        assert!(m.list_sessions().is_empty());
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn a_container_that_ignores_its_stop_signal_is_killed_after_the_grace() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        for (name, code) in [("sleep", 143), ("deaf", 137)] {
            let session = launch(&m, &id, container(name, &[name]), image(world.dir.path())).await.unwrap();
            let start = std::time::Instant::now();
            m.stop_session(&session, Duration::from_millis(300)).await.unwrap();
            assert_eq!(start.elapsed() >= Duration::from_millis(300), name == "deaf");
            let SessionPhase::Exited { code: found, .. } = m.session_status(&session).unwrap().phase else {
                panic!()
            };
            assert_eq!(found, code, "{name}");
        }
    });
}

#[test]
fn a_program_that_cannot_be_executed_is_a_start_error() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        let session =
            m.create_session(&id, container("c", &["missing"]), image(world.dir.path())).await.unwrap();
        let error = m.start_session(&session).await.unwrap_err();
        assert!(error.to_string().contains("not found in  [1m$PATH"), "{error}");
        let SessionPhase::Exited { code, reason, started_at_ns, .. } =
            m.session_status(&session).unwrap().phase
        else {
            panic!()
        };
        assert_eq!((code, reason.as_str(), started_at_ns), (128, "StartError", 0));
    });
}

#[test]
fn a_log_that_was_rotated_goes_on_in_the_new_file() {
    let world = World::new();
    let daemon = world.daemon();
    let (m, logs) = (daemon.manager.clone(), world.path("logs"));
    daemon.run(async {
        let id = m.run_box(pod("p", &logs)).await.unwrap();
        let session =
            launch(&m, &id, container("c", &["count", "2000"]), image(world.dir.path())).await.unwrap();
        let (path, rotated) = (logs.join("c/0.log"), logs.join("c/0.log.1"));
        while log_lines(&path).len() < 100 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        std::fs::rename(&path, &rotated).unwrap();
        m.reopen_log(&session).await.unwrap();
        let all = || [log_lines(&rotated), log_lines(&path)].concat();
        while all().len() < 2000 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let expected: Vec<String> = (0..2000).map(|n| format!("line {n}")).collect();
        assert_eq!(all(), expected);
        assert!(!log_lines(&path).is_empty());
    });
}

/// kubelet logged an error for every event of a pod that was gone, because none said whose it was.
#[test]
fn events_tell_the_pod_even_when_it_is_gone() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let mut events = m.events();
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        let session = launch(&m, &id, container("c", &["sleep"]), image(world.dir.path())).await.unwrap();
        m.remove_box(&id).await.unwrap();
        let mut deleted = Vec::new();
        while deleted.len() < 2 {
            let event = events.next().await.unwrap().unwrap();
            assert_eq!((&event.boxed.id, event.boxed.spec.identity.name.as_str()), (&id, "p"), "{event:?}");
            if event.happened == Happened::Deleted {
                deleted.push(event.subject);
            }
        }
        assert_eq!(deleted, [Subject::Session(session, id.clone()), Subject::Box(id)]);
    });
}
