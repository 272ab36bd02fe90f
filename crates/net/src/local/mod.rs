//! The built-in network, for hosts without CNI: a bridge of our own, masquerading and published ports.
//!
//! ```text
//!   the world ── host's stack ── a3s0 (gateway) ══ a3s<box> ── veth ── eth0 ══ tap0 ══ guest
//!                   │ nftables table `inet a3s_box`          └── the pod's namespace ──┘
//! ```
//!
//! One bridge serves all boxes of the host, whoever runs them. What is shared is in [`state`], and changed under its
//! lock only; the [`firewall`] is made from the leases there. The first pod makes the bridge and the table, the
//! last one removes them.
//!
//! ```text
//!   connect:     lock ─> network.json ─> lease ─> bridge ─> firewall ─> unlock ─> veth ─> addresses, routes
//!   disconnect:  veth ─> lock ─> firewall ─> lease ─> (last: bridge, network.json) ─> unlock
//! ```
//!
//! Each thing is written down before it is made, so [`disconnect`] needs nothing but the box id, whatever was
//! interrupted where.

mod bridge;
mod firewall;
mod ports;
mod state;
mod subnet;

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use a3s_box_core::BoxId;
use a3s_box_core::network::Address;
use a3s_box_core::spec::{PodIdentity, PortMapping};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use subnet::{Subnet, SubnetError};

use crate::attach::PodInterface;
use crate::names;
use crate::netlink;
use crate::netns::{self, NetnsError};
use crate::nft::NftError;
use crate::turns::Turn;
use ports::{At, Published};
use state::{Holder, Lease, Lock, Network, State};

/// Our table of nftables.
const TABLE: &str = "inet a3s_box";

/// Settings of the local network. The same for everybody on a host who uses it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalConfig {
    /// The bridge's name.
    pub bridge: String,
    /// Where boxes get their IPv4 addresses from.
    pub subnet: Subnet,
    /// The same for IPv6; `None`: boxes have none.
    pub subnet6: Option<Subnet>,
    /// What is given away, and the lock. Must vanish when the host reboots, as the bridge does, and be the same for
    /// all who use the bridge.
    pub state_dir: PathBuf,
    /// nftables' program: a path, or a name that is looked for.
    pub nft: PathBuf,
    /// How long it may take for one change; it needs some milliseconds.
    pub nft_limit: Duration,
}

impl Default for LocalConfig {
    fn default() -> Self {
        Self {
            bridge: "a3s0".to_owned(),
            subnet: subnet::DEFAULT,
            subnet6: Some(subnet::DEFAULT_V6),
            state_dir: "/run/a3s-box/local-network".into(),
            nft: "nft".into(),
            nft_limit: Duration::from_secs(20),
        }
    }
}

