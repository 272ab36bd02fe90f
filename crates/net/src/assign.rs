//! The addresses that the cluster has assigned to this node's pods (CRI's UpdateRuntimeConfig).
//!
//! They are kept for the capability `ipRanges`. With a template they become the node's CNI configuration,
//! unless it has one from somebody else.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use a3s_box_core::network::Address;
use thiserror::Error;

use crate::cni::{ConfError, conf};
use crate::config::{NetConfig, NetMode};
use crate::pods::PodNetworking;
use crate::record;
use crate::template::{self, TemplateProblem, Values};

/// The file that a template becomes.
const FILE: &str = "10-a3s-box.conflist";
/// Beside the records: it must survive the daemon, because kubelet tells these addresses only once.
const ASSIGNED: &str = "pod-cidrs";

/// Why the addresses could not be put to use.
#[derive(Debug, Error)]
pub enum AssignError {
    /// The template cannot be read.
    #[error("cannot read network.conf_template {}; correct the setting or remove it", path.display())]
    Unreadable {
        /// The template.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The template is none.
    #[error("network.conf_template {}; correct the template", path.display())]
    Template {
        /// The template.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: TemplateProblem,
    },
    /// Filled it is no network configuration.
    #[error("network.conf_template {} with {ranges} is no CNI configuration; correct the template", path.display())]
    NoNetwork {
        /// The template.
        path: PathBuf,
        /// What it was filled with.
        ranges: String,
        /// What is wrong.
        #[source]
        source: Box<ConfError>,
    },
    /// The directory of configurations cannot be read.
    #[error(transparent)]
    Configuration(#[from] ConfError),
    /// A file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl PodNetworking {
    /// Puts the node's addresses to use, each time the cluster tells them.
    pub async fn assign_pod_cidrs(&self, cidrs: &[Address]) -> Result<(), AssignError> {
        let config = self.config.clone();
        let ranges: Vec<String> = cidrs.iter().map(Address::to_string).collect();
        let values = Values { routes: default_routes(cidrs), ranges };
        let path = config.cache_dir.join(ASSIGNED);
        let joined = tokio::task::spawn_blocking(move || assign(&config, &values)).await;
        joined.unwrap_or_else(|e| Err(AssignError::Write { path, source: io::Error::other(e) }))
    }
}

fn default_routes(cidrs: &[Address]) -> Vec<String> {
    let has = |family: fn(&IpAddr) -> bool| cidrs.iter().any(|cidr| family(&cidr.ip));
    let v4 = has(IpAddr::is_ipv4).then(|| "0.0.0.0/0".to_owned());
    v4.into_iter().chain(has(IpAddr::is_ipv6).then(|| "::/0".to_owned())).collect()
}

fn assign(config: &NetConfig, values: &Values) -> Result<(), AssignError> {
    write(&config.cache_dir, ASSIGNED, values.ranges.join("\n").as_bytes())?;
    let ranges = values.ranges.join(", ");
    let Some(path) = config.conf_template.as_ref().filter(|_| config.mode == NetMode::Cni) else {
        tracing::info!(%ranges, "the node's pod addresses are noted; its CNI configuration is left to others");
        return Ok(());
    };
    match conf::first(&config.conf_dir) {
        Ok(first) if first.file_name().is_none_or(|name| name != FILE) => {
            tracing::info!(%ranges, found = %first.display(), "the node has a CNI configuration: network.conf_template is not used");
            return Ok(());
        }
        Ok(_) | Err(ConfError::Missing { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let text =
        fs::read_to_string(path).map_err(|source| AssignError::Unreadable { path: path.clone(), source })?;
    let filled = template::fill(&text, values)
        .map_err(|source| AssignError::Template { path: path.clone(), source })?;
    conf::check(filled.as_bytes(), path).map_err(|source| AssignError::NoNetwork {
        path: path.clone(),
        ranges: ranges.clone(),
        source: Box::new(source),
    })?;
    write(&config.conf_dir, FILE, filled.as_bytes())?;
    tracing::info!(%ranges, file = %config.conf_dir.join(FILE).display(), "the CNI configuration was made from network.conf_template");
    Ok(())
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), AssignError> {
    let path = dir.join(name);
    let written = fs::create_dir_all(dir).and_then(|()| record::replace(&path, bytes));
    written.map_err(|source| AssignError::Write { path, source })
}

/// The ranges that were assigned last, if any were.
pub(crate) fn assigned(config: &NetConfig) -> Vec<String> {
    // Without them a plugin that wants ranges says so itself, in the words that its users know.
    let text = fs::read_to_string(config.cache_dir.join(ASSIGNED)).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use a3s_box_golden::Goldens;

    use super::*;

    /// Kubelet tells the addresses once; a build that could not read them would leave plugins without ranges.
    #[test]
    fn golden_addresses_of_the_node_are_read_and_written_alike() {
        const NAME: &str = "pod-cidrs.txt";
        let goldens = Goldens::of(env!("CARGO_MANIFEST_DIR"), "records");
        let ranges = vec!["10.1.2.0/24".to_owned(), "fd00:1:2::/64".to_owned()];
        let dir = tempfile::tempdir().unwrap();
        let config = NetConfig { cache_dir: dir.path().to_owned(), ..NetConfig::default() };
        assign(&config, &Values { ranges: ranges.clone(), routes: Vec::new() }).unwrap();
        goldens.check(NAME, &fs::read(dir.path().join(ASSIGNED)).unwrap());
        for golden in goldens.ages(NAME) {
            fs::write(dir.path().join(ASSIGNED), &golden.bytes).unwrap();
            assert_eq!(assigned(&config), ranges, "{}", golden.path.display());
        }
    }
}
