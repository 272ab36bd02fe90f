//! What the golden files of records say.
//!
//! The values name every field, so that a field which is added must be given a meaning here too.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use a3s_box_core::egress::EgressPolicy;
use a3s_box_core::image::{ImageConfig, Layer, ResolvedImage};
use a3s_box_core::lifecycle::{BoxPhase, SessionPhase, StopCause};
use a3s_box_core::network::{Address, Interface, PodNetwork, Route};
use a3s_box_core::seccomp::{
    SeccompAction, SeccompComparison, SeccompCondition, SeccompProfile, SeccompRule,
};
use a3s_box_core::spec::{
    BoxSize, BoxSpec, CapabilitySpec, DnsSpec, IdRange, InitUser, Limits, MountSource, MountSpec,
    NetworkMode, PidNamespace, PodIdentity, PortMapping, PortProtocol, ProcessSpec, SeccompSpec, SessionSpec,
    UserNamespace, UserSpec,
};
use a3s_box_core::{BoxId, SessionId};
use a3s_box_vmm::{BackendKind, BoxPlan, MachineFacts, PlanNetwork, PlanNic};

use crate::api::{Quarantined, ResolvedUser, Stage};
use crate::records::{BoxRecord, HostObject, SessionRecord};
use crate::sources::{Access, Source, SourceKey, Sources, Tree};

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

fn box_id() -> BoxId {
    BoxId::from_random([0xb0; 32])
}

fn session_id(byte: u8) -> SessionId {
    SessionId::from_random([byte; 32])
}

fn users() -> UserNamespace {
    UserNamespace {
        uids: IdRange { start: 65536, count: 65536 },
        gids: IdRange { start: 131_072, count: 65_535 },
    }
}

pub(super) fn dns() -> DnsSpec {
    DnsSpec {
        servers: words(&["10.96.0.10", "fd00::10"]),
        searches: words(&["svc.cluster.local"]),
        options: words(&["ndots:5"]),
    }
}

fn port(protocol: PortProtocol, host_ip: &str) -> PortMapping {
    PortMapping { protocol, container_port: 80, host_port: 8080, host_ip: host_ip.to_owned() }
}

/// A spec in which nothing is left out.
fn full_box_spec() -> BoxSpec {
    BoxSpec {
        identity: PodIdentity {
            name: "web".to_owned(),
            namespace: "shop".to_owned(),
            uid: "0b2f9d0e-8f3b-4b6e-9a57-5a1f0f6f8f10".to_owned(),
            attempt: 3,
        },
        hostname: "web-0".to_owned(),
        labels: map(&[("app", "web")]),
        annotations: map(&[("a3s.box/egress", "10.0.0.0/8, *.example.org")]),
        log_directory: Some("/var/log/pods/shop_web_0b2f".into()),
        runtime_handler: "a3s-box".to_owned(),
        cgroup_parent: Some("/kubepods/burstable/pod0b2f".to_owned()),
        size: BoxSize { vcpus: 4, memory_mib: 1536, scratch_mib: 20_480 },
        dns: Some(dns()),
        port_mappings: vec![
            port(PortProtocol::Tcp, ""),
            port(PortProtocol::Udp, "192.0.2.1"),
            port(PortProtocol::Sctp, "2001:db8::1"),
        ],
        sysctls: map(&[("net.core.somaxconn", "1024")]),
        network: NetworkMode::Pod,
        egress: Some(EgressPolicy {
            networks: vec!["10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()],
            names: vec!["*.example.org".parse().unwrap(), "pypi.org".parse().unwrap()],
        }),
        user_namespace: Some(users()),
        init_user: Some(InitUser { uid: 65_535, gid: 65_534 }),
    }
}

fn network() -> PodNetwork {
    let v4 = |last: u8| IpAddr::V4(Ipv4Addr::new(10, 9, 8, last));
    let v6 = |last: u16| IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last));
    PodNetwork {
        netns: "/run/a3s-box/netns/a3s-b0b0".into(),
        interfaces: vec![Interface {
            name: "eth0".to_owned(),
            mac: [2, 0, 0, 0, 0, 9],
            mtu: 1450,
            addresses: vec![Address { ip: v4(7), prefix: 24 }, Address { ip: v6(7), prefix: 64 }],
            routes: vec![
                Route { destination: Address { ip: v4(0), prefix: 16 }, gateway: None },
                Route {
                    destination: Address { ip: Ipv4Addr::UNSPECIFIED.into(), prefix: 0 },
                    gateway: Some(v4(1)),
                },
            ],
            tap: "a3s-tap0".to_owned(),
        }],
        dns: Some(dns()),
    }
}

