//! The real `a3s-box-vmm` and its vsock device with stand-ins for QEMU and its file server: what the box's processes see, what they may do,
//! how they end. No virtual machine runs. Needs root and perl, and says so where it cannot run.
#![allow(missing_docs)]

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use a3s_box_vmm::{
    Accel, Attachment, BoxPlan, Machine, MachineExit, PlanNetwork, QemuParts, QemuVmm, Vmm, read_facts,
};

const HANG: &str = "exec sleep 600";

/// Prints the reason and answers whether the test can run.
fn can_run() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        a3s_box_testing::skip("needs root");
    }
    root
}

struct Fixture {
    dir: tempfile::TempDir,
    parts: QemuParts,
}

impl Fixture {
    fn new(emulator: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // The unprivileged stand-ins are executed by path.
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["kernel", "initramfs", "scratch"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        std::fs::create_dir(dir.path().join("box")).unwrap();
        let program = |name: &str, script: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let parts = QemuParts {
            vmm: env!("CARGO_BIN_EXE_a3s-box-vmm").into(),
            emulator: program("emulator", emulator),
        };
        Self { dir, parts }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn plan(&self) -> BoxPlan {
        BoxPlan {
            id: a3s_box_core::BoxId::from_random([2; 32]),
            dir: self.path("box"),
            vcpus: 1,
            memory_mib: 64,
            kernel: self.path("kernel"),
            initramfs: self.path("initramfs"),
            cmdline: String::new(),
            scratch: self.path("scratch"),
            network: None,
            cgroups: Vec::new(),
            guest_ports: Vec::new(),
        }
    }

    fn vmm(&self) -> QemuVmm {
        QemuVmm::new(self.parts.clone(), Accel::Tcg, Duration::from_secs(20))
    }

    async fn launch(&self) -> Box<dyn Machine> {
        self.vmm().launch(&self.plan()).await.unwrap_or_else(|error| panic!("{error}"))
    }

    /// The processes whose arguments name this fixture, by the name of their script.
    fn processes(&self) -> Vec<(i32, String)> {
        let own = std::process::id().to_string();
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().into_string().ok());
        pids.filter(|pid| *pid != own)
            .filter_map(|pid| Some((pid.parse().ok()?, std::fs::read(format!("/proc/{pid}/cmdline")).ok()?)))
            .map(|(pid, cmdline): (i32, Vec<u8>)| (pid, String::from_utf8_lossy(&cmdline).replace('\0', " ")))
            .filter(|(_, cmdline)| cmdline.contains(&*self.dir.path().to_string_lossy()))
            .collect()
    }

    fn assert_nothing_runs(&self) {
        assert_eq!(self.processes(), vec![]);
    }
}

async fn end(machine: &dyn Machine) {
    machine.kill().await.unwrap();
    assert_eq!(machine.wait().await, MachineExit::Killed { signal: 9 });
}

fn names(dir: impl AsRef<Path>) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).unwrap().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// A path of the jail as the host can look at it.
fn inside(machine: &dyn Machine, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root{path}", machine.facts().pid))
}

