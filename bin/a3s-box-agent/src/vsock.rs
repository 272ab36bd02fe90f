//! Connections between host and guest.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use a3s_box_protocol::MAX_GUEST_WRITE;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use tonic::transport::server::Connected;

/// After an error.
const PAUSE: Duration = Duration::from_millis(100);

/// Listens on a port.
pub fn listen(port: u32) -> io::Result<VsockListener> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
}

/// The next connection of the host. Others are refused: with vsock loopback any process in the guest could
/// connect to the agent. An error, be it that descriptors have run out, passes; the box lives on.
pub async fn accept(listener: &VsockListener) -> VsockStream {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => return stream,
            Ok(_) => {}
            Err(error) => {
                say!("accept a connection: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Dials the host.
pub async fn dial(port: u32) -> io::Result<VsockStream> {
    VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port)).await
}

/// A connection that never writes more at once than every backend carries.
#[derive(Debug)]
pub struct Capped(pub VsockStream);

impl AsyncRead for Capped {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Capped {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let buf = &buf[..buf.len().min(MAX_GUEST_WRITE)];
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl Connected for Capped {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}
