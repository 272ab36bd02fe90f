//! The system call filter of sessions: a profile (data) and a small compiler to classic BPF.
//!
//! The program is made on the host and travels to the guest as the kernel takes it. The agent neither
//! knows profiles nor compiles anything.

mod file;
mod names;
mod profile;
mod program;

use std::collections::BTreeMap;

use a3s_box_core::seccomp::{SeccompAction, SeccompProfile, SeccompRule};
use a3s_box_core::spec::SeccompSpec;
use thiserror::Error;

pub use file::{SeccompFileError, SeccompProfileError, read as read_seccomp_profile};
use program::{Case, Instruction, MAX_INSTRUCTIONS, Rules, Verdict};

use crate::capabilities;

/// A profile whose program the kernel would not take.
#[derive(Debug, Error)]
#[error(
    "the seccomp profile {path} needs {length} instructions, the kernel takes {MAX_INSTRUCTIONS}; \
     use fewer rules with conditions"
)]
pub struct FilterTooLong {
    path: String,
    length: usize,
}

/// The program for a process with these capabilities (a bit mask), 8 octets per instruction; empty for none.
pub fn program(spec: &SeccompSpec, capabilities: u64) -> Result<Vec<u8>, FilterTooLong> {
    Ok(match spec {
        SeccompSpec::Unconfined => Vec::new(),
        SeccompSpec::RuntimeDefault => program::encode(&program::compile(&profile::rules(capabilities))),
        SeccompSpec::Profile(profile) => program::encode(&compile_profile(profile, capabilities)?),
    })
}

fn compile_profile(profile: &SeccompProfile, capabilities: u64) -> Result<Vec<Instruction>, FilterTooLong> {
    let program = program::compile(&rules(profile, capabilities));
    if program.len() > MAX_INSTRUCTIONS {
        return Err(FilterTooLong { path: profile.path.display().to_string(), length: program.len() });
    }
    Ok(program)
}

fn rules(profile: &SeccompProfile, capabilities: u64) -> Rules {
    let has = |name: &String| capabilities::bit(name).is_ok_and(|bit| capabilities & bit != 0);
    let applies = |rule: &&SeccompRule| {
        rule.with_capabilities.iter().all(has) && !rule.without_capabilities.iter().any(has)
    };
    let mut verdicts = BTreeMap::new();
    for rule in profile.rules.iter().filter(applies) {
        for call in &rule.calls {
            let verdict = verdicts
                .entry(*call)
                .or_insert_with(|| Verdict::First { cases: Vec::new(), otherwise: profile.default_action });
            match verdict {
                Verdict::Always(_) => {}
                Verdict::First { .. } if rule.conditions.is_empty() => {
                    *verdict = Verdict::Always(rule.action);
                }
                Verdict::First { cases, .. } => {
                    cases.push(Case { conditions: rule.conditions.clone(), action: rule.action });
                }
            }
        }
    }
    // What is newer than the list is unknown rather than forbidden, so that libraries fall back.
    let otherwise = match profile.default_action {
        SeccompAction::Fail(_) => {
            let known = 0..=profile::LAST_KNOWN;
            for number in known {
                verdicts.entry(number).or_insert(Verdict::Always(profile.default_action));
            }
            SeccompAction::Fail(profile::ENOSYS)
        }
        SeccompAction::Allow
        | SeccompAction::Log
        | SeccompAction::Trace(_)
        | SeccompAction::Trap
        | SeccompAction::KillThread
        | SeccompAction::KillProcess => profile.default_action,
    };
    Rules { verdicts, otherwise: Verdict::Always(otherwise) }
}

/// What the fuzz target calls: whatever is a profile has a program or is refused as too long.
pub fn fuzz_profile(content: &[u8]) {
    if let Ok(profile) = file::parse(std::path::Path::new("/fuzzed"), content) {
        for capabilities in [0, capabilities::ALL] {
            let _ = compile_profile(&profile, capabilities);
        }
    }
}
