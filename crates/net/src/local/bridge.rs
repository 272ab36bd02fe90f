//! The bridge, its ports, and the switches of the host's kernel that they need.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use a3s_box_core::network::Address;
use rtnetlink::Handle;

use super::state::Network;
use super::{LocalError, Subnet};
use crate::names;
use crate::netlink::{self, Link};

const SYSCTL: &str = "/proc/sys/net";
/// Below this IPv6 is switched off for an interface; above it is Ethernet's own.
const MTU: std::ops::RangeInclusive<u32> = 1280..=1500;

/// Whether this host speaks IPv6.
pub(super) fn has_ipv6() -> bool {
    let off = |scope: &str| sysctl(&format!("ipv6/conf/{scope}/disable_ipv6")) != Some("0".to_owned());
    !off("all") && !off("default")
}

/// Refuses a subnet that the host already has a way to.
pub(super) async fn refuse_overlap(
    handle: &Handle,
    bridge: &str,
    subnets: impl IntoIterator<Item = (Subnet, &'static str)>,
) -> Result<(), LocalError> {
    let ours = netlink::link(handle, bridge).await.map_err(refused(bridge, "look it up"))?;
    let ours = ours.map(|link| link.index);
    let routes = netlink::claims(handle).await.map_err(refused(bridge, "read the host's routes"))?;
    for (subnet, setting) in subnets {
        let clash = routes.iter().find(|claim| claim.link != ours && subnet.collides_with(claim.destination));
        if let Some(claim) = clash {
            let route = claim.destination.to_string();
            return Err(LocalError::Overlap { subnet, route, setting });
        }
    }
    Ok(())
}

/// Makes the bridge, or makes sure of it.
pub(super) async fn ensure(handle: &Handle, network: &Network) -> Result<Link, LocalError> {
    let name = network.bridge.as_str();
    let link = match netlink::link(handle, name).await.map_err(refused(name, "look it up"))? {
        Some(link) if link.bridge => link,
        Some(_) => return Err(LocalError::NotABridge { name: name.to_owned() }),
        None => {
            let mtu = uplink_mtu(handle).await.map_err(refused(name, "find the MTU of the default route"))?;
            let made = netlink::add_bridge(handle, name, mac(network), mtu).await;
            made.map_err(refused(name, "make the bridge (this needs the kernel's bridge driver)"))?;
            find(handle, name).await?
        }
    };
    forward(network)?;
    netlink::up(handle, link.index).await.map_err(refused(name, "set it up"))?;
    for subnet in [Some(network.subnet), network.subnet6].into_iter().flatten() {
        let added = netlink::add_address(handle, link.index, subnet.gateway()).await;
        added.map_err(refused(name, "give it the gateway's address"))?;
    }
    Ok(link)
}

/// Removes the bridge. One that is not there, or no bridge, is nothing of ours.
pub(super) async fn remove(handle: &Handle, name: &str) -> Result<(), LocalError> {
    match netlink::link(handle, name).await.map_err(refused(name, "look it up"))? {
        Some(link) if link.bridge => {
            netlink::delete(handle, link.index).await.map_err(refused(name, "remove the bridge"))
        }
        Some(_) | None => Ok(()),
    }
}

/// Makes the cable from the bridge to `eth0` in the namespace at `netns`.
pub(super) async fn plug(handle: &Handle, bridge: &Link, host: &str, netns: &Path) -> Result<(), LocalError> {
    unplug(handle, host).await?;
    let namespace = fs::File::open(netns).map_err(|e| io_error(netns, "open it", e))?;
    let inside = (names::INTERFACE, namespace.as_raw_fd());
    let made = netlink::add_veth(handle, host, inside, bridge.mtu).await;
    made.map_err(refused(host, "make the veth pair (this needs the kernel's veth driver)"))?;
    let link = find(handle, host).await?;
    // The host is not to introduce itself at its own end: only the bridge has addresses.
    set_if_there(&format!("ipv6/conf/{host}/disable_ipv6"), "1")?;
    // Where br_netfilter is at work, what a box sends to a port that it publishes itself is translated on the bridge
    // and has to leave through the port that it came in by.
    netlink::join(handle, link.index, bridge.index).await.map_err(refused(host, "put it on the bridge"))
}

/// Removes the cable, and with it the pod's end. Gone already is success.
pub(super) async fn unplug(handle: &Handle, host: &str) -> Result<(), LocalError> {
    match netlink::link(handle, host).await.map_err(refused(host, "look it up"))? {
        Some(link) => netlink::delete(handle, link.index).await.map_err(refused(host, "remove it")),
        None => Ok(()),
    }
}

/// Configures the pod's end, on a thread in the pod's namespace.
pub(super) async fn configure(
    handle: &Handle,
    addresses: &[Address],
    gateways: &[IpAddr],
) -> Result<(), LocalError> {
    let name = names::INTERFACE;
    let link = find(handle, name).await?;
    netlink::up(handle, link.index).await.map_err(refused(name, "set it up in the pod"))?;
    for address in addresses {
        let added = netlink::add_address(handle, link.index, *address).await;
        added.map_err(refused(name, "give it the pod's address"))?;
    }
    for gateway in gateways {
        let added = netlink::add_default_route(handle, link.index, *gateway).await;
        added.map_err(refused(name, "set the pod's default route"))?;
    }
    Ok(())
}

async fn find(handle: &Handle, name: &str) -> Result<Link, LocalError> {
    let found = netlink::link(handle, name).await.map_err(refused(name, "look it up"))?;
    found.ok_or_else(|| LocalError::Vanished { name: name.to_owned() })
}

/// Packets of boxes that the next network has no room for would have to be refused one by one.
async fn uplink_mtu(handle: &Handle) -> Result<u32, rtnetlink::Error> {
    let mut smallest = *MTU.end();
    for claim in netlink::claims(handle).await?.iter().filter(|claim| claim.destination.prefix == 0) {
        if let Some(index) = claim.link
            && let Some(mtu) = netlink::mtu(handle, index).await?
        {
            smallest = smallest.min(mtu);
        }
    }
    Ok(smallest.max(*MTU.start()))
}

/// A bridge takes the lowest address of its ports unless it has one of its own, and boxes would have to notice. This one
/// follows from the gateway's IP, so a bridge that is made anew has it again.
fn mac(network: &Network) -> [u8; 6] {
    match network.subnet.gateway().ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            [0x02, 0xa3, a, b, c, d]
        }
        IpAddr::V6(_) => [0x02, 0xa3, 0, 0, 0, 1],
    }
}

