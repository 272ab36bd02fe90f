//! Commands about the pods of the running daemon, over its CRI socket: what kubectl does through kubelet, without
//! either.

mod args;
mod attend;
mod call;
mod cp;
mod detach;
mod detached;
mod find;
mod forward;
mod logs;
mod ps;

use a3s_box_cri::client::Client;
use a3s_box_host::Config;
use a3s_box_streaming::Pinned;

pub(crate) use args::DaemonCommand;
pub(crate) use detached::start;

async fn connect(config: &Config) -> anyhow::Result<Client> {
    let certificate = config.streaming.tls_certificate.as_deref().map(Pinned::read).transpose()?;
    Ok(Client::connect(&config.socket(), certificate).await?)
}

/// Runs one of them and answers its exit code.
pub(crate) async fn run(config: Config, command: DaemonCommand) -> anyhow::Result<u8> {
    let client = connect(&config).await?;
    match command {
        DaemonCommand::Stop(args) => detached::stop(client, args).await,
        DaemonCommand::Rm(args) => detached::remove(&config, client, args).await,
        DaemonCommand::Ps(args) => ps::ps(client, args).await,
        DaemonCommand::Exec(args) => call::exec(client, args).await,
        DaemonCommand::Attach(args) => call::attach(client, args).await,
        DaemonCommand::PortForward(args) => forward::port_forward(client, args).await,
        DaemonCommand::Logs(args) => logs::logs(client, args).await,
        DaemonCommand::Cp(args) => cp::cp(client, args).await,
    }
}
