//! The socket: binding it so that nobody is pushed aside, and serving both services on it.
//!
//! The HTTP/2 library insists on an `:authority` that could stand in a URL. Kubelet and crictl send
//! `localhost`; clients that send the socket's path instead are reset with PROTOCOL_ERROR and must be
//! told to send another one (`grpcurl -authority localhost`).

use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::deadline::DeadlineLayer;
use crate::proto::image_service_server::ImageServiceServer;
use crate::proto::runtime_service_server::RuntimeServiceServer;
use crate::service::CriService;

/// Requests are small, except for pods with very many variables and mounts.
const MAX_REQUEST: usize = 16 * 1024 * 1024;

/// Whoever may use the socket is root on this node: its owner and group, nobody else.
const SOCKET_MODE: u32 = 0o660;

/// Why the socket could not be served.
#[derive(Debug, Error)]
pub enum ServerError {
    /// Another process serves it.
    #[error("{} is served by another process; stop it or choose another socket", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket has its name.
    #[error("{} exists and is not a socket; move it away or choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("could not {operation} {}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The server ended before it was asked to.
    #[error("serving CRI failed: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Listens on `path`. A socket that nobody listens on is left from a crash and is replaced.
pub async fn bind(path: &Path) -> Result<UnixListener, ServerError> {
    let failed = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| ServerError::Io { operation, path, source }
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed("create the folder", parent))?;
    }
    remove_stale(path).await?;
    let listener = UnixListener::bind(path).map_err(failed("listen on", path))?;
    let mode = std::fs::Permissions::from_mode(SOCKET_MODE);
    std::fs::set_permissions(path, mode).map_err(failed("set the mode of", path))?;
    Ok(listener)
}

async fn remove_stale(path: &Path) -> Result<(), ServerError> {
    use std::os::unix::fs::FileTypeExt;
    let failed = |operation| move |source| ServerError::Io { operation, path: path.to_owned(), source };
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at")(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ServerError::NotASocket { path: path.to_owned() });
    }
    match UnixStream::connect(path).await {
        Ok(_) => Err(ServerError::InUse { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed("remove the stale socket"))
        }
        Err(error) => Err(failed("try to connect to")(error)),
    }
}

/// Serves both services until `shutdown` completes; calls that are under way are finished first.
pub async fn serve(
    listener: UnixListener,
    service: CriService,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServerError> {
    let stopping = service.stopping.clone();
    let shutdown = async move {
        shutdown.await;
        stopping.cancel();
    };
    let runtime = RuntimeServiceServer::new(service.clone()).max_decoding_message_size(MAX_REQUEST);
    let image = ImageServiceServer::new(service).max_decoding_message_size(MAX_REQUEST);
    Server::builder()
        .layer(DeadlineLayer)
        .add_service(runtime)
        .add_service(image)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_left_from_a_crash_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/cri.sock");
        let first = bind(&path).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, SOCKET_MODE);
        assert!(matches!(bind(&path).await, Err(ServerError::InUse { .. })));
        drop(first);
        bind(&path).await.unwrap();
    }

    #[tokio::test]
    async fn a_file_of_the_sockets_name_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cri.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path).await, Err(ServerError::NotASocket { .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }
}
