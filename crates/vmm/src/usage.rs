//! What a box costs its host: the processes of its VMM, as proc_pid_stat(5) and proc_pid_smaps(5) tell.

use std::io;
use std::time::Duration;

use crate::launch::stat_fields;
use crate::seam::HostUsage;

/// More processes than any box has.
const MAX_PROCESSES: usize = 64;

/// What times are counted in: USER_HZ, 100 per second on every architecture that has KVM.
const TICK_MS: u64 = 10;

/// Sums up a process and all below it. One that ends meanwhile is left out. Blocks.
pub(crate) fn of_tree(pid: i32) -> io::Result<HostUsage> {
    let mut sum = HostUsage::default();
    let mut open = vec![pid];
    let mut seen = 0;
    while let Some(pid) = open.pop() {
        seen += 1;
        if seen > MAX_PROCESSES {
            return Err(io::Error::other("the VMM has too many processes"));
        }
        if let Some(one) = of_process(pid)? {
            sum.cpu += one.cpu;
            sum.memory_bytes += one.memory_bytes;
            open.extend(children(pid)?);
        }
    }
    Ok(sum)
}

fn of_process(pid: i32) -> io::Result<Option<HostUsage>> {
    let Some(stat) = read(pid, "stat")? else { return Ok(None) };
    let Some(rollup) = read(pid, "smaps_rollup")? else { return Ok(None) };
    // utime and stime are fields 14 and 15, state is field 3.
    let ticks: u64 = stat_fields(&stat).skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    // What several processes share, as the guest's memory, counts once.
    let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib: u64 = pss.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0);
    Ok(Some(HostUsage { cpu: Duration::from_millis(ticks * TICK_MS), memory_bytes: kib * 1024 }))
}

fn children(pid: i32) -> io::Result<Vec<i32>> {
    let mut all = Vec::new();
    let threads = match std::fs::read_dir(format!("/proc/{pid}/task")) {
        Err(error) if has_ended(&error) => return Ok(all),
        other => other?,
    };
    for thread in threads {
        let name = thread?.file_name();
        let list = read(pid, &format!("task/{}/children", name.to_string_lossy()))?.unwrap_or_default();
        all.extend(list.split_ascii_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
    }
    Ok(all)
}

fn read(pid: i32, name: &str) -> io::Result<Option<String>> {
    match std::fs::read_to_string(format!("/proc/{pid}/{name}")) {
        Err(error) if has_ended(&error) => Ok(None),
        other => other.map(Some),
    }
}

/// ESRCH: it ended while the file was being read.
fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};

    use rustix::process::{Pid, Signal, kill_process_group};

    use super::*;

    struct Group(Child);

    impl Drop for Group {
        fn drop(&mut self) {
            let _ = kill_process_group(Pid::from_child(&self.0), Signal::KILL);
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_tree_is_summed_up_and_one_that_has_ended_is_nothing() {
        // The child has memory that its parent has not.
        let script = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; \
            (x=$(head -c 8000000 /dev/zero | tr '\\0' x); echo; sleep 60; :) & wait";
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut group = Group(command.spawn().unwrap());
        group.0.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
        let pid = group.0.id() as i32;
        assert_eq!(children(pid).unwrap().len(), 1);
        let (all, one) = (of_tree(pid).unwrap(), of_process(pid).unwrap().unwrap());
        assert!(one.cpu > Duration::ZERO && all.cpu >= one.cpu, "{all:?} {one:?}");
        assert!(one.memory_bytes > 0 && all.memory_bytes > one.memory_bytes + 4_000_000, "{all:?} {one:?}");
        drop(group);
        assert_eq!(of_tree(pid).unwrap(), HostUsage::default());
    }
}
