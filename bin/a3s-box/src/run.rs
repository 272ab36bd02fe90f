//! `run`: one command in a microVM of its own.
//!
//! ```text
//!   directories ──> box boots ─────────┐
//!               └─> image is fetched ──┴──> session ──> streams, signals ──> exit code ──> all removed
//! ```
//!
//! Whatever happens after the directories exist (a failure, a signal, a panic) ends in [`Invocation::end`].

use std::io::IsTerminal;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use futures::FutureExt;
use tokio::sync::mpsc;

use a3s_box_core::egress::EgressPolicy;
use a3s_box_core::image::ResolvedImage;
use a3s_box_core::lifecycle::SessionPhase;
use a3s_box_core::spec::{DnsSpec, NetworkMode};
use a3s_box_core::{BoxId, SessionId};
use a3s_box_host::Config;
use a3s_box_host::config::{NetworkFallback, NetworkMode as NodeNetwork};
use a3s_box_runtime::{Attached, BoxManager, ProgramFault, RuntimeError, SessionStatus};

use crate::cli::{Network, RunArgs};
use crate::credentials::Login;
use crate::failure::{self, exit_code};
use crate::invocation::{self, Invocation};
use crate::progress::Show;
use crate::spec;
use crate::standalone::Standalone;
use crate::streams::{self, Attempts, Copied, Event, Urgency};
use crate::tell;
use crate::tell::note;
use crate::terminal::{self, RawMode};
use crate::timings::Timings;

/// Output that is still on its way when the command has ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
const OUTPUT_FAILED: &str = "could not copy the command's output";

/// Runs the command and answers its exit code.
pub(crate) async fn run(config: Config, args: Box<RunArgs>) -> anyhow::Result<u8> {
    check(&args)?;
    let login = Login::new(&args.login)?;
    let began = Instant::now();
    let config = configured(config, &args);
    if config.network.mode == NodeNetwork::None && !args.publish.is_empty() {
        bail!(
            "a box without a network has no ports to publish: leave out -p, or --network none and network.mode = \"none\""
        );
    }
    let egress = args.egress.as_deref().map(|text| EgressPolicy::parse(text, &config.network.cluster_cidrs));
    let egress = egress.transpose().context("--egress")?;
    // From here on a signal is an event: nothing is left behind because of one.
    let events = streams::listen().context("could not listen for signals")?;
    invocation::sweep(&config).await;
    let invocation = Invocation::begin(&config)?;
    let boxes = match invocation.boxes().await {
        Ok(boxes) => boxes,
        Err(error) => {
            invocation.forget()?;
            return Err(error);
        }
    };
    let mut timings = Timings::since(began);
    timings.record("host", began);
    let name = args.name.clone().unwrap_or_else(|| invocation.name.clone());
    let show_timings = args.timings;
    let work = Work { boxes: boxes.clone(), config, args: *args, egress, login, name, timings };
    // A panic becomes a value, so that cleaning up comes after it too. What it left half-done is dropped with it.
    let done = AssertUnwindSafe(work.complete(events)).catch_unwind().await;
    let since = Instant::now();
    let ended = invocation.end(&boxes).await;
    let (code, mut timings) =
        done.map_err(|_| anyhow!("a3s-box itself failed; this is a bug, please report it"))??;
    if show_timings {
        timings.record("remove", since);
        timings.record("total", began);
        tell::err(timings.render());
    }
    ended.map(|()| code)
}

fn check(args: &RunArgs) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("`a3s-box run` makes virtual machines, namespaces and mounts: run it as root");
    }
    args.habits.check()?;
    if args.tty && args.interactive && !std::io::stdin().is_terminal() {
        bail!("stdin is not a terminal, so -i and -t do not go together; leave out -t");
    }
    if args.interactive && args.login.password_stdin {
        bail!(
            "stdin cannot be both the command's (-i) and the password's; fetch the image with `a3s-box pull` first"
        );
    }
    Ok(())
}

