//! The last metre: from the interface that CNI made to the tap that the VMM opens.
//!
//! ```text
//!   network ── veth ══ eth0 ──ingress: u32, mirred──> tap0 ══ VMM, guest's NIC
//!                      eth0 <──u32, mirred :ingress── tap0
//! ```
//!
//! A pod with an egress policy has nftables' `fwd` in place of `mirred`: [`crate::egress`]. So have all on a kernel whose
//! traffic control lacks what it takes.
//!
//! Frames are stolen at ingress on both sides, so the namespace's own network stack never sees one, and the guest has the
//! MAC address, the MTU and the addresses of `eth0`. The addresses also stay on `eth0`: nothing can answer for them
//! there, and three parties need them. Plugins read them at DEL to find what to undo on the host (bridge and ptp
//! tear down masquerading by them), CHECK compares them, and ipvlan delivers only to addresses its interface has.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use a3s_box_core::network::{Address, Interface};
use rtnetlink::Handle;
use thiserror::Error;

use crate::config::Redirect;
use crate::egress::{DNS_TAP, Egress, EgressError};
use crate::netlink::{self, Link};
use crate::netns::{self, NetnsError};
use crate::nft::{Nft, NftError};
use crate::turns::Turn;
use crate::{names, tap, view};

const REDIRECT: &str = "redirect its traffic (this needs the kernel's sch_ingress, cls_u32 and act_mirred; network.redirect = \"nft\" does without)";

/// Taps that the daemon itself opens.
const OURS: tap::Kind = tap::Kind { owner: None, multi_queue: false };

/// Why a pod's interface could not be handed to a VM.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// No netlink socket.
    #[error("cannot talk to the kernel's network configuration")]
    Socket(#[from] io::Error),
    /// nftables cannot redirect.
    #[error(
        "interface {interface:?}: nftables cannot redirect its traffic (this needs the package nftables and the kernel's \
         nf_tables with NFT_FWD_NETDEV)"
    )]
    Nft {
        /// The interface that was worked on.
        interface: String,
        /// Why.
        #[source]
        source: NftError,
    },
    /// The kernel refused a step.
    #[error("interface {interface:?}: cannot {step}")]
    Kernel {
        /// The interface that was worked on.
        interface: String,
        /// What was tried, as a verb phrase.
        step: &'static str,
        /// Its answer.
        #[source]
        source: rtnetlink::Error,
    },
    /// The tap cannot be made.
    #[error("cannot make tap {tap:?} (is the tun driver there and /dev/net/tun accessible?)")]
    Tap {
        /// Its name.
        tap: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The plugins reported an interface that they did not make.
    #[error("the CNI result names interface {interface:?}, but the pod's namespace has none of that name")]
    Missing {
        /// Its name.
        interface: String,
    },
    /// A guest's NIC is an Ethernet card.
    #[error(
        "interface {interface:?} is not an Ethernet interface, so it cannot be given to a virtual machine"
    )]
    NotEthernet {
        /// Its name.
        interface: String,
    },
    /// Its egress policy cannot be put in force.
    #[error(transparent)]
    Egress(#[from] EgressError),
}

/// An interface of the pod according to CNI.
#[derive(Debug, Clone)]
pub(crate) struct PodInterface {
    pub(crate) name: String,
    pub(crate) addresses: Vec<Address>,
}

/// What leads frames from interfaces to their taps and back.
#[derive(Debug)]
pub(crate) enum Way {
    /// All frames, by what the node's settings say. nftables' program is looked for when it is needed.
    Open { redirect: Redirect, nft: PathBuf, nft_limit: Duration },
    /// What an egress policy allows.
    Guarded(Egress),
}

/// Makes taps in the namespace at `netns`. They are down: nothing passes before [`attach`].
pub(crate) async fn make_taps(
    netns: &Path,
    turn: &Turn,
    taps: Vec<String>,
    kind: tap::Kind,
) -> Result<(), AttachError> {
    let work = move || taps.iter().try_for_each(|tap| make_tap(tap, kind));
    netns::run_inside(netns, turn, work).await?
}

/// Sets up loopback, then redirection for every interface to its tap, in the namespace at `netns`. Taps that are not there
/// yet are made.
///
/// What it made when it fails is undone with the namespace.
pub(crate) async fn attach(
    netns: &Path,
    turn: &Turn,
    interfaces: Vec<PodInterface>,
    kind: tap::Kind,
    way: Way,
) -> Result<Vec<Interface>, AttachError> {
    let work = move || netlink::converse(async |handle| attach_here(&handle, interfaces, kind, way).await);
    netns::run_inside(netns, turn, work).await?
}

