//! A box's way up, as a chain of phases.
//!
//! ```text
//!   Reserved ──prepare──► Prepared ──boot, connect──► Booted ──configure──► LiveBox
//!      │ fail                 │ fail                     │ fail
//!      ▼                      ▼                          ▼
//!   directories, record ◄── network ◄────────────────── VM
//! ```
//!
//! The guest boots while its network is made: it has NICs on taps that lead nowhere yet, and learns from the agent's
//! configuration what they are.
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

use a3s_box_core::BoxId;
use a3s_box_core::lifecycle::BoxPhase;
use a3s_box_core::network::PodNetwork;
use a3s_box_protocol::PROTOCOL;
use a3s_box_protocol::proto::Ready;
use a3s_box_vmm::error::MachineError;
use a3s_box_vmm::{BoxPlan, Machine};

use super::live::{LiveBox, last_words};
use super::plan::{configuration, nics, plan};
use super::release::{end_vm, object, release};
use crate::agent_client::Agent;
use crate::api::Stage;
use crate::cgroup;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::network::{NetworkSetting, PreparedNetwork};
use crate::records::{BoxRecord, HostObject};
use crate::scratch::disk_of;
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
    began: Instant,
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

    /// Notes a stage that began at `since` and ends now.
    fn took(&mut self, name: &str, since: Instant) {
        let stage = self.stage(name, since);
        self.record.timeline.push(stage);
    }

    fn stage(&self, name: &str, since: Instant) -> Stage {
        stage(self.began, name, since)
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

/// Its VM has all that it needs to start: directories, a scratch disk, cgroups, a network namespace.
struct Prepared {
    before: Reserved,
    cgroups: Vec<PathBuf>,
    /// Until it is connected.
    network: Option<Box<dyn PreparedNetwork>>,
}

/// Its VM runs, its agent answers, and it has its network.
struct Booted {
    before: Prepared,
    live: Arc<LiveBox>,
}

/// Brings a box up. `publish` is told of every phase.
pub(crate) async fn bring_up(
    shared: Arc<Shared>,
    record: BoxRecord,
    cancel: CancellationToken,
    publish: Box<dyn Fn(&BoxRecord) + Send + Sync>,
) -> Result<(BoxRecord, Arc<LiveBox>), Box<Failed>> {
    let work = Work { shared, record, cancel, publish, began: Instant::now() };
    let reserved = Reserved::reserve(work).await?;
    let prepared = reserved.prepare().await?;
    let booted = prepared.boot().await?;
    booted.configure().await
}

/// A stage of a start that began at `began`; itself it began at `since`, and it ends now.
fn stage(began: Instant, name: &str, since: Instant) -> Stage {
    Stage { name: name.to_owned(), at: since.duration_since(began), took: since.elapsed() }
}

/// Waits for something that may be dropped half-way, unless the box is to be stopped.
async fn unless_cancelled<T>(
    cancel: &CancellationToken,
    id: &BoxId,
    stage: FailedStage,
    work: impl Future<Output = T>,
) -> Result<T, RuntimeError> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => {
            let why = "the pod sandbox was stopped while it was starting";
            Err(RuntimeError::new(ErrorKind::FailedPrecondition, stage, object(id), why))
        }
        done = work => Ok(done),
    }
}

impl Reserved {
    async fn reserve(mut work: Work) -> Result<Self, Box<Failed>> {
        let start = Instant::now();
        if let Err(error) = plan_ledger(&mut work) {
            work.record.ledger.clear();
            return Err(Box::new(Failed { error, record: work.record }));
        }
        let saved = work.save(FailedStage::Reserve).await;
        work.took("reserve", start);
        match saved {
            Ok(()) => Ok(Self(work)),
            Err(error) => Err(Self(work).fail(error).await),
        }
    }

    async fn prepare(mut self) -> Result<Prepared, Box<Failed>> {
        match self.0.prepare().await {
            Ok((cgroups, network)) => Ok(Prepared { before: self, cgroups, network }),
            // The network may be half made: it is undone as if it were whole.
            Err(error) => {
                Err(Prepared { before: self, cgroups: Vec::new(), network: None }.fail(None, error).await)
            }
        }
    }

    async fn fail(mut self, error: RuntimeError) -> Box<Failed> {
        let left = self.0.undo(None, |held| !matches!(held, HostObject::Vmm | HostObject::Network)).await;
        Box::new(Failed { error: error.with_leftovers(&left), record: self.0.record })
    }
}

