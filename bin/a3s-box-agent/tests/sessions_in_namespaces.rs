//! Sessions on this machine's kernel: everything that the agent does for a container except the machine around
//! it. Needs root.

mod common;

use std::fs;
use std::path::Path;

use a3s_box_agent::paths;
use a3s_box_agent::session::SessionError;
use a3s_box_protocol::proto::stream_open::Kind;
use a3s_box_protocol::proto::{
    CgroupSetting, CreateSessionRequest, EtcFile, ExecRequest, Mount, PodVolumePart, Resources, Rlimit,
    Rootfs, User, mount,
};
use common::{image, in_a_box, process, session, shell, volume};
use tokio::io::AsyncWriteExt;

#[test]
fn a_session_sees_its_own_root_and_processes_only() {
    in_a_box(|b| async move {
        let seen = b
            .run(shell(
                "view",
                "ls /; ls /run 2>&1; ps | wc -l; grep ^0 /proc/self/cgroup; echo oops >&2; exit 7",
            ))
            .await;
        assert_eq!(seen.code, 7);
        assert_eq!(seen.stderr, "oops\n");
        assert_eq!(seen.stdout, "bin\ndev\nproc\nsys\nls: /run: No such file or directory\n4\n0::/\n");
    });
}

#[test]
fn what_is_deleted_leaves_nothing_behind() {
    in_a_box(|b| async move {
        let mounts = || {
            let all = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            all.lines().filter(|l| l.contains(paths::RUN)).map(str::to_owned).collect::<Vec<_>>()
        };
        let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
        // The first of everything opens what is kept for good.
        b.table.create(session("first", &["sleep", "1000"])).await.unwrap();
        b.table.start("first").await.unwrap();
        b.exec("first", "first", process(&["true"])).await;
        b.table.delete("first").await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        let before = (mounts(), descriptors());
        for round in 0..5 {
            let id = format!("round{round}");
            b.table.create(shell(&id, "echo kept > /file; sleep 1000")).await.unwrap();
            b.table.start(&id).await.unwrap();
            for exec in 0..5 {
                let outcome = b.exec(&id, &format!("{id}-{exec}"), process(&["echo", "hello"])).await;
                assert_eq!((outcome.code, outcome.stdout.as_str()), (0, "hello\n"));
            }
            b.table.delete(&id).await.unwrap();
            b.table.delete(&id).await.unwrap();
        }
        // Connections and pumps end in tasks of their own.
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        assert_eq!((mounts(), descriptors()), before);
        let left =
            |path: &str| fs::read_dir(path).unwrap().filter(|e| e.as_ref().unwrap().path().is_dir()).count();
        assert_eq!([left(paths::SESSIONS), left(paths::TRASH), left(paths::POD_CGROUP)], [0, 0, 0]);
    });
}

#[test]
fn a_missing_program_fails_the_start_and_ends_the_session() {
    in_a_box(|b| async move {
        b.table.create(session("missing", &["no-such-program"])).await.unwrap();
        let error = b.table.start("missing").await.unwrap_err();
        assert_eq!(error.to_string(), "exec: \"no-such-program\": executable file not found in $PATH");
        assert_eq!(b.table.wait("missing").await.unwrap().exit.code, 128);
        assert!(matches!(b.table.start("missing").await, Err(SessionError::Phase { .. })));
        b.table.delete("missing").await.unwrap();
    });
}

