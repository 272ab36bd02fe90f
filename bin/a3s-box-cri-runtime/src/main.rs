//! The CRI daemon: configuration, tracing, composition root.
//!
//! It holds nothing that a pod needs in order to run. When it ends, boxes go on; when it comes back it
//! finds them again through their records.

mod compose;
mod logging;
mod stop;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use a3s_box_cri::{Containers, CriService, server};
use a3s_box_host::{Config, ConfigFlags, Host, make_private_dir};
use a3s_box_streaming::Server;
use clap::Parser;
use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;

/// Calls that are under way when the daemon is asked to stop get this long. Kubelet repeats the rest.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// The CRI runtime in which every pod is a microVM.
#[derive(Debug, Parser)]
#[command(name = "a3s-box-cri-runtime", version)]
struct Arguments {
    #[command(flatten)]
    config: ConfigFlags,
}

fn main() -> ExitCode {
    match start(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("a3s-box-cri-runtime: {}", logging::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &Arguments) -> anyhow::Result<()> {
    let config = arguments.config.load()?;
    logging::start(&config.log)?;
    // Once the machine or a cgroup allows no more threads, work goes on with those there are: they must not end.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().thread_keep_alive(Duration::MAX).build()?;
    runtime.block_on(run(config))
}

/// The socket is bound before the slow part of the start, so that clients wait for an answer instead of
/// being refused, and a second daemon ends at once.
async fn run(config: Config) -> anyhow::Result<()> {
    let mut stop = stop::Signals::listen()?;
    let socket = config.socket();
    // The socket usually lies in the run directory, which is to be ours alone from its first moment.
    make_private_dir(&config.run_dir)?;
    let listener = server::bind(&socket).await?;
    let outcome = tokio::select! {
        // A signal during the start ends it; nothing is served yet.
        biased;
        signal = stop.next() => {
            tracing::info!(signal, "asked to stop before the start was complete");
            Ok(())
        }
        host = Host::start(config) => match host {
            Ok(host) => serve(listener, host, &mut stop, &socket).await,
            Err(error) => Err(error.into()),
        },
    };
    remove_socket(&socket);
    outcome
}

async fn serve(
    listener: tokio::net::UnixListener,
    host: Host,
    stop: &mut stop::Signals,
    socket: &Path,
) -> anyhow::Result<()> {
    let streaming = Server::bind(&compose::streaming(&host.config)?).await?;
    let streams = streaming.urls();
    let service = CriService::new(host.boxes.clone(), host.images.clone(), streams, compose::settings(&host));
    let stop_streaming = CancellationToken::new();
    let containers = Arc::new(Containers::new(host.boxes.clone()));
    let streaming = tokio::spawn(streaming.serve(containers, stop_streaming.clone()));
    let (ask, asked) = tokio::sync::oneshot::channel::<()>();
    let serving = server::serve(listener, service, async {
        // A dropped sender means the same.
        let _ = asked.await;
    });
    tokio::pin!(serving);
    tracing::info!(socket = %socket.display(), backend = host.choice.name(), "serving CRI v1");
    notify(&[NotifyState::Ready]);
    let served = tokio::select! {
        // A server that ended by itself is a failure even if a signal came too.
        biased;
        ended = &mut serving => ended,
        signal = stop.next() => {
            tracing::info!(signal, "stopping; boxes keep running");
            notify(&[NotifyState::Stopping]);
            drop(ask);
            match tokio::time::timeout(DRAIN_LIMIT, &mut serving).await {
                Ok(ended) => ended,
                Err(_) => {
                    tracing::warn!("calls still under way after {DRAIN_LIMIT:?} were cut off");
                    Ok(())
                }
            }
        }
    };
    stop_streaming.cancel();
    if let Err(error) = streaming.await {
        tracing::error!(%error, "the streaming server failed");
    }
    host.boxes.shutdown().await;
    Ok(served?)
}

/// Without a service manager there is nobody to tell, which is no failure.
fn notify(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager could not be told");
    }
}

fn remove_socket(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(%error, socket = %path.display(), "the socket could not be removed");
    }
}
