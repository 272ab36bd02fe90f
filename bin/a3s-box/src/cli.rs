//! The command line as clap reads it.
#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "these comments are help texts: brackets mean what may be left out"
)]

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use a3s_box_core::spec::RlimitSpec;
use a3s_box_host::ConfigFlags;
use a3s_box_host::config::parse_duration;

use crate::daemon::DaemonCommand;
use crate::habits::Habits;
use crate::mounts::Mount;
use crate::publish::Publish;
use crate::size::{Cpus, parse_bytes, parse_memory_mib, parse_ulimit, parse_vcpus};

/// Pods and commands in microVMs.
#[derive(Debug, Parser)]
#[command(name = "a3s-box", version, about = "Pods and commands in microVMs", max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) config: ConfigFlags,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a microVM of its own, without Kubernetes
    Run(Box<RunArgs>),
    /// Fetch an image for `run`
    Pull(PullArgs),
    /// List or verify the images of `run`
    Images(ImagesArgs),
    /// Remove images of `run`
    Rmi(RmiArgs),
    /// Build, save, load and push images
    Image {
        #[command(subcommand)]
        command: ImageCommand,
    },
    #[command(flatten)]
    Daemon(DaemonCommand),
    /// Say what this machine has and lacks for running pods
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print or check the configuration
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Print the version
    Version,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print a configuration file with all defaults and what they mean
    Default,
    /// Read the configuration and say what is wrong with it
    Check,
    /// Print what counts and where each setting comes from
    Show,
}

/// When an image is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Pull {
    /// If it is not here
    #[default]
    Missing,
    /// Each time
    Always,
    /// Not at all
    Never,
}

/// How a box of `run` is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Network {
    /// By the node's CNI plugins
    Cni,
    /// By the built-in bridge
    Local,
    /// Loopback only
    None,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct RegistryArgs {
    /// Speak plain HTTP to this registry (HOST[:PORT]; may be repeated)
    #[arg(long, value_name = "HOST")]
    pub(crate) plain_http: Vec<String>,
}