#[test]
fn a_session_that_cannot_be_made_holds_nothing_and_may_be_tried_again() {
    in_a_box(|b| async move {
        type Spoil = Box<dyn Fn(&mut CreateSessionRequest)>;
        let cases: [(&str, Spoil); 9] = [
            (
                "does not exist in this guest",
                Box::new(|r| {
                    let settings = vec![CgroupSetting { file: "memory.nope".into(), value: "1".into() }];
                    r.resources = Some(Resources { settings });
                }),
            ),
            (
                "mount its EROFS file",
                Box::new(|r| {
                    r.rootfs = Some(Rootfs { layers: vec!["absent.erofs".into()], readonly: false });
                }),
            ),
            (
                "plain file name",
                Box::new(|r| {
                    r.rootfs = Some(Rootfs { layers: vec!["../pod/bin".into()], readonly: false });
                }),
            ),
            (
                "user \"ghost\"",
                Box::new(|r| {
                    r.process.as_mut().unwrap().user = Some(User { user: "ghost".into(), ..User::default() });
                }),
            ),
            ("open the volume", Box::new(|r| r.mounts.push(volume("../images", "/images")))),
            (
                "mount at /model: the image has no \"weights/v2\"",
                Box::new(|r| r.mounts.push(image(&[], "weights/v2", "/model"))),
            ),
            ("mount its EROFS file", Box::new(|r| r.mounts.push(image(&["absent.erofs"], "", "/model")))),
            (
                "working directory \"/dev/null\"",
                Box::new(|r| r.process.as_mut().unwrap().cwd = "/dev/null".into()),
            ),
            ("is not NAME=value", Box::new(|r| r.process.as_mut().unwrap().env = vec!["=x".into()])),
        ];
        for (text, spoil) in cases {
            let mut request = session("spoilt", &["true"]);
            spoil(&mut request);
            let error = b.table.create(request).await.unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
            assert_eq!(b.table.list().len(), 0);
            assert!(!Path::new(paths::POD_CGROUP).join("spoilt").exists());
            assert!(!paths::session_dir("spoilt").exists());
        }
        assert_eq!(b.run(session("spoilt", &["true"])).await.code, 0);
    });
}

#[test]
fn a_process_is_who_and_what_it_should_be() {
    in_a_box(|b| async move {
        let mut request = shell(
            "who",
            "id -u; id -g; id -G; pwd; echo $A $HOME; grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status; \
             cat /proc/self/limits | grep 'open files'; echo again > /dev/stdout",
        );
        let wanted = request.process.as_mut().unwrap();
        wanted.user = Some(User {
            user: "1000".into(),
            group: Some(50),
            supplemental_groups: vec![7],
            strict_groups: false,
        });
        wanted.cwd = "/made/here".into();
        wanted.env = vec!["A=first".into(), "A=last".into()];
        wanted.rlimits = vec![Rlimit { name: "RLIMIT_NOFILE".into(), soft: 100, hard: 200 }];
        wanted.no_new_privileges = true;
        wanted.capabilities.as_mut().unwrap().bounding = 1;
        let outcome = b.run(request).await;
        let lines: Vec<String> =
            outcome.stdout.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            lines,
            [
                "1000",
                "50",
                "50 7",
                "/made/here",
                "last /",
                "CapEff: 0000000000000000",
                "CapBnd: 0000000000000001",
                "NoNewPrivs: 1",
                "Max open files 100 200 files",
                "again"
            ]
        );
    });
}

#[test]
fn a_seccomp_filter_is_installed_with_and_without_no_new_privs() {
    in_a_box(|b| async move {
        // if nr == mkdir { return EPERM } return ALLOW
        let filter: [(u16, u8, u8, u32); 4] =
            [(0x20, 0, 0, 0), (0x15, 0, 1, 83), (0x06, 0, 0, 0x0005_0001), (0x06, 0, 0, 0x7fff_0000)];
        let bytes: Vec<u8> = filter
            .iter()
            .flat_map(|(code, jt, jf, k)| {
                let mut i = code.to_le_bytes().to_vec();
                i.extend([*jt, *jf]);
                i.extend(k.to_le_bytes());
                i
            })
            .collect();
        for no_new_privileges in [false, true] {
            let mut request = shell("filtered", "busybox mkdir /new 2>&1; grep Seccomp: /proc/self/status");
            let wanted = request.process.as_mut().unwrap();
            wanted.seccomp_bpf = bytes.clone();
            wanted.no_new_privileges = no_new_privileges;
            let outcome = b.run(request).await;
            assert!(outcome.stdout.contains("Operation not permitted"), "{outcome:?}");
            assert!(outcome.stdout.contains("Seccomp:\t2"), "{outcome:?}");
        }
    });
}

