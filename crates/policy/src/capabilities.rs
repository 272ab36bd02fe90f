//! Capabilities by name, and the sets of a process.
//!
//! Numbers are those of the kernel's `include/uapi/linux/capability.h`.

use thiserror::Error;

use a3s_box_core::spec::CapabilitySpec;

/// The names in the order of their numbers.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What a container has that asks for nothing: the set that Kubernetes documents as the runtime's default.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// All capabilities that the guest's kernel knows.
pub const ALL: u64 = (1 << NAMES.len()) - 1;

/// A word that names no capability.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not a capability")]
pub struct UnknownCapability(String);

/// The sets of a process as capabilities(7) names them, each a bit mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the kernel's")]
pub struct CapabilitySets {
    pub bounding: u64,
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
    pub ambient: u64,
}

/// The bit of a capability; with or without `CAP_`, in any case.
pub fn bit(name: &str) -> Result<u64, UnknownCapability> {
    let upper = name.to_ascii_uppercase();
    let plain = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let number = NAMES
        .iter()
        .position(|known| *known == plain)
        .ok_or_else(|| UnknownCapability(name.chars().take(80).collect()))?;
    Ok(1 << number)
}

/// The sets of a process. `ALL` replaces the default set, first in `add`, then in `drop`; the single words apply
/// afterwards, so that "drop ALL, add KILL" leaves KILL.
///
/// Inheritable is empty unless an ambient capability needs it: a non-empty inheritable set lets
/// programs with file capabilities gain more than the container was given.
pub fn sets(spec: &CapabilitySpec, privileged: bool) -> Result<CapabilitySets, UnknownCapability> {
    if privileged {
        return Ok(CapabilitySets {
            bounding: ALL,
            effective: ALL,
            permitted: ALL,
            inheritable: 0,
            ambient: 0,
        });
    }
    let mut set = bits(DEFAULT)?;
    if names_all(&spec.add) {
        set = ALL;
    }
    if names_all(&spec.drop) {
        set = 0;
    }
    set |= bits(singles(&spec.add))?;
    set &= !bits(singles(&spec.drop))?;
    let ambient = if names_all(&spec.add_ambient) { ALL } else { bits(singles(&spec.add_ambient))? };
    set |= ambient;
    Ok(CapabilitySets { bounding: set, effective: set, permitted: set, inheritable: ambient, ambient })
}

fn names_all(names: &[String]) -> bool {
    names.iter().any(|name| name.eq_ignore_ascii_case("ALL"))
}

fn singles(names: &[String]) -> impl Iterator<Item = &str> {
    names.iter().map(String::as_str).filter(|name| !name.eq_ignore_ascii_case("ALL"))
}

fn bits<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<u64, UnknownCapability> {
    names.into_iter().try_fold(0, |set, name| Ok(set | bit(name)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[&str]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_default_set_is_what_container_users_know() {
        // 0xa80425fb is what /proc/self/status shows in a default container of other runtimes.
        let caps = sets(&CapabilitySpec::default(), false).unwrap();
        assert_eq!((caps.bounding, caps.effective, caps.permitted), (0xa804_25fb, 0xa804_25fb, 0xa804_25fb));
        assert_eq!((caps.inheritable, caps.ambient), (0, 0));
    }

    #[test]
    fn dropping_all_and_adding_one_leaves_the_one() {
        let spec = CapabilitySpec { add: words(&["cap_kill"]), drop: words(&["all"]), ..Default::default() };
        assert_eq!(sets(&spec, false).unwrap().bounding, bit("KILL").unwrap());
        let spec = CapabilitySpec { add: words(&["ALL"]), drop: words(&["NET_RAW"]), ..Default::default() };
        assert_eq!(sets(&spec, false).unwrap().permitted, ALL & !bit("NET_RAW").unwrap());
    }

    #[test]
    fn an_ambient_capability_is_in_every_set() {
        let spec = CapabilitySpec { add_ambient: words(&["NET_ADMIN"]), ..Default::default() };
        let (caps, net_admin) = (sets(&spec, false).unwrap(), bit("NET_ADMIN").unwrap());
        for set in [caps.bounding, caps.effective, caps.permitted, caps.inheritable, caps.ambient] {
            assert_ne!(set & net_admin, 0);
        }
    }

    #[test]
    fn an_unknown_word_is_named() {
        let spec = CapabilitySpec { add: words(&["NET_ADMINN"]), ..Default::default() };
        assert_eq!(sets(&spec, false).unwrap_err().to_string(), "\"NET_ADMINN\" is not a capability");
    }
}
