//! The arguments of these commands.

use clap::{Args, Subcommand};

use super::cp::Place;
use super::forward::Forward;
use super::logs::Since;

#[derive(Debug, Subcommand)]
pub(crate) enum DaemonCommand {
    /// List containers or pods
    Ps(PsArgs),
    /// Run a command in a running container
    Exec(ExecArgs),
    /// Connect to the process of a running container
    Attach(AttachArgs),
    /// Listen here and connect to ports of a pod
    PortForward(PortForwardArgs),
    /// Print what a container has written
    Logs(LogsArgs),
    /// Copy files into a container or out of it
    Cp(CpArgs),
    /// End containers of `run -d`; their output stays
    Stop(StopArgs),
    /// Remove containers of `run -d` with their output
    Rm(RmArgs),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct StopArgs {
    /// Their names, or the beginnings of their ids
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
    /// Seconds between the signal and the kill
    #[arg(short = 't', long, value_name = "SECONDS", default_value_t = 10)]
    pub(crate) time: u32,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct RmArgs {
    /// Their names, or the beginnings of their ids
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
    /// End them if they still run
    #[arg(short = 'f', long)]
    pub(crate) force: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PsArgs {
    /// Also what does not run any more
    #[arg(short = 'a', long)]
    pub(crate) all: bool,
    /// Pods instead of containers
    #[arg(long)]
    pub(crate) pods: bool,
    /// Print whole ids and nothing else
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ExecArgs {
    /// Its name, POD/NAME, or the beginning of its id
    pub(crate) container: String,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
    /// Pass stdin on
    #[arg(short = 'i', long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short = 't', long)]
    pub(crate) tty: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct AttachArgs {
    /// Its name, POD/NAME, or the beginning of its id
    pub(crate) container: String,
    /// Pass stdin on
    #[arg(short = 'i', long)]
    pub(crate) interactive: bool,
    /// The container has a terminal; Ctrl-P Ctrl-Q leaves it
    #[arg(short = 't', long)]
    pub(crate) tty: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PortForwardArgs {
    /// Its name, NAMESPACE/NAME, or the beginning of its id
    pub(crate) pod: String,
    /// Ports of this machine and of the pod; local port 0 is one that is free
    #[arg(required = true, value_name = "[[ADDR:]LOCAL:]REMOTE", value_parser = Forward::parse)]
    pub(crate) ports: Vec<Forward>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct LogsArgs {
    /// Its name, POD/NAME, or the beginning of its id
    pub(crate) container: String,
    /// Go on until the container has ended
    #[arg(short = 'f', long)]
    pub(crate) follow: bool,
    /// Only what is younger than this (10m, 2h) or than this time (2026-01-02T15:04:05Z); rotated logs are read, too
    #[arg(long, value_name = "DURATION|TIME", value_parser = Since::parse)]
    pub(crate) since: Option<Since>,
    /// Only the last lines of the log
    #[arg(long, value_name = "N")]
    pub(crate) tail: Option<usize>,
    /// Put the time before each line
    #[arg(short = 't', long)]
    pub(crate) timestamps: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct CpArgs {
    /// A file or directory: CONTAINER:PATH or a path of this machine (./a:b if it has a colon)
    #[arg(value_parser = Place::parse)]
    pub(crate) from: Place,
    /// Where to: the other kind; in a directory that exists the name is kept
    #[arg(value_parser = Place::parse)]
    pub(crate) to: Place,
}
