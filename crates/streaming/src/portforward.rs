//! port-forward: pairs of streams, one for data and one for what went wrong.
//!
//! Over SPDY a client opens an error stream and a data stream with the same `requestID` for every connection. Over
//! plain WebSocket the ports are those of the request, two channels each, and each channel of the server begins with
//! the port as two little-endian bytes.
//!
//! Reference: Kubernetes `apimachinery/pkg/util/portforward`, `kubelet/pkg/cri/streaming/portforward`.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes, join};
use tokio::task::JoinSet;

use crate::backend::{Backend, PortForwardRequest};
use crate::chunks::{ChunkReader, ChunkWriter};
use crate::remotecommand::Limits;
use crate::spdy::{self, Incoming, Stream};
use crate::websocket::{self, channels::Protocol};

/// Connections of one client, and pairs that are not complete.
const MAX_CONNECTIONS: usize = 1024;
const MAX_HALF_PAIRS: usize = 128;

/// Bytes that are copied at once.
const BUFFER: usize = 32 * 1024;

/// One half of a pair, waiting for the other.
enum Half {
    Data(Stream),
    Error(Stream),
}

/// Serves a client that speaks SPDY until it goes.
pub(crate) async fn over_spdy<B: Backend>(
    backend: Arc<B>,
    request: PortForwardRequest,
    connection: spdy::Connection,
    mut incoming: Incoming,
    limits: Limits,
) {
    let mut halves: HashMap<(String, u16), (tokio::time::Instant, Half)> = HashMap::new();
    let mut connections = JoinSet::new();
    let mut sweep = tokio::time::interval(limits.creation.max(std::time::Duration::from_millis(10)));
    loop {
        let stream = tokio::select! {
            stream = incoming.recv() => stream,
            Some(_) = connections.join_next() => continue,
            _ = sweep.tick() => {
                // Dropped halves are reset, which their client sees.
                halves.retain(|_, (since, _)| since.elapsed() < limits.creation);
                continue;
            }
            () = connection.idle(limits.idle) => {
                tracing::info!(limit = ?limits.idle, "an idle client was cut off");
                return;
            }
        };
        let Some(stream) = stream else { return };
        let port = stream.header("port").and_then(|port| port.parse::<u16>().ok()).filter(|port| *port > 0);
        let (Some(port), Some(id)) = (port, stream.header("requestid").map(str::to_owned)) else { continue };
        let new = match stream.header("streamtype") {
            Some("data") => Half::Data(stream),
            Some("error") => Half::Error(stream),
            Some(_) | None => continue,
        };
        let key = (id, port);
        let (data, error) = match (halves.remove(&key).map(|(_, half)| half), new) {
            (Some(Half::Error(error)), Half::Data(data)) | (Some(Half::Data(data)), Half::Error(error)) => {
                (data, error)
            }
            // A second one of a kind takes the place of the first.
            (Some(_) | None, half) => {
                if halves.len() < MAX_HALF_PAIRS {
                    halves.insert(key, (tokio::time::Instant::now(), half));
                }
                continue;
            }
        };
        if connections.len() < MAX_CONNECTIONS {
            let (backend, pod) = (backend.clone(), request.pod_sandbox_id.clone());
            connections.spawn(async move {
                forward(&*backend, &pod, port, (data.reader, data.writer), error.writer).await;
            });
        }
    }
}

/// One connection, from the dial to the end of both directions.
async fn forward<B: Backend>(
    backend: &B,
    pod: &str,
    port: u16,
    (reader, writer): (ChunkReader, ChunkWriter),
    mut error: ChunkWriter,
) {
    let mut data = join(reader, writer);
    match backend.dial(pod, port).await {
        Ok(mut inside) => {
            // Each direction's end is passed on by itself. One that breaks shows itself as an end on the other side.
            if let Err(broken) = copy_bidirectional_with_sizes(&mut data, &mut inside, BUFFER, BUFFER).await {
                tracing::debug!(port, %broken, "a forwarded connection broke");
            }
        }
        Err(failure) => {
            error.write_all(failure.message.as_bytes()).await.ok();
        }
    }
    error.shutdown().await.ok();
    data.shutdown().await.ok();
}

/// Serves a client that speaks WebSocket with channels: the ports of the request, one connection each.
pub(crate) async fn over_websocket<B: Backend>(
    backend: Arc<B>,
    request: PortForwardRequest,
    protocol: Protocol,
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    limits: Limits,
) {
    let channels: Vec<u8> = (0..request.ports.len() as u8).map(|index| index * 2).collect();
    let (connection, mut readers) = websocket::Connection::serve(io, protocol, &channels).await;
    let mut connections = JoinSet::new();
    for (channel, port) in channels.into_iter().zip(request.ports) {
        let Some(reader) = readers.remove(&channel) else { continue };
        let (mut data, mut error) = (connection.writer(channel), connection.writer(channel + 1));
        let (backend, pod) = (backend.clone(), request.pod_sandbox_id.clone());
        connections.spawn(async move {
            let greeted = async {
                data.write_all(&port.to_le_bytes()).await?;
                error.write_all(&port.to_le_bytes()).await
            };
            if greeted.await.is_ok() {
                forward(&*backend, &pod, port, (reader, data), error).await;
            }
        });
    }
    tokio::select! {
        () = async { while connections.join_next().await.is_some() {} } => connection.finish().await,
        () = connection.closed() => {}
        () = connection.idle(limits.idle) => tracing::info!(limit = ?limits.idle, "an idle client was cut off"),
    }
}
