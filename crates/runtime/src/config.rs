//! What the runtime must be told about the node.

use std::path::PathBuf;
use std::time::Duration;

use crate::network::NetworkSetting;

/// Settings of a [`crate::BoxManager`]. [`RuntimeConfig::new`] gives the defaults.
#[derive(Debug, Clone)]
pub struct RuntimeConfig {
    /// Facts that do not outlive a reboot, e.g. `/run/a3s-box`; boxes have their directories in `boxes/` there.
    pub run_dir: PathBuf,
    /// What outlives a reboot, e.g. `/var/lib/a3s-box`; scratch disks lie in it.
    pub state_dir: PathBuf,
    /// The guest kernel (ELF).
    pub kernel: PathBuf,
    /// The initramfs with the agent.
    pub initramfs: PathBuf,
    /// Appended to the guest's command line.
    pub cmdline: String,
    /// The longest a guest may take from power-on to its agent's Ready.
    pub boot_limit: Duration,
    /// The longest a guest may take to shut itself down before its VM is ended.
    pub stop_limit: Duration,
    /// The longest a killed session may take to end before its whole VM is ended.
    pub kill_limit: Duration,
    /// An agent that does not answer for so long is lost, and its VM is ended.
    pub lost_after: Duration,
    /// The longest any other single answer of an agent may take.
    pub call_limit: Duration,
    /// Runtime handlers that a box may ask for besides the default one (the empty name).
    pub runtime_handlers: Vec<String>,
    /// Who connects pods.
    pub network: NetworkSetting,
    /// Guests that may boot at once. More make each of them slower, and none of them sooner; pods beyond it wait their turn.
    pub parallel_boots: usize,
    /// Put every VMM into its pod's cgroup. Without it they stay in the daemon's.
    pub use_cgroups: bool,
}

impl RuntimeConfig {
    /// The defaults around four paths: one minute to boot, five seconds to stop, no network.
    pub fn new(run_dir: PathBuf, state_dir: PathBuf, kernel: PathBuf, initramfs: PathBuf) -> Self {
        Self {
            run_dir,
            state_dir,
            kernel,
            initramfs,
            cmdline: String::new(),
            boot_limit: Duration::from_secs(60),
            stop_limit: Duration::from_secs(5),
            kill_limit: Duration::from_secs(10),
            lost_after: Duration::from_secs(30),
            call_limit: Duration::from_secs(30),
            runtime_handlers: vec!["a3s-box".to_owned()],
            network: NetworkSetting::None,
            parallel_boots: 8,
            use_cgroups: true,
        }
    }
}
