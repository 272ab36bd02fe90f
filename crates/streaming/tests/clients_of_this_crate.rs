//! The crate's own clients against its server, by both transports.

#![allow(missing_docs)]

mod common;

use a3s_box_streaming::backend::{TerminalSize, Wanted};
use a3s_box_streaming::client::{Call, ConnectError, Forwarder, OutcomeError, Target, Transport};
use common::{LIMIT, Served};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const TRANSPORTS: [Transport; 2] = [Transport::WebSocket, Transport::Spdy];

async fn call(served: &Served, transport: Transport, name: &str, tty: bool, wanted: Wanted) -> Call {
    Call::connect(&target(served.exec(name, tty, wanted)), transport, wanted, tty)
        .await
        .expect("a connection")
}

fn target(url: String) -> Target {
    Target { url, certificate: None }
}

async fn in_time<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, work).await.expect("it ends")
}

#[tokio::test]
async fn outputs_and_the_exit_code_arrive() {
    let served = Served::ordinary().await;
    let wanted = Wanted { stdin: false, stdout: true, stderr: true };
    for transport in TRANSPORTS {
        let call = call(&served, transport, "both", false, wanted).await;
        let (mut out, mut err) = (String::new(), String::new());
        in_time(call.stdout.unwrap().read_to_string(&mut out)).await.unwrap();
        in_time(call.stderr.unwrap().read_to_string(&mut err)).await.unwrap();
        assert_eq!((out.as_str(), err.as_str()), ("out", "err"), "{transport:?}");
        assert_eq!(in_time(call.outcome.wait()).await, Ok(3), "{transport:?}");
    }
    served.quiet().await;
}

#[tokio::test]
async fn the_end_of_input_ends_the_command_and_nothing_is_lost() {
    let served = Served::ordinary().await;
    let wanted = Wanted { stdin: true, stdout: true, stderr: false };
    let sent: Vec<u8> = (0..8 << 20).map(|i: u32| (i % 253) as u8).collect();
    for transport in TRANSPORTS {
        let call = call(&served, transport, "cat", false, wanted).await;
        let (mut stdin, mut got) = (call.stdin.unwrap(), Vec::new());
        let write = async {
            stdin.write_all(&sent).await?;
            stdin.shutdown().await
        };
        let mut stdout = call.stdout.unwrap();
        let (wrote, read) = in_time(async { tokio::join!(write, stdout.read_to_end(&mut got)) }).await;
        wrote.unwrap();
        read.unwrap();
        assert!(got == sent, "{transport:?}");
        assert_eq!(in_time(call.outcome.wait()).await, Ok(0));
    }
}

#[tokio::test]
async fn a_size_is_told_and_a_failure_has_its_words() {
    let served = Served::ordinary().await;
    let wanted = Wanted { stdout: true, ..Wanted::default() };
    for transport in TRANSPORTS {
        let call_ = call(&served, transport, "size", true, wanted).await;
        call_.sizes.unwrap().tell(TerminalSize { width: 132, height: 43 }).await;
        let mut out = String::new();
        in_time(call_.stdout.unwrap().read_to_string(&mut out)).await.unwrap();
        assert_eq!(out, "132x43", "{transport:?}");

        let failed = call(&served, transport, "nothing", false, wanted).await;
        let message = "executable file not found".to_owned();
        assert_eq!(in_time(failed.outcome.wait()).await, Err(OutcomeError::Failed { message }));
    }
}

#[tokio::test]
async fn a_client_that_is_dropped_ends_its_call() {
    let served = Served::ordinary().await;
    let wanted = Wanted { stdin: true, stdout: true, stderr: false };
    for transport in TRANSPORTS {
        drop(call(&served, transport, "cat", false, wanted).await);
    }
    served.quiet().await;
}

#[tokio::test]
async fn a_used_url_is_refused_with_the_servers_words() {
    let served = Served::ordinary().await;
    let wanted = Wanted { stdout: true, stderr: true, ..Wanted::default() };
    let url = served.exec("both", false, wanted);
    drop(Call::connect(&target(url.clone()), Transport::WebSocket, wanted, false).await.expect("the first"));
    for transport in TRANSPORTS {
        let refused =
            Call::connect(&target(url.clone()), transport, wanted, false).await.map(drop).unwrap_err();
        assert!(
            matches!(&refused, ConnectError::Refused { status, words, .. } if *status == 404 && words.contains("used")),
            "{refused}"
        );
    }
}

#[tokio::test]
async fn twenty_connections_are_forwarded_side_by_side_and_a_refusal_stays_alone() {
    let served = Served::ordinary().await;
    let mut forwarder = Forwarder::connect(&target(served.port_forward(&[7]))).await.unwrap();
    let (mut user, mut local) = tokio::io::duplex(1024);
    user.write_all(b"hello?").await.unwrap();
    let refused = in_time(forwarder.open(9).carry(&mut local)).await.unwrap_err();
    assert_eq!(refused.message, "port 9: connection refused");

    let echoes = (0..20u8).map(|index| {
        let forwarded = forwarder.open(7);
        async move {
            let (user, mut local) = tokio::io::duplex(1024);
            let carried = tokio::spawn(async move { forwarded.carry(&mut local).await });
            let (mut from, mut to) = tokio::io::split(user);
            let (sent, mut got) = (vec![index; 100_000], Vec::new());
            let write = async {
                to.write_all(&sent).await?;
                to.shutdown().await
            };
            let (wrote, read) = tokio::join!(write, from.read_to_end(&mut got));
            wrote.unwrap();
            read.unwrap();
            assert!(got == sent);
            carried.await.unwrap().unwrap();
        }
    });
    in_time(futures::future::join_all(echoes)).await;
    drop(forwarder);
}
