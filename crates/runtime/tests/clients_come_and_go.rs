//! Clients of processes and ports: what they get, and that those who vanish or dawdle hold up nobody.

mod support;

use std::time::Duration;

use a3s_box_core::spec::SessionSpec;
use a3s_box_core::{BoxId, SessionId};
use a3s_box_runtime::{BoxManager, StreamReader};
use support::{World, container, image, launch, log_lines, pod, process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A bound against hanging.
const LIMIT: Duration = Duration::from_secs(10);

async fn start(world: &World, m: &BoxManager, spec: SessionSpec) -> (BoxId, SessionId) {
    let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
    let session = launch(m, &id, spec, image(world.dir.path())).await.unwrap();
    (id, session)
}

async fn text(reader: Option<StreamReader>) -> String {
    let mut text = String::new();
    let read = reader.unwrap().read_to_string(&mut text).await;
    read.unwrap();
    text
}

fn within<T>(daemon: &support::Daemon, work: impl Future<Output = T>) -> T {
    daemon.run(async { tokio::time::timeout(LIMIT, work).await.expect("it does not hang") })
}

#[test]
fn an_exec_takes_input_and_gives_output_and_its_code() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    within(&daemon, async {
        let (_, session) = start(&world, &m, container("c", &["sleep"])).await;
        let mut run = m.exec(&session, process(&["cat"]), true).await.unwrap();
        let mut stdin = run.streams.stdin.take().unwrap();
        let sent = "0123456789".repeat(100_000);
        let (written, got) = tokio::join!(
            async {
                stdin.write_all(sent.as_bytes()).await?;
                stdin.shutdown().await
            },
            text(run.streams.stdout.take())
        );
        written.unwrap();
        assert!(got == sent);
        assert_eq!(text(run.streams.stderr.take()).await, "");
        assert_eq!(run.exit.await.unwrap(), 0);
        let failed = m.exec(&session, process(&["fail", "7"]), false).await.unwrap();
        assert_eq!(failed.exit.await.unwrap(), 7);
    });
}

/// On QEMU the end of a stream does not arrive; each exec then took two seconds, and slow output was cut.
#[test]
fn output_ends_where_the_agent_says_so() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    within(&daemon, async {
        let (_, session) = start(&world, &m, container("c", &["sleep"])).await;
        // Ten of them would take longer than the bound if each waited for a silence.
        for _ in 0..10 {
            let mut run = m.exec(&session, process(&["mute", "hello"]), false).await.unwrap();
            assert_eq!(text(run.streams.stdout.take()).await, "hello");
            assert_eq!(run.exit.await.unwrap(), 0);
            let output = m.exec_sync(&session, process(&["mute", "hello"]), None, 100).await.unwrap();
            assert_eq!((output.stdout.as_slice(), output.truncated), (&b"hello"[..], false));
        }
    });
}

#[test]
fn a_client_that_vanishes_does_not_hold_up_its_process() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    within(&daemon, async {
        let (_, session) = start(&world, &m, container("c", &["sleep"])).await;
        let run = m.exec(&session, process(&["print", &"x".repeat(3_000_000)]), true).await.unwrap();
        drop(run.streams);
        assert_eq!(run.exit.await.unwrap(), 0);
    });
}

#[test]
fn a_port_is_dialled_with_half_closes_refusals_and_lies() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    within(&daemon, async {
        let (id, _) = start(&world, &m, container("c", &["sleep"])).await;
        let mut echo = m.dial(&id, 7).await.unwrap();
        echo.write_all(b"hello").await.unwrap();
        echo.shutdown().await.unwrap();
        let mut got = String::new();
        echo.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "hello");
        let refused = m.dial(&id, 80).await.err().unwrap();
        assert!(refused.to_string().contains("Connection refused"), "{refused}");
        let mut liar = m.dial(&id, 13).await.unwrap();
        let error = liar.read_to_string(&mut got).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
        m.stop_box(&id).await.unwrap();
        assert!(m.dial(&id, 7).await.is_err());
    });
}

