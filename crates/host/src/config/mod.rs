//! Configuration: one TOML file, the environment, flags; each overrides the one before.
//!
//! Every setting is a row of the table in [`settings`]: its key, what it may be, how it is set and how
//! it is shown. Parsing, messages, the commented default file and `config show` all come from that table, so that
//! none of them can forget a key.

mod flags;
mod parse;
mod settings;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

use a3s_box_core::egress::Cidr;
use a3s_box_core::spec::BoxSize;
use a3s_box_net::{LocalConfig, Redirect, Subnet};

pub use flags::ConfigFlags;
pub use value::{parse_duration, parse_size};

/// Where the configuration is when nothing else is said; a missing file here means defaults.
pub const DEFAULT_FILE: &str = "/etc/a3s-box/config.toml";
/// The environment variable that names another file; that one must exist.
pub const FILE_VARIABLE: &str = "A3S_BOX_CONFIG";

const DEFAULT_RUN_DIR: &str = "/run/a3s-box";
const DEFAULT_SOCKET: &str = "/var/run/a3s-box/a3s-box.sock";

/// All settings, complete.
#[derive(Debug, Clone)]
pub struct Config {
    /// What survives a reboot: images, records, scratch templates.
    pub root: PathBuf,
    /// What does not: one directory per box, the socket of a moved instance.
    pub run_dir: PathBuf,
    /// The CRI socket if it was set; see [`Config::socket`].
    pub socket_override: Option<PathBuf>,
    /// Messages of the host programs.
    pub log: LogConfig,
    /// Virtual machines.
    pub vmm: VmmConfig,
    /// The size of boxes that name none.
    pub size: BoxSize,
    /// Pod networking.
    pub network: NetworkConfig,
    /// Images and registries.
    pub images: ImagesConfig,
    /// The server of exec, attach and port-forward.
    pub streaming: StreamingConfig,
    /// Control groups of the host.
    pub cgroup: CgroupConfig,
    /// Names of RuntimeClass handlers that are served; the empty name is the default handler.
    pub runtime_handlers: Vec<String>,
    origins: BTreeMap<&'static str, Origin>,
}

/// Messages of the host programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// A level or a filter such as `info,a3s_box_runtime=debug`.
    pub level: String,
    /// How lines look.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Virtual machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmConfig {
    /// Which hypervisor.
    pub backend: Backend,
    /// How long the trial boot of `auto` may take.
    pub probe_limit: Duration,
    /// How long a box may take from power-on to its agent.
    pub boot_limit: Duration,
    /// How long a guest may take to power itself off before its VM is ended.
    pub stop_limit: Duration,
    /// Boxes that may boot at once; 0: as cores and memory allow.
    pub parallel_boots: usize,
    /// The guest kernel, instead of the installed one.
    pub kernel: Option<PathBuf>,
    /// The initramfs, instead of the installed one.
    pub initramfs: Option<PathBuf>,
    /// The directory of `a3s-box-vmm` and QEMU's helpers, instead of the installed one.
    pub helpers: Option<PathBuf>,
    /// The QEMU binary, instead of the first `qemu-system-x86_64` on the PATH.
    pub qemu: Option<PathBuf>,
    /// What executes guest code under QEMU.
    pub qemu_accel: QemuAccel,
}

/// What executes guest code under QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QemuAccel {
    /// KVM if a trial boot on it works, else software emulation.
    Auto,
    /// KVM.
    Kvm,
    /// Software emulation.
    Tcg,
}

/// Which hypervisor runs boxes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// libkrun where a trial boot on KVM reached the agent in time, else QEMU.
    Auto,
    /// libkrun on KVM.
    Libkrun,
    /// QEMU.
    Qemu,
}

/// Pod networking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Who connects pods.
    pub mode: NetworkMode,
    /// Who connects pods where there is no CNI configuration.
    pub fallback: NetworkFallback,
    /// Where boxes on the built-in bridge get their addresses from.
    pub local_subnet: Subnet,
    /// The same for IPv6; `None`: they have none.
    pub local_subnet6: Option<Subnet>,
    /// What `cluster` means in egress policies; empty: nobody may write it.
    pub cluster_cidrs: Vec<Cidr>,
    /// Where CNI configurations lie; the lexically first one counts.
    pub conf_dir: PathBuf,
    /// What a configuration is made from where there is none.
    pub conf_template: Option<PathBuf>,
    /// Where CNI plugins lie, in the order of search.
    pub bin_dirs: Vec<PathBuf>,
    /// How long one plugin may take.
    pub plugin_timeout: Duration,
    /// What leads frames between pods' interfaces and their taps.
    pub redirect: Redirect,
}

/// Who connects pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkMode {
    /// The node's CNI plugins.
    Cni,
    /// The built-in bridge.
    Local,
    /// Nobody: pods have a loopback interface only.
    None,
}

/// Who connects pods in mode `cni` where there is no CNI configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkFallback {
    /// Nobody: the node is not ready.
    None,
    /// The built-in bridge.
    Local,
}

/// Images and registries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImagesConfig {
    /// Directories with `HOST/hosts.toml`, in the order of search.
    pub certs_dirs: Vec<PathBuf>,
    /// Layers of one image that download at once.
    pub max_parallel_layers: usize,
    /// Layers of all images that download at once.
    pub max_parallel_downloads: usize,
    /// The largest layer after decompression, in bytes.
    pub max_layer_bytes: u64,
    /// Disk for layers that no image needs, in bytes.
    pub cache_bytes: u64,
    /// Images that are never collected.
    pub pinned: Vec<String>,
    /// Seal layers with fs-verity where the file system can.
    pub fs_verity: bool,
}

