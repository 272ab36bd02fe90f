//! The services on a real socket, over a runtime whose hypervisor never starts anything.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use a3s_box_core::storage::Storage;
use a3s_box_cri::convert::resources::SizePolicy;
use a3s_box_cri::proto::image_service_client::ImageServiceClient;
use a3s_box_cri::proto::runtime_service_client::RuntimeServiceClient;
use a3s_box_cri::{CgroupDriver, Condition, CriService, CriSettings, server};
use a3s_box_image::{ImageStore, ImageStoreConfig};
use a3s_box_runtime::{BoxManager, RuntimeConfig};
use a3s_box_store::RedbStore;
use a3s_box_streaming::{Server, ServerConfig};
use a3s_box_vmm::error::LaunchError;
use a3s_box_vmm::{BackendKind, BoxPlan, Machine, MachineFacts, Vmm};
use async_trait::async_trait;
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};

/// A hypervisor that is not installed.
struct NoVmm;

#[async_trait]
impl Vmm for NoVmm {
    fn kind(&self) -> BackendKind {
        BackendKind::Qemu
    }

    async fn launch(&self, plan: &BoxPlan) -> Result<Box<dyn Machine>, LaunchError> {
        Err(LaunchError::MissingPart {
            what: "the test's hypervisor",
            path: plan.dir.clone(),
            remedy: "there is none on purpose",
        })
    }

    async fn adopt(&self, _: &Path, _: &MachineFacts) -> Result<Option<Box<dyn Machine>>, LaunchError> {
        Ok(None)
    }
}

/// A served instance with a client of each kind.
pub(crate) struct Served {
    pub(crate) runtime: RuntimeServiceClient<Channel>,
    pub(crate) images: ImageServiceClient<Channel>,
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
    dir: TempDir,
}

impl Served {
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let service = service(dir.path()).await;
        let socket = dir.path().join("cri.sock");
        let listener = server::bind(&socket).await.expect("the socket is free");
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            server::serve(listener, service, stopped).await.expect("serving ends in order");
        });
        let channel = Endpoint::from_shared(format!("unix://{}", socket.display()))
            .expect("a path")
            .connect()
            .await
            .expect("the socket answers");
        Self {
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
            stop,
            server,
            dir,
        }
    }

    /// Ends the server; a panic in it fails the test.
    pub(crate) async fn stop(self) {
        let Self { runtime, images, stop, server, dir } = self;
        drop((runtime, images));
        stop.send(()).expect("the server runs");
        server.await.expect("the server did not panic");
        dir.close().expect("the folder can be removed");
    }
}

async fn service(dir: &Path) -> CriService {
    let storage: Arc<dyn Storage> = Arc::new(RedbStore::in_memory().expect("memory"));
    let images = ImageStore::open(ImageStoreConfig::new(dir.join("root")), storage.clone()).expect("a store");
    let file = |name: &str| {
        let path = dir.join(name);
        std::fs::write(&path, "not booted").expect("a file");
        path
    };
    let mut config =
        RuntimeConfig::new(dir.join("run"), dir.join("root"), file("vmlinux"), file("initramfs"));
    config.use_cgroups = false;
    let boxes = BoxManager::start(config, storage, Arc::new(NoVmm)).await.expect("nothing to recover");
    let settings = CriSettings {
        runtime_version: "1.2.3".to_owned(),
        runtime_handlers: vec!["a3s-box".to_owned()],
        cgroup_driver: CgroupDriver::Systemd,
        size: SizePolicy::default(),
        cluster_cidrs: Vec::new(),
        runtime_condition: Condition::met(),
        scratch_dir: dir.join("root/boxes"),
        info: BTreeMap::from([("config".to_owned(), "{}".to_owned())]),
    };
    let streaming = ServerConfig {
        tls: None,
        address: ([127, 0, 0, 1], 0).into(),
        idle_timeout: Duration::from_secs(60),
        creation_timeout: Duration::from_secs(5),
    };
    // Its URLs are given out; nobody serves them here.
    let streaming = Server::bind(&streaming).await.expect("a free port");
    CriService::new(boxes, images, streaming.urls(), settings)
}
