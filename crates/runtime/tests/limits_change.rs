//! Limits that change while containers run.

mod support;

use a3s_box_core::spec::Limits;
use a3s_box_runtime::ErrorKind;
use support::{World, container, image, launch, pod};

fn memory(bytes: i64) -> Limits {
    Limits { memory_bytes: Some(bytes), ..Limits::default() }
}

#[test]
fn a_change_reaches_the_guest_and_is_remembered_and_a_refused_one_is_not() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    let (id, session) = daemon.run(async {
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        let session = launch(&m, &id, container("a", &["sleep"]), image(world.dir.path())).await.unwrap();
        let guest = world.vmm.machine(m.box_status(&id).unwrap().vmm_pid.unwrap()).guest.clone();
        let told = || std::mem::take(&mut *guest.updates.lock().unwrap());
        m.update_session(&session, memory(1 << 20)).await.unwrap();
        let quota = Limits { cpu_quota_us: Some(5000), ..Limits::default() };
        m.update_session(&session, quota.clone()).await.unwrap();
        let both = ["cpu.max=5000 100000".to_owned(), "memory.max=1048576".to_owned()];
        assert_eq!(
            told(),
            [
                (session.to_string(), vec!["memory.max=1048576".to_owned()]),
                (session.to_string(), both.into())
            ]
        );

        let refused = m.update_session(&session, memory(1)).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::FailedPrecondition);
        assert!(refused.message.contains("it is in use"), "{refused}");
        let beyond = m.update_session(&session, memory(1 << 50)).await.unwrap_err();
        assert_eq!(beyond.kind, ErrorKind::FailedPrecondition);
        assert!(beyond.message.contains("cannot grow"), "{beyond}");
        assert_eq!(told(), []);

        // 150 ms are less than two processors have in 100 ms, and more than they have in the period in force.
        let long =
            |quota, period| Limits { cpu_quota_us: Some(quota), cpu_period_us: period, ..Limits::default() };
        m.update_session(&session, long(5000, Some(50_000))).await.unwrap();
        let beyond = m.update_session(&session, long(150_000, None)).await.unwrap_err();
        assert!(beyond.message.contains("of every 50000 µs"), "{beyond}");
        m.update_session(&session, long(5000, Some(100_000))).await.unwrap();
        assert_eq!(told().len(), 2);

        m.update_box(&id, &quota).await.unwrap();
        assert_eq!(told(), [(String::new(), vec!["cpu.max=5000 100000".to_owned()])]);
        assert_eq!(
            m.update_box(&id, &memory(1 << 50)).await.unwrap_err().kind,
            ErrorKind::FailedPrecondition
        );
        (id, session)
    });
    drop(daemon);

    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let limits = m.session_status(&session).unwrap().spec.limits;
        assert_eq!((limits.memory_bytes, limits.cpu_quota_us), (Some(1 << 20), Some(5000)));
        m.stop_session(&session, std::time::Duration::ZERO).await.unwrap();
        let ended = m.update_session(&session, memory(1 << 21)).await.unwrap_err();
        assert_eq!(ended.kind, ErrorKind::FailedPrecondition);
        m.stop_box(&id).await.unwrap();
        assert_eq!(
            m.update_box(&id, &memory(1 << 21)).await.unwrap_err().kind,
            ErrorKind::FailedPrecondition
        );
        m.remove_box(&id).await.unwrap();
        assert_eq!(m.update_box(&id, &memory(1 << 21)).await.unwrap_err().kind, ErrorKind::NotFound);
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}
