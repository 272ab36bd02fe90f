//! Every message with every field, as each build has encoded it.
//!
//! The values name every field: one that is added must be given a meaning here too, and a value by age (`of_age`) for the
//! builds that did not have it.

use std::collections::HashMap;
use std::fmt::Debug;

use a3s_box_protocol::proto::*;
use prost::Message;

use super::goldens;

/// The age of what this build writes.
const NOW: u32 = u32::MAX;

/// A field of a newer build: number 1000, the text "new".
const UNKNOWN: [u8; 6] = [0xc2, 0x3e, 3, b'n', b'e', b'w'];

/// `of_age` is what the golden file of an age means.
fn check<M: Message + Default + PartialEq + Debug>(
    names: &mut Vec<String>,
    name: &str,
    of_age: impl Fn(u32) -> M,
) {
    let name = format!("{name}.hex");
    goldens("messages").check_hex(&name, &of_age(NOW).encode_to_vec());
    for golden in goldens("messages").ages(&name) {
        let (bytes, meaning, path) = (golden.unhex(), of_age(golden.age), golden.path.display());
        assert_eq!(
            M::decode(bytes.as_slice()).unwrap(),
            meaning,
            "this build reads something else in {path}"
        );
        assert_eq!(
            meaning.encode_to_vec(),
            bytes,
            "an agent of that build does not read what this one says: {path}"
        );
        let newer = [&bytes[..], &UNKNOWN].concat();
        assert_eq!(M::decode(newer.as_slice()).unwrap(), meaning, "a field of a newer build: {path}");
    }
    names.push(name);
}

fn text(text: &str) -> String {
    text.to_owned()
}

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(ToString::to_string).collect()
}

fn id() -> String {
    text("c1c1")
}

fn ready(age: u32) -> Ready {
    Ready {
        protocol: if age > 1 { 4 } else { 3 },
        agent_version: text("0.1.0"),
        kernel_release: text("6.12.0-a3s-box"),
        stages: vec![
            BootStage { name: text("kernel"), at_us: 1_250_000 },
            BootStage { name: text("agent"), at_us: 1_400_000 },
        ],
    }
}

fn ids(start: u32) -> Option<IdRange> {
    Some(IdRange { start, count: 65_536 })
}

fn address(ip: &[u8], prefix: u32) -> IpNetwork {
    IpNetwork { ip: ip.to_vec(), prefix }
}

fn configure(age: u32) -> ConfigureSandboxRequest {
    ConfigureSandboxRequest {
        hostname: text("web-0"),
        // One: the order of several is not fixed.
        sysctls: HashMap::from([(text("net.core.somaxconn"), text("1024"))]),
        interfaces: vec![NetworkInterface {
            name: text("eth0"),
            mac: vec![2, 0, 0, 0, 0, 9],
            mtu: 1450,
            addresses: vec![address(&[10, 9, 8, 7], 24), address(&[0xfd; 16], 64)],
            routes: vec![
                Route { destination: Some(address(&[0; 4], 0)), gateway: vec![10, 9, 8, 1] },
                Route { destination: Some(address(&[10, 9, 0, 0], 16)), gateway: Vec::new() },
            ],
            device_mac: vec![2, 0xa3, 0x5b, 0, 0, 0],
        }],
        shm_bytes: 67_108_864,
        unix_time_ns: 1_760_000_000_000_000_001,
        user_namespace: Some(UserNamespace { uids: ids(65_536), gids: ids(131_072) }),
        init_user: (age > 1).then_some(UserNumbers { uid: 65_535, gid: 65_534 }),
    }
}

fn process() -> Process {
    Process {
        args: texts(&["/srv/web", "--port", "80"]),
        env: texts(&["PATH=/bin", "A=b"]),
        cwd: text("/srv"),
        terminal: true,
        rows: 24,
        columns: 80,
        user: Some(User {
            user: text("app:web"),
            group: Some(50),
            supplemental_groups: vec![7, 8],
            strict_groups: true,
        }),
        capabilities: Some(Capabilities {
            bounding: 31,
            effective: 15,
            permitted: 7,
            inheritable: 3,
            ambient: 1,
        }),
        no_new_privileges: true,
        seccomp_bpf: vec![0x20, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0xff, 0x7f],
        rlimits: vec![Rlimit { name: text("RLIMIT_NOFILE"), soft: 1024, hard: 4096 }],
        oom_score_adj: Some(-997),
    }
}

fn mount(target: &str, source: mount::Source) -> Mount {
    Mount {
        target: text(target),
        source: Some(source),
        readonly: true,
        options: texts(&["noexec", "nosuid"]),
    }
}

