//! What a pod's interfaces have carried, as the pod's network namespace counts it: the guest is not asked.

use std::fs;

use a3s_box_core::network::{Interface, InterfaceUsage, PodNetwork, Traffic};

use crate::netns::{NetnsError, read_inside};

/// The table of the thread's own network namespace: proc_pid_net(5).
const TABLE: &str = "/proc/thread-self/net/dev";

/// The traffic of a pod's interfaces, in their order. One that is gone is left out.
pub async fn usage(network: &PodNetwork) -> Result<Vec<InterfaceUsage>, NetnsError> {
    let table = read_inside(&network.netns, "read its traffic", || fs::read_to_string(TABLE)).await?;
    Ok(network.interfaces.iter().filter_map(|interface| row(&table, interface)).collect())
}

/// A row is the name, a colon and sixteen counters: eight received, eight sent, each bytes, packets, errors, dropped, …
fn row(table: &str, interface: &Interface) -> Option<InterfaceUsage> {
    let counters =
        table.lines().find_map(|line| line.trim_start().strip_prefix(&interface.name)?.strip_prefix(':'))?;
    let counters: Vec<u64> = counters.split_whitespace().map(|word| word.parse().unwrap_or(0)).collect();
    let traffic = |at: usize| match counters.get(at..at + 4) {
        Some(&[bytes, packets, errors, dropped]) => Some(Traffic { bytes, packets, errors, dropped }),
        Some(_) | None => None,
    };
    Some(InterfaceUsage { name: interface.name.clone(), received: traffic(0)?, sent: traffic(8)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str) -> Interface {
        Interface {
            name: name.to_owned(),
            mac: [0; 6],
            mtu: 1500,
            addresses: Vec::new(),
            routes: Vec::new(),
            tap: "tap0".to_owned(),
        }
    }

    const TABLE: &str = "Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0
eth0:    1234      12    1    2    0     0          0         0     5678      34    3    4    0     0       0          0
 eth01:  9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9
";

    #[test]
    fn a_row_has_what_came_before_what_went() {
        let usage = row(TABLE, &interface("eth0")).unwrap();
        assert_eq!(usage.received, Traffic { bytes: 1234, packets: 12, errors: 1, dropped: 2 });
        assert_eq!(usage.sent, Traffic { bytes: 5678, packets: 34, errors: 3, dropped: 4 });
        assert_eq!(row(TABLE, &interface("eth1")), None);
        assert_eq!(row("eth0: 1 2 3\n", &interface("eth0")), None);
    }

    #[tokio::test]
    async fn a_namespace_that_is_gone_is_an_error() {
        let network =
            PodNetwork { netns: "/nonexistent/netns".into(), interfaces: vec![interface("eth0")], dns: None };
        assert!(matches!(usage(&network).await, Err(NetnsError::Absent { .. })));
    }
}
