//! Commands about the pods of the running daemon, over its CRI socket: what kubectl does through kubelet, without
//! either.

mod args;
mod attend;
mod call;
mod cp;
mod detach;
mod find;
mod forward;
mod logs;
mod ps;

use a3s_box_cri::client::Client;
use a3s_box_host::Config;
use a3s_box_streaming::Pinned;

pub(crate) use args::DaemonCommand;

/// Runs one of them and answers its exit code.
pub(crate) async fn run(config: Config, command: DaemonCommand) -> anyhow::Result<u8> {
    let certificate = config.streaming.tls_certificate.as_deref().map(Pinned::read).transpose()?;
    let client = Client::connect(&config.socket(), certificate).await?;
    match command {
        DaemonCommand::Ps(args) => ps::ps(client, args).await,
        DaemonCommand::Exec(args) => call::exec(client, args).await,
        DaemonCommand::Attach(args) => call::attach(client, args).await,
        DaemonCommand::PortForward(args) => forward::port_forward(client, args).await,
        DaemonCommand::Logs(args) => logs::logs(client, args).await,
        DaemonCommand::Cp(args) => cp::cp(client, args).await,
    }
}