#[test]
fn a_late_client_gets_what_comes_and_the_log_gets_all() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    within(&daemon, async {
        let mut spec = container("c", &["cat"]);
        spec.stdin = true;
        let (_, session) = start(&world, &m, spec).await;
        let mut first = m.attach_running(&session, true).await.unwrap();
        first.stdin.as_mut().unwrap().write_all(b"one\n").await.unwrap();
        let mut line = [0; 4];
        first.stdout.as_mut().unwrap().read_exact(&mut line).await.unwrap();
        // The input stays open for the next client.
        first.stdin.as_mut().unwrap().shutdown().await.unwrap();
        let mut late = m.attach_running(&session, true).await.unwrap();
        late.stdin.as_mut().unwrap().write_all(b"two\n").await.unwrap();
        late.stdout.as_mut().unwrap().read_exact(&mut line).await.unwrap();
        assert_eq!(&line, b"two\n");
        m.stop_session(&session, LIMIT).await.unwrap();
        assert_eq!(text(late.stdout.take()).await, "");
        assert_eq!(text(first.stdout.take()).await, "two\n");
    });
    assert_eq!(log_lines(&world.path("logs/c/0.log")), ["one", "two"]);
}

#[test]
fn the_end_of_input_ends_a_process_whose_stdin_is_open_once() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    within(&daemon, async {
        let mut spec = container("c", &["cat"]);
        (spec.stdin, spec.stdin_once) = (true, true);
        let (_, session) = start(&world, &m, spec).await;
        let mut client = m.attach_running(&session, true).await.unwrap();
        client.stdin.take().unwrap().shutdown().await.unwrap();
        m.wait_session(&session).await.unwrap();
        assert_eq!(text(client.stdout.take()).await, "");
    });
}

#[test]
fn a_client_that_dawdles_is_let_go_and_the_log_is_complete() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    within(&daemon, async {
        let mut spec = container("c", &["cat"]);
        spec.stdin = true;
        let (_, session) = start(&world, &m, spec).await;
        let mut slow = m.attach_running(&session, true).await.unwrap();
        let mut stdin = slow.stdin.take().unwrap();
        for number in 0..3000 {
            stdin.write_all(format!("{number:01000}\n").as_bytes()).await.unwrap();
        }
        stdin.shutdown().await.unwrap();
        let told = text(slow.stderr.take()).await;
        assert!(told.contains("did not keep up"), "{told}");
        // A stop would end the program before it has read all of its input.
        let log = world.path("logs/c/0.log");
        while std::fs::read(&log).unwrap().iter().filter(|byte| **byte == b'\n').count() < 3000 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        m.stop_session(&session, LIMIT).await.unwrap();
    });
    let lines = log_lines(&world.path("logs/c/0.log"));
    assert_eq!(lines.len(), 3000);
    assert!(lines.last().unwrap().ends_with("2999"));
}

/// A disk that syncs for minutes: whoever changes something waits for it, nobody else.
#[test]
fn a_disk_that_does_not_answer_holds_up_only_what_needs_it() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    let (id, session) = within(&daemon, async { start(&world, &m, container("c", &["count", "200"])).await });
    let stalled = world.disk.clone();
    let stalled = stalled.write().unwrap();
    let waiting: Vec<_> = (0..20)
        .map(|number| {
            let (m, spec) = (m.clone(), pod(&format!("new-{number}"), &world.path("logs")));
            daemon.spawn(async move { m.run_box(spec).await })
        })
        .collect();
    within(&daemon, async {
        assert_eq!(m.list_boxes().len(), 1);
        assert_eq!(m.exec_sync(&session, process(&["print", "x"]), None, 10).await.unwrap().stdout, b"x");
        while log_lines(&world.path("logs/c/0.log")).len() < 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waiting.iter().all(|start| !start.is_finished()), "they wait for the disk");
    drop(stalled);
    within(&daemon, async {
        for start in waiting {
            start.await.unwrap().unwrap();
        }
        m.remove_box(&id).await.unwrap();
    });
}