#[test]
fn devices_that_a_session_was_not_given_cannot_be_opened() {
    in_a_box(|b| async move {
        // Character device 10:237 is the loop driver's; whether this kernel has it is another question.
        let foreign = "busybox mknod /foreign c 10 237 && busybox head -c 0 /foreign;";
        let given = "cat /dev/null /dev/tty; echo x > /dev/full; busybox head -c 4 /dev/zero | wc -c";
        let outcome = b.run(shell("confined", &format!("{foreign} {given}"))).await;
        assert!(outcome.stderr.contains("/foreign: Operation not permitted"), "{outcome:?}");
        assert!(
            outcome.stderr.contains("No such device or address"),
            "the tty is absent, not forbidden: {outcome:?}"
        );
        assert!(outcome.stderr.contains("No space left"), "{outcome:?}");
        assert_eq!(outcome.stdout, "4\n");
        let mut request = shell("trusted", foreign);
        request.privileged = true;
        let outcome = b.run(request).await;
        assert!(!outcome.stderr.contains("not permitted"), "{outcome:?}");
    });
}

#[test]
fn paths_are_masked_and_sealed_and_files_given() {
    in_a_box(|b| async move {
        let mut request = shell(
            "sealed",
            "cat /proc/version | wc -c; ls /proc/irq | wc -l; echo 1 > /proc/sys/kernel/pid_max; touch /new; \
             touch /tmpfs/new && echo can; cat /etc/resolv.conf; echo '#!/bin/sh' > /tmpfs/x; touch /bin/new",
        );
        request.masked_paths = vec!["/proc/version".into(), "/proc/irq".into(), "/proc/not-there".into()];
        request.readonly_paths = vec!["/proc/sys".into(), "/not/there".into()];
        request.rootfs = Some(Rootfs { layers: Vec::new(), readonly: true });
        request.mounts[0].readonly = true;
        request.mounts.push(Mount {
            target: "/tmpfs".into(),
            source: Some(mount::Source::TmpfsBytes(1 << 20)),
            readonly: false,
            options: vec!["noexec".into()],
        });
        request.etc_files =
            vec![EtcFile { path: "/etc/resolv.conf".into(), content: b"nameserver 192.0.2.1\n".to_vec() }];
        let outcome = b.run(request).await;
        assert_eq!(outcome.stdout, "0\n0\ncan\nnameserver 192.0.2.1\n");
        assert_eq!(outcome.stderr.matches("Read-only file system").count(), 3, "{outcome:?}");
    });
}

