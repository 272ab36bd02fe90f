//! The image store of `run`: shared by all invocations, apart from the daemon's.
//!
//! One process at a time may have it open, so it is opened for as long as an image is looked up or pulled and no
//! longer: several `run` go side by side.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tempfile::TempDir;

use a3s_box_core::image::ResolvedImage;
use a3s_box_core::storage::Storage;
use a3s_box_host::{Config, image_store_config};
use a3s_box_image::{ImageRecord, ImageStore};
use a3s_box_store::{OpenError, RedbStore};

use crate::cli::Pull;
use crate::credentials::Login;
use crate::progress::{self, Show};
use crate::tell::note;

/// After this a waiting user is told what for.
const PATIENCE: Duration = Duration::from_secs(1);
/// Another invocation may be pulling something large.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// The store, open. Dropping it lets others in.
pub(crate) struct Standalone {
    pub(crate) images: ImageStore,
    _plain_http: Option<TempDir>,
}

impl Standalone {
    /// Opens the store; waits for other invocations, and says so.
    pub(crate) async fn open(config: &Config, plain_http: &[String]) -> anyhow::Result<Self> {
        let root = config.root.join("standalone");
        a3s_box_host::make_private_dir(&root)?;
        Self::open_at(config, root, plain_http, open_records).await
    }

    /// Opens the daemon's store, which no daemon may have open.
    pub(crate) async fn open_daemons(config: &Config, plain_http: &[String]) -> anyhow::Result<Self> {
        let root = config.root.clone();
        if !root.join("state.redb").exists() {
            bail!("no daemon has kept images in {}: check `root` of the configuration", root.display());
        }
        Self::open_at(config, root, plain_http, |path| match RedbStore::open(&path, PATIENCE) {
            Err(OpenError::InUse { .. }) => bail!(
                "the daemon runs and uses its image store: stop it first, for instance with `systemctl stop a3s-box`, \
                 and start it again afterwards; pods go on running meanwhile"
            ),
            opened => Ok(opened?),
        })
        .await
    }

    async fn open_at(
        config: &Config,
        root: PathBuf,
        plain_http: &[String],
        records: fn(PathBuf) -> anyhow::Result<RedbStore>,
    ) -> anyhow::Result<Self> {
        let plain_http = plain_http_hosts(plain_http)?;
        let mut settings = image_store_config(&config.with_directories(root.clone(), config.run_dir.clone()));
        settings.certs_dirs.splice(0..0, plain_http.iter().map(|dir| dir.path().to_path_buf()));
        let images = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
            let storage: Arc<dyn Storage> = Arc::new(records(root.join("state.redb"))?);
            Ok(ImageStore::open(settings, storage)?)
        });
        Ok(Self { images: images.await.context("opening the image store")??, _plain_http: plain_http })
    }

    /// The image of a name, fetched if the policy says so.
    pub(crate) async fn image(
        &self,
        name: &str,
        policy: Pull,
        show: Show,
        login: &Login,
    ) -> anyhow::Result<ResolvedImage> {
        let name = &absolute(name);
        let present = match policy {
            Pull::Always => None,
            // A directory or archive may have changed since; what has not changed is not read again.
            Pull::Missing if is_local(name) => None,
            Pull::Missing | Pull::Never => self.images.find(name)?,
        };
        match (present, policy) {
            (Some(record), _) => Ok(self.images.resolve(&record.id)?),
            (None, Pull::Never) => {
                bail!("the image {name} is not here, and --pull never forbids to fetch it")
            }
            (None, Pull::Always | Pull::Missing) => {
                let record = self.pull(name, show, login).await?;
                Ok(self.images.resolve(&record.id)?)
            }
        }
    }

    /// Fetches an image, with the credentials that are known for its registry.
    pub(crate) async fn pull(&self, name: &str, show: Show, login: &Login) -> anyhow::Result<ImageRecord> {
        let name = &absolute(name);
        let auth = login.for_image(name).await?;
        Ok(self.images.pull(name, auth, progress::observer(show, name)).await?)
    }
}

