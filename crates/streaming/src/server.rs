//! The HTTP server: tokens in, upgraded connections out.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming as Body;
use hyper::header::{
    CONNECTION, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::{AttachRequest, Backend, ExecRequest, PortForwardRequest};
use crate::remotecommand::{self, Call, Limits};
use crate::tls::{Identity, TlsError, TlsFiles};
use crate::tokens::{TokenError, Tokens};
use crate::websocket::channels::Protocol;
use crate::{portforward, spdy, websocket};

/// Connections at the same time.
const MAX_CONNECTIONS: usize = 1024;
/// The longest for a request's head.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// The most that a request's head may have.
const MAX_HEAD: usize = 32 * 1024;
/// Connections that are under way when the server is asked to stop get this long.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// SPDY tunnelled in WebSocket begins with this.
const TUNNEL: &str = "SPDY/3.1+";
const PORT_FORWARD: &str = "portforward.k8s.io";
const SPDY: &str = "SPDY/3.1";
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_PROTOCOLS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

/// Where the server listens and how long it waits.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// With a certificate the URLs are https.
    pub tls: Option<TlsFiles>,
    /// Port 0: one that is free.
    pub address: SocketAddr,
    /// A connection on which nothing is transferred for so long is cut off.
    pub idle_timeout: Duration,
    /// How long a client has to open all of its streams.
    pub creation_timeout: Duration,
}

/// The server cannot start.
#[derive(Debug, Error)]
pub enum BindError {
    /// The address is taken, or not this machine's.
    #[error(
        "could not listen on {address} for exec, attach and port-forward; choose another streaming.address: {source}"
    )]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The certificate or the key is of no use.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

#[derive(Debug)]
enum Pending {
    Call(Call),
    PortForward(PortForwardRequest),
}

impl Pending {
    /// The first element of its URL's path.
    fn kind(&self) -> &'static str {
        match self {
            Self::Call(Call::Exec(_)) => "exec",
            Self::Call(Call::Attach(_)) => "attach",
            Self::PortForward(_) => "portforward",
        }
    }
}

/// Gives out URLs. Clones are the same.
#[derive(Debug, Clone)]
pub struct Urls {
    tokens: Arc<Tokens<Pending>>,
    base: Arc<str>,
}

impl Urls {
    /// A URL at which one client can execute a command, within a minute.
    pub fn exec(&self, request: ExecRequest) -> Result<String, TokenError> {
        self.keep(Pending::Call(Call::Exec(request)))
    }

    /// A URL at which one client can attach to a container, within a minute.
    pub fn attach(&self, request: AttachRequest) -> Result<String, TokenError> {
        self.keep(Pending::Call(Call::Attach(request)))
    }

    /// A URL at which one client can forward ports of a pod, within a minute.
    pub fn port_forward(&self, request: PortForwardRequest) -> Result<String, TokenError> {
        self.keep(Pending::PortForward(request))
    }

    fn keep(&self, pending: Pending) -> Result<String, TokenError> {
        let kind = pending.kind();
        Ok(format!("{}/{kind}/{}", self.base, self.tokens.insert(pending)?))
    }
}

/// A server that listens and does not serve yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    identity: Option<Identity>,
    urls: Urls,
    limits: Limits,
}

impl Server {
    /// Listens.
    pub async fn bind(config: &ServerConfig) -> Result<Self, BindError> {
        let address = config.address;
        let failed = |source| BindError::Listen { address, source };
        let identity = config.tls.clone().map(Identity::load).transpose()?;
        let scheme = if identity.is_some() { "https" } else { "http" };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let local = listener.local_addr().map_err(failed)?;
        let urls = Urls { tokens: Arc::new(Tokens::new()), base: format!("{scheme}://{local}").into() };
        let limits = Limits { idle: config.idle_timeout, creation: config.creation_timeout };
        Ok(Self { listener, identity, urls, limits })
    }

    /// What gives out its URLs.
    pub fn urls(&self) -> Urls {
        self.urls.clone()
    }

