//! What a box's record means to its VMM and to its agent.

use std::collections::HashMap;
use std::path::PathBuf;

use a3s_box_core::network::{Address, Interface, PodNamespace};
use a3s_box_core::spec::{BoxSpec, IdRange, UserNamespace};
use a3s_box_protocol::AGENT_IMAGE_PORT;
use a3s_box_protocol::proto;
use a3s_box_vmm::{BoxPlan, PlanNetwork, PlanNic};

use crate::clock::now_ns;
use crate::config::RuntimeConfig;
use crate::records::BoxRecord;
use crate::scratch::disk_of;

/// User and group of Kubernetes' pause image.
const PAUSE_ID: u32 = 65_535;

/// The last group that the kernel takes for `ping_group_range`.
const LAST_PING_GROUP: u32 = i32::MAX.unsigned_abs();

/// What a VM of a box is. Without a namespace it has no network.
pub(super) fn plan(
    config: &RuntimeConfig,
    record: &BoxRecord,
    cgroups: Vec<PathBuf>,
    namespace: Option<&PodNamespace>,
) -> BoxPlan {
    BoxPlan {
        id: record.id.clone(),
        dir: record.dir.clone(),
        vcpus: record.spec.size.vcpus,
        memory_mib: record.spec.size.memory_mib,
        kernel: config.kernel.clone(),
        initramfs: config.initramfs.clone(),
        cmdline: config.cmdline.clone(),
        scratch: disk_of(&config.state_dir, &record.id),
        network: namespace
            .map(|PodNamespace { netns, taps }| PlanNetwork { netns: netns.clone(), nics: nics(taps) }),
        cgroups,
        guest_ports: vec![AGENT_IMAGE_PORT],
    }
}

/// A NIC for each tap.
pub(super) fn nics<'a>(taps: impl IntoIterator<Item = &'a String>) -> Vec<PlanNic> {
    (0..=u8::MAX).zip(taps).map(|(place, tap)| PlanNic::new(place, tap.clone())).collect()
}

/// What a box's agent is told of its sandbox.
pub(super) fn configuration(record: &BoxRecord) -> proto::ConfigureSandboxRequest {
    let interfaces = record.network.iter().flat_map(|network| &network.interfaces);
    let nics = record.plan.iter().flat_map(|plan| &plan.network).flat_map(|network| &network.nics);
    proto::ConfigureSandboxRequest {
        hostname: record.hostname().to_owned(),
        sysctls: sysctls(&record.spec),
        interfaces: interfaces.zip(nics).map(interface).collect(),
        shm_bytes: 0,
        unix_time_ns: now_ns().unsigned_abs(),
        user_namespace: record.spec.user_namespace.as_ref().map(user_namespace),
        init_user: Some(init_user(&record.spec)),
    }
}

/// What the pod says, or whom Kubernetes' pause image runs as.
fn init_user(spec: &BoxSpec) -> proto::UserNumbers {
    let last = |range: IdRange| range.count.saturating_sub(1);
    let (uid, gid) = match (spec.init_user, spec.user_namespace) {
        (Some(user), _) => (user.uid, user.gid),
        (None, Some(users)) => (PAUSE_ID.min(last(users.uids)), PAUSE_ID.min(last(users.gids))),
        (None, None) => (PAUSE_ID, PAUSE_ID),
    };
    proto::UserNumbers { uid, gid }
}

/// What the pod says, and where it says nothing what containerd and docker give every pod: a pod's ports are nobody
/// else's, so that no capability is needed to listen on low ones or to ping.
fn sysctls(spec: &BoxSpec) -> HashMap<String, String> {
    // A session can only be in groups that its user namespace has.
    let last_group =
        spec.user_namespace.as_ref().map_or(LAST_PING_GROUP, |users| users.gids.count.saturating_sub(1));
    let defaults = [
        ("net.ipv4.ip_unprivileged_port_start", "0".to_owned()),
        ("net.ipv4.ping_group_range", format!("0 {}", last_group.min(LAST_PING_GROUP))),
    ];
    let mut sysctls: HashMap<String, String> = spec.sysctls.clone().into_iter().collect();
    for (name, value) in defaults {
        if !spec.sysctls.keys().any(|given| is_sysctl(given, name)) {
            sysctls.insert(name.to_owned(), value);
        }
    }
    sysctls
}

/// Whether two names mean one parameter. sysctl(8) takes slashes for dots too.
fn is_sysctl(given: &str, name: &str) -> bool {
    given == name || given.replace('/', ".") == name
}

fn user_namespace(users: &UserNamespace) -> proto::UserNamespace {
    let range = |ids: IdRange| Some(proto::IdRange { start: ids.start, count: ids.count });
    proto::UserNamespace { uids: range(users.uids), gids: range(users.gids) }
}

fn interface((interface, nic): (&Interface, &PlanNic)) -> proto::NetworkInterface {
    proto::NetworkInterface {
        name: interface.name.clone(),
        mac: interface.mac.to_vec(),
        device_mac: nic.mac.to_vec(),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(sysctls: &[(&str, &str)]) -> BoxSpec {
        let sysctls = sysctls.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        BoxSpec { sysctls: sysctls.collect(), ..BoxSpec::default() }
    }

    /// A program that is not root could neither listen below 1024 nor ping, which images count on.
    #[test]
    fn low_ports_and_pings_need_no_capability_unless_the_pod_says_so() {
        let plain = sysctls(&spec(&[("net.core.somaxconn", "7")]));
        assert_eq!(plain["net.ipv4.ip_unprivileged_port_start"], "0");
        assert_eq!(plain["net.ipv4.ping_group_range"], "0 2147483647");
        assert_eq!((plain["net.core.somaxconn"].as_str(), plain.len()), ("7", 3));
        for (ports, pings) in [
            ("net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range"),
            ("net/ipv4/ip_unprivileged_port_start", "net/ipv4/ping_group_range"),
        ] {
            let said = sysctls(&spec(&[(ports, "1024"), (pings, "1 0")]));
            assert_eq!((said[ports].as_str(), said[pings].as_str(), said.len()), ("1024", "1 0", 2));
        }
    }

    #[test]
    fn in_a_user_namespace_the_groups_that_may_ping_are_those_it_has() {
        let range = IdRange { start: 4_096_786_432, count: 65_536 };
        let users = Some(UserNamespace { uids: range, gids: range });
        let given = sysctls(&BoxSpec { user_namespace: users, ..BoxSpec::default() });
        assert_eq!(given["net.ipv4.ping_group_range"], "0 65535");
    }
}
