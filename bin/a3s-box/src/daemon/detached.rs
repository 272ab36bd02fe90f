//! `run -d`, `stop` and `rm`: a command as a pod of the daemon, with one container.
//!
//! The daemon is what outlives this program: it keeps the box, its output and its end. The pod has the command's name and a
//! namespace of its own, by which `stop` and `rm` know what is theirs.

use std::path::Path;

use anyhow::{Context, bail};

use a3s_box_core::BoxId;
use a3s_box_core::egress;
use a3s_box_core::spec::{MountSource, PortProtocol};
use a3s_box_cri::client::{Client, Container, State};
use a3s_box_cri::proto::{
    Capability, ContainerConfig, ContainerMetadata, DnsConfig, ImageSpec, Int64Value, KeyValue,
    LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, Mount, PodSandboxConfig, PodSandboxMetadata, PortMapping, Protocol,
};
use a3s_box_host::Config;

use super::args::{RmArgs, StopArgs};
use super::find;
use crate::cli::{Pull, RunArgs};
use crate::publish::Publish;
use crate::size::{Cpus, PERIOD_US};
use crate::spec::{self, MASKED, READONLY};
use crate::tell;
use crate::tell::note;

/// The namespace of these pods.
const NAMESPACE: &str = "a3s-box-run";
/// The output of these containers lies here, below the daemon's root.
const LOGS: &str = "detached";
const MIB: i64 = 1024 * 1024;

/// Starts the command, prints the container's id and ends.
pub(crate) async fn start(config: Config, mut args: RunArgs) -> anyhow::Result<u8> {
    args.habits.check()?;
    check(&args)?;
    let mut random = [0; 32];
    getrandom::fill(&mut random).context("could not make an id for the pod")?;
    let uid = BoxId::from_random(random).to_string();
    let name = args.name.clone().unwrap_or_else(|| find::short(&uid).to_owned());
    let mut client = super::connect(&config)
        .await
        .context("`run -d` leaves the command to the daemon, because something must outlive this program")?;
    if client.pods().await?.iter().any(|pod| pod.namespace == NAMESPACE && pod.name == name) {
        bail!("the name {name} is taken; `a3s-box rm {name}` removes what has it");
    }
    for publish in &mut args.publish {
        publish.choose()?.into_iter().for_each(|chosen| note!("{chosen}"));
    }
    let container = container_config(&args, &name)?;
    let logs = config.root.join(LOGS).join(&uid);
    let pod = pod_config(&args, &name, uid, &logs);
    match args.pull {
        Pull::Always => client.pull(&args.image).await?,
        Pull::Missing if !client.has_image(&args.image).await? => client.pull(&args.image).await?,
        Pull::Missing | Pull::Never => {}
    }
    std::fs::create_dir_all(&logs)
        .with_context(|| format!("cannot make {} for the command's output", logs.display()))?;
    let started = client.run(pod, container).await;
    if started.is_err() {
        let _ = std::fs::remove_dir_all(&logs).and_then(|()| std::fs::remove_dir(config.root.join(LOGS)));
    }
    tell::out(format_args!("{}\n", started?));
    Ok(0)
}

/// Ends containers and their boxes; their output stays.
pub(super) async fn stop(mut client: Client, args: StopArgs) -> anyhow::Result<u8> {
    for text in &args.containers {
        let container = ours(&mut client, text).await?;
        client.stop(&container.pod_id, &container.id, args.time).await?;
        tell::out(format_args!("{text}\n"));
    }
    Ok(0)
}

/// Removes containers with their boxes and output.
pub(super) async fn remove(config: &Config, mut client: Client, args: RmArgs) -> anyhow::Result<u8> {
    for text in &args.containers {
        let container = ours(&mut client, text).await?;
        if container.state == State::Running && !args.force {
            bail!("{text} still runs; `a3s-box stop {text}` ends it, and `a3s-box rm -f {text}` does both");
        }
        let log = client.container(&container.id).await?.log;
        client.remove(&container.pod_id).await?;
        if let Some(logs) = log.as_deref().and_then(Path::parent).filter(|logs| is_ours(config, logs)) {
            std::fs::remove_dir_all(logs).with_context(|| format!("cannot remove {}", logs.display()))?;
            // The last one takes along what was made for all.
            let _ = std::fs::remove_dir(config.root.join(LOGS));
        }
        tell::out(format_args!("{text}\n"));
    }
    Ok(0)
}

/// What somebody else has started (kubelet, crictl) is theirs to end: kubelet would start it again.
async fn ours(client: &mut Client, text: &str) -> anyhow::Result<Container> {
    let container = find::container(client, text).await?;
    let pods = client.pods().await?;
    match pods.iter().find(|pod| pod.id == container.pod_id) {
        Some(pod) if pod.namespace != NAMESPACE => bail!(
            "{text} belongs to the pod {}/{}, which `run -d` has not started; whoever did (kubelet, crictl) ends it",
            pod.namespace,
            pod.name
        ),
        _ => Ok(container),
    }
}

/// A log's directory that this program made.
fn is_ours(config: &Config, logs: &Path) -> bool {
    logs.parent() == Some(config.root.join(LOGS).as_path())
}

