//! The command line: run, doctor and friends.
//!
//! Only [`daemon`] needs the daemon. `run` brings a box manager of its own along, with directories of its own; images
//! that it pulls are kept in a store that all invocations share and the daemon does not use.

mod cli;
mod credentials;
mod daemon;
mod failure;
mod habits;
mod image;
mod images;
mod invocation;
mod mounts;
mod progress;
mod publish;
mod report;
mod run;
mod size;
mod spec;
mod standalone;
mod streams;
mod table;
mod tell;
mod terminal;
mod timings;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

use a3s_box_host::Config;

use cli::{Cli, Command, ConfigCommand};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(asked) => {
            // A reader that is gone needs no help.
            let _ = asked.print();
            return ExitCode::from(failure::usage_code(&asked));
        }
    };
    let code = match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            failure::print(&error);
            failure::OUR_FAILURE
        }
    };
    ExitCode::from(code)
}

fn dispatch(cli: Cli) -> anyhow::Result<u8> {
    if let Command::Config { command: ConfigCommand::Default } = cli.command {
        tell::out(Config::default_file());
        return Ok(0);
    }
    let config = cli.config.load()?;
    init_tracing(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("could not start the async runtime")?;
    let code = runtime.block_on(command(cli.command, config));
    // A read of stdin that nobody will answer blocks its thread for ever.
    runtime.shutdown_background();
    code
}

async fn command(command: Command, config: Config) -> anyhow::Result<u8> {
    match command {
        Command::Run(args) if args.detach => daemon::start(config, *args).await,
        Command::Run(args) => run::run(config, args).await,
        Command::Pull(args) => images::pull(config, args).await,
        Command::Images(args) => images::list(config, args).await,
        Command::Rmi(args) => images::remove(config, args).await,
        Command::Image { command } => image::run(config, command).await,
        Command::Daemon(command) => daemon::run(config, command).await,
        Command::Doctor { json } => report::doctor(config, json).await,
        Command::Config { command: ConfigCommand::Default | ConfigCommand::Show } => {
            tell::out(config.render());
            Ok(0)
        }
        Command::Config { command: ConfigCommand::Check } => {
            tell::out(format_args!("the configuration is right\n"));
            Ok(0)
        }
        Command::Version => {
            tell::out(format_args!("a3s-box {}\n", env!("CARGO_PKG_VERSION")));
            Ok(0)
        }
    }
}

/// People asked for their command's output; what fails is told at the end. Of the rest they see what they ask for.
fn init_tracing(config: &Config) -> anyhow::Result<()> {
    let level = match config.origin("log.level") {
        Some(a3s_box_host::config::Origin::File { .. }) | None => "error",
        Some(_) => &config.log.level,
    };
    let filter = tracing_subscriber::EnvFilter::try_new(level)
        .with_context(|| format!("log.level {level:?} is not a filter"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .init();
    Ok(())
}
