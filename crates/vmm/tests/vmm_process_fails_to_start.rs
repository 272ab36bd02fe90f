//! A stand-in for `a3s-box-vmm` that misbehaves: every launch ends within its limit, says why, and leaves no process.
#![allow(missing_docs)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use a3s_box_vmm::error::LaunchError;
use a3s_box_vmm::{Accel, BoxPlan, QemuParts, QemuVmm, Vmm};

struct Fixture {
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new(script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["kernel", "initramfs", "scratch"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        std::fs::create_dir(dir.path().join("box")).unwrap();
        let program = dir.path().join("fake-vmm");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn vmm(&self, limit: Duration) -> QemuVmm {
        let other = PathBuf::from("/bin/true");
        let parts = QemuParts { vmm: self.path("fake-vmm"), emulator: other };
        QemuVmm::new(parts, Accel::Tcg, limit)
    }

    fn plan(&self) -> BoxPlan {
        BoxPlan {
            id: a3s_box_core::BoxId::from_random([1; 32]),
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

    async fn fail(&self, limit: Duration) -> LaunchError {
        let error = self.vmm(limit).launch(&self.plan()).await.err().expect("the launch must fail");
        self.assert_nothing_runs().await;
        error
    }

    /// The processes of a launch have the fixture's directory in their arguments. One that was killed may need a
    /// moment to be gone.
    async fn assert_nothing_runs(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while let Some(process) = running(self.dir.path()) {
            assert!(Instant::now() < deadline, "{process} was left");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn running(dir: &Path) -> Option<String> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()))
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .map(|cmdline| String::from_utf8_lossy(&cmdline).replace('\0', " "))
        .find(|cmdline| cmdline.contains(&*dir.to_string_lossy()))
}

#[tokio::test]
async fn one_that_ends_early_is_quoted() {
    let fixture = Fixture::new("echo 'out of luck' >&2; exit 3");
    let error = fixture.fail(Duration::from_secs(20)).await;
    assert!(matches!(error, LaunchError::EndedEarly { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("exit status: 3") && text.contains("out of luck"), "{text}");
}

#[tokio::test]
async fn a_reported_failure_is_the_error() {
    let fixture =
        Fixture::new(r#"echo '{"failed":{"message":"mount proc: Operation not permitted"}}'; exit 71"#);
    let text = fixture.fail(Duration::from_secs(20)).await.to_string();
    assert!(text.contains("mount proc: Operation not permitted"), "{text}");
}

#[tokio::test]
async fn one_that_hangs_is_ended_at_the_limit() {
    let fixture = Fixture::new("echo waiting >&2; exec sleep 600");
    let started = Instant::now();
    let error = fixture.fail(Duration::from_millis(300)).await;
    assert!(started.elapsed() < Duration::from_secs(5));
    assert!(
        matches!(&error, LaunchError::Timeout { last_words, .. } if last_words.contains("waiting")),
        "{error}"
    );
}

#[tokio::test]
async fn one_that_vanishes_after_it_was_started_is_an_error() {
    let script = r#"exec 3>&1
        (sleep 600 >/dev/null 2>&1 3>&- & echo "{\"started\":{\"pid\":$!,\"start_ticks\":1}}" >&3)
        exit 0"#;
    let fixture = Fixture::new(script);
    let error = fixture.fail(Duration::from_secs(20)).await;
    assert!(matches!(error, LaunchError::EndedEarly { .. }), "{error:?}");
}

#[tokio::test]
async fn garbage_instead_of_a_report_is_an_error() {
    let fixture = Fixture::new("echo hello; exec sleep 600");
    assert!(matches!(fixture.fail(Duration::from_secs(20)).await, LaunchError::EndedEarly { .. }));
}

/// The deadline of whoever asked passes and the future is dropped.
#[tokio::test]
async fn a_launch_that_nobody_waits_for_any_more_leaves_nothing() {
    let fixture = Fixture::new("exec sleep 600 # $2");
    let (vmm, plan) = (fixture.vmm(Duration::from_secs(60)), fixture.plan());
    let launched = tokio::time::timeout(Duration::from_millis(300), vmm.launch(&plan)).await;
    assert!(launched.is_err());
    fixture.assert_nothing_runs().await;
}

#[tokio::test]
async fn a_missing_kernel_is_named_and_nothing_is_started() {
    let fixture = Fixture::new("exit 0");
    std::fs::remove_file(fixture.path("kernel")).unwrap();
    let error = fixture.fail(Duration::from_secs(20)).await;
    assert!(matches!(&error, LaunchError::MissingPart { what: "the guest kernel", .. }), "{error}");
}

#[tokio::test]
async fn a_box_directory_that_does_not_exist_is_named() {
    let fixture = Fixture::new("exit 0");
    std::fs::remove_dir(fixture.path("box")).unwrap();
    let text = fixture.fail(Duration::from_secs(20)).await.to_string();
    assert!(text.contains("could not create") && text.contains("box/vsock"), "{text}");
}
