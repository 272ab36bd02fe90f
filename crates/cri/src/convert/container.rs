//! `ContainerConfig` and the image's configuration to [`SessionSpec`].

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use a3s_box_core::image::{ImageConfig, ResolvedImage};
use a3s_box_core::seccomp::SeccompProfile;
use a3s_box_core::spec::{MountSource, MountSpec, ProcessSpec, SessionSpec, UserNamespace};

use super::{InvalidRequest, given, non_empty, required, resources, security, signal, sorted, users};
use crate::proto::{
    ContainerConfig, ContainerMetadata, KeyValue, LinuxContainerSecurityContext, Mount, MountPropagation,
    Signal,
};

const CONTEXT: &str = "config.linux.security_context";
const RESOURCES: &str = "config.linux.resources";

/// Flags of a bind mount that `Mount.mount_options` may carry. When files are read is the node's to record.
const MOUNT_OPTIONS: [&str; 5] = ["noexec", "nosuid", "nodev", "exec", "suid"];

/// The kernel's MAX_ARG_STRLEN: no single argument or variable is longer, with the zero byte at its end.
const MAX_WORD: usize = 128 * 1024;

/// Files of /proc that file systems like LXCFS replace; nothing else below /proc can be mounted over.
const REPLACEABLE: [&str; 8] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/slabinfo",
    "/proc/swaps",
    "/proc/uptime",
];

/// The reference or id of the image that a container is to run, checked before the image is looked up.
pub fn image_of(config: &ContainerConfig) -> Result<String, InvalidRequest> {
    let image = required(config.image.clone(), "config.image")?;
    non_empty(image.image, "config.image.image")
}

/// The client's words for the image. Kubelet resolves the pod's words to an id first and sends both.
fn shown_name(config: &ContainerConfig) -> Result<String, InvalidRequest> {
    let resolved = image_of(config)?;
    let specified = config.image.as_ref().and_then(|image| given(image.user_specified_image.clone()));
    Ok(specified.unwrap_or(resolved))
}

/// The images that a container mounts: the field of each, and the client's words for the image.
pub fn volume_images(config: &ContainerConfig) -> impl Iterator<Item = (String, &str)> {
    config.mounts.iter().enumerate().filter_map(|(index, mount)| {
        let image = mount.image.as_ref()?;
        Some((format!("config.mounts[{index}].image"), image.image.as_str()))
    })
}

/// The file of the node with the system call filter, if the container wants one: the field that names it, and the path.
pub fn seccomp_file(config: &ContainerConfig) -> Option<(String, PathBuf)> {
    let context = config.linux.as_ref()?.security_context.as_ref()?;
    security::seccomp_file(context, CONTEXT)
}

/// What a request only names, looked up.
#[derive(Debug)]
pub struct Surroundings<'a> {
    /// Of the image that [`image_of`] names.
    pub image: &'a ImageConfig,
    /// The images that [`volume_images`] names, by the client's words.
    pub volumes: &'a HashMap<String, ResolvedImage>,
    /// The content of the file that [`seccomp_file`] names.
    pub filter: Option<SeccompProfile>,
    /// The user namespace of the pod.
    pub users: Option<UserNamespace>,
}

