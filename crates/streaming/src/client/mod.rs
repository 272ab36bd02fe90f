//! Clients of the streaming server: what the command line and tests speak.
//!
//! A command or an attachment is a [`Call`], over WebSocket or SPDY; ports are forwarded by a [`Forwarder`], over one
//! SPDY connection for any number of TCP connections.

mod call;
mod forward;

use std::io;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::header::{
    CONNECTION, HOST, HeaderMap, HeaderName, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::spdy;
use crate::tls::Pinned;

pub use call::{Call, Outcome, OutcomeError, Sizes, Transport};
pub use forward::{Forwarded, Forwarder, PortError};

/// The longest from the first packet to the upgraded connection.
const LIMIT: Duration = Duration::from_secs(30);
/// The most that is read of the words of a refusal.
const MAX_WORDS: usize = 4096;

/// The connection did not come about.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// Not a URL of a streaming server.
    #[error("{url:?} is no URL of a streaming server: an http or https URL with host and port is")]
    Url {
        /// As it was given.
        url: String,
    },
    /// Nobody listens there, or it cannot be reached.
    #[error(
        "could not connect to the streaming server at {address}; is the daemon that gave the URL still running?"
    )]
    Connect {
        /// Host and port.
        address: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// TLS's handshake failed, or the certificate is another one.
    #[error(
        "the streaming server at {address} did not prove to be the one with the certificate of streaming.tls_certificate"
    )]
    Tls {
        /// Host and port.
        address: String,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// There is no certificate to know the server by.
    #[error(
        "the streaming server at {address} speaks TLS, and no certificate is configured here: set streaming.tls_certificate as for the daemon"
    )]
    NoCertificate {
        /// Host and port.
        address: String,
    },
    /// The connection broke, or what listens there speaks no HTTP.
    #[error("the streaming server at {address} gave no answer")]
    Http {
        /// Host and port.
        address: String,
        /// How it broke.
        #[source]
        source: hyper::Error,
    },
    /// The server says no.
    #[error("the streaming server at {address} refused with {status}: {words}")]
    Refused {
        /// Host and port.
        address: String,
        /// The HTTP status.
        status: StatusCode,
        /// The server's explanation.
        words: String,
    },
    /// The server agreed to something else.
    #[error("the streaming server at {address} does not speak {protocol}")]
    Protocol {
        /// Host and port.
        address: String,
        /// What was asked for.
        protocol: &'static str,
    },
    /// It took too long.
    #[error("the streaming server at {address} did not answer within {LIMIT:?}")]
    Timeout {
        /// Host and port.
        address: String,
    },
}

type Io = TokioIo<Upgraded>;

/// Where a server is, and how it is known.
#[derive(Debug, Clone)]
pub struct Target {
    /// As the runtime gave it.
    pub url: String,
    /// For https: the server's certificate.
    pub certificate: Option<Pinned>,
}

/// A SPDY connection that speaks `protocol` (`v4.channel.k8s.io`, `portforward.k8s.io`).
async fn spdy(target: &Target, protocol: &'static str) -> Result<spdy::Connection, ConnectError> {
    const VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");
    let headers = [(UPGRADE, "SPDY/3.1"), (VERSION, protocol)];
    let (io, agreed) = upgrade(target, Method::POST, &headers).await?;
    if agreed.get(VERSION).is_none_or(|agreed| agreed != protocol) {
        return Err(ConnectError::Protocol { address: address(&target.url), protocol });
    }
    Ok(spdy::Connection::client(io))
}

/// A connection on which WebSocket's messages come next.
async fn websocket(target: &Target, protocol: &'static str) -> Result<Io, ConnectError> {
    let key = generate_key();
    let headers = [
        (UPGRADE, "websocket"),
        (SEC_WEBSOCKET_VERSION, "13"),
        (SEC_WEBSOCKET_KEY, key.as_str()),
        (SEC_WEBSOCKET_PROTOCOL, protocol),
    ];
    let (io, agreed) = upgrade(target, Method::GET, &headers).await?;
    let expected = derive_accept_key(key.as_bytes());
    let accepted = agreed.get(SEC_WEBSOCKET_ACCEPT).is_some_and(|accept| *accept == expected)
        && agreed.get(SEC_WEBSOCKET_PROTOCOL).is_some_and(|agreed| agreed == protocol);
    if !accepted {
        return Err(ConnectError::Protocol { address: address(&target.url), protocol });
    }
    Ok(io)
}

