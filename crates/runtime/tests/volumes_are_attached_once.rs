//! A source of the host is one attachment of the box, whoever shows it.
//!
//! Guards: each mount of each container was an attachment of its own and so a file system of its own in the guest:
//! containers that shared a volume could not connect to each other's sockets, and both got the same lock.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use a3s_box_core::BoxId;
use a3s_box_core::spec::{MountSource, MountSpec, SessionSpec};
use a3s_box_protocol::proto::Mount;
use a3s_box_protocol::proto::mount::Source;
use a3s_box_runtime::BoxManager;
use support::machine::FakeMachine;
use support::{World, container, image, launch, pod};

fn showing(mut spec: SessionSpec, mounts: &[(&Path, bool)]) -> SessionSpec {
    for (number, (path, readonly)) in mounts.iter().enumerate() {
        let source = MountSource::Host {
            path: path.to_path_buf(),
            propagate: false,
            recursive_readonly: false,
            id_mapped: None,
        };
        let target = format!("/mnt/{number}");
        spec.mounts.push(MountSpec { source, target, readonly: *readonly, options: Vec::new() });
    }
    spec
}

/// Name, part and read-only of each mount of the session that was made last.
fn shown(machine: &FakeMachine) -> Vec<(String, String, bool)> {
    let mounts = machine.guest.mounts.lock().unwrap();
    let one = |mount: &Mount| match mount.source.clone().unwrap() {
        Source::PodVolume(name) => (name, String::new(), mount.readonly),
        Source::PodVolumePart(part) => (part.name, part.sub_path, mount.readonly),
        other => panic!("{other:?}"),
    };
    mounts.iter().map(one).collect()
}

fn volumes(machine: &FakeMachine) -> Vec<String> {
    let mounts = machine.mounts.lock().unwrap();
    mounts.iter().filter_map(|mount| mount.strip_prefix("pod/").map(str::to_owned)).collect()
}

fn writable(machine: &FakeMachine, name: &str) -> bool {
    machine.writable.lock().unwrap().contains(&format!("pod/{name}"))
}

async fn boxed(m: &BoxManager, world: &World) -> (BoxId, Arc<FakeMachine>) {
    let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
    let machine = world.vmm.machine(m.box_status(&id).unwrap().vmm_pid.unwrap());
    (id, machine)
}

