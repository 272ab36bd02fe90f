//! A box without a machine: the agent's sessions in namespaces of the test's own thread, with the directories that
//! boot would have made. It needs root; without it a test says so and ends.

// Each test file uses its own part.
#![allow(dead_code)]

use std::ffi::CString;
use std::fs;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use a3s_box_agent::reaper::Reaper;
use a3s_box_agent::session::table::Table;
use a3s_box_agent::{paths, spawn, streams};
use a3s_box_protocol::framing::{read_message, write_message};
pub(crate) use a3s_box_protocol::proto::stream_open::Kind;
use a3s_box_protocol::proto::{
    Capabilities, CreateSessionRequest, ExecRequest, ImageVolume, Mount, Process, StreamAccept, StreamOpen,
    User, mount,
};
use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// A reaper waits for every child of the process, so there is one box at a time.
static ONE_BOX: Mutex<()> = Mutex::new(());

/// What containers get from the usual runtimes.
const DEFAULT_CAPABILITIES: u64 = 0xa804_25fb;

pub(crate) struct TestBox {
    pub(crate) table: Table,
    cgroup: PathBuf,
    _one: MutexGuard<'static, ()>,
}

/// Runs `test` in a box of its own.
pub(crate) fn in_a_box<F: Future<Output = ()>>(test: impl FnOnce(TestBox) -> F) {
    if !rustix::process::geteuid().is_root() || !Path::new("/bin/busybox").exists() {
        a3s_box_testing::skip("needs root and /bin/busybox");
        return;
    }
    let one = ONE_BOX.lock().unwrap_or_else(PoisonError::into_inner);
    spawn::use_program(CString::new(env!("CARGO_BIN_EXE_a3s-box-agent")).unwrap());
    let cgroup = make_directories();
    // The runtime is made after the namespaces, so that its threads live in them too.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let reaper = Reaper::default();
        let task = tokio::spawn(reaper.clone().run());
        test(TestBox { table: Table::new(reaper), cgroup, _one: one }).await;
        task.abort();
    });
}

fn make_directories() -> PathBuf {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    let tmpfs = |path: &str| rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::empty(), None).unwrap();
    tmpfs("/run");
    for directory in [paths::RUN, paths::SHARE, paths::IMAGES, paths::VOLUMES, paths::LAYERS, paths::SCRATCH]
    {
        fs::create_dir(directory).unwrap();
    }
    for directory in [paths::SESSIONS, paths::TRASH, paths::SHM, paths::EMPTY, paths::ROOTFS] {
        fs::create_dir(directory).unwrap();
    }
    tmpfs(paths::SHM);
    // A cgroup of our own in the place of the guest's root.
    let all = Path::new("/run/cgroup2");
    fs::create_dir(all).unwrap();
    rustix::mount::mount("cgroup2", all, "cgroup2", MountFlags::empty(), None).unwrap();
    let ours = all.join(format!("a3s-agent-test-{}-{:?}", std::process::id(), std::thread::current().id()));
    fs::create_dir(&ours).unwrap();
    rustix::mount::mount_bind(&ours, "/sys/fs/cgroup").unwrap();
    fs::create_dir(paths::POD_CGROUP).unwrap();
    busybox_volume();
    ours
}

