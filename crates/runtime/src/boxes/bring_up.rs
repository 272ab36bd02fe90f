//! A box's way up, as a chain of phases.
//!
//! ```text
//!   Reserved ──connect──► Networked ──boot──► Booted ──configure──► LiveBox
//!      │ fail                 │ fail             │ fail
//!      ▼                      ▼                  ▼
//!   directories, record ◄── network ◄────────── VM
//! ```
//!
//! Each phase is a type. Its `fail` undoes what that phase holds and hands the rest to the phase before, so
//! there is one place per object where it is undone, however the start ended. Everything
//! that may come to exist is in the record's ledger before the first of it is made.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::OwnedSemaphorePermit;
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use a3s_box_core::lifecycle::BoxPhase;
use a3s_box_core::network::{Address, Interface, PodNetwork};
use a3s_box_core::spec::{IdRange, UserNamespace};
use a3s_box_protocol::proto::{self, Ready};
use a3s_box_protocol::{AGENT_IMAGE_PORT, PROTOCOL};
use a3s_box_vmm::error::MachineError;
use a3s_box_vmm::{BoxPlan, Machine, PlanNetwork, PlanNic};

use super::live::{LiveBox, last_words};
use super::release::{object, release};
use crate::agent_client::Agent;
use crate::api::Stage;
use crate::cgroup;
use crate::clock::now_ns;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::network::NetworkSetting;
use crate::records::{BoxRecord, HostObject};
use crate::sessions::BoxFacts;
use crate::shared::Shared;
use crate::text::printable;

/// Stages of a guest's boot beyond this are not recorded: the guest says how many there are.
const MAX_GUEST_STAGES: usize = 16;

/// A start that failed. The record's ledger holds what could not be undone.
pub(crate) struct Failed {
    pub(crate) error: RuntimeError,
    pub(crate) record: BoxRecord,
}

/// What every phase carries along.
struct Work {
    shared: Arc<Shared>,
    record: BoxRecord,
    cancel: CancellationToken,
    publish: Box<dyn Fn(&BoxRecord) + Send + Sync>,
}

impl Work {
    fn error(&self, kind: ErrorKind, stage: FailedStage, message: impl Into<String>) -> RuntimeError {
        RuntimeError::new(kind, stage, object(&self.record.id), message)
    }

    fn caused(
        &self,
        kind: ErrorKind,
        stage: FailedStage,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> RuntimeError {
        RuntimeError::caused(kind, stage, object(&self.record.id), source)
    }

    async fn save(&self, stage: FailedStage) -> Result<(), RuntimeError> {
        let saved = self.shared.records.put_box(&self.record).await;
        saved.map_err(|error| RuntimeError::storage(stage, object(&self.record.id), error))
    }

    fn enter(&mut self, phase: BoxPhase) {
        self.record.phase = phase;
        (self.publish)(&self.record);
    }

    fn took(&mut self, name: &str, took: Duration) {
        self.record.timeline.push(Stage { name: name.to_owned(), took });
    }

    /// Waits for something that may be dropped half-way, unless the box is to be stopped.
    async fn unless_cancelled<T>(
        &self,
        stage: FailedStage,
        work: impl Future<Output = T>,
    ) -> Result<T, RuntimeError> {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => {
                Err(self.error(ErrorKind::FailedPrecondition, stage, "the pod sandbox was stopped while it was starting"))
            }
            done = work => Ok(done),
        }
    }

    async fn undo(
        &mut self,
        machine: Option<&Arc<dyn Machine>>,
        which: fn(&HostObject) -> bool,
    ) -> Vec<RuntimeError> {
        release(&self.shared, &mut self.record, machine, which).await
    }
}

/// Its name is taken and its ledger is written.
struct Reserved(Work);

/// It has its network, its directories, its scratch disk and its cgroups.
struct Networked {
    before: Reserved,
    cgroups: Vec<PathBuf>,
}

/// Its VM runs and its agent answers.
struct Booted {
    before: Networked,
    live: Arc<LiveBox>,
    /// Until its guest is up, others wait for it.
    _turn: OwnedSemaphorePermit,
}

/// Brings a box up. `publish` is told of every phase.
pub(crate) async fn bring_up(
    shared: Arc<Shared>,
    record: BoxRecord,
    cancel: CancellationToken,
    publish: Box<dyn Fn(&BoxRecord) + Send + Sync>,
) -> Result<(BoxRecord, Arc<LiveBox>), Box<Failed>> {
    let work = Work { shared, record, cancel, publish };
    let reserved = Reserved::reserve(work).await?;
    let networked = reserved.connect().await?;
    let booted = networked.boot().await?;
    booted.configure().await
}

