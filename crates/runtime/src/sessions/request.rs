//! From a session's spec to the message for the agent.

use std::ffi::OsStr;
use std::path::PathBuf;

use a3s_box_core::SessionId;
use a3s_box_core::image::Layer;
use a3s_box_core::spec::{
    BoxSize, CapabilitySpec, DnsSpec, MountSource, MountSpec, PidNamespace, ProcessSpec, SeccompSpec,
    SessionSpec, UserSpec,
};
use a3s_box_policy::capabilities::{self, CapabilitySets, UnknownCapability};
use a3s_box_policy::seccomp::{self, FilterTooLong};
use a3s_box_protocol::proto;
use thiserror::Error;

use crate::limits;
use crate::records::{BoxRecord, SessionRecord};
use crate::sources::Placed;

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A window until somebody says otherwise.
const ROWS: u32 = 24;
const COLUMNS: u32 = 80;

/// Open files: programs that use select() break beyond 1,024, so that is what they start with; those that
/// know better may raise it.
const NOFILE: (u64, u64) = (1024, 524_288);

/// Enough for `chain-` and the 128 digits of a SHA-512.
const LAYER_NAME_MAX: usize = 140;

/// What of the box a session's message needs.
#[derive(Debug, Clone, Default)]
pub(crate) struct BoxFacts {
    pub(crate) hostname: String,
    pub(crate) ips: Vec<std::net::IpAddr>,
    pub(crate) dns: Option<DnsSpec>,
    pub(crate) size: BoxSize,
}

impl BoxFacts {
    pub(crate) fn of(record: &BoxRecord) -> Self {
        Self {
            hostname: record.hostname().to_owned(),
            ips: record.ips(),
            dns: record.dns().cloned(),
            size: record.spec.size,
        }
    }
}