/// The session that a CreateContainer request asks for.
pub fn session_spec(
    config: ContainerConfig,
    surroundings: Surroundings<'_>,
) -> Result<SessionSpec, InvalidRequest> {
    let Surroundings { image, volumes, filter, users } = surroundings;
    let image_ref = shown_name(&config)?;
    refuse_foreign(&config)?;
    let (name, attempt) = identity(config.metadata)?;
    let client_signal = Signal::try_from(config.stop_signal).map_err(|_| {
        InvalidRequest::new("config.stop_signal", format!("{} is not a signal", config.stop_signal))
    })?;
    let linux = config.linux.unwrap_or_default();
    let context = linux.security_context.unwrap_or_default();
    security::check_apparmor(&context, CONTEXT)?;
    let (masked_paths, readonly_paths) = security::guarded_paths(&context);
    let limits = linux.resources.as_ref().map(|given| resources::limits(given, RESOURCES)).transpose()?;
    let oom_score_adj =
        linux.resources.as_ref().map(|given| resources::oom_score_adj(given, RESOURCES)).transpose()?;
    let program =
        Program { command: config.command, args: config.args, cwd: config.working_dir, tty: config.tty };
    let env = environment(image, config.envs)?;
    Ok(SessionSpec {
        name,
        attempt,
        image_ref,
        labels: sorted(config.labels),
        annotations: sorted(config.annotations),
        log_path: given(config.log_path).map(log_path).transpose()?,
        process: process(program, env, oom_score_adj, &context, filter, image)?,
        readonly_rootfs: context.readonly_rootfs,
        mounts: config
            .mounts
            .into_iter()
            .enumerate()
            .map(|(index, wanted)| mount(wanted, &format!("config.mounts[{index}]"), volumes, users))
            .collect::<Result<_, _>>()?,
        image_volumes: image
            .volume_paths()
            .map_err(|error| InvalidRequest::new("config.image", error.to_string()))?,
        pid_namespace: security::pid_namespace(&context, users, CONTEXT)?,
        limits: limits.unwrap_or_default(),
        masked_paths,
        readonly_paths,
        privileged: context.privileged,
        stop_signal: signal::stop_signal(client_signal, &image.stop_signal),
        stdin: config.stdin,
        stdin_once: config.stdin_once,
    })
}

/// Refuses what lies on the host and cannot be carried into a virtual machine.
fn refuse_foreign(config: &ContainerConfig) -> Result<(), InvalidRequest> {
    if config.windows.is_some() {
        return Err(InvalidRequest::new("config.windows", "boxes run Linux; remove the field"));
    }
    if let Some(device) = config.devices.first() {
        let problem = format!("device {} of the host cannot be given to a box; remove it", device.host_path);
        return Err(InvalidRequest::new("config.devices[0]", problem));
    }
    if let Some(device) = config.cdi_devices.first() {
        let problem = format!("device {} of the host cannot be given to a box; remove it", device.name);
        return Err(InvalidRequest::new("config.CDI_devices[0]", problem));
    }
    Ok(())
}

fn identity(metadata: Option<ContainerMetadata>) -> Result<(String, u32), InvalidRequest> {
    let metadata = required(metadata, "config.metadata")?;
    Ok((non_empty(metadata.name, "config.metadata.name")?, metadata.attempt))
}

/// The client's words about what runs.
struct Program {
    command: Vec<String>,
    args: Vec<String>,
    cwd: String,
    tty: bool,
}

fn process(
    program: Program,
    env: Vec<String>,
    oom_score_adj: Option<i32>,
    context: &LinuxContainerSecurityContext,
    filter: Option<SeccompProfile>,
    image: &ImageConfig,
) -> Result<ProcessSpec, InvalidRequest> {
    let cwd =
        given(program.cwd).or_else(|| given(image.working_dir.clone())).unwrap_or_else(|| "/".to_owned());
    if !cwd.starts_with('/') {
        return Err(InvalidRequest::new("config.working_dir", format!("{cwd:?} is not an absolute path")));
    }
    Ok(ProcessSpec {
        args: command_line(program.command, program.args, image)?,
        env,
        cwd,
        terminal: program.tty,
        user: security::user(context, &image.user, CONTEXT)?,
        capabilities: security::capabilities(context),
        no_new_privileges: context.no_new_privs,
        seccomp: security::seccomp(context, filter, CONTEXT)?,
        oom_score_adj,
        rlimits: Vec::new(),
    })
}