    /// Serves until `stop`; then what is under way gets a moment.
    pub async fn serve<B: Backend>(self, backend: Arc<B>, stop: CancellationToken) {
        let Self { listener, identity, urls, limits } = self;
        let (room, tasks, cut) =
            (Arc::new(Semaphore::new(MAX_CONNECTIONS)), TaskTracker::new(), CancellationToken::new());
        let handler = Handler { backend, urls, limits, tasks: tasks.clone(), cut: cut.clone() };
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            let (stream, _) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Usually no descriptors; they come back when connections end.
                    tracing::warn!(%error, "a streaming client could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            // A client beyond the limit sees its connection closed.
            let Ok(place) = room.clone().try_acquire_owned() else {
                tracing::warn!(limit = MAX_CONNECTIONS, "a streaming client was turned away");
                continue;
            };
            stream.set_nodelay(true).ok();
            let acceptor = identity.as_ref().map(Identity::acceptor);
            let (handler, cut) = (handler.clone(), cut.clone());
            tasks.spawn(async move {
                let connection = async {
                    let Some(acceptor) = acceptor else { return handler.read(stream, place).await };
                    match tokio::time::timeout(HEAD_LIMIT, acceptor.accept(stream)).await {
                        Ok(Ok(stream)) => handler.read(stream, place).await,
                        Ok(Err(error)) => tracing::debug!(%error, "a streaming client speaks no TLS"),
                        Err(_) => tracing::debug!("a streaming client did not finish TLS's handshake"),
                    }
                };
                tokio::select! {
                    () = cut.cancelled() => {}
                    () = connection => {}
                }
            });
        }
        drop(listener);
        tasks.close();
        tokio::time::timeout(DRAIN_LIMIT, tasks.wait()).await.ok();
        cut.cancel();
    }
}

/// What every connection needs.
struct Handler<B> {
    backend: Arc<B>,
    urls: Urls,
    limits: Limits,
    tasks: TaskTracker,
    cut: CancellationToken,
}

impl<B> Clone for Handler<B> {
    fn clone(&self) -> Self {
        Self {
            backend: self.backend.clone(),
            urls: self.urls.clone(),
            limits: self.limits,
            tasks: self.tasks.clone(),
            cut: self.cut.clone(),
        }
    }
}

/// What is spoken after the upgrade.
enum Speaks {
    /// SPDY, with the version of remotecommand's protocol.
    Spdy(u8),
    /// Channels.
    Channels(Protocol),
    /// SPDY in binary messages.
    Tunnel,
}

impl<B: Backend> Handler<B> {
    /// Serves HTTP until the upgrade; `place` is held as long as the client is there.
    async fn read<S, P>(&self, stream: S, place: P)
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
        P: Send + Sync + 'static,
    {
        let place = Arc::new(place);
        let service = service_fn(|request| {
            let place = place.clone();
            async move { Ok::<_, Infallible>(self.answer(request, place)) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_LIMIT)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a streaming client's connection failed");
        }
    }

    fn answer<P: Send + 'static>(&self, request: Request<Body>, place: P) -> Response<Full<Bytes>> {
        let mut path = request.uri().path().trim_start_matches('/').splitn(2, '/');
        let (kind, token) = (path.next().unwrap_or_default(), path.next().unwrap_or_default());
        let Some(pending) = self.urls.tokens.take(token).filter(|pending| pending.kind() == kind) else {
            let words = "there is no such request: its URL has been used, or is older than a minute; ask the runtime again";
            return refusal(StatusCode::NOT_FOUND, words);
        };
        let (response, speaks) = match negotiate(request.headers(), &pending) {
            Ok(agreed) => agreed,
            Err(refused) => return *refused,
        };
        let (handler, cut) = (self.clone(), self.cut.clone());
        self.tasks.spawn(async move {
            let _place = place;
            let io = match hyper::upgrade::on(request).await {
                Ok(upgraded) => TokioIo::new(upgraded),
                Err(error) => return tracing::debug!(%error, "a streaming client did not upgrade"),
            };
            tokio::select! {
                () = cut.cancelled() => {}
                () = handler.serve(pending, speaks, io) => {}
            }
        });
        response
    }

    async fn serve<S>(self, pending: Pending, speaks: Speaks, io: S)
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
    {
        let Self { backend, limits, .. } = self;
        match (pending, speaks) {
            (Pending::Call(call), Speaks::Spdy(version)) => {
                let (connection, incoming) = spdy::Connection::server(io);
                remotecommand::over_spdy(backend, call, version, connection, incoming, limits).await;
            }
            (Pending::Call(call), Speaks::Channels(protocol)) => {
                remotecommand::over_websocket(backend, call, protocol, io, limits).await;
            }
            (Pending::PortForward(request), Speaks::Spdy(_)) => {
                let (connection, incoming) = spdy::Connection::server(io);
                portforward::over_spdy(backend, request, connection, incoming, limits).await;
            }
            (Pending::PortForward(request), Speaks::Tunnel) => {
                let (connection, incoming) = spdy::Connection::server(websocket::tunnel(io).await);
                portforward::over_spdy(backend, request, connection, incoming, limits).await;
            }
            (Pending::PortForward(request), Speaks::Channels(protocol)) => {
                portforward::over_websocket(backend, request, protocol, io, limits).await;
            }
            // Not agreed upon for calls.
            (Pending::Call(_), Speaks::Tunnel) => {}
        }
    }
}

type Refused = Box<Response<Full<Bytes>>>;

