//! From the kernel's first jump into /init to an agent that serves.

pub mod mounts;

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use a3s_box_protocol::framing::{FramingError, write_message};
use a3s_box_protocol::proto::agent_server::AgentServer;
use a3s_box_protocol::proto::{BootStage, Ready};
use a3s_box_protocol::{PROTOCOL, READY_PORT, RPC_PORT, STREAM_PORT};
use rustix::time::{ClockId, clock_gettime};
use thiserror::Error;
use tokio::sync::SetOnce;
use tokio::time::timeout;
use tokio_vsock::VsockListener;

use crate::reaper::Reaper;
use crate::rpc::Service;
use crate::session::cgroup;
use crate::session::table::Table;
use crate::vsock::{self, Capped};
use crate::{clock, forget, netlink, streams};
use mounts::MountError;

/// No message of the host is larger: a command line may have 1 MiB, an environment 10,000 entries.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// The longest that calls wait for a first look at the host's clock.
const CLOCK_LIMIT: Duration = Duration::from_secs(1);

/// Why the box does not come up.
#[derive(Debug, Error)]
pub enum BootError {
    /// File systems.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// Something else of the kernel's.
    #[error("{step}: {source}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The host does not take the ready message.
    #[error("tell the host that the box is ready: {0}")]
    Ready(#[from] FramingError),
    /// The service ended.
    #[error("serve: {0}")]
    Serve(#[from] tonic::transport::Error),
}

fn step(step: &'static str) -> impl FnOnce(io::Error) -> BootError {
    move |source| BootError::Step { step, source }
}

/// The moments of this boot.
#[derive(Debug, Default)]
pub struct Stages(Vec<BootStage>);

impl Stages {
    /// Notes that a stage is done.
    pub fn mark(&mut self, name: &str) {
        let now = clock_gettime(ClockId::Boottime);
        let at_us = now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1_000;
        self.0.push(BootStage { name: name.to_owned(), at_us });
    }
}

/// Boots and serves; comes back only with a reason to end the box.
pub fn run() -> Result<(), BootError> {
    let mut stages = Stages::default();
    stages.mark("kernel");
    mounts::make_root()?;
    mounts::mount_kernel_file_systems()?;
    prepare_process();
    mounts::mount_host_file_systems()?;
    cgroup::set_up_root().map_err(step("set up cgroups"))?;
    netlink::loopback_up().map_err(step("bring the loopback interface up"))?;
    mounts::seal_root()?;
    stages.mark("mounts");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(step("start the runtime"))?;
    runtime.block_on(serve(stages))
}

/// Settings of the agent's own process.
fn prepare_process() {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    // If memory runs out, a session's process must go, never the agent. Descriptors: every session holds about ten.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let limit = rustix::process::Rlimit { current: Some(65_536), maximum: Some(1_048_576) };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
}

async fn serve(mut stages: Stages) -> Result<(), BootError> {
    let reaper = Reaper::default();
    let table = Table::new(reaper.clone());
    let calls = vsock::listen(RPC_PORT).map_err(step("listen for calls on vsock"))?;
    let stdio = vsock::listen(STREAM_PORT).map_err(step("listen for streams on vsock"))?;
    stages.mark("agent");
    let clock_set = SetOnce::new();
    let answer = async {
        announce(stages).await?;
        // Calls start programs, which shall find the host's time. A host that does not tell it in time is not waited for.
        let _ = timeout(CLOCK_LIMIT, clock_set.wait()).await;
        let service = AgentServer::new(Service::new(table.clone()))
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        let server = tonic::transport::Server::builder().add_service(service);
        server.serve_with_incoming(connections(calls)).await.map_err(BootError::Serve)
    };
    // None of these ends in a healthy box.
    tokio::select! {
        answered = answer => answered,
        never = accept_streams(stdio, table.clone()) => match never {},
        never = clock::follow(&clock_set) => match never {},
        never = forget::when_asked() => match never {},
        reaped = reaper.run() => reaped.map_err(step("reap processes")),
    }
}

async fn announce(stages: Stages) -> Result<(), BootError> {
    let ready = Ready {
        protocol: PROTOCOL,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
        stages: stages.0,
    };
    let stream = vsock::dial(READY_PORT).await.map_err(step("dial the host"))?;
    write_message(&mut Capped(stream), &ready).await?;
    Ok(())
}

fn connections(listener: VsockListener) -> impl tokio_stream::Stream<Item = io::Result<Capped>> {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let accepted = Capped(vsock::accept(&listener).await);
            if sender.send(Ok(accepted)).await.is_err() {
                return;
            }
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(receiver)
}

async fn accept_streams(listener: VsockListener, table: Table) -> Infallible {
    loop {
        let stream = vsock::accept(&listener).await;
        let table = table.clone();
        tokio::spawn(async move {
            let (from_host, to_host) = stream.into_split();
            // The host has hung up, or its process has ended: both are how streams end.
            let _ = streams::serve(&table, from_host, to_host).await;
        });
    }
}
