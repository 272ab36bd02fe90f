//! Finding and reading network configurations.
//!
//! The lexically first `.conf`, `.conflist` or `.json` file of the directory is the network of this node. If that
//! file is broken the node has no network: taking the next one instead would silently connect pods to
//! a network that nobody chose.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

const MAX_FILE: u64 = 1 << 20;

/// A version of the specification that we speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Version {
    /// 0.1.0, which is also what a configuration without a version is of.
    V0_1_0,
    /// 0.2.0
    V0_2_0,
    /// 0.3.0: lists of plugins; results with interfaces and any number of addresses.
    V0_3_0,
    /// 0.3.1
    V0_3_1,
    /// 0.4.0: `prevResult` for DEL, CHECK.
    V0_4_0,
    /// 1.0.0: no `version` in addresses of results.
    V1_0_0,
    /// 1.1.0: GC, STATUS.
    V1_1_0,
}

impl Version {
    const ALL: [(Version, &'static str); 7] = [
        (Version::V0_1_0, "0.1.0"),
        (Version::V0_2_0, "0.2.0"),
        (Version::V0_3_0, "0.3.0"),
        (Version::V0_3_1, "0.3.1"),
        (Version::V0_4_0, "0.4.0"),
        (Version::V1_0_0, "1.0.0"),
        (Version::V1_1_0, "1.1.0"),
    ];

    /// As it is written in `cniVersion`.
    pub fn as_str(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A version that we do not speak.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("CNI version {text:?} is not supported (0.1.0 to 1.1.0 are)")]
pub struct UnsupportedVersion {
    /// What was written.
    pub text: String,
}

impl FromStr for Version {
    type Err = UnsupportedVersion;

    fn from_str(text: &str) -> Result<Self, UnsupportedVersion> {
        let found = Self::ALL.iter().find(|(_, name)| *name == text);
        found
            .map(|(version, _)| *version)
            .ok_or_else(|| UnsupportedVersion { text: text.chars().take(40).collect() })
    }
}

impl TryFrom<String> for Version {
    type Error = UnsupportedVersion;

    fn try_from(text: String) -> Result<Self, UnsupportedVersion> {
        text.parse()
    }
}

impl From<Version> for String {
    fn from(version: Version) -> String {
        version.as_str().to_owned()
    }
}

/// Why a node has no usable network configuration.
#[derive(Debug, Error)]
pub enum ConfError {
    /// The directory cannot be listed, or a file not read.
    #[error("cannot read CNI configuration {}", path.display())]
    Read {
        /// Directory or file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is nothing in it.
    #[error("no CNI configuration in {}", dir.display())]
    Missing {
        /// The directory.
        dir: PathBuf,
    },
    /// The file is larger than a configuration can be.
    #[error("CNI configuration {} is larger than {MAX_FILE} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is not JSON.
    #[error("CNI configuration {} is not valid JSON", path.display())]
    NotJson {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// The file is JSON, but not a network configuration.
    #[error("CNI configuration {}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: ConfProblem,
    },
}

/// What is wrong with a file that is valid JSON.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfProblem {
    /// The top level, or a plugin, is no object.
    #[error("{what} must be an object")]
    NotAnObject {
        /// Which part.
        what: &'static str,
    },
    /// A list must have plugins.
    #[error("`plugins` must be a list with at least one plugin")]
    NoPlugins,
    /// A plugin without `type`, or with one that is no file name.
    #[error("`type` must name a plugin binary (found {found})")]
    BadType {
        /// What is there.
        found: String,
    },
    /// A network without `name`, or with one that the specification forbids.
    #[error(
        "`name` must start with a letter or digit and go on with letters, digits, `_`, `.` or `-` (found {found})"
    )]
    BadName {
        /// What is there.
        found: String,
    },
    /// `cniVersion` names a version that we do not speak.
    #[error(transparent)]
    Version(#[from] UnsupportedVersion),
}

/// One plugin of a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PluginConf {
    /// `type`: the name of its binary.
    pub kind: String,
    /// Its whole configuration as it was written.
    pub raw: Map<String, Value>,
}

