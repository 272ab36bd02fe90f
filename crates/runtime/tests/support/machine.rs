//! VMs that are not there.

use std::collections::{BTreeSet, HashMap};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::sync::watch;

use a3s_box_protocol::proto::{BootStage, Ready};
use a3s_box_protocol::{PROTOCOL, RPC_PORT};
use a3s_box_vmm::error::{AttachError, ConnectError, LaunchError, MachineError};
use a3s_box_vmm::launch::FACTS_FILE;
use a3s_box_vmm::{Attachment, BackendKind, BoxPlan, Machine, MachineExit, MachineFacts, Vmm};

use super::Faults;
use super::guest::Guest;

/// How guests that are started from now on behave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// They get ready.
    Ready,
    /// They end before they are ready.
    Panic,
    /// They never get ready, and never end by themselves.
    Hang,
}

/// Starts VMs that are threads of this test.
pub struct FakeVmm {
    faults: Arc<Faults>,
    guests: Handle,
    machines: Mutex<HashMap<i32, Arc<FakeMachine>>>,
    next_pid: AtomicI32,
    pub boot: watch::Sender<Boot>,
}

impl FakeVmm {
    pub fn new(faults: Arc<Faults>, guests: Handle) -> Self {
        Self {
            faults,
            guests,
            machines: Mutex::default(),
            next_pid: AtomicI32::new(1000),
            boot: watch::Sender::new(Boot::Ready),
        }
    }

    /// The VMs that have not ended.
    pub fn running(&self) -> Vec<i32> {
        let machines = self.machines.lock().unwrap();
        machines
            .values()
            .filter(|machine| machine.exit.borrow().is_none())
            .map(|machine| machine.facts.pid)
            .collect()
    }

    /// How many VMs were ever started.
    pub fn launched(&self) -> usize {
        self.machines.lock().unwrap().len()
    }

    pub fn machine(&self, pid: i32) -> Arc<FakeMachine> {
        self.machines.lock().unwrap()[&pid].clone()
    }
}

#[async_trait]
impl Vmm for FakeVmm {
    fn kind(&self) -> BackendKind {
        BackendKind::Qemu
    }

    async fn launch(&self, plan: &BoxPlan) -> Result<Box<dyn Machine>, LaunchError> {
        let failed = |source| LaunchError::Io { step: "start", path: plan.dir.clone(), source };
        self.faults.hit("vmm launch").map_err(failed)?;
        assert!(plan.dir.is_dir() && plan.scratch.is_file(), "the plan's paths exist");
        let pid = self.next_pid.fetch_add(1, Ordering::Relaxed);
        let facts = MachineFacts { backend: BackendKind::Qemu, pid, start_ticks: 7 };
        std::fs::write(plan.dir.join(FACTS_FILE), serde_json::to_vec(&facts).unwrap()).unwrap();
        let exit = watch::Sender::new(None);
        let machine = Arc::new(FakeMachine {
            guest: Guest::start(self.faults.clone(), self.guests.clone(), exit.clone()),
            facts,
            taps: plan.network.iter().flat_map(|network| &network.nics).map(|nic| nic.tap.clone()).collect(),
            faults: self.faults.clone(),
            boot: self.boot.subscribe(),
            exit,
            mounts: Mutex::default(),
            silent: Mutex::default(),
            writable: Mutex::default(),
        });
        self.machines.lock().unwrap().insert(pid, machine.clone());
        Ok(Box::new(Handled(machine)))
    }

    async fn adopt(
        &self,
        _dir: &Path,
        facts: &MachineFacts,
    ) -> Result<Option<Box<dyn Machine>>, LaunchError> {
        let found = self.machines.lock().unwrap().get(&facts.pid).cloned();
        let found = found.filter(|machine| machine.facts == *facts && machine.exit.borrow().is_none());
        Ok(found.map(|machine| Box::new(Handled(machine)) as Box<dyn Machine>))
    }
}

/// One VM.
pub struct FakeMachine {
    pub guest: Arc<Guest>,
    pub facts: MachineFacts,
    /// The taps of its NICs.
    pub taps: Vec<String>,
    faults: Arc<Faults>,
    boot: watch::Receiver<Boot>,
    exit: watch::Sender<Option<MachineExit>>,
    pub mounts: Mutex<Vec<String>>,
    /// Set: new connections are taken and nothing on them is ever answered.
    silent: Mutex<Option<Vec<StdUnixStream>>>,
    /// Those of them that the host lets writes through to.
    pub writable: Mutex<BTreeSet<String>>,
}

impl FakeMachine {
    /// Its agent stands still from now on.
    pub fn fall_silent(&self) {
        self.silent.lock().unwrap().get_or_insert_default();
    }

