//! Running all plugins of a network.
//!
//! | command | order    | `prevResult`            | after an error | specification from |
//! |---------|----------|-------------------------|----------------|--------------------|
//! | ADD     | forward  | of the plugin before    | ends           | 0.1.0              |
//! | DEL     | backward | of the last ADD         | goes on        | 0.1.0              |
//! | CHECK   | forward  | of the last ADD         | ends           | 0.4.0              |
//! | STATUS  | forward  | none                    | ends           | 1.1.0              |
//! | GC      | forward  | none                    | goes on        | 1.1.0              |

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use thiserror::Error;
use tracing::Instrument;

use super::conf::{NetworkList, PluginConf, Version};
use super::exec::{Command, Invocation, Output, PluginError, find};
use super::request::Attachment;
use super::result::CniResult;

/// Why a pod could not be connected.
#[derive(Debug, Error)]
pub enum AddError {
    /// A plugin failed.
    #[error("network {network:?} cannot connect the pod")]
    Plugin {
        /// The network's name.
        network: String,
        /// Which, and its words.
        source: Box<PluginError>,
    },
    /// All succeeded, and the pod has no address.
    #[error(
        "network {network:?}: its plugins succeeded but gave the pod no IP address (the last was {plugin:?}; does the configuration name an IPAM plugin?)"
    )]
    NoAddress {
        /// The network's name.
        network: String,
        /// The last plugin's `type`.
        plugin: String,
    },
}

/// A pod's connection that GC must leave alone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct ValidAttachment {
    /// `CNI_CONTAINERID` of its ADD.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// `CNI_IFNAME` of its ADD.
    #[serde(rename = "ifname")]
    pub interface: String,
}

/// A plugin's answer to VERSION.
#[derive(Deserialize)]
struct Spoken {
    #[serde(rename = "supportedVersions")]
    supported_versions: Vec<String>,
}

/// A network and how its plugins are run.
#[derive(Debug, Clone, Copy)]
pub struct Chain<'a> {
    /// The network.
    pub list: &'a NetworkList,
    /// Where plugins are.
    pub bin_dirs: &'a [PathBuf],
    /// How long each may take.
    pub limit: Duration,
}

