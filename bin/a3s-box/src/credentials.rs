//! Credentials for registries: typed in over stdin, or those that `docker login` kept.
//!
//! Secrets come from files, helpers and stdin only, never from the command line or the environment, and go nowhere
//! but into a [`RegistryAuth`], whose `Debug` shows nothing. Facts: docker's "docker login" reference and the README
//! of docker-credential-helpers.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use a3s_box_core::foreign;
use a3s_box_image::RegistryAuth;
use a3s_box_image::reference::{DEFAULT_DOMAIN, Reference, RegistryReference};

use crate::cli::LoginArgs;

/// No real config is this large.
const MAX_CONFIG: u64 = 1 << 20;
/// Passwords and tokens of real services are below this.
const MAX_SECRET: u64 = 64 << 10;
/// A helper may have to ask a service.
const HELPER_LIMIT: Duration = Duration::from_secs(30);
/// How docker's configuration names Docker Hub.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";
/// What helpers answer where they know nothing; part of their protocol.
const NOT_FOUND: &str = "credentials not found in native keychain";
/// The user name that says that the secret is an identity token.
const TOKEN_USER: &str = "<token>";

/// Where credentials come from.
pub(crate) enum Login {
    /// What the user said for this one call.
    Told { username: String, password: String },
    /// What docker's configuration has.
    Kept { file: Option<PathBuf>, must_exist: bool, helpers: OsString },
}

impl Login {
    /// As the command line and the environment say. Reads stdin where the user said so.
    pub(crate) fn new(args: &LoginArgs) -> anyhow::Result<Self> {
        if let Some(username) = &args.username {
            return Ok(Self::Told { username: username.clone(), password: password_from_stdin()? });
        }
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder = variable("DOCKER_CONFIG").or_else(|| Some(variable("HOME")?.join(".docker")));
        Ok(Self::Kept {
            must_exist: args.authfile.is_some(),
            file: args.authfile.clone().or_else(|| Some(folder?.join("config.json"))),
            helpers: std::env::var_os("PATH").unwrap_or_default(),
        })
    }

    /// The credentials for an image, if there are any. They name its registry, so that they go to no other one.
    pub(crate) async fn for_image(&self, name: &str) -> anyhow::Result<Option<RegistryAuth>> {
        let Ok(Reference::Registry(reference)) = name.parse() else { return Ok(None) };
        let found = match self {
            Self::Told { username, password } => Some(RegistryAuth {
                username: username.clone(),
                password: password.clone(),
                ..RegistryAuth::default()
            }),
            Self::Kept { file: None, .. } => None,
            Self::Kept { file: Some(file), must_exist, helpers } => {
                let config = match read_config(file) {
                    Ok(config) => config,
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_exist => {
                        return Ok(None);
                    }
                    Err(error) => return Err(error).context(format!("could not read {}", file.display())),
                };
                // What the parser says could quote what it stands at.
                let Ok(config) = serde_json::from_slice::<DockerConfig>(&config) else {
                    bail!("{} is not a docker configuration: log in again", file.display());
                };
                config.credentials(&reference, helpers).await?
            }
        };
        Ok(found.map(|auth| RegistryAuth { server_address: reference.domain().to_owned(), ..auth }))
    }
}

fn password_from_stdin() -> anyhow::Result<String> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        bail!("--password-stdin reads the password from a pipe or file, and stdin is a terminal");
    }
    password(stdin.lock())
}

/// The password with at most one line end behind it.
fn password(input: impl Read) -> anyhow::Result<String> {
    let mut text = String::new();
    // The error of bytes that are no text does not show them.
    input.take(MAX_SECRET + 1).read_to_string(&mut text).context("could not read the password from stdin")?;
    let password = text.strip_suffix('\n').unwrap_or(&text);
    let password = password.strip_suffix('\r').unwrap_or(password);
    if password.is_empty() || text.len() as u64 > MAX_SECRET {
        bail!("--password-stdin found no password of at most {MAX_SECRET} bytes on stdin");
    }
    Ok(password.to_owned())
}

fn read_config(file: &PathBuf) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(file)?.take(MAX_CONFIG).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// `config.json`, as far as it is about credentials. It has no `Debug`: it holds secrets.
#[derive(Deserialize, Default)]
struct DockerConfig {
    #[serde(default, deserialize_with = "foreign::map")]
    auths: HashMap<String, Entry>,
    #[serde(default, rename = "credsStore", deserialize_with = "foreign::or_default")]
    store: String,
    #[serde(default, rename = "credHelpers", deserialize_with = "foreign::map")]
    helpers: HashMap<String, String>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(default)]