fn resources() -> Option<Resources> {
    let setting = |file: &str, value: &str| CgroupSetting { file: text(file), value: text(value) };
    Some(Resources { settings: vec![setting("memory.max", "268435456"), setting("pids.max", "100")] })
}

fn create(age: u32, pid_mode: PidMode) -> CreateSessionRequest {
    let image = ImageVolume { layers: texts(&["0c0d.erofs"]), sub_path: text("weights") };
    let mut mounts = vec![
        mount("/data", mount::Source::PodVolume(text("c1c1-0"))),
        mount("/tmp", mount::Source::TmpfsBytes(65_536)),
        mount("/model", mount::Source::Image(image)),
    ];
    if age > 1 {
        let part = PodVolumePart { name: text("s0"), sub_path: text("a/b") };
        mounts.push(mount("/part", mount::Source::PodVolumePart(part)));
    }
    CreateSessionRequest {
        session_id: id(),
        rootfs: Some(Rootfs { layers: texts(&["0a0b.erofs", "chain-0c0d.erofs"]), readonly: true }),
        mounts,
        image_volumes: if age > 1 { texts(&["/data"]) } else { Vec::new() },
        process: Some(process()),
        pid_mode: pid_mode.into(),
        target_session_id: text("c0c0"),
        resources: resources(),
        masked_paths: texts(&["/proc/kcore"]),
        readonly_paths: texts(&["/proc/sys"]),
        privileged: true,
        stdin: true,
        etc_files: vec![EtcFile {
            path: text("/etc/resolv.conf"),
            content: b"nameserver 10.96.0.10\n".to_vec(),
        }],
    }
}

fn exit(_: u32) -> ExitStatus {
    ExitStatus {
        code: 137,
        signal: 9,
        oom_killed: true,
        exited_at_ns: 1_760_000_000_000_000_002,
        stdout_bytes: Some(0),
        stderr_bytes: Some(4_294_967_296),
    }
}

fn state(phase: session_state::Phase, exit: Option<ExitStatus>) -> SessionState {
    SessionState { session_id: id(), phase: phase.into(), pid: 42, exit }
}

fn pressure(total_us: u64) -> Option<PressureStats> {
    let one = |total_us| Some(Pressure { total_us, avg10: 1234, avg60: 567, avg300: 89 });
    Some(PressureStats { some: one(total_us), full: one(total_us / 2) })
}

fn stats(session_id: &str) -> SessionStats {
    SessionStats {
        session_id: text(session_id),
        at_ns: 1_760_000_000_000_000_003,
        cpu: Some(CpuStats {
            usage_ns: 11,
            user_ns: 12,
            system_ns: 13,
            periods: 14,
            throttled_periods: 15,
            throttled_ns: 16,
        }),
        memory: Some(MemoryStats {
            usage_bytes: 21,
            working_set_bytes: 22,
            rss_bytes: 23,
            available_bytes: Some(0),
            page_faults: 25,
            major_page_faults: 26,
            swap_bytes: 27,
            swap_available_bytes: Some(28),
            peak_bytes: 29,
            file_bytes: 30,
            mapped_file_bytes: 31,
            active_file_bytes: 32,
            inactive_file_bytes: 33,
            kernel_bytes: 34,
            limit_hits: 35,
            oom_kills: 36,
        }),
        pids: 41,
        io: Some(IoStats { read_bytes: 51, written_bytes: 52, reads: 53, writes: 54 }),
        writable_layer: Some(WritableLayerStats {
            used_bytes: 61,
            inodes: 62,
            at_least: true,
            at_ns: 63,
            limit_bytes: 64,
            inodes_total: 65,
            inodes_free: 66,
        }),
        cpu_pressure: pressure(70),
        memory_pressure: pressure(80),
        io_pressure: pressure(90),
        processes: 101,
        file_descriptors: 102,
        sockets: 103,
        threads_max: 104,
    }
}

fn open(kind: stream_open::Kind) -> StreamOpen {
    StreamOpen {
        session_id: id(),
        exec_id: text("e1"),
        kind: kind.into(),
        offset: 65_536,
        keep_open: true,
        port: 8080,
    }
}

fn exec(_: u32) -> ExecRequest {
    ExecRequest { session_id: id(), exec_id: text("e1"), process: Some(process()), stdin: true }
}