impl Prepared {
    /// Boots the guest and connects its network side by side. What fails first ends the other.
    async fn boot(mut self) -> Result<Booted, Box<Failed>> {
        let work = &mut self.before.0;
        let (cancel, id) = (work.cancel.clone(), work.record.id.clone());
        let network = self.network.take();
        let namespace = network.as_ref().map(|network| network.namespace().clone());
        let cgroups = std::mem::take(&mut self.cgroups);
        let plan = plan(&work.shared.config, &work.record, cgroups, namespace.as_ref());
        work.enter(BoxPhase::Booting);
        let mut started = None;
        let up = async {
            let connecting = connect(&id, network, work.began);
            let (connected, machine) = tokio::try_join!(connecting, work.boot(&plan, &mut started))?;
            if let Some((network, stage)) = connected {
                work.record.timeline.push(stage);
                work.record.network = Some(network);
            }
            match work.with_all_nics(plan) {
                None => Ok(machine),
                Some(plan) => work.boot_again(&plan, &mut started).await,
            }
        };
        let machine = match unless_cancelled(&cancel, &id, FailedStage::Boot, up).await {
            Ok(Ok(machine)) => machine,
            Ok(Err(error)) | Err(error) => return Err(self.fail(started, error).await),
        };
        work.record.timeline.sort_by_key(|stage| stage.at);
        let live = Arc::new(LiveBox {
            agent: Agent::new(machine.clone(), work.shared.config.call_limit),
            facts: BoxFacts::of(&work.record),
            network: work.record.network.clone(),
            machine,
        });
        Ok(Booted { before: self, live })
    }

    async fn fail(mut self, machine: Option<Arc<dyn Machine>>, error: RuntimeError) -> Box<Failed> {
        // Whoever is half-way connected would keep the network from being taken down.
        self.network = None;
        let ended = self.before.0.undo(machine.as_ref(), |held| matches!(held, HostObject::Vmm)).await;
        let error = error.with_leftovers(&ended);
        let left = self.before.0.undo(None, |held| matches!(held, HostObject::Network)).await;
        self.before.fail(error.with_leftovers(&left)).await
    }
}

/// Connects a box that is to have a network.
async fn connect(
    id: &BoxId,
    network: Option<Box<dyn PreparedNetwork>>,
    began: Instant,
) -> Result<Option<(PodNetwork, Stage)>, RuntimeError> {
    let Some(network) = network else { return Ok(None) };
    let start = Instant::now();
    let network = network.connect().await.map_err(|error| {
        RuntimeError::caused(ErrorKind::Unavailable, FailedStage::Network, object(id), error)
    })?;
    Ok(Some((network, stage(began, "network", start))))
}

impl Booted {
    async fn configure(mut self) -> Result<(BoxRecord, Arc<LiveBox>), Box<Failed>> {
        let start = Instant::now();
        let live = self.live.clone();
        let work = &mut self.before.before.0;
        let configuring = live.agent.configure(configuration(&work.record));
        let configured =
            unless_cancelled(&work.cancel, &work.record.id, FailedStage::Configure, configuring).await;
        work.took("configure", start);
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

    async fn fail(self, error: RuntimeError) -> Box<Failed> {
        let machine = self.live.machine.clone();
        self.before.fail(Some(machine), error).await
    }
}

impl Work {
    /// Directories and scratch disk, cgroups, and network namespace, side by side. All run to their end, so that nothing
    /// is made while it is undone.
    async fn prepare(&mut self) -> Result<(Vec<PathBuf>, Option<Box<dyn PreparedNetwork>>), RuntimeError> {
        let (scratch, cgroups, network) =
            tokio::join!(self.make_scratch(), self.make_cgroups(), self.make_namespace());
        let (network, stage) = network?;
        self.record.timeline.extend(stage);
        self.record.timeline.push(scratch?);
        self.enter(BoxPhase::Prepared);
        Ok((cgroups?, network))
    }