/// Switches on what is off, and nothing off ever: others may rely on it by then.
fn forward(network: &Network) -> Result<(), LocalError> {
    let bridge = &network.bridge;
    switch("ipv4/ip_forward", "1")?;
    switch(&format!("ipv4/conf/{bridge}/forwarding"), "1")?;
    // Answers to what the host's loopback asked a box; the firewall's `guard` closes what else this opens.
    switch(&format!("ipv4/conf/{bridge}/route_localnet"), "1")?;
    if network.subnet6.is_none() {
        return set_if_there(&format!("ipv6/conf/{bridge}/disable_ipv6"), "1");
    }
    // No box is this host's router, and nobody else has its address: it is usable at once.
    switch(&format!("ipv6/conf/{bridge}/accept_ra"), "0")?;
    switch(&format!("ipv6/conf/{bridge}/accept_dad"), "0")?;
    if sysctl("ipv6/conf/all/forwarding").as_deref() == Some("0") {
        keep_advertised_routes(bridge)?;
    }
    switch("ipv6/conf/all/forwarding", "1")?;
    switch(&format!("ipv6/conf/{bridge}/forwarding"), "1")
}

/// A host that forwards forgets the routers it has learned of, unless told otherwise (`accept_ra` 2, kernel's
/// ip-sysctl.rst): switching forwarding on must not cut the host off.
fn keep_advertised_routes(bridge: &str) -> Result<(), LocalError> {
    let dir = Path::new(SYSCTL).join("ipv6/conf");
    for entry in fs::read_dir(&dir).map_err(|e| io_error(&dir, "list the directory", e))? {
        let name = entry.map_err(|e| io_error(&dir, "list the directory", e))?.file_name();
        let key = format!("ipv6/conf/{}/accept_ra", name.to_string_lossy());
        if name != bridge && sysctl(&key).as_deref() == Some("1") {
            // The interface may have gone meanwhile.
            set_if_there(&key, "2")?;
        }
    }
    Ok(())
}

fn sysctl(key: &str) -> Option<String> {
    fs::read_to_string(Path::new(SYSCTL).join(key)).ok().map(|text| text.trim().to_owned())
}

fn switch(key: &str, value: &str) -> Result<(), LocalError> {
    if sysctl(key).as_deref() == Some(value) {
        return Ok(());
    }
    let path = sysctl_path(key);
    fs::write(&path, value).map_err(|e| io_error(&path, "set it", e))
}

fn set_if_there(key: &str, value: &str) -> Result<(), LocalError> {
    let path = sysctl_path(key);
    match fs::write(&path, value) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error(&path, "set it", e)),
        _ => Ok(()),
    }
}

fn sysctl_path(key: &str) -> PathBuf {
    Path::new(SYSCTL).join(key)
}

fn io_error(path: &Path, step: &'static str, source: io::Error) -> LocalError {
    LocalError::Io { path: path.to_owned(), step, source }
}

fn refused(object: &str, step: &'static str) -> impl FnOnce(rtnetlink::Error) -> LocalError {
    let object = object.to_owned();
    move |source| LocalError::Kernel { object, step, source }
}
