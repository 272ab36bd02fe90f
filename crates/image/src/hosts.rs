//! Registry hosts as containerd's users configure them: `certs.d/HOST/hosts.toml`.
//!
//! For a registry `H:P` the first directory that exists decides, per certs.d directory:
//! `H_P_`, `H:P`, `_default`. In it, `hosts.toml` lists mirrors in the order of the file, then
//! `server`; a directory without that file may hold docker's `*.crt`, `*.cert` and `*.key`.
//! Facts: containerd `docs/hosts.md`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use toml::{Table, Value};

use crate::reference::DEFAULT_DOMAIN;

/// Where docker.io answers.
const DOCKER_HUB: &str = "registry-1.docker.io";

/// A hosts directory that cannot be used.
#[derive(Debug, Error)]
pub enum HostsError {
    /// A file could not be read.
    #[error("could not read {}", path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// `hosts.toml` is no TOML.
    #[error("{} is not TOML", path.display())]
    Toml {
        /// Which one.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A key has a value of the wrong kind.
    #[error("{}: {key} must be {expected}", path.display())]
    Key {
        /// Which file.
        path: PathBuf,
        /// The key with its table.
        key: String,
        /// What it must be.
        expected: &'static str,
    },
    /// A certificate or key cannot be used.
    #[error("{}: {problem}", path.display())]
    Certificate {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// One place to ask for a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    /// `http` or `https`.
    pub(crate) scheme: Scheme,
    /// `HOST[:PORT]`.
    pub(crate) authority: String,
    /// The root of the API, with a leading and without a trailing slash: `/v2`.
    pub(crate) path: String,
    /// May tell which digest a tag has.
    pub(crate) resolve: bool,
    /// May serve content by digest.
    pub(crate) pull: bool,
    pub(crate) tls: TlsFiles,
    /// Sent with every request to this host.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) connect_timeout: Option<Duration>,
    /// The registry's own name where this host is another one: sent as `ns`.
    pub(crate) namespace: Option<String>,
    /// The host before it, asked another way: only of use where that one did not understand us.
    pub(crate) second_scheme: bool,
}

/// How a host is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    Http,
    Https,
}

impl Scheme {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

/// What a host wants of TLS.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct TlsFiles {
    /// Certificate authorities beside the system's.
    pub(crate) ca: Vec<PathBuf>,
    /// Client certificates with their keys; a file without a key holds both.
    pub(crate) client: Vec<(PathBuf, Option<PathBuf>)>,
    /// Takes any certificate.
    pub(crate) skip_verify: bool,
}

impl Host {
    fn new(scheme: Scheme, authority: &str) -> Self {
        let authority = if authority == DEFAULT_DOMAIN { DOCKER_HUB } else { authority };
        Self {
            scheme,
            authority: authority.to_owned(),
            path: "/v2".to_owned(),
            resolve: true,
            pull: true,
            tls: TlsFiles::default(),
            headers: Vec::new(),
            connect_timeout: None,
            namespace: None,
            second_scheme: false,
        }
    }

    /// `scheme://authority`.
    pub(crate) fn origin(&self) -> String {
        format!("{}://{}", self.scheme.as_str(), self.authority)
    }
}

/// The hosts to ask for a registry, in order; never empty. Blocks on the disk.
pub(crate) fn hosts_for(domain: &str, certs_dirs: &[PathBuf]) -> Result<Vec<Host>, HostsError> {
    for root in certs_dirs {
        for name in directory_names(domain) {
            let directory = root.join(name);
            if !directory.is_dir() {
                continue;
            }
            let file = directory.join("hosts.toml");
            return match std::fs::read_to_string(&file) {
                Ok(text) => parse(&text, &file, domain),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    let mut hosts = default_hosts(domain);
                    let tls = docker_certificates(&directory)?;
                    if tls != TlsFiles::default() {
                        hosts.retain(|host| host.scheme == Scheme::Https);
                    }
                    hosts.iter_mut().for_each(|host| host.tls = tls.clone());
                    Ok(hosts)
                }
                Err(source) => Err(HostsError::Read { path: file, source }),
            };
        }
    }
    Ok(default_hosts(domain))
}

