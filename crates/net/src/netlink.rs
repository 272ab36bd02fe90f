//! Talking rtnetlink from a thread that stands in a pod's network namespace.
//!
//! A netlink socket belongs to the namespace in which it was opened. The daemon's own runtime never opens one
//! for a pod: each conversation has a small single-threaded runtime on the namespace's thread.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::RawFd;

use a3s_box_core::network::Address;
use futures::TryStreamExt;
use netlink_packet_route::address::{AddressAttribute, AddressFlags};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType, RouteVia,
};
use nix::errno::Errno;
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkUnspec, LinkVeth, RouteMessageBuilder};

/// `ETH_P_ALL` in network byte order, as traffic control wants it.
const ALL_PROTOCOLS: u16 = 0x0003_u16.to_be();
/// The handle of an ingress qdisc, `ffff:`.
const INGRESS: u32 = 0xffff_0000;

/// An Ethernet link, as far as it concerns us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) mtu: u32,
    /// `None`: not an Ethernet link.
    pub(crate) mac: Option<[u8; 6]>,
    pub(crate) bridge: bool,
}

/// Addresses that a host has a use for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) destination: Address,
    /// The link they are behind, where it is one.
    pub(crate) link: Option<u32>,
}

/// A route of the kernel's main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KernelRoute {
    pub(crate) destination: Address,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) origin: Origin,
}

/// Who made a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The kernel, when an address was added.
    Address,
    /// A router's advertisement.
    Advertisement,
    /// Somebody on purpose.
    Configured,
}

/// Runs `talk` against the kernel of the calling thread's namespace.
pub(crate) fn converse<T, E, F>(talk: F) -> Result<T, E>
where
    E: From<io::Error>,
    F: AsyncFnOnce(Handle) -> Result<T, E>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let connection = tokio::spawn(connection);
        let outcome = talk(handle).await;
        connection.abort();
        outcome
    })
}

/// The link called `name`, if there is one.
pub(crate) async fn link(handle: &Handle, name: &str) -> Result<Option<Link>, rtnetlink::Error> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    match links.try_next().await {
        Ok(message) => Ok(message.as_ref().map(describe)),
        Err(e) if is(&e, Errno::ENODEV) => Ok(None),
        Err(e) => Err(e),
    }
}

fn describe(message: &LinkMessage) -> Link {
    let mut link = Link { index: message.header.index, mtu: 0, mac: None, bridge: false };
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(bytes) if ethernet => link.mac = bytes.as_slice().try_into().ok(),
            LinkAttribute::LinkInfo(info) => {
                link.bridge = info.iter().any(|item| matches!(item, LinkInfo::Kind(InfoKind::Bridge)));
            }
            _ => {}
        }
    }
    link
}

/// Sets a link up.
pub(crate) async fn up(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await
}

/// Sets a link's MTU and sets it up.
pub(crate) async fn up_with_mtu(handle: &Handle, index: u32, mtu: u32) -> Result<(), rtnetlink::Error> {
    handle.link().set(LinkUnspec::new_with_index(index).mtu(mtu).up().build()).execute().await
}