/// Guards: a session's stage walked into the volume in its own mount namespace, which on the share of a box makes a file system
/// for each session; and a mount that the agent kept would keep the volume in use on the host.
#[test]
fn sessions_show_the_agents_own_mount_of_a_volume_which_goes_with_the_last_of_them() {
    in_a_box(|b| async move {
        let shared = Path::new(paths::VOLUMES).join("shared");
        fs::create_dir(&shared).unwrap();
        rustix::mount::mount("tmpfs", &shared, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
        fs::create_dir_all(shared.join("part/deep")).unwrap();
        std::os::unix::fs::symlink("part", shared.join("link")).unwrap();
        let part = |sub_path: &str| Mount {
            source: Some(mount::Source::PodVolumePart(PodVolumePart {
                name: "shared".to_owned(),
                sub_path: sub_path.to_owned(),
            })),
            ..volume("", "/part")
        };
        let mounted =
            || fs::read_to_string("/proc/thread-self/mountinfo").unwrap().contains("/share/pod/shared ");
        for (id, mount) in [("one", volume("shared", "/whole")), ("two", part("part/deep"))] {
            let mut request = shell(id, "touch /whole/part/deep/file; ls /part; sleep 60");
            request.mounts.push(mount);
            b.table.create(request).await.unwrap();
        }
        b.table.start("one").await.unwrap();
        while !shared.join("part/deep/file").exists() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        b.table.delete("one").await.unwrap();
        assert!(mounted());
        b.table.start("two").await.unwrap();
        let seen = b.exec("two", "ls", process(&["ls", "/part"])).await;
        assert_eq!(seen.stdout, "file\n");
        for leading_away in ["link/deep", "../shared/part", "missing"] {
            let mut request = session("bad", &["true"]);
            request.mounts.push(part(leading_away));
            let error = b.table.create(request).await.unwrap_err().to_string();
            assert!(error.contains("open the part of the volume"), "{leading_away}: {error}");
        }
        assert!(mounted());
        b.table.delete("two").await.unwrap();
        assert!(!mounted());
    });
}

#[test]
fn mount_points_cannot_lead_out_of_the_root() {
    in_a_box(|b| async move {
        let evil = Path::new(paths::VOLUMES).join("evil");
        fs::create_dir(&evil).unwrap();
        std::os::unix::fs::symlink("../../../../../../run/a3s", evil.join("out")).unwrap();
        std::os::unix::fs::symlink(paths::RUN, evil.join("absolute")).unwrap();
        let mut request = shell("contained", "ls /run/a3s");
        request.mounts.push(volume("evil", "/evil"));
        request.mounts.push(volume("bin", "/evil/out/stolen"));
        request.mounts.push(volume("bin", "/evil/absolute/too"));
        let outcome = b.run(request).await;
        // The links led to the session's own /run/a3s, which was made there.
        assert_eq!(outcome.stdout, "stolen\ntoo\n");
        assert!(!Path::new(paths::RUN).join("stolen").exists());
        // A link in the volumes is no volume.
        std::os::unix::fs::symlink("/etc", Path::new(paths::VOLUMES).join("link")).unwrap();
        let mut request = session("linked", &["true"]);
        request.mounts.push(volume("link", "/mnt"));
        assert!(b.table.create(request).await.unwrap_err().to_string().contains("open the volume"));
    });
}

/// Mounts were made in the order of the request: `/data/sub` before `/data` was hidden by it, and the container saw an
/// empty directory of the outer volume in its place.
#[test]
fn a_mount_below_another_is_seen_whatever_their_order() {
    in_a_box(|b| async move {
        for name in ["outer", "inner"] {
            let volume = Path::new(paths::VOLUMES).join(name);
            fs::create_dir(&volume).unwrap();
            fs::write(volume.join("who"), name).unwrap();
        }
        let script = "cat /data/who /data/sub/who /run/who /run/sub/who";
        let mut request = shell("nested", script);
        request.mounts.extend([
            volume("inner", "/data/sub"),
            volume("outer", "/data"),
            volume("inner", "/run/./sub"),
            volume("outer", "/run"),
        ]);
        let seen = b.run(request).await;
        assert_eq!((seen.stdout.as_str(), seen.stderr.as_str()), ("outerinnerouterinner", ""));
        // Of two at one place the later one is seen.
        let mut request = shell("twice", "cat /data/who");
        request.mounts.extend([volume("outer", "/data"), volume("inner", "/data")]);
        assert_eq!(b.run(request).await.stdout, "inner");
    });
}

#[test]
fn an_exec_joins_and_says_how_it_ended() {
    in_a_box(|b| async move {
        b.table
            .create(shell("host", "trap 'exit 3' TERM; echo up; while :; do sleep 0.05; done"))
            .await
            .unwrap();
        let early =
            ExecRequest { session_id: "host".into(), exec_id: "early".into(), ..ExecRequest::default() };
        assert!(matches!(b.table.start_exec(early).await, Err(SessionError::Phase { .. })));
        b.table.start("host").await.unwrap();
        let outcome = b
            .exec(
                "host",
                "one",
                process(&["sh", "-c", "ps | grep -c sh; grep ^0 /proc/self/cgroup; kill -9 $$"]),
            )
            .await;
        assert_eq!((outcome.code, outcome.stdout.lines().last()), (137, Some("0::/")));
        let missing = ExecRequest {
            session_id: "host".into(),
            exec_id: "two".into(),
            process: Some(process(&["/no/such"])),
            stdin: false,
        };
        let error = b.table.start_exec(missing).await.unwrap_err();
        assert_eq!(error.to_string(), "exec: \"/no/such\": no such file or directory");
        // A child that keeps the pipes does not keep the answer.
        let outcome = b.exec("host", "three", process(&["sh", "-c", "sleep 1000 & echo done"])).await;
        assert_eq!((outcome.code, outcome.stdout.as_str()), (0, "done\n"));
        b.table.signal("host", libc::SIGTERM, false).unwrap();
        assert_eq!(b.table.wait("host").await.unwrap().exit.code, 3);
        assert!(matches!(b.table.signal("host", libc::SIGTERM, false), Err(SessionError::Ended(_))));
        b.table.delete("host").await.unwrap();
    });
}

/// A probe that ran into its limit left what its shell had started, once more with every probe.
#[test]
fn who_is_killed_takes_along_what_it_has_started() {
    in_a_box(|b| async move {
        b.table.create(session("probed", &["sleep", "1000"])).await.unwrap();
        b.table.start("probed").await.unwrap();
        let script = "sleep 2001 & setsid sleep 2002 & (sleep 2003 & sleep 2004; true); true";
        let request = ExecRequest {
            session_id: "probed".into(),
            exec_id: "probe".into(),
            process: Some(process(&["sh", "-c", script])),
            stdin: false,
        };
        b.table.start_exec(request).await.unwrap();
        let running = async |exec: &str| b.exec("probed", exec, process(&["ps"])).await.stdout;
        while running("look").await.matches("sleep 200").count() < 4 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        b.table.signal_exec("probe", libc::SIGKILL, true).unwrap();
        let (exit, _) = b.table.wait_exec("probe").await.unwrap();
        assert_eq!(exit.signal, libc::SIGKILL);
        b.table.signal_exec("probe", libc::SIGKILL, true).ok();
        let left = running("look again").await;
        assert!(!left.contains("sleep 200") && left.contains("sleep 1000"), "{left}");
        b.table.delete("probed").await.unwrap();
    });
}

#[test]
fn stdin_ends_when_the_host_says_so() {
    in_a_box(|b| async move {
        let mut request = shell("stdin", "cat | wc -c; echo end");
        request.stdin = true;
        b.table.create(request).await.unwrap();
        b.table.start("stdin").await.unwrap();
        let (mut input, accept) = b.open("stdin", "", Kind::Stdin, 0).await;
        assert_eq!(accept.error, "");
        input.write_all(&vec![b'x'; 300_000]).await.unwrap();
        input.shutdown().await.unwrap();
        assert_eq!(b.read("stdin", "", Kind::Stdout).await, "300000\nend\n");
        b.table.delete("stdin").await.unwrap();
    });
}

#[test]
fn an_exec_into_a_session_that_dies_is_told_so() {
    in_a_box(|b| async move {
        for round in 0..10 {
            let id = format!("dying{round}");
            b.table.create(session(&id, &["sleep", "1000"])).await.unwrap();
            b.table.start(&id).await.unwrap();
            b.table.signal(&id, libc::SIGKILL, false).unwrap();
            let request = ExecRequest {
                session_id: id.clone(),
                exec_id: id.clone(),
                process: Some(process(&["true"])),
                stdin: false,
            };
            match b.table.start_exec(request).await {
                // It may have been faster than the signal.
                Ok(_) | Err(SessionError::Phase { phase: "has ended", .. }) => {}
                Err(other) => panic!("{other}"),
            }
            b.table.delete(&id).await.unwrap();
        }
    });
}

#[test]
fn a_program_may_have_fewer_descriptors_than_its_set_up_needs() {
    in_a_box(|b| async move {
        let mut request = session("few", &["echo", "enough"]);
        request.process.as_mut().unwrap().rlimits =
            vec![Rlimit { name: "RLIMIT_NOFILE".into(), soft: 3, hard: 3 }];
        assert_eq!(b.run(request.clone()).await.stdout, "enough\n");
        request.process.as_mut().unwrap().rlimits[0].soft = 4;
        let error = b.table.create(request).await.unwrap_err();
        assert_eq!(error.to_string(), "rlimit RLIMIT_NOFILE: the soft limit 4 is above the hard limit 3");
    });
}

#[test]
fn a_terminal_is_the_sessions_own() {
    in_a_box(|b| async move {
        let mut request = shell("tty", "tty; stty size; test -t 2 && echo yes; echo console > /dev/console");
        let wanted = request.process.as_mut().unwrap();
        (wanted.terminal, wanted.rows, wanted.columns) = (true, 24, 80);
        b.table.create(request).await.unwrap();
        let live = b.table.session("tty").unwrap().live().unwrap();
        assert!(live.stdio.resize(50, 132).unwrap());
        b.table.start("tty").await.unwrap();
        assert_eq!(b.read("tty", "", Kind::Stdout).await, "/dev/pts/0\r\n50 132\r\nyes\r\nconsole\r\n");
        let (_, accept) = b.open("tty", "", Kind::Stderr, 0).await;
        assert_eq!(accept.error, "the process has no Stderr stream");
        b.table.delete("tty").await.unwrap();
    });
}

#[test]
fn a_repeated_create_is_the_same_session_and_another_is_refused() {
    in_a_box(|b| async move {
        let request = session("once", &["true"]);
        let (first, second) = tokio::join!(b.table.create(request.clone()), b.table.create(request));
        first.unwrap();
        second.unwrap();
        assert_eq!(b.table.list().len(), 1);
        assert!(matches!(b.table.create(session("once", &["false"])).await, Err(SessionError::Exists(_))));
        let (one, two) = tokio::join!(b.table.start("once"), b.table.start("once"));
        assert!(one.is_ok() != two.is_ok());
        b.table.delete("once").await.unwrap();
    });
}

#[test]
fn a_session_that_was_never_started_can_be_killed_and_deleted() {
    in_a_box(|b| async move {
        b.table.create(session("idle", &["true"])).await.unwrap();
        b.table.signal("idle", libc::SIGKILL, false).unwrap();
        assert_eq!(b.table.wait("idle").await.unwrap().exit.signal, libc::SIGKILL);
        b.table.delete("idle").await.unwrap();
        b.table.create(session("idle", &["true"])).await.unwrap();
        b.table.delete("idle").await.unwrap();
    });
}

#[test]
fn an_image_volume_cannot_be_written_even_if_the_host_forgets_to_say_so() {
    in_a_box(|b| async move {
        let mut request = shell("reader", "ls /model && touch /model/file");
        request.mounts.push(image(&[], "", "/model"));
        let seen = b.run(request).await;
        assert_ne!(seen.code, 0);
        assert_eq!(seen.stdout, "");
        assert!(seen.stderr.contains("Read-only file system"), "{}", seen.stderr);
        // The volume's root is its own: a sub path leads nowhere above it.
        let mut request = shell("looker", "ls /above /root");
        request.mounts.push(image(&[], "../..", "/above"));
        request.mounts.push(image(&[], "/", "/root"));
        assert_eq!(b.run(request).await.stdout, "/above:\n\n/root:\n");
    });
}
