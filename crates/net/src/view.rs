//! From what the kernel has in the pod's namespace to what the guest is told.
//!
//! Addresses are CNI's: they are what the cluster knows the pod by. Routes are the kernel's: plugins set more than
//! they report (point-to-point plugins replace the connected route, Calico reports no routes at all), and what a process
//! in the namespace would have had is what the guest must have.

use std::net::IpAddr;

use a3s_box_core::network::{Address, Route};

use crate::netlink::{KernelRoute, Origin};

/// The guest's addresses and routes, in an order in which they can be added: a gateway is reachable
/// by the time a route goes through it.
///
/// A guest that adds an address gets the route to the address's network with it. Where the namespace has no such route
/// the address becomes a host address, and the routes alone say what is where.
pub(crate) fn for_guest(addresses: &[Address], kernel: &[KernelRoute]) -> (Vec<Address>, Vec<Route>) {
    let on_link = |net: Address| kernel.iter().any(|r| r.gateway.is_none() && r.destination == net);
    let adjusted: Vec<Address> = addresses
        .iter()
        .map(|a| if on_link(network_of(*a)) { *a } else { Address { ip: a.ip, prefix: full_length(a.ip) } })
        .collect();
    let implied: Vec<Address> = adjusted.iter().map(|a| network_of(*a)).collect();
    let mut routes: Vec<Route> = kernel
        .iter()
        .filter(|r| r.origin == Origin::Configured)
        .filter(|r| r.gateway.is_some() || !implied.contains(&r.destination))
        .map(|r| Route { destination: r.destination, gateway: r.gateway })
        .collect();
    // Stable: on-link first, then through a gateway from the narrowest network to the default route.
    routes.sort_by_key(|r| (r.gateway.is_some(), u8::MAX - r.destination.prefix));
    (adjusted, routes)
}

fn full_length(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

fn network_of(address: Address) -> Address {
    let ip = match address.ip {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(address.prefix)).unwrap_or(0);
            IpAddr::V4((ip.to_bits() & mask).into())
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(address.prefix)).unwrap_or(0);
            IpAddr::V6((ip.to_bits() & mask).into())
        }
    };
    Address { ip, prefix: address.prefix }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Address {
        text.parse().unwrap()
    }

    fn kernel(destination: &str, gateway: Option<&str>, origin: Origin) -> KernelRoute {
        KernelRoute { destination: net(destination), gateway: gateway.map(|g| g.parse().unwrap()), origin }
    }

    fn route(destination: &str, gateway: Option<&str>) -> Route {
        Route { destination: net(destination), gateway: gateway.map(|g| g.parse().unwrap()) }
    }

    #[test]
    fn a_bridged_pod_keeps_its_prefix_and_its_default_route() {
        let seen = [
            kernel("0.0.0.0/0", Some("10.1.0.1"), Origin::Configured),
            kernel("10.1.0.0/16", None, Origin::Address),
        ];
        let (addresses, routes) = for_guest(&[net("10.1.0.7/16")], &seen);
        assert_eq!(addresses, [net("10.1.0.7/16")]);
        assert_eq!(routes, [route("0.0.0.0/0", Some("10.1.0.1"))]);
    }

    #[test]
    fn a_point_to_point_pod_gets_a_host_address_and_its_gateway_first() {
        let seen = [
            kernel("0.0.0.0/0", Some("10.1.0.1"), Origin::Configured),
            kernel("10.1.0.0/24", Some("10.1.0.1"), Origin::Configured),
            kernel("10.1.0.1/32", None, Origin::Configured),
        ];
        let (addresses, routes) = for_guest(&[net("10.1.0.7/24")], &seen);
        assert_eq!(addresses, [net("10.1.0.7/32")]);
        assert_eq!(
            routes,
            [
                route("10.1.0.1/32", None),
                route("10.1.0.0/24", Some("10.1.0.1")),
                route("0.0.0.0/0", Some("10.1.0.1"))
            ]
        );
    }

    #[test]
    fn what_routers_advertise_is_left_to_the_guest() {
        let seen = [
            kernel("2001:db8::/64", None, Origin::Address),
            kernel("::/0", Some("fe80::1"), Origin::Advertisement),
        ];
        let (addresses, routes) = for_guest(&[net("2001:db8::7/64")], &seen);
        assert_eq!(addresses, [net("2001:db8::7/64")]);
        assert_eq!(routes, []);
    }

    #[test]
    fn networks_of_extreme_lengths_are_computed() {
        assert_eq!(network_of(net("10.1.2.3/0")), net("0.0.0.0/0"));
        assert_eq!(network_of(net("10.1.2.3/32")), net("10.1.2.3/32"));
        assert_eq!(network_of(net("2001:db8::1/0")), net("::/0"));
        assert_eq!(network_of(net("2001:db8::1/128")), net("2001:db8::1/128"));
    }
}
