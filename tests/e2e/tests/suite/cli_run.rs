//! `a3s-box run` as people and scripts use it: streams, terminals, signals, exit codes, and what it leaves.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

use crate::suite::Suite;

const LIMIT: Duration = Duration::from_secs(120);

fn state(suite: &Suite) -> PathBuf {
    suite.state().join("cli")
}

/// `a3s-box … run --quiet` with directories apart from the daemon's.
fn command(suite: &Suite, arguments: &[&str]) -> Command {
    let mut command = Command::new(suite.layout().cli());
    command.arg("--config").arg(suite.state().join("config.toml"));
    command.arg("--root").arg(state(suite).join("root")).arg("--run-dir").arg(state(suite).join("run"));
    command.args(["run", "--quiet", "--network", "none"]).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn in_time<T, E: Into<anyhow::Error>>(what: impl Future<Output = Result<T, E>>) -> Result<T> {
    tokio::time::timeout(LIMIT, what).await.context("a3s-box did not end in time")?.map_err(Into::into)
}

/// Runs to the end: exit code, stdout, stderr.
async fn finish(suite: &Suite, arguments: &[&str]) -> Result<(Option<i32>, String, String)> {
    let output = in_time(command(suite, arguments).output()).await?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((output.status.code(), text(output.stdout), text(output.stderr)))
}

fn signal(child: &Child, signal: Signal) -> Result<()> {
    let pid = i32::try_from(child.id().context("it has ended already")?)?;
    Ok(kill(Pid::from_raw(pid), signal)?)
}

async fn ended(mut child: Child) -> Result<ExitStatus> {
    in_time(child.wait()).await
}

/// Starts a script and waits until it says `ready`.
async fn start_until_ready(suite: &Suite, script: &str) -> Result<Child> {
    until_ready(command(suite, &[suite.shell(), "--", script])).await
}

async fn until_ready(mut command: Command) -> Result<Child> {
    let mut child = command.spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout is a pipe")?).lines();
    let first = in_time(lines.next_line()).await?;
    ensure!(first.as_deref() == Some("ready"), "its first line is {first:?}");
    // The pipe stays open: a closed one would end the command.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    Ok(child)
}

/// Nothing of any invocation is left, only the lock of their directory.
fn no_invocations(suite: &Suite) -> Result<()> {
    for folder in ["run/run", "root/standalone/run"] {
        let folder = state(suite).join(folder);
        let left: Vec<_> = fs::read_dir(&folder)
            .with_context(|| format!("listing {}", folder.display()))?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<std::io::Result<_>>()?;
        ensure!(left.iter().all(|name| name == "lock"), "left in {}: {left:?}", folder.display());
    }
    Ok(())
}

pub(crate) async fn failures_to_run_have_dockers_exit_codes(suite: &Suite) -> Result<()> {
    let shell = suite.shell();
    for (arguments, code, words) in [
        (&["--entrypoint", "nonesuch", shell][..], 127, "not found"),
        (&["--entrypoint", "/etc/passwd", shell], 126, "permission denied"),
        (&["--pull", "never", "registry.invalid/none:1"], 125, "--pull never"),
        (&["--timeout", "2s", shell, "--", "sleep 1000"], 124, "--timeout"),
        (&["--memory", "12"], 125, "out of range"),
    ] {
        let (got, stdout, stderr) = finish(suite, arguments).await?;
        ensure!(got == Some(code) && stderr.contains(words), "{arguments:?}: {got:?} {stdout:?} {stderr:?}");
    }
    no_invocations(suite)
}

pub(crate) async fn stdin_a_volume_and_the_user_reach_the_command(suite: &Suite) -> Result<()> {
    let folder = state(suite).join("volume");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("in"), "from the host\n")?;
    let volumes = [format!("{}:/rw", folder.display()), format!("{}:/ro:ro", folder.display())];
    let script = "cat; cat in; id -un; pwd; touch /rw/out; touch /ro/never 2>/dev/null || echo refused";
    let mut child = command(
        suite,
        &["-i", "-v", &volumes[0], "-v", &volumes[1], "-w", "/rw", "-u", "root", suite.shell(), "--", script],
    )
    .stdin(Stdio::piped())
    .spawn()?;
    let mut stdin = child.stdin.take().context("stdin is a pipe")?;
    stdin.write_all(b"from stdin\n").await?;
    drop(stdin);
    let output = in_time(child.wait_with_output()).await?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(stdout == "from stdin\nfrom the host\nroot\n/rw\nrefused\n", "{stdout:?} {stderr:?}");
    ensure!(folder.join("out").exists() && !folder.join("never").exists(), "{stdout:?} {stderr:?}");
    Ok(())
}

