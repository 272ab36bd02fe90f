//! exec, attach and port-forward as kubectl's users have them.

use std::time::Duration;

use a3s_box_cri::proto::{AttachRequest, ContainerConfig, ExecRequest, PortForwardRequest};
use a3s_box_e2e::client::Client;
use a3s_box_e2e::streams::{all, forward, kind, spdy, until, websocket};
use a3s_box_streaming::spdy::{Connection, Stream};
use anyhow::{Context, Result, ensure};
use tokio::io::AsyncWriteExt;
use tonic::{Code, Status};

use crate::suite::{Suite, launch, logged};

const V4: &str = "v4.channel.k8s.io";

fn words(command: &[&str]) -> Vec<String> {
    command.iter().map(|word| (*word).to_owned()).collect()
}

async fn exec_url(client: &mut Client, request: ExecRequest) -> Result<String, Status> {
    Ok(client.runtime.exec(request).await?.into_inner().url)
}

/// stdout and stderr, and stdin if there is input.
fn piped(container: &str, command: &[&str], stdin: bool) -> ExecRequest {
    ExecRequest {
        container_id: container.to_owned(),
        cmd: words(command),
        tty: false,
        stdin,
        stdout: true,
        stderr: true,
    }
}

/// What a command printed and how it ended, over SPDY.
async fn run(
    client: &mut Client,
    container: &str,
    command: &[&str],
    input: Option<&[u8]>,
) -> Result<(Vec<u8>, Vec<u8>, String)> {
    let url = exec_url(client, piped(container, command, input.is_some())).await?;
    let mut connection = spdy(&url, V4).await?;
    let mut error = connection.open(kind("error"));
    let stdin = input.map(|bytes| (connection.open(kind("stdin")), bytes));
    let (mut out, mut err) = (connection.open(kind("stdout")), connection.open(kind("stderr")));
    let feed = async {
        let Some((mut stdin, bytes)) = stdin else { return Ok(()) };
        stdin.writer.write_all(bytes).await?;
        stdin.writer.shutdown().await?;
        anyhow::Ok(())
    };
    let ((), out, err) = tokio::try_join!(feed, all(&mut out), all(&mut err))?;
    Ok((out, err, String::from_utf8(all(&mut error).await?)?))
}

