//! Profiles from files of the node: the JSON of the OCI runtime specification (`linux.seccomp`) with what Docker's
//! profiles have beyond it (`name`, `includes`, `excludes`, `archMap`, `comment`).
//!
//! Reading is strict: a misspelt key or action is an error and not a filter with a hole. Names of calls are the
//! exception: profiles list those of all architectures and of newer kernels, and every runtime ignores what its
//! kernel does not have.
//!
//! Architectures are checked and change nothing: the guest's kernel has the calls of x86-64 only, and those of other
//! interfaces fail with ENOSYS whatever a profile says.
//!
//! References: runtime-spec `config-linux.md` (seccomp), libseccomp's `seccomp_rule_add(3)` for the comparisons.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use a3s_box_core::foreign;
use a3s_box_core::seccomp::{
    SeccompAction, SeccompComparison, SeccompCondition, SeccompProfile, SeccompRule,
};
use serde::Deserialize;
use serde::de::IgnoredAny;
use thiserror::Error;

use super::names;
use super::profile::EPERM;
use crate::capabilities;

/// Docker's default profile has 20 KiB.
const MAX_FILE: u64 = 1 << 20;
/// Conditions of one rule; a call has six arguments.
pub(super) const MAX_CONDITIONS: usize = 12;
/// Rules, and calls under conditions: more fit into no program.
const MAX_RULES: usize = 4096;
/// The kernel's MAX_ERRNO.
const MAX_ERRNO: u32 = 4095;
/// What `minKernel` is compared with: the series that boxes run (see `docs/development.md`).
const GUEST_KERNEL: (u32, u32) = (6, 12);

/// The architectures of the OCI runtime specification.
const ARCHITECTURES: [&str; 23] = [
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_M68K",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_NATIVE",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_SH",
    "SCMP_ARCH_X32",
    "SCMP_ARCH_X86",
    "SCMP_ARCH_X86_64",
];