fn busybox_volume() {
    let bin = Path::new(paths::VOLUMES).join("bin");
    fs::create_dir(&bin).unwrap();
    fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
    fs::set_permissions(bin.join("busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    for applet in [
        "sh", "cat", "ls", "ps", "id", "sleep", "echo", "true", "tty", "stty", "touch", "grep", "mount",
        "pwd", "wc", "chmod", "setsid",
    ] {
        std::os::unix::fs::symlink("busybox", bin.join(applet)).unwrap();
    }
}

impl Drop for TestBox {
    fn drop(&mut self) {
        // After a failed test there are sessions left; they must not outlive it.
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        let pod = self.cgroup.join("pod");
        let empty =
            || fs::read_to_string(self.cgroup.join("cgroup.events")).is_ok_and(|e| e.contains("populated 0"));
        for _ in 0..100 {
            if empty() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        for session in fs::read_dir(&pod).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(session.path());
        }
        let _ = fs::remove_dir(&pod);
        let _ = rustix::mount::unmount("/sys/fs/cgroup", UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.cgroup);
    }
}

pub(crate) fn process(args: &[&str]) -> Process {
    Process {
        args: args.iter().map(|a| (*a).to_owned()).collect(),
        cwd: "/".to_owned(),
        user: Some(User::default()),
        capabilities: Some(Capabilities {
            bounding: DEFAULT_CAPABILITIES,
            effective: DEFAULT_CAPABILITIES,
            permitted: DEFAULT_CAPABILITIES,
            ..Capabilities::default()
        }),
        ..Process::default()
    }
}

pub(crate) fn volume(name: &str, target: &str) -> Mount {
    Mount {
        target: target.to_owned(),
        source: Some(mount::Source::PodVolume(name.to_owned())),
        readonly: false,
        options: Vec::new(),
    }
}

pub(crate) fn image(layers: &[&str], sub_path: &str, target: &str) -> Mount {
    let layers = layers.iter().map(|name| (*name).to_owned()).collect();
    let image = ImageVolume { layers, sub_path: sub_path.to_owned() };
    Mount { source: Some(mount::Source::Image(image)), ..volume("", target) }
}

/// A session whose only file system contents are busybox in /bin.
pub(crate) fn session(id: &str, args: &[&str]) -> CreateSessionRequest {
    CreateSessionRequest {
        session_id: id.to_owned(),
        process: Some(process(args)),
        mounts: vec![volume("bin", "/bin")],
        ..CreateSessionRequest::default()
    }
}

pub(crate) fn shell(id: &str, script: &str) -> CreateSessionRequest {
    session(id, &["sh", "-c", script])
}

/// What a process left behind.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl TestBox {
    pub(crate) async fn open(
        &self,
        session: &str,
        exec: &str,
        kind: Kind,
        offset: u64,
    ) -> (DuplexStream, StreamAccept) {
        let (mut host, guest) = tokio::io::duplex(64 * 1024);
        let table = self.table.clone();
        tokio::spawn(async move {
            let (read, write) = tokio::io::split(guest);
            let _ = streams::serve(&table, read, write).await;
        });
        let open = StreamOpen {
            session_id: session.to_owned(),
            exec_id: exec.to_owned(),
            kind: kind.into(),
            offset,
            ..StreamOpen::default()
        };
        write_message(&mut host, &open).await.unwrap();
        let accept = read_message(&mut host).await.unwrap();
        (host, accept)
    }

    /// Reads a stream to its end and acknowledges all of it.
    pub(crate) async fn read(&self, session: &str, exec: &str, kind: Kind) -> String {
        let (mut stream, accept) = self.open(session, exec, kind, 0).await;
        assert_eq!(accept.error, "");
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        // The agent has closed a stream of which nothing is left to acknowledge.
        let _ = stream.write_u64(bytes.len() as u64).await;
        String::from_utf8(bytes).unwrap()
    }

    /// Runs a session from its creation to its deletion.
    pub(crate) async fn run(&self, request: CreateSessionRequest) -> Outcome {
        let id = request.session_id.clone();
        self.table.create(request).await.unwrap();
        self.table.start(&id).await.unwrap();
        let code = self.table.wait(&id).await.unwrap().exit.code;
        let stdout = self.read(&id, "", Kind::Stdout).await;
        let stderr = self.read(&id, "", Kind::Stderr).await;
        self.table.delete(&id).await.unwrap();
        Outcome { code, stdout, stderr }
    }

    /// As [`Self::run`], for a session whose only output is its terminal's.
    pub(crate) async fn run_with_terminal(&self, request: CreateSessionRequest) -> String {
        let id = request.session_id.clone();
        self.table.create(request).await.unwrap();
        self.table.start(&id).await.unwrap();
        self.table.wait(&id).await.unwrap();
        let output = self.read(&id, "", Kind::Stdout).await;
        self.table.delete(&id).await.unwrap();
        output
    }

    pub(crate) async fn exec(&self, session: &str, exec: &str, process: Process) -> Outcome {
        let request = ExecRequest {
            session_id: session.to_owned(),
            exec_id: exec.to_owned(),
            process: Some(process),
            stdin: false,
        };
        self.table.start_exec(request).await.unwrap();
        let (exit, totals) = self.table.wait_exec(exec).await.unwrap();
        let stdout = self.read(session, exec, Kind::Stdout).await;
        let stderr = self.read(session, exec, Kind::Stderr).await;
        assert_eq!((totals.stdout, totals.stderr), (stdout.len() as u64, stderr.len() as u64));
        Outcome { code: exit.code, stdout, stderr }
    }
}
