//! A process and all that it has started.
//!
//! Every process that we execute leads a session of its own (setsid(2)), in which its children are born. Who has left that
//! session but not its parent is found by its parents. A daemon that has done both has made itself independent, and stays.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::cgroup::Cgroup;

/// A process may start another while its family is being killed; a fork bomb is ended with its container.
const ROUNDS: usize = 16;

/// What /proc/PID/stat says of where a process belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kin {
    parent: i32,
    session: i32,
    /// It waits for being reaped, and nothing more can be done to it.
    ended: bool,
}

/// Signals the leader's family among the processes of `cgroup`; killing goes on until nobody of it is left.
pub fn signal(cgroup: &Cgroup, leader: i32, number: i32) -> io::Result<()> {
    let signal = Signal::from_named_raw(number).ok_or(Errno::INVAL)?;
    let rounds = if signal == Signal::KILL { ROUNDS } else { 1 };
    for _ in 0..rounds {
        let mut kin = BTreeMap::new();
        for pid in cgroup.processes()? {
            kin.extend(read(pid).map(|known| (pid, known)));
        }
        let family = family(leader, &kin);
        if family.is_empty() {
            return Ok(());
        }
        for pid in family {
            send(pid, kin.get(&pid), signal)?;
        }
    }
    Ok(())
}

/// The number may be another process's by now; the descriptor is not.
fn send(pid: i32, known: Option<&Kin>, signal: Signal) -> io::Result<()> {
    let Some(process) = Pid::from_raw(pid) else { return Ok(()) };
    let sent = pidfd_open(process, PidfdFlags::empty()).and_then(|descriptor| {
        let same = read(pid).is_some_and(|now| known.is_some_and(|known| known.session == now.session));
        if same { pidfd_send_signal(&descriptor, signal) } else { Ok(()) }
    });
    match sent {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn family(leader: i32, kin: &BTreeMap<i32, Kin>) -> BTreeSet<i32> {
    let leads = |(pid, kin): &(&i32, &Kin)| **pid == leader || kin.session == leader;
    let mut family: BTreeSet<i32> = kin.iter().filter(leads).map(|(pid, _)| *pid).collect();
    loop {
        let children: Vec<i32> = kin
            .iter()
            .filter(|(pid, kin)| family.contains(&kin.parent) && !family.contains(pid))
            .map(|(pid, _)| *pid)
            .collect();
        if children.is_empty() {
            break;
        }
        family.extend(children);
    }
    family.retain(|pid| !kin[pid].ended);
    family
}

fn read(pid: i32) -> Option<Kin> {
    parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// proc_pid_stat(5). The name may have anything in it, parentheses too.
fn parse(stat: &str) -> Option<Kin> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let ended = matches!(fields.next()?, "Z" | "X");
    let parent = fields.next()?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    Some(Kin { parent, session, ended })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kin(parent: i32, session: i32) -> Kin {
        Kin { parent, session, ended: false }
    }

    #[test]
    fn a_name_cannot_pass_for_other_fields() {
        assert_eq!(parse("7 (a) R 1 (x) S 3 4 5 0 -1"), Some(kin(3, 5)));
        assert_eq!(parse("7 (a) Z 3 4 5 0 -1"), Some(Kin { ended: true, ..kin(3, 5) }));
        for text in ["", "7 (a", "7 (a) S", "7 (a) S x 4 5", "7 (a) S 3 4"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_family_is_a_session_and_its_descendants_and_nobody_else() {
        let all = BTreeMap::from([
            (1, kin(0, 1)),
            (20, kin(1, 20)),
            // A child, one that has lost its parent, one in a session of its own and that one's child.
            (21, kin(20, 20)),
            (22, kin(1, 20)),
            (23, kin(21, 23)),
            (24, kin(23, 23)),
            // A daemon, and another command.
            (30, kin(1, 30)),
            (40, kin(1, 40)),
            (25, Kin { ended: true, ..kin(20, 20) }),
        ]);
        assert_eq!(family(20, &all), BTreeSet::from([20, 21, 22, 23, 24]));
        assert_eq!(family(99, &all), BTreeSet::new());
    }
}