impl PluginConf {
    /// Whether the plugin asked for the `runtimeConfig` key `name`.
    pub fn wants(&self, name: &str) -> bool {
        self.raw.get("capabilities").and_then(|c| c.get(name)).and_then(Value::as_bool).unwrap_or(false)
    }

    /// The names of the binaries that this plugin needs, as far as its configuration shows: itself and the IPAM plugin
    /// that it delegates to.
    pub fn binaries(&self) -> impl Iterator<Item = &str> {
        let ipam = self.raw.get("ipam").and_then(|ipam| ipam.get("type")).and_then(Value::as_str);
        std::iter::once(self.kind.as_str()).chain(ipam.filter(|name| !name.is_empty()))
    }
}

/// A network: plugins that are called one after the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NetworkList {
    /// The network's name.
    pub name: String,
    /// The version in which runtime and plugins talk.
    pub version: Version,
    /// `disableCheck`: its plugins are not to be asked for CHECK.
    #[serde(default)]
    pub disable_check: bool,
    /// `disableGC`: its plugins are not to be asked for GC.
    #[serde(default)]
    pub disable_gc: bool,
    /// In the order of ADD.
    pub plugins: Vec<PluginConf>,
    /// The file it comes from.
    pub source: PathBuf,
}

impl NetworkList {
    /// Whether any plugin asked for the `runtimeConfig` key `name`.
    pub fn wants(&self, name: &str) -> bool {
        self.plugins.iter().any(|plugin| plugin.wants(name))
    }

    /// The binaries of all plugins.
    pub fn binaries(&self) -> impl Iterator<Item = &str> {
        self.plugins.iter().flat_map(PluginConf::binaries)
    }
}

/// Reads the network of this node.
pub fn discover(dir: &Path) -> Result<NetworkList, ConfError> {
    load(&first(dir)?)
}

/// Where the network of this node is read from.
pub fn first(dir: &Path) -> Result<PathBuf, ConfError> {
    let first = files(dir, &["conf", "conflist", "json"])?.into_iter().next();
    first.ok_or_else(|| ConfError::Missing { dir: dir.to_owned() })
}

/// Whether a file with this text would be a network. `path` is for messages.
pub fn check(text: &[u8], path: &Path) -> Result<(), ConfError> {
    let network = parse(&object(text, path)?, path);
    network.map(drop).map_err(|problem| ConfError::Invalid { path: path.to_owned(), problem })
}

/// Reads one configuration file. A plain `.conf` is a list of one plugin; what a file is follows
/// from its content, whatever its name says.
pub fn load(path: &Path) -> Result<NetworkList, ConfError> {
    let top = read_object(path)?;
    let mut list =
        parse(&top, path).map_err(|problem| ConfError::Invalid { path: path.to_owned(), problem })?;
    if top.contains_key("plugins") && !flag(&top, "loadOnlyInlinedPlugins") {
        list.plugins.extend(loose_plugins(&list)?);
    }
    Ok(list)
}

fn parse(top: &Map<String, Value>, path: &Path) -> Result<NetworkList, ConfProblem> {
    let name = network_name(top)?;
    let version = version(top)?;
    let plugins = match top.get("plugins") {
        Some(Value::Array(items)) if !items.is_empty() => {
            items.iter().map(plugin).collect::<Result<Vec<_>, _>>()?
        }
        Some(_) => return Err(ConfProblem::NoPlugins),
        None => vec![plugin(&Value::Object(top.clone()))?],
    };
    let (disable_check, disable_gc) = (flag(top, "disableCheck"), flag(top, "disableGC"));
    Ok(NetworkList { name, version, disable_check, disable_gc, plugins, source: path.to_owned() })
}