fn open_records(path: PathBuf) -> anyhow::Result<RedbStore> {
    match RedbStore::open(&path, PATIENCE) {
        Err(OpenError::InUse { .. }) => {
            note!("waiting for another a3s-box that uses the image store");
            RedbStore::open(&path, LONGEST_WAIT).context("the image store is still in use by another a3s-box")
        }
        opened => Ok(opened?),
    }
}

const LOCAL: [&str; 3] = ["oci:", "oci-archive:", "docker-archive:"];

pub(crate) fn is_local(name: &str) -> bool {
    LOCAL.iter().any(|scheme| name.starts_with(scheme))
}

/// `oci:./dir` means the directory that the user sees; the store knows absolute paths.
pub(crate) fn absolute(name: &str) -> String {
    for scheme in LOCAL {
        if let Some(path) = name.strip_prefix(scheme)
            && !path.is_empty()
            && let Ok(path) = std::path::absolute(path)
        {
            return format!("{scheme}{}", path.display());
        }
    }
    name.to_owned()
}

/// A directory of hosts files as the store reads them, for registries without TLS.
fn plain_http_hosts(hosts: &[String]) -> anyhow::Result<Option<TempDir>> {
    if hosts.is_empty() {
        return Ok(None);
    }
    let dir = tempfile::tempdir().context("could not make a temporary directory")?;
    for host in hosts {
        if host.is_empty() || host.contains(['/', '"', '\\']) || host.starts_with('.') {
            bail!("--plain-http {host:?} is not HOST or HOST:PORT");
        }
        let below = dir.path().join(host);
        std::fs::create_dir(&below)
            .and_then(|()| std::fs::write(below.join("hosts.toml"), format!("server = \"http://{host}\"\n")))
            .with_context(|| format!("could not write {}", below.display()))?;
    }
    Ok(Some(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_local_images_are_made_absolute() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(absolute("oci:x/y:tag"), format!("oci:{}/x/y:tag", here.display()));
        assert_eq!(absolute("oci-archive:/a.tar"), "oci-archive:/a.tar");
        assert_eq!(absolute("docker.io/library/busybox"), "docker.io/library/busybox");
    }

    #[test]
    fn a_plain_http_host_cannot_leave_its_directory() {
        for bad in ["../x", "a/b", "", ".."] {
            assert!(plain_http_hosts(&[bad.to_owned()]).is_err(), "{bad}");
        }
        let dir = plain_http_hosts(&["127.0.0.1:5000".to_owned()]).unwrap().unwrap();
        let text = std::fs::read_to_string(dir.path().join("127.0.0.1:5000/hosts.toml")).unwrap();
        assert_eq!(text, "server = \"http://127.0.0.1:5000\"\n");
    }

    #[tokio::test]
    async fn never_does_not_fetch() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::default().with_directories(dir.path().join("root"), dir.path().join("run"));
        let store = Standalone::open(&config, &[]).await.unwrap();
        let login = Login::Told { username: String::new(), password: String::new() };
        let error = store.image("registry.invalid/x:1", Pull::Never, Show::Quiet, &login).await.unwrap_err();
        assert!(error.to_string().contains("--pull never"), "{error:#}");
    }
    #[tokio::test]
    async fn the_daemons_store_is_only_opened_while_the_daemon_is_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::default().with_directories(dir.path().to_owned(), dir.path().join("run"));
        let refused = || async { Standalone::open_daemons(&config, &[]).await.err().unwrap().to_string() };
        assert!(refused().await.contains("check `root`"));
        let daemon = RedbStore::open(&dir.path().join("state.redb"), PATIENCE).unwrap();
        assert!(refused().await.contains("stop it first"));
        drop(daemon);
        assert!(Standalone::open_daemons(&config, &[]).await.unwrap().images.list().is_empty());
    }
}