/// A profile that cannot be used.
#[derive(Debug, Error)]
pub enum SeccompFileError {
    /// The path does not start at the root.
    #[error("the seccomp profile {} is not an absolute path; give the path on the node", .0.display())]
    Relative(PathBuf),
    /// The file cannot be read.
    #[error("reading the seccomp profile {} failed: {source}; put it on every node that may run the pod", path.display())]
    Read {
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A folder, a pipe or a device.
    #[error("the seccomp profile {} is not a regular file; give the path of a JSON file", .0.display())]
    NotAFile(PathBuf),
    /// A file of this size is no profile.
    #[error("the seccomp profile {} is larger than {MAX_FILE} bytes; make it smaller", .0.display())]
    TooLarge(PathBuf),
    /// The content is no profile.
    #[error("the seccomp profile {} is not valid: {source}", path.display())]
    Content {
        /// Where it was read.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: SeccompProfileError,
    },
}

/// Content that is no profile.
#[derive(Debug, Error)]
pub enum SeccompProfileError {
    /// No JSON, or other keys and types than a profile has.
    #[error("{0}; correct the file")]
    Json(#[from] serde_json::Error),
    /// A word that means nothing.
    #[error("{field}: {value:?} is not {expected}")]
    Word {
        /// The path of the key.
        field: String,
        /// What was given.
        value: String,
        /// What could have been given.
        expected: &'static str,
    },
    /// A number out of range.
    #[error("{field}: {value} is above {limit}")]
    Number {
        /// The path of the key.
        field: String,
        /// What was given.
        value: u64,
        /// The greatest that could have been given.
        limit: u64,
    },
    /// Something that boxes cannot do.
    #[error("{field}: {reason}")]
    Unsupported {
        /// The path of the key.
        field: String,
        /// Why not, and what to do.
        reason: &'static str,
    },
}

/// Reads a profile. Blocks: the path may lie on a slow file system.
pub fn read(path: &Path) -> Result<SeccompProfile, SeccompFileError> {
    if !path.is_absolute() {
        return Err(SeccompFileError::Relative(path.to_owned()));
    }
    let failed = |source| SeccompFileError::Read { path: path.to_owned(), source };
    // Opening a pipe would wait for its writer.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(SeccompFileError::NotAFile(path.to_owned()));
    }
    let content =
        bounded(file).map_err(failed)?.ok_or_else(|| SeccompFileError::TooLarge(path.to_owned()))?;
    parse(path, &content).map_err(|source| SeccompFileError::Content { path: path.to_owned(), source })
}

fn bounded(file: File) -> io::Result<Option<Vec<u8>>> {
    let mut content = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut content)?;
    Ok((content.len() as u64 <= MAX_FILE).then_some(content))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileProfile {
    default_action: String,
    default_errno_ret: Option<u32>,
    architectures: Option<Vec<String>>,
    /// Which architectures go with which: nothing to us.
    #[serde(rename = "archMap")]
    _arch_map: Option<IgnoredAny>,
    flags: Option<Vec<String>>,
    listener_path: Option<String>,
    listener_metadata: Option<String>,
    syscalls: Option<Vec<FileRule>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileRule {
    name: Option<String>,
    names: Option<Vec<String>>,
    action: String,
    errno_ret: Option<u32>,
    /// The error number by name, which Docker's tools write beside `errnoRet`.
    #[serde(rename = "errno")]
    _errno: Option<IgnoredAny>,
    args: Option<Vec<FileCondition>>,
    #[serde(rename = "comment")]
    _comment: Option<IgnoredAny>,
    includes: Option<FileFilter>,
    excludes: Option<FileFilter>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileCondition {
    #[serde(default, deserialize_with = "foreign::or_default")]
    index: u64,
    #[serde(default, deserialize_with = "foreign::or_default")]
    value: u64,
    #[serde(default, deserialize_with = "foreign::or_default")]
    value_two: u64,
    op: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileFilter {
    caps: Option<Vec<String>>,
    arches: Option<Vec<String>>,
    min_kernel: Option<String>,
}

/// The profile that `content` is; `path` is only kept.
pub(super) fn parse(path: &Path, content: &[u8]) -> Result<SeccompProfile, SeccompProfileError> {
    let file: FileProfile = serde_json::from_slice(content)?;
    if file.listener_path.is_some_and(|path| !path.is_empty())
        || file.listener_metadata.is_some_and(|text| !text.is_empty())
    {
        let reason = "a process of the node cannot be asked from a box; remove it";
        return Err(SeccompProfileError::Unsupported { field: "listenerPath".to_owned(), reason });
    }
    for (index, flag) in file.flags.iter().flatten().enumerate() {
        check_flag(flag, index)?;
    }
    for (index, name) in file.architectures.iter().flatten().enumerate() {
        if !ARCHITECTURES.contains(&name.as_str()) {
            return Err(word(
                format!("architectures[{index}]"),
                name,
                "an architecture of the OCI specification",
            ));
        }
    }
    let errno = file.default_errno_ret;
    let default_action = action(&file.default_action, errno, "defaultAction", "defaultErrnoRet")?;
    let mut unknown = Vec::new();
    let mut rules = Vec::new();
    let mut weight = 0;
    for (index, rule) in file.syscalls.unwrap_or_default().into_iter().enumerate() {
        let before = rules.len();
        convert(rule, &format!("syscalls[{index}]"), &mut rules, &mut unknown)?;
        // A rule like the default says nothing; to the runtimes that profiles are written for it does not exist.
        if rules.last().is_some_and(|rule: &SeccompRule| rule.action == default_action) {
            rules.truncate(before);
        }
        weight += rules[before..].iter().map(weight_of).sum::<usize>();
        if weight > MAX_RULES {
            let reason = "there are more rules than fit into a filter; merge some";
            return Err(SeccompProfileError::Unsupported { field: "syscalls".to_owned(), reason });
        }
    }
    if !unknown.is_empty() {
        tracing::debug!(path = %path.display(), calls = unknown.join(" "), "calls that boxes do not have are ignored");
    }
    Ok(SeccompProfile { path: path.to_owned(), default_action, rules })
}

fn weight_of(rule: &SeccompRule) -> usize {
    if rule.conditions.is_empty() { 1 } else { rule.calls.len() }
}

/// Flags that change nothing for a process of one thread in a kernel of its own, and those that would.
fn check_flag(flag: &str, index: usize) -> Result<(), SeccompProfileError> {
    let field = format!("flags[{index}]");
    match flag {
        "SECCOMP_FILTER_FLAG_TSYNC" | "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(()),
        "SECCOMP_FILTER_FLAG_LOG" | "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => {
            let reason = "the kernel of a box has neither an audit log nor listeners; remove the flag";
            Err(SeccompProfileError::Unsupported { field, reason })
        }
        other => Err(word(field, other, "a flag of the OCI specification")),
    }
}

/// Appends what a rule of the file says, if it is for this kernel at all. Two conditions on one argument are
/// alternatives, as in the runtimes that profiles are written for.
fn convert(
    rule: FileRule,
    field: &str,
    rules: &mut Vec<SeccompRule>,
    unknown: &mut Vec<String>,
) -> Result<(), SeccompProfileError> {
    let action =
        action(&rule.action, rule.errno_ret, &format!("{field}.action"), &format!("{field}.errnoRet"))?;
    let includes = filter(rule.includes, &format!("{field}.includes"))?;
    let excludes = filter(rule.excludes, &format!("{field}.excludes"))?;
    let args = rule.args.unwrap_or_default();
    if args.len() > MAX_CONDITIONS {
        let field = format!("{field}.args");
        return Err(SeccompProfileError::Number {
            field,
            value: args.len() as u64,
            limit: MAX_CONDITIONS as u64,
        });
    }
    let conditions = args
        .iter()
        .enumerate()
        .map(|(index, given)| condition(given, &format!("{field}.args[{index}]")))
        .collect::<Result<Vec<_>, _>>()?;
    let names: Vec<String> = rule.name.into_iter().chain(rule.names.unwrap_or_default()).collect();
    if names.is_empty() {
        return Err(word(format!("{field}.names"), "", "a list of system calls"));
    }
    let mut calls = Vec::new();
    for name in names {
        match names::number(&name) {
            Some(number) => calls.push(number),
            None => unknown.push(name.chars().take(40).collect()),
        }
    }
    calls.sort_unstable();
    calls.dedup();
    let applies = includes.includes() && !excludes.excludes();
    if calls.is_empty() || !applies {
        return Ok(());
    }
    let repeated = conditions
        .iter()
        .enumerate()
        .any(|(index, one)| conditions[..index].iter().any(|earlier| earlier.argument == one.argument));
    let alternatives: Vec<Vec<SeccompCondition>> =
        if repeated { conditions.into_iter().map(|one| vec![one]).collect() } else { vec![conditions] };
    rules.extend(alternatives.into_iter().map(|conditions| SeccompRule {
        calls: calls.clone(),
        action,
        conditions,
        with_capabilities: includes.capabilities.clone(),
        without_capabilities: excludes.capabilities.clone(),
    }));
    Ok(())
}

fn action(
    name: &str,
    errno: Option<u32>,
    field: &str,
    number: &str,
) -> Result<SeccompAction, SeccompProfileError> {
    // The number of the other actions has no meaning and is ignored, as by everybody.
    let data = |limit: u32| {
        let value = errno.unwrap_or(u32::from(EPERM));
        match u16::try_from(value) {
            Ok(small) if value <= limit => Ok(small),
            Ok(_) | Err(_) => Err(SeccompProfileError::Number {
                field: number.to_owned(),
                value: value.into(),
                limit: limit.into(),
            }),
        }
    };
    Ok(match name {
        "SCMP_ACT_ALLOW" => SeccompAction::Allow,
        "SCMP_ACT_LOG" => SeccompAction::Log,
        "SCMP_ACT_ERRNO" => SeccompAction::Fail(data(MAX_ERRNO)?),
        "SCMP_ACT_TRACE" => SeccompAction::Trace(data(u32::from(u16::MAX))?),
        "SCMP_ACT_TRAP" => SeccompAction::Trap,
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => SeccompAction::KillThread,
        "SCMP_ACT_KILL_PROCESS" => SeccompAction::KillProcess,
        "SCMP_ACT_NOTIFY" => {
            let reason = "SCMP_ACT_NOTIFY asks a process of the node, which cannot be reached from a box; \
                          use SCMP_ACT_ERRNO or SCMP_ACT_TRACE";
            return Err(SeccompProfileError::Unsupported { field: field.to_owned(), reason });
        }
        other => {
            return Err(word(field.to_owned(), other, "an action of the OCI specification (SCMP_ACT_…)"));
        }
    })
}

fn condition(given: &FileCondition, field: &str) -> Result<SeccompCondition, SeccompProfileError> {
    let argument = u8::try_from(given.index).ok().filter(|index| *index < 6).ok_or_else(|| {
        SeccompProfileError::Number { field: format!("{field}.index"), value: given.index, limit: 5 }
    })?;
    let (comparison, mask, value) = match given.op.as_str() {
        "SCMP_CMP_EQ" => (SeccompComparison::Equal, u64::MAX, given.value),
        "SCMP_CMP_NE" => (SeccompComparison::NotEqual, u64::MAX, given.value),
        "SCMP_CMP_GT" => (SeccompComparison::Greater, u64::MAX, given.value),
        "SCMP_CMP_GE" => (SeccompComparison::GreaterOrEqual, u64::MAX, given.value),
        "SCMP_CMP_LT" => (SeccompComparison::Less, u64::MAX, given.value),
        "SCMP_CMP_LE" => (SeccompComparison::LessOrEqual, u64::MAX, given.value),
        "SCMP_CMP_MASKED_EQ" => (SeccompComparison::Equal, given.value, given.value_two),
        other => return Err(word(format!("{field}.op"), other, "a comparison (SCMP_CMP_…)")),
    };
    Ok(SeccompCondition { argument, mask, comparison, value })
}

/// For which machines a rule is, with what only the process decides.
struct Filter {
    capabilities: Vec<String>,
    /// Whether this architecture is listed, if any is.
    architecture: Option<bool>,
    /// Whether the guest's kernel is at least the named one, if any is.
    kernel: Option<bool>,
}

impl Filter {
    fn includes(&self) -> bool {
        self.architecture.unwrap_or(true) && self.kernel.unwrap_or(true)
    }

    fn excludes(&self) -> bool {
        self.architecture.unwrap_or(false) || self.kernel.unwrap_or(false)
    }
}

fn filter(given: Option<FileFilter>, field: &str) -> Result<Filter, SeccompProfileError> {
    let given = given.unwrap_or_default();
    let capabilities = given.caps.unwrap_or_default();
    for (index, name) in capabilities.iter().enumerate() {
        if capabilities::bit(name).is_err() {
            return Err(word(format!("{field}.caps[{index}]"), name, "a capability"));
        }
    }
    let architecture =
        given.arches.filter(|list| !list.is_empty()).map(|list| list.iter().any(|a| a == "amd64"));
    let kernel = given
        .min_kernel
        .filter(|text| !text.is_empty())
        .map(|text| {
            version(&text)
                .ok_or_else(|| word(format!("{field}.minKernel"), &text, "a kernel version like 4.8"))
        })
        .transpose()?
        .map(|least| GUEST_KERNEL >= least);
    Ok(Filter { capabilities, architecture, kernel })
}

fn version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn word(field: String, value: &str, expected: &'static str) -> SeccompProfileError {
    SeccompProfileError::Word { field, value: value.chars().take(80).collect(), expected }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::seccomp::compile_profile;
    use crate::seccomp::program::tests::call;

    fn parsed(text: &str) -> Result<SeccompProfile, SeccompProfileError> {
        parse(Path::new("/p.json"), text.as_bytes())
    }

    fn verdict(text: &str, name: &str, arguments: [u64; 6]) -> SeccompAction {
        verdict_with(0, text, name, arguments)
    }

    fn verdict_with(capabilities: u64, text: &str, name: &str, arguments: [u64; 6]) -> SeccompAction {
        let program = compile_profile(&parsed(text).unwrap(), capabilities).unwrap();
        call(&program, names::number(name).unwrap(), arguments)
    }

    #[test]
    fn every_action_is_what_its_name_says() {
        for (action, expected) in [
            (r#""SCMP_ACT_ALLOW""#, SeccompAction::Allow),
            (r#""SCMP_ACT_LOG""#, SeccompAction::Log),
            (r#""SCMP_ACT_ERRNO""#, SeccompAction::Fail(1)),
            (r#""SCMP_ACT_ERRNO","errnoRet":38"#, SeccompAction::Fail(38)),
            (r#""SCMP_ACT_TRACE","errnoRet":65535"#, SeccompAction::Trace(65535)),
            (r#""SCMP_ACT_TRAP""#, SeccompAction::Trap),
            (r#""SCMP_ACT_KILL""#, SeccompAction::KillThread),
            (r#""SCMP_ACT_KILL_THREAD""#, SeccompAction::KillThread),
            (r#""SCMP_ACT_KILL_PROCESS","errnoRet":99999"#, SeccompAction::KillProcess),
        ] {
            let text = format!(
                r#"{{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":13,
                    "syscalls":[{{"names":["chmod","no_such_call","_llseek"],"action":{action}}}]}}"#
            );
            assert_eq!(verdict(&text, "chmod", [0; 6]), expected, "{action}");
            assert_eq!(verdict(&text, "chown", [0; 6]), SeccompAction::Fail(13));
        }
    }

    #[test]
    fn a_rule_without_conditions_wins_over_those_with_and_one_like_the_default_is_none() {
        let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"names":["kill"],"action":"SCMP_ACT_TRAP","args":[{"index":1,"value":9,"op":"SCMP_CMP_EQ"}]},
            {"names":["kill"],"action":"SCMP_ACT_ALLOW"},
            {"names":["tkill"],"action":"SCMP_ACT_TRAP","args":[{"index":1,"value":9,"op":"SCMP_CMP_EQ"}]},
            {"names":["tkill"],"action":"SCMP_ACT_ERRNO"}]}"#;
        assert_eq!(verdict(text, "kill", [0, 9, 0, 0, 0, 0]), SeccompAction::Trap);
        assert_eq!(verdict(text, "kill", [0; 6]), SeccompAction::Allow);
        assert_eq!(verdict(text, "tkill", [0, 9, 0, 0, 0, 0]), SeccompAction::Fail(1));
    }

    #[test]
    fn conditions_of_a_rule_all_hold_and_those_on_one_argument_are_alternatives() {
        let masked = r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"name":"clone","action":"SCMP_ACT_ALLOW","args":[
            {"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"},
            {"index":2,"value":4294967296,"op":"SCMP_CMP_GE"}]}]}"#;
        assert_eq!(verdict(masked, "clone", [0x11, 0, 1 << 32, 0, 0, 0]), SeccompAction::Allow);
        assert_eq!(verdict(masked, "clone", [0x11, 0, 0xffff_ffff, 0, 0, 0]), SeccompAction::Fail(1));
        assert_eq!(verdict(masked, "clone", [0x1000_0011, 0, 1 << 32, 0, 0, 0]), SeccompAction::Fail(1));
        let either = r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"name":"personality","action":"SCMP_ACT_ALLOW",
            "args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]}]}"#;
        for (value, expected) in
            [(0, SeccompAction::Allow), (8, SeccompAction::Allow), (4, SeccompAction::Fail(1))]
        {
            assert_eq!(verdict(either, "personality", [value, 0, 0, 0, 0, 0]), expected);
        }
    }

    #[test]
    fn rules_are_for_capabilities_kernels_and_architectures() {
        let rule = |conditions: &str| {
            format!(
                r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
                    {{"names":["mount"],"action":"SCMP_ACT_ALLOW","comment":"x",{conditions}}}]}}"#
            )
        };
        let admin = capabilities::bit("SYS_ADMIN").unwrap();
        let (yes, no) = (SeccompAction::Allow, SeccompAction::Fail(1));
        for (conditions, without, with) in [
            (r#""includes":{"caps":["CAP_SYS_ADMIN"]}"#, no, yes),
            (r#""excludes":{"caps":["CAP_SYS_ADMIN"]}"#, yes, no),
            (r#""includes":{"caps":["CAP_SYS_ADMIN","CAP_BPF"]}"#, no, no),
            (r#""includes":{"minKernel":"4.8"}"#, yes, yes),
            (r#""includes":{"minKernel":"99.0"}"#, no, no),
            (r#""excludes":{"minKernel":"4.8"}"#, no, no),
            (r#""includes":{"arches":["ppc64le"]}"#, no, no),
            (r#""includes":{"arches":["amd64","x32"]}"#, yes, yes),
            (r#""excludes":{"arches":["s390","s390x"]}"#, yes, yes),
            (r#""includes":{},"excludes":{}"#, yes, yes),
        ] {
            assert_eq!(verdict_with(0, &rule(conditions), "mount", [0; 6]), without, "{conditions}");
            assert_eq!(verdict_with(admin, &rule(conditions), "mount", [0; 6]), with, "{conditions}");
        }
    }

    #[test]
    fn what_is_newer_than_our_list_is_unknown_where_the_default_is_an_error() {
        let of = |text: &str| call(&compile_profile(&parsed(text).unwrap(), 0).unwrap(), 600, [0; 6]);
        assert_eq!(of(r#"{"defaultAction":"SCMP_ACT_ERRNO"}"#), SeccompAction::Fail(38));
        assert_eq!(of(r#"{"defaultAction":"SCMP_ACT_KILL"}"#), SeccompAction::KillThread);
        assert_eq!(of(r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#), SeccompAction::Allow);
    }

    #[test]
    fn broken_profiles_name_the_key() {
        let rule = |rest: &str| format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{rest}]}}"#);
        let arg = |rest: &str| {
            rule(&format!(r#"{{"names":["read"],"action":"SCMP_ACT_ERRNO","args":[{{{rest}}}]}}"#))
        };
        for (text, word) in [
            ("", "EOF"),
            ("[]", "invalid"),
            ("{}", "defaultAction"),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","sycalls":[]}"#, "sycalls"),
            (r#"{"defaultAction":"ALLOW"}"#, "defaultAction: \"ALLOW\""),
            (
                r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":4096}"#,
                "defaultErrnoRet: 4096 is above 4095",
            ),
            (r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":-1}"#, "-1"),
            (r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#, "SCMP_ACT_NOTIFY"),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["x86"]}"#, "architectures[0]"),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_LOG"]}"#, "flags[0]"),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#, "listenerPath"),
            (&rule(r#"{"names":[],"action":"SCMP_ACT_ERRNO"}"#), "syscalls[0].names"),
            (&rule(r#"{"names":["read"],"action":"X"}"#), "syscalls[0].action"),
            (
                &rule(r#"{"names":["read"],"action":"SCMP_ACT_ERRNO","includes":{"caps":["X"]}}"#),
                "includes.caps[0]",
            ),
            (
                &rule(r#"{"names":["read"],"action":"SCMP_ACT_ERRNO","includes":{"minKernel":"x"}}"#),
                "minKernel",
            ),
            (&arg(r#""index":6,"value":1,"op":"SCMP_CMP_EQ""#), "syscalls[0].args[0].index: 6 is above 5"),
            (&arg(r#""index":0,"value":1,"op":"==""#), "syscalls[0].args[0].op"),
            (&arg(r#""index":0,"value":-1,"op":"SCMP_CMP_EQ""#), "-1"),
        ] {
            let error = parsed(text).expect_err(text).to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn a_profile_that_fits_into_no_program_is_refused() {
        let rule = |value: usize| {
            format!(
                r#"{{"names":["read"],"action":"SCMP_ACT_TRAP","args":[{{"index":0,"value":{value},"op":"SCMP_CMP_EQ"}}]}}"#
            )
        };
        let text = |count: usize| {
            let rules: Vec<String> = (0..count).map(rule).collect();
            format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{}]}}"#, rules.join(","))
        };
        assert!(compile_profile(&parsed(&text(500)).unwrap(), 0).is_ok());
        let error = compile_profile(&parsed(&text(1000)).unwrap(), 0).unwrap_err();
        assert!(error.to_string().contains("4096"), "{error}");
        assert!(parsed(&text(5000)).unwrap_err().to_string().contains("syscalls"));
    }

    #[test]
    fn only_regular_files_of_a_sane_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("good"), r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap();
        symlink("good", at("link")).unwrap();
        assert_eq!(read(&at("link")).unwrap().default_action, SeccompAction::Allow);
        rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), rustix::fs::Mode::RUSR).unwrap();
        std::fs::write(at("large"), vec![b' '; MAX_FILE as usize + 1]).unwrap();
        assert!(matches!(read(&at("pipe")), Err(SeccompFileError::NotAFile(_))));
        assert!(matches!(read(dir.path()), Err(SeccompFileError::NotAFile(_))));
        assert!(matches!(read(&at("large")), Err(SeccompFileError::TooLarge(_))));
        assert!(matches!(read(&at("missing")), Err(SeccompFileError::Read { .. })));
        assert!(matches!(read(Path::new("good")), Err(SeccompFileError::Relative(_))));
        std::fs::write(at("broken"), "{").unwrap();
        let error = read(&at("broken")).unwrap_err().to_string();
        assert!(error.contains("broken") && error.contains("line 1"), "{error}");
    }
}
