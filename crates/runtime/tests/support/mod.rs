//! A world without hypervisors: VMs, guests, networks and disks that fail when they are told to.
//!
//! The guests live on a runtime of their own and outlive daemons, as real VMs do. A daemon has its own runtime too, so
//! that it can be killed at any moment by dropping it.

// Each test file uses its own part.
#![allow(dead_code, unreachable_pub)]

pub mod guest;
pub mod machine;

use std::collections::BTreeSet;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::runtime::Runtime;
use tokio::sync::watch;

use a3s_box_core::image::{ImageConfig, Layer, ResolvedImage};
use a3s_box_core::network::{Interface, InterfaceUsage, PodNamespace, PodNetwork, Traffic};
use a3s_box_core::spec::{BoxSize, BoxSpec, MountSource, MountSpec, PodIdentity, ProcessSpec, SessionSpec};
use a3s_box_core::storage::{Change, Record, Storage, StorageError, Table};
use a3s_box_core::{BoxId, SessionId};
use a3s_box_runtime::network::{NetworkFault, PreparedNetwork};
use a3s_box_runtime::{
    BoxManager, NetworkReadiness, NetworkSetting, PodNetworks, RuntimeConfig, RuntimeError,
};
use a3s_box_store::RedbStore;
use machine::FakeVmm;

/// Counts the calls of all seams and fails one of them.
#[derive(Default)]
pub struct Faults(Mutex<(usize, Option<usize>, Vec<String>)>);

impl Faults {
    pub fn fail_at(&self, call: usize) {
        *self.0.lock().unwrap() = (0, Some(call), Vec::new());
    }

    /// Fails nothing more; answers the name of the call that failed, if one did.
    pub fn heal(&self) -> Option<String> {
        let (calls, fail_at, names) = std::mem::take(&mut *self.0.lock().unwrap());
        fail_at.filter(|call| *call <= calls).map(|call| names[call - 1].clone())
    }

    pub fn hit(&self, name: &str) -> std::io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.0 += 1;
        state.2.push(name.to_owned());
        if state.1 == Some(state.0) {
            Err(std::io::Error::other(format!("injected fault in {name}")))
        } else {
            Ok(())
        }
    }
}

struct FaultyStorage {
    inner: Arc<RedbStore>,
    faults: Arc<Faults>,
    /// Held: the disk does not answer.
    disk: Arc<RwLock<()>>,
}

impl FaultyStorage {
    fn hit(&self, name: &str) -> Result<(), StorageError> {
        let failed = |source| StorageError { operation: name.to_owned(), source: Box::new(source) };
        self.faults.hit(name).map_err(failed)
    }
}

impl Storage for FaultyStorage {
    fn get(&self, table: Table, key: &str) -> Result<Option<Vec<u8>>, StorageError> {
        self.hit("storage get")?;
        self.inner.get(table, key)
    }
    fn scan(&self, table: Table) -> Result<Vec<Record>, StorageError> {
        self.hit("storage scan")?;
        self.inner.scan(table)
    }
    fn commit(&self, changes: Vec<Change>) -> Result<(), StorageError> {
        self.hit("storage commit")?;
        let _answers = self.disk.read().unwrap();
        self.inner.commit(changes)
    }
}

/// A network adapter that remembers whom it connected.
pub struct FakeNetworks {
    faults: Arc<Faults>,
    pub held: Mutex<BTreeSet<BoxId>>,
    /// What a new daemon asked it: `check <id>`, `collect`.
    pub asked: Mutex<Vec<String>>,
    /// How many a pod gets; one is expected.
    pub interfaces: AtomicU8,
    /// Whether it answers when pods are to be connected.
    pub answers: watch::Sender<bool>,
    /// Whose network is not as it was.
    pub broken: Mutex<BTreeSet<BoxId>>,
}

/// What the adapter has prepared for a box.
struct FakeNamespace {
    faults: Arc<Faults>,
    namespace: PodNamespace,
    interfaces: u8,
    answers: watch::Receiver<bool>,
}

#[async_trait]
impl PreparedNetwork for FakeNamespace {
    fn namespace(&self) -> &PodNamespace {
        &self.namespace
    }

    async fn connect(mut self: Box<Self>) -> Result<PodNetwork, NetworkFault> {
        self.answers.wait_for(|answers| *answers).await.unwrap();
        self.faults.hit("network connect").map_err(|error| NetworkFault(Box::new(error)))?;
        let interface = |n: u8| Interface {
            name: format!("eth{n}"),
            mac: [2, 0, 0, 0, 0, 1 + n],
            mtu: 1500,
            addresses: vec![a3s_box_core::network::Address { ip: [10, 9, 8, 7 + n].into(), prefix: 24 }],
            routes: Vec::new(),
            tap: format!("tap{n}"),
        };
        let interfaces = (0..self.interfaces).map(interface).collect();
        Ok(PodNetwork { netns: self.namespace.netns, interfaces, dns: None })
    }
}