struct Entry {
    #[serde(deserialize_with = "foreign::or_default")]
    auth: String,
    #[serde(deserialize_with = "foreign::or_default")]
    username: String,
    #[serde(deserialize_with = "foreign::or_default")]
    password: String,
    #[serde(deserialize_with = "foreign::or_default")]
    identitytoken: String,
    #[serde(deserialize_with = "foreign::or_default")]
    registrytoken: String,
}

/// What a helper answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

impl DockerConfig {
    /// What is known for a repository: a helper for its registry, or for all, is asked before the file.
    async fn credentials(
        &self,
        reference: &RegistryReference,
        path: &OsString,
    ) -> anyhow::Result<Option<RegistryAuth>> {
        let domain = reference.domain();
        let special = self.helpers.iter().find(|(key, _)| canonical(key) == domain).map(|(_, helper)| helper);
        let helper = special.unwrap_or(&self.store);
        if !helper.is_empty()
            && let Some(auth) = ask(helper, domain, path).await?
        {
            return Ok(Some(auth));
        }
        // The longest key that leads to the repository, as podman's users write them; docker's are hosts.
        let repository = format!("{domain}/{}", reference.path());
        let entries = self.auths.iter().map(|(key, entry)| (canonical(key), entry));
        let fits = |key: &str| {
            repository.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let found = entries.filter(|(key, _)| fits(key)).max_by_key(|(key, _)| key.len());
        let found = found.map(|(_, entry)| entry.clone()).filter(Entry::holds_something);
        Ok(found.map(|entry| RegistryAuth {
            username: entry.username,
            password: entry.password,
            auth: entry.auth,
            identity_token: entry.identitytoken,
            registry_token: entry.registrytoken,
            ..RegistryAuth::default()
        }))
    }
}

impl Entry {
    /// Docker leaves empty entries where a helper has the secret.
    fn holds_something(&self) -> bool {
        [&self.auth, &self.username, &self.identitytoken, &self.registrytoken]
            .iter()
            .any(|text| !text.is_empty())
    }
}

/// A key of the configuration as `HOST[:PORT][/PATH]`: they are written as hosts and as URLs of both APIs.
fn canonical(key: &str) -> String {
    let key = key.split_once("://").map_or(key, |(_, rest)| rest).trim_end_matches('/');
    let key = key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key);
    let (host, path) = key.split_once('/').map_or((key, None), |(host, path)| (host, Some(path)));
    let host = match host {
        "index.docker.io" | "registry-1.docker.io" => DEFAULT_DOMAIN.to_owned(),
        other => other.to_ascii_lowercase(),
    };
    path.map_or(host.clone(), |path| format!("{host}/{path}"))
}

/// Asks `docker-credential-NAME` for a registry. The helper is the user's own program; it is bounded all the same.
async fn ask(name: &str, domain: &str, path: &OsString) -> anyhow::Result<Option<RegistryAuth>> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !name.chars().all(plain) {
        bail!("docker's configuration names the credential helper {name:?}, which is no program's name");
    }
    let program = format!("docker-credential-{name}");
    let server = if domain == DEFAULT_DOMAIN { DOCKER_HUB } else { domain };
    let mut helper = Command::new(&program)
        .arg("get")
        .env("PATH", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("could not start {program}, which docker's configuration names"))?;
    let (stdin, stdout) = (helper.stdin.take(), helper.stdout.take());
    let conversation = async {
        if let Some(mut stdin) = stdin {
            // A helper that does not listen answers all the same, or fails and says why.
            let _ = stdin.write_all(server.as_bytes()).await;
        }
        let answer = bounded(stdout).await?;
        std::io::Result::Ok((answer, helper.wait().await?))
    };
    let (answer, status) = tokio::time::timeout(HELPER_LIMIT, conversation)
        .await
        .with_context(|| format!("{program} did not answer within {} s", HELPER_LIMIT.as_secs()))?
        .with_context(|| format!("could not talk to {program}"))?;
    if !status.success() {
        // Helpers tell failures on stdout. Only a success may hold a secret, but who knows.
        let told = String::from_utf8_lossy(&answer);
        if told.trim() == NOT_FOUND {
            return Ok(None);
        }
        bail!("{program} has no credentials for {server}: it failed with {status}; try it by hand");
    }
    let Ok(Answer { username, secret }) = serde_json::from_slice(&answer) else {
        bail!("{program} gave no credentials that can be read; try it by hand");
    };
    Ok(Some(match username.as_str() {
        TOKEN_USER => RegistryAuth { identity_token: secret, ..RegistryAuth::default() },
        _ => RegistryAuth { username, password: secret, ..RegistryAuth::default() },
    }))
}

async fn bounded(stream: Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        stream.take(MAX_SECRET).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