/// Older configurations write their switches as texts.
fn flag(top: &Map<String, Value>, key: &str) -> bool {
    match top.get(key) {
        Some(Value::Bool(on)) => *on,
        Some(Value::String(text)) => text.eq_ignore_ascii_case("true"),
        _ => false,
    }
}

/// Specification 1.1: plugin files in a folder beside the list that is called as the network join it.
fn loose_plugins(list: &NetworkList) -> Result<Vec<PluginConf>, ConfError> {
    let Some(folder) = list.source.parent().map(|dir| dir.join(&list.name)) else { return Ok(Vec::new()) };
    let read = |path: PathBuf| {
        let conf = read_object(&path)?;
        plugin(&Value::Object(conf)).map_err(|problem| ConfError::Invalid { path, problem })
    };
    files(&folder, &["conf"])?.into_iter().map(read).collect()
}

fn plugin(value: &Value) -> Result<PluginConf, ConfProblem> {
    let raw = value.as_object().ok_or(ConfProblem::NotAnObject { what: "a plugin" })?;
    match raw.get("type") {
        Some(Value::String(kind)) if is_file_name(kind) => {
            Ok(PluginConf { kind: kind.clone(), raw: raw.clone() })
        }
        other => Err(ConfProblem::BadType { found: shown(other) }),
    }
}

fn is_file_name(text: &str) -> bool {
    !matches!(text, "" | "." | "..") && !text.contains(['/', '\0'])
}

fn network_name(top: &Map<String, Value>) -> Result<String, ConfProblem> {
    match top.get("name") {
        Some(Value::String(name)) if is_network_name(name) => Ok(name.clone()),
        other => Err(ConfProblem::BadName { found: shown(other) }),
    }
}

fn is_network_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// `cniVersion` and `cniVersions` (specification 1.1) are a set of choices: we take the highest that we speak. Without any the
/// configuration is from before there were versions.
fn version(top: &Map<String, Value>) -> Result<Version, ConfProblem> {
    let main = top.get("cniVersion").filter(|value| value.as_str() != Some(""));
    if main.is_none() && !top.contains_key("cniVersions") {
        return Ok(Version::V0_1_0);
    }
    let more = top.get("cniVersions").and_then(Value::as_array).into_iter().flatten();
    let spoken = main.into_iter().chain(more).filter_map(Value::as_str).filter_map(|text| text.parse().ok());
    spoken.max().ok_or_else(|| match main.and_then(Value::as_str) {
        Some(text) => UnsupportedVersion { text: text.chars().take(40).collect() }.into(),
        None => UnsupportedVersion { text: shown(main) }.into(),
    })
}

fn shown(value: Option<&Value>) -> String {
    value.map_or_else(|| "nothing".to_owned(), |v| v.to_string().chars().take(80).collect())
}

fn files(dir: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, ConfError> {
    let read_error = |source| ConfError::Read { path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(read_error)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(read_error)?.path();
        let fits = path.extension().and_then(|e| e.to_str()).is_some_and(|e| extensions.contains(&e));
        if fits && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn read_object(path: &Path) -> Result<Map<String, Value>, ConfError> {
    let read_error = |source| ConfError::Read { path: path.to_owned(), source };
    if fs::metadata(path).map_err(read_error)?.len() > MAX_FILE {
        return Err(ConfError::TooLarge { path: path.to_owned() });
    }
    object(&fs::read(path).map_err(read_error)?, path)
}

fn object(text: &[u8], path: &Path) -> Result<Map<String, Value>, ConfError> {
    let value = serde_json::from_slice(text)
        .map_err(|source| ConfError::NotJson { path: path.to_owned(), source })?;
    match value {
        Value::Object(map) => Ok(map),
        _ => {
            let problem = ConfProblem::NotAnObject { what: "the file" };
            Err(ConfError::Invalid { path: path.to_owned(), problem })
        }
    }
}