/// The server of exec, attach and port-forward.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamingConfig {
    /// Where it listens; port 0 is one that is free.
    pub address: SocketAddr,
    /// Connections on which nothing is transferred for so long are cut off.
    pub idle_timeout: Duration,
    /// How long a client has to open all of its streams.
    pub creation_timeout: Duration,
    /// The server's certificate, in PEM; with it the URLs are https.
    pub tls_certificate: Option<PathBuf>,
    /// The certificate's key, in PEM.
    pub tls_key: Option<PathBuf>,
}

/// Control groups of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CgroupConfig {
    /// How kubelet is to name pod cgroups.
    pub driver: CgroupDriver,
}

/// Who manages control groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupDriver {
    /// Directories, made by kubelet and us.
    Cgroupfs,
    /// systemd slices.
    Systemd,
}

/// Where a setting's value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of the configuration file.
    File {
        /// Which file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
    /// An environment variable.
    Environment(&'static str),
    /// A flag of the command line.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Environment(variable) => write!(f, "the environment variable {variable}"),
            Self::Flag(flag) => write!(f, "the flag {flag}"),
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("could not read the configuration {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The operating system's word.
        #[source]
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{}:{line}: the configuration is not valid TOML: {message}", path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// The parser's word.
        message: String,
    },
    /// Keys or values are wrong; all of them are named.
    #[error("{}", list(.0))]
    Settings(Vec<Problem>),
}

/// One wrong key or value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// There is no such key.
    UnknownKey {
        /// Where it was found.
        origin: Origin,
        /// The key with its section.
        key: String,
        /// The known key that is most like it.
        nearest: Option<String>,
    },
    /// The key exists, its value is not one it can have.
    BadValue {
        /// Where it was found.
        origin: Origin,
        /// The key with its section.
        key: String,
        /// The value as written.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKey { origin, key, nearest: Some(nearest) } => {
                write!(f, "{origin}: there is no setting {key}; did you mean {nearest}?")
            }
            Self::UnknownKey { origin, key, nearest: None } => {
                write!(f, "{origin}: there is no setting {key}; `a3s-box config default` lists them all")
            }
            Self::BadValue { origin, key, value, expected } => {
                write!(f, "{origin}: {key} is {value}, expected {expected}")
            }
        }
    }
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/a3s-box".into(),
            run_dir: DEFAULT_RUN_DIR.into(),
            socket_override: None,
            log: LogConfig { level: "info".to_owned(), format: LogFormat::Text },
            vmm: VmmConfig {
                backend: Backend::Auto,
                probe_limit: Duration::from_secs(10),
                boot_limit: Duration::from_secs(60),
                stop_limit: Duration::from_secs(10),
                parallel_boots: 0,
                kernel: None,
                initramfs: None,
                helpers: None,
                qemu: None,
                qemu_accel: QemuAccel::Auto,
            },
            size: BoxSize::default(),
            network: NetworkConfig {
                mode: NetworkMode::Cni,
                fallback: NetworkFallback::None,
                local_subnet: LocalConfig::default().subnet,
                local_subnet6: LocalConfig::default().subnet6,
                cluster_cidrs: Vec::new(),
                conf_dir: "/etc/cni/net.d".into(),
                conf_template: None,
                bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
                plugin_timeout: Duration::from_secs(60),
                redirect: Redirect::Auto,
            },
            images: ImagesConfig {
                certs_dirs: ["/etc/a3s-box/certs.d", "/etc/containerd/certs.d", "/etc/docker/certs.d"]
                    .map(PathBuf::from)
                    .to_vec(),
                max_parallel_layers: 3,
                max_parallel_downloads: 16,
                max_layer_bytes: 64 << 30,
                cache_bytes: 2 << 30,
                pinned: Vec::new(),
                fs_verity: false,
            },
            streaming: StreamingConfig {
                address: SocketAddr::from(([127, 0, 0, 1], 0)),
                idle_timeout: Duration::from_secs(4 * 3600),
                creation_timeout: Duration::from_secs(30),
                tls_certificate: None,
                tls_key: None,
            },
            cgroup: CgroupConfig { driver: CgroupDriver::Cgroupfs },
            runtime_handlers: vec![String::new(), "a3s-box".to_owned()],
            origins: BTreeMap::new(),
        }
    }
}

impl Config {
    /// The CRI socket: as set; else the well-known one; else, for an instance whose run directory was moved, one
    /// in that directory, so that instances side by side do not fight for it.
    pub fn socket(&self) -> PathBuf {
        match &self.socket_override {
            Some(socket) => socket.clone(),
            None if self.run_dir == Path::new(DEFAULT_RUN_DIR) => DEFAULT_SOCKET.into(),
            None => self.run_dir.join("a3s-box.sock"),
        }
    }

    /// The same settings with other directories.
    pub fn with_directories(&self, root: PathBuf, run_dir: PathBuf) -> Self {
        Self { root, run_dir, ..self.clone() }
    }

    /// Where a setting's value comes from; `None`: it is the default.
    pub fn origin(&self, key: &str) -> Option<&Origin> {
        self.origins.get(key)
    }

    /// The commented file that says nothing but the defaults.
    pub fn default_file() -> String {
        parse::render_default_file()
    }

    /// The effective settings as TOML, each with its origin as a comment.
    pub fn render(&self) -> String {
        parse::render_effective(self)
    }

    /// Every key with its value as TOML, in the order of the default file.
    pub fn entries(&self) -> Vec<(&'static str, String)> {
        settings::SETTINGS.iter().map(|setting| (setting.key, (setting.show)(self))).collect()
    }
}

#[cfg(test)]
mod tests;
