//! From arguments and the image's config to the specs of a box and its one session. Pure but for
//! reading files that arguments name.

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};

use a3s_box_core::image::ImageConfig;
use a3s_box_core::spec::{
    BoxSize, BoxSpec, CapabilitySpec, DnsSpec, MountSource, MountSpec, NetworkMode, PodIdentity, ProcessSpec,
    SessionSpec, UserSpec,
};

use crate::cli::RunArgs;
use crate::mounts::Mount;
use crate::publish::Publish;
use crate::size::Cpus;

/// What an image says nothing about and every program expects.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Files of /proc and /sys that say or change more than a workload should, as container engines hide them.
pub(crate) const MASKED: [&str; 9] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
pub(crate) const READONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The box of a `run`.
pub(crate) fn box_spec(
    args: &RunArgs,
    name: &str,
    default_size: BoxSize,
    network: NetworkMode,
    dns: Option<DnsSpec>,
) -> BoxSpec {
    BoxSpec {
        identity: PodIdentity {
            name: name.to_owned(),
            namespace: "a3s-box-run".to_owned(),
            uid: name.to_owned(),
            attempt: 0,
        },
        hostname: args.hostname.clone().unwrap_or_else(|| name.to_owned()),
        size: BoxSize {
            vcpus: args.vcpus.or(args.cpus.map(Cpus::whole)).unwrap_or(default_size.vcpus),
            memory_mib: args.memory.unwrap_or(default_size.memory_mib),
            scratch_mib: default_size.scratch_mib,
        },
        dns,
        port_mappings: args.publish.iter().flat_map(Publish::mappings).collect(),
        network,
        ..BoxSpec::default()
    }
}

/// The session of a `run`, with what the image says where the arguments say nothing.
pub(crate) fn session_spec(
    args: &RunArgs,
    image: &ImageConfig,
    environment: &dyn Fn(&str) -> Option<String>,
) -> anyhow::Result<SessionSpec> {
    Ok(SessionSpec {
        name: "run".to_owned(),
        image_ref: args.image.clone(),
        process: ProcessSpec {
            args: command(args, image)?,
            env: variables(args, image, environment)?,
            cwd: first_set([args.workdir.as_deref(), Some(&image.working_dir)]).unwrap_or("/").to_owned(),
            terminal: args.tty,
            user: UserSpec {
                user: args.user.clone().unwrap_or_else(|| image.user.clone()),
                ..UserSpec::default()
            },
            capabilities: CapabilitySpec {
                add: args.cap_add.clone(),
                drop: args.cap_drop.clone(),
                ..CapabilitySpec::default()
            },
            rlimits: args.ulimit.clone(),
            ..ProcessSpec::default()
        },
        labels: labels(&args.labels)?,
        readonly_rootfs: args.read_only,
        mounts: mounts(args)?,
        limits: args.cpus.map(Cpus::limits).unwrap_or_default(),
        privileged: args.privileged,
        image_volumes: image.volume_paths()?,
        masked_paths: MASKED.map(str::to_owned).to_vec(),
        readonly_paths: READONLY.map(str::to_owned).to_vec(),
        stop_signal: 15,
        stdin: args.interactive,
        stdin_once: args.interactive,
        ..SessionSpec::default()
    })
}

/// In the order of the kinds: a later one at the same place hides an earlier one.
fn mounts(args: &RunArgs) -> anyhow::Result<Vec<MountSpec>> {
    let shared_memory = args.shm_size.map(|size| MountSpec {
        source: MountSource::Tmpfs { size },
        target: "/dev/shm".to_owned(),
        readonly: false,
        options: ["nosuid", "nodev", "noexec"].map(str::to_owned).to_vec(),
    });
    let given = args.tmpfs.iter().chain(&args.volumes).chain(&args.mounts).map(Mount::spec);
    shared_memory.into_iter().map(Ok).chain(given).collect()
}

