//! What sessions use: their cgroups' counters, and the size of their writable layers.
//!
//! Counters are read at every call. A writable layer has no counter, so its files are counted; how often, follows from how
//! long that takes: at most a tenth of the time is spent on it.

pub mod counters;
pub mod layer;
pub mod open;

use std::collections::{HashMap, HashSet};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use a3s_box_protocol::proto::{SessionStats, StatsResponse, WritableLayerStats};

use crate::paths;
use crate::reaper::now_ns;
use crate::session::cgroup::Cgroup;
use crate::session::table::Table;
use crate::session::{Phase, Session};

/// The longest that one call may spend on counting files. What it does not get to keeps its last figure; the next call
/// begins with that, because what was counted now is not due then.
const CALL_BUDGET: Duration = Duration::from_secs(2);
/// The part of it that one writable layer may take.
const LAYER_BUDGET: Duration = Duration::from_millis(500);
/// A layer that took so long to count is counted again after so many times as long.
const REST: u32 = 10;

/// Reads what sessions use, and remembers the sizes of writable layers.
#[derive(Debug, Clone, Default)]
pub struct Collector {
    /// Held while files are counted, so that simultaneous calls do not count the same ones.
    layers: Arc<Mutex<HashMap<String, Measured>>>,
}

#[derive(Debug, Clone)]
struct Measured {
    layer: WritableLayerStats,
    due: Instant,
}

impl Collector {
    /// The figures of the sessions that are named, or of all if none is, and of the pod. The disk is read on a blocking
    /// thread.
    pub async fn collect(&self, table: &Table, ids: Vec<String>) -> StatsResponse {
        let all = table.list();
        let wanted: HashSet<String> = ids.into_iter().collect();
        let collector = self.clone();
        let collect = move || {
            collector.forget_all_but(&all);
            let chosen = all.iter().filter(|s| wanted.is_empty() || wanted.contains(&s.id));
            let end = Instant::now() + CALL_BUDGET;
            let sessions = chosen.filter_map(|session| collector.session(session, end)).collect();
            StatsResponse { sessions, pod: pod() }
        };
        // A panic in there is a fault of ours; the host is told nothing rather than something wrong.
        tokio::task::spawn_blocking(collect).await.unwrap_or_default()
    }

    fn session(&self, session: &Session, end: Instant) -> Option<SessionStats> {
        let mut stats = match session.phase() {
            Phase::Creating | Phase::Failed(_) => return None,
            Phase::Created(_) => not_started(),
            Phase::Running(live) | Phase::Exited(live, _) => counted(live.cgroup.directory()),
        };
        stats.session_id.clone_from(&session.id);
        stats.at_ns = now_ns();
        stats.writable_layer = self.layer(&session.id, &paths::session_dir(&session.id).join("upper"), end);
        Some(stats)
    }

    fn layer(&self, id: &str, upper: &Path, end: Instant) -> Option<WritableLayerStats> {
        let mut layers = self.layers.lock().expect("nobody panics under this lock");
        let known = layers.get(id);
        let started = Instant::now();
        if started >= end || known.is_some_and(|m| started < m.due) {
            return known.map(|m| m.layer);
        }
        let usage = layer::measure(upper, end.min(started + LAYER_BUDGET)).ok()?;
        let disk = rustix::fs::statvfs(upper).ok()?;
        let layer = WritableLayerStats {
            used_bytes: usage.bytes,
            inodes: usage.inodes,
            at_least: !usage.complete,
            at_ns: now_ns(),
            limit_bytes: disk.f_blocks.saturating_mul(disk.f_frsize),
            inodes_total: disk.f_files,
            inodes_free: disk.f_ffree,
        };
        let done = Instant::now();
        let due = done + (done - started) * REST;
        layers.insert(id.to_owned(), Measured { layer, due });
        Some(layer)
    }

    fn forget_all_but(&self, sessions: &[Arc<Session>]) {
        let ids: HashSet<&str> = sessions.iter().map(|s| s.id.as_str()).collect();
        self.layers.lock().expect("nobody panics under this lock").retain(|id, _| ids.contains(id.as_str()));
    }
}

/// The process that waits to become the session's has a cost, but it is ours.
fn not_started() -> SessionStats {
    SessionStats {
        cpu: Some(Default::default()),
        memory: Some(Default::default()),
        io: Some(Default::default()),
        ..Default::default()
    }
}

/// Counters of a cgroup go on counting what was in cgroups below it that are gone.
fn pod() -> Option<SessionStats> {
    let cgroup = Cgroup::pod().ok()?;
    Some(SessionStats { at_ns: now_ns(), ..counted(cgroup.directory()) })
}

fn counted(cgroup: BorrowedFd<'_>) -> SessionStats {
    let read = |file: &str| counters::read(cgroup, file).ok();
    let pressure = |file: &str| read(file).map(|text| counters::pressure(&text));
    let processes = read("cgroup.procs").unwrap_or_default();
    let open = open::count(&processes);
    SessionStats {
        cpu: read("cpu.stat").map(|text| counters::cpu(&text)),
        memory: counters::memory(read),
        pids: read("pids.current").and_then(|text| counters::number(&text)).unwrap_or(0),
        processes: processes.lines().count() as u64,
        file_descriptors: open.files,
        sockets: open.sockets,
        threads_max: read("pids.max").and_then(|text| counters::number(&text)).unwrap_or(0),
        io: read("io.stat").map(|text| counters::io(&text)),
        cpu_pressure: pressure("cpu.pressure"),
        memory_pressure: pressure("memory.pressure"),
        io_pressure: pressure("io.pressure"),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_counted_again_when_it_is_due_and_not_before() {
        let upper = tempfile::tempdir().unwrap();
        let collector = Collector::default();
        let far = Instant::now() + Duration::from_secs(60);
        assert_eq!(collector.layer("s", upper.path(), far).unwrap().inodes, 1);
        std::fs::write(upper.path().join("new"), "x").unwrap();
        let set_due = |due| collector.layers.lock().unwrap().get_mut("s").unwrap().due = due;
        set_due(far);
        assert_eq!(collector.layer("s", upper.path(), far).unwrap().inodes, 1);
        set_due(Instant::now());
        assert_eq!(collector.layer("s", upper.path(), far).unwrap().inodes, 2);
    }

    #[test]
    fn a_call_without_time_left_answers_with_the_last_figure() {
        let upper = tempfile::tempdir().unwrap();
        let collector = Collector::default();
        assert_eq!(collector.layer("s", upper.path(), Instant::now()), None);
        let known = collector.layer("s", upper.path(), Instant::now() + Duration::from_secs(60));
        assert!(known.is_some());
        assert_eq!(collector.layer("s", upper.path(), Instant::now()), known);
        collector.forget_all_but(&[]);
        assert_eq!(collector.layer("s", upper.path(), Instant::now()), None);
    }
}
