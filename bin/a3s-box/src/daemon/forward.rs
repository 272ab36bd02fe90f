//! `port-forward`: listeners here, one SPDY connection to the daemon, dials in the pod.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, bail};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use a3s_box_cri::client::Client;
use a3s_box_streaming::client::Forwarder;

use super::args::PortForwardArgs;
use super::find;
use crate::failure::exit_code;
use crate::streams::{self, Event};
use crate::tell;
use crate::tell::note;

/// Connections at the same time; the daemon takes no more of one client.
const MAX_CONNECTIONS: usize = 1024;
/// Connections that wait to be looked at.
const BACKLOG: usize = 16;

/// `[[ADDR:]LOCAL:]REMOTE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Forward {
    local: SocketAddr,
    remote: u16,
}

impl Forward {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not REMOTE, LOCAL:REMOTE or ADDR:LOCAL:REMOTE, e.g. 8080:80");
        let (before, remote) = match text.rsplit_once(':') {
            Some((before, remote)) => (Some(before), remote),
            None => (None, text),
        };
        let remote: u16 = remote.parse().ok().filter(|port| *port > 0).ok_or_else(wrong)?;
        let (address, local) = match before.map(|before| before.rsplit_once(':').ok_or(before)) {
            None => (None, remote),
            Some(Err(local)) => (None, local_port(local).ok_or_else(wrong)?),
            Some(Ok((address, local))) => (Some(address), local_port(local).ok_or_else(wrong)?),
        };
        let address = match address {
            None | Some("localhost") => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Some(address) => {
                let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
                bare.unwrap_or(address).parse().map_err(|_| wrong())?
            }
        };
        Ok(Self { local: SocketAddr::new(address, local), remote })
    }
}

/// Nothing, as in `:80`, is a port that is free.
fn local_port(text: &str) -> Option<u16> {
    if text.is_empty() { Some(0) } else { text.parse().ok() }
}

/// Runs until it is asked to end.
pub(super) async fn port_forward(mut client: Client, args: PortForwardArgs) -> anyhow::Result<u8> {
    let mut events = streams::listen().context("could not listen for signals")?;
    let pod = find::pod(&mut client, &args.pod).await?;
    let mut listeners = Vec::new();
    for Forward { local, remote } in args.ports {
        let listener = TcpListener::bind(local).await.with_context(|| {
            format!("could not listen on {local}; choose another port, or 0 for one that is free")
        })?;
        listeners.push((listener, remote));
    }
    let ports: Vec<_> = listeners.iter().map(|(_, remote)| *remote).collect();
    let mut forwarder = Forwarder::connect(&client.port_forward(&pod.id, &ports).await?).await?;
    let (sender, mut accepted) = mpsc::channel(BACKLOG);
    // Aborted with the set.
    let mut tasks = JoinSet::new();
    for (listener, remote) in listeners {
        tell::out(format_args!("Forwarding from {} -> {remote}\n", listener.local_addr()?));
        tasks.spawn(accept(listener, remote, sender.clone()));
    }
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = forwarder.closed() => bail!("the connection to the daemon was lost"),
            event = events.recv() => match event {
                Some(Event::Signal(number)) => return Ok(exit_code(128 + number)),
                Some(Event::Resized) | None => {}
            },
            Some(_) = connections.join_next() => {}
            Some((mut stream, remote)) = accepted.recv() => {
                if connections.len() >= MAX_CONNECTIONS {
                    note!("a connection to port {remote} was turned away: there are {MAX_CONNECTIONS}");
                    continue;
                }
                let forwarded = forwarder.open(remote);
                connections.spawn(async move {
                    if let Err(error) = forwarded.carry(&mut stream).await {
                        note!("port {remote}: {error}");
                    }
                });
            }
        }
    }
}

/// Hands connections over until nobody takes them.
async fn accept(listener: TcpListener, remote: u16, sender: mpsc::Sender<(TcpStream, u16)>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                stream.set_nodelay(true).ok();
                if sender.send((stream, remote)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                note!("a connection to port {remote} could not be accepted: {error}");
                // Usually no descriptors; they come back when connections end.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_with_and_without_address() {
        let parsed = |text: &str| Forward::parse(text).map(|f| (f.local.to_string(), f.remote)).ok();
        let expected = |local: &str, remote| Some((local.to_owned(), remote));
        assert_eq!(parsed("80"), expected("127.0.0.1:80", 80));
        assert_eq!(parsed("8080:80"), expected("127.0.0.1:8080", 80));
        assert_eq!(parsed("0:80"), expected("127.0.0.1:0", 80));
        assert_eq!(parsed(":80"), expected("127.0.0.1:0", 80));
        assert_eq!(parsed("0.0.0.0:8080:80"), expected("0.0.0.0:8080", 80));
        assert_eq!(parsed("localhost:8080:80"), expected("127.0.0.1:8080", 80));
        assert_eq!(parsed("[::1]:8080:80"), expected("[::1]:8080", 80));
        for bad in ["", "0", "8080:0", "x:80", "host:1:2", "70000", "1:2:3:4x"] {
            assert_eq!(parsed(bad), None, "{bad}");
        }
    }
}