    /// Ends it from outside.
    pub fn end(&self, exit: MachineExit) {
        self.exit.send_if_modified(|state| {
            let alive = state.is_none();
            if alive {
                *state = Some(exit);
            }
            alive
        });
    }
}

struct Handled(Arc<FakeMachine>);

const WORDS: &str = "Kernel panic - not syncing: the test said so";

#[async_trait]
impl Machine for Handled {
    fn facts(&self) -> MachineFacts {
        self.0.facts.clone()
    }

    async fn ready(&self, limit: Duration) -> Result<Ready, MachineError> {
        let ended = |exit: &str| MachineError::Ended { exit: exit.to_owned(), last_words: WORDS.to_owned() };
        self.0.faults.hit("machine ready").map_err(|error| ended(&error.to_string()))?;
        let mut boot = self.0.boot.clone();
        let news = tokio::time::timeout(limit, boot.wait_for(|boot| *boot != Boot::Hang)).await;
        match news.map(|boot| boot.map(|boot| *boot)) {
            Ok(Ok(Boot::Ready)) => Ok(Ready {
                protocol: PROTOCOL,
                agent_version: "0".to_owned(),
                kernel_release: "6.12.0-fake".to_owned(),
                stages: vec![BootStage { name: "kernel\x1b[31m".to_owned(), at_us: 5 }],
            }),
            Ok(_) => {
                self.0.end(MachineExit::Failed { code: 1 });
                Err(ended("exit code 1"))
            }
            Err(_) => Err(MachineError::NotReady { limit, last_words: WORDS.to_owned() }),
        }
    }

    async fn connect(&self, port: u32) -> Result<UnixStream, ConnectError> {
        let failed = |source| ConnectError { port, source };
        self.0.faults.hit("machine connect").map_err(failed)?;
        if self.0.exit.borrow().is_some() {
            return Err(failed(std::io::ErrorKind::ConnectionRefused.into()));
        }
        let (host, guest) = StdUnixStream::pair().map_err(failed)?;
        host.set_nonblocking(true).map_err(failed)?;
        guest.set_nonblocking(true).map_err(failed)?;
        if let Some(unanswered) = &mut *self.0.silent.lock().unwrap() {
            unanswered.push(guest);
            return UnixStream::from_std(host).map_err(failed);
        }
        match port {
            RPC_PORT => self.0.guest.accept_rpc(guest),
            _ => self.0.guest.accept_stream(guest),
        }
        UnixStream::from_std(host).map_err(failed)
    }

    async fn attach(&self, attachment: Attachment) -> Result<(), AttachError> {
        let failed = |source| AttachError { step: "place", target: attachment.target.clone(), source };
        self.0.faults.hit("machine attach").map_err(failed)?;
        let mut mounts = self.0.mounts.lock().unwrap();
        if mounts.contains(&attachment.target) {
            return Err(failed(std::io::ErrorKind::AlreadyExists.into()));
        }
        if !attachment.readonly {
            self.0.writable.lock().unwrap().insert(attachment.target.clone());
        }
        mounts.push(attachment.target.clone());
        Ok(())
    }

    async fn set_readonly(&self, target: &str, readonly: bool) -> Result<(), AttachError> {
        let failed = |source| AttachError { step: "change", target: target.to_owned(), source };
        self.0.faults.hit("machine set_readonly").map_err(failed)?;
        if !self.0.mounts.lock().unwrap().iter().any(|mount| mount == target) {
            return Err(failed(std::io::ErrorKind::NotFound.into()));
        }
        let mut writable = self.0.writable.lock().unwrap();
        if readonly {
            writable.remove(target)
        } else {
            writable.insert(target.to_owned())
        };
        Ok(())
    }

    async fn detach(&self, target: &str) -> Result<(), AttachError> {
        let failed = |source| AttachError { step: "remove", target: target.to_owned(), source };
        self.0.faults.hit("machine detach").map_err(failed)?;
        self.0.mounts.lock().unwrap().retain(|mounted| mounted != target);
        self.0.writable.lock().unwrap().remove(target);
        Ok(())
    }

    async fn wait(&self) -> MachineExit {
        let mut exit = self.0.exit.subscribe();
        let exit = exit.wait_for(Option::is_some).await.unwrap().clone();
        exit.unwrap()
    }

    async fn kill(&self) -> Result<(), MachineError> {
        self.0
            .faults
            .hit("machine kill")
            .map_err(|source| MachineError::Signal { pid: self.0.facts.pid, source })?;
        self.0.end(MachineExit::Killed { signal: 9 });
        Ok(())
    }

    async fn last_words(&self, _bytes: usize) -> String {
        WORDS.to_owned()
    }
}