#[async_trait]
impl PodNetworks for FakeNetworks {
    async fn prepare(&self, id: &BoxId, _spec: &BoxSpec) -> Result<Box<dyn PreparedNetwork>, NetworkFault> {
        self.held.lock().unwrap().insert(id.clone());
        // Half made: the caller must take it down.
        self.faults.hit("network prepare").map_err(|error| NetworkFault(Box::new(error)))?;
        let namespace = PodNamespace { netns: "/var/run/netns/fake".into(), taps: vec!["tap0".to_owned()] };
        let (faults, interfaces) = (self.faults.clone(), self.interfaces.load(Ordering::Relaxed));
        let answers = self.answers.subscribe();
        Ok(Box::new(FakeNamespace { faults, namespace, interfaces, answers }))
    }

    async fn held(&self) -> Result<Vec<BoxId>, NetworkFault> {
        Ok(self.held.lock().unwrap().iter().cloned().collect())
    }

    async fn resume(&self, _id: &BoxId) -> Result<(), NetworkFault> {
        Ok(())
    }

    async fn teardown(&self, id: &BoxId, _known: Option<&PodNetwork>) -> Result<(), NetworkFault> {
        self.faults.hit("network teardown").map_err(|error| NetworkFault(Box::new(error)))?;
        self.held.lock().unwrap().remove(id);
        Ok(())
    }

    async fn usage(&self, network: &PodNetwork) -> Result<Vec<InterfaceUsage>, NetworkFault> {
        let received = Traffic { bytes: 7, packets: 1, ..Traffic::default() };
        let usage = |interface: &Interface| InterfaceUsage {
            name: interface.name.clone(),
            received,
            ..InterfaceUsage::default()
        };
        Ok(network.interfaces.iter().map(usage).collect())
    }

    async fn check(&self, id: &BoxId) -> Result<(), NetworkFault> {
        self.asked.lock().unwrap().push(format!("check {id}"));
        match self.broken.lock().unwrap().contains(id) {
            true => Err(NetworkFault("its interface is gone".into())),
            false => Ok(()),
        }
    }

    async fn collect_garbage(&self) -> Result<(), NetworkFault> {
        self.asked.lock().unwrap().push("collect".to_owned());
        Ok(())
    }

    async fn assign_pod_cidrs(&self, _cidrs: &[a3s_box_core::network::Address]) -> Result<(), NetworkFault> {
        Ok(())
    }

    async fn readiness(&self) -> NetworkReadiness {
        NetworkReadiness { ready: true, reason: String::new(), message: String::new() }
    }
}

/// Everything that outlives a daemon.
pub struct World {
    pub dir: tempfile::TempDir,
    pub faults: Arc<Faults>,
    pub networks: Arc<FakeNetworks>,
    pub vmm: Arc<FakeVmm>,
    /// While it is held for writing, the store's disk does not answer.
    pub disk: Arc<RwLock<()>>,
    store: Arc<RedbStore>,
    guests: Option<Runtime>,
}