/// The MTU of the link with this index, if there is one.
pub(crate) async fn mtu(handle: &Handle, index: u32) -> Result<Option<u32>, rtnetlink::Error> {
    let mut links = handle.link().get().match_index(index).execute();
    match links.try_next().await {
        Ok(message) => Ok(message.as_ref().map(|message| describe(message).mtu)),
        Err(e) if is(&e, Errno::ENODEV) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Makes a bridge, down. There already is success.
pub(crate) async fn add_bridge(
    handle: &Handle,
    name: &str,
    mac: [u8; 6],
    mtu: u32,
) -> Result<(), rtnetlink::Error> {
    let bridge = LinkBridge::new(name).down().address(mac.to_vec()).mtu(mtu).build();
    unless(Errno::EEXIST, handle.link().add(bridge).execute().await)
}

/// Makes a veth pair: `name` here, its peer by the name and in the network namespace of `inside`. Both at once, so that
/// nothing is left half-way.
pub(crate) async fn add_veth(
    handle: &Handle,
    name: &str,
    inside: (&str, RawFd),
    mtu: u32,
) -> Result<(), rtnetlink::Error> {
    let peer = LinkUnspec::new_with_name(inside.0).mtu(mtu).setns_by_fd(inside.1).build();
    let veth = LinkVeth::new(name, inside.0).mtu(mtu).set_info_data(InfoData::Veth(InfoVeth::Peer(peer)));
    handle.link().add(veth.build()).execute().await
}

/// Puts a link on a bridge, whose frames may go back to where they came from, and sets it up.
pub(crate) async fn join(handle: &Handle, index: u32, bridge: u32) -> Result<(), rtnetlink::Error> {
    handle.link().set(LinkUnspec::new_with_index(index).controller(bridge).up().build()).execute().await?;
    handle.link().set_port(LinkBridgePort::new(index).hairpin(true).build()).execute().await
}

/// Removes a link. Gone already is success.
pub(crate) async fn delete(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    unless(Errno::ENODEV, handle.link().del(index).execute().await)
}

/// Gives a link an address that can be used at once: whoever gives it away knows that nobody else has it, so IPv6 need
/// not ask around. There already is success.
pub(crate) async fn add_address(
    handle: &Handle,
    index: u32,
    address: Address,
) -> Result<(), rtnetlink::Error> {
    let mut request = handle.address().add(index, address.ip, address.prefix);
    if address.ip.is_ipv6() {
        request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    unless(Errno::EEXIST, request.execute().await)
}

/// Sends what no other route is for through a link. There already is success.
pub(crate) async fn add_default_route(
    handle: &Handle,
    index: u32,
    gateway: IpAddr,
) -> Result<(), rtnetlink::Error> {
    let route = match gateway {
        IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new().output_interface(index).gateway(ip).build(),
        IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new().output_interface(index).gateway(ip).build(),
    };
    unless(Errno::EEXIST, handle.route().add(route).execute().await)
}

fn is(error: &rtnetlink::Error, errno: Errno) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(e) if e.raw_code() == -(errno as i32))
}

/// Whether the kernel was built without what it was asked for, or cannot load it.
pub(crate) fn is_missing(error: &rtnetlink::Error) -> bool {
    is(error, Errno::ENOENT) || is(error, Errno::EOPNOTSUPP)
}

fn unless(fine: Errno, outcome: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match outcome {
        Err(error) if is(&error, fine) => Ok(()),
        other => other,
    }
}

/// Every network that this host has a way to, of both families and in any table, its own addresses included.
pub(crate) async fn claims(handle: &Handle) -> Result<Vec<Claim>, rtnetlink::Error> {
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    let mut found = Vec::new();
    for query in [v4, v6] {
        let mut stream = Box::pin(handle.route().get(query).execute());
        while let Some(message) = stream.try_next().await? {
            if matches!(message.header.kind, RouteType::Unicast | RouteType::Local) {
                let RouteEnds { link, destination, .. } = ends(&message);
                found.push(Claim { destination, link });
            }
        }
    }
    Ok(found)
}

/// Sends every frame that comes in at `from` out at `to`, before the namespace's own stack sees it.
pub(crate) async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), rtnetlink::Error> {
    let from = from.cast_signed();
    match handle.qdisc().add(from).ingress().execute().await {
        // A plugin has put one there: its filters come first, ours takes the rest.
        Err(e) if is(&e, Errno::EEXIST) => {}
        other => other?,
    }
    let filter = handle.traffic_filter(from).add().parent(INGRESS).protocol(ALL_PROTOCOLS);
    filter.redirect(to)?.execute().await
}

/// The unicast routes through a link, of both families, except those of link-local and multicast networks.
pub(crate) async fn routes(handle: &Handle, index: u32) -> Result<Vec<KernelRoute>, rtnetlink::Error> {
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    let mut found = Vec::new();
    for query in [v4, v6] {
        let mut stream = Box::pin(handle.route().get(query).execute());
        while let Some(message) = stream.try_next().await? {
            found.extend(route_through(&message, index));
        }
    }
    Ok(found)
}

struct RouteEnds {
    table: u32,
    link: Option<u32>,
    gateway: Option<IpAddr>,
    destination: Address,
}

fn ends(message: &RouteMessage) -> RouteEnds {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let (mut link, mut gateway, mut network) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(t) => table = *t,
            RouteAttribute::Oif(i) => link = Some(*i),
            RouteAttribute::Destination(to) => network = ip(to),
            RouteAttribute::Gateway(via) => gateway = ip(via),
            RouteAttribute::Via(RouteVia::Inet(via)) => gateway = Some(IpAddr::V4(*via)),
            RouteAttribute::Via(RouteVia::Inet6(via)) => gateway = Some(IpAddr::V6(*via)),
            _ => {}
        }
    }
    let any = match header.address_family {
        netlink_packet_route::AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    };
    let destination = Address { ip: network.unwrap_or(any), prefix: header.destination_prefix_length };
    RouteEnds { table, link, gateway, destination }
}

fn route_through(message: &RouteMessage, index: u32) -> Option<KernelRoute> {
    let header = &message.header;
    if header.kind != RouteType::Unicast {
        return None;
    }
    let RouteEnds { table, link, gateway, destination } = ends(message);
    let wanted = table == u32::from(RouteHeader::RT_TABLE_MAIN)
        && link == Some(index)
        && !is_automatic(destination.ip);
    let origin = match header.protocol {
        RouteProtocol::Kernel => Origin::Address,
        RouteProtocol::Ra => Origin::Advertisement,
        _ => Origin::Configured,
    };
    wanted.then_some(KernelRoute { destination, gateway, origin })
}

/// Every IPv6 interface has these without anybody's doing.
fn is_automatic(network: IpAddr) -> bool {
    match network {
        IpAddr::V4(_) => false,
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.is_multicast(),
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}