/// `NAME=VALUE`, or `NAME` with an empty value.
pub(crate) fn labels(given: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let label = |text: &String| {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        ensure!(!name.is_empty(), "--label: {text:?} has no name");
        Ok((name.to_owned(), value.to_owned()))
    };
    given.iter().map(label).collect()
}

fn first_set<const N: usize>(candidates: [Option<&str>; N]) -> Option<&str> {
    candidates.into_iter().flatten().find(|text| !text.is_empty())
}

/// As docker combines them: arguments replace the image's command, an entrypoint replaces both.
fn command(args: &RunArgs, image: &ImageConfig) -> anyhow::Result<Vec<String>> {
    let (entrypoint, default_command) = match &args.entrypoint {
        Some(program) if program.is_empty() => (Vec::new(), Vec::new()),
        Some(program) => (vec![program.clone()], Vec::new()),
        None => (image.entrypoint.clone(), image.cmd.clone()),
    };
    let rest = if args.command.is_empty() { default_command } else { args.command.clone() };
    let words: Vec<_> = entrypoint.into_iter().chain(rest).collect();
    if words.is_empty() {
        bail!("the image {} names no command; say one: a3s-box run {} -- CMD", args.image, args.image);
    }
    Ok(words)
}

/// Later entries win: the default PATH, the image, TERM, files, then single variables.
fn variables(
    args: &RunArgs,
    image: &ImageConfig,
    environment: &dyn Fn(&str) -> Option<String>,
) -> anyhow::Result<Vec<String>> {
    let mut env = Vec::new();
    if !image.env.iter().any(|entry| entry.starts_with("PATH=")) {
        env.push(DEFAULT_PATH.to_owned());
    }
    env.extend(image.env.iter().cloned());
    if args.tty {
        let term = environment("TERM").unwrap_or_else(|| "xterm".to_owned());
        env.push(format!("TERM={term}"));
    }
    env.extend(given_variables(args, environment)?);
    Ok(env)
}

/// What files and single variables of the command line say, in this order.
pub(crate) fn given_variables(
    args: &RunArgs,
    environment: &dyn Fn(&str) -> Option<String>,
) -> anyhow::Result<Vec<String>> {
    let mut env = Vec::new();
    for path in &args.env_file {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the variables in {}", path.display()))?;
        // Editors of Windows begin files with a byte order mark, which is no part of the first name.
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        for (number, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line.trim_start())) {
            if !line.is_empty() && !line.starts_with('#') {
                let place = format!("{}:{number}", path.display());
                env.extend(variable(line, environment).with_context(|| place)?);
            }
        }
    }
    for entry in &args.env {
        env.extend(variable(entry, environment).context("--env")?);
    }
    Ok(env)
}