impl World {
    pub fn new() -> Self {
        let guests =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let faults = Arc::new(Faults::default());
        Self {
            dir: tempfile::tempdir().unwrap(),
            networks: Arc::new(FakeNetworks {
                interfaces: AtomicU8::new(1),
                answers: watch::Sender::new(true),
                faults: faults.clone(),
                held: Mutex::default(),
                asked: Mutex::default(),
                broken: Mutex::default(),
            }),
            vmm: Arc::new(FakeVmm::new(faults.clone(), guests.handle().clone())),
            disk: Arc::default(),
            store: Arc::new(RedbStore::in_memory().unwrap()),
            faults,
            guests: Some(guests),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn config(&self) -> RuntimeConfig {
        let mut config = RuntimeConfig::new(
            self.path("run"),
            self.path("state"),
            self.path("vmlinux"),
            self.path("initramfs"),
        );
        config.use_cgroups = false;
        config.network = NetworkSetting::Pods(self.networks.clone());
        config.call_limit = Duration::from_secs(5);
        config.stop_limit = Duration::from_secs(2);
        config.kill_limit = Duration::from_millis(500);
        config
    }

    /// Starts a daemon on what the last one left.
    pub fn daemon(&self) -> Daemon {
        self.daemon_with(self.config()).unwrap()
    }

    pub fn daemon_with(&self, config: RuntimeConfig) -> Result<Daemon, RuntimeError> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let storage = Arc::new(FaultyStorage {
            inner: self.store.clone(),
            faults: self.faults.clone(),
            disk: self.disk.clone(),
        });
        let manager = runtime.block_on(BoxManager::start(config, storage, self.vmm.clone()))?;
        Ok(Daemon { runtime: Some(runtime), manager })
    }

    /// What is left of boxes anywhere, after at most a few seconds.
    pub fn leftovers(&self) -> Vec<String> {
        let deadline = Instant::now() + Duration::from_secs(8);
        loop {
            let found = self.look();
            if found.is_empty() || Instant::now() > deadline {
                return found;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Empties the state store.
    pub fn forget_records(&self) {
        for table in ["boxes", "sessions"].map(Table) {
            let records = self.store.scan(table).unwrap().into_iter();
            self.store.commit(records.map(|(key, _)| Change::Delete { table, key }).collect()).unwrap();
        }
    }

    /// Takes the sessions out of the state store.
    pub fn forget_sessions(&self) {
        let table = Table("sessions");
        let records = self.store.scan(table).unwrap().into_iter();
        self.store.commit(records.map(|(key, _)| Change::Delete { table, key }).collect()).unwrap();
    }

    /// Changes a record past every daemon.
    pub fn change_record(
        &self,
        table: &'static str,
        key: &str,
        change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>),
    ) {
        let value = self.store.get(Table(table), key).unwrap().unwrap();
        let mut record = serde_json::from_slice(&value).unwrap();
        change(&mut record);
        self.write_record(table, key, &serde_json::to_vec(&record).unwrap());
    }

    /// Writes a record past every daemon.
    pub fn write_record(&self, table: &'static str, key: &str, value: &[u8]) {
        let change = Change::Put { table: Table(table), key: key.to_owned(), value: value.to_vec() };
        self.store.commit(vec![change]).unwrap();
    }

    /// A record as it is in the store.
    pub fn record(&self, table: &'static str, key: &str) -> serde_json::Value {
        serde_json::from_slice(&self.store.get(Table(table), key).unwrap().unwrap()).unwrap()
    }

    fn look(&self) -> Vec<String> {
        let mut found = Vec::new();
        for directory in ["run/boxes", "state/boxes", "run/log-positions"] {
            let entries = std::fs::read_dir(self.path(directory)).into_iter().flatten().flatten();
            found.extend(entries.map(|entry| format!("{}", entry.path().display())));
        }
        for table in ["boxes", "sessions"] {
            let records = self.store.scan(Table(table)).unwrap();
            found.extend(records.into_iter().map(|(key, _)| format!("record {table}/{key}")));
        }
        found.extend(self.networks.held.lock().unwrap().iter().map(|id| format!("network of {id}")));
        found.extend(self.vmm.running().into_iter().map(|pid| format!("VM {pid}")));
        found
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(guests) = self.guests.take() {
            guests.shutdown_background();
        }
    }
}

/// A daemon, as long as it lives.
pub struct Daemon {
    runtime: Option<Runtime>,
    pub manager: BoxManager,
}

impl Daemon {
    /// Runs a client's part.
    pub fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.as_ref().unwrap().block_on(work)
    }

    /// Starts something that nobody waits for.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.runtime.as_ref().unwrap().spawn(work)
    }

    /// Ends as SIGKILL does: no task runs on.
    pub fn kill(mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub fn pod(name: &str, logs: &Path) -> BoxSpec {
    BoxSpec {
        identity: PodIdentity {
            name: name.to_owned(),
            namespace: "n".to_owned(),
            uid: "u".to_owned(),
            attempt: 0,
        },
        log_directory: Some(logs.to_owned()),
        size: BoxSize { vcpus: 1, memory_mib: 64, scratch_mib: 64 },
        ..BoxSpec::default()
    }
}

/// A container whose first word says what the fake guest does: see [`guest`].
pub fn container(name: &str, args: &[&str]) -> SessionSpec {
    SessionSpec {
        name: name.to_owned(),
        log_path: Some(format!("{name}/0.log").into()),
        process: process(args),
        stop_signal: 15,
        ..SessionSpec::default()
    }
}

pub fn process(args: &[&str]) -> ProcessSpec {
    ProcessSpec { args: args.iter().map(ToString::to_string).collect(), ..ProcessSpec::default() }
}

pub fn with_volume(mut spec: SessionSpec, path: &Path) -> SessionSpec {
    spec.mounts.push(MountSpec {
        source: MountSource::Host {
            path: path.to_owned(),
            propagate: false,
            recursive_readonly: false,
            id_mapped: None,
        },
        target: "/data".to_owned(),
        readonly: false,
        options: Vec::new(),
    });
    spec
}

pub fn image(dir: &Path) -> ResolvedImage {
    let erofs = dir.join("layer.erofs");
    std::fs::write(&erofs, b"layer").unwrap();
    ResolvedImage {
        id: "sha256:00".to_owned(),
        digest_ref: "x@sha256:00".to_owned(),
        config: ImageConfig::default(),
        layers: vec![Layer { diff_id: "sha256:0a".to_owned(), erofs }],
    }
}

/// The contents of a log's lines.
pub fn log_lines(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap_or("").to_owned()).collect()
}

/// Creates and starts a container.
pub async fn launch(
    manager: &BoxManager,
    id: &BoxId,
    spec: SessionSpec,
    image: ResolvedImage,
) -> Result<SessionId, a3s_box_runtime::RuntimeError> {
    let session = manager.create_session(id, spec, image).await?;
    manager.start_session(&session).await?;
    Ok(session)
}