    /// Boots the guest and waits for its agent. `started` has the VM as soon as there is one, so that it can be ended
    /// whatever becomes of this.
    async fn boot(
        &mut self,
        plan: &BoxPlan,
        started: &mut Option<Arc<dyn Machine>>,
    ) -> Result<Arc<dyn Machine>, RuntimeError> {
        // Until its guest is up, others wait for it.
        let _turn = self.await_turn().await?;
        self.record.plan = Some(plan.clone());
        let start = Instant::now();
        let launched = self.shared.vmm.launch(plan).await;
        self.took("vmm", start);
        let machine: Arc<dyn Machine> = match launched {
            Ok(machine) => Arc::from(machine),
            Err(error) => return Err(self.caused(ErrorKind::Internal, FailedStage::Vmm, error)),
        };
        *started = Some(machine.clone());
        self.record.machine = Some(machine.facts());
        let start = Instant::now();
        let ready = machine.ready(self.shared.config.boot_limit).await;
        self.took("boot", start);
        self.accept(&ready.map_err(|error| boot_error(self, error))?, start)?;
        Ok(machine)
    }

    /// A new plan for a pod that has more interfaces than its VM has NICs: none can be plugged into a guest that runs.
    fn with_all_nics(&self, mut plan: BoxPlan) -> Option<BoxPlan> {
        let interfaces = &self.record.network.as_ref()?.interfaces;
        let network = plan.network.as_mut()?;
        if network.nics.len() >= interfaces.len() {
            return None;
        }
        network.nics = nics(interfaces.iter().map(|interface| &interface.tap));
        Some(plan)
    }

    async fn boot_again(
        &mut self,
        plan: &BoxPlan,
        started: &mut Option<Arc<dyn Machine>>,
    ) -> Result<Arc<dyn Machine>, RuntimeError> {
        tracing::info!(id = %self.record.id, "the pod has more interfaces than the one before it; its guest boots again");
        if let Some(machine) = started.as_ref() {
            end_vm(&self.shared, &self.record, Some(machine)).await?;
        }
        *started = None;
        self.boot(plan, started).await
    }

    /// The box's turn to boot.
    async fn await_turn(&mut self) -> Result<OwnedSemaphorePermit, RuntimeError> {
        let start = Instant::now();
        let turn = self.shared.boots.clone().acquire_owned().await;
        self.took("turn", start);
        turn.map_err(|closed| self.caused(ErrorKind::Unavailable, FailedStage::Boot, closed))
    }

    async fn make_scratch(&self) -> Result<Stage, RuntimeError> {
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
        let target = disk_of(&self.shared.config.state_dir, &self.record.id);
        self.shared.scratches.make(self.record.spec.size.scratch_mib, target).await.map_err(|error| {
            let kind = if error.is_full() { ErrorKind::ResourceExhausted } else { ErrorKind::Internal };
            self.caused(kind, FailedStage::Scratch, error)
        })?;
        Ok(self.stage("scratch", start))
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

    async fn make_namespace(
        &self,
    ) -> Result<(Option<Box<dyn PreparedNetwork>>, Option<Stage>), RuntimeError> {
        let NetworkSetting::Pods(pods) = &self.shared.config.network else { return Ok((None, None)) };
        let start = Instant::now();
        let preparing = pods.prepare(&self.record.id, &self.record.spec);
        let prepared =
            unless_cancelled(&self.cancel, &self.record.id, FailedStage::Network, preparing).await?;
        let network =
            prepared.map_err(|error| self.caused(ErrorKind::Unavailable, FailedStage::Network, error))?;
        Ok((Some(network), Some(self.stage("netns", start))))
    }

    /// Takes over what the guest says of itself.
    fn accept(&mut self, ready: &Ready, start: Instant) -> Result<(), RuntimeError> {
        if ready.protocol != PROTOCOL {
            let message = format!(
                "the guest's agent speaks protocol {}, this program {PROTOCOL}; install kernel, initramfs and daemon of \
                 one version",
                ready.protocol
            );
            return Err(self.error(ErrorKind::FailedPrecondition, FailedStage::Boot, message));
        }
        self.record.agent_protocol = ready.protocol;
        self.record.kernel_release = printable(&ready.kernel_release, 128);
        let mut before = Duration::ZERO;
        for stage in ready.stages.iter().take(MAX_GUEST_STAGES) {
            let until = Duration::from_micros(stage.at_us);
            self.record.timeline.push(Stage {
                name: format!("guest/{}", printable(&stage.name, 32)),
                at: start.duration_since(self.began) + before,
                took: until.saturating_sub(before),
            });
            before = until.max(before);
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
    work.record.plan = Some(plan(&work.shared.config, &work.record, Vec::new(), None));
    work.record.ledger = ledger;
    Ok(())
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
