//! From a session's spec to the message for the agent.

use a3s_box_core::SessionId;
use a3s_box_core::image::Layer;
use a3s_box_core::spec::{
    CapabilitySpec, DnsSpec, MountSource, MountSpec, PidNamespace, ProcessSpec, SeccompSpec, SessionSpec,
    UserSpec,
};
use a3s_box_protocol::proto;

use crate::policy::capabilities::{self, UnknownCapability};
use crate::policy::{limits, seccomp};
use crate::records::{BoxRecord, SessionRecord};

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A window until somebody says otherwise.
const ROWS: u32 = 24;
const COLUMNS: u32 = 80;

/// Open files: programs that use select() break beyond 1,024, so that is what they start with; those that
/// know better may raise it.
const NOFILE: (u64, u64) = (1024, 524_288);

/// What of the box a session's message needs.
#[derive(Debug, Clone, Default)]
pub(crate) struct BoxFacts {
    pub(crate) hostname: String,
    pub(crate) ips: Vec<std::net::IpAddr>,
    pub(crate) dns: Option<DnsSpec>,
}

impl BoxFacts {
    pub(crate) fn of(record: &BoxRecord) -> Self {
        Self { hostname: record.hostname().to_owned(), ips: record.ips(), dns: record.spec.dns.clone() }
    }
}

/// The name of a layer's file below `images/`: the hex digits of its diff id.
pub(crate) fn layer_name(layer: &Layer) -> String {
    let digits: String =
        layer.diff_id.rsplit(':').next().unwrap_or("").chars().filter(char::is_ascii_hexdigit).collect();
    format!("{digits}.erofs")
}

/// The name of the `index`-th mount's volume below `pod/`.
pub(crate) fn volume_name(session: &SessionId, index: usize) -> String {
    format!("{}-{index}", session.short())
}

/// The message that makes a session.
pub(crate) fn create(
    record: &SessionRecord,
    facts: &BoxFacts,
) -> Result<proto::CreateSessionRequest, UnknownCapability> {
    let spec = &record.spec;
    let (pid_mode, target_session_id) = match &spec.pid_namespace {
        PidNamespace::Session => (proto::PidMode::Session, String::new()),
        PidNamespace::Pod => (proto::PidMode::Pod, String::new()),
        PidNamespace::Target(id) => (proto::PidMode::Target, id.to_string()),
    };
    Ok(proto::CreateSessionRequest {
        session_id: record.id.to_string(),
        rootfs: Some(proto::Rootfs {
            layers: record.image.layers.iter().map(layer_name).collect(),
            readonly: spec.readonly_rootfs,
        }),
        mounts: spec.mounts.iter().enumerate().map(|(index, m)| mount(&record.id, index, m)).collect(),
        process: Some(process(&spec.process, spec.privileged, facts)?),
        pid_mode: pid_mode.into(),
        target_session_id,
        resources: Some(proto::Resources { settings: limits::settings(&spec.limits) }),
        masked_paths: if spec.privileged { Vec::new() } else { spec.masked_paths.clone() },
        readonly_paths: if spec.privileged { Vec::new() } else { spec.readonly_paths.clone() },
        privileged: spec.privileged,
        stdin: spec.stdin,
        etc_files: etc_files(facts),
    })
}

/// The message that executes a further process.
pub(crate) fn exec(
    record: &SessionSpec,
    session_id: &SessionId,
    exec_id: &str,
    asked: &ProcessSpec,
    facts: &BoxFacts,
) -> Result<proto::ExecRequest, UnknownCapability> {
    Ok(proto::ExecRequest {
        session_id: session_id.to_string(),
        exec_id: exec_id.to_owned(),
        process: Some(process(&inherit(&record.process, asked), record.privileged, facts)?),
        stdin: false,
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
    }
}

fn process(
    spec: &ProcessSpec,
    privileged: bool,
    facts: &BoxFacts,
) -> Result<proto::Process, UnknownCapability> {
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
        seccomp_bpf: seccomp::program(filter, capabilities.bounding),
        capabilities: Some(capabilities),
        no_new_privileges: spec.no_new_privileges,
        rlimits: vec![proto::Rlimit { name: "RLIMIT_NOFILE".to_owned(), soft: NOFILE.0, hard: NOFILE.1 }],
        oom_score_adj: spec.oom_score_adj,
    })
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

fn mount(session: &SessionId, index: usize, spec: &MountSpec) -> proto::Mount {
    use proto::mount::Source;
    let source = match &spec.source {
        MountSource::Host { .. } => Source::PodVolume(volume_name(session, index)),
        MountSource::Tmpfs { size } => Source::TmpfsBytes(*size),
    };
    proto::Mount {
        target: spec.target.clone(),
        source: Some(source),
        readonly: spec.readonly,
        options: spec.options.clone(),
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
        BoxFacts { hostname: "web".to_owned(), ips: vec!["10.1.2.3".parse().unwrap()], dns: Some(dns) }
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
    fn a_layers_name_is_made_of_hex_digits_only() {
        let layer = |diff_id: &str| Layer { diff_id: diff_id.to_owned(), erofs: "/x".into() };
        assert_eq!(layer_name(&layer("sha256:00ff")), "00ff.erofs");
        assert_eq!(layer_name(&layer("sha256:../../etc")), "ec.erofs");
    }
}