pub(super) fn box_dir() -> PathBuf {
    PathBuf::from("/run/a3s-box/boxes").join(box_id().as_str())
}

fn ledger() -> Vec<HostObject> {
    vec![
        HostObject::RunDir(box_dir()),
        HostObject::StateDir(PathBuf::from("/var/lib/a3s-box/boxes").join(box_id().as_str())),
        HostObject::CgroupParent("/sys/fs/cgroup/kubepods".into()),
        HostObject::Cgroup("/sys/fs/cgroup/kubepods/burstable/pod0b2f/a3s-box-b0b0".into()),
        HostObject::Network,
        HostObject::Vmm,
    ]
}

fn plan() -> BoxPlan {
    BoxPlan {
        id: box_id(),
        dir: box_dir(),
        vcpus: 4,
        memory_mib: 1536,
        kernel: "/usr/lib/a3s-box/vmlinux".into(),
        initramfs: "/usr/lib/a3s-box/initramfs.cpio".into(),
        cmdline: "a3s.debug".to_owned(),
        scratch: PathBuf::from("/var/lib/a3s-box/boxes").join(box_id().as_str()).join("scratch.img"),
        network: Some(PlanNetwork {
            netns: "/run/a3s-box/netns/a3s-b0b0".into(),
            nics: vec![PlanNic::new(0, "a3s-tap0".to_owned())],
        }),
        cgroups: vec!["/sys/fs/cgroup/kubepods/burstable/pod0b2f/a3s-box-b0b0".into()],
        guest_ports: vec![4088],
    }
}

/// One source of each kind, with holders of each kind.
fn sources() -> Sources {
    let users = UserNamespace {
        uids: IdRange { start: 65_536, count: 65_536 },
        gids: IdRange { start: 131_072, count: 65_536 },
    };
    let shared = SourceKey {
        device: 2049,
        inode: 77,
        readonly_on_host: false,
        users: Some(users),
        tree: Tree::Single,
    };
    let deep = Tree::Several { mount: 31, readonly: true, recursive_readonly: false, propagate: true };
    let deep = SourceKey { device: 22, inode: 2, readonly_on_host: true, users: None, tree: deep };
    let mut sources = Sources::default();
    sources.add(Source::new("s0".to_owned(), shared, "/srv/data".into(), Some("/data".into())));
    sources.add(Source::new("s1".to_owned(), deep, "/mnt".into(), None));
    sources.hold("s0", &session_id(0xc0), Access::Writable);
    sources.hold("s0", &session_id(0xc1), Access::ReadOnly);
    sources.hold("s1", &session_id(0xc1), Access::ReadOnly);
    sources
}

/// A box that is up, with everything that a record can hold.
fn ready_box() -> BoxRecord {
    BoxRecord {
        id: box_id(),
        spec: full_box_spec(),
        created_at_ns: 1_760_000_000_000_000_001,
        phase: BoxPhase::Ready,
        ledger: ledger(),
        dir: box_dir(),
        network: Some(network()),
        plan: Some(plan()),
        machine: Some(MachineFacts { backend: BackendKind::Libkrun, pid: 4321, start_ticks: 987_654_321 }),
        kernel_release: "6.12.0-a3s-box".to_owned(),
        timeline: vec![Stage {
            name: "guest/kernel".to_owned(),
            at: Duration::from_millis(1250),
            took: Duration::from_micros(350),
        }],
        layers: BTreeSet::from(["0a0b.erofs".to_owned(), "chain-0c0d.erofs".to_owned()]),
        sources: sources(),
        agent_protocol: 4,
    }
}

/// A box of another phase, with no more than such a one may lack.
fn bare_box(phase: BoxPhase) -> BoxRecord {
    let spec = BoxSpec {
        identity: PodIdentity { name: "p".to_owned(), ..PodIdentity::default() },
        network: NetworkMode::None,
        ..BoxSpec::default()
    };
    BoxRecord {
        id: box_id(),
        spec,
        created_at_ns: 1,
        phase,
        ledger: Vec::new(),
        dir: box_dir(),
        network: None,
        plan: None,
        machine: None,
        kernel_release: String::new(),
        timeline: Vec::new(),
        layers: BTreeSet::new(),
        sources: Sources::default(),
        agent_protocol: 0,
    }
}