/// A number that was given a second meaning reached agents that knew the first.
#[test]
fn golden_messages_of_every_age_mean_what_they_meant() {
    let mut names = Vec::new();
    let names = &mut names;
    check(names, "Ready", ready);
    check(names, "ConfigureSandboxRequest", configure);
    check(names, "ConfigureSandboxResponse", |_| ConfigureSandboxResponse {});
    sessions(names);
    execs(names);
    figures(names);
    check(names, "ShutdownRequest", |_| ShutdownRequest {});
    check(names, "ShutdownResponse", |_| ShutdownResponse {});
    for (kind, name) in [
        (stream_open::Kind::Stdin, "StreamOpen-stdin"),
        (stream_open::Kind::Stdout, "StreamOpen-stdout"),
        (stream_open::Kind::Stderr, "StreamOpen-stderr"),
        (stream_open::Kind::Tcp, "StreamOpen-tcp"),
    ] {
        check(names, name, |_| open(kind));
    }
    check(names, "StreamAccept", |_| StreamAccept { error: text("no such session"), offset: 65_536 });
    goldens("messages").are_all_known(&names.iter().map(String::as_str).collect::<Vec<_>>());
}

fn sessions(names: &mut Vec<String>) {
    for (mode, name) in [
        (PidMode::Session, "CreateSessionRequest-session"),
        (PidMode::Pod, "CreateSessionRequest-pod"),
        (PidMode::Target, "CreateSessionRequest-target"),
    ] {
        check(names, name, |age| create(age, mode));
    }
    check(names, "CreateSessionResponse", |_| CreateSessionResponse {});
    check(names, "StartSessionRequest", |_| StartSessionRequest { session_id: id() });
    check(names, "StartSessionResponse", |_| StartSessionResponse {
        pid: 42,
        user: Some(ResolvedUser { uid: 1000, gid: 50, groups: vec![7, 8] }),
    });
    for (cause, name) in [
        (start_failure::Cause::Unknown, "StartFailure-unknown"),
        (start_failure::Cause::NotFound, "StartFailure-not-found"),
        (start_failure::Cause::PermissionDenied, "StartFailure-permission-denied"),
        (start_failure::Cause::NotExecutable, "StartFailure-not-executable"),
    ] {
        check(names, name, |_| StartFailure { cause: cause.into() });
    }
    check(names, "SignalSessionRequest", |_| SignalSessionRequest {
        session_id: id(),
        signal: 15,
        all: true,
    });
    check(names, "SignalSessionResponse", |_| SignalSessionResponse {});
    check(names, "WaitSessionRequest", |_| WaitSessionRequest { session_id: id() });
    check(names, "ExitStatus", exit);
    check(names, "DeleteSessionRequest", |_| DeleteSessionRequest { session_id: id() });
    check(names, "DeleteSessionResponse", |_| DeleteSessionResponse {});
    check(names, "ListSessionsRequest", |_| ListSessionsRequest {});
    check(names, "ListSessionsResponse", |age| ListSessionsResponse {
        sessions: vec![
            state(session_state::Phase::Created, None),
            state(session_state::Phase::Running, None),
            state(session_state::Phase::Exited, Some(exit(age))),
        ],
    });
}

fn execs(names: &mut Vec<String>) {
    let (session_id, exec_id) = (id, || text("e1"));
    check(names, "ExecRequest", exec);
    check(names, "ExecResponse", |_| ExecResponse { pid: 43 });
    check(names, "WaitExecRequest", |_| WaitExecRequest { exec_id: exec_id() });
    check(names, "SignalExecRequest", |age| SignalExecRequest {
        exec_id: exec_id(),
        signal: 9,
        all: age > 1,
    });
    check(names, "SignalExecResponse", |_| SignalExecResponse {});
    check(names, "CloseStdinRequest", |_| CloseStdinRequest { session_id: session_id(), exec_id: exec_id() });
    check(names, "CloseStdinResponse", |_| CloseStdinResponse {});
    check(names, "ResizeTerminalRequest", |_| ResizeTerminalRequest {
        session_id: session_id(),
        exec_id: exec_id(),
        rows: 24,
        columns: 80,
    });
    check(names, "ResizeTerminalResponse", |_| ResizeTerminalResponse {});
}

fn figures(names: &mut Vec<String>) {
    check(names, "StatsRequest", |_| StatsRequest { session_ids: vec![id(), text("c0c0")] });
    check(names, "StatsResponse", |_| StatsResponse { sessions: vec![stats("c1c1")], pod: Some(stats("")) });
    check(names, "UpdateResourcesRequest", |_| UpdateResourcesRequest {
        session_id: id(),
        resources: resources(),
    });
    check(names, "UpdateResourcesResponse", |_| UpdateResourcesResponse {});
}