impl Reserved {
    async fn reserve(mut work: Work) -> Result<Self, Box<Failed>> {
        let start = Instant::now();
        if let Err(error) = plan_ledger(&mut work) {
            work.record.ledger.clear();
            return Err(Box::new(Failed { error, record: work.record }));
        }
        let saved = work.save(FailedStage::Reserve).await;
        work.took("reserve", start.elapsed());
        match saved {
            Ok(()) => Ok(Self(work)),
            Err(error) => Err(Self(work).fail(error).await),
        }
    }

    async fn connect(mut self) -> Result<Networked, Box<Failed>> {
        match self.0.connect().await {
            Ok(cgroups) => Ok(Networked { before: self, cgroups }),
            // The network may be half made: it is undone as if it were whole.
            Err(error) => Err(Networked { before: self, cgroups: Vec::new() }.fail(error).await),
        }
    }

    async fn fail(mut self, error: RuntimeError) -> Box<Failed> {
        let left = self.0.undo(None, |held| !matches!(held, HostObject::Vmm | HostObject::Network)).await;
        Box::new(Failed { error: error.with_leftovers(&left), record: self.0.record })
    }
}

impl Networked {
    async fn boot(mut self) -> Result<Booted, Box<Failed>> {
        let turn = match self.before.0.await_turn().await {
            Ok(turn) => turn,
            Err(error) => return Err(self.fail(error).await),
        };
        let work = &mut self.before.0;
        let plan = plan(work, std::mem::take(&mut self.cgroups));
        work.record.plan = Some(plan.clone());
        work.enter(BoxPhase::Booting);
        let start = Instant::now();
        let launched = work.shared.vmm.launch(&plan).await;
        work.took("vmm", start.elapsed());
        let machine: Arc<dyn Machine> = match launched {
            Ok(machine) => Arc::from(machine),
            Err(error) => {
                let error = work.caused(ErrorKind::Internal, FailedStage::Vmm, error);
                return Err(self.fail(error).await);
            }
        };
        work.record.machine = Some(machine.facts());
        let live = Arc::new(LiveBox {
            agent: Agent::new(machine.clone(), work.shared.config.call_limit),
            facts: BoxFacts::of(&work.record),
            network: work.record.network.clone(),
            machine,
        });
        let booted = Booted { before: self, live, _turn: turn };
        booted.await_agent().await
    }

    async fn fail(mut self, error: RuntimeError) -> Box<Failed> {
        let left = self.before.0.undo(None, |held| matches!(held, HostObject::Network)).await;
        self.before.fail(error.with_leftovers(&left)).await
    }
}

impl Booted {
    async fn await_agent(mut self) -> Result<Self, Box<Failed>> {
        let start = Instant::now();
        let live = self.live.clone();
        let work = &mut self.before.before.0;
        let limit = work.shared.config.boot_limit;
        // The record is written while the guest boots.
        let waited = tokio::join!(
            work.unless_cancelled(FailedStage::Boot, live.machine.ready(limit)),
            work.save(FailedStage::Vmm)
        );
        let ready = match waited {
            (Ok(Ok(ready)), Ok(())) => ready,
            (Ok(Err(error)), _) => {
                let error = boot_error(work, error);
                return Err(self.fail(error).await);
            }
            (Err(error), _) | (_, Err(error)) => return Err(self.fail(error).await),
        };
        let booted = start.elapsed();
        match work.accept(&ready, booted) {
            Ok(()) => Ok(self),
            Err(error) => Err(self.fail(error).await),
        }
    }

    async fn configure(mut self) -> Result<(BoxRecord, Arc<LiveBox>), Box<Failed>> {
        let start = Instant::now();
        let live = self.live.clone();
        let work = &mut self.before.before.0;
        let configured =
            work.unless_cancelled(FailedStage::Configure, live.agent.configure(request(&work.record))).await;
        work.took("configure", start.elapsed());
        let error = match configured {
            Ok(Ok(())) => {
                work.record.phase = BoxPhase::Ready;
                match work.save(FailedStage::Configure).await {
                    Ok(()) => return Ok((self.before.before.0.record, live)),
                    Err(error) => error,
                }
            }
            Ok(Err(error)) => {
                let words = last_words(live.machine.as_ref()).await;
                error.at(FailedStage::Configure, object(&work.record.id)).with_last_words(&words)
            }
            Err(error) => error,
        };
        Err(self.fail(error).await)
    }