#[test]
fn all_mounts_of_one_source_are_one_attachment_that_goes_with_its_last_container() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    let (data, other) = (world.path("data"), world.path("other"));
    std::fs::create_dir_all(data.join("part")).unwrap();
    std::os::unix::fs::symlink("data", world.path("link")).unwrap();
    daemon.run(async {
        let (id, machine) = boxed(&m, &world).await;
        let run = |name: &str, mounts: &[(&Path, bool)]| {
            let spec = showing(container(name, &["sleep"]), mounts);
            let (m, id, image) = (m.clone(), id.clone(), image(world.dir.path()));
            async move { launch(&m, &id, spec, image).await.unwrap() }
        };
        let reader = run("reader", &[(&data, true), (&world.path("link"), true), (&other, false)]).await;
        let first = shown(&machine);
        let name = first[0].0.clone();
        assert_eq!(first[1].0, name, "a link leads to the same source");
        assert_ne!(first[2].0, name);
        assert_eq!(first.iter().map(|mount| mount.2).collect::<Vec<_>>(), [true, true, false]);
        assert_eq!(volumes(&machine).len(), 2);
        assert!(!writable(&machine, &name), "the host refuses writes while no mount may write");

        let writer =
            run("writer", &[(&data, false), (&data.join("part"), false), (&data.join("part"), true)]).await;
        let whole = (name.clone(), String::new(), false);
        let part = |readonly| (name.clone(), "part".to_owned(), readonly);
        assert_eq!(shown(&machine), [whole, part(false), part(true)]);
        assert_eq!(volumes(&machine).len(), 2);
        assert!(writable(&machine, &name));

        m.remove_session(&writer).await.unwrap();
        assert!(!writable(&machine, &name) && volumes(&machine).contains(&name));
        m.remove_session(&reader).await.unwrap();
        assert_eq!(volumes(&machine), Vec::<String>::new());

        let again = run("again", &[(&data, false)]).await;
        assert_ne!(shown(&machine)[0].0, name, "the guest may remember a name");
        m.remove_session(&again).await.unwrap();
        m.remove_box(&id).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

/// What was there first may not be all of what the next one is given.
#[test]
fn a_part_that_was_there_before_its_whole_stays_by_itself() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    let data = world.path("data");
    std::fs::create_dir_all(data.join("part")).unwrap();
    daemon.run(async {
        let (id, machine) = boxed(&m, &world).await;
        let spec = showing(container("a", &["sleep"]), &[(&data.join("part"), false), (&data, false)]);
        launch(&m, &id, spec, image(world.dir.path())).await.unwrap();
        let shown = shown(&machine);
        assert_ne!(shown[0].0, shown[1].0);
        assert_eq!((shown[0].1.as_str(), shown[1].1.as_str()), ("", ""));
        m.remove_box(&id).await.unwrap();
    });
}

#[test]
fn attachments_are_counted_over_restarts_of_the_daemon() {
    let world = World::new();
    let data = world.path("data");
    std::fs::create_dir_all(data.join("part")).unwrap();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    let (id, machine, first) = daemon.run(async {
        let (id, machine) = boxed(&m, &world).await;
        let spec = showing(container("a", &["sleep"]), &[(&data, true)]);
        let first = launch(&m, &id, spec, image(world.dir.path())).await.unwrap();
        (id, machine, first)
    });
    let name = shown(&machine)[0].0.clone();
    daemon.kill();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let spec = showing(container("b", &["sleep"]), &[(&data.join("part"), false), (&data, true)]);
        let second = launch(&m, &id, spec, image(world.dir.path())).await.unwrap();
        let names: Vec<_> = shown(&machine).into_iter().map(|mount| (mount.0, mount.1)).collect();
        assert_eq!(names, [(name.clone(), "part".to_owned()), (name.clone(), String::new())]);
        assert!(writable(&machine, &name));
        m.remove_session(&first).await.unwrap();
        assert_eq!(volumes(&machine), [name.as_str()]);
        m.remove_session(&second).await.unwrap();
        assert_eq!(volumes(&machine), Vec::<String>::new());
        m.remove_box(&id).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

/// A daemon that ends between its record and the mount, or between the end of a session and its record.
#[test]
fn what_a_killed_daemon_left_half_done_is_done_by_the_next() {
    let world = World::new();
    let data = world.path("data");
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    let (id, machine) = daemon.run(async {
        let (id, machine) = boxed(&m, &world).await;
        let spec = showing(container("a", &["sleep"]), &[(&data, true)]);
        launch(&m, &id, spec, image(world.dir.path())).await.unwrap();
        (id, machine)
    });
    let name = shown(&machine)[0].0.clone();
    daemon.kill();
    // On record and not attached.
    machine.mounts.lock().unwrap().retain(|mount| !mount.starts_with("pod/"));
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let spec = showing(container("b", &["sleep"]), &[(&data, false)]);
        launch(&m, &id, spec, image(world.dir.path())).await.unwrap();
        assert_eq!(volumes(&machine), [name.as_str()]);
        assert!(writable(&machine, &name));
    });
    daemon.kill();
    // Attached, and of sessions that no record knows.
    world.forget_sessions();
    let daemon = world.daemon();
    daemon.run(async {
        assert_eq!(volumes(&machine), Vec::<String>::new());
        daemon.manager.remove_box(&id).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

/// A box that was booted by the previous build has an agent that shows every session a file system of its own, and takes a
/// part for the whole.
#[test]
fn a_box_of_the_previous_build_gets_what_its_agent_understands() {
    let world = World::new();
    let data = world.path("data");
    std::fs::create_dir_all(data.join("part")).unwrap();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    let (id, machine, session) = daemon.run(async {
        let (id, machine) = boxed(&m, &world).await;
        let spec = showing(container("a", &["sleep"]), &[(&data, false)]);
        let session = launch(&m, &id, spec, image(world.dir.path())).await.unwrap();
        (id, machine, session)
    });
    daemon.kill();
    // As that build wrote them: the names were the session's.
    let old = format!("{}-0", session.short());
    world.change_record("boxes", id.as_str(), |record| {
        record.remove("sources");
        record.remove("agent_protocol");
    });
    world.change_record("sessions", session.as_str(), |record| {
        record.insert("volumes".to_owned(), vec![old.clone()].into());
    });
    assert_eq!(volumes(&machine), [old.as_str()]);
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let spec = showing(
            container("b", &["sleep"]),
            &[(&data, false), (&data.join("part"), false), (&data, true)],
        );
        let second = launch(&m, &id, spec, image(world.dir.path())).await.unwrap();
        let mounts = shown(&machine);
        assert!(mounts.iter().all(|mount| mount.1.is_empty()), "{mounts:?}");
        assert_eq!(mounts.iter().map(|mount| mount.2).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(volumes(&machine).len(), 4);
        assert!(!writable(&machine, &mounts[2].0), "the host refuses it too");
        m.remove_session(&second).await.unwrap();
        assert_eq!(volumes(&machine), [old.as_str()]);
        m.remove_session(&session).await.unwrap();
        assert_eq!(volumes(&machine), Vec::<String>::new());
        m.remove_box(&id).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

/// Whatever fails while a second container comes and goes, the first one keeps its volume, and what the second one was to
/// have is gone with it.
#[test]
fn a_fault_at_any_call_leaves_exactly_what_is_in_use() {
    let mut hit = Vec::new();
    for call in 1.. {
        let world = World::new();
        let daemon = world.daemon();
        let m = daemon.manager.clone();
        let (data, other) = (world.path("data"), world.path("other"));
        let done = daemon.run(async {
            let (id, machine) = boxed(&m, &world).await;
            let spec = showing(container("a", &["sleep"]), &[(&data, true)]);
            launch(&m, &id, spec, image(world.dir.path())).await.unwrap();
            let used = volumes(&machine);
            // What the first one's start has set going is over.
            tokio::time::sleep(Duration::from_millis(100)).await;
            world.faults.fail_at(call);
            let life = async {
                let spec = showing(container("b", &["sleep"]), &[(&data, false), (&other, false)]);
                let second = launch(&m, &id, spec, image(world.dir.path())).await?;
                m.stop_session(&second, Duration::from_secs(1)).await?;
                m.remove_session(&second).await
            };
            let result = life.await;
            let Some(name) = world.faults.heal() else {
                result.unwrap();
                return true;
            };
            for status in m.list_sessions() {
                if status.spec.name == "b" {
                    m.remove_session(&status.id).await.unwrap();
                }
            }
            // What could not be undone goes with the next container's end at the latest.
            let spec = showing(container("c", &["sleep"]), &[(&data, false), (&other, false)]);
            let third = launch(&m, &id, spec, image(world.dir.path())).await;
            let third =
                third.unwrap_or_else(|error| panic!("after a fault in call {call} ({name}): {error}"));
            assert_eq!(shown(&machine)[0].0, used[0], "after a fault in call {call} ({name})");
            assert!(writable(&machine, &used[0]), "after a fault in call {call} ({name})");
            m.remove_session(&third).await.unwrap();
            assert_eq!(volumes(&machine), used, "after a fault in call {call} ({name})");
            assert!(!writable(&machine, &used[0]), "after a fault in call {call} ({name})");
            m.remove_box(&id).await.unwrap();
            hit.push(name);
            false
        });
        if done {
            break;
        }
        assert_eq!(world.leftovers(), Vec::<String>::new());
    }
    // The agent's calls come in another order from run to run, so any single one may be skipped.
    for seam in ["machine ", "storage commit"] {
        assert!(hit.iter().any(|name| name.starts_with(seam)), "{seam} was never hit: {hit:?}");
    }
}

/// Guards: a pod that was removed while one of its containers waited for the pod's owner stayed for ever, because the owner
/// waited for the container.
#[test]
fn a_pod_is_removed_while_its_containers_come_and_go() {
    for _ in 0..3 {
        let world = World::new();
        let daemon = world.daemon();
        let m = daemon.manager.clone();
        daemon.run(async {
            let (id, _) = boxed(&m, &world).await;
            let data = world.path("data");
            let mut busy = Vec::new();
            for number in 0..4 {
                let spec = showing(container(&format!("c{number}"), &["sleep"]), &[(&data, false)]);
                let (m, id, image) = (m.clone(), id.clone(), image(world.dir.path()));
                busy.push(tokio::spawn(async move {
                    if let Ok(session) = launch(&m, &id, spec, image).await {
                        m.remove_session(&session).await.ok();
                    }
                }));
            }
            tokio::task::yield_now().await;
            let removed = tokio::time::timeout(Duration::from_secs(30), m.remove_box(&id)).await;
            removed.expect("the pod is removed").unwrap();
            for task in busy {
                task.await.unwrap();
            }
        });
        assert_eq!(world.leftovers(), Vec::<String>::new());
    }
}