/// A client's command replaces the image's entrypoint and its arguments; the image's arguments count
/// only if the client gave neither.
fn command_line(
    command: Vec<String>,
    args: Vec<String>,
    image: &ImageConfig,
) -> Result<Vec<String>, InvalidRequest> {
    let default_args = if command.is_empty() { image.cmd.clone() } else { Vec::new() };
    let entrypoint = if command.is_empty() { image.entrypoint.clone() } else { command };
    let args = if args.is_empty() { default_args } else { args };
    let line: Vec<String> = entrypoint.into_iter().chain(args).collect();
    if line.first().is_none_or(String::is_empty) {
        let problem = "the image names no command to run either; give one";
        return Err(InvalidRequest::new("config.command", problem));
    }
    for (index, word) in line.iter().enumerate() {
        check_word(word).map_err(|problem| {
            InvalidRequest::new("config.command", format!("word {index} of the command line {problem}"))
        })?;
    }
    Ok(line)
}

/// What no kernel passes to a program.
fn check_word(word: &str) -> Result<(), String> {
    if word.contains('\0') {
        return Err("contains a zero byte".to_owned());
    }
    if word.len() >= MAX_WORD {
        return Err(format!("has {} bytes; programs can be given {} at most", word.len(), MAX_WORD - 1));
    }
    Ok(())
}

/// The image's variables, then the client's; later entries win. What every container has besides is the
/// runtime's to add.
fn environment(image: &ImageConfig, client: Vec<KeyValue>) -> Result<Vec<String>, InvalidRequest> {
    let mut env = image.env.clone();
    for (index, KeyValue { key, value }) in client.into_iter().enumerate() {
        if key.is_empty() || key.contains(['=', '\0']) {
            let problem = format!("{key:?} cannot be the name of a variable");
            return Err(InvalidRequest::new(format!("config.envs[{index}].key"), problem));
        }
        let value = String::from_utf8(value).ok().filter(|value| !value.contains('\0')).ok_or_else(|| {
            let problem = format!("the value of {key} is not UTF-8 text without zero bytes");
            InvalidRequest::new(format!("config.envs[{index}].value"), problem)
        })?;
        let entry = format!("{key}={value}");
        check_word(&entry)
            .map_err(|problem| InvalidRequest::new(format!("config.envs[{index}].value"), problem))?;
        env.push(entry);
    }
    Ok(env)
}

/// Relative to the pod's log directory and never outside of it.
fn log_path(path: String) -> Result<PathBuf, InvalidRequest> {
    let relative = Path::new(path.trim_start_matches('/'));
    let inside = relative.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !inside || relative.as_os_str().is_empty() {
        return Err(InvalidRequest::new(
            "config.log_path",
            format!("{path:?} leaves the pod's log directory"),
        ));
    }
    Ok(relative.to_owned())
}

fn mount(
    wanted: Mount,
    field: &str,
    volumes: &HashMap<String, ResolvedImage>,
    users: Option<UserNamespace>,
) -> Result<MountSpec, InvalidRequest> {
    let target = non_empty(wanted.container_path.clone(), &format!("{field}.container_path"))?;
    // A relative path starts at the container's root.
    let target = if target.starts_with('/') { target } else { format!("/{target}") };
    check_target(&target, &format!("{field}.container_path"))?;
    let id_mapped = users::mount_mapping(&wanted, users, field)?;
    let propagate = match MountPropagation::try_from(wanted.propagation) {
        Ok(MountPropagation::PropagationPrivate) => false,
        Ok(MountPropagation::PropagationHostToContainer) => true,
        Ok(MountPropagation::PropagationBidirectional) => {
            let problem = "mounts made inside of a box cannot appear on the host; use HostToContainer";
            return Err(InvalidRequest::new(format!("{field}.propagation"), problem));
        }
        Err(_) => {
            let problem = format!("{} is not a propagation mode", wanted.propagation);
            return Err(InvalidRequest::new(format!("{field}.propagation"), problem));
        }
    };
    if wanted.recursive_read_only && (!wanted.readonly || propagate) {
        let problem = "needs readonly and private propagation";
        return Err(InvalidRequest::new(format!("{field}.recursive_read_only"), problem));
    }
    for (index, option) in wanted.mount_options.iter().enumerate() {
        if !MOUNT_OPTIONS.contains(&option.as_str()) {
            let problem = format!("{option:?} is not one of {}", MOUNT_OPTIONS.join(", "));
            return Err(InvalidRequest::new(format!("{field}.mount_options[{index}]"), problem));
        }
    }
    let source = match &wanted.image {
        Some(image) => image_source(&wanted, &image.image, field, volumes)?,
        None => {
            let path = PathBuf::from(non_empty(wanted.host_path, &format!("{field}.host_path"))?);
            if !path.is_absolute() {
                let problem = format!("{} is not an absolute path", path.display());
                return Err(InvalidRequest::new(format!("{field}.host_path"), problem));
            }
            MountSource::Host { path, propagate, recursive_readonly: wanted.recursive_read_only, id_mapped }
        }
    };
    Ok(MountSpec { source, target, readonly: wanted.readonly, options: wanted.mount_options })
}