fn open_path(path: impl AsRef<Path>) -> OwnedFd {
    use rustix::fs::{Mode, OFlags, open};
    open(path.as_ref(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn attachment(source: impl AsRef<Path>, target: &str, readonly: bool) -> Attachment {
    Attachment {
        source: open_path(source),
        target: target.to_owned(),
        readonly,
        recursive_readonly: false,
        propagate: false,
        id_mapped: None,
    }
}

/// A field of /proc/PID/status.
fn status(pid: i32, field: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(&format!("{field}:"))).unwrap();
    line.split_once(':').unwrap().1.trim().to_owned()
}

/// Waits until a process that has just been started has installed its filters: ours is one.
fn wait_for_filters(pid: i32, count: u32) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while status(pid, "Seccomp_filters") != count.to_string() {
        assert!(Instant::now() < deadline, "{} filters", status(pid, "Seccomp_filters"));
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// The direct children of a process.
fn children(pid: i32) -> Vec<i32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.split_ascii_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

#[tokio::test]
async fn killing_the_one_process_ends_all_and_only_then_the_wait() {
    if !can_run() {
        return;
    }
    // Grandchildren and a process that ignores polite signals.
    let fixture = Fixture::new("trap '' TERM INT HUP; sleep 600 & sleep 600");
    let machine = fixture.launch().await;
    let children = children(machine.facts().pid);
    assert_eq!(children.len(), 3);
    assert_eq!(read_facts(&fixture.path("box")).unwrap(), Some(machine.facts()));
    end(&*machine).await;
    // The vsock device is a role of the program, whose arguments do not name the fixture.
    let running = |pid: &&i32| Path::new("/proc").join(pid.to_string()).exists();
    assert_eq!(children.iter().find(running), None);
    fixture.assert_nothing_runs();
}

#[tokio::test]
async fn a_box_is_found_again_and_outlives_its_handle() {
    if !can_run() {
        return;
    }
    let fixture = Fixture::new(HANG);
    let facts = fixture.launch().await.facts();
    let found = fixture.vmm().adopt(&fixture.path("box"), &facts).await.unwrap().expect("it still runs");
    assert_eq!(found.facts(), facts);
    found.attach(attachment(fixture.path("kernel"), "images/a", true)).await.unwrap();
    found.kill().await.unwrap();
    // Both handles of this test are in the process that is the parent: one of them gets the exit status.
    found.wait().await;
    assert!(fixture.vmm().adopt(&fixture.path("box"), &facts).await.unwrap().is_none());
    fixture.assert_nothing_runs();
}

#[tokio::test]
async fn the_emulators_exit_is_the_machines() {
    if !can_run() {
        return;
    }
    for (emulator, expected) in [
        ("sleep 0.2; exit 0", MachineExit::PowerOff),
        ("sleep 0.2; exit 3", MachineExit::Failed { code: 3 }),
        ("sleep 0.2; kill -SEGV $$", MachineExit::Failed { code: 139 }),
    ] {
        let fixture = Fixture::new(emulator);
        assert_eq!(fixture.launch().await.wait().await, expected, "{emulator}");
        fixture.assert_nothing_runs();
    }
}

#[tokio::test]
async fn a_helper_that_dies_takes_the_box_with_it_and_is_named() {
    if !can_run() {
        return;
    }
    let fixture = Fixture::new(HANG);
    let machine = fixture.launch().await;
    let [file_server, ..] = children(machine.facts().pid)[..] else { panic!("no children") };
    kill(file_server);
    assert_eq!(machine.wait().await, MachineExit::Failed { code: 72 });
    let words = machine.last_words(500).await;
    assert!(
        words.contains("the file server ended (signal: 9 (SIGKILL)) while the guest was running"),
        "{words}"
    );
    fixture.assert_nothing_runs();
}

/// A vsock device that has stopped, with its process alive, is a pod that nobody can reach.
#[tokio::test]
async fn a_vsock_device_that_ends_takes_the_box_with_it_and_is_named() {
    if !can_run() {
        return;
    }
    let fixture = Fixture::new(HANG);
    let machine = fixture.launch().await;
    let [_, vsock, _] = children(machine.facts().pid)[..] else { panic!("three children") };
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(vsock), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(machine.wait().await, MachineExit::Failed { code: 72 });
    let words = machine.last_words(500).await;
    assert!(
        words.contains("the vsock device ended (signal: 9") && words.contains("while the guest"),
        "{words}"
    );
    fixture.assert_nothing_runs();
}

/// Nothing but the socket's name leads there, and a connection that the guest never takes is closed by nobody but us.
#[tokio::test]
async fn the_ports_of_the_guest_are_listened_on_when_the_launch_has_ended() {
    if !can_run() {
        return;
    }
    let fixture = Fixture::new(HANG);
    let machine = fixture.launch().await;
    for port in [1025, 1026] {
        machine.connect(port).await.unwrap();
    }
    assert!(machine.connect(4088).await.is_err(), "the plan does not name it");
    let sockets = fixture.path("box/vsock");
    let mode = std::fs::metadata(&sockets).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o710, "the device may look there and make nothing");
    end(&*machine).await;
}

#[tokio::test]
async fn a_launch_that_is_dropped_halfway_leaves_nothing() {
    if !can_run() {
        return;
    }
    let fixture = Fixture::new(HANG);
    // Opening a pipe that nobody reads waits.
    std::fs::create_dir(fixture.path("cgroup")).unwrap();
    nix::unistd::mkfifo(&fixture.path("cgroup/cgroup.procs"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (vmm, plan) = (fixture.vmm(), BoxPlan { cgroups: vec![fixture.path("cgroup")], ..fixture.plan() });
    let started = Instant::now();
    let launched = tokio::time::timeout(Duration::from_millis(500), vmm.launch(&plan)).await;
    assert!(launched.is_err() && started.elapsed() < Duration::from_secs(3));
    fixture.assert_nothing_runs();
}

#[tokio::test]
async fn a_network_namespace_that_is_gone_is_named() {
    if !can_run() {
        return;
    }
    let fixture = Fixture::new(HANG);
    let network = PlanNetwork { netns: fixture.path("netns"), nics: Vec::new() };
    let plan = BoxPlan { network: Some(network), ..fixture.plan() };
    let error = fixture.vmm().launch(&plan).await.err().unwrap().to_string();
    assert!(error.contains("open the network namespace") && error.contains("No such file"), "{error}");
    fixture.assert_nothing_runs();
}

#[tokio::test]
async fn every_cgroup_of_the_plan_is_joined_and_one_that_is_gone_is_named() {
    if !can_run() {
        return;
    }
    let fixture = Fixture::new(HANG);
    let cgroup = fixture.path("cgroup");
    std::fs::create_dir(&cgroup).unwrap();
    let plan = BoxPlan { cgroups: vec![cgroup.clone()], ..fixture.plan() };
    let error = fixture.vmm().launch(&plan).await.err().unwrap().to_string();
    assert!(error.contains("join") && error.contains("cgroup/cgroup.procs"), "{error}");
    std::fs::write(cgroup.join("cgroup.procs"), "").unwrap();
    end(&*fixture.vmm().launch(&plan).await.unwrap()).await;
    assert_eq!(std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap(), "0");
}

#[tokio::test]
async fn the_jail_holds_what_the_box_needs_and_nothing_of_the_host() {
    if !can_run() {
        return;
    }
    let fixture = Fixture::new(HANG);
    let machine = fixture.launch().await;
    let seen = names(inside(&*machine, "/"));
    for wanted in
        ["vmlinux", "initramfs", "scratch", "share", "share.rw", "vsock", "dev", "proc", "run", "usr"]
    {
        assert!(seen.contains(wanted), "{wanted} is not in {seen:?}");
    }
    for host in ["root", "home", "var", "sys", "boot", "mnt", "srv"] {
        assert!(!seen.contains(host), "{host} is in {seen:?}");
    }
    assert_eq!(names(inside(&*machine, "/share")), ["images", "pod"].map(str::to_owned).into());
    assert_eq!(names(inside(&*machine, "/dev")), ["null", "urandom", "zero"].map(str::to_owned).into());
    for readonly in ["/x", "/share/x", "/share/pod/x", "/usr/x", "/dev/x"] {
        let error = std::fs::write(inside(&*machine, readonly), "x").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{readonly}");
    }
    end(&*machine).await;
}

#[tokio::test]
async fn each_process_has_the_privileges_it_needs_and_no_more() {
    if !can_run() {
        return;
    }
    let fixture = Fixture::new(HANG);
    let machine = fixture.launch().await;
    let supervisor = machine.facts().pid;
    let [file_server, vsock, emulator] = children(supervisor)[..] else { panic!("three children") };
    for pid in [supervisor, file_server, vsock, emulator] {
        assert_eq!(status(pid, "NoNewPrivs"), "1");
        assert_eq!(status(pid, "Seccomp"), "2");
        for namespace in ["net", "mnt", "pid", "ipc", "uts"] {
            let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
            assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
        }
    }
    for pid in [vsock, emulator] {
        assert_eq!(status(pid, "Uid"), "65534\t65534\t65534\t65534");
        assert_eq!(status(pid, "Groups"), "");
    }
    for pid in [supervisor, vsock, emulator] {
        assert_eq!(status(pid, "CapEff"), "0000000000000000");
        assert_eq!(status(pid, "CapPrm"), "0000000000000000");
    }
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP.
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(status(file_server, set), "00000000880000db", "{set}");
    }
    // Its library's filter comes after ours, and after its name.
    wait_for_filters(file_server, 2);
    assert_eq!(status(file_server, "Name"), "file-server");
    end(&*machine).await;
}

#[tokio::test]
async fn the_filter_refuses_namespaces_and_mounts_and_lets_programs_work() {
    if !can_run() {
        return;
    }
    let script = r#"unshare -U true 2>/dev/null && echo 'made a user namespace' >&2
        unshare -m true 2>/dev/null && echo 'made a mount namespace' >&2
        mount -t tmpfs none /run 2>/dev/null && echo 'mounted' >&2
        echo "programs work: $(ls / | wc -l)" >&2; exec sleep 600"#;
    let fixture = Fixture::new(script);
    let machine = fixture.launch().await;
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut words = String::new();
    while !words.contains("programs work") && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
        words = machine.last_words(500).await;
    }
    assert!(words.starts_with("VMM: programs work: "), "{words}");
    end(&*machine).await;
}

#[tokio::test]
async fn an_attached_mount_is_seen_by_the_box_and_not_by_the_host() {
    if !can_run() {
        return;
    }
    let fixture = Fixture::new(HANG);
    std::fs::create_dir(fixture.path("volume")).unwrap();
    let machine = fixture.launch().await;
    let before = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    machine.attach(attachment(fixture.path("kernel"), "images/layer", true)).await.unwrap();
    machine.attach(attachment(fixture.path("volume"), "pod/data", false)).await.unwrap();
    assert_eq!(std::fs::read_to_string("/proc/self/mountinfo").unwrap(), before);
    assert_eq!(std::fs::read_to_string(inside(&*machine, "/share/images/layer")).unwrap(), "kernel");
    let error = std::fs::write(inside(&*machine, "/share/images/layer"), "x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    std::fs::write(inside(&*machine, "/share/pod/data/file"), "x").unwrap();
    assert!(fixture.path("volume/file").exists());
    end(&*machine).await;
}

#[tokio::test]
async fn what_was_detached_is_gone_and_detaching_again_is_no_error() {
    if !can_run() {
        return;
    }
    let fixture = Fixture::new(HANG);
    let machine = fixture.launch().await;
    machine.attach(attachment(fixture.path("kernel"), "images/layer", true)).await.unwrap();
    let again =
        machine.attach(attachment(fixture.path("initramfs"), "images/layer", true)).await.unwrap_err();
    assert_eq!(again.source.kind(), std::io::ErrorKind::AlreadyExists, "{again}");
    machine.detach("images/layer").await.unwrap();
    assert!(!inside(&*machine, "/share/images/layer").exists());
    machine.detach("images/layer").await.unwrap();
    machine.attach(attachment(fixture.path("initramfs"), "images/layer", true)).await.unwrap();
    assert_eq!(std::fs::read_to_string(inside(&*machine, "/share/images/layer")).unwrap(), "initramfs");
    end(&*machine).await;
}

/// Another mount would be another file system for the guest, so the one that is there has to change.
#[tokio::test]
async fn what_is_attached_becomes_writable_and_read_only_again_where_it_is() {
    if !can_run() {
        return;
    }
    let fixture = Fixture::new(HANG);
    std::fs::create_dir(fixture.path("volume")).unwrap();
    let machine = fixture.launch().await;
    machine.attach(attachment(fixture.path("volume"), "pod/data", true)).await.unwrap();
    let id = || {
        use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
        let found =
            statx(CWD, inside(&*machine, "/share/pod/data"), AtFlags::empty(), StatxFlags::MNT_ID).unwrap();
        found.stx_mnt_id
    };
    let (before, file) = (id(), inside(&*machine, "/share/pod/data/file"));
    let refused = std::fs::write(&file, "x").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    for _ in 0..2 {
        machine.set_readonly("pod/data", false).await.unwrap();
        std::fs::write(&file, "x").unwrap();
    }
    let writing = std::fs::File::options().append(true).open(&file).unwrap();
    let busy = machine.set_readonly("pod/data", true).await.unwrap_err();
    assert_eq!(busy.source.kind(), std::io::ErrorKind::ResourceBusy, "{busy}");
    drop(writing);
    machine.set_readonly("pod/data", true).await.unwrap();
    assert!(std::fs::write(&file, "x").is_err() && id() == before);
    // A mount point without a mount is a directory of the share, whose own mount must not be changed by mistake.
    machine.detach("pod/data").await.unwrap();
    let gone = machine.set_readonly("pod/data", false).await.unwrap_err();
    assert_eq!(gone.source.kind(), std::io::ErrorKind::NotFound, "{gone}");
    end(&*machine).await;
}

#[tokio::test]
async fn a_device_node_in_a_volume_cannot_be_opened_through_the_share() {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    if !can_run() {
        return;
    }
    let fixture = Fixture::new(HANG);
    std::fs::create_dir(fixture.path("volume")).unwrap();
    let node = fixture.path("volume/null");
    mknodat(CWD, &node, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(1, 3)).unwrap();
    let machine = fixture.launch().await;
    machine.attach(attachment(fixture.path("volume"), "pod/data", false)).await.unwrap();
    let error = std::fs::read(inside(&*machine, "/share/pod/data/null")).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    end(&*machine).await;
}

#[tokio::test]
async fn attaching_to_a_box_that_has_ended_is_an_error() {
    if !can_run() {
        return;
    }
    let fixture = Fixture::new(HANG);
    let machine = fixture.launch().await;
    end(&*machine).await;
    let error = machine.attach(attachment(fixture.path("kernel"), "images/layer", true)).await.unwrap_err();
    assert_eq!(error.step, "enter the namespace for", "{error}");
}

/// Mounts are made here, so this test has a mount namespace of its own; threads that it starts share it.
#[test]
fn mounts_below_a_source_follow_their_rules() {
    if !can_run() {
        return;
    }
    std::thread::spawn(|| {
        own_mount_namespace();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(mounts_below_a_source());
    })
    .join()
    .unwrap();
}

#[allow(unsafe_code)]
fn own_mount_namespace() {
    use rustix::mount::{MountPropagationFlags, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // SAFETY: descriptors are not unshared.
    unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).unwrap();
}

async fn mounts_below_a_source() {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    let fixture = Fixture::new(HANG);
    let volume = fixture.path("volume");
    std::fs::create_dir(&volume).unwrap();
    mount("volume", &volume, "tmpfs", MountFlags::empty(), None).unwrap();
    mount_change(&volume, MountPropagationFlags::SHARED).unwrap();
    let below = |name: &str| {
        std::fs::create_dir(volume.join(name)).unwrap();
        mount("below", volume.join(name), "tmpfs", MountFlags::empty(), None).unwrap();
        std::fs::write(volume.join(name).join("file"), name).unwrap();
    };
    below("early");
    let machine = fixture.launch().await;
    let attach = |target: &'static str, readonly, recursive_readonly, propagate| {
        let attachment = attachment(&volume, target, readonly);
        machine.attach(Attachment { recursive_readonly, propagate, ..attachment })
    };
    attach("pod/ro", true, false, false).await.unwrap();
    attach("pod/rro", true, true, false).await.unwrap();
    attach("pod/slave", false, false, true).await.unwrap();
    let write = |path: &str| std::fs::write(inside(&*machine, path), "x");
    assert!(write("/share/pod/ro/file").is_err() && write("/share/pod/ro/early/file").is_ok());
    assert!(write("/share/pod/rro/file").is_err() && write("/share/pod/rro/early/file").is_err());
    assert!(write("/share/pod/slave/file").is_ok());
    below("late");
    assert!(inside(&*machine, "/share/pod/slave/late/file").exists(), "rslave");
    assert!(!inside(&*machine, "/share/pod/ro/late/file").exists(), "private");
    let before = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    end(&*machine).await;
    assert_eq!(
        std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap(),
        before,
        "the source's own mounts"
    );
}