pub(super) fn boxes() -> Vec<(&'static str, BoxRecord)> {
    let detail = || "the guest's kernel panicked: VFS; its last words: x".to_owned();
    let qemu = MachineFacts { backend: BackendKind::Qemu, pid: 7, start_ticks: 8 };
    let reserved = BoxRecord { ledger: ledger(), plan: Some(plan()), ..bare_box(BoxPhase::Reserved) };
    let booting = BoxRecord { machine: Some(qemu), ..bare_box(BoxPhase::Booting) };
    vec![
        ("box-reserved.json", reserved),
        ("box-prepared.json", bare_box(BoxPhase::Prepared)),
        ("box-booting.json", booting),
        ("box-ready.json", ready_box()),
        ("box-stopping.json", bare_box(BoxPhase::Stopping)),
        ("box-stopped-requested.json", bare_box(BoxPhase::Stopped(StopCause::Requested))),
        ("box-stopped-power-off.json", bare_box(BoxPhase::Stopped(StopCause::GuestPowerOff))),
        ("box-stopped-panic.json", bare_box(BoxPhase::Stopped(StopCause::GuestPanic { detail: detail() }))),
        ("box-stopped-vmm-died.json", bare_box(BoxPhase::Stopped(StopCause::VmmDied { detail: detail() }))),
        (
            "box-stopped-agent-lost.json",
            bare_box(BoxPhase::Stopped(StopCause::AgentLost { detail: detail() })),
        ),
    ]
}

fn rule(calls: &[u32], action: SeccompAction, conditions: Vec<SeccompCondition>) -> SeccompRule {
    SeccompRule {
        calls: calls.to_vec(),
        action,
        conditions,
        with_capabilities: words(&["CAP_SYS_ADMIN"]),
        without_capabilities: words(&["CAP_BPF"]),
    }
}

fn profile() -> SeccompProfile {
    let condition =
        |comparison| SeccompCondition { argument: 1, mask: u64::MAX, comparison, value: 0x1_0000_0001 };
    let comparisons = [
        SeccompComparison::Equal,
        SeccompComparison::NotEqual,
        SeccompComparison::Greater,
        SeccompComparison::GreaterOrEqual,
        SeccompComparison::Less,
        SeccompComparison::LessOrEqual,
    ];
    SeccompProfile {
        path: "/var/lib/kubelet/seccomp/web.json".into(),
        default_action: SeccompAction::Fail(1),
        rules: vec![
            rule(&[0, 1, 2], SeccompAction::Allow, comparisons.map(condition).to_vec()),
            rule(&[3], SeccompAction::Log, Vec::new()),
            rule(&[4], SeccompAction::Trace(9), Vec::new()),
            rule(&[5], SeccompAction::Trap, Vec::new()),
            rule(&[6], SeccompAction::KillThread, Vec::new()),
            rule(&[7], SeccompAction::KillProcess, Vec::new()),
        ],
    }
}

fn layer() -> Layer {
    Layer { diff_id: "sha256:0a0b".to_owned(), erofs: "/var/lib/a3s-box/images/erofs/0a0b.erofs".into() }
}

fn mount(target: &str, source: MountSource) -> MountSpec {
    MountSpec { source, target: target.to_owned(), readonly: true, options: words(&["noexec", "nosuid"]) }
}

fn mounts() -> Vec<MountSpec> {
    let host = |id_mapped| MountSource::Host {
        path: "/var/lib/kubelet/pods/0b2f/volumes/data".into(),
        propagate: true,
        recursive_readonly: true,
        id_mapped,
    };
    vec![
        mount("/data", host(Some(users()))),
        mount("/plain", host(None)),
        mount("/tmp", MountSource::Tmpfs { size: 65_536 }),
        mount(
            "/model",
            MountSource::Image {
                reference: "registry.example/model:1".to_owned(),
                id: "sha256:ee".to_owned(),
                layers: vec![layer()],
                sub_path: "weights".to_owned(),
            },
        ),
    ]
}

/// A process in which nothing is left out.
fn process() -> ProcessSpec {
    ProcessSpec {
        args: words(&["/srv/web", "--port", "80"]),
        env: words(&["A=b"]),
        cwd: "/srv".to_owned(),
        terminal: true,
        user: UserSpec {
            user: "app:web".to_owned(),
            group: Some(50),
            supplemental_groups: vec![7, 8],
            strict_groups: true,
        },
        capabilities: CapabilitySpec {
            add: words(&["NET_ADMIN"]),
            drop: words(&["ALL"]),
            add_ambient: words(&["NET_BIND_SERVICE"]),
        },
        no_new_privileges: true,
        seccomp: SeccompSpec::Profile(Box::new(profile())),
        oom_score_adj: Some(-997),
        rlimits: Vec::new(),
    }
}

