//! What the services must be told about the node.

use std::collections::BTreeMap;
use std::path::PathBuf;

use a3s_box_core::egress::Cidr;

use crate::convert::resources::SizePolicy;

/// How kubelet names cgroups; it asks once, at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CgroupDriver {
    /// `kubepods-burstable-pod….slice`.
    Systemd,
    /// `/kubepods/burstable/pod…`.
    #[default]
    Cgroupfs,
}

/// One of the conditions that Status reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// It holds.
    pub ready: bool,
    /// One word, empty when it holds.
    pub reason: String,
    /// For people, empty when it holds.
    pub message: String,
}

impl Condition {
    /// A condition that holds.
    pub fn met() -> Self {
        Self { ready: true, reason: String::new(), message: String::new() }
    }
}

/// Settings of a [`crate::CriService`].
#[derive(Debug, Clone)]
pub struct CriSettings {
    /// Semantic version of the runtime, for Version.
    pub runtime_version: String,
    /// Names a RuntimeClass may use besides the empty one.
    pub runtime_handlers: Vec<String>,
    /// How kubelet is to name cgroups.
    pub cgroup_driver: CgroupDriver,
    /// How boxes are sized.
    pub size: SizePolicy,
    /// What `cluster` means in egress policies.
    pub cluster_cidrs: Vec<Cidr>,
    /// Whether boxes can be started at all: the condition RuntimeReady.
    pub runtime_condition: Condition,
    /// The folder of the scratch disks, for ImageFsInfo.
    pub scratch_dir: PathBuf,
    /// Shown by `crictl info`: each value is a JSON document.
    pub info: BTreeMap<String, String>,
}
