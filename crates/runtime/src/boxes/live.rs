//! What is shared of a box that runs, and how it is told that it does not.

use std::sync::Arc;
use std::time::Duration;

use a3s_box_core::lifecycle::StopCause;
use a3s_box_core::network::PodNetwork;
use a3s_box_protocol::versions::{Abilities, Unspoken};
use a3s_box_vmm::{GuestFault, Machine, MachineExit};

use super::contact::Contact;
use crate::agent_client::Agent;
use crate::sessions::BoxFacts;
use crate::text::{MESSAGE_LIMIT, printable};

/// Last words are read from files; a slow disk must not hold up an error.
const WORDS_LIMIT: Duration = Duration::from_secs(1);

/// A running box: its VM and its agent.
pub(crate) struct LiveBox {
    pub(crate) machine: Arc<dyn Machine>,
    pub(crate) agent: Agent,
    pub(crate) abilities: Abilities,
    pub(crate) contact: Contact,
    pub(crate) facts: BoxFacts,
    pub(crate) network: Option<PodNetwork>,
}

/// A box that runs, and whose agent this program does not speak to. It is left alone until it is stopped.
pub(crate) struct Foreign {
    pub(crate) machine: Arc<dyn Machine>,
    pub(crate) why: Unspoken,
}

impl LiveBox {
    pub(crate) async fn last_words(&self) -> String {
        last_words(self.machine.as_ref()).await
    }
}

/// The end of what the guest and its VMM said.
pub(crate) async fn last_words(machine: &dyn Machine) -> String {
    let words = tokio::time::timeout(WORDS_LIMIT, machine.last_words(MESSAGE_LIMIT)).await;
    printable(&words.unwrap_or_default(), MESSAGE_LIMIT)
}

const OUT_OF_MEMORY: &str = " (the host ran out of memory, or the pod out of its limit on the host: a process of the VM was killed for it)";

/// Why a box ended, for its sessions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Obituary {
    pub(crate) cause: StopCause,
    /// For people.
    pub(crate) message: String,
}

impl Obituary {
    pub(crate) fn of(cause: StopCause) -> Self {
        let message = match &cause {
            StopCause::Requested => "the pod sandbox was stopped".to_owned(),
            StopCause::GuestPowerOff => "the guest powered itself off".to_owned(),
            StopCause::GuestPanic { detail }
            | StopCause::VmmDied { detail }
            | StopCause::AgentLost { detail } => detail.clone(),
        };
        Self { cause, message }
    }

    /// Of a VM that ended without being asked to. `out_of_memory`: the host's kernel has killed processes of its cgroups
    /// for that reason.
    pub(crate) async fn unexpected(machine: &dyn Machine, exit: MachineExit, out_of_memory: bool) -> Self {
        let words = last_words(machine).await;
        let why = if out_of_memory { OUT_OF_MEMORY } else { "" };
        let with_words = |what: &str| match words.trim() {
            "" => what.to_owned(),
            words => format!("{what}; its last words: {words}"),
        };
        match exit {
            MachineExit::PowerOff => match machine.guest_fault().await {
                Some(fault) => Self::of(faulted(&fault, with_words)),
                None => {
                    let message = with_words("the guest powered itself off");
                    Self { cause: StopCause::GuestPowerOff, message }
                }
            },
            MachineExit::Failed { code } => {
                Self::died(with_words(&format!("the VM failed with exit code {code}{why}")))
            }
            MachineExit::Killed { signal } => {
                Self::died(with_words(&format!("the VM was killed by signal {signal}{why}")))
            }
            MachineExit::Vanished => Self::died(with_words(&format!("the VM is gone{why}"))),
        }
    }

    fn died(detail: String) -> Self {
        Self::of(StopCause::VmmDied { detail })
    }
}

/// A guest that ended by itself and said why. `with_words` adds its last words.
pub(crate) fn faulted(fault: &GuestFault, with_words: impl Fn(&str) -> String) -> StopCause {
    match fault {
        GuestFault::Panic(said) => {
            let said = printable(said, MESSAGE_LIMIT);
            StopCause::GuestPanic { detail: with_words(&format!("the guest's kernel panicked: {said}")) }
        }
        GuestFault::Agent(said) => {
            let said = printable(said, MESSAGE_LIMIT);
            StopCause::AgentLost { detail: with_words(&format!("the guest's agent failed: {said}")) }
        }
    }
}

/// Whether a box can be talked to.
#[derive(Clone)]
pub(crate) enum BoxLife {
    /// Not yet.
    Starting,
    /// Yes.
    Live(Arc<LiveBox>),
    /// No, although it runs: an agent of another build is in it.
    Foreign(Arc<Foreign>),
    /// Not any more.
    Gone(Obituary),
}

impl BoxLife {
    /// The box, or why nothing can be asked of its guest.
    pub(crate) fn live(&self) -> Result<Arc<LiveBox>, String> {
        match self {
            Self::Live(live) => Ok(live.clone()),
            Self::Foreign(foreign) => Err(foreign.why.to_string()),
            Self::Starting | Self::Gone(_) => Err("the pod sandbox is not ready".to_owned()),
        }
    }

    /// The VM, if it runs.
    pub(crate) fn machine(&self) -> Option<Arc<dyn Machine>> {
        match self {
            Self::Live(live) => Some(live.machine.clone()),
            Self::Foreign(foreign) => Some(foreign.machine.clone()),
            Self::Starting | Self::Gone(_) => None,
        }
    }
}
