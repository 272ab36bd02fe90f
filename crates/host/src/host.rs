//! Composition: storage, images, network, hypervisor and boxes of one instance.

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use a3s_box_core::storage::Storage;
use a3s_box_image::{ImageError, ImageStore, ImageStoreConfig, Limits};
use a3s_box_runtime::{BoxManager, RuntimeConfig, RuntimeError};
use a3s_box_store::{OpenError, RedbStore};
use a3s_box_vmm::Vmm;

use crate::backend::{self, BackendError, Choice};
use crate::config::Config;
use crate::layout::{Layout, MissingPart, Part};
use crate::lock::{InstanceLock, LockError};
use crate::networks;

/// The store is free once a former daemon has ended; one that is on its way out gets this long.
const STORE_WAIT: Duration = Duration::from_secs(5);

/// An instance that could not be started.
#[derive(Debug, Error)]
pub enum HostError {
    /// A part is not installed.
    #[error(transparent)]
    Missing(#[from] MissingPart),
    /// No hypervisor can be used.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The directories belong to another instance.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The records cannot be opened.
    #[error(transparent)]
    Records(#[from] OpenError),
    /// The images cannot be opened.
    #[error(transparent)]
    Images(#[from] ImageError),
    /// The boxes of a former instance cannot be taken over.
    #[error(transparent)]
    Boxes(#[from] RuntimeError),
    /// A blocking step panicked or was cancelled.
    #[error("{step} did not finish: {source}")]
    Task {
        /// What.
        step: &'static str,
        /// Why.
        #[source]
        source: tokio::task::JoinError,
    },
}

/// A running instance. Dropping it releases its directories; its boxes keep running.
pub struct Host {
    /// As it was started.
    pub config: Config,
    /// Boxes and sessions.
    pub boxes: BoxManager,
    /// Images.
    pub images: ImageStore,
    /// Who runs the virtual machines, and why.
    pub choice: Choice,
    _locks: [InstanceLock; 2],
}

impl Host {
    /// Starts an instance: takes its directories, opens its records and images, chooses the hypervisor (which may
    /// take a trial boot), and takes over the boxes that a former instance left running.
    pub async fn start(config: Config) -> Result<Self, HostError> {
        let layout = Layout::of(&config);
        let locks = [InstanceLock::take(&config.root)?, InstanceLock::take(&config.run_dir)?];
        let (storage, images) = open_state(&config).await?;
        let (choice, vmm) = backend::choose(&config, &layout, &config.run_dir).await?;
        tracing::info!(backend = choice.name(), reason = %choice.reason, "hypervisor chosen");
        let boxes = start_boxes(&config, &layout, storage, vmm).await?;
        boxes.look_after_networks();
        Ok(Self { config, boxes, images, choice, _locks: locks })
    }
}

/// The box manager of a configuration, on any storage: the command line keeps its records in memory.
pub async fn start_boxes(
    config: &Config,
    layout: &Layout,
    storage: Arc<dyn Storage>,
    vmm: Arc<dyn Vmm>,
) -> Result<BoxManager, HostError> {
    let kernel = layout.find(Part::Kernel)?;
    let initramfs = layout.find(Part::Initramfs)?;
    layout.find(Part::MkfsExt4)?;
    let runtime = RuntimeConfig {
        boot_limit: config.vmm.boot_limit,
        stop_limit: config.vmm.stop_limit,
        parallel_boots: match config.vmm.parallel_boots {
            0 => parallel_boots(),
            set => set,
        },
        runtime_handlers: config.runtime_handlers.clone(),
        network: networks::setting(config, vmm.kind()),
        ..RuntimeConfig::new(config.run_dir.clone(), config.root.clone(), kernel, initramfs)
    };
    Ok(BoxManager::start(runtime, storage, vmm).await?)
}

/// Two boots per core: one of them mostly waits, for its files or for the host's side. Each needs memory that
/// is not there twice.
fn parallel_boots() -> usize {
    const MEMORY_OF_A_BOOT: u64 = 256 << 20;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let system = rustix::system::sysinfo();
    let memory = system.totalram.saturating_mul(u64::from(system.mem_unit)) / MEMORY_OF_A_BOOT;
    (2 * cores).min(usize::try_from(memory).unwrap_or(usize::MAX)).max(1)
}

/// The settings of the image store of a configuration.
pub fn image_store_config(config: &Config) -> ImageStoreConfig {
    ImageStoreConfig {
        certs_dirs: config.images.certs_dirs.clone(),
        max_parallel_layers: config.images.max_parallel_layers,
        max_parallel_downloads: config.images.max_parallel_downloads,
        cache_bytes: config.images.cache_bytes,
        pinned: config.images.pinned.clone(),
        fs_verity: config.images.fs_verity,
        limits: Limits { layer_bytes: config.images.max_layer_bytes, ..Limits::default() },
        ..ImageStoreConfig::new(config.root.clone())
    }
}

async fn open_state(config: &Config) -> Result<(Arc<dyn Storage>, ImageStore), HostError> {
    let images = image_store_config(config);
    let path = config.root.join("state.redb");
    let opened = tokio::task::spawn_blocking(move || -> Result<_, HostError> {
        let storage: Arc<dyn Storage> = Arc::new(RedbStore::open(&path, STORE_WAIT)?);
        let images = ImageStore::open(images, storage.clone())?;
        Ok((storage, images))
    });
    opened.await.map_err(|source| HostError::Task { step: "opening the state", source })?
}