/// A node without CNI still connects boxes of `run`, unless somebody has written that it must not.
fn configured(mut config: Config, args: &RunArgs) -> Config {
    match args.network {
        None if config.origin("network.fallback").is_some() => {}
        None => config.network.fallback = NetworkFallback::Local,
        Some(Network::Cni) => {
            config.network.mode = NodeNetwork::Cni;
            config.network.fallback = NetworkFallback::None;
        }
        Some(Network::Local) => config.network.mode = NodeNetwork::Local,
        Some(Network::None) => config.network.mode = NodeNetwork::None,
    }
    config
}

struct Work {
    boxes: BoxManager,
    config: Config,
    args: RunArgs,
    egress: Option<EgressPolicy>,
    login: Login,
    name: String,
    timings: Timings,
}

impl Work {
    async fn complete(mut self, mut events: mpsc::Receiver<Event>) -> anyhow::Result<(u8, Timings)> {
        let limit = self.args.timeout;
        let code = match limit {
            None => self.work(&mut events).await?,
            // The box is removed by the caller, and with it whatever still runs.
            Some(limit) => match tokio::time::timeout(limit, self.work(&mut events)).await {
                Ok(code) => code?,
                Err(_) => {
                    note!("not done after {limit:?} (--timeout): killed");
                    failure::TIMED_OUT
                }
            },
        };
        Ok((code, self.timings))
    }

    async fn work(&mut self, events: &mut mpsc::Receiver<Event>) -> anyhow::Result<u8> {
        let prepared = tokio::select! {
            prepared = self.prepare() => prepared?,
            signal = ending_signal(events) => return Ok(exit_code(128 + signal)),
        };
        let Prepared { session, attached } = prepared;
        let since = Instant::now();
        // Raw from before the start: what the user types early must not be echoed twice.
        let _raw = match self.args.tty && self.args.interactive {
            true => Some(RawMode::enter().context("could not switch the terminal to raw mode")?),
            false => None,
        };
        if let Err(error) = self.boxes.start_session(&session).await {
            return start_failure(error);
        }
        if self.args.tty {
            self.resize(&session).await;
        }
        self.timings.record("start", since);
        let since = Instant::now();
        let code = self.attend(&session, attached, events).await?;
        self.timings.record("command", since);
        Ok(code)
    }

    /// The box boots while the image is looked up or fetched.
    async fn prepare(&mut self) -> anyhow::Result<Prepared> {
        let began = Instant::now();
        for publish in &mut self.args.publish {
            for chosen in publish.choose()? {
                note!("{chosen}");
            }
        }
        let image = async {
            let image = self.image().await?;
            Ok((image, Instant::now()))
        };
        let boot = async {
            let id = self.boot().await?;
            Ok::<_, anyhow::Error>((id, Instant::now()))
        };
        let ((image, image_done), (id, box_done)) = tokio::try_join!(image, boot)?;
        self.timings.record_until("image", began, image_done);
        self.timings.record_until("box", began, box_done);
        self.timings.record_box(began, &self.boxes.box_status(&id)?.timeline);
        let since = Instant::now();
        let session_spec = spec::session_spec(&self.args, &image.config, &|name| std::env::var(name).ok())?;
        let session = self.boxes.create_session(&id, session_spec, image).await?;
        let attached = self.boxes.attach(&session).await?;
        self.timings.record("create", since);
        Ok(Prepared { session, attached })
    }

    async fn image(&self) -> anyhow::Result<ResolvedImage> {
        let store = Standalone::open(&self.config, &self.args.registry.plain_http).await?;
        let show = if self.args.quiet { Show::Quiet } else { Show::Progress };
        store.image(&self.args.image, self.args.pull, show, &self.login).await
    }

    async fn boot(&self) -> anyhow::Result<BoxId> {
        let network = self.network().await?;
        let mut spec =
            spec::box_spec(&self.args, &self.name, self.config.size, network, self.resolver(network));
        spec.egress = self.egress.clone();
        Ok(self.boxes.run_box(spec).await?)
    }