/// The directories that may configure a registry, the most special first.
fn directory_names(domain: &str) -> Vec<String> {
    let mut names = Vec::with_capacity(3);
    if let Some((host, port)) = domain.rsplit_once(':') {
        names.push(format!("{host}_{port}_"));
    }
    names.push(domain.to_owned());
    names.push("_default".to_owned());
    names
}

/// Without configuration: TLS, but plain HTTP first where the registry is this machine.
fn default_hosts(domain: &str) -> Vec<Host> {
    let secure = Host::new(Scheme::Https, domain);
    if !is_loopback(domain) {
        return vec![secure];
    }
    let mut unverified = secure;
    unverified.tls.skip_verify = true;
    unverified.second_scheme = true;
    vec![Host::new(Scheme::Http, domain), unverified]
}

/// Whether `HOST[:PORT]` is this machine.
pub(crate) fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => authority.split(':').next().unwrap_or(authority),
    };
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Docker's convention: `*.crt` are authorities, `*.cert` client certificates with `*.key` beside.
fn docker_certificates(directory: &Path) -> Result<TlsFiles, HostsError> {
    let read = |source| HostsError::Read { path: directory.to_owned(), source };
    let mut tls = TlsFiles::default();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(read)? {
        files.push(entry.map_err(read)?.path());
    }
    files.sort();
    for file in files {
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => tls.ca.push(file),
            Some("cert") => {
                let key = file.with_extension("key");
                if !key.exists() {
                    let problem = format!("its key {} is missing", key.display());
                    return Err(HostsError::Certificate { path: file, problem });
                }
                tls.client.push((file, Some(key)));
            }
            Some(_) | None => {}
        }
    }
    Ok(tls)
}

/// A table of `hosts.toml` and where it is, for messages and relative paths.
struct Section<'a> {
    table: &'a Table,
    file: &'a Path,
    name: String,
}

pub(crate) fn parse(text: &str, file: &Path, domain: &str) -> Result<Vec<Host>, HostsError> {
    let table: Table = text
        .parse()
        .map_err(|source| HostsError::Toml { path: file.to_owned(), source: Box::new(source) })?;
    let root = Section { table: &table, file, name: String::new() };
    let mut hosts = Vec::new();
    if let Some(mirrors) = table.get("host") {
        let mirrors = mirrors.as_table().ok_or_else(|| root.wrong("host", "a table of tables"))?;
        for (url, section) in mirrors {
            let table = section.as_table().ok_or_else(|| root.wrong(url, "a table"))?;
            let section = Section { table, file, name: format!("host.{url:?}") };
            hosts.push(section.host(url, domain)?);
        }
    }
    // What stands at the top describes the server; containerd asks it after all mirrors.
    match root.string("server")? {
        Some(server) => hosts.push(root.host(&server, domain)?),
        None => {
            for mut host in default_hosts(domain) {
                root.configure(&mut host)?;
                hosts.push(host);
            }
        }
    }
    Ok(hosts)
}