/// A request that cannot be made of a session's spec.
#[derive(Debug, Error)]
pub(crate) enum RequestError {
    #[error(transparent)]
    Capability(#[from] UnknownCapability),
    #[error(transparent)]
    Layer(#[from] UnknownLayer),
    #[error(transparent)]
    Seccomp(#[from] FilterTooLong),
    #[error("mount {index}: the host path {} was not attached", path.display())]
    NotAttached { index: usize, path: PathBuf },
}

/// A layer's file that is not named as the image store names its files.
#[derive(Debug, Error)]
#[error("the layer file {} is not named as the image store names files: pull the image again", .0.display())]
pub(crate) struct UnknownLayer(PathBuf);

/// The name of a layer's file below `images/`: that of the image store. A diff id would not do, because one
/// that is right only above certain lower layers has several files.
pub(crate) fn layer_name(layer: &Layer) -> Result<String, UnknownLayer> {
    let plain = |stem: &&str| {
        (1..=LAYER_NAME_MAX).contains(&stem.len())
            && stem.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    };
    let stem = layer.erofs.file_stem().and_then(OsStr::to_str).filter(plain);
    stem.map(|stem| format!("{stem}.erofs")).ok_or_else(|| UnknownLayer(layer.erofs.clone()))
}

/// The name below `pod/` of a source that is attached for the `index`-th mount of a session. No other one of the box ever
/// has it, whatever the guest remembers of names.
pub(crate) fn volume_name(session: &SessionId, index: usize) -> String {
    format!("{}-{index}", session.short())
}

/// The message that makes a session.
pub(crate) fn create(
    record: &SessionRecord,
    facts: &BoxFacts,
) -> Result<proto::CreateSessionRequest, RequestError> {
    let spec = &record.spec;
    let (pid_mode, target_session_id) = match &spec.pid_namespace {
        PidNamespace::Session => (proto::PidMode::Session, String::new()),
        PidNamespace::Pod => (proto::PidMode::Pod, String::new()),
        PidNamespace::Target(id) => (proto::PidMode::Target, id.to_string()),
    };
    Ok(proto::CreateSessionRequest {
        session_id: record.id.to_string(),
        rootfs: Some(proto::Rootfs {
            layers: record.image.layers.iter().map(layer_name).collect::<Result<_, _>>()?,
            readonly: spec.readonly_rootfs,
        }),
        // Where its volumes are is known when they are attached.
        mounts: Vec::new(),
        process: Some(process(&spec.process, spec.privileged, facts)?),
        pid_mode: pid_mode.into(),
        target_session_id,
        resources: Some(proto::Resources { settings: limits::settings(&spec.limits) }),
        masked_paths: if spec.privileged { Vec::new() } else { spec.masked_paths.clone() },
        readonly_paths: if spec.privileged { Vec::new() } else { spec.readonly_paths.clone() },
        privileged: spec.privileged,
        stdin: spec.stdin,
        etc_files: etc_files(facts),
        image_volumes: spec.image_volumes.clone(),
    })
}

/// The message that executes a further process.
pub(crate) fn exec(
    record: &SessionSpec,
    session_id: &SessionId,
    exec_id: &str,
    asked: &ProcessSpec,
    stdin: bool,
    facts: &BoxFacts,
) -> Result<proto::ExecRequest, RequestError> {
    Ok(proto::ExecRequest {
        session_id: session_id.to_string(),
        exec_id: exec_id.to_owned(),
        process: Some(process(&inherit(&record.process, asked), record.privileged, facts)?),
        stdin,
    })
}

/// What an executed process does not say for itself is the session's. The filter is always the session's: an
/// executed process must not get around it.
fn inherit(own: &ProcessSpec, asked: &ProcessSpec) -> ProcessSpec {
    ProcessSpec {
        args: asked.args.clone(),
        env: own.env.iter().chain(&asked.env).cloned().collect(),
        cwd: if asked.cwd.is_empty() { own.cwd.clone() } else { asked.cwd.clone() },
        terminal: asked.terminal,
        user: if asked.user == UserSpec::default() { own.user.clone() } else { asked.user.clone() },
        capabilities: if asked.capabilities == CapabilitySpec::default() {
            own.capabilities.clone()
        } else {
            asked.capabilities.clone()
        },
        no_new_privileges: own.no_new_privileges || asked.no_new_privileges,
        seccomp: own.seccomp.clone(),
        oom_score_adj: asked.oom_score_adj.or(own.oom_score_adj),
        rlimits: own.rlimits.iter().chain(&asked.rlimits).cloned().collect(),
    }
}

fn on_the_wire(sets: CapabilitySets) -> proto::Capabilities {
    let CapabilitySets { bounding, effective, permitted, inheritable, ambient } = sets;
    proto::Capabilities { bounding, effective, permitted, inheritable, ambient }
}

fn process(spec: &ProcessSpec, privileged: bool, facts: &BoxFacts) -> Result<proto::Process, RequestError> {
    let capabilities = capabilities::sets(&spec.capabilities, privileged)?;
    let filter = if privileged { &SeccompSpec::Unconfined } else { &spec.seccomp };
    Ok(proto::Process {
        args: spec.args.clone(),
        env: environment(spec, facts),
        cwd: if spec.cwd.is_empty() { "/".to_owned() } else { spec.cwd.clone() },
        terminal: spec.terminal,
        rows: ROWS,
        columns: COLUMNS,
        user: Some(proto::User {
            user: spec.user.user.clone(),
            group: spec.user.group,
            supplemental_groups: spec.user.supplemental_groups.clone(),
            strict_groups: spec.user.strict_groups,
        }),
        seccomp_bpf: seccomp::program(filter, capabilities.bounding)?,
        capabilities: Some(on_the_wire(capabilities)),
        no_new_privileges: spec.no_new_privileges,
        rlimits: rlimits(spec),
        oom_score_adj: spec.oom_score_adj,
    })
}

/// The runtime's limit of descriptors, and what was asked for: of equal names the later one counts.
fn rlimits(spec: &ProcessSpec) -> Vec<proto::Rlimit> {
    let usual = proto::Rlimit { name: "RLIMIT_NOFILE".to_owned(), soft: NOFILE.0, hard: NOFILE.1 };
    let asked = spec.rlimits.iter().map(|limit| proto::Rlimit {
        name: limit.name.clone(),
        soft: limit.soft,
        hard: limit.hard,
    });
    std::iter::once(usual).chain(asked).collect()
}

/// The given environment after what container users expect to be there; later entries win.
fn environment(spec: &ProcessSpec, facts: &BoxFacts) -> Vec<String> {
    let mut env = vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={}", facts.hostname)];
    if spec.terminal {
        env.push("TERM=xterm".to_owned());
    }
    let given = |entry: &String| {
        let name = entry.split('=').next().unwrap_or("");
        spec.env.iter().any(|other| other.split('=').next() == Some(name))
    };
    env.retain(|entry| !given(entry));
    env.extend(spec.env.iter().cloned());
    env
}

/// The mounts of a session whose volumes are `placed`.
pub(crate) fn mounts(specs: &[MountSpec], placed: &[Placed]) -> Result<Vec<proto::Mount>, RequestError> {
    let find = |index| placed.iter().find(|placed| placed.index == index);
    specs.iter().enumerate().map(|(index, spec)| mount(index, spec, find(index))).collect()
}

fn mount(index: usize, spec: &MountSpec, placed: Option<&Placed>) -> Result<proto::Mount, RequestError> {
    use proto::mount::Source;
    let (source, readonly) = match (&spec.source, placed) {
        (MountSource::Host { .. }, Some(placed)) => (volume(placed), placed.readonly),
        (MountSource::Host { path, .. }, None) => {
            return Err(RequestError::NotAttached { index, path: path.clone() });
        }
        (MountSource::Tmpfs { size }, _) => (Source::TmpfsBytes(*size), spec.readonly),
        (MountSource::Image { layers, sub_path, .. }, _) => {
            let layers = layers.iter().map(layer_name).collect::<Result<_, _>>()?;
            (Source::Image(proto::ImageVolume { layers, sub_path: sub_path.clone() }), spec.readonly)
        }
    };
    Ok(proto::Mount {
        target: spec.target.clone(),
        source: Some(source),
        readonly,
        options: spec.options.clone(),
    })
}

/// A whole is said as agents of every number understand it; a part is only ever asked of those that know parts.
fn volume(placed: &Placed) -> proto::mount::Source {
    let Placed { name, sub_path, .. } = placed.clone();
    match sub_path.is_empty() {
        true => proto::mount::Source::PodVolume(name),
        false => proto::mount::Source::PodVolumePart(proto::PodVolumePart { name, sub_path }),
    }
}

/// What a container finds below /etc unless a mount of the client's takes its place.
fn etc_files(facts: &BoxFacts) -> Vec<proto::EtcFile> {
    let mut files = vec![
        etc_file("/etc/hostname", format!("{}\n", facts.hostname)),
        etc_file("/etc/hosts", hosts(facts)),
    ];
    if let Some(dns) = &facts.dns {
        files.push(etc_file("/etc/resolv.conf", resolv_conf(dns)));
    }
    files
}

fn etc_file(path: &str, content: String) -> proto::EtcFile {
    proto::EtcFile { path: path.to_owned(), content: content.into_bytes() }
}

fn hosts(facts: &BoxFacts) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    for ip in &facts.ips {
        text.push_str(&format!("{ip}\t{}\n", facts.hostname));
    }
    text
}

/// resolv.conf(5). Line breaks inside a word would smuggle in further lines.
fn resolv_conf(dns: &DnsSpec) -> String {
    let plain = |word: &String| word.chars().filter(|c| !c.is_control()).collect::<String>();
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.iter().map(plain).collect::<Vec<_>>().join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {}\n", plain(server)));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.iter().map(plain).collect::<Vec<_>>().join(" ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> BoxFacts {
        let dns = DnsSpec {
            servers: vec!["10.0.0.10".to_owned()],
            searches: vec!["svc.local".to_owned(), "local\nnameserver 6.6.6.6".to_owned()],
            options: vec!["ndots:5".to_owned()],
        };
        BoxFacts {
            hostname: "web".to_owned(),
            ips: vec!["10.1.2.3".parse().unwrap()],
            dns: Some(dns),
            size: BoxSize::default(),
        }
    }

    #[test]
    fn the_resolver_file_has_one_line_per_field_whatever_the_words_contain() {
        assert_eq!(
            resolv_conf(&facts().dns.unwrap()),
            "search svc.local localnameserver 6.6.6.6\nnameserver 10.0.0.10\noptions ndots:5\n"
        );
    }

    #[test]
    fn the_given_environment_wins_over_the_expected_one() {
        let env = ["PATH=/bin".to_owned(), "A=1".to_owned(), "A=2".to_owned()];
        let spec = ProcessSpec { env: env.to_vec(), terminal: true, ..ProcessSpec::default() };
        assert_eq!(environment(&spec, &facts()), ["HOSTNAME=web", "TERM=xterm", "PATH=/bin", "A=1", "A=2"]);
    }

    #[test]
    fn an_executed_process_inherits_what_it_does_not_say() {
        let own = ProcessSpec {
            args: vec!["server".to_owned()],
            env: vec!["A=1".to_owned()],
            cwd: "/srv".to_owned(),
            user: UserSpec { user: "1000".to_owned(), ..UserSpec::default() },
            no_new_privileges: true,
            ..ProcessSpec::default()
        };
        let asked = ProcessSpec {
            args: vec!["ls".to_owned()],
            seccomp: SeccompSpec::Unconfined,
            ..ProcessSpec::default()
        };
        let merged = inherit(&own, &asked);
        assert_eq!(
            (merged.args[0].as_str(), merged.cwd.as_str(), merged.user.user.as_str()),
            ("ls", "/srv", "1000")
        );
        assert!(merged.no_new_privileges);
        assert_eq!(merged.seccomp, SeccompSpec::RuntimeDefault, "the session's filter cannot be shaken off");
    }

    #[test]
    fn a_whole_is_said_as_every_agent_knows_it_and_what_was_not_attached_is_not_said() {
        use proto::mount::Source;
        let source = MountSource::Host {
            path: "/srv".into(),
            propagate: false,
            recursive_readonly: false,
            id_mapped: None,
        };
        let spec = MountSpec { source, target: "/srv".to_owned(), readonly: true, options: Vec::new() };
        let placed = |sub_path: &str| Placed {
            index: 0,
            name: "v".to_owned(),
            sub_path: sub_path.to_owned(),
            readonly: false,
        };
        let said =
            |placed: Placed| mounts(std::slice::from_ref(&spec), &[placed]).map(|mut said| said.remove(0));
        let whole = said(placed("")).unwrap();
        assert_eq!((whole.source, whole.readonly), (Some(Source::PodVolume("v".to_owned())), false));
        let part = proto::PodVolumePart { name: "v".to_owned(), sub_path: "a/b".to_owned() };
        assert_eq!(said(placed("a/b")).unwrap().source, Some(Source::PodVolumePart(part)));
        let missing = said(Placed { index: 1, ..placed("") }).unwrap_err();
        assert!(matches!(missing, RequestError::NotAttached { index: 0, .. }), "{missing}");
    }

    /// They were named by their diff id, so one box could get another image's layer.
    #[test]
    fn two_files_of_one_diff_id_have_two_names() {
        let name =
            |erofs: &str| layer_name(&Layer { diff_id: "sha256:00ff".to_owned(), erofs: erofs.into() }).ok();
        assert_eq!(name("/images/erofs/00ff.erofs").as_deref(), Some("00ff.erofs"));
        assert_eq!(name("/images/erofs/chain-0a.erofs").as_deref(), Some("chain-0a.erofs"));
        let long = format!("/images/{}.erofs", "a".repeat(141));
        for bad in ["/", "/images/..", "/images/.erofs", "/images/a b.erofs", "/images/A.erofs", &long] {
            assert_eq!(name(bad), None, "{bad}");
        }
    }
}
