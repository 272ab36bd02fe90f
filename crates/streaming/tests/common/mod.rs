//! A server over a backend of a few lines, and clients for it.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use a3s_box_streaming::backend::{
    AttachRequest, BackendError, Duplex, ExecRequest, PortForwardRequest, TerminalSize, Wanted,
};
use a3s_box_streaming::spdy::{Connection, Headers, Stream};
use a3s_box_streaming::{Backend, ClientStreams, Server, ServerConfig, TlsFiles, Urls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

/// The longest for anything in here.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// What a command does is its name.
#[derive(Default)]
pub(crate) struct Fake {
    /// Calls that are under way.
    pub(crate) busy: Arc<AtomicUsize>,
}

impl Backend for Fake {
    async fn exec(&self, request: ExecRequest, mut client: ClientStreams) -> Result<i32, BackendError> {
        self.busy.fetch_add(1, Ordering::SeqCst);
        let outcome = command(&request, &mut client).await;
        self.busy.fetch_sub(1, Ordering::SeqCst);
        outcome
    }

    async fn attach(&self, _: AttachRequest, client: ClientStreams) -> Result<(), BackendError> {
        self.busy.fetch_add(1, Ordering::SeqCst);
        client.gone.cancelled().await;
        self.busy.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }

    /// Port 7 echoes, every other one refuses.
    async fn dial(&self, _: &str, port: u16) -> Result<Box<dyn Duplex>, BackendError> {
        if port != 7 {
            return Err(BackendError { message: format!("port {port}: connection refused") });
        }
        let (near, far) = tokio::io::duplex(4096);
        tokio::spawn(async move {
            let (mut from, mut to) = tokio::io::split(far);
            tokio::io::copy(&mut from, &mut to).await.ok();
            to.shutdown().await.ok();
        });
        Ok(Box::new(near))
    }
}

async fn command(request: &ExecRequest, client: &mut ClientStreams) -> Result<i32, BackendError> {
    let (mut out, mut err) = (client.stdout.take(), client.stderr.take());
    let mut code = 0;
    match request.command[0].as_str() {
        "cat" => {
            let (mut stdin, out) = (client.stdin.take().expect("stdin"), out.as_mut().expect("stdout"));
            tokio::io::copy(&mut stdin, out).await.ok();
        }
        "both" => {
            out.as_mut().expect("stdout").write_all(b"out").await.ok();
            err.as_mut().expect("stderr").write_all(b"err").await.ok();
            code = 3;
        }
        "much" => {
            let out = out.as_mut().expect("stdout");
            for _ in 0..256 {
                out.write_all(&[b'x'; 64 * 1024]).await.ok();
            }
        }
        "size" => {
            let TerminalSize { width, height } = client.resizes.recv().await.expect("a size");
            out.as_mut().expect("stdout").write_all(format!("{width}x{height}").as_bytes()).await.ok();
        }
        _ => return Err(BackendError { message: "executable file not found".to_owned() }),
    }
    for stream in [&mut out, &mut err].into_iter().flatten() {
        stream.shutdown().await.ok();
    }
    Ok(code)
}

/// A server that ends with its value.
pub(crate) struct Served {
    pub(crate) urls: Urls,
    pub(crate) busy: Arc<AtomicUsize>,
    stop: CancellationToken,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Served {
    pub(crate) async fn start(creation_timeout: Duration, idle_timeout: Duration) -> Self {
        Self::bind(None, creation_timeout, idle_timeout).await
    }

    /// With a certificate.
    pub(crate) async fn with_tls(tls: TlsFiles) -> Self {
        Self::bind(Some(tls), Duration::from_secs(5), Duration::from_secs(60)).await
    }

    async fn bind(tls: Option<TlsFiles>, creation_timeout: Duration, idle_timeout: Duration) -> Self {
        let address = ([127, 0, 0, 1], 0).into();
        let config = ServerConfig { tls, address, idle_timeout, creation_timeout };
        let server = Server::bind(&config).await.unwrap();
        let (urls, stop, fake) = (server.urls(), CancellationToken::new(), Fake::default());
        let busy = fake.busy.clone();
        tokio::spawn(server.serve(Arc::new(fake), stop.clone()));
        Self { urls, busy, stop }
    }

    pub(crate) async fn ordinary() -> Self {
        Self::start(Duration::from_secs(5), Duration::from_secs(60)).await
    }

    pub(crate) fn exec(&self, name: &str, tty: bool, streams: Wanted) -> String {
        let command = vec![name.to_owned()];
        self.urls.exec(ExecRequest { container_id: "c".to_owned(), command, tty, streams }).unwrap()
    }

    pub(crate) fn port_forward(&self, ports: &[u16]) -> String {
        let ports = ports.to_vec();
        self.urls.port_forward(PortForwardRequest { pod_sandbox_id: "p".to_owned(), ports }).unwrap()
    }

    /// Answers once no call is under way.
    pub(crate) async fn quiet(&self) {
        let wait = async {
            while self.busy.load(Ordering::SeqCst) > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, wait).await.expect("every call ends");
    }
}

/// Sends a request; the answer's head and the connection.
pub(crate) async fn request(url: &str, method: &str, headers: &str) -> (String, TcpStream) {
    let rest = url.strip_prefix("http://").unwrap();
    let (host, path) = rest.split_once('/').unwrap();
    let mut stream = TcpStream::connect(host).await.unwrap();
    let head = format!("{method} /{path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(tokio::time::timeout(LIMIT, stream.read_u8()).await.unwrap().unwrap());
    }
    (String::from_utf8(answer).unwrap(), stream)
}

/// A SPDY client after its upgrade.
pub(crate) async fn spdy(url: &str, protocols: &[&str]) -> (String, Connection) {
    let mut headers = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n".to_owned();
    for protocol in protocols {
        headers.push_str(&format!("X-Stream-Protocol-Version: {protocol}\r\n"));
    }
    let (head, stream) = request(url, "POST", &headers).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    (head, Connection::client(stream))
}

pub(crate) fn kind(kind: &str) -> Headers {
    vec![("streamtype".to_owned(), kind.to_owned())]
}

/// All that comes, as text.
pub(crate) async fn text(stream: &mut Stream) -> String {
    let mut bytes = Vec::new();
    let read = stream.reader.read_to_end(&mut bytes);
    tokio::time::timeout(LIMIT, read).await.expect("the stream ends").unwrap();
    String::from_utf8(bytes).unwrap()
}
