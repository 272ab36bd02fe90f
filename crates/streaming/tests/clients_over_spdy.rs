//! What clients of SPDY see, with every version of the protocol.

#![allow(missing_docs)]

mod common;

use std::time::Duration;

use a3s_box_streaming::backend::Wanted;
use common::{LIMIT, Served, kind, request, spdy, text};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const BOTH: Wanted = Wanted { stdin: false, stdout: true, stderr: true };
const PIPE: Wanted = Wanted { stdin: true, stdout: true, stderr: false };

#[tokio::test]
async fn output_and_exit_code_arrive_in_every_version() {
    let served = Served::ordinary().await;
    for (protocol, expected) in [
        ("v4.channel.k8s.io", "\"reason\":\"NonZeroExitCode\""),
        ("v3.channel.k8s.io", "exit code: 3"),
        ("v2.channel.k8s.io", "exit code: 3"),
        ("channel.k8s.io", "exit code: 3"),
    ] {
        let url = served.exec("both", false, BOTH);
        let (head, mut client) = spdy(&url, &["v9.channel.k8s.io", protocol]).await;
        assert!(head.contains(&format!("x-stream-protocol-version: {protocol}\r\n")), "{head}");
        let mut error = client.open(kind("error"));
        let (mut out, mut err) = (client.open(kind("stdout")), client.open(kind("stderr")));
        assert_eq!((text(&mut out).await, text(&mut err).await), ("out".to_owned(), "err".to_owned()));
        assert!(text(&mut error).await.contains(expected), "{protocol}");
    }
    served.quiet().await;
}

#[tokio::test]
async fn input_flows_both_ways_and_its_end_ends_the_command() {
    let served = Served::ordinary().await;
    let (_, mut client) = spdy(&served.exec("cat", false, PIPE), &["v4.channel.k8s.io"]).await;
    let mut error = client.open(kind("error"));
    let (mut stdin, mut out) = (client.open(kind("stdin")), client.open(kind("stdout")));
    let sent: Vec<u8> = (0..4 << 20).map(|i: u32| (i % 251) as u8).collect();
    let mut got = Vec::new();
    let (wrote, read) = tokio::join!(
        async {
            stdin.writer.write_all(&sent).await?;
            stdin.writer.shutdown().await
        },
        out.reader.read_to_end(&mut got)
    );
    wrote.unwrap();
    read.unwrap();
    assert!(got == sent);
    assert_eq!(text(&mut error).await, r#"{"metadata":{},"status":"Success"}"#);
}

#[tokio::test]
async fn all_output_comes_before_the_outcome() {
    let served = Served::ordinary().await;
    let streams = Wanted { stdout: true, ..Wanted::default() };
    let (_, mut client) = spdy(&served.exec("much", false, streams), &["v4.channel.k8s.io"]).await;
    let (mut error, mut out) = (client.open(kind("error")), client.open(kind("stdout")));
    assert_eq!(text(&mut out).await.len(), 16 << 20);
    assert!(text(&mut error).await.contains("Success"));
}

#[tokio::test]
async fn a_window_size_reaches_the_terminal() {
    let served = Served::ordinary().await;
    let streams = Wanted { stdout: true, ..Wanted::default() };
    let (_, mut client) = spdy(&served.exec("size", true, streams), &["v4.channel.k8s.io"]).await;
    let mut error = client.open(kind("error"));
    let (mut out, mut resize) = (client.open(kind("stdout")), client.open(kind("resize")));
    resize.writer.write_all(b"{\"Width\":65535,\"Height\":0}\n").await.unwrap();
    assert_eq!(text(&mut out).await, "65535x0");
    assert!(text(&mut error).await.contains("Success"));
}

#[tokio::test]
async fn a_command_that_cannot_run_says_why() {
    let served = Served::ordinary().await;
    let (_, mut client) = spdy(&served.exec("nothing", false, BOTH), &["v4.channel.k8s.io"]).await;
    let mut error = client.open(kind("error"));
    let _streams = (client.open(kind("stdout")), client.open(kind("stderr")));
    assert!(text(&mut error).await.contains("executable file not found"));
}

#[tokio::test]
async fn a_url_works_once_for_its_own_kind_and_only_with_an_upgrade() {
    let served = Served::ordinary().await;
    let upgrade = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n";
    let url = served.exec("both", false, BOTH);
    drop(spdy(&url, &["v4.channel.k8s.io"]).await);
    assert!(request(&url, "POST", upgrade).await.0.starts_with("HTTP/1.1 404 "), "used");
    let other = served.exec("both", false, BOTH).replace("/exec/", "/attach/");
    assert!(request(&other, "POST", upgrade).await.0.starts_with("HTTP/1.1 404 "), "another kind");
    let guessed = format!("{}x", served.exec("both", false, BOTH));
    assert!(request(&guessed, "POST", upgrade).await.0.starts_with("HTTP/1.1 404 "), "guessed");
    let url = served.exec("both", false, BOTH);
    assert!(request(&url, "GET", "").await.0.starts_with("HTTP/1.1 400 "), "no upgrade");
    let url = served.exec("both", false, BOTH);
    let unknown = format!("{upgrade}X-Stream-Protocol-Version: v7.channel.k8s.io\r\n");
    let (head, _) = request(&url, "POST", &unknown).await;
    assert!(head.starts_with("HTTP/1.1 403 ") && head.contains("v4.channel.k8s.io"), "{head}");
}

#[tokio::test]
async fn a_client_that_does_not_open_its_streams_is_cut_off() {
    let served = Served::start(Duration::from_millis(200), Duration::from_secs(60)).await;
    let (_, mut client) = spdy(&served.exec("both", false, BOTH), &["v4.channel.k8s.io"]).await;
    let mut error = client.open(kind("error"));
    assert_eq!(text(&mut error).await, "");
    tokio::time::timeout(LIMIT, client.closed()).await.expect("the connection ends");
}

#[tokio::test]
async fn an_idle_client_is_cut_off() {
    let served = Served::start(Duration::from_secs(5), Duration::from_millis(300)).await;
    let (_, mut client) = spdy(&served.exec("cat", false, PIPE), &["v4.channel.k8s.io"]).await;
    let _streams = (client.open(kind("error")), client.open(kind("stdin")), client.open(kind("stdout")));
    tokio::time::timeout(LIMIT, client.closed()).await.expect("the connection ends");
    served.quiet().await;
}

#[tokio::test]
async fn a_client_that_vanishes_ends_its_calls() {
    let served = Served::ordinary().await;
    for _ in 0..20 {
        let (_, mut client) = spdy(&served.exec("cat", false, PIPE), &["v4.channel.k8s.io"]).await;
        let mut stdin = client.open(kind("stdin"));
        let _streams = (client.open(kind("error")), client.open(kind("stdout")));
        stdin.writer.write_all(b"x").await.unwrap();
    }
    served.quiet().await;
}
