//! What a jailed VMM may still do: a few capabilities for the file server, and no system call that it never needs.
//!
//! The filter names what is refused, not what is allowed: which calls libkrun, QEMU, the file server's library and the C library make
//! depends on their versions and the kernel. Refused is what changes namespaces or mounts, looks into other
//! processes, or reaches rarely used parts of the kernel. QEMU and the file server add their own, stricter filters.

use std::collections::BTreeMap;

use anyhow::Context;
use rustix::thread::{
    CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// What a file server needs to act for the guest's users.
pub(crate) const FILE_SERVER: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Gives up every capability but `kept`, for this process and all that it will ever start.
pub(crate) fn keep_capabilities(kept: CapabilitySet) -> anyhow::Result<()> {
    for capability in CapabilitySet::all().difference(kept).iter() {
        match remove_capability_from_bounding_set(capability) {
            // EINVAL: this kernel is older than that capability.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error).with_context(|| format!("drop {capability:?}")),
        }
    }
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).context("drop capabilities")
}

/// Gives up what is left. The bounding set need not follow: a process without capabilities gains none.
pub(crate) fn drop_capabilities() -> anyhow::Result<()> {
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .context("drop all capabilities")
}

/// Installs the filter for this thread and all that come from it.
pub(crate) fn filter_system_calls() -> anyhow::Result<()> {
    set_no_new_privs(true).context("give up gaining privileges")?;
    let arch = std::env::consts::ARCH.try_into().context("know this processor's system calls")?;
    // One filter and so one errno. It is the one of a kernel without the call: the C library then falls back where it can.
    let refuse = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter =
        SeccompFilter::new(refused()?, SeccompAction::Allow, refuse, arch).context("build the filter")?;
    let program: BpfProgram = filter.try_into().context("compile the filter")?;
    seccompiler::apply_filter(&program).context("install the filter")
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Calls that are refused.
fn refused() -> anyhow::Result<Rules> {
    let always = [
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_fsopen,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_mount_setattr,
        libc::SYS_setns,
        libc::SYS_open_by_handle_at,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_process_madvise,
        libc::SYS_pidfd_getfd,
        libc::SYS_kcmp,
        libc::SYS_kexec_load,
        libc::SYS_kexec_file_load,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_keyctl,
        libc::SYS_fanotify_init,
        libc::SYS_quotactl,
        libc::SYS_quotactl_fd,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_acct,
        libc::SYS_syslog,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_clock_adjtime,
        libc::SYS_adjtimex,
        libc::SYS_personality,
        libc::SYS_vhangup,
        libc::SYS_migrate_pages,
        libc::SYS_move_pages,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_iopl,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_ioperm,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_modify_ldt,
        // Its flags lie in memory, where a filter cannot see them.
        libc::SYS_clone3,
        // Its operations are no system calls at all.
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
    ];
    let mut rules: Rules = always.into_iter().map(|call| (call, Vec::new())).collect();
    // Threads and plain unsharing (the file server's threads have their own umask) stay possible.
    for call in [libc::SYS_unshare, libc::SYS_clone] {
        rules.insert(
            call,
            NAMESPACES.into_iter().map(|flag| has_flag(flag as u64)).collect::<Result<_, _>>()?,
        );
    }
    Ok(rules)
}

const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];

/// The first argument has `flag` set.
fn has_flag(flag: u64) -> anyhow::Result<SeccompRule> {
    let condition = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(flag), flag)?;
    Ok(SeccompRule::new(vec![condition])?)
}