impl Chain<'_> {
    /// Connects. On failure the caller owes a [`Chain::del`]: the plugins that succeeded, and the one that failed
    /// half-way, hold things.
    pub async fn add(&self, attachment: &Attachment) -> Result<CniResult, AddError> {
        let network = || self.list.name.clone();
        let mut previous: Option<CniResult> = None;
        for plugin in &self.list.plugins {
            let prev = previous.as_ref().map(|r| r.for_next(self.list.version));
            let output = self.call(Command::Add, plugin, attachment, Some(&attachment.netns), prev).await;
            let result = output.and_then(|output| read(plugin, output));
            previous =
                Some(result.map_err(|e| AddError::Plugin { network: network(), source: Box::new(e) })?);
        }
        match previous {
            Some(result) if !result.ips.is_empty() => Ok(result),
            _ => {
                let plugin = self.list.plugins.last().map(|p| p.kind.clone()).unwrap_or_default();
                Err(AddError::NoAddress { network: network(), plugin })
            }
        }
    }

    /// Disconnects. Every plugin gets its turn, whatever the others did; the errors are returned.
    ///
    /// `netns` is `None` once the namespace is gone: plugins then release what is not in it. `result` is that of
    /// ADD, where there is one.
    pub async fn del(
        &self,
        attachment: &Attachment,
        netns: Option<&Path>,
        result: Option<&Value>,
    ) -> Vec<PluginError> {
        // Before 0.4.0 DEL knows no prevResult.
        let prev = result.filter(|_| self.list.version >= Version::V0_4_0);
        let mut errors = Vec::new();
        for plugin in self.list.plugins.iter().rev() {
            if let Err(error) = self.call(Command::Del, plugin, attachment, netns, prev.cloned()).await {
                errors.push(error);
            }
        }
        errors
    }

    /// Whether the network can be asked for CHECK.
    pub fn knows_check(&self) -> bool {
        self.list.version >= Version::V0_4_0 && !self.list.disable_check
    }

    /// Asks whether a pod is still connected as `result`, its ADD's, says. Only if [`Chain::knows_check`].
    pub async fn check(&self, attachment: &Attachment, result: &Value) -> Result<(), PluginError> {
        for plugin in &self.list.plugins {
            if !self.checks_truly(plugin).await {
                tracing::debug!(plugin = plugin.kind, "its CHECK proves nothing and is left out");
                continue;
            }
            let netns = Some(attachment.netns.as_path());
            self.call(Command::Check, plugin, attachment, netns, Some(result.clone())).await?;
        }
        Ok(())
    }

    /// Whether a plugin's CHECK can be believed. portmap's up to 1.1.1, which Debian 12 and 13 have, looks for rules of IPv6 that
    /// its ADD had no reason to make, and fails for every pod with a published port. Those that speak 1.1.0 are mended;
    /// nothing else tells them apart.
    async fn checks_truly(&self, plugin: &PluginConf) -> bool {
        const SUSPECT: &str = "portmap";
        if plugin.kind != SUSPECT {
            return true;
        }
        let conf = Map::from_iter([("cniVersion".to_owned(), self.list.version.as_str().into())]);
        let answer = self.run(Command::Version, plugin, Vec::new(), conf).await;
        let spoken = answer.ok().and_then(|answer| serde_json::from_slice::<Spoken>(&answer.stdout).ok());
        spoken.is_some_and(|spoken| spoken.supported_versions.iter().any(|v| v == Version::V1_1_0.as_str()))
    }

    /// Whether the network can be asked for STATUS.
    pub fn knows_status(&self) -> bool {
        self.list.version >= Version::V1_1_0
    }

    /// Asks whether a pod could be connected. Only if [`Chain::knows_status`].
    pub async fn status(&self) -> Result<(), PluginError> {
        for plugin in &self.list.plugins {
            self.run(Command::Status, plugin, Vec::new(), self.conf(plugin)).await?;
        }
        Ok(())
    }

    /// Whether the network can be asked for GC.
    pub fn knows_gc(&self) -> bool {
        self.list.version >= Version::V1_1_0 && !self.list.disable_gc
    }

    /// Has every plugin release what belongs to none of `valid`; the errors are returned. Only if
    /// [`Chain::knows_gc`], and while no ADD or DEL runs.
    pub async fn gc(&self, valid: &[ValidAttachment]) -> Vec<PluginError> {
        let mut errors = Vec::new();
        for plugin in &self.list.plugins {
            let mut conf = self.conf(plugin);
            conf.insert("cni.dev/valid-attachments".to_owned(), json!(valid));
            // Plugins made with libcni 1.2.0 to 1.2.2 look here, and take a missing list for an empty one.
            conf.insert("cni.dev/attachments".to_owned(), json!(valid));
            errors.extend(self.run(Command::Gc, plugin, Vec::new(), conf).await.err());
        }
        errors
    }

    async fn call(
        &self,
        command: Command,
        plugin: &PluginConf,
        attachment: &Attachment,
        netns: Option<&Path>,
        prev: Option<Value>,
    ) -> Result<Output, PluginError> {
        let env = vec![
            ("CNI_CONTAINERID", attachment.container_id.clone().into()),
            ("CNI_NETNS", netns.map(OsString::from).unwrap_or_default()),
            ("CNI_IFNAME", attachment.interface.clone().into()),
            ("CNI_ARGS", attachment.args.clone().into()),
        ];
        let span = tracing::debug_span!("attachment", container = attachment.container_id);
        self.run(command, plugin, env, self.attachment_conf(plugin, attachment, prev)).instrument(span).await
    }

    async fn run(
        &self,
        command: Command,
        plugin: &PluginConf,
        mut env: Vec<(&'static str, OsString)>,
        conf: Map<String, Value>,
    ) -> Result<Output, PluginError> {
        let binary = find(&plugin.kind, self.bin_dirs)?;
        let started = std::time::Instant::now();
        env.push(("CNI_PATH", self.path()));
        let invocation = Invocation {
            plugin: &plugin.kind,
            binary: &binary,
            command,
            env,
            stdin: Value::Object(conf).to_string().into_bytes(),
            limit: self.limit,
        };
        let outcome = invocation.run().await;
        let (ok, took) = (outcome.is_ok(), started.elapsed());
        tracing::debug!(plugin = plugin.kind, %command, ok, ?took, "CNI plugin ran");
        outcome
    }

    fn path(&self) -> OsString {
        let mut path = OsString::new();
        for (i, dir) in self.bin_dirs.iter().enumerate() {
            if i > 0 {
                path.push(":");
            }
            path.push(dir);
        }
        path
    }

    /// What every command gets of a plugin's configuration.
    fn conf(&self, plugin: &PluginConf) -> Map<String, Value> {
        let mut conf = plugin.raw.clone();
        conf.insert("name".to_owned(), self.list.name.clone().into());
        conf.insert("cniVersion".to_owned(), self.list.version.as_str().into());
        conf
    }

    fn attachment_conf(
        &self,
        plugin: &PluginConf,
        attachment: &Attachment,
        prev: Option<Value>,
    ) -> Map<String, Value> {
        let mut conf = self.conf(plugin);
        let wanted: Map<String, Value> = attachment
            .capabilities
            .iter()
            .filter(|(key, _)| plugin.wants(key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        if !wanted.is_empty() {
            conf.insert("runtimeConfig".to_owned(), Value::Object(wanted));
        }
        if let Some(prev) = prev {
            conf.insert("prevResult".to_owned(), prev);
        }
        conf
    }
}

fn read(plugin: &PluginConf, output: Output) -> Result<CniResult, PluginError> {
    CniResult::parse(&output.stdout).map_err(|source| PluginError::BadAnswer {
        plugin: plugin.kind.clone(),
        command: Command::Add,
        answer: String::from_utf8_lossy(&output.stdout).chars().take(200).collect(),
        said: output.said,
        source,
    })
}