    async fn fail(mut self, error: RuntimeError) -> Box<Failed> {
        let machine = self.live.machine.clone();
        let left = self.before.before.0.undo(Some(&machine), |held| matches!(held, HostObject::Vmm)).await;
        self.before.fail(error.with_leftovers(&left)).await
    }
}

impl Work {
    /// Directories and scratch disk, cgroups, and network, side by side. All run to their end, so that nothing
    /// is made while it is undone.
    async fn connect(&mut self) -> Result<Vec<PathBuf>, RuntimeError> {
        let (scratch, cgroups, network) =
            tokio::join!(self.make_scratch(), self.make_cgroups(), self.make_network());
        let (network, network_took) = network?;
        self.record.timeline.extend(network_took);
        let scratch_took = scratch?;
        self.took("scratch", scratch_took);
        self.record.network = network;
        self.enter(BoxPhase::Networked);
        cgroups
    }

    /// The box's turn to boot. Its network is there already, so that a turn is used for booting only.
    async fn await_turn(&mut self) -> Result<OwnedSemaphorePermit, RuntimeError> {
        let start = Instant::now();
        let turn = self.shared.boots.clone().acquire_owned();
        let turn = self.unless_cancelled(FailedStage::Boot, turn).await?;
        self.took("turn", start.elapsed());
        turn.map_err(|closed| self.caused(ErrorKind::Unavailable, FailedStage::Boot, closed))
    }

    async fn make_scratch(&self) -> Result<Duration, RuntimeError> {
        let start = Instant::now();
        let directories: Vec<PathBuf> = self
            .record
            .ledger
            .iter()
            .filter_map(|held| match held {
                HostObject::RunDir(path) | HostObject::StateDir(path) => Some(path.clone()),
                HostObject::CgroupParent(_)
                | HostObject::Cgroup(_)
                | HostObject::Network
                | HostObject::Vmm => None,
            })
            .collect();
        let made = spawn_blocking(move || directories.iter().try_for_each(private_dir)).await;
        made.unwrap_or_else(|aborted| Err(std::io::Error::other(aborted)))
            .map_err(|error| self.caused(ErrorKind::Internal, FailedStage::Scratch, error))?;
        let target = scratch_path(&self.shared, &self.record);
        self.shared.scratches.make(self.record.spec.size.scratch_mib, target).await.map_err(|error| {
            let kind = if error.is_full() { ErrorKind::ResourceExhausted } else { ErrorKind::Internal };
            self.caused(kind, FailedStage::Scratch, error)
        })?;
        Ok(start.elapsed())
    }

    async fn make_cgroups(&self) -> Result<Vec<PathBuf>, RuntimeError> {
        let planned: Vec<PathBuf> = self
            .record
            .ledger
            .iter()
            .filter_map(|held| match held {
                HostObject::Cgroup(path) => Some(path.clone()),
                HostObject::RunDir(_)
                | HostObject::StateDir(_)
                | HostObject::CgroupParent(_)
                | HostObject::Network
                | HostObject::Vmm => None,
            })
            .collect();
        spawn_blocking(move || cgroup::make(&planned))
            .await
            .map_err(|aborted| self.caused(ErrorKind::Internal, FailedStage::Vmm, aborted))
    }

    async fn make_network(&self) -> Result<(Option<PodNetwork>, Option<Stage>), RuntimeError> {
        let NetworkSetting::Pods(pods) = &self.shared.config.network else { return Ok((None, None)) };
        let start = Instant::now();
        let setup = self
            .unless_cancelled(FailedStage::Network, pods.setup(&self.record.id, &self.record.spec))
            .await?;
        let network =
            setup.map_err(|error| self.caused(ErrorKind::Unavailable, FailedStage::Network, error))?;
        Ok((Some(network), Some(Stage { name: "network".to_owned(), took: start.elapsed() })))
    }

    /// Takes over what the guest says of itself.
    fn accept(&mut self, ready: &Ready, booted: Duration) -> Result<(), RuntimeError> {
        self.took("boot", booted);
        if ready.protocol != PROTOCOL && ready.protocol + 1 != PROTOCOL {
            let message = format!(
                "the guest's agent speaks protocol {}, this program {PROTOCOL} and the one before; \
                 install kernel, initramfs and daemon of one version",
                ready.protocol
            );
            return Err(self.error(ErrorKind::FailedPrecondition, FailedStage::Boot, message));
        }
        self.record.kernel_release = printable(&ready.kernel_release, 128);
        let mut before = Duration::ZERO;
        for stage in ready.stages.iter().take(MAX_GUEST_STAGES) {
            let at = Duration::from_micros(stage.at_us);
            self.took(&format!("guest/{}", printable(&stage.name, 32)), at.saturating_sub(before));
            before = at.max(before);
        }
        Ok(())
    }
}