impl Section<'_> {
    fn wrong(&self, key: &str, expected: &'static str) -> HostsError {
        let key = if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) };
        HostsError::Key { path: self.file.to_owned(), key, expected }
    }

    fn string(&self, key: &str) -> Result<Option<String>, HostsError> {
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(self.wrong(key, "a string")),
        }
    }

    fn boolean(&self, key: &str) -> Result<bool, HostsError> {
        match self.table.get(key) {
            None => Ok(false),
            Some(Value::Boolean(flag)) => Ok(*flag),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    /// A string or a list of strings.
    fn strings(&self, key: &str) -> Result<Vec<String>, HostsError> {
        let wrong = || self.wrong(key, "a string or a list of strings");
        match self.table.get(key) {
            None => Ok(Vec::new()),
            Some(value) => strings(value).ok_or_else(wrong),
        }
    }

    /// A path, relative to the file's directory.
    fn path(&self, text: &str) -> PathBuf {
        self.file.parent().unwrap_or(Path::new("/")).join(text)
    }

    fn host(&self, url: &str, domain: &str) -> Result<Host, HostsError> {
        let wrong = || self.wrong("server", "a URL: [http[s]://]HOST[:PORT][/PATH]");
        let (scheme, rest) = match url.split_once("://") {
            Some(("https", rest)) => (Scheme::Https, rest),
            Some(("http", rest)) => (Scheme::Http, rest),
            Some(_) => return Err(wrong()),
            None => (if is_loopback(url) { Scheme::Http } else { Scheme::Https }, url),
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        if authority.is_empty() || authority.contains('@') {
            return Err(wrong());
        }
        let mut host = Host::new(scheme, authority);
        let path = path.trim_matches('/');
        host.path = match (self.boolean("override_path")?, path) {
            (true, "") => String::new(),
            (true, path) => format!("/{path}"),
            (false, "" | "v2") => "/v2".to_owned(),
            (false, path) if path.ends_with("/v2") => format!("/{path}"),
            (false, path) => format!("/{path}/v2"),
        };
        let upstream = if domain == DEFAULT_DOMAIN { DOCKER_HUB } else { domain };
        host.namespace = (host.authority != upstream).then(|| domain.to_owned());
        self.configure(&mut host)?;
        Ok(host)
    }

    fn configure(&self, host: &mut Host) -> Result<(), HostsError> {
        if self.table.contains_key("capabilities") {
            (host.resolve, host.pull) = (false, false);
            for capability in self.strings("capabilities")? {
                match capability.as_str() {
                    "resolve" => host.resolve = true,
                    "pull" => host.pull = true,
                    "push" => {}
                    _ => return Err(self.wrong("capabilities", "a list of pull, resolve and push")),
                }
            }
        }
        host.tls.ca.extend(self.strings("ca")?.iter().map(|text| self.path(text)));
        host.tls.client = self.client()?;
        host.tls.skip_verify |= self.boolean("skip_verify")?;
        if let Some(text) = self.string("dial_timeout")? {
            let timeout =
                duration(&text).ok_or_else(|| self.wrong("dial_timeout", "a duration such as \"5s\""))?;
            host.connect_timeout = Some(timeout);
        }
        if let Some(headers) = self.table.get("header") {
            let headers = headers.as_table().ok_or_else(|| self.wrong("header", "a table"))?;
            for (name, value) in headers {
                let values =
                    strings(value).ok_or_else(|| self.wrong("header", "strings or lists of strings"))?;
                host.headers.extend(values.into_iter().map(|value| (name.clone(), value)));
            }
        }
        Ok(())
    }

    /// `"both.pem"`, `["a.pem", …]` or `[["cert.pem", "key.pem"], …]`.
    fn client(&self) -> Result<Vec<(PathBuf, Option<PathBuf>)>, HostsError> {
        let wrong = || self.wrong("client", "a path, a list of paths, or a list of [certificate, key]");
        let files = match self.table.get("client") {
            None => return Ok(Vec::new()),
            Some(Value::String(file)) => return Ok(vec![(self.path(file), None)]),
            Some(Value::Array(files)) => files,
            Some(_) => return Err(wrong()),
        };
        files
            .iter()
            .map(|file| match strings(file).ok_or_else(wrong)?.as_slice() {
                [both] => Ok((self.path(both), None)),
                [certificate, key] if key.is_empty() => Ok((self.path(certificate), None)),
                [certificate, key] => Ok((self.path(certificate), Some(self.path(key)))),
                _ => Err(wrong()),
            })
            .collect()
    }
}

fn strings(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(items) => items.iter().map(|item| item.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

/// Go's notation, as far as it makes sense here: a number with `ms`, `s`, `m` or `h`.
fn duration(text: &str) -> Option<Duration> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
    let number: f64 = text[..digits].parse().ok()?;
    let unit = match &text[digits..] {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number * unit).ok()
}

#[cfg(test)]
mod tests;