/// What the host had mounted below a read-only volume could be written; and a volume that came before the one around it
/// was hidden by it.
pub(crate) async fn volumes_hide_none_of_each_other_and_read_only_ones_are_so_as_a_whole(
    suite: &Suite,
) -> Result<()> {
    let folder = state(suite).join("volumes");
    let (outer, inner, below) = (folder.join("outer"), folder.join("inner"), folder.join("outer/mounted"));
    // What is mounted in a read-only volume needs its place there, as everywhere.
    for folder in [&outer.join("sub"), &inner, &below] {
        fs::create_dir_all(folder)?;
    }
    fs::write(inner.join("who"), "inner\n")?;
    nix::mount::mount(Some("e2e"), &below, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=64k"))?;
    let volumes = [format!("{}:/data/sub", inner.display()), format!("{}:/data:ro", outer.display())];
    let script = "cat /data/sub/who; touch /data/mounted/file 2>/dev/null || echo refused; \
        touch /data/file 2>/dev/null || echo refused; grep ' /data ' /proc/mounts | cut -d ' ' -f 4 | cut -d , -f 1";
    let arguments = ["-u", "0", "-v", &volumes[0], "-v", &volumes[1], suite.shell(), "--", script];
    let outcome = finish(suite, &arguments).await;
    let written = below.join("file").exists();
    nix::mount::umount(&below)?;
    let (code, stdout, stderr) = outcome?;
    let expected = "inner\nrefused\nrefused\nro\n";
    ensure!(code == Some(0) && stdout == expected && !written, "{code:?} {stdout:?} {stderr:?}");
    Ok(())
}

/// Images whose program is not root count on both, as every other runtime gives them.
/// They were unknown: a VPN's or an init's image could not be tried with `run` at all.
pub(crate) async fn the_flags_of_dockers_users_mean_what_they_say(suite: &Suite) -> Result<()> {
    let dir = state(suite).join("long-form");
    fs::create_dir_all(&dir)?;
    let mount = format!("type=bind,src={},dst=/m,readonly", dir.display());
    let script = "hostname; nproc; for at in /t /dev/shm; do df -k $at | awk 'END { print $2 }'; done; \
                  touch /m/x 2>/dev/null || echo read-only; touch /tmp/x; chown 1 /tmp/x 2>/dev/null || echo no chown; \
                  ip link set lo mtu 1400 && echo mtu; ulimit -n; ulimit -Hn";
    let flags = [
        "--rm",
        "--hostname",
        "nest",
        "--cpus",
        "1.5",
        "--tmpfs",
        "/t:size=1m",
        "--shm-size",
        "3m",
        "-u",
        "root",
    ];
    let more = [
        "--mount",
        &mount,
        "--cap-add",
        "net_admin",
        "--cap-drop",
        "CHOWN",
        "-l",
        "a=b",
        "--ulimit",
        "nofile=100:200",
    ];
    let arguments = [&flags[..], &more, &[suite.shell(), "--", script]].concat();
    let (code, out, err) = finish(suite, &arguments).await?;
    let expected = "nest\n2\n1024\n3072\nread-only\nno chown\nmtu\n100\n200\n";
    ensure!(code == Some(0) && out == expected, "{code:?}: {out:?} {err}");

    let script = "mkdir /own && mount -t tmpfs none /own && echo mounted";
    let (_, out, err) = finish(suite, &["--privileged", "-u", "root", suite.shell(), "--", script]).await?;
    ensure!(out == "mounted\n", "{out:?} {err}");

    let (code, out, err) = finish(suite, &["-d", suite.shell(), "--", "true"]).await?;
    ensure!(
        code == Some(125) && out.is_empty() && err.contains("-d does not go with --network"),
        "{code:?}: {out} {err}"
    );
    Ok(())
}

pub(crate) async fn programs_need_not_be_root_to_listen_on_low_ports_and_to_ping(
    suite: &Suite,
) -> Result<()> {
    // busybox's own ping wants a raw socket; who may have a ping socket is a range of groups.
    let script = "nc -l -p 80 & sleep 1; kill $! && echo bound; cat /proc/sys/net/ipv4/ping_group_range";
    let (code, stdout, stderr) = finish(suite, &["-u", "1000", suite.shell(), "--", script]).await?;
    ensure!(code == Some(0) && stdout == "bound\n0\t2147483647\n", "{code:?} {stdout:?} {stderr:?}");
    Ok(())
}

pub(crate) async fn a_signal_reaches_the_command_and_the_third_one_kills_it(suite: &Suite) -> Result<()> {
    let polite = "trap 'exit 9' TERM; echo ready; while :; do sleep 1 & wait $!; done";
    let child = start_until_ready(suite, polite).await?;
    signal(&child, Signal::SIGTERM)?;
    let status = ended(child).await?;
    ensure!(status.code() == Some(9), "after SIGTERM: {status}");

    // Process 1 of a PID namespace does not get signals that it does not handle.
    let child = start_until_ready(suite, "echo ready; exec sleep 1000").await?;
    for _ in 0..3 {
        signal(&child, Signal::SIGINT)?;
        // Equal signals that are pending at once are one.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let status = ended(child).await?;
    ensure!(status.code() == Some(137), "after three times SIGINT: {status}");
    no_invocations(suite)
}

pub(crate) async fn a_run_that_was_killed_is_cleaned_up_by_the_next(suite: &Suite) -> Result<()> {
    let mut child = start_until_ready(suite, "echo ready; exec sleep 1000").await?;
    child.kill().await?;
    ensure!(no_invocations(suite).is_err(), "a killed run cannot have cleaned up");
    let (code, stdout, stderr) = finish(suite, &[suite.shell(), "--", "echo next"]).await?;
    ensure!(code == Some(0) && stdout == "next\n", "{code:?} {stdout:?} {stderr:?}");
    // That the box of the first one is gone is seen by whoever looks at the machine after each scenario.
    no_invocations(suite)
}

pub(crate) async fn several_runs_go_side_by_side(suite: &Suite) -> Result<()> {
    let arguments = |script| ["--memory", "256M", "--vcpus", "1", suite.shell(), "--", script];
    let (one, two) = (arguments("echo first; exit 1"), arguments("echo second; exit 2"));
    let (first, second) = tokio::try_join!(finish(suite, &one), finish(suite, &two))?;
    ensure!((first.0, first.1.as_str()) == (Some(1), "first\n"), "{first:?}");
    ensure!((second.0, second.1.as_str()) == (Some(2), "second\n"), "{second:?}");
    no_invocations(suite)
}

pub(crate) async fn a_terminal_has_the_users_size_and_takes_keys(suite: &Suite) -> Result<()> {
    let size = Winsize { ws_row: 33, ws_col: 111, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None)?;
    let end = |fd: &OwnedFd| -> Result<Stdio> { Ok(Stdio::from(fd.try_clone()?)) };
    let script = "read -r line; stty size; echo \"got $line\"; exit 5";
    let mut child = command(suite, &["-it", suite.shell(), "--", script])
        .stdin(end(&pty.slave)?)
        .stdout(end(&pty.slave)?)
        .stderr(end(&pty.slave)?)
        .spawn()?;
    drop(pty.slave);
    let mut master = std::fs::File::from(pty.master);
    let mut reader = master.try_clone()?;
    let seen = tokio::task::spawn_blocking(move || {
        let mut seen = Vec::new();
        // A terminal whose other end is closed answers with an error: that is the end.
        let _ = reader.read_to_end(&mut seen);
        String::from_utf8_lossy(&seen).into_owned()
    });
    // Typed while the box still boots: the terminal keeps it.
    master.write_all(b"keys\r")?;
    let status = in_time(child.wait()).await?;
    let seen = in_time(seen).await?;
    ensure!(status.code() == Some(5), "{status}: {seen:?}");
    ensure!(seen.contains("33 111\r\n") && seen.contains("got keys\r\n"), "{seen:?}");
    no_invocations(suite)
}

pub(crate) async fn output_without_a_reader_ends_the_command(suite: &Suite) -> Result<()> {
    let mut child = command(suite, &[suite.shell(), "--", "yes"]).spawn()?;
    let mut stdout = child.stdout.take().context("stdout is a pipe")?;
    let mut first = [0; 2];
    in_time(stdout.read_exact(&mut first)).await?;
    drop(stdout);
    let status = ended(child).await?;
    ensure!(&first == b"y\n" && status.code() == Some(141), "{first:?} {status}");
    no_invocations(suite)
}

/// A machine without CNI: the built-in bridge.
fn without_cni(suite: &Suite, arguments: &[&str]) -> Result<Command> {
    let (config, conf_dir) = (state(suite).join("local.toml"), state(suite).join("no-cni"));
    fs::create_dir_all(&conf_dir)?;
    let text = fs::read_to_string(suite.state().join("config.toml"))?;
    let lines = text.lines().map(|line| match line.starts_with("conf_dir = ") {
        true => format!("conf_dir = {conf_dir:?}"),
        false => line.to_owned(),
    });
    fs::write(&config, lines.collect::<Vec<_>>().join("\n"))?;
    let mut command = Command::new(suite.layout().cli());
    command.arg("--config").arg(config);
    command.arg("--root").arg(state(suite).join("root")).arg("--run-dir").arg(state(suite).join("run"));
    command.args(["run", "--quiet"]).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    Ok(command)
}

/// A port of this machine that nobody has.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// A page from a server.
pub(crate) async fn page(host: &str, port: u16) -> Result<String> {
    let mut stream = tokio::net::TcpStream::connect((host, port)).await?;
    stream.write_all(b"GET /page HTTP/1.0\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

pub(crate) async fn a_published_port_leads_into_the_box_without_cni(suite: &Suite) -> Result<()> {
    let (own, every) = (free_port()?, free_port()?);
    let (own_port, every_port) = (format!("127.0.0.1:{own}:8080"), format!("{every}:8080"));
    let script = "mkdir -p /srv; echo the page > /srv/page; httpd -p 8080 -h /srv; \
                  echo ready; ip -o addr show eth0 >&2; trap exit TERM; sleep 3600 & wait";
    let serve = ["-p", &own_port, "-p", &every_port, suite.shell(), "--", script];
    let mut server = until_ready(without_cni(suite, &serve)?).await?;
    for port in [own, every] {
        let answer = in_time(page("127.0.0.1", port)).await.with_context(|| format!("port {port}"))?;
        ensure!(answer.ends_with("the page\n"), "{answer:?}");
    }
    // A second box sees the first one, over both families, and what it publishes on the host's address.
    let mut addresses = String::new();
    let mut stderr = BufReader::new(server.stderr.take().context("stderr is a pipe")?).lines();
    while let Some(line) = in_time(stderr.next_line()).await? {
        addresses.push_str(&line);
        addresses.push('\n');
        if line.contains("inet6 fd") {
            break;
        }
    }
    let address = |family: &str| {
        let mark = format!("{family} ");
        let after = addresses.split(&mark).skip(1).filter_map(|text| text.split('/').next());
        after.map(str::to_owned).find(|ip| !ip.starts_with("fe80"))
    };
    let v4 = address("inet").with_context(|| addresses.clone())?;
    let v6 = address("inet6").with_context(|| addresses.clone())?;
    let look = format!(
        "set -e; ping -c 1 -W 5 {v4} > /dev/null; ping -6 -c 1 -W 5 {v6} > /dev/null; \
         wget -q -O - http://{v4}:8080/page; wget -q -O - 'http://[{v6}]:8080/page'; \
         gateway=$(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'); wget -q -O - http://$gateway:{every}/page"
    );
    let output = in_time(without_cni(suite, &[suite.shell(), "--", &look])?.output()).await?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(stdout == "the page\nthe page\nthe page\n", "{stdout:?} {stderr:?}");
    // The port is taken while the first box has it.
    let taken = ["-p", &own_port, suite.shell(), "--", "true"];
    let output = in_time(without_cni(suite, &taken)?.output()).await?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && stderr.contains(&own.to_string()), "{stderr:?}");

    signal(&server, Signal::SIGTERM)?;
    ended(server).await?;
    no_invocations(suite)?;
    ensure!(in_time(page("127.0.0.1", own)).await.is_err(), "the port still leads somewhere");
    let leases = fs::read_dir("/run/a3s-box/local-network/leases")?.count();
    ensure!(leases == 0, "{leases} leases are left");
    let tables = in_time(Command::new("nft").args(["list", "tables"]).output()).await?;
    let tables = String::from_utf8_lossy(&tables.stdout).into_owned();
    ensure!(!tables.contains("a3s_box"), "{tables}");
    Ok(())
}