pub(crate) async fn commands_have_their_output_input_and_exit_code(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("exec-streams")?;
    let pod = client.run_pod(&config).await?;
    let container = launch(&mut client, &pod, suite.script("main", "sleep 3600"), &config).await?;

    let command = ["sh", "-c", "echo out $FROM_IMAGE; echo err >&2; exit 5"];
    let (out, err, status) = run(&mut client, &container, &command, None).await?;
    ensure!((out.as_slice(), err.as_slice()) == (b"out yes\n", b"err\n"), "{out:?} {err:?}");
    ensure!(status.contains("NonZeroExitCode") && status.contains("\"5\""), "{status}");

    let sent: Vec<u8> = (0..3 << 20).map(|i: u32| (i % 249) as u8).collect();
    let (out, _, status) = run(&mut client, &container, &["cat"], Some(&sent)).await?;
    ensure!(out == sent, "{} bytes of {} came back", out.len(), sent.len());
    ensure!(status.contains("Success"), "{status}");

    let url = exec_url(&mut client, piped(&container, &["sh", "-c", "cat; exit 3"], true)).await?;
    let channels = websocket(&url, Some(&sent)).await?;
    ensure!(channels.get(&1) == Some(&sent), "over WebSocket other bytes came back");
    let status = String::from_utf8_lossy(channels.get(&3).context("no status")?).into_owned();
    ensure!(status.contains("NonZeroExitCode") && status.contains("\"3\""), "{status}");

    let (_, _, status) = run(&mut client, &container, &["no-such-program"], None).await?;
    ensure!(status.contains("no-such-program") && status.contains("InternalError"), "{status}");

    // A command may close its outputs and still read.
    let detached = ["sh", "-c", "exec >&- 2>&-; cat > /tmp/late"];
    let (_, _, status) = run(&mut client, &container, &detached, Some(b"late words")).await?;
    ensure!(status.contains("Success"), "{status}");
    let (out, ..) = run(&mut client, &container, &["cat", "/tmp/late"], None).await?;
    ensure!(out == b"late words", "{}", String::from_utf8_lossy(&out));

    client.stop(&container, 0).await?;
    let refused = exec_url(&mut client, piped(&container, &["true"], false)).await;
    let refused = refused.err().context("exec into a dead container was accepted")?;
    ensure!(refused.code() == Code::FailedPrecondition && refused.message().contains("exited"), "{refused}");
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn a_terminal_has_a_size_and_takes_keys(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("exec-terminal")?;
    let pod = client.run_pod(&config).await?;
    let container = launch(&mut client, &pod, suite.script("main", "sleep 3600"), &config).await?;
    let request = ExecRequest { tty: true, stderr: false, ..piped(&container, &["sh"], true) };
    let mut connection = spdy(&exec_url(&mut client, request).await?, V4).await?;
    let mut error = connection.open(kind("error"));
    let (mut keys, mut screen) = (connection.open(kind("stdin")), connection.open(kind("stdout")));
    let mut resize = connection.open(kind("resize"));
    resize.writer.write_all(b"{\"Width\":0,\"Height\":0}{\"Width\":101,\"Height\":33}").await?;
    // A size arrives beside the keys: ask until it is there.
    keys.writer.write_all(b"until stty size | grep '33 101'; do sleep 0.1; done\n").await?;
    until(&mut screen, "\n33 101").await?;
    // busybox shows a size beyond 30,000 as 80: what counts is that the terminal takes the next one.
    resize.writer.write_all(b"{\"Width\":65535,\"Height\":65535}{\"Width\":120,\"Height\":44}").await?;
    keys.writer.write_all(b"until stty size | grep '44 120'; do sleep 0.1; done\n").await?;
    until(&mut screen, "\n44 120").await?;
    keys.writer.write_all(b"echo begin; sleep 1000; echo interrupted-$?\n").await?;
    until(&mut screen, "\nbegin").await?;
    keys.writer.write_all(b"\x03").await?;
    // What is typed before the shell has the terminal back may be thrown away with the interrupted program's input.
    until(&mut screen, "# ").await?;
    keys.writer.write_all(b"echo still-$((40+2))\n").await?;
    until(&mut screen, "still-42").await?;
    keys.writer.write_all(b"exit 7\n").await?;
    all(&mut screen).await?;
    let status = String::from_utf8(all(&mut error).await?)?;
    ensure!(status.contains("\"7\""), "{status}");
    client.remove_pod(&pod).await?;
    Ok(())
}

/// A client of attach: its connection, stdin and stdout.
async fn attach(
    client: &mut Client,
    container: &str,
    stdin: bool,
) -> Result<(Connection, Option<Stream>, Stream)> {
    let request =
        AttachRequest { container_id: container.to_owned(), stdin, tty: false, stdout: true, stderr: false };
    let url = client.runtime.attach(request).await?.into_inner().url;
    let mut connection = spdy(&url, V4).await?;
    let _error = connection.open(kind("error"));
    let stdin = stdin.then(|| connection.open(kind("stdin")));
    let stdout = connection.open(kind("stdout"));
    Ok((connection, stdin, stdout))
}

pub(crate) async fn several_clients_are_attached_and_their_input_ends_as_asked(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("attach")?;
    let pod = client.run_pod(&config).await?;
    let script = "while read line; do echo got $line; done; echo no more";
    let open = ContainerConfig { stdin: true, ..suite.script("open", script) };
    let open = launch(&mut client, &pod, open, &config).await?;
    let (_first, keys, mut out) = attach(&mut client, &open, true).await?;
    let mut keys = keys.context("stdin")?;
    keys.writer.write_all(b"one\n").await?;
    until(&mut out, "got one").await?;
    let (_second, second_keys, mut second_out) = attach(&mut client, &open, true).await?;
    let mut second_keys = second_keys.context("stdin")?;
    // Input that ended at one client is open for the next.
    keys.writer.shutdown().await?;
    second_keys.writer.write_all(b"two\n").await?;
    let late = until(&mut second_out, "got two").await?;
    ensure!(!late.contains("one"), "a late client sees what comes from now on: {late:?}");
    until(&mut out, "got two").await?;
    logged(&config, "open", "got two").await?;

    let once = ContainerConfig { stdin: true, stdin_once: true, ..suite.script("once", script) };
    let once = launch(&mut client, &pod, once, &config).await?;
    let (_third, keys, mut out) = attach(&mut client, &once, true).await?;
    let mut keys = keys.context("stdin")?;
    keys.writer.write_all(b"last\n").await?;
    keys.writer.shutdown().await?;
    let text = String::from_utf8(all(&mut out).await?)?;
    ensure!(text.contains("got last") && text.contains("no more"), "{text:?}");
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn ports_that_only_listen_on_loopback_are_forwarded(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("port-forward")?;
    let pod = client.run_pod(&config).await?;
    let script = "mkdir -p /srv; head -c 200000 /dev/zero | tr '\\0' x > /srv/page; \
                  httpd -p 127.0.0.1:8080 -h /srv && echo serving; sleep 3600";
    launch(&mut client, &pod, suite.script("server", script), &config).await?;
    logged(&config, "server", "serving").await?;
    let request = PortForwardRequest { pod_sandbox_id: pod.clone(), port: vec![] };
    let url = client.runtime.port_forward(request).await?.into_inner().url;
    let mut connection = spdy(&url, "portforward.k8s.io").await?;
    let (mut error, _data) = forward(&mut connection, 0, 9);
    let refused = String::from_utf8(all(&mut error).await?)?;
    ensure!(refused.to_lowercase().contains("refused") && refused.contains('9'), "{refused:?}");
    let pairs: Vec<_> = (1..=20).map(|id| forward(&mut connection, id, 8080)).collect();
    let gets = pairs.into_iter().map(|(mut error, mut data)| async move {
        data.writer.write_all(b"GET /page HTTP/1.0\r\n\r\n").await?;
        // The server sees the end of the request and answers all the same.
        data.writer.shutdown().await?;
        let (answer, words) = tokio::try_join!(all(&mut data), all(&mut error))?;
        ensure!(words.is_empty(), "the error stream says {:?}", String::from_utf8_lossy(&words));
        let body = answer.iter().filter(|byte| **byte == b'x').count();
        ensure!(answer.starts_with(b"HTTP/1.") && body >= 200_000, "{} bytes", answer.len());
        Ok(())
    });
    futures::future::try_join_all(gets).await?;
    connection.finish().await;
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn a_hundred_connections_are_open_at_once(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("hundred-connections")?;
    let pod = client.run_pod(&config).await?;
    let script = "mkdir -p /srv; echo the page > /srv/page; \
                  httpd -p 127.0.0.1:8080 -h /srv && echo serving; sleep 3600";
    launch(&mut client, &pod, suite.script("server", script), &config).await?;
    logged(&config, "server", "serving").await?;
    let request = PortForwardRequest { pod_sandbox_id: pod.clone(), port: vec![] };
    let url = client.runtime.port_forward(request).await?.into_inner().url;
    let mut connection = spdy(&url, "portforward.k8s.io").await?;
    let mut pairs: Vec<_> = (0..100).map(|id| forward(&mut connection, id, 8080)).collect();
    // None has asked for anything before the last one is there, and the last is answered first.
    for (error, data) in pairs.iter_mut().rev() {
        data.writer.write_all(b"GET /page HTTP/1.0\r\n\r\n").await?;
        let answer = String::from_utf8(all(data).await?)?;
        ensure!(answer.ends_with("the page\n"), "{answer:?}");
        data.writer.shutdown().await?;
        let words = String::from_utf8(all(error).await?)?;
        ensure!(words.is_empty(), "the error stream says {words:?}");
    }
    connection.finish().await;
    client.remove_pod(&pod).await?;
    Ok(())
}

/// KiB that the guest's kernel could give to programs.
async fn available(client: &mut Client, container: &str) -> Result<i64> {
    let meminfo = client.exec(container, &["cat", "/proc/meminfo"], 30).await?.stdout;
    let text = String::from_utf8_lossy(&meminfo).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let figure = line.and_then(|line| line.split_whitespace().next()).and_then(|word| word.parse().ok());
    figure.with_context(|| text.clone())
}

pub(crate) async fn a_command_that_nobody_reads_takes_bounded_memory(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("unread")?;
    let pod = client.run_pod(&config).await?;
    let container = launch(&mut client, &pod, suite.script("main", "sleep 3600"), &config).await?;
    // Whatever the first ones leave in caches.
    available(&mut client, &container).await?;
    let (guest, daemon) = (available(&mut client, &container).await?, suite.daemon_memory()?);
    let mut unread = Vec::new();
    for _ in 0..4 {
        let url = exec_url(&mut client, piped(&container, &["yes"], false)).await?;
        let mut connection = spdy(&url, V4).await?;
        let streams = ["error", "stdout", "stderr"].map(|name| connection.open(kind(name)));
        unread.push((connection, streams));
    }
    let mut taken = Vec::new();
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_secs(4)).await;
        let guest = guest - available(&mut client, &container).await?;
        taken.push((guest, suite.daemon_memory()? as i64 - daemon as i64));
    }
    // A guest makes tens of megabytes in each of these seconds, if somebody takes them.
    let bounded = taken.iter().all(|(guest, daemon)| *guest < 48 << 10 && *daemon < 24 << 10);
    ensure!(bounded, "KiB that four unread commands take in the guest and in the daemon: {taken:?}");
    drop(unread);
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn a_client_that_vanishes_ends_its_commands_input(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("vanished")?;
    let pod = client.run_pod(&config).await?;
    let container = launch(&mut client, &pod, suite.script("main", "sleep 3600"), &config).await?;
    let script = "echo begun; cat; echo output that nobody reads; echo ended > /tmp/ended";
    let url = exec_url(&mut client, piped(&container, &["sh", "-c", script], true)).await?;
    let mut connection = spdy(&url, V4).await?;
    let _error = connection.open(kind("error"));
    let (mut keys, mut out) = (connection.open(kind("stdin")), connection.open(kind("stdout")));
    let _err = connection.open(kind("stderr"));
    until(&mut out, "begun").await?;
    keys.writer.write_all(b"some words\n").await?;
    until(&mut out, "some words").await?;
    // Without a good-bye.
    drop((connection, keys, out));
    let script = "until test -e /tmp/ended; do sleep 0.1; done; cat /tmp/ended";
    let (out, ..) = run(&mut client, &container, &["sh", "-c", script], None).await?;
    ensure!(out == b"ended\n", "{}", String::from_utf8_lossy(&out));
    client.remove_pod(&pod).await?;
    Ok(())
}

/// On libkrun one full socket stopped all streams of the box, and its agent with them.
pub(crate) async fn a_client_that_does_not_read_stops_nobody_else(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("stalled-clients")?;
    let pod = client.run_pod(&config).await?;
    let script = "mkdir -p /srv; head -c 8000000 /dev/zero > /srv/page; \
                  httpd -p 127.0.0.1:8080 -h /srv && echo serving; sleep 3600";
    let container = launch(&mut client, &pod, suite.script("server", script), &config).await?;
    logged(&config, "server", "serving").await?;

    let url = exec_url(&mut client, piped(&container, &["yes"], false)).await?;
    let mut unread = spdy(&url, V4).await?;
    let _streams = [unread.open(kind("error")), unread.open(kind("stdout")), unread.open(kind("stderr"))];
    let request = PortForwardRequest { pod_sandbox_id: pod.clone(), port: vec![] };
    let url = client.runtime.port_forward(request.clone()).await?.into_inner().url;
    let mut stalled = spdy(&url, "portforward.k8s.io").await?;
    let (_error, mut data) = forward(&mut stalled, 0, 8080);
    data.writer.write_all(b"GET /page HTTP/1.0\r\n\r\n").await?;
    // By now everything on the way to both clients is full.
    tokio::time::sleep(Duration::from_secs(3)).await;

    let (out, ..) = run(&mut client, &container, &["echo", "still here"], None).await?;
    ensure!(out == b"still here\n", "{}", String::from_utf8_lossy(&out));
    let url = client.runtime.port_forward(request).await?.into_inner().url;
    let mut connection = spdy(&url, "portforward.k8s.io").await?;
    let (_error, mut other) = forward(&mut connection, 0, 8080);
    other.writer.write_all(b"GET /page HTTP/1.0\r\n\r\n").await?;
    let answer = all(&mut other).await?;
    ensure!(answer.len() > 8_000_000, "{} bytes", answer.len());
    let answer = all(&mut data).await?;
    ensure!(answer.len() > 8_000_000, "the one that waited has {} bytes", answer.len());
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn many_short_commands_leave_nothing_in_the_daemon(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("many-execs")?;
    let pod = client.run_pod(&config).await?;
    let container = launch(&mut client, &pod, suite.script("main", "sleep 3600"), &config).await?;
    let count = if suite.backend() == "qemu" { 60 } else { 20 };
    for index in 0..count {
        let word = format!("n{index}");
        let (out, ..) = run(&mut client, &container, &["echo", &word], None).await?;
        ensure!(out == format!("{word}\n").as_bytes(), "{word}: {}", String::from_utf8_lossy(&out));
    }
    let inside =
        client.exec(&container, &["sh", "-c", "ps | grep -c echo; ls /proc | grep -c '^[0-9]'"], 30).await?;
    let text = String::from_utf8_lossy(&inside.stdout).into_owned();
    let processes: usize = text.lines().last().unwrap_or_default().trim().parse().context(text.clone())?;
    ensure!(processes < 12, "{processes} processes are left in the container: {text}");
    client.remove_pod(&pod).await?;
    Ok(())
}
