//! How an image store is set up.

use std::path::PathBuf;
use std::time::Duration;

/// Where the store lives and what bounds its work.
#[derive(Debug, Clone)]
pub struct ImageStoreConfig {
    /// The state directory; the store owns `<root>/images`.
    pub root: PathBuf,
    /// Directories with `HOST/hosts.toml`, searched in order. A missing one is no error.
    pub certs_dirs: Vec<PathBuf>,
    /// How many layers of one image download and convert at once. At least one.
    pub max_parallel_layers: usize,
    /// How many layers of all images do. At least one; a slow registry must not stop the others.
    pub max_parallel_downloads: usize,
    /// How much of the disk layers may take that no image needs: those of removed images and of pulls
    /// that did not end well. Never more than half of what is free.
    pub cache_bytes: u64,
    /// Names of images that are told to kubelet as never to be collected.
    pub pinned: Vec<String>,
    /// Seal layers' files with fs-verity where the file system can.
    pub fs_verity: bool,
    /// What foreign bytes may make us spend.
    pub limits: Limits,
    /// How long a registry may take.
    pub timeouts: Timeouts,
    /// How often a failed request is sent again.
    pub retries: Retries,
}

impl ImageStoreConfig {
    /// The defaults, with state under `root` and hosts files in `/etc/a3s-box/certs.d`, then
    /// `/etc/containerd/certs.d`, then `/etc/docker/certs.d`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            certs_dirs: ["/etc/a3s-box/certs.d", "/etc/containerd/certs.d", "/etc/docker/certs.d"]
                .map(PathBuf::from)
                .to_vec(),
            max_parallel_layers: 3,
            max_parallel_downloads: 16,
            cache_bytes: 2 << 30,
            pinned: Vec::new(),
            fs_verity: false,
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            retries: Retries::default(),
        }
    }
}

/// Bounds on what an image may cost, in bytes or counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Size of a manifest or index.
    pub manifest_bytes: u64,
    /// Size of an image config.
    pub config_bytes: u64,
    /// Size of one layer's tar after decompression, and of the EROFS file made of it.
    pub layer_bytes: u64,
    /// Memory for the names and attributes of one layer while it is converted.
    pub metadata_bytes: u64,
    /// Layers of one image.
    pub layers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            manifest_bytes: 4 << 20,
            config_bytes: 8 << 20,
            layer_bytes: 64 << 30,
            metadata_bytes: 512 << 20,
            layers: 512,
        }
    }
}

/// How long a registry may take before a request counts as failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Until a connection stands, TLS included.
    pub connect: Duration,
    /// From a request until its response headers.
    pub headers: Duration,
    /// Between two pieces of a body.
    pub idle: Duration,
    /// The slowest acceptable download, in bytes per second; it bounds a whole transfer to
    /// `idle + size / slowest`.
    pub slowest: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            headers: Duration::from_secs(30),
            idle: Duration::from_secs(30),
            slowest: 16 << 10,
        }
    }
}

/// How often and how fast a failed request is sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retries {
    /// Further attempts after the first one.
    pub attempts: u32,
    /// The pause before the first of them; it doubles each time.
    pub pause: Duration,
    /// The longest pause, also when the registry asks for more with `Retry-After`.
    pub longest_pause: Duration,
}

impl Default for Retries {
    fn default() -> Self {
        Self { attempts: 3, pause: Duration::from_millis(500), longest_pause: Duration::from_secs(30) }
    }
}
