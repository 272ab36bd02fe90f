//! `a3s-box run -d`, `ps`, `exec`, `attach`, `cp`, `logs`, `port-forward`, `stop` and `rm`, as people use them.

use std::fs;
use std::net::SocketAddr;
use std::process::{Output, Stdio};
use std::time::Duration;

use a3s_box_cri::proto::ContainerConfig;
use a3s_box_e2e::terminal::Terminal;
use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::suite::{Suite, launch, logged};

/// The longest for one invocation.
const LIMIT: Duration = Duration::from_secs(60);

/// `a3s-box` with the daemon's configuration, through which it finds the daemon.
fn a3s_box(suite: &Suite, arguments: &[&str]) -> Command {
    let mut command = Command::new(suite.layout().cli());
    command.arg("--config").arg(suite.state().join("config.toml")).args(arguments);
    command
}

fn at_a_terminal(suite: &Suite, arguments: &[&str], rows: u16, columns: u16) -> Result<Terminal> {
    Terminal::start(&a3s_box(suite, arguments), rows, columns)
}

/// Runs to the end.
async fn ended(suite: &Suite, arguments: &[&str]) -> Result<Output> {
    let mut command = a3s_box(suite, arguments);
    let output = tokio::time::timeout(LIMIT, command.stdin(Stdio::null()).kill_on_drop(true).output());
    Ok(output.await.with_context(|| format!("{arguments:?} does not end"))??)
}