/// What the daemon's pods cannot have is refused, not left out.
fn check(args: &RunArgs) -> anyhow::Result<()> {
    let with_memory =
        args.tmpfs.iter().chain(&args.volumes).chain(&args.mounts).any(|mount| !mount.is_host());
    let known = [
        (args.habits.removes(), "--rm: nobody would notice the end; `a3s-box rm` removes the container"),
        (with_memory, "memory as a file system (--tmpfs, --mount type=tmpfs): CRI has no word for it"),
        (args.shm_size.is_some(), "--shm-size: CRI has no word for it; /dev/shm has 64M"),
        (!args.ulimit.is_empty(), "--ulimit: CRI has no word for it"),
        (args.network.is_some(), "--network: it is the one of the daemon's pods"),
        (args.timeout.is_some(), "--timeout: `a3s-box stop` ends it"),
        (args.timings, "--timings: `a3s-box run` without -d shows them, and `crictl inspectp` for pods"),
        (
            !args.registry.plain_http.is_empty(),
            "--plain-http: the daemon's hosts.toml says how to reach a registry",
        ),
        (
            args.login.username.is_some() || args.login.authfile.is_some(),
            "logging in: the daemon knows only what CRI's PullImage tells it; pull the image with crictl first",
        ),
        (
            args.tty && !args.interactive,
            "-t without -i: nobody is at the terminal; leave out -t, or attach with -it",
        ),
        (
            ["oci:", "oci-archive:", "docker-archive:"].iter().any(|kind| args.image.starts_with(kind)),
            "an image of this machine's files: the daemon pulls from registries",
        ),
    ];
    match known.into_iter().find(|(given, _)| *given) {
        Some((_, why)) => bail!("-d does not go with {why}"),
        None => Ok(()),
    }
}