    /// Without a word from the user a node without a network still runs commands, and says what it lacks.
    async fn network(&self) -> anyhow::Result<NetworkMode> {
        match self.args.network {
            Some(Network::Cni | Network::Local) => Ok(NetworkMode::Pod),
            Some(Network::None) => Ok(NetworkMode::None),
            None => {
                let status = self.boxes.network_status().await;
                if status.ready {
                    return Ok(NetworkMode::Pod);
                }
                if !self.args.publish.is_empty() {
                    bail!("cannot publish ports of a box that has no network: {}", status.message);
                }
                if !self.args.quiet {
                    note!("no network in the box: {} (--network none says so quietly)", status.message);
                }
                Ok(NetworkMode::None)
            }
        }
    }

    fn resolver(&self, network: NetworkMode) -> Option<DnsSpec> {
        match network {
            NetworkMode::None => None,
            NetworkMode::Pod if !self.args.dns.is_empty() => Some(DnsSpec {
                servers: self.args.dns.iter().map(ToString::to_string).collect(),
                searches: self.args.dns_search.clone(),
                options: Vec::new(),
            }),
            NetworkMode::Pod => {
                let mut found = a3s_box_host::host_resolver();
                if let Some(found) = &mut found
                    && !self.args.dns_search.is_empty()
                {
                    found.searches.clone_from(&self.args.dns_search);
                }
                if found.is_none() && !self.args.quiet {
                    note!("no name server in the box: those of this host listen on its loopback only");
                }
                found
            }
        }
    }

    /// Copies the streams and forwards events until the command has ended and its output is written.
    async fn attend(
        &self,
        session: &SessionId,
        attached: Attached,
        events: &mut mpsc::Receiver<Event>,
    ) -> anyhow::Result<u8> {
        if let Some(stdin) = attached.stdin {
            // Not joined: a read of a terminal ends when the user types something.
            tokio::spawn(streams::input(stdin));
        }
        let outputs = streams::outputs(attached.stdout, attached.stderr);
        tokio::pin!(outputs);
        let ended = self.boxes.wait_session(session);
        tokio::pin!(ended);
        let mut attempts = Attempts::default();
        let mut all_written = false;
        let status = loop {
            tokio::select! {
                // The end comes first: an event for a command that is gone is for nobody.
                biased;
                status = &mut ended => break status?,
                copied = &mut outputs, if !all_written => match copied.context(OUTPUT_FAILED)? {
                    Copied::ToTheEnd => all_written = true,
                    // The caller removes the box: that is the SIGPIPE.
                    Copied::ReaderGone => return Ok(failure::BROKEN_PIPE),
                },
                Some(event) = events.recv() => self.forward(session, event, &mut attempts).await,
            }
        };
        if !all_written {
            match tokio::time::timeout(DRAIN_LIMIT, outputs).await {
                Ok(copied) => {
                    copied.context(OUTPUT_FAILED)?;
                }
                Err(_) => {
                    note!("the command ended, but its output stayed open: the rest is lost")
                }
            }
        }
        how_it_ended(status)
    }

    async fn forward(&self, session: &SessionId, event: Event, attempts: &mut Attempts) {
        let number = match event {
            Event::Resized => return self.resize(session).await,
            Event::Signal(number) => match attempts.decide(number) {
                Urgency::Forward => number,
                Urgency::ForwardAndHint => {
                    note!("the command still runs; once more kills it");
                    number
                }
                Urgency::Kill => nix::libc::SIGKILL,
            },
        };
        // One that has ended since needs no signal.
        if let Err(error) = self.boxes.signal_session(session, number).await {
            tracing::debug!(%error, number, "signal not delivered");
        }
    }

    async fn resize(&self, session: &SessionId) {
        let Some((rows, columns)) = terminal::window_size().filter(|_| self.args.tty) else { return };
        if let Err(error) = self.boxes.resize(session, rows, columns).await {
            tracing::debug!(%error, "terminal not resized");
        }
    }
}

struct Prepared {
    session: SessionId,
    attached: Attached,
}

/// A program that cannot be executed has an exit code as a shell gives it; anything else is our failure.
fn start_failure(error: RuntimeError) -> anyhow::Result<u8> {
    let code = match error.program_fault() {
        Some(ProgramFault::NotFound) => failure::PROGRAM_NOT_FOUND,
        Some(ProgramFault::NotExecutable) => failure::PROGRAM_NOT_EXECUTABLE,
        None => return Err(error.into()),
    };
    failure::print(&error.into());
    Ok(code)
}