/// Agrees on a protocol, or says why not.
fn negotiate(headers: &HeaderMap, pending: &Pending) -> Result<(Response<Full<Bytes>>, Speaks), Refused> {
    let upgrade = headers.get(UPGRADE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if upgrade.eq_ignore_ascii_case(SPDY) {
        spdy_protocol(headers, pending)
    } else if upgrade.eq_ignore_ascii_case("websocket") {
        websocket_protocol(headers, pending)
    } else {
        let words = "this URL is for streaming: upgrade to SPDY/3.1 or websocket";
        Err(Box::new(refusal(StatusCode::BAD_REQUEST, words)))
    }
}

/// Everything that a header, which may be repeated, lists.
fn listed(headers: &HeaderMap, name: &HeaderName) -> Vec<String> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(|word| word.trim().to_owned()).collect()
}

/// A client's protocols in its order; the first that is spoken here counts. One that names none speaks the oldest.
fn spdy_protocol(headers: &HeaderMap, pending: &Pending) -> Result<(Response<Full<Bytes>>, Speaks), Refused> {
    let offered = listed(headers, &STREAM_PROTOCOL);
    let spoken = |name: &str| match pending {
        Pending::Call(_) => match name {
            "channel.k8s.io" => Some(1),
            "v2.channel.k8s.io" => Some(2),
            "v3.channel.k8s.io" => Some(3),
            "v4.channel.k8s.io" => Some(4),
            _ => None,
        },
        Pending::PortForward(_) => (name == PORT_FORWARD).then_some(1),
    };
    let mut response = switching(SPDY);
    if offered.is_empty() {
        return Ok((response, Speaks::Spdy(1)));
    }
    let Some((name, version)) = offered.iter().find_map(|name| Some((name, spoken(name)?))) else {
        let mut refused =
            refusal(StatusCode::FORBIDDEN, "none of the client's stream protocols is spoken here");
        let accepted = match pending {
            Pending::Call(_) => "v4.channel.k8s.io,v3.channel.k8s.io,v2.channel.k8s.io,channel.k8s.io",
            Pending::PortForward(_) => PORT_FORWARD,
        };
        refused.headers_mut().insert(ACCEPTED_PROTOCOLS, HeaderValue::from_static(accepted));
        return Err(Box::new(refused));
    };
    insert(&mut response, STREAM_PROTOCOL, name);
    Ok((response, Speaks::Spdy(version)))
}

fn websocket_protocol(
    headers: &HeaderMap,
    pending: &Pending,
) -> Result<(Response<Full<Bytes>>, Speaks), Refused> {
    let key = headers.get(SEC_WEBSOCKET_KEY);
    let version = headers.get(SEC_WEBSOCKET_VERSION).map(HeaderValue::as_bytes);
    let (Some(key), Some(b"13")) = (key, version) else {
        let words = "a WebSocket handshake has a Sec-WebSocket-Key and version 13 (RFC 6455)";
        return Err(Box::new(refusal(StatusCode::BAD_REQUEST, words)));
    };
    let spoken = |name: &str| match pending {
        Pending::Call(_) => Protocol::named(name).map(Speaks::Channels),
        Pending::PortForward(_) if name.strip_prefix(TUNNEL) == Some(PORT_FORWARD) => Some(Speaks::Tunnel),
        Pending::PortForward(_) => match name {
            "" | PORT_FORWARD | "v4.channel.k8s.io" => {
                Protocol::named("v4.channel.k8s.io").map(Speaks::Channels)
            }
            "v4.base64.channel.k8s.io" => Protocol::named(name).map(Speaks::Channels),
            _ => None,
        },
    };
    let mut offered = listed(headers, &SEC_WEBSOCKET_PROTOCOL);
    if offered.is_empty() {
        offered.push(String::new());
    }
    let Some((name, speaks)) = offered.iter().find_map(|name| Some((name, spoken(name)?))) else {
        let words = "none of the client's WebSocket protocols is spoken here";
        return Err(Box::new(refusal(StatusCode::BAD_REQUEST, words)));
    };
    if let (Pending::PortForward(request), Speaks::Channels(_)) = (pending, &speaks)
        && (request.ports.is_empty() || request.ports.len() > usize::from(u8::MAX / 2))
    {
        let words = "port-forward over WebSocket channels needs its ports in the request, at most 127";
        return Err(Box::new(refusal(StatusCode::BAD_REQUEST, words)));
    }
    let mut response = switching("websocket");
    insert(&mut response, SEC_WEBSOCKET_ACCEPT, &websocket::accept_key(key.as_bytes()));
    if !name.is_empty() {
        insert(&mut response, SEC_WEBSOCKET_PROTOCOL, name);
    }
    Ok((response, speaks))
}

fn switching(protocol: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static(protocol));
    response
}

/// The words were read from a header, so they fit into one.
fn insert(response: &mut Response<Full<Bytes>>, name: HeaderName, words: &str) {
    if let Ok(value) = HeaderValue::from_str(words) {
        response.headers_mut().insert(name, value);
    }
}

fn refusal(status: StatusCode, words: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{words}\n")));
    *response.status_mut() = status;
    response
}
