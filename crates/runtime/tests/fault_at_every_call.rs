//! The life of a pod against seams (store, network, hypervisor) that fail at their n-th call, for every n.
//!
//! Guards: whatever fails, the client is told, a client that then removes the pod finds everything gone, and the
//! same pod can be made again at once.

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use a3s_box_core::lifecycle::{BoxPhase, StopCause};
use a3s_box_runtime::{BoxManager, RuntimeError};
use support::{World, container, image, launch, log_lines, pod, process, with_volume};

async fn life(m: &BoxManager, world: &World) -> Result<(), RuntimeError> {
    let id = m.run_box(pod("p", &world.path("logs"))).await?;
    let spec = with_volume(container("c", &["sleep"]), &world.path("volume"));
    let session = launch(m, &id, spec, image(world.dir.path())).await?;
    m.exec_sync(&session, process(&["print", "x"]), Some(Duration::from_secs(5)), 10).await?;
    m.stop_session(&session, Duration::from_secs(1)).await?;
    m.remove_session(&session).await?;
    m.stop_box(&id).await?;
    m.remove_box(&id).await
}

#[test]
fn a_fault_at_any_call_leaks_nothing_and_the_same_pod_can_be_made_again() {
    let mut hit = Vec::new();
    for call in 1.. {
        let world = World::new();
        let daemon = world.daemon();
        let m = daemon.manager.clone();
        world.faults.fail_at(call);
        let result = daemon.run(life(&m, &world));
        let Some(name) = world.faults.heal() else {
            result.unwrap();
            break;
        };
        daemon.run(async {
            for status in m.list_boxes() {
                m.remove_box(&status.id).await.unwrap();
            }
            life(&m, &world)
                .await
                .unwrap_or_else(|error| panic!("after a fault in call {call} ({name}): {error}"));
            m.shutdown().await;
        });
        assert_eq!(world.leftovers(), Vec::<String>::new(), "after a fault in call {call} ({name})");
        hit.push(name);
    }
    // The loop must have been through every seam, or it proves nothing.
    for seam in [
        "storage commit",
        "network prepare",
        "network connect",
        "network teardown",
        "vmm launch",
        "machine ready",
        "machine attach",
        "machine connect",
    ] {
        assert!(hit.iter().any(|name| name == seam), "{seam} was never hit: {hit:?}");
    }
    // The agent's come in another order from run to run, so one of them may be skipped.
    let agent: BTreeSet<&String> = hit.iter().filter(|name| name.starts_with("agent ")).collect();
    assert!(agent.len() >= 5, "{hit:?}");
}

/// A start of the daemon: it may fail, and the next one finds everything.
#[test]
fn a_fault_at_any_call_of_a_restart_loses_no_pod() {
    let mut hit = Vec::new();
    // About as many as a restart makes; the last ones come in any order, and not all in time to be counted.
    for call in 1..=12 {
        let world = World::new();
        let daemon = world.daemon();
        let (id, session) = daemon.run(async {
            let m = &daemon.manager;
            let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
            let spec = container("c", &["count", &LINES.to_string()]);
            let session = launch(m, &id, spec, image(world.dir.path())).await.unwrap();
            (id, session)
        });
        daemon.kill();
        world.faults.fail_at(call);
        let next = world.daemon_with(world.config()).unwrap_or_else(|_| world.daemon());
        // What a start sets going is part of it.
        let log = world.path("logs/c/0.log");
        next.run(logged(&log));
        let Some(name) = world.faults.heal() else { continue };
        next.run(async {
            let m = &next.manager;
            let phase = m.box_status(&id).unwrap().phase;
            match phase {
                BoxPhase::Ready => {
                    let said = m.exec_sync(&session, process(&["print", "x"]), None, 10).await;
                    let said = said.unwrap_or_else(|error| {
                        let status = m.session_status(&session);
                        panic!("after a fault in call {call} ({name}): {error}; {status:?}")
                    });
                    assert_eq!(said.stdout, b"x", "after a fault in call {call} ({name})");
                    let lines: Vec<String> = (0..LINES).map(|n| format!("line {n}")).collect();
                    assert_eq!(log_lines(&log), lines, "after a fault in call {call} ({name})");
                }
                BoxPhase::Stopped(StopCause::AgentLost { .. }) if name.starts_with("agent") => {}
                other => panic!("{other:?} after a fault in call {call} ({name})"),
            }
            m.remove_box(&id).await.unwrap();
        });
        assert_eq!(world.leftovers(), Vec::<String>::new(), "after a fault in call {call} ({name})");
        hit.push(name);
    }
    for seam in ["storage scan", "machine connect"] {
        assert!(hit.iter().any(|name| name == seam), "{seam} was never hit: {hit:?}");
    }
}

const LINES: usize = 40;

/// Until the container's log is complete. One whose box has ended stays as it is.
async fn logged(log: &Path) {
    let complete = async {
        while log_lines(log).len() < LINES {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(2), complete).await.ok();
    // The agent is asked for the end on a task of its own.
    tokio::time::sleep(Duration::from_millis(20)).await;
}

#[test]
fn a_stop_goes_on_past_a_network_that_cannot_be_taken_down() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        // Of a stop's calls: the record, the agent, the kill, the network.
        world.faults.fail_at(4);
        let error = m.stop_box(&id).await.unwrap_err();
        assert_eq!(world.faults.heal().as_deref(), Some("network teardown"));
        assert!(error.to_string().contains("injected fault in network teardown"), "{error}");
        assert!(world.vmm.running().is_empty(), "the VM was ended all the same");
        assert_eq!(std::fs::read_dir(world.path("state/boxes")).unwrap().count(), 0, "and the disk removed");
        m.stop_box(&id).await.unwrap();
        m.remove_box(&id).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}