fn pod_config(args: &RunArgs, name: &str, uid: String, logs: &Path) -> PodSandboxConfig {
    let period = PERIOD_US.cast_signed();
    let quota = args.vcpus.or(args.cpus.map(Cpus::whole)).map(|whole| i64::from(whole) * period);
    // The daemon adds what a guest needs for itself to what a pod may use.
    let size = LinuxContainerResources {
        cpu_period: quota.map_or(0, |_| period),
        cpu_quota: quota.unwrap_or(0),
        memory_limit_in_bytes: args.memory.map_or(0, |mib| i64::from(mib) * MIB),
        ..Default::default()
    };
    let context = LinuxSandboxSecurityContext { privileged: args.privileged, ..Default::default() };
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid,
            namespace: NAMESPACE.to_owned(),
            attempt: 0,
        }),
        hostname: args.hostname.clone().unwrap_or_else(|| name.to_owned()),
        log_directory: logs.to_string_lossy().into_owned(),
        dns_config: (!args.dns.is_empty() || !args.dns_search.is_empty()).then(|| DnsConfig {
            servers: args.dns.iter().map(ToString::to_string).collect(),
            searches: args.dns_search.clone(),
            options: Vec::new(),
        }),
        port_mappings: args.publish.iter().flat_map(Publish::mappings).map(port).collect(),
        annotations: args.egress.iter().map(|text| (egress::ANNOTATION.to_owned(), text.clone())).collect(),
        linux: Some(LinuxPodSandboxConfig {
            resources: Some(size).filter(|size| *size != Default::default()),
            security_context: Some(context),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn port(mapping: a3s_box_core::spec::PortMapping) -> PortMapping {
    let protocol = match mapping.protocol {
        PortProtocol::Tcp => Protocol::Tcp,
        PortProtocol::Udp => Protocol::Udp,
        PortProtocol::Sctp => Protocol::Sctp,
    };
    PortMapping {
        protocol: protocol.into(),
        container_port: mapping.container_port.into(),
        host_port: mapping.host_port.into(),
        host_ip: mapping.host_ip,
    }
}

fn container_config(args: &RunArgs, name: &str) -> anyhow::Result<ContainerConfig> {
    // CRI's command is the image's entrypoint and its args are the image's command.
    let (command, words) = match args.entrypoint.as_deref() {
        None => (Vec::new(), args.command.clone()),
        Some("") => (args.command.clone(), Vec::new()),
        Some(program) => (vec![program.to_owned()], args.command.clone()),
    };
    let env = spec::given_variables(args, &|name| std::env::var(name).ok())?;
    let key_value = |entry: String| {
        let (key, value) = entry.split_once('=').unwrap_or((&entry, ""));
        KeyValue { key: key.to_owned(), value: value.into() }
    };
    Ok(ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(ImageSpec { image: args.image.clone(), ..Default::default() }),
        command,
        args: words,
        working_dir: args.workdir.clone().unwrap_or_default(),
        envs: env.into_iter().map(key_value).collect(),
        mounts: mounts(args)?,
        labels: spec::labels(&args.labels)?.into_iter().collect(),
        log_path: "output.log".to_owned(),
        stdin: args.interactive,
        tty: args.tty,
        linux: Some(LinuxContainerConfig {
            resources: args.cpus.map(|cpus| {
                let limits = cpus.limits();
                LinuxContainerResources {
                    cpu_period: limits.cpu_period_us.map_or(0, u64::cast_signed),
                    cpu_quota: limits.cpu_quota_us.unwrap_or(0),
                    ..Default::default()
                }
            }),
            security_context: Some(security(args)?),
        }),
        ..Default::default()
    })
}

fn mounts(args: &RunArgs) -> anyhow::Result<Vec<Mount>> {
    let mut mounts = Vec::new();
    for given in args.volumes.iter().chain(&args.mounts) {
        let given = given.spec()?;
        let MountSource::Host { path, recursive_readonly, .. } = given.source else { continue };
        mounts.push(Mount {
            container_path: given.target,
            host_path: path.to_string_lossy().into_owned(),
            readonly: given.readonly,
            recursive_read_only: recursive_readonly,
            ..Default::default()
        });
    }
    Ok(mounts)
}

fn security(args: &RunArgs) -> anyhow::Result<LinuxContainerSecurityContext> {
    let owned = |paths: &[&str]| paths.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>();
    let mut context = LinuxContainerSecurityContext {
        capabilities: Some(Capability {
            add_capabilities: args.cap_add.clone(),
            drop_capabilities: args.cap_drop.clone(),
            ..Default::default()
        }),
        privileged: args.privileged,
        readonly_rootfs: args.read_only,
        masked_paths: if args.privileged { Vec::new() } else { owned(&MASKED) },
        readonly_paths: if args.privileged { Vec::new() } else { owned(&READONLY) },
        ..Default::default()
    };
    if let Some(user) = &args.user {
        let (user, group) =
            user.split_once(':').map_or((user.as_str(), None), |(user, group)| (user, Some(group)));
        match user.parse() {
            Ok(uid) => context.run_as_user = Some(Int64Value { value: uid }),
            Err(_) => context.run_as_username = user.to_owned(),
        }
        if let Some(group) = group {
            let gid = group.parse().ok();
            let gid =
                gid.with_context(|| format!("-d: the group of {user:?} must be a number, not {group:?}"))?;
            context.run_as_group = Some(Int64Value { value: gid });
        }
    }
    Ok(context)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn args(line: &[&str]) -> RunArgs {
        match Cli::try_parse_from(["a3s-box", "run", "-d"].iter().chain(line)).unwrap().command {
            Command::Run(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_the_daemon_cannot_do_is_refused_with_the_reason() {
        for (line, reason) in [
            (&["--rm", "i"][..], "`a3s-box rm`"),
            (&["--tmpfs", "/x", "i"], "no word for it"),
            (&["--shm-size", "1G", "i"], "64M"),
            (&["--network", "none", "i"], "the daemon's pods"),
            (&["-t", "i"], "terminal"),
            (&["oci:dir"], "registries"),
            (&["--timeout", "3s", "i"], "stop"),
        ] {
            let error = check(&args(line)).unwrap_err().to_string();
            assert!(error.contains(reason), "{line:?}: {error}");
        }
        for line in
            [&["i"][..], &["-it", "i"], &["-p", "80", "-v", "/:/x:ro", "--pull", "always", "i", "cmd"]]
        {
            check(&args(line)).unwrap();
        }
    }

    #[test]
    fn a_command_is_said_in_cris_words() {
        let words = |line: &[&str]| {
            let config = container_config(&args(line), "web").unwrap();
            (config.command, config.args)
        };
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        assert_eq!(words(&["i", "a", "b"]), (vec![], owned(&["a", "b"])));
        assert_eq!(words(&["--entrypoint", "/e", "i", "a"]), (owned(&["/e"]), owned(&["a"])));
        assert_eq!(words(&["--entrypoint", "", "i", "a"]), (owned(&["a"]), vec![]));
    }

    #[test]
    fn users_sizes_ports_and_variables_are_the_containers() {
        let given =
            args(&["-u", "7:8", "-e", "A=b=c", "-m", "512M", "--cpus", "1.5", "-p", "8080:80/udp", "i"]);
        let container = container_config(&given, "web").unwrap();
        assert_eq!(container.envs, [KeyValue { key: "A".to_owned(), value: "b=c".into() }]);
        let linux = container.linux.unwrap();
        let context = linux.security_context.unwrap();
        let ids = (context.run_as_user.unwrap().value, context.run_as_group.unwrap().value);
        assert_eq!((ids, linux.resources.unwrap().cpu_quota), ((7, 8), 150_000));
        let pod = pod_config(&given, "web", "uid".to_owned(), Path::new("/logs"));
        let size = pod.linux.unwrap().resources.unwrap();
        assert_eq!((size.cpu_quota, size.memory_limit_in_bytes), (200_000, 512 * MIB));
        assert_eq!((pod.port_mappings[0].host_port, pod.port_mappings[0].protocol()), (8080, Protocol::Udp));
        assert!(security(&args(&["-u", "web:staff", "i"])).is_err());
        assert_eq!(security(&args(&["-u", "web", "i"])).unwrap().run_as_username, "web");
    }
}