/// Refuses to hide the container's root and /proc, which programs, and the runtime itself, trust.
fn check_target(target: &str, field: &str) -> Result<(), InvalidRequest> {
    let mut plain = PathBuf::from("/");
    for part in Path::new(target).components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => drop(plain.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if plain == Path::new("/") {
        return Err(InvalidRequest::new(field, "a mount over / would hide the image; mount below it"));
    }
    if plain.starts_with("/proc") && !REPLACEABLE.iter().any(|file| plain == Path::new(file)) {
        let problem = format!("{target} lies in /proc, which is the kernel's; choose another path");
        return Err(InvalidRequest::new(field, problem));
    }
    Ok(())
}

/// Propagation needs no word: nothing is ever mounted below an image.
fn image_source(
    wanted: &Mount,
    reference: &str,
    field: &str,
    volumes: &HashMap<String, ResolvedImage>,
) -> Result<MountSource, InvalidRequest> {
    let refused = |name, problem: &str| Err(InvalidRequest::new(format!("{field}.{name}"), problem));
    if !wanted.readonly {
        return refused("readonly", "an image volume cannot be written; set it");
    }
    if !wanted.host_path.is_empty() {
        return refused("host_path", "a mount has an image or a host path; leave one out");
    }
    let inside = |part| matches!(part, Component::Normal(_) | Component::CurDir);
    if !Path::new(&wanted.image_sub_path).components().all(inside) {
        return refused("image_sub_path", "give a path relative to the image's root, without \"..\"");
    }
    let Some(image) = volumes.get(reference) else {
        return refused("image", &format!("there is no image {reference:?}; pull it first"));
    };
    Ok(MountSource::Image {
        reference: reference.to_owned(),
        id: image.id.clone(),
        layers: image.layers.clone(),
        sub_path: wanted.image_sub_path.clone(),
    })
}

#[cfg(test)]
mod tests {
    use a3s_box_core::image::Layer;
    use a3s_box_core::spec::PidNamespace;

    use super::*;
    use crate::proto::{CdiDevice, Device, IdMapping, ImageSpec, LinuxContainerConfig};

    fn config() -> ContainerConfig {
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: "app".to_owned(), attempt: 2 }),
            image: Some(ImageSpec { image: "registry/app:1".to_owned(), ..Default::default() }),
            ..Default::default()
        }
    }

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: vec!["/entry".to_owned()],
            cmd: vec!["serve".to_owned()],
            env: vec!["PATH=/bin".to_owned(), "A=image".to_owned()],
            working_dir: "/srv".to_owned(),
            user: "www".to_owned(),
            stop_signal: "SIGQUIT".to_owned(),
            volumes: vec!["/data/".to_owned()],
            ..Default::default()
        }
    }

    fn convert(config: ContainerConfig) -> Result<SessionSpec, InvalidRequest> {
        let layer = Layer { diff_id: "sha256:0a".to_owned(), erofs: "/images/0a.erofs".into() };
        let model = ResolvedImage {
            id: "sha256:77".to_owned(),
            digest_ref: "registry/model@sha256:88".to_owned(),
            config: ImageConfig::default(),
            layers: vec![layer],
        };
        let volumes = HashMap::from([("model:1".to_owned(), model)]);
        let image = image();
        session_spec(config, Surroundings { image: &image, volumes: &volumes, filter: None, users: None })
    }

    fn refused_field(config: ContainerConfig) -> String {
        convert(config).expect_err("the request is refused").field
    }

    fn args(command: &[&str], args: &[&str]) -> Vec<String> {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let config = ContainerConfig { command: owned(command), args: owned(args), ..config() };
        convert(config).unwrap().process.args
    }

    #[test]
    fn the_image_fills_in_what_the_client_leaves_out() {
        let spec = convert(config()).unwrap();
        assert_eq!(spec.process.args, ["/entry", "serve"]);
        assert_eq!(spec.process.cwd, "/srv");
        assert_eq!(spec.process.user.user, "www");
        assert_eq!(spec.stop_signal, 3);
        assert_eq!(spec.image_volumes, ["/data"]);
        assert_eq!((spec.name.as_str(), spec.attempt), ("app", 2));
        assert_eq!(spec.pid_namespace, PidNamespace::Pod);
    }

    #[test]
    fn a_command_of_the_client_drops_the_images_arguments() {
        assert_eq!(args(&["/bin/sh"], &[]), ["/bin/sh"]);
        assert_eq!(args(&["/bin/sh"], &["-c", "x"]), ["/bin/sh", "-c", "x"]);
        assert_eq!(args(&[], &["check"]), ["/entry", "check"]);
    }

    #[test]
    fn a_container_without_any_command_is_refused() {
        let (image, volumes) = (ImageConfig::default(), HashMap::new());
        let surroundings = Surroundings { image: &image, volumes: &volumes, filter: None, users: None };
        let error = session_spec(config(), surroundings).unwrap_err();
        assert_eq!(error.field, "config.command");
    }

    #[test]
    fn an_image_with_volumes_without_end_is_refused() {
        let many = (0..1000).map(|index| format!("/{index}")).collect();
        let (image, volumes) = (ImageConfig { volumes: many, ..image() }, HashMap::new());
        let surroundings = Surroundings { image: &image, volumes: &volumes, filter: None, users: None };
        let error = session_spec(config(), surroundings).unwrap_err();
        assert_eq!(error.field, "config.image");
    }

    #[test]
    fn the_clients_environment_comes_last() {
        let variable = |key: &str, value: &[u8]| KeyValue { key: key.to_owned(), value: value.to_vec() };
        let with = ContainerConfig { envs: vec![variable("A", b"client")], ..config() };
        let env = convert(with).unwrap().process.env;
        assert_eq!(env, ["PATH=/bin", "A=image", "A=client"]);
        let with = ContainerConfig { envs: vec![variable("A", b"\xff")], ..config() };
        assert_eq!(refused_field(with), "config.envs[0].value");
        let with = ContainerConfig { envs: vec![variable("A=B", b"")], ..config() };
        assert_eq!(refused_field(with), "config.envs[0].key");
    }

    #[test]
    fn what_no_program_can_be_given_is_refused_and_much_is_not_too_much() {
        let variable = |key: String, value: Vec<u8>| KeyValue { key, value };
        let with = |word: String| ContainerConfig { args: vec![word], ..config() };
        assert_eq!(refused_field(with("a\0b".to_owned())), "config.command");
        let error = convert(with("x".repeat(1 << 20))).unwrap_err();
        assert_eq!(error.field, "config.command");
        assert!(error.problem.contains("1048576 bytes") && error.problem.contains("131071"), "{error}");
        assert!(convert(with("x".repeat(MAX_WORD - 1))).is_ok());
        let long = variable("A".to_owned(), vec![b'x'; MAX_WORD]);
        assert_eq!(refused_field(ContainerConfig { envs: vec![long], ..config() }), "config.envs[0].value");
        let many = (0..10_000).map(|index| variable(format!("N{index}"), b"v".to_vec())).collect();
        assert_eq!(convert(ContainerConfig { envs: many, ..config() }).unwrap().process.env.len(), 10_002);
        let zero = variable("A".to_owned(), b"a\0b".to_vec());
        assert_eq!(refused_field(ContainerConfig { envs: vec![zero], ..config() }), "config.envs[0].value");
    }

    #[test]
    fn files_of_proc_that_lxcfs_replaces_may_be_mounted_over() {
        for path in ["/proc/meminfo", "/processes", "/sys/fs/cgroup", "/etc/../data"] {
            assert!(check_target(path, "f").is_ok(), "{path}");
        }
    }

    #[test]
    fn missing_identity_and_image_are_refused_by_field() {
        assert_eq!(refused_field(ContainerConfig { metadata: None, ..config() }), "config.metadata");
        let unnamed = ContainerConfig { metadata: Some(ContainerMetadata::default()), ..config() };
        assert_eq!(refused_field(unnamed), "config.metadata.name");
        assert_eq!(refused_field(ContainerConfig { image: None, ..config() }), "config.image");
        let unnamed = ContainerConfig { image: Some(ImageSpec::default()), ..config() };
        assert_eq!(refused_field(unnamed), "config.image.image");
    }

    #[test]
    fn the_pods_own_words_for_the_image_are_kept() {
        let image = |user_specified: &str| {
            let user_specified_image = user_specified.to_owned();
            Some(ImageSpec { image: "sha256:12".to_owned(), user_specified_image, ..Default::default() })
        };
        let by_kubelet = ContainerConfig { image: image("app:1"), ..config() };
        assert_eq!(convert(by_kubelet).unwrap().image_ref, "app:1");
        let by_id = ContainerConfig { image: image(""), ..config() };
        assert_eq!(convert(by_id).unwrap().image_ref, "sha256:12");
    }

    #[test]
    fn devices_of_the_host_are_refused() {
        assert_eq!(
            refused_field(ContainerConfig { devices: vec![Device::default()], ..config() }),
            "config.devices[0]"
        );
        assert_eq!(
            refused_field(ContainerConfig { cdi_devices: vec![CdiDevice::default()], ..config() }),
            "config.CDI_devices[0]"
        );
        assert_eq!(
            refused_field(ContainerConfig { windows: Some(Default::default()), ..config() }),
            "config.windows"
        );
    }

    #[test]
    fn a_log_path_stays_below_the_log_directory() {
        let with = |path: &str| ContainerConfig { log_path: path.to_owned(), ..config() };
        assert_eq!(convert(with("app/0.log")).unwrap().log_path, Some(PathBuf::from("app/0.log")));
        assert_eq!(convert(with("/app.log")).unwrap().log_path, Some(PathBuf::from("app.log")));
        assert_eq!(convert(with("")).unwrap().log_path, None);
        for path in ["../x", "a/../../x", "/"] {
            assert_eq!(refused_field(with(path)), "config.log_path", "{path}");
        }
    }

    #[test]
    fn mounts_are_carried_over_and_impossible_ones_refused_by_index() {
        let volume = |change: fn(&mut Mount)| {
            let mut mount = Mount {
                container_path: "/data".to_owned(),
                host_path: "/var/lib/x".to_owned(),
                ..Default::default()
            };
            change(&mut mount);
            ContainerConfig { mounts: vec![mount], ..config() }
        };
        let spec = convert(volume(|mount| {
            mount.propagation = MountPropagation::PropagationHostToContainer.into();
            mount.mount_options = vec!["noexec".to_owned()];
            mount.container_path = "data".to_owned();
        }))
        .unwrap();
        let expected = MountSpec {
            source: MountSource::Host {
                path: PathBuf::from("/var/lib/x"),
                propagate: true,
                recursive_readonly: false,
                id_mapped: None,
            },
            target: "/data".to_owned(),
            readonly: false,
            options: vec!["noexec".to_owned()],
        };
        assert_eq!(spec.mounts, [expected]);
        for (field, change) in [
            ("container_path", (|m| m.container_path.clear()) as fn(&mut Mount)),
            ("container_path", |m| m.container_path = "/".to_owned()),
            ("container_path", |m| m.container_path = "/data/..".to_owned()),
            ("container_path", |m| m.container_path = "/proc".to_owned()),
            ("container_path", |m| m.container_path = "/sys/../proc/sys/kernel".to_owned()),
            ("host_path", |m| m.host_path.clear()),
            ("host_path", |m| m.host_path = "relative".to_owned()),
            ("uidMappings", |m| m.gid_mappings = vec![IdMapping::default()]),
            ("uidMappings", |m| {
                m.uid_mappings = vec![IdMapping { host_id: 1, container_id: 0, length: 1 }];
                m.gid_mappings = m.uid_mappings.clone();
            }),
            ("propagation", |m| m.propagation = MountPropagation::PropagationBidirectional.into()),
            ("propagation", |m| m.propagation = 9),
            ("recursive_read_only", |m| m.recursive_read_only = true),
            ("mount_options[0]", |m| m.mount_options = vec!["bind".to_owned()]),
            ("mount_options[0]", |m| m.mount_options = vec!["noatime".to_owned()]),
        ] {
            assert_eq!(refused_field(volume(change)), format!("config.mounts[0].{field}"));
        }
    }

    #[test]
    fn an_image_volume_is_read_only_and_stays_inside_of_its_image() {
        let volume = |change: fn(&mut Mount)| {
            let mut mount = Mount {
                container_path: "/model".to_owned(),
                image: Some(ImageSpec { image: "model:1".to_owned(), ..Default::default() }),
                image_sub_path: "weights/v2".to_owned(),
                readonly: true,
                ..Default::default()
            };
            change(&mut mount);
            ContainerConfig { mounts: vec![mount], ..config() }
        };
        let asked = volume(|_| {});
        let named: Vec<_> = volume_images(&asked).collect();
        assert_eq!(named, [("config.mounts[0].image".to_owned(), "model:1")]);
        let mounts = convert(asked.clone()).unwrap().mounts;
        assert!(mounts[0].readonly);
        let MountSource::Image { reference, id, layers, sub_path } = &mounts[0].source else {
            panic!("{mounts:?}")
        };
        assert_eq!((reference.as_str(), id.as_str(), layers.len()), ("model:1", "sha256:77", 1));
        assert_eq!(sub_path, "weights/v2");
        for (field, change) in [
            ("readonly", (|m| m.readonly = false) as fn(&mut Mount)),
            ("host_path", |m| m.host_path = "/var/lib/x".to_owned()),
            ("image_sub_path", |m| m.image_sub_path = "a/../../b".to_owned()),
            ("image_sub_path", |m| m.image_sub_path = "/etc".to_owned()),
            ("image", |m| m.image = Some(ImageSpec::default())),
        ] {
            assert_eq!(refused_field(volume(change)), format!("config.mounts[0].{field}"));
        }
    }

    #[test]
    fn the_oom_score_of_kubelet_is_kept() {
        let linux = LinuxContainerConfig {
            resources: Some(crate::proto::LinuxContainerResources {
                oom_score_adj: 968,
                ..Default::default()
            }),
            ..Default::default()
        };
        let spec = convert(ContainerConfig { linux: Some(linux), ..config() }).unwrap();
        assert_eq!(spec.process.oom_score_adj, Some(968));
        assert_eq!(convert(config()).unwrap().process.oom_score_adj, None);
    }
}
