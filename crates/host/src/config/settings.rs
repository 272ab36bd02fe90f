//! The table of all settings.

use toml::de::DeValue;

use a3s_box_core::egress::Cidr;
use a3s_box_net::{Redirect, Subnet};

use super::value::{
    as_bytes, as_duration, as_number, as_path, as_paths, as_text, as_texts, show_bytes, show_duration,
    show_path, show_paths, show_text, show_texts,
};
use super::{Backend, CgroupDriver, Config, LogFormat, NetworkFallback, NetworkMode, QemuAccel};

/// One setting. `set` answers `None` and changes nothing when the value is not what is expected.
pub(super) struct Setting {
    /// With its section: `vmm.backend`.
    pub(super) key: &'static str,
    /// For the default file: what it decides.
    pub(super) help: &'static str,
    /// For messages: what a value must be.
    pub(super) expected: &'static str,
    /// The environment variable that sets it.
    pub(super) variable: Option<&'static str>,
    pub(super) set: fn(&mut Config, &DeValue<'_>) -> Option<()>,
    /// The value as TOML; empty if there is none.
    pub(super) show: fn(&Config) -> String,
}

const PATH: &str = "an absolute path";
const PATHS: &str = "a list of absolute paths";
const DURATION: &str = "a duration such as \"500ms\", \"5s\" or \"2m\", at most a day";

/// In the order of the default file: keys of one section stand together, those without a section first.
pub(super) const SETTINGS: &[Setting] = &[
    Setting {
        key: "root",
        help: "What survives a reboot: images, records. Two instances never share it.",
        expected: PATH,
        variable: Some("A3S_BOX_ROOT"),
        set: |c, v| put(&mut c.root, as_path(v)),
        show: |c| show_path(&c.root),
    },
    Setting {
        key: "run_dir",
        help: "What does not: one directory per box.",
        expected: PATH,
        variable: Some("A3S_BOX_RUN_DIR"),
        set: |c, v| put(&mut c.run_dir, as_path(v)),
        show: |c| show_path(&c.run_dir),
    },
    Setting {
        key: "socket",
        help: "Where kubelet finds the runtime. When run_dir is moved and this is not set, the socket moves with it.",
        expected: PATH,
        variable: Some("CRI_SOCKET_PATH"),
        set: |c, v| put(&mut c.socket_override, as_path(v).map(Some)),
        show: |c| show_path(&c.socket()),
    },
    Setting {
        key: "runtime_handlers",
        help: "The RuntimeClass handlers that are served; \"\" is what pods without a RuntimeClass get.",
        expected: "a list of handler names (letters, digits, - and .), none twice, at least one",
        variable: None,
        set: |c, v| put(&mut c.runtime_handlers, handlers(as_texts(v)?)),
        show: |c| show_texts(&c.runtime_handlers),
    },
    Setting {
        key: "log.level",
        help: "error, warn, info, debug or trace, or a filter such as \"info,a3s_box_runtime=debug\".",
        expected: "a level or a filter of levels",
        variable: Some("A3S_BOX_LOG"),
        set: |c, v| put(&mut c.log.level, log_filter(as_text(v)?)),
        show: |c| show_text(&c.log.level),
    },
    Setting {
        key: "log.format",
        help: "\"text\" for people, \"json\" for collectors.",
        expected: "\"text\" or \"json\"",
        variable: None,
        set: |c, v| {
            put(&mut c.log.format, one_of(v, &[("text", LogFormat::Text), ("json", LogFormat::Json)]))
        },
        show: |c| {
            show_text(match c.log.format {
                LogFormat::Text => "text",
                LogFormat::Json => "json",
            })
        },
    },
    Setting {
        key: "vmm.backend",
        help: "\"libkrun\" needs a working KVM, \"qemu\" runs everywhere; \"auto\" tries KVM with a boot and takes \
               libkrun\nif that reached the agent within probe_limit, else QEMU.",
        expected: "\"auto\", \"libkrun\" or \"qemu\"",
        variable: Some("A3S_BOX_BACKEND"),
        set: |c, v| put(&mut c.vmm.backend, one_of(v, BACKENDS)),
        show: |c| show_text(name_of(BACKENDS, c.vmm.backend)),
    },
    Setting {
        key: "vmm.probe_limit",
        help: "How long the trial boot of \"auto\" may take. Its verdict is remembered until the host reboots.",
        expected: DURATION,
        variable: None,
        set: |c, v| put(&mut c.vmm.probe_limit, as_duration(v)),
        show: |c| show_duration(c.vmm.probe_limit),
    },
    Setting {
        key: "vmm.boot_limit",
        help: "How long a box may take from power-on to its agent before RunPodSandbox fails.",
        expected: DURATION,
        variable: None,
        set: |c, v| put(&mut c.vmm.boot_limit, as_duration(v)),
        show: |c| show_duration(c.vmm.boot_limit),
    },
    Setting {
        key: "vmm.stop_limit",
        help: "How long a guest may take to power itself off before its VM is ended.",
        expected: DURATION,
        variable: None,
        set: |c, v| put(&mut c.vmm.stop_limit, as_duration(v)),
        show: |c| show_duration(c.vmm.stop_limit),
    },
    Setting {
        key: "vmm.parallel_boots",
        help: "How many boxes may boot at once; the next ones wait their turn. 0 takes it from cores and memory.",
        expected: "a number up to 1024",
        variable: None,
        set: |c, v| put(&mut c.vmm.parallel_boots, as_number::<u16>(v, 0, 1024).map(usize::from)),
        show: |c| c.vmm.parallel_boots.to_string(),
    },
    Setting {
        key: "vmm.kernel",
        help: "The guest kernel, instead of the one installed beside the program.",
        expected: PATH,
        variable: None,
        set: |c, v| put(&mut c.vmm.kernel, as_path(v).map(Some)),
        show: |c| c.vmm.kernel.as_deref().map(show_path).unwrap_or_default(),
    },
    Setting {
        key: "vmm.initramfs",
        help: "The guest's initramfs, instead of the installed one.",
        expected: PATH,
        variable: None,
        set: |c, v| put(&mut c.vmm.initramfs, as_path(v).map(Some)),
        show: |c| c.vmm.initramfs.as_deref().map(show_path).unwrap_or_default(),
    },
    Setting {
        key: "vmm.helpers",
        help: "The directory of a3s-box-vmm, instead of the installed one.",
        expected: PATH,
        variable: None,
        set: |c, v| put(&mut c.vmm.helpers, as_path(v).map(Some)),
        show: |c| c.vmm.helpers.as_deref().map(show_path).unwrap_or_default(),
    },
    Setting {
        key: "vmm.qemu",
        help: "The QEMU binary, instead of the first qemu-system-x86_64 on the PATH.",
        expected: PATH,
        variable: None,
        set: |c, v| put(&mut c.vmm.qemu, as_path(v).map(Some)),
        show: |c| c.vmm.qemu.as_deref().map(show_path).unwrap_or_default(),
    },
    Setting {
        key: "vmm.qemu_accel",
        help: "What executes guest code under the backend \"qemu\": \"kvm\", \"tcg\" (software emulation), or \"auto\" for\nKVM if a \
               trial boot on it works.",
        expected: "\"auto\", \"kvm\" or \"tcg\"",
        variable: None,
        set: |c, v| put(&mut c.vmm.qemu_accel, one_of(v, ACCELS)),
        show: |c| show_text(name_of(ACCELS, c.vmm.qemu_accel)),
    },
    Setting {
        key: "size.vcpus",
        help: "Virtual CPUs of a pod without a CPU limit.",
        expected: "a whole number from 1 to 64",
        variable: None,
        set: |c, v| put(&mut c.size.vcpus, as_number(v, 1, 64)),
        show: |c| c.size.vcpus.to_string(),
    },
    Setting {
        key: "size.memory_mib",
        help: "Memory of a pod without a memory limit, in MiB; the host backs a page when the guest touches it.",
        expected: "a whole number of MiB from 128 to 1048576",
        variable: None,
        set: |c, v| put(&mut c.size.memory_mib, as_number(v, 128, 1 << 20)),
        show: |c| c.size.memory_mib.to_string(),
    },
    Setting {
        key: "size.scratch_mib",
        help: "The sparse disk with all writable layers of a pod, in MiB.",
        expected: "a whole number of MiB from 64 to 16777216",
        variable: None,
        set: |c, v| put(&mut c.size.scratch_mib, as_number(v, 64, 1 << 24)),
        show: |c| c.size.scratch_mib.to_string(),
    },
    Setting {
        key: "network.mode",
        help: "\"cni\": the node's CNI plugins connect pods. \"local\": a built-in bridge does. \"none\": pods have a loopback\ninterface only.",
        expected: "\"cni\", \"local\" or \"none\"",
        variable: None,
        set: |c, v| put(&mut c.network.mode, one_of(v, NETWORKS)),
        show: |c| show_text(name_of(NETWORKS, c.network.mode)),
    },
    Setting {
        key: "network.fallback",
        help: "What \"cni\" means where there is no CNI configuration: \"none\", the node is not ready, or \"local\", the built-in\nbridge. \
               `a3s-box run` takes \"local\" unless \"none\" is written here.",
        expected: "\"none\" or \"local\"",
        variable: None,
        set: |c, v| put(&mut c.network.fallback, one_of(v, FALLBACKS)),
        show: |c| show_text(name_of(FALLBACKS, c.network.fallback)),
    },
    Setting {
        key: "network.local_subnet",
        help: "Where boxes on the built-in bridge get IPv4 addresses from. Must not collide with a route of the host.",
        expected: "an IPv4 network such as \"10.187.0.0/16\", /8 to /28",
        variable: None,
        set: |c, v| put(&mut c.network.local_subnet, subnet(v).filter(Subnet::is_ipv4)),
        show: |c| show_text(&c.network.local_subnet.to_string()),
    },
    Setting {
        key: "network.local_subnet6",
        help: "The same for IPv6, on hosts that have it; \"\" for none.",
        expected: "an IPv6 network such as \"fd00:1:2::/64\", /8 to /104, or \"\"",
        variable: None,
        set: |c, v| put(&mut c.network.local_subnet6, subnet6(v)),
        show: |c| show_text(&c.network.local_subnet6.map(|subnet| subnet.to_string()).unwrap_or_default()),
    },
    Setting {
        key: "network.cluster_cidrs",
        help: "The networks of pods, services and nodes: what \"cluster\" means in the annotation a3s.box/egress.",
        expected: "a list of networks such as [\"10.0.0.0/8\", \"fd00::/8\"]",
        variable: None,
        set: |c, v| put(&mut c.network.cluster_cidrs, cidrs(v)),
        show: |c| show_texts(&c.network.cluster_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>()),
    },
    Setting {
        key: "network.conf_dir",
        help: "Where CNI configurations lie; the lexically first one counts.",
        expected: PATH,
        variable: None,
        set: |c, v| put(&mut c.network.conf_dir, as_path(v)),
        show: |c| show_path(&c.network.conf_dir),
    },
    Setting {
        key: "network.conf_template",
        help: "What 10-a3s-box.conflist in conf_dir is made from once kubelet tells the node's pod CIDRs, if no other\n\
               configuration is there; as containerd's conf_template.",
        expected: PATH,
        variable: None,
        set: |c, v| put(&mut c.network.conf_template, as_path(v).map(Some)),
        show: |c| c.network.conf_template.as_deref().map(show_path).unwrap_or_default(),
    },
    Setting {
        key: "network.bin_dirs",
        help: "Where CNI plugins lie, in the order of search.",
        expected: PATHS,
        variable: None,
        set: |c, v| put(&mut c.network.bin_dirs, as_paths(v)),
        show: |c| show_paths(&c.network.bin_dirs),
    },
    Setting {
        key: "network.plugin_timeout",
        help: "How long one plugin may take for one command.",
        expected: DURATION,
        variable: None,
        set: |c, v| put(&mut c.network.plugin_timeout, as_duration(v)),
        show: |c| show_duration(c.network.plugin_timeout),
    },
    Setting {
        key: "network.redirect",
        help: "What leads frames between a pod's interface and its tap: \"tc\", traffic control, \"nft\", nftables, or \"auto\", nftables on\na kernel whose traffic control lacks what it takes.",
        expected: "\"auto\", \"tc\" or \"nft\"",
        variable: None,
        set: |c, v| put(&mut c.network.redirect, one_of(v, REDIRECTS)),
        show: |c| show_text(name_of(REDIRECTS, c.network.redirect)),
    },
    Setting {
        key: "images.certs_dirs",
        help: "Directories with HOST/hosts.toml, as containerd's users know them, in the order of search.",
        expected: PATHS,
        variable: None,
        set: |c, v| put(&mut c.images.certs_dirs, as_paths(v)),
        show: |c| show_paths(&c.images.certs_dirs),
    },
    Setting {
        key: "images.max_parallel_layers",
        help: "Layers of one image that download at once.",
        expected: "a whole number from 1 to 64",
        variable: None,
        set: |c, v| put(&mut c.images.max_parallel_layers, as_number::<u8>(v, 1, 64).map(usize::from)),
        show: |c| c.images.max_parallel_layers.to_string(),
    },
    Setting {
        key: "images.max_parallel_downloads",
        help: "Layers of all images that download at once.",
        expected: "a whole number from 1 to 256",
        variable: None,
        set: |c, v| put(&mut c.images.max_parallel_downloads, as_number::<u16>(v, 1, 256).map(usize::from)),
        show: |c| c.images.max_parallel_downloads.to_string(),
    },
    Setting {
        key: "images.max_layer_bytes",
        help: "The largest layer after decompression; a larger one fails its pull.",
        expected: "a size such as \"64GiB\", or a number of bytes, at least 1 MiB",
        variable: None,
        set: |c, v| put(&mut c.images.max_layer_bytes, as_bytes(v).filter(|bytes| *bytes >= 1 << 20)),
        show: |c| show_bytes(c.images.max_layer_bytes),
    },
    Setting {
        key: "images.cache_bytes",
        help: "Disk for layers that no image needs any more; never over half of what is free. 0 keeps none.",
        expected: "a size such as \"2GiB\", or a number of bytes",
        variable: None,
        set: |c, v| put(&mut c.images.cache_bytes, as_bytes(v)),
        show: |c| show_bytes(c.images.cache_bytes),
    },
    Setting {
        key: "images.pinned",
        help: "Images that kubelet is told never to collect, by name.",
        expected: "a list of image references",
        variable: None,
        set: |c, v| {
            put(&mut c.images.pinned, as_texts(v).filter(|names| names.iter().all(|name| is_reference(name))))
        },
        show: |c| show_texts(&c.images.pinned),
    },
    Setting {
        key: "images.fs_verity",
        help: "Seal layers with fs-verity where the file system can: the kernel then checks whatever it reads of them.",
        expected: "true or false",
        variable: None,
        set: |c, v| put(&mut c.images.fs_verity, v.as_bool()),
        show: |c| c.images.fs_verity.to_string(),
    },
    Setting {
        key: "streaming.address",
        help: "Where clients of exec, attach and port-forward connect: kubelet, from this node. Port 0 is one that is free.",
        expected: "an address with a port such as \"127.0.0.1:0\" or \"[::1]:10010\"",
        variable: None,
        set: |c, v| put(&mut c.streaming.address, as_text(v)?.parse().ok()),
        show: |c| show_text(&c.streaming.address.to_string()),
    },
    Setting {
        key: "streaming.idle_timeout",
        help: "Connections on which nothing is transferred for so long are cut off.",
        expected: DURATION,
        variable: None,
        set: |c, v| put(&mut c.streaming.idle_timeout, as_duration(v)),
        show: |c| show_duration(c.streaming.idle_timeout),
    },
    Setting {
        key: "streaming.creation_timeout",
        help: "How long a client has to open all of its streams.",
        expected: DURATION,
        variable: None,
        set: |c, v| put(&mut c.streaming.creation_timeout, as_duration(v)),
        show: |c| show_duration(c.streaming.creation_timeout),
    },
    Setting {
        key: "streaming.tls_certificate",
        help: "The server's certificate in PEM, for https instead of http; the certificates that lead to its authority follow\nin the \
               same file. Read again when it changes.",
        expected: PATH,
        variable: None,
        set: |c, v| put(&mut c.streaming.tls_certificate, as_path(v).map(Some)),
        show: |c| c.streaming.tls_certificate.as_deref().map(show_path).unwrap_or_default(),
    },
    Setting {
        key: "streaming.tls_key",
        help: "The certificate's key in PEM; with streaming.tls_certificate or not at all.",
        expected: PATH,
        variable: None,
        set: |c, v| put(&mut c.streaming.tls_key, as_path(v).map(Some)),
        show: |c| c.streaming.tls_key.as_deref().map(show_path).unwrap_or_default(),
    },
    Setting {
        key: "cgroup.driver",
        help: "What kubelet is told to name pod cgroups by: \"cgroupfs\" or \"systemd\".",
        expected: "\"cgroupfs\" or \"systemd\"",
        variable: None,
        set: |c, v| put(&mut c.cgroup.driver, one_of(v, DRIVERS)),
        show: |c| show_text(name_of(DRIVERS, c.cgroup.driver)),
    },
];

const BACKENDS: &[(&str, Backend)] =
    &[("auto", Backend::Auto), ("libkrun", Backend::Libkrun), ("qemu", Backend::Qemu)];
const ACCELS: &[(&str, QemuAccel)] =
    &[("auto", QemuAccel::Auto), ("kvm", QemuAccel::Kvm), ("tcg", QemuAccel::Tcg)];
const NETWORKS: &[(&str, NetworkMode)] =
    &[("cni", NetworkMode::Cni), ("local", NetworkMode::Local), ("none", NetworkMode::None)];
const FALLBACKS: &[(&str, NetworkFallback)] =
    &[("none", NetworkFallback::None), ("local", NetworkFallback::Local)];
const REDIRECTS: &[(&str, Redirect)] =
    &[("auto", Redirect::Auto), ("tc", Redirect::Tc), ("nft", Redirect::Nft)];
const DRIVERS: &[(&str, CgroupDriver)] =
    &[("cgroupfs", CgroupDriver::Cgroupfs), ("systemd", CgroupDriver::Systemd)];

fn put<T>(place: &mut T, value: Option<T>) -> Option<()> {
    *place = value?;
    Some(())
}

fn one_of<T: Copy>(value: &DeValue<'_>, words: &[(&str, T)]) -> Option<T> {
    let text = as_text(value)?;
    words.iter().find(|(word, _)| *word == text).map(|(_, meaning)| *meaning)
}

fn name_of<T: Copy + PartialEq>(words: &[(&'static str, T)], meaning: T) -> &'static str {
    words.iter().find(|(_, m)| *m == meaning).map_or("", |(word, _)| word)
}

fn subnet(value: &DeValue<'_>) -> Option<Subnet> {
    as_text(value)?.parse().ok()
}

/// An empty text is a value: none.
fn subnet6(value: &DeValue<'_>) -> Option<Option<Subnet>> {
    match value.as_str()? {
        "" => Some(None),
        text => text.parse().ok().filter(|subnet: &Subnet| !subnet.is_ipv4()).map(Some),
    }
}

fn cidrs(value: &DeValue<'_>) -> Option<Vec<Cidr>> {
    as_texts(value)?.iter().map(|text| text.parse().ok()).collect()
}

/// The characters of a RuntimeClass handler: a DNS label or several (Kubernetes, node.k8s.io/v1).
fn handlers(names: Vec<String>) -> Option<Vec<String>> {
    let spelled = |name: &String| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    let unique = names.iter().enumerate().all(|(at, name)| !names[..at].contains(name));
    (!names.is_empty() && unique && names.iter().all(spelled)).then_some(names)
}

/// Checked here, so that a slip is told with the name of the setting.
fn is_reference(name: &str) -> bool {
    name.parse::<a3s_box_image::reference::Reference>().is_ok()
}

fn log_filter(text: &str) -> Option<String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let known = |part: &str| {
        let level = part.rsplit('=').next().unwrap_or(part).trim();
        LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level))
    };
    text.split(',').all(known).then(|| text.to_owned())
}