/// `NAME=VALUE`, or `NAME` for the value it has here; a name that is not set here is left out.
fn variable(entry: &str, environment: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<Option<String>> {
    let name = entry.split('=').next().unwrap_or(entry);
    if name.is_empty() || name.chars().any(char::is_whitespace) {
        bail!("{entry:?} is not NAME or NAME=VALUE");
    }
    if entry.contains('=') {
        return Ok(Some(entry.to_owned()));
    }
    Ok(environment(name).map(|value| format!("{name}={value}")))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::cli::{Cli, Command};

    use super::*;

    fn args(line: &[&str]) -> RunArgs {
        match Cli::try_parse_from(["a3s-box", "run"].iter().chain(line)).unwrap().command {
            Command::Run(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: vec!["/entry".to_owned()],
            cmd: vec!["serve".to_owned()],
            env: vec!["PATH=/image".to_owned(), "A=image".to_owned()],
            working_dir: "/srv".to_owned(),
            user: "web".to_owned(),
            ..ImageConfig::default()
        }
    }

    fn here(name: &str) -> Option<String> {
        match name {
            "HERE" => Some("value".to_owned()),
            "TERM" => Some("vt100".to_owned()),
            _ => None,
        }
    }

    #[test]
    fn the_command_replaces_the_images_and_an_entrypoint_replaces_both() {
        let words = |line: &[&str]| command(&args(line), &image()).unwrap();
        assert_eq!(words(&["i"]), ["/entry", "serve"]);
        assert_eq!(words(&["i", "--", "x", "y"]), ["/entry", "x", "y"]);
        assert_eq!(words(&["--entrypoint", "/sh", "i"]), ["/sh"]);
        assert_eq!(words(&["--entrypoint", "/sh", "i", "--", "-c", "x"]), ["/sh", "-c", "x"]);
        assert_eq!(words(&["--entrypoint", "", "i", "--", "x"]), ["x"]);
    }

    #[test]
    fn an_image_without_a_command_needs_one() {
        let error = command(&args(&["scratch"]), &ImageConfig::default()).unwrap_err();
        assert!(error.to_string().contains("a3s-box run scratch -- CMD"), "{error}");
    }

    #[test]
    fn variables_of_the_command_line_come_after_files_and_those_after_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("env");
        std::fs::write(&file, "# comment\n\nA=file\nHERE\nNOT_SET\n").unwrap();
        let args = args(&["-e", "A=flag", "-t", "--env-file", file.to_str().unwrap(), "i"]);
        assert_eq!(
            variables(&args, &image(), &here).unwrap(),
            ["PATH=/image", "A=image", "TERM=vt100", "A=file", "HERE=value", "A=flag"]
        );
        // The mark that editors of Windows put there was taken for a part of the first name.
        std::fs::write(&file, "\u{feff}B=marked\r\nC=2\r\n").unwrap();
        assert_eq!(variables(&args, &image(), &here).unwrap()[3..], ["B=marked", "C=2", "A=flag"]);
        std::fs::write(&file, "fine=1\nno good\n").unwrap();
        let error = variables(&args, &image(), &here).unwrap_err();
        assert!(error.to_string().ends_with("env:2"), "{error:#}");
    }

    #[test]
    fn an_image_without_a_path_gets_the_usual_one() {
        assert_eq!(variables(&args(&["i"]), &ImageConfig::default(), &here).unwrap(), [DEFAULT_PATH]);
    }

    #[test]
    fn what_is_not_said_comes_from_the_image_and_the_configuration() {
        let declaring = ImageConfig { volumes: vec!["data/".to_owned()], ..image() };
        let spec = session_spec(&args(&["i"]), &declaring, &here).unwrap();
        assert_eq!(spec.image_volumes, ["/data"]);
        assert_eq!((spec.process.cwd.as_str(), spec.process.user.user.as_str()), ("/srv", "web"));
        assert!(!spec.stdin && !spec.process.terminal && spec.log_path.is_none());
        let said = args(&["-i", "--user", "7:8", "-w", "/x", "--vcpus", "3", "i"]);
        let spec = session_spec(&said, &image(), &here).unwrap();
        assert_eq!((spec.process.cwd.as_str(), spec.process.user.user.as_str()), ("/x", "7:8"));
        assert!(spec.stdin);
        let default = BoxSize { vcpus: 1, memory_mib: 300, scratch_mib: 99 };
        let size = box_spec(&said, "n", default, NetworkMode::None, None).size;
        assert_eq!(size, BoxSize { vcpus: 3, memory_mib: 300, scratch_mib: 99 });
    }

    #[test]
    fn published_ports_and_the_resolver_are_the_boxes() {
        let said = args(&["-p", "8080:80", "-p", "127.0.0.1:53:53/udp", "i"]);
        let dns = DnsSpec { servers: vec!["192.0.2.53".to_owned()], ..DnsSpec::default() };
        let spec = box_spec(&said, "n", BoxSize::default(), NetworkMode::Pod, Some(dns.clone()));
        let ports: Vec<_> = spec.port_mappings.iter().map(|p| (p.host_port, p.container_port)).collect();
        assert_eq!((ports, spec.dns), (vec![(8080, 80), (53, 53)], Some(dns)));
    }
}