async fn attach_here(
    handle: &Handle,
    interfaces: Vec<PodInterface>,
    kind: tap::Kind,
    way: Way,
) -> Result<Vec<Interface>, AttachError> {
    let lo = find(handle, "lo").await?;
    netlink::up(handle, lo.index).await.map_err(refused("lo", "set it up"))?;
    let mut done = Vec::new();
    for (number, pod) in interfaces.into_iter().enumerate() {
        let (interface, link, end) = attach_one(handle, pod, names::tap(number), kind).await?;
        if let Way::Open { redirect, nft, nft_limit } = &way {
            let by_nft =
                || Nft::find(nft, *nft_limit)?.run(&forwarding(&interface.name, &interface.tap), None);
            lead(handle, *redirect, by_nft, &interface, link, end).await?;
        }
        done.push(interface);
    }
    if let (Way::Guarded(egress), Some(mtu)) = (way, done.iter().map(|interface| interface.mtu).max()) {
        if egress.has_names() {
            raise_tap(handle, DNS_TAP, mtu, OURS).await?;
        }
        egress.enforce(&done)?;
    }
    Ok(done)
}

/// All frames of one interface to its tap and back. `link` and `end` are their indices.
async fn lead(
    handle: &Handle,
    redirect: Redirect,
    by_nft: impl FnOnce() -> Result<(), NftError>,
    interface: &Interface,
    link: u32,
    end: u32,
) -> Result<(), AttachError> {
    let Interface { name, tap, .. } = interface;
    if redirect != Redirect::Nft {
        let by_tc = async {
            netlink::redirect(handle, link, end).await.map_err(refused(name, REDIRECT))?;
            netlink::redirect(handle, end, link).await.map_err(refused(tap, REDIRECT))
        };
        match by_tc.await {
            Err(AttachError::Kernel { source, .. })
                if redirect == Redirect::Auto && netlink::is_missing(&source) =>
            {
                tracing::debug!(interface = name, %source, "traffic control cannot redirect; nftables does");
            }
            other => return other,
        }
    }
    by_nft().map_err(|source| AttachError::Nft { interface: name.clone(), source })
}

/// The table that does what traffic control's redirection does.
fn forwarding(name: &str, tap: &str) -> String {
    format!(
        "table netdev a3s_box_{tap} {{
  chain in {{ type filter hook ingress device \"{name}\" priority 0; policy accept; fwd to \"{tap}\"; }}
  chain out {{ type filter hook ingress device \"{tap}\" priority 0; policy accept; fwd to \"{name}\"; }}
}}
"
    )
}

/// The interface as the guest sees it, the index of its link and that of its tap.
async fn attach_one(
    handle: &Handle,
    pod: PodInterface,
    tap: String,
    kind: tap::Kind,
) -> Result<(Interface, u32, u32), AttachError> {
    let link = find(handle, &pod.name).await?;
    let mac = link.mac.ok_or_else(|| AttachError::NotEthernet { interface: pod.name.clone() })?;
    // Read before anything is changed, so that the guest gets what the plugins have left.
    let routes = netlink::routes(handle, link.index).await.map_err(refused(&pod.name, "read its routes"))?;
    let end = raise_tap(handle, &tap, link.mtu, kind).await?;
    let (addresses, routes) = view::for_guest(&pod.addresses, &routes);
    let interface = Interface { name: pod.name, mac, mtu: link.mtu, addresses, routes, tap };
    Ok((interface, link.index, end.index))
}

fn make_tap(name: &str, kind: tap::Kind) -> Result<(), AttachError> {
    let failed = |source| AttachError::Tap { tap: name.to_owned(), source };
    tap::create_persistent(name, kind).map_err(failed)?;
    silence(name).map_err(failed)
}

/// Sets a tap up. One that a VMM holds cannot be opened again, so it is made only if it is not there.
async fn raise_tap(handle: &Handle, name: &str, mtu: u32, kind: tap::Kind) -> Result<Link, AttachError> {
    let there = netlink::link(handle, name).await.map_err(refused(name, "look it up"))?;
    let link = match there {
        Some(link) => link,
        None => {
            make_tap(name, kind)?;
            find(handle, name).await?
        }
    };
    netlink::up_with_mtu(handle, link.index, mtu).await.map_err(refused(name, "set its MTU"))?;
    Ok(link)
}

/// Keeps the host's IPv6 from introducing itself to the guest (router solicitations, multicast reports). A host without
/// IPv6 has nothing to silence.
fn silence(tap: &str) -> io::Result<()> {
    match fs::write(format!("/proc/sys/net/ipv6/conf/{tap}/disable_ipv6"), "1") {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

async fn find(handle: &Handle, name: &str) -> Result<Link, AttachError> {
    let found = netlink::link(handle, name).await.map_err(refused(name, "look it up"))?;
    found.ok_or_else(|| AttachError::Missing { interface: name.to_owned() })
}

fn refused(interface: &str, step: &'static str) -> impl FnOnce(rtnetlink::Error) -> AttachError {
    let interface = interface.to_owned();
    move |source| AttachError::Kernel { interface, step, source }
}