fn limits() -> Limits {
    Limits {
        cpu_shares: Some(512),
        cpu_quota_us: Some(150_000),
        cpu_period_us: Some(100_000),
        cpuset_cpus: "0-1".to_owned(),
        cpuset_mems: "0".to_owned(),
        memory_bytes: Some(268_435_456),
        memory_swap_bytes: Some(536_870_912),
        pids: Some(100),
        unified: map(&[("memory.high", "200000000")]),
    }
}

/// A session that runs, with everything that a record can hold.
fn running_session() -> SessionRecord {
    SessionRecord {
        id: session_id(0xc1),
        box_id: box_id(),
        spec: SessionSpec {
            name: "main".to_owned(),
            attempt: 2,
            image_ref: "registry.example/web:2".to_owned(),
            labels: map(&[("tier", "front")]),
            annotations: map(&[("note", "x")]),
            log_path: Some("main/2.log".into()),
            process: process(),
            readonly_rootfs: true,
            mounts: mounts(),
            image_volumes: words(&["/data"]),
            pid_namespace: PidNamespace::Target(session_id(0xc0)),
            limits: limits(),
            masked_paths: words(&["/proc/kcore"]),
            readonly_paths: words(&["/proc/sys"]),
            privileged: true,
            stop_signal: 3,
            stdin: true,
            stdin_once: true,
        },
        image: ResolvedImage {
            id: "sha256:ff".to_owned(),
            digest_ref: "registry.example/web@sha256:aa".to_owned(),
            config: ImageConfig {
                entrypoint: words(&["/srv/web"]),
                cmd: words(&["--help"]),
                env: words(&["PATH=/bin"]),
                working_dir: "/srv".to_owned(),
                user: "app".to_owned(),
                stop_signal: "SIGQUIT".to_owned(),
                labels: map(&[("version", "2")]),
                volumes: words(&["/data"]),
                exposed_ports: words(&["80/tcp"]),
            },
            layers: vec![layer()],
        },
        created_at_ns: 1_760_000_000_000_000_002,
        phase: SessionPhase::Running { started_at_ns: 1_760_000_000_000_000_003 },
        log_path: Some("/var/log/pods/shop_web_0b2f/main/2.log".into()),
        user: Some(ResolvedUser { uid: 1000, gid: 50, groups: vec![7, 8] }),
        pid: Some(42),
        volumes: words(&["c1c1-0", "c1c1-1"]),
    }
}

fn bare_session(phase: SessionPhase, pid_namespace: PidNamespace, seccomp: SeccompSpec) -> SessionRecord {
    SessionRecord {
        id: session_id(0xc0),
        box_id: box_id(),
        spec: SessionSpec {
            name: "init".to_owned(),
            process: ProcessSpec { args: words(&["true"]), seccomp, ..ProcessSpec::default() },
            pid_namespace,
            ..SessionSpec::default()
        },
        image: ResolvedImage {
            id: "sha256:ff".to_owned(),
            digest_ref: "sha256:ff".to_owned(),
            config: ImageConfig::default(),
            layers: Vec::new(),
        },
        created_at_ns: 2,
        phase,
        log_path: None,
        user: None,
        pid: None,
        volumes: Vec::new(),
    }
}

pub(super) fn sessions() -> Vec<(&'static str, SessionRecord)> {
    let exited = SessionPhase::Exited {
        started_at_ns: 3,
        finished_at_ns: 4,
        code: 137,
        reason: "OOMKilled".to_owned(),
        message: "killed".to_owned(),
    };
    vec![
        (
            "session-created.json",
            bare_session(SessionPhase::Created, PidNamespace::Session, SeccompSpec::RuntimeDefault),
        ),
        ("session-running.json", running_session()),
        ("session-exited.json", bare_session(exited, PidNamespace::Pod, SeccompSpec::Unconfined)),
    ]
}

pub(super) fn quarantined() -> Quarantined {
    Quarantined {
        record: "boxes/b0b0".to_owned(),
        error: "missing field `spec`".to_owned(),
        since_ns: 1_760_000_000_000_000_004,
        content: "{\"id\":1}".to_owned(),
    }
}
