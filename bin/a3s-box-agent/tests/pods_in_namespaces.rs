//! What the sessions of a pod share, on this machine's kernel: processes, users, memory. Needs root.

mod common;

use std::fs;

use a3s_box_agent::sandbox;
use a3s_box_agent::session::SessionError;
use a3s_box_protocol::proto::stream_open::Kind;
use a3s_box_protocol::proto::{ConfigureSandboxRequest, IdRange, PidMode, User, UserNamespace, UserNumbers};
use common::{in_a_box, process, session, shell};

#[test]
fn pid_namespaces_are_shared_as_asked() {
    in_a_box(|b| async move {
        let pod = |id: &str, script: &str| {
            let mut request = shell(id, script);
            request.set_pid_mode(PidMode::Pod);
            request
        };
        b.table.set_init_user(UserNumbers { uid: 65_535, gid: 1001 });
        // A child that outlives the first process is killed with the session.
        b.table.create(pod("first", "sleep 1000 & sleep 0.2")).await.unwrap();
        b.table.start("first").await.unwrap();
        let second = b.run(pod("second", "ps; ls /proc/1/root 2>&1")).await;
        assert!(second.stdout.contains("/pause") && second.stdout.contains("sleep 1000"), "{second:?}");
        assert!(second.stdout.contains("Permission denied"), "{second:?}");
        b.table.wait("first").await.unwrap();
        b.table.delete("first").await.unwrap();

        // It was called "exe" and ran as root, with all capabilities.
        let process_1 =
            "cat /proc/1/comm /proc/1/cmdline; grep -E '^(Uid|Gid|Groups|CapEff|CapPrm)' /proc/1/status";
        let seen = b.run(pod("third", process_1)).await.stdout;
        let seen: Vec<&str> = seen.split_whitespace().collect();
        let expected = "pause /pause\0Uid: 65535 65535 65535 65535 Gid: 1001 1001 1001 1001 Groups: \
            CapPrm: 0000000000000000 CapEff: 0000000000000000";
        assert_eq!(seen, expected.split(' ').collect::<Vec<_>>());

        b.table.create(session("target", &["sleep", "1000"])).await.unwrap();
        b.table.start("target").await.unwrap();
        let mut request = session("debug", &["ps"]);
        request.set_pid_mode(PidMode::Target);
        request.target_session_id = "target".into();
        let seen = b.run(request).await;
        assert!(
            seen.stdout.contains("1 0        0:00 sleep 1000") || seen.stdout.contains("sleep 1000"),
            "{seen:?}"
        );
        b.table.delete("target").await.unwrap();
    });
}

#[test]
fn users_are_those_of_the_pods_user_namespace() {
    in_a_box(|b| async move {
        let range = |start| Some(IdRange { start, count: 65_536 });
        let mapping = |start| UserNamespace { uids: range(start), gids: range(start) };
        b.table.map_users(&mapping(65_536), &[], None).await.unwrap();
        b.table.map_users(&mapping(65_536), &[], None).await.unwrap();
        let other = b.table.map_users(&mapping(1_000_000), &[], None).await;
        assert!(matches!(other, Err(SessionError::OtherUsers)), "{other:?}");

        let script = "cat /proc/self/uid_map; id -u; echo x > /made; ls -nd / /dev /made /bin; \
            ls -A /work/dir; ls -l /proc/self/ns/user; echo x > /said; sleep 1000";
        let mut request = shell("main", script);
        request.process.get_or_insert_default().cwd = "/work/dir".to_owned();
        b.table.create(request).await.unwrap();
        b.table.start("main").await.unwrap();
        let script = "id -u; pwd; echo y > /work/dir/of-root; until test -e /said; do sleep 0.05; done";
        let exec = b.exec("main", "e1", process(&["sh", "-c", script])).await;
        assert_eq!((exec.code, exec.stdout.as_str(), exec.stderr.as_str()), (0, "0\n/\n", ""));
        let pid = b.table.session("main").unwrap().live().unwrap().pid.as_raw_pid();
        let outside = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(outside.contains("Uid:\t65536\t65536\t65536\t65536"), "{outside}");
        b.table.signal("main", 9, true).unwrap();
        b.table.wait("main").await.unwrap();
        let seen = b.read("main", "", Kind::Stdout).await;
        let lines: Vec<&str> = seen.lines().collect();
        assert_eq!(lines[0].split_whitespace().collect::<Vec<_>>(), ["0", "65536", "65536"]);
        assert_eq!(lines[1], "0");
        let owners: Vec<(&str, &str)> = lines[2..6]
            .iter()
            .map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                (words[2], words[words.len() - 1])
            })
            .collect();
        // The volume is the test's own root's, and is not mapped here.
        let expected = [("0", "/"), ("65534", "/bin"), ("0", "/dev"), ("0", "/made")];
        assert!(expected.iter().all(|one| owners.contains(one)), "{seen}");
        b.table.delete("main").await.unwrap();

        let mut beyond = session("beyond", &["true"]);
        let user = User { user: "70000".to_owned(), ..User::default() };
        beyond.process.get_or_insert_default().user = Some(user);
        let error = b.table.create(beyond).await.unwrap_err().to_string();
        assert_eq!(error, "user 70000 is not in the pod's user namespace, which has 0 to 65535");
    });
}

/// kubelet draws ranges from all 32 bits. devpts was told of a group by a number that it cannot read, and every pod whose
/// range began in the upper half failed for ever.
#[test]
fn a_user_namespace_may_begin_anywhere_in_32_bits() {
    in_a_box(|b| async move {
        let range = Some(IdRange { start: 4_096_786_432, count: 65_536 });
        let mapping = UserNamespace { uids: range, gids: range };
        b.table.map_users(&mapping, &[], Some("0 65535")).await.unwrap();
        b.table.set_init_user(UserNumbers { uid: 65_535, gid: 65_535 });
        let script = "id -u; ls -n $(tty); cat /proc/sys/net/ipv4/ping_group_range; grep ^Uid /proc/1/status";
        let mut request = shell("high", script);
        request.process.as_mut().unwrap().terminal = true;
        request.set_pid_mode(PidMode::Pod);
        let seen = b.run_with_terminal(request).await;
        let words: Vec<&str> = seen.split_whitespace().collect();
        assert_eq!((words[0], &words[3..5]), ("0", &["0", "5"][..]), "{seen}");
        assert!(seen.contains("0\t65535"), "{seen}");
        assert!(seen.contains("Uid:\t65535"), "{seen}");
    });
}

/// Code in /dev/shm could not be executed or mapped, unlike with other runtimes.
#[test]
fn programs_run_from_shared_memory() {
    in_a_box(|b| async move {
        sandbox::configure(&ConfigureSandboxRequest { shm_bytes: 8 << 20, ..Default::default() }).unwrap();
        let script = "cat /bin/busybox > /dev/shm/busybox; chmod 755 /dev/shm/busybox; /dev/shm/busybox echo ran; \
            grep /dev/shm /proc/mounts";
        let seen = b.run(shell("shm", script)).await;
        assert!(seen.stdout.starts_with("ran\n"), "{seen:?}");
        assert!(seen.stdout.contains("nosuid,nodev") && seen.stdout.contains("size=8192k"), "{seen:?}");
    });
}