/// Secrets are not taken from the command line: everybody on the machine can read it.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct LoginArgs {
    /// Log in at the registry under this name, with --password-stdin
    #[arg(long, value_name = "NAME", requires = "password_stdin")]
    pub(crate) username: Option<String>,
    /// Read the password from stdin
    #[arg(long, requires = "username")]
    pub(crate) password_stdin: bool,
    /// Credentials as `docker login` keeps them [default: $DOCKER_CONFIG/config.json or ~/.docker/config.json]
    #[arg(long, value_name = "FILE", conflicts_with = "username")]
    pub(crate) authfile: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct RunArgs {
    /// NAME[:TAG|@DIGEST], oci:DIR, oci-archive:FILE or docker-archive:FILE
    pub(crate) image: String,
    /// The command and its arguments, instead of the image's
    #[arg(trailing_var_arg = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,

    /// Leave the command to the daemon and print its container's id: see ps, logs, exec, attach, stop and rm
    #[arg(short = 'd', long)]
    pub(crate) detach: bool,
    /// Keep stdin open; without this the command reads nothing
    #[arg(short = 'i', long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short = 't', long)]
    pub(crate) tty: bool,
    /// Set a variable; NAME alone takes the value from this environment
    #[arg(short = 'e', long = "env", value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Read variables from a file, one NAME[=VALUE] per line
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Show a file or directory of the host in the box
    #[arg(short = 'v', long = "volume", value_name = "SRC:DST[:ro]", value_parser = Mount::volume)]
    pub(crate) volumes: Vec<Mount>,
    /// The same in the long form: type=bind|tmpfs,source=SRC,target=DST[,readonly][,tmpfs-size=SIZE]
    #[arg(long = "mount", value_name = "KEY=VALUE,…", value_parser = Mount::long)]
    pub(crate) mounts: Vec<Mount>,
    /// Memory of the box as a file system; OPTIONS: size=SIZE, ro, exec
    #[arg(long, value_name = "DST[:OPTIONS]", value_parser = Mount::tmpfs)]
    pub(crate) tmpfs: Vec<Mount>,
    /// The size of /dev/shm [default: 64M]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) shm_size: Option<u64>,
    /// The working directory
    #[arg(short = 'w', long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// As whom: NAME, UID, NAME:GROUP or UID:GID
    #[arg(short = 'u', long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// Instead of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    /// The name of the box and its host name [default: the beginning of its id]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// The host name of the box, if it is not its name
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    /// A label, NAME[=VALUE] (may be repeated)
    #[arg(short = 'l', long = "label", value_name = "NAME[=VALUE]")]
    pub(crate) labels: Vec<String>,
    /// The root file system cannot be written
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Everything that root of the box's own kernel may do; nothing of the host
    #[arg(long)]
    pub(crate) privileged: bool,
    /// A capability more than the usual ones, or ALL (may be repeated)
    #[arg(long, value_name = "NAME")]
    pub(crate) cap_add: Vec<String>,
    /// A capability less, or ALL (may be repeated)
    #[arg(long, value_name = "NAME")]
    pub(crate) cap_drop: Vec<String>,

    /// Virtual CPUs [default: size.vcpus]
    #[arg(long, value_name = "N", value_parser = parse_vcpus)]
    pub(crate) vcpus: Option<u8>,
    /// So much of them, e.g. 0.5; without --vcpus the box gets as many as it takes
    #[arg(long, value_name = "N", value_parser = Cpus::parse)]
    pub(crate) cpus: Option<Cpus>,
    /// A limit of the command (nofile, nproc, memlock, core, stack, …); -1 is none (may be repeated)
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = parse_ulimit)]
    pub(crate) ulimit: Vec<RlimitSpec>,
    /// Memory, e.g. 512M or 2G [default: size.memory_mib]
    #[arg(short = 'm', long, value_name = "SIZE", value_parser = parse_memory_mib)]
    pub(crate) memory: Option<u32>,
    /// How the box is connected [default: cni where the node has it, else local, else none]
    #[arg(long, value_enum, alias = "net")]
    pub(crate) network: Option<Network>,
    /// Let a port of the host lead to one of the box; a free one if none is named; FIRST-LAST is a range (may be repeated)
    #[arg(short = 'p', long = "publish", value_name = "[[HOSTIP:][HOSTPORT]:]PORT[/PROTOCOL]", value_parser = Publish::parse)]
    pub(crate) publish: Vec<Publish>,
    /// A name server of the box instead of the host's (may be repeated)
    #[arg(long, value_name = "IP")]
    pub(crate) dns: Vec<IpAddr>,
    /// A domain that names are looked up in (may be repeated)
    #[arg(long, value_name = "DOMAIN")]
    pub(crate) dns_search: Vec<String>,
    /// Where the box may open connections to: none, cluster, or networks, addresses and names [default: everywhere]
    #[arg(long, value_name = "none|cluster|LIST")]
    pub(crate) egress: Option<String>,

    /// When to fetch the image
    #[arg(long, value_enum, default_value_t)]
    pub(crate) pull: Pull,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
    #[command(flatten)]
    pub(crate) login: LoginArgs,
    /// Kill the command after this long, e.g. 30s; the exit code is then 124
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,
    /// Show no progress
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
    /// Print what took how long, to stderr
    #[arg(long)]
    pub(crate) timings: bool,
    #[command(flatten)]
    pub(crate) habits: Habits,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PullArgs {
    /// NAME[:TAG|@DIGEST], oci:DIR, oci-archive:FILE or docker-archive:FILE
    pub(crate) image: String,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
    #[command(flatten)]
    pub(crate) login: LoginArgs,
    /// Print the image's id and nothing else
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Clone, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct ImagesArgs {
    #[command(subcommand)]
    pub(crate) command: Option<ImagesCommand>,
    /// Print ids and nothing else
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ImagesCommand {
    /// Read all files of the image store again and compare them with what they were
    Verify(VerifyArgs),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct VerifyArgs {
    /// Remove what is damaged and pull the images that need it again
    #[arg(long)]
    pub(crate) repair: bool,
    /// The store of the CRI daemon, which must be stopped meanwhile, instead of that of `run`
    #[arg(long)]
    pub(crate) daemon: bool,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
    /// Credentials as `docker login` keeps them [default: $DOCKER_CONFIG/config.json or ~/.docker/config.json]
    #[arg(long, value_name = "FILE")]
    pub(crate) authfile: Option<PathBuf>,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ImageCommand {
    /// Build an image of files and a config; nothing is run
    Build(BuildArgs),
    /// Write an image of `run` as an OCI archive; its digests differ from the registry's
    Save(SaveArgs),
    /// Take the images of an OCI or docker archive, which may be compressed, for `run`
    Load(LoadArgs),
    /// Upload an image to a registry; digests of one of `run` differ from those it was pulled by
    Push(PushArgs),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PushArgs {
    /// Its name or id; oci:DIR[:NAME] and oci-archive:FILE[:NAME] are uploaded as they are
    pub(crate) image: String,
    /// NAME[:TAG] in a registry, instead of the name that the image has
    pub(crate) destination: Option<String>,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
    #[command(flatten)]
    pub(crate) login: LoginArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct SaveArgs {
    /// Its name or id
    pub(crate) image: String,
    /// Where to; - is stdout
    #[arg(short = 'o', long, value_name = "FILE")]
    pub(crate) output: PathBuf,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct LoadArgs {
    /// Where from; - is stdin
    #[arg(short = 'i', long, value_name = "FILE")]
    pub(crate) input: PathBuf,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct BuildArgs {
    /// The Dockerfile, instead of CONTEXT/Dockerfile
    #[arg(short = 'f', long)]
    pub(crate) file: Option<PathBuf>,
    /// What the image is called; may be repeated
    #[arg(short = 't', long = "tag", value_name = "NAME")]
    pub(crate) tags: Vec<String>,
    /// Write oci:DIR, which must not exist, instead of keeping the image for `run`
    #[arg(long, value_name = "oci:DIR")]
    pub(crate) output: Option<String>,
    /// The directory that COPY and ADD take from
    pub(crate) context: PathBuf,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
    #[command(flatten)]
    pub(crate) login: LoginArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct RmiArgs {
    /// Names or ids
    #[arg(required = true)]
    pub(crate) images: Vec<String>,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| format!("{text:?} is not a duration such as 500ms, 30s or 5m"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn run(line: &[&str]) -> RunArgs {
        let words = ["a3s-box", "run"].iter().chain(line);
        match Cli::try_parse_from(words).unwrap().command {
            Command::Run(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_may_follow_two_dashes_or_the_image_itself() {
        for line in [&["img", "--", "ls", "-l", "--", "x"][..], &["img", "ls", "-l", "--", "x"][..]] {
            let args = run(line);
            assert_eq!((args.image.as_str(), args.command.len()), ("img", 4), "{args:?}");
            assert_eq!(args.command, ["ls", "-l", "--", "x"]);
        }
    }

    #[test]
    fn flags_after_the_image_are_still_ours_until_the_command_begins() {
        let args = run(&["-it", "img", "--memory", "512M", "sh", "-e", "-c", "exit 3"]);
        assert!(args.interactive && args.tty);
        assert_eq!(args.memory, Some(512));
        assert_eq!(args.command, ["sh", "-e", "-c", "exit 3"]);
        assert!(args.env.is_empty());
    }
}
