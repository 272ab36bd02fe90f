//! A system call filter as data: what a profile from a file of the node says, read and checked.
//!
//! The words of the file are gone: names that no kernel of a box knows are left out and numbers are those of
//! x86-64. Which rules apply is known only with the capabilities of the process, so conditions on them stay.

use serde::{Deserialize, Serialize};

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompAction {
    /// It is executed.
    Allow,
    /// It is executed, and the kernel keeps a record of it where it has an audit log.
    Log,
    /// It fails with this error number.
    Fail(u16),
    /// A tracer decides, and is told this number. Without one it fails with ENOSYS.
    Trace(u16),
    /// The thread gets SIGSYS.
    Trap,
    /// The thread ends.
    KillThread,
    /// The process ends.
    KillProcess,
}

/// How an argument is compared with a value; both are unsigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompComparison {
    /// `==`
    Equal,
    /// `!=`
    NotEqual,
    /// `>`
    Greater,
    /// `>=`
    GreaterOrEqual,
    /// `<`
    Less,
    /// `<=`
    LessOrEqual,
}

/// A condition on one argument of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompCondition {
    /// 0 to 5.
    pub argument: u8,
    /// The bits that count. Only [`SeccompComparison::Equal`] has others than all.
    pub mask: u64,
    /// How.
    pub comparison: SeccompComparison,
    /// With what.
    pub value: u64,
}

/// What happens to some calls, under conditions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompRule {
    /// Their numbers on x86-64.
    pub calls: Vec<u32>,
    /// What happens to them.
    pub action: SeccompAction,
    /// All must hold; none for always.
    pub conditions: Vec<SeccompCondition>,
    /// The rule is for processes that have all of these capabilities, by name.
    pub with_capabilities: Vec<String>,
    /// The rule is not for processes that have one of these capabilities, by name.
    pub without_capabilities: Vec<String>,
}

/// A profile from a file of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompProfile {
    /// Where it was read. The file may have changed since.
    pub path: std::path::PathBuf,
    /// What happens to calls that no rule is about.
    pub default_action: SeccompAction,
    /// Of the rules about a call, one without conditions wins, then the first whose conditions hold.
    pub rules: Vec<SeccompRule>,
}