fn address(url: &str) -> String {
    url.parse::<Uri>().ok().and_then(|uri| Some(uri.authority()?.to_string())).unwrap_or_default()
}

async fn upgrade(
    Target { url, certificate }: &Target,
    method: Method,
    headers: &[(HeaderName, &str)],
) -> Result<(Io, HeaderMap), ConnectError> {
    let invalid = || ConnectError::Url { url: url.clone() };
    let uri: Uri = url.parse().map_err(|_| invalid())?;
    let Some(authority) = uri.authority() else { return Err(invalid()) };
    let address = authority.to_string();
    let certificate = match (uri.scheme_str(), certificate) {
        (Some("http"), _) => None,
        (Some("https"), Some(certificate)) => Some(certificate),
        (Some("https"), None) => return Err(ConnectError::NoCertificate { address }),
        _ => return Err(invalid()),
    };
    let mut request = Request::builder()
        .method(method)
        .uri(uri.path_and_query().map_or("/", |path| path.as_str()))
        .header(HOST, &address)
        .header(CONNECTION, "Upgrade");
    for (name, value) in headers {
        request = request.header(name, *value);
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|_| invalid())?;
    match tokio::time::timeout(LIMIT, exchange(&address, certificate, request)).await {
        Ok(upgraded) => upgraded,
        Err(_) => Err(ConnectError::Timeout { address }),
    }
}

async fn exchange(
    address: &str,
    certificate: Option<&Pinned>,
    request: Request<Empty<Bytes>>,
) -> Result<(Io, HeaderMap), ConnectError> {
    let stream = TcpStream::connect(address)
        .await
        .map_err(|source| ConnectError::Connect { address: address.to_owned(), source })?;
    // Keys are sent one by one.
    stream.set_nodelay(true).ok();
    let Some(certificate) = certificate else { return speak(address, stream, request).await };
    let proven = async {
        // The name means nothing to a client that knows the certificate.
        let name = ServerName::from(stream.peer_addr()?.ip());
        certificate.connector()?.connect(name, stream).await
    };
    let stream = proven.await.map_err(|source| ConnectError::Tls { address: address.to_owned(), source })?;
    speak(address, stream, request).await
}

async fn speak(
    address: &str,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Empty<Bytes>>,
) -> Result<(Io, HeaderMap), ConnectError> {
    let http = |source| ConnectError::Http { address: address.to_owned(), source };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    // Ends with the upgrade, or with the sender; its failures are the sender's, too.
    tokio::spawn(connection.with_upgrades());
    let response = sender.send_request(request).await.map_err(http)?;
    let status = response.status();
    if status != StatusCode::SWITCHING_PROTOCOLS {
        let words = match Limited::new(response.into_body(), MAX_WORDS).collect().await {
            Ok(body) => String::from_utf8_lossy(&body.to_bytes()).trim().to_owned(),
            Err(_) => String::new(),
        };
        return Err(ConnectError::Refused { address: address.to_owned(), status, words });
    }
    let headers = response.headers().clone();
    let io = hyper::upgrade::on(response).await.map_err(http)?;
    Ok((TokioIo::new(io), headers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_no_url_of_a_server_is_named() {
        for url in ["", "exec/token", "ftp://127.0.0.1:1/exec/token", "http:///exec"] {
            let target = Target { url: url.to_owned(), certificate: None };
            let error = websocket(&target, "v5.channel.k8s.io").await.map(drop).unwrap_err();
            assert!(matches!(&error, ConnectError::Url { url: named } if named == url), "{url}: {error}");
        }
    }

    #[tokio::test]
    async fn a_server_that_is_gone_is_named() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let target = Target { url: format!("http://{address}/exec/x"), certificate: None };
        let error = spdy(&target, "v4.channel.k8s.io").await.map(drop);
        assert!(
            matches!(error.unwrap_err(), ConnectError::Connect { address: named, .. } if named == address)
        );
    }
}