/// The exit code; what is not plain success or failure is told.
fn how_it_ended(status: SessionStatus) -> anyhow::Result<u8> {
    match status.phase {
        SessionPhase::Exited { code, reason, message, .. } => {
            if !matches!(reason.as_str(), "Completed" | "Error") {
                let colon = if message.is_empty() { "" } else { ": " };
                note!("the command ended: {reason}{colon}{message}");
            }
            Ok(exit_code(code))
        }
        SessionPhase::Created | SessionPhase::Running { .. } => bail!("the end of the command was not told"),
    }
}

/// Waits for a signal that asks us to end.
async fn ending_signal(events: &mut mpsc::Receiver<Event>) -> i32 {
    loop {
        match events.recv().await {
            Some(Event::Signal(number)) if number != nix::libc::SIGUSR1 && number != nix::libc::SIGUSR2 => {
                return number;
            }
            Some(Event::Signal(_) | Event::Resized) => {}
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use a3s_box_core::spec::SessionSpec;
    use a3s_box_runtime::{ErrorKind, FailedStage};

    use crate::cli::{Cli, Command};

    use super::*;

    fn status(phase: SessionPhase) -> SessionStatus {
        SessionStatus {
            id: SessionId::from_random([1; 32]),
            box_id: BoxId::from_random([2; 32]),
            spec: SessionSpec::default(),
            image_id: String::new(),
            image_digest_ref: String::new(),
            phase,
            created_at_ns: 0,
            log_path: None,
            user: None,
            pid: None,
            info: Default::default(),
        }
    }

    #[test]
    fn the_built_in_network_is_the_fallback_unless_somebody_said_otherwise() {
        let connected = |file: &str, line: &[&str]| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("config.toml");
            std::fs::write(&path, file).unwrap();
            let words = ["a3s-box", "--config", path.to_str().unwrap(), "run"];
            let cli = Cli::try_parse_from(words.iter().chain(line).chain(&["image"])).unwrap();
            let config = cli.config.load().unwrap();
            let Command::Run(args) = cli.command else { panic!("not run") };
            let network = configured(config, &args).network;
            (network.mode, network.fallback)
        };
        use NetworkFallback as Fallback;
        assert_eq!(connected("", &[]), (NodeNetwork::Cni, Fallback::Local));
        let none = "network.fallback = \"none\"";
        assert_eq!(connected(none, &[]), (NodeNetwork::Cni, Fallback::None));
        assert_eq!(connected(none, &["--network", "local"]).0, NodeNetwork::Local);
        assert_eq!(connected("", &["--network", "cni"]), (NodeNetwork::Cni, Fallback::None));
        assert_eq!(connected("network.mode = \"none\"", &[]).0, NodeNetwork::None);
        assert_eq!(connected("", &["--network", "none"]).0, NodeNetwork::None);
    }

    #[test]
    fn the_commands_code_is_ours_and_an_unknown_end_is_a_failure() {
        let exited = |code| SessionPhase::Exited {
            started_at_ns: 1,
            finished_at_ns: 2,
            code,
            reason: "Error".to_owned(),
            message: String::new(),
        };
        assert_eq!(how_it_ended(status(exited(42))).unwrap(), 42);
        assert_eq!(how_it_ended(status(exited(137))).unwrap(), 137);
        assert!(how_it_ended(status(SessionPhase::Running { started_at_ns: 1 })).is_err());
    }

    #[test]
    fn a_start_that_failed_for_another_reason_than_the_program_is_our_failure() {
        let error =
            RuntimeError::new(ErrorKind::Unavailable, FailedStage::Start, "container x", "the VM ended");
        assert!(start_failure(error).is_err());
    }

    #[tokio::test]
    async fn only_signals_that_ask_to_end_stop_a_start() {
        let (sender, mut events) = mpsc::channel(4);
        for event in [Event::Resized, Event::Signal(nix::libc::SIGUSR1), Event::Signal(nix::libc::SIGTERM)] {
            sender.send(event).await.unwrap();
        }
        assert_eq!(ending_signal(&mut events).await, nix::libc::SIGTERM);
    }
}
