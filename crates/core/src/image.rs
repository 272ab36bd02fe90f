//! What the rest of the system knows of an image: its config and its EROFS files.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// No real image declares as many volumes; a hostile one could let every container copy without end.
pub const MAX_VOLUMES: usize = 64;

/// An image with more volumes than a container gets.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the image declares {count} volumes, more than the limit of {MAX_VOLUMES}: build it with fewer")]
pub struct TooManyVolumes {
    /// How many.
    pub count: usize,
}

impl ImageConfig {
    /// The paths of `volumes` in their normal form: absolute, without `.`, `..` and doubled slashes, each once. What
    /// is not absolute counts from the root. The root itself is no volume, and left out.
    ///
    /// # Errors
    /// There are more than [`MAX_VOLUMES`].
    pub fn volume_paths(&self) -> Result<Vec<String>, TooManyVolumes> {
        let mut paths = std::collections::BTreeSet::new();
        for volume in &self.volumes {
            let mut names = Vec::new();
            for name in volume.split('/') {
                match name {
                    "" | "." => {}
                    ".." => drop(names.pop()),
                    name => names.push(name),
                }
            }
            if !names.is_empty() {
                paths.insert(format!("/{}", names.join("/")));
            }
        }
        match paths.len() {
            0..=MAX_VOLUMES => Ok(paths.into_iter().collect()),
            count => Err(TooManyVolumes { count }),
        }
    }
}

/// The parts of an OCI image config that decide how a session runs
/// (OCI image-spec, "Image Configuration", object `config`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Env`, each `NAME=value`.
    pub env: Vec<String>,
    /// `WorkingDir`; empty means `/`.
    pub working_dir: String,
    /// `User`: `""`, `name`, `uid`, `name:group`, `uid:gid`, …
    pub user: String,
    /// `StopSignal`: `SIGTERM`, `TERM` or a number; empty means SIGTERM.
    pub stop_signal: String,
    /// `Labels`.
    pub labels: std::collections::BTreeMap<String, String>,
    /// `Volumes`: paths that the image declares.
    pub volumes: Vec<String>,
    /// `ExposedPorts`, each `port/proto`.
    pub exposed_ports: Vec<String>,
}

/// One layer, ready to be mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// The digest of the uncompressed tar, `sha256:…` (a `diff_id` of the image config).
    pub diff_id: String,
    /// The EROFS file made of it.
    pub erofs: PathBuf,
}

/// An image that is complete on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedImage {
    /// The image id: the digest of its config, `sha256:…`.
    pub id: String,
    /// `NAME@sha256:…` of the manifest it was pulled by, or the id where there is none.
    pub digest_ref: String,
    /// How sessions of it run.
    pub config: ImageConfig,
    /// Its layers, lowest first. Empty layers may be left out; the list itself may be empty.
    pub layers: Vec<Layer>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(volumes: &[&str]) -> Result<Vec<String>, TooManyVolumes> {
        let volumes = volumes.iter().map(|path| (*path).to_owned()).collect();
        ImageConfig { volumes, ..ImageConfig::default() }.volume_paths()
    }

    #[test]
    fn volumes_lie_inside_the_root_whatever_the_image_says() {
        let shown =
            paths(&["/data/", "data", "//data/./x", "/a/../../b", "../../../c", "/", "", "..", "/x/.."]);
        assert_eq!(shown.unwrap(), ["/b", "/c", "/data", "/data/x"]);
    }

    #[test]
    fn volumes_without_end_are_refused() {
        let many: Vec<String> = (0..=MAX_VOLUMES).map(|index| format!("/{index}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(paths(&many), Err(TooManyVolumes { count: MAX_VOLUMES + 1 }));
        assert_eq!(paths(&many[1..]).unwrap().len(), MAX_VOLUMES);
    }
}
