//! Figures of use come from guests: what they say is told, within limits, and what they fail to say harms nobody else.

mod support;

use std::collections::HashSet;
use std::sync::Arc;

use a3s_box_core::SessionId;
use a3s_box_protocol::proto::{CpuStats, MemoryStats, SessionStats, StatsResponse, WritableLayerStats};
use a3s_box_runtime::{BoxManager, ErrorKind};
use support::guest::Guest;
use support::{World, container, image, launch, pod};

/// Figures of sessions; the pod's are their sum.
fn says(guest: &Arc<Guest>, sessions: &[(&SessionId, u64)]) {
    let counters = |cpu| SessionStats {
        cpu: Some(CpuStats { usage_ns: cpu, ..CpuStats::default() }),
        memory: Some(MemoryStats { usage_bytes: 4096, ..MemoryStats::default() }),
        ..SessionStats::default()
    };
    let stats = |(id, cpu): &(&SessionId, u64)| SessionStats {
        session_id: id.to_string(),
        writable_layer: Some(WritableLayerStats { used_bytes: 512, inodes: 2, ..Default::default() }),
        ..counters(*cpu)
    };
    *guest.usage.lock().unwrap() = Some(StatsResponse {
        sessions: sessions.iter().map(stats).collect(),
        pod: Some(counters(sessions.iter().map(|(_, cpu)| cpu).sum())),
    });
}

async fn listed(m: &BoxManager, ids: &[&SessionId]) -> Vec<(SessionId, u64)> {
    let wanted: HashSet<SessionId> = ids.iter().map(|id| (*id).clone()).collect();
    let mut list: Vec<_> =
        m.list_session_usage(&wanted).await.into_iter().map(|usage| (usage.id, usage.cpu.usage_ns)).collect();
    list.sort();
    list
}

#[test]
fn a_guest_is_believed_about_its_own_sessions_only_and_counters_do_not_fall() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let first = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        let second = m.run_box(pod("q", &world.path("logs"))).await.unwrap();
        let guest = |id| world.vmm.machine(m.box_status(id).unwrap().vmm_pid.unwrap()).guest.clone();
        let (honest, liar) = (guest(&first), guest(&second));
        let a = launch(&m, &first, container("a", &["sleep"]), image(world.dir.path())).await.unwrap();
        let b = launch(&m, &second, container("b", &["sleep"]), image(world.dir.path())).await.unwrap();

        says(&honest, &[(&a, 1000)]);
        says(&liar, &[(&a, 9), (&b, 500), (&b, 7)]);
        assert_eq!(
            listed(&m, &[&a, &b]).await.into_iter().collect::<HashSet<_>>(),
            HashSet::from([(a.clone(), 1000), (b.clone(), 500)])
        );
        assert_eq!(listed(&m, &[&b]).await, [(b.clone(), 500)]);
        let usage = m.session_usage(&a).await.unwrap();
        let layer = usage.writable_layer.unwrap();
        assert_eq!((usage.memory.usage_bytes, layer.used_bytes, layer.inodes), (4096, 512, 2));
        assert_eq!(layer.disk, world.path("state/boxes").join(first.as_str()).join("scratch.img"));

        says(&liar, &[(&b, 100)]);
        assert_eq!(m.session_usage(&b).await.unwrap().cpu.usage_ns, 500);
        m.remove_box(&first).await.unwrap();
        m.remove_box(&second).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn a_pods_figures_are_its_guests_sum_and_its_networks_are_the_hosts() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        let silent = m.run_box(pod("q", &world.path("logs"))).await.unwrap();
        let guest = world.vmm.machine(m.box_status(&id).unwrap().vmm_pid.unwrap()).guest.clone();
        let a = launch(&m, &id, container("a", &["sleep"]), image(world.dir.path())).await.unwrap();
        let b = launch(&m, &id, container("b", &["sleep"]), image(world.dir.path())).await.unwrap();
        says(&guest, &[(&a, 1000), (&b, 10)]);
        let usage = m.box_usage(&id).await.unwrap();
        assert_eq!(usage.total.unwrap().cpu.usage_ns, 1010);
        assert_eq!(usage.sessions.len(), 2);
        let received = (usage.network[0].name.as_str(), usage.network[0].received.bytes);
        assert_eq!(received, ("eth0", 7));

        // What a container had used stays used when it is gone, whatever the guest says.
        m.remove_session(&a).await.unwrap();
        says(&guest, &[(&b, 20)]);
        let usage = m.box_usage(&id).await.unwrap();
        assert_eq!((usage.total.unwrap().cpu.usage_ns, usage.sessions.len()), (1010, 1));

        // A guest that does not answer is an error by itself and costs a list only its own pod.
        assert_eq!(m.box_usage(&silent).await.unwrap_err().kind, ErrorKind::Internal);
        let both = HashSet::from([id.clone(), silent.clone()]);
        let listed: Vec<_> = m.list_box_usage(&both).await.into_iter().map(|usage| usage.id).collect();
        assert_eq!(listed, std::slice::from_ref(&id));

        m.stop_box(&id).await.unwrap();
        let last = m.box_usage(&id).await.unwrap();
        assert_eq!((last.total.unwrap().cpu.usage_ns, last.network.len()), (1010, 0));
        m.stop_box(&silent).await.unwrap();
        assert_eq!(m.box_usage(&silent).await.unwrap_err().kind, ErrorKind::FailedPrecondition);
        m.remove_box(&id).await.unwrap();
        m.remove_box(&silent).await.unwrap();
        assert_eq!(m.box_usage(&id).await.unwrap_err().kind, ErrorKind::NotFound);
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn a_box_that_does_not_answer_is_left_out_and_an_error_by_itself() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let first = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        let second = m.run_box(pod("q", &world.path("logs"))).await.unwrap();
        let a = launch(&m, &first, container("a", &["sleep"]), image(world.dir.path())).await.unwrap();
        let b = launch(&m, &second, container("b", &["sleep"]), image(world.dir.path())).await.unwrap();
        let guest = world.vmm.machine(m.box_status(&first).unwrap().vmm_pid.unwrap()).guest.clone();
        says(&guest, &[(&a, 1)]);
        assert_eq!(listed(&m, &[&a, &b]).await, [(a.clone(), 1)]);
        let error = m.session_usage(&b).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Internal);
        assert!(error.message.contains("the counters cannot be read"), "{error}");

        // The last figures outlive the box, but not the session.
        m.stop_box(&first).await.unwrap();
        assert_eq!(m.session_usage(&a).await.unwrap().cpu.usage_ns, 1);
        m.stop_box(&second).await.unwrap();
        assert_eq!(m.session_usage(&b).await.unwrap_err().kind, ErrorKind::FailedPrecondition);
        assert_eq!(listed(&m, &[&a, &b]).await, [(a.clone(), 1)]);
        m.remove_session(&a).await.unwrap();
        assert_eq!(m.session_usage(&a).await.unwrap_err().kind, ErrorKind::NotFound);
        m.remove_box(&first).await.unwrap();
        m.remove_box(&second).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}
