//! The crate's own clients against its server with a certificate.

#![allow(missing_docs)]

mod common;

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use a3s_box_streaming::backend::Wanted;
use a3s_box_streaming::client::{Call, ConnectError, Target, Transport};
use a3s_box_streaming::{BindError, Pinned, Server, ServerConfig, TlsFiles};
use common::{LIMIT, Served};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const WANTED: Wanted = Wanted { stdin: false, stdout: true, stderr: true };

/// Writes a new certificate and its key.
fn issue(dir: &Path) -> TlsFiles {
    let issued = rcgen::generate_simple_self_signed(["node.example".to_owned()]).unwrap();
    let files = TlsFiles { certificate: dir.join("tls.pem"), key: dir.join("tls.key") };
    fs::write(&files.certificate, issued.cert.pem()).unwrap();
    fs::write(&files.key, issued.signing_key.serialize_pem()).unwrap();
    files
}

async fn exec(
    served: &Served,
    certificate: Option<Pinned>,
    transport: Transport,
) -> Result<Call, ConnectError> {
    let url = served.exec("both", false, WANTED);
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");
    Call::connect(&Target { url, certificate }, transport, WANTED, false).await
}

async fn output(call: Call) -> String {
    let mut out = String::new();
    let mut stdout = call.stdout.unwrap();
    tokio::time::timeout(LIMIT, stdout.read_to_string(&mut out)).await.expect("it ends").unwrap();
    out
}

#[tokio::test]
async fn a_client_that_knows_the_certificate_gets_its_output() {
    let dir = tempfile::tempdir().unwrap();
    let files = issue(dir.path());
    let pinned = Pinned::read(&files.certificate).unwrap();
    let served = Served::with_tls(files).await;
    for transport in [Transport::WebSocket, Transport::Spdy] {
        let call = exec(&served, Some(pinned.clone()), transport).await.unwrap();
        assert_eq!(output(call).await, "out", "{transport:?}");
    }
    served.quiet().await;
}

#[tokio::test]
async fn another_certificate_none_and_no_tls_are_refused() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let served = Served::with_tls(issue(dir.path())).await;
    let stranger = Pinned::read(&issue(other.path()).certificate).unwrap();
    let error = exec(&served, Some(stranger), Transport::Spdy).await.err().unwrap();
    assert!(
        matches!(&error, ConnectError::Tls { source, .. } if source.kind() == ErrorKind::InvalidData),
        "{error}"
    );
    let error = exec(&served, None, Transport::Spdy).await.err().unwrap();
    assert!(matches!(&error, ConnectError::NoCertificate { .. }), "{error}");

    let url = served.exec("both", false, WANTED);
    let (host, path) = url.strip_prefix("https://").unwrap().split_once('/').unwrap();
    let mut plain = TcpStream::connect(host).await.unwrap();
    plain.write_all(format!("POST /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(LIMIT, plain.read_to_end(&mut answer)).await.expect("it is cut off").ok();
    assert!(!answer.starts_with(b"HTTP/"), "{}", String::from_utf8_lossy(&answer));
}

/// Certificates are renewed while the daemon runs; half of a renewal must not stop it.
#[tokio::test]
async fn a_renewed_certificate_is_served_and_a_broken_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let files = issue(dir.path());
    let served = Served::with_tls(files.clone()).await;
    let first = Pinned::read(&files.certificate).unwrap();
    // Files written within one tick of the clock would look the same.
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    fs::write(&files.key, "no key").unwrap();
    let call = exec(&served, Some(first.clone()), Transport::WebSocket).await.unwrap();
    assert_eq!(output(call).await, "out");
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    issue(dir.path());
    let renewed = Pinned::read(&files.certificate).unwrap();
    let call = exec(&served, Some(renewed), Transport::WebSocket).await.unwrap();
    assert_eq!(output(call).await, "out");
    assert!(matches!(exec(&served, Some(first), Transport::WebSocket).await, Err(ConnectError::Tls { .. })));
}

#[tokio::test]
async fn files_that_are_of_no_use_are_named() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (files, others) = (issue(dir.path()), issue(other.path()));
    let bind = async |tls: TlsFiles| -> String {
        let minute = std::time::Duration::from_secs(60);
        let address = ([127, 0, 0, 1], 0).into();
        let config = ServerConfig { tls: Some(tls), address, idle_timeout: minute, creation_timeout: minute };
        match Server::bind(&config).await {
            Err(BindError::Tls(error)) => error.to_string(),
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("it was accepted"),
        }
    };
    let missing = TlsFiles { key: dir.path().join("missing.key"), ..files.clone() };
    let error = bind(missing).await;
    assert!(error.contains("missing.key (streaming.tls_key)"), "{error}");
    let error = bind(TlsFiles { certificate: files.key.clone(), ..files.clone() }).await;
    assert!(error.contains("could not read the certificate in") && error.contains("tls.key"), "{error}");
    let error = bind(TlsFiles { key: others.key, ..files }).await;
    assert!(error.contains("do they belong together?"), "{error}");
}