/// Why the local network cannot take or let go a box.
#[derive(Debug, Error)]
pub enum LocalError {
    /// A file operation failed.
    #[error("local network: {}: cannot {step}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried, as a verb phrase.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something of the shared state is no such thing.
    #[error("local network: {} cannot be understood; remove it once no box is left on the bridge", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Somebody else has been at work for too long.
    #[error(
        "local network: {} was not free within {limit:?}: another a3s-box, or an nft that it started, hangs", path.display()
    )]
    Busy {
        /// The lock.
        path: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
    /// nftables' program is not there.
    #[error("the local network needs the program {}, which is not installed: install the package nftables", program.display())]
    NoNft {
        /// What was looked for.
        program: PathBuf,
    },
    /// It cannot be started.
    #[error("local network: cannot start {}", program.display())]
    NftStart {
        /// Which.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It refused the table.
    #[error("local network: nft cannot set the table `{TABLE}` ({status}); it said: {said}")]
    Nft {
        /// How it ended.
        status: ExitStatus,
        /// The beginning of its standard error.
        said: String,
    },
    /// It took too long and was killed.
    #[error(
        "local network: nft took longer than {limit:?} to set the table `{TABLE}` and was killed; it said: {said}"
    )]
    NftSlow {
        /// How long it had.
        limit: Duration,
        /// The beginning of its standard error.
        said: String,
    },
    /// The host has another use for the subnet's addresses.
    #[error(
        "the local network's {subnet} collides with the host's route to {route}: set {setting} to a network that is free here"
    )]
    Overlap {
        /// The subnet.
        subnet: Subnet,
        /// What it collides with.
        route: String,
        /// The setting that the subnet is from.
        setting: &'static str,
    },
    /// Boxes that run are on a network with other settings.
    #[error(
        "the local network is in use as {found}, and this configuration wants {wanted}: \
         stop the boxes that use it, or set network.local_subnet and network.local_subnet6 to what they have"
    )]
    Different {
        /// The bridge there is, with its subnets.
        found: String,
        /// That of the configuration.
        wanted: String,
    },
    /// Something else has the bridge's name.
    #[error("local network: the host has a link {name} that is not a bridge: rename or remove it")]
    NotABridge {
        /// The name.
        name: String,
    },
    /// A link that was just made is gone.
    #[error("local network: the link {name} has vanished; somebody else removes links here")]
    Vanished {
        /// The name.
        name: String,
    },
    /// No address is free.
    #[error(
        "the local network {subnet} is full: {boxes} boxes have its addresses; stop some, or set network.local_subnet to a larger one"
    )]
    Exhausted {
        /// The subnet.
        subnet: Subnet,
        /// How many have an address.
        boxes: usize,
    },
    /// A port cannot be published at such an address.
    #[error("cannot publish a port at host address {text:?}: {problem}")]
    HostAddress {
        /// The address as written.
        text: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// Another box has the port.
    #[error("host port {port} is already published by pod {pod} (box {}): stop that pod or choose another port", box_id.short())]
    PortTaken {
        /// The port.
        port: String,
        /// Namespace and name of the pod.
        pod: String,
        /// Its box.
        box_id: BoxId,
    },
    /// The pod wants a port twice.
    #[error("host port {port} is published twice by the same pod")]
    PortTwice {
        /// The port.
        port: String,
    },
    /// A program of the host has the port, or it cannot be had for another reason.
    #[error(
        "host port {port} cannot be published: a program of this host uses it, or its address is not this host's (`ss -lntup` shows who listens)"
    )]
    PortInUse {
        /// The port.
        port: String,
        /// The answer to the attempt to have it.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a step.
    #[error("local network: {object}: cannot {step}")]
    Kernel {
        /// The link that was worked on.
        object: String,
        /// What was tried, as a verb phrase.
        step: &'static str,
        /// Its answer.
        #[source]
        source: rtnetlink::Error,
    },
    /// No netlink socket.
    #[error("local network: cannot talk to the kernel's network configuration")]
    Socket(#[from] io::Error),
    /// The pod's namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The thread that did the work panicked.
    #[error("local network: the worker thread panicked")]
    WorkerPanicked,
}

impl From<NftError> for LocalError {
    fn from(error: NftError) -> Self {
        match error {
            NftError::Missing { program } => Self::NoNft { program },
            NftError::Start { program, source } => Self::NftStart { program, source },
            NftError::Refused { status, said } => Self::Nft { status, said },
            NftError::Slow { limit, said } => Self::NftSlow { limit, said },
        }
    }
}

/// What a box asks of the network.
#[derive(Debug, Clone)]
pub(crate) struct Wish {
    pub(crate) box_id: BoxId,
    pub(crate) identity: PodIdentity,
    pub(crate) port_mappings: Vec<PortMapping>,
}

/// Connects a pod whose namespace exists. What this made when it fails, [`disconnect`] undoes.
pub(crate) async fn connect(
    config: &LocalConfig,
    wish: Wish,
    netns: &Path,
    turn: &Turn,
) -> Result<Vec<PodInterface>, LocalError> {
    let (config, path) = (config.clone(), netns.to_owned());
    let (network, lease) = on_host(turn, move || connect_here(&config, wish, &path)).await?;
    let number = network.subnet.number(lease.v4).unwrap_or_default();
    let subnets: Vec<Subnet> = [Some(network.subnet), network.subnet6].into_iter().flatten().collect();
    let addresses: Vec<Address> = subnets.iter().map(|subnet| subnet.host(number)).collect();
    let gateways: Vec<IpAddr> = subnets.iter().map(|subnet| subnet.gateway().ip).collect();
    let pod = PodInterface { name: names::INTERFACE.to_owned(), addresses: addresses.clone() };
    let inside =
        move || netlink::converse(async |handle| bridge::configure(&handle, &addresses, &gateways).await);
    netns::run_inside(netns, turn, inside).await??;
    Ok(vec![pod])
}

/// Lets a box go: idempotent. The errors are what could not be undone; with `abandon` its address is given back even so.
pub(crate) async fn disconnect(
    config: &LocalConfig,
    box_id: &BoxId,
    abandon: bool,
    turn: &Turn,
) -> Vec<LocalError> {
    let (config, box_id) = (config.clone(), box_id.clone());
    let work = move || {
        let mut errors = Vec::new();
        if let Err(error) = disconnect_here(&config, &box_id, abandon, &mut errors) {
            errors.push(error);
        }
        Ok(errors)
    };
    on_host(turn, work).await.unwrap_or_else(|error| vec![error])
}

/// The subnets for people, if boxes could be connected now.
///
/// Looks at the kernel's routes, on a thread of its own: it may be called where no runtime may be started.
pub(crate) fn examine(config: &LocalConfig) -> Result<String, LocalError> {
    firewall::find(config)?;
    let network = wanted(config);
    match State::new(config.state_dir.clone()).network()? {
        Some(found) => same(&found, &network)?,
        None => {
            let look = || netlink::converse(async |handle| free(&handle, &network).await);
            let looked = std::thread::scope(|scope| scope.spawn(look).join());
            looked.map_err(|_| LocalError::WorkerPanicked)??;
        }
    }
    Ok(describe(&network))
}

/// Such work can block, and is not given up half-way: the turn is held until it is done.
async fn on_host<T, F>(turn: &Turn, work: F) -> Result<T, LocalError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, LocalError> + Send + 'static,
{
    let turn = turn.clone();
    let joined = tokio::task::spawn_blocking(move || {
        let done = work();
        drop(turn);
        done
    });
    joined.await.map_err(|_| LocalError::WorkerPanicked)?
}

fn connect_here(config: &LocalConfig, wish: Wish, netns: &Path) -> Result<(Network, Lease), LocalError> {
    // Found missing now, it has made nobody wait and nothing to be undone.
    firewall::find(config)?;
    let state = State::new(config.state_dir.clone());
    let lock = state.lock()?;
    let mut leases = state.leases()?;
    let network = begin(config, &state, &lock)?;
    check_ports(&wish, &network, &leases)?;
    let identity = &wish.identity;
    let holder = Holder {
        pod: format!("{}/{}", identity.namespace, identity.name),
        box_id: wish.box_id.clone(),
        ports: wish.port_mappings,
    };
    let lease = state.allocate(&network, &leases, holder, &lock)?;
    leases.push(lease.clone());
    let veth = names::veth(&wish.box_id);
    let link = netlink::converse(async |handle| bridge::ensure(&handle, &network).await)?;
    firewall::apply(config, &network, &leases, &lock)?;
    // With its lease there the bridge stays, and nobody else has a cable of this name.
    drop(lock);
    netlink::converse(async |handle| bridge::plug(&handle, &link, &veth, netns).await)?;
    Ok((network, lease))
}

/// The network that runs, or the configured one, written down as begun.
fn begin(config: &LocalConfig, state: &State, lock: &Lock) -> Result<Network, LocalError> {
    let network = wanted(config);
    match state.network()? {
        Some(found) => same(&found, &network)?,
        None => {
            netlink::converse(async |handle| free(&handle, &network).await)?;
            state.begin(&network, lock)?;
        }
    }
    Ok(network)
}

/// Boxes that are there cannot be moved to another network.
fn same(found: &Network, wanted: &Network) -> Result<(), LocalError> {
    if found == wanted {
        return Ok(());
    }
    Err(LocalError::Different { found: describe(found), wanted: describe(wanted) })
}

fn wanted(config: &LocalConfig) -> Network {
    Network {
        bridge: config.bridge.clone(),
        subnet: config.subnet,
        subnet6: config.subnet6.filter(|_| bridge::has_ipv6()),
    }
}

async fn free(handle: &rtnetlink::Handle, network: &Network) -> Result<(), LocalError> {
    let v4 = (network.subnet, "network.local_subnet");
    let v6 = network.subnet6.map(|subnet| (subnet, "network.local_subnet6"));
    bridge::refuse_overlap(handle, &network.bridge, std::iter::once(v4).chain(v6)).await
}

fn describe(network: &Network) -> String {
    let v6 = network.subnet6.map(|subnet| format!(" and {subnet}")).unwrap_or_default();
    format!("local bridge {}, {}{v6}", network.bridge, network.subnet)
}

/// Another box first, the host's programs second: the first has the better message, and no socket.
fn check_ports(wish: &Wish, network: &Network, leases: &[Lease]) -> Result<(), LocalError> {
    let mut own: Vec<Published> = Vec::new();
    for port in wish.port_mappings.iter().map(Published::read) {
        let Some(port) = port? else { continue };
        if own.iter().any(|other| port.conflicts_with(other)) {
            return Err(LocalError::PortTwice { port: port.to_string() });
        }
        let needs_v6 = match port.at {
            At::EveryV6 => true,
            At::Only(ip) => ip.is_ipv6(),
            At::Everywhere | At::EveryV4 => false,
        };
        if needs_v6 && network.subnet6.is_none() {
            let text = port.to_string();
            return Err(LocalError::HostAddress { text, problem: "the local network has no IPv6" });
        }
        for lease in leases {
            if lease.published()?.iter().any(|other| port.conflicts_with(other)) {
                let (pod, box_id) = (lease.pod.clone(), lease.box_id.clone());
                return Err(LocalError::PortTaken { port: port.to_string(), pod, box_id });
            }
        }
        port.probe()?;
        own.push(port);
    }
    Ok(())
}

fn disconnect_here(
    config: &LocalConfig,
    box_id: &BoxId,
    abandon: bool,
    errors: &mut Vec<LocalError>,
) -> Result<(), LocalError> {
    let veth = names::veth(box_id);
    let unplugged = netlink::converse(async |handle| bridge::unplug(&handle, &veth).await);
    errors.extend(unplugged.err());
    let state = State::new(config.state_dir.clone());
    if !state.exists() {
        // The host was booted since: what there was went with it.
        return Ok(());
    }
    let lock = state.lock()?;
    let (gone, left): (Vec<_>, Vec<_>) = state.leases()?.into_iter().partition(|l| l.box_id == *box_id);
    let Some(network) = state.network()? else { return Ok(()) };
    let ruled = if left.is_empty() {
        firewall::remove(config, &lock)
    } else {
        firewall::apply(config, &network, &left, &lock)
    };
    let ruled = ruled.map_err(|error| errors.push(error)).is_ok();
    // While its ports lead to it nobody else may have the address.
    if !ruled && !abandon {
        return Ok(());
    }
    for lease in &gone {
        state.release(lease, &lock)?;
    }
    if left.is_empty() {
        netlink::converse(async |handle| bridge::remove(&handle, &network.bridge).await)?;
        if ruled {
            state.end(&lock)?;
        }
    }
    Ok(())
}
