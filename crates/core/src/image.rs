//! What the rest of the system knows of an image: its config and its EROFS files.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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