fn private_dir(path: &PathBuf) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Everything that the box may come to hold, by names that follow from its id.
fn plan_ledger(work: &mut Work) -> Result<(), RuntimeError> {
    let config = &work.shared.config;
    let id = &work.record.id;
    let mut ledger = vec![
        HostObject::RunDir(work.record.dir.clone()),
        HostObject::StateDir(config.state_dir.join("boxes").join(id.as_str())),
    ];
    if config.use_cgroups {
        let planned = cgroup::plan(work.record.spec.cgroup_parent.as_deref(), id)
            .map_err(|error| work.caused(ErrorKind::InvalidArgument, FailedStage::Reserve, error))?;
        ledger.extend(planned.parents.into_iter().map(HostObject::CgroupParent));
        ledger.extend(planned.own.into_iter().map(HostObject::Cgroup));
    }
    if let NetworkSetting::Pods(_) = config.network {
        ledger.push(HostObject::Network);
    }
    ledger.push(HostObject::Vmm);
    work.record.plan = Some(plan(work, Vec::new()));
    work.record.ledger = ledger;
    Ok(())
}

fn scratch_path(shared: &Shared, record: &BoxRecord) -> PathBuf {
    crate::scratch::disk_of(&shared.config.state_dir, &record.id)
}

fn plan(work: &Work, cgroups: Vec<PathBuf>) -> BoxPlan {
    let (config, record) = (&work.shared.config, &work.record);
    BoxPlan {
        id: record.id.clone(),
        dir: record.dir.clone(),
        vcpus: record.spec.size.vcpus,
        memory_mib: record.spec.size.memory_mib,
        kernel: config.kernel.clone(),
        initramfs: config.initramfs.clone(),
        cmdline: config.cmdline.clone(),
        scratch: scratch_path(&work.shared, record),
        network: record.network.as_ref().map(plan_network),
        cgroups,
        guest_ports: vec![AGENT_IMAGE_PORT],
    }
}

fn plan_network(network: &PodNetwork) -> PlanNetwork {
    let nic = |interface: &Interface| PlanNic {
        tap: interface.tap.clone(),
        mac: interface.mac,
        mtu: interface.mtu,
    };
    PlanNetwork { netns: network.netns.clone(), nics: network.interfaces.iter().map(nic).collect() }
}

fn boot_error(work: &Work, error: MachineError) -> RuntimeError {
    let kind = match &error {
        MachineError::NotReady { .. } => ErrorKind::DeadlineExceeded,
        MachineError::Ended { .. } | MachineError::BadReady(_) | MachineError::Signal { .. } => {
            ErrorKind::Internal
        }
    };
    work.caused(kind, FailedStage::Boot, error)
}

fn request(record: &BoxRecord) -> proto::ConfigureSandboxRequest {
    proto::ConfigureSandboxRequest {
        hostname: record.hostname().to_owned(),
        sysctls: record.spec.sysctls.clone().into_iter().collect(),
        interfaces: record.network.iter().flat_map(|network| &network.interfaces).map(interface).collect(),
        shm_bytes: 0,
        unix_time_ns: now_ns().unsigned_abs(),
        user_namespace: record.spec.user_namespace.as_ref().map(user_namespace),
    }
}

fn user_namespace(users: &UserNamespace) -> proto::UserNamespace {
    let range = |ids: IdRange| Some(proto::IdRange { start: ids.start, count: ids.count });
    proto::UserNamespace { uids: range(users.uids), gids: range(users.gids) }
}

fn interface(interface: &Interface) -> proto::NetworkInterface {
    proto::NetworkInterface {
        name: interface.name.clone(),
        mac: interface.mac.to_vec(),
        mtu: interface.mtu,
        addresses: interface.addresses.iter().map(ip_network).collect(),
        routes: interface
            .routes
            .iter()
            .map(|route| proto::Route {
                destination: Some(ip_network(&route.destination)),
                gateway: route.gateway.map(octets).unwrap_or_default(),
            })
            .collect(),
    }
}

fn ip_network(address: &Address) -> proto::IpNetwork {
    proto::IpNetwork { ip: octets(address.ip), prefix: u32::from(address.prefix) }
}

fn octets(ip: std::net::IpAddr) -> Vec<u8> {
    match ip {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}