/// Runs to the end, successfully; its stdout.
async fn finish(suite: &Suite, arguments: &[&str]) -> Result<String> {
    let output = ended(suite, arguments).await?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{arguments:?} ended with {}: {words}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

pub(crate) async fn a_shell_at_a_terminal_feels_as_at_home(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("terminal")?;
    let pod = client.run_pod(&config).await?;
    let shell = ContainerConfig { stdin: true, tty: true, ..suite.script("shell", "exec sh") };
    let container = launch(&mut client, &pod, shell, &config).await?;

    let mut terminal = at_a_terminal(suite, &["exec", "-it", &container, "sh"], 33, 101)?;
    // A size arrives beside the keys: ask until it is there.
    terminal.keys("until stty size | grep '33 101'; do sleep 0.1; done\r")?;
    terminal.until("\n33 101").await?;
    terminal.resize(40, 120)?;
    terminal.keys("until stty size | grep '40 120'; do sleep 0.1; done\r")?;
    terminal.until("\n40 120").await?;
    // Ctrl-C ends the job in the foreground and neither the shell nor us. The job itself says that it is there:
    // a key between a word of the shell and the shell's fork would reach the shell alone.
    terminal.keys("sh -c 'echo begin; exec sleep 1000'\r")?;
    terminal.until("\nbegin").await?;
    terminal.keys("\x03")?;
    terminal.keys("echo the-shell-$((40+2))\r")?;
    terminal.until("the-shell-42").await?;
    terminal.keys("exit 9\r")?;
    let status = terminal.end().await?;
    ensure!(status.code() == Some(9), "{status}");

    let mut terminal = at_a_terminal(suite, &["attach", "-it", &container], 25, 90)?;
    terminal.keys("until stty size | grep '25 90'; do sleep 0.1; done\r")?;
    terminal.until("\n25 90").await?;
    // Ctrl-P Ctrl-Q leaves.
    terminal.keys("\x10\x11")?;
    let status = terminal.end().await?;
    ensure!(status.success(), "{status}");
    let mut terminal = at_a_terminal(suite, &["attach", "-it", &container], 25, 90)?;
    terminal.keys("echo again-$((40+2)); exit 4\r")?;
    terminal.until("again-42").await?;
    let status = terminal.end().await?;
    ensure!(status.code() == Some(4), "the container's own code: {status}");
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn files_are_copied_both_ways(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("copies")?;
    let pod = client.run_pod(&config).await?;
    let container = launch(&mut client, &pod, suite.script("main", "sleep 3600"), &config).await?;
    let folder = suite.settings().logs().join("copied");
    fs::create_dir_all(folder.join("sent/below"))?;
    let bytes: Vec<u8> = (0..1_000_000).map(|i: u32| (i % 247) as u8).collect();
    fs::write(folder.join("sent/below/file"), &bytes)?;
    let path = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let inside = format!("{container}:/tmp");
    finish(suite, &["cp", &path("sent"), &inside]).await?;
    finish(suite, &["cp", &format!("{inside}/sent/below/file"), &path("back")]).await?;
    ensure!(fs::read(folder.join("back"))? == bytes, "other bytes came back");
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn logs_are_cut_and_followed_to_the_containers_end(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("followed-logs")?;
    let pod = client.run_pod(&config).await?;
    let script = "seq 5; until test -e /tmp/go; do sleep 0.1; done; echo last";
    let container = launch(&mut client, &pod, suite.script("main", script), &config).await?;
    logged(&config, "main", "5").await?;
    let tail = finish(suite, &["logs", "--tail", "2", &container]).await?;
    ensure!(tail == "4\n5\n", "{tail:?}");
    let recent = finish(suite, &["logs", "--since", "1h", &container]).await?;
    ensure!(recent == "1\n2\n3\n4\n5\n", "{recent:?}");
    let future = finish(suite, &["logs", "--since", "2999-01-01T00:00:00Z", &container]).await?;
    ensure!(future.is_empty(), "{future:?}");
    let go = async {
        client.exec(&container, &["touch", "/tmp/go"], 30).await?;
        anyhow::Ok(())
    };
    let follow = ["logs", "-f", "--tail", "1", &container];
    let (followed, ()) = tokio::try_join!(finish(suite, &follow), go)?;
    // It may have begun when the last line was there.
    ensure!(followed == "5\nlast\n" || followed == "last\n", "{followed:?}");
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn ports_are_forwarded_to_this_machine(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("forwarded")?;
    let pod = client.run_pod(&config).await?;
    let script = "mkdir -p /srv; echo the page > /srv/page; \
                  httpd -p 127.0.0.1:8080 -h /srv && echo serving; sleep 3600";
    launch(&mut client, &pod, suite.script("server", script), &config).await?;
    logged(&config, "server", "serving").await?;
    let mut command = a3s_box(suite, &["port-forward", &pod, "0:8080"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout is a pipe")?).lines();
    let first = tokio::time::timeout(LIMIT, lines.next_line()).await??.context("it says nothing")?;
    let address = first.strip_prefix("Forwarding from ").and_then(|rest| rest.strip_suffix(" -> 8080"));
    let address: SocketAddr = address.with_context(|| first.clone())?.parse()?;
    for _ in 0..3 {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"GET /page HTTP/1.0\r\n\r\n").await?;
        let mut answer = String::new();
        tokio::time::timeout(LIMIT, stream.read_to_string(&mut answer)).await??;
        ensure!(answer.starts_with("HTTP/1.") && answer.ends_with("the page\n"), "{answer:?}");
    }
    child.kill().await?;
    client.remove_pod(&pod).await?;
    Ok(())
}

/// What a command that must fail says.
async fn refusal(suite: &Suite, arguments: &[&str]) -> Result<String> {
    let output = ended(suite, arguments).await?;
    ensure!(!output.status.success(), "{arguments:?} succeeded: {output:?}");
    Ok(String::from_utf8(output.stderr)?)
}

pub(crate) async fn a_detached_command_is_listed_entered_stopped_and_removed(suite: &Suite) -> Result<()> {
    let script = "echo $WORD; trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done";
    let volume = suite.state().join("detached-volume");
    fs::create_dir_all(&volume)?;
    fs::write(volume.join("file"), "of the host\n")?;
    let shown = format!("{}:/shown:ro", volume.display());
    let run = ["run", "-d", "--name", "web", "-e", "WORD=hello", "-u", "1000", "-v", &shown, suite.shell()];
    let id = finish(suite, &[&run[..], &["--", script]].concat()).await?.trim().to_owned();
    let taken = refusal(suite, &run).await?;
    ensure!(taken.contains("the name web is taken"), "{taken}");
    ensure!(finish(suite, &["ps", "-q"]).await?.contains(&id));

    a3s_box_e2e::wait::until("the command's first words", LIMIT, || async {
        Ok((finish(suite, &["logs", "web"]).await? == "hello\nup\n").then_some(()))
    })
    .await?;
    let inside =
        finish(suite, &["exec", "web", "--", "sh", "-c", "id -u; hostname; cat /shown/file"]).await?;
    ensure!(inside == "1000\nweb\nof the host\n", "{inside}");
    let runs = refusal(suite, &["rm", "web"]).await?;
    ensure!(runs.contains("still runs") && runs.contains("a3s-box stop web"), "{runs}");
    finish(suite, &["stop", "web"]).await?;
    let words = finish(suite, &["logs", "web"]).await?;
    ensure!(words == "hello\nup\nbye\n", "{words}");
    ensure!(!finish(suite, &["ps", "-q"]).await?.contains(&id));
    let listed = finish(suite, &["ps", "-a"]).await?;
    ensure!(listed.lines().any(|line| line.contains("web") && line.contains("exited")), "{listed}");
    finish(suite, &["rm", &id]).await?;
    ensure!(!finish(suite, &["ps", "-a", "-q"]).await?.contains(&id));

    // A command that cannot start leaves no pod, and others' containers are not ours to end.
    let missing =
        refusal(suite, &["run", "-d", "--name", "bad", "--entrypoint", "/no/such", suite.shell()]).await?;
    ensure!(missing.contains("/no/such"), "{missing}");
    ensure!(!finish(suite, &["ps", "-a", "--pods"]).await?.contains("bad"));
    let mut client = suite.client()?;
    let config = suite.pod("of-kubelet")?;
    let pod = client.run_pod(&config).await?;
    let container = launch(&mut client, &pod, suite.script("main", "sleep 3600"), &config).await?;
    let not_ours = refusal(suite, &["rm", "-f", &container]).await?;
    ensure!(not_ours.contains("which `run -d` has not started"), "{not_ours}");
    client.remove_pod(&pod).await?;
    ensure!(!suite.state().join("root/detached").exists());
    Ok(())
}
