//! A daemon that finds boxes whose agents it does not speak to, as after an upgrade over too many versions or a downgrade.

mod support;

use std::time::Duration;

use a3s_box_core::lifecycle::{BoxPhase, SessionPhase, StopCause};
use a3s_box_core::{BoxId, SessionId};
use a3s_box_protocol::PROTOCOL;
use a3s_box_protocol::versions::OLDEST_SPOKEN;
use a3s_box_runtime::ErrorKind;
use a3s_box_vmm::MachineExit;
use serde_json::json;
use support::{World, container, image, launch, pod, process};

const NUMBER: &str = "agent_protocol";

/// A box with a container that runs, of which this number is noted, and no daemon.
fn left_by(world: &World, number: u32) -> (BoxId, SessionId) {
    let daemon = world.daemon();
    let ids = daemon.run(async {
        let m = &daemon.manager;
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        let session = launch(m, &id, container("c", &["sleep"]), image(world.dir.path())).await.unwrap();
        (id, session)
    });
    daemon.kill();
    assert_eq!(world.record("boxes", ids.0.as_str())[NUMBER], json!(PROTOCOL), "as its agent said");
    note(world, &ids.0, number);
    ids
}

fn note(world: &World, id: &BoxId, number: u32) {
    let mut record = world.record("boxes", id.as_str());
    record[NUMBER] = json!(number);
    world.write_record("boxes", id.as_str(), record.to_string().as_bytes());
}

/// Nobody looked at the number: calls were sent to an agent that might read something else into them, and an agent that
/// did not answer was ended with its pod.
#[test]
fn it_runs_on_and_every_call_to_it_is_refused_with_what_to_do() {
    for number in [PROTOCOL + 1, OLDEST_SPOKEN - 1] {
        let world = World::new();
        let (id, session) = left_by(&world, number);
        let before = [world.record("boxes", id.as_str()), world.record("sessions", session.as_str())];
        let daemon = world.daemon();
        daemon.run(async {
            let m = &daemon.manager;
            assert_eq!(m.box_status(&id).unwrap().phase, BoxPhase::Ready);
            let phase = m.session_status(&session).unwrap().phase;
            assert!(matches!(phase, SessionPhase::Running { .. }), "{phase:?}");
            let told = m.foreign();
            assert_eq!(told.len(), 1);
            assert_eq!(told[0].0, id);
            let refusals = [
                m.exec_sync(&session, process(&["print", "x"]), None, 10).await.unwrap_err(),
                m.stop_session(&session, Duration::ZERO).await.unwrap_err(),
                m.remove_session(&session).await.unwrap_err(),
                m.create_session(&id, container("d", &["sleep"]), image(world.dir.path())).await.unwrap_err(),
                m.dial(&id, 7).await.err().unwrap(),
                m.attach_running(&session, false).await.err().unwrap(),
            ];
            for refusal in refusals {
                assert_eq!(refusal.kind, ErrorKind::FailedPrecondition, "{refusal}");
                let said = refusal.to_string();
                assert!(said.contains(&format!("speaks protocol {number}")), "{said}");
                assert!(
                    said.contains("run the version that started the pod again, or stop the pod"),
                    "{said}"
                );
            }
            assert_eq!(m.list_sessions_of(&id).len(), 1, "what was refused is not there");
        });
        assert_eq!(world.vmm.running().len(), 1);
        let after = [world.record("boxes", id.as_str()), world.record("sessions", session.as_str())];
        assert_eq!(after, before, "the version that started it finds everything as it was");

        // That version is installed again.
        daemon.kill();
        note(&world, &id, PROTOCOL);
        let daemon = world.daemon();
        daemon.run(async {
            let m = &daemon.manager;
            assert_eq!(m.foreign(), []);
            let said = m.exec_sync(&session, process(&["print", "x"]), None, 10).await.unwrap();
            assert_eq!(said.stdout, b"x");
            m.remove_box(&id).await.unwrap();
        });
        assert_eq!(world.leftovers(), Vec::<String>::new());
    }
}

#[test]
fn it_can_be_stopped_and_removed() {
    let world = World::new();
    let (id, session) = left_by(&world, PROTOCOL + 1);
    let daemon = world.daemon();
    daemon.run(async {
        let m = &daemon.manager;
        m.stop_box(&id).await.unwrap();
        assert_eq!(m.foreign(), []);
        assert_eq!(m.box_status(&id).unwrap().phase, BoxPhase::Stopped(StopCause::Requested));
        let phase = m.wait_session(&session).await.unwrap().phase;
        assert!(matches!(&phase, SessionPhase::Exited { code: 137, .. }), "{phase:?}");
        m.remove_session(&session).await.unwrap();
        m.remove_box(&id).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn its_end_is_noticed() {
    let world = World::new();
    let (id, session) = left_by(&world, PROTOCOL + 1);
    let daemon = world.daemon();
    let pid = daemon.manager.box_status(&id).unwrap().vmm_pid.unwrap();
    world.vmm.machine(pid).end(MachineExit::Killed { signal: 9 });
    daemon.run(async {
        let m = &daemon.manager;
        let phase = m.wait_session(&session).await.unwrap().phase;
        let SessionPhase::Exited { reason, .. } = &phase else { panic!("{phase:?}") };
        assert_eq!(reason, "VMKilled");
        let phase = m.box_status(&id).unwrap().phase;
        assert!(matches!(phase, BoxPhase::Stopped(StopCause::VmmDied { .. })), "{phase:?}");
        m.remove_box(&id).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn the_number_is_noted_and_boxes_from_before_it_was_are_taken_up() {
    let world = World::new();
    let (id, session) = left_by(&world, PROTOCOL);
    let mut record = world.record("boxes", id.as_str());
    assert_eq!(record[NUMBER], json!(PROTOCOL));
    record.as_object_mut().unwrap().remove(NUMBER);
    world.write_record("boxes", id.as_str(), record.to_string().as_bytes());
    let daemon = world.daemon();
    daemon.run(async {
        let m = &daemon.manager;
        assert_eq!(m.foreign(), []);
        let said = m.exec_sync(&session, process(&["print", "x"]), None, 10).await.unwrap();
        assert_eq!(said.stdout, b"x");
        m.remove_box(&id).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}
