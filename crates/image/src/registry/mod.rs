//! A client for one repository (OCI distribution-spec, "Pull").
//!
//! Hosts are asked in the order of hosts.toml; the next one is asked when one does not serve
//! what is wanted. A request to one host goes through [`Endpoint::get`], which follows redirects,
//! answers a challenge (with credentials to that host only), and repeats what the registry says is
//! temporary. Everything is bounded:
//! connections, response headers, silence, and whole transfers by the slowest acceptable rate.

mod auth;
mod blob;
mod endpoint;
mod error;
mod push;
mod tls;

use crate::auth::RegistryAuth;
use crate::config::{Retries, Timeouts};
use crate::digest::Digest;
use crate::hosts::{Host, HostsError};
use crate::manifest::ACCEPT;
use crate::reference::{RegistryReference, Version};

pub(crate) use self::blob::BlobSink;
use self::endpoint::{Answer, Endpoint, Want, announced};
pub use self::error::RegistryError;
pub(crate) use self::push::Destination;

/// A repository on its hosts.
pub(crate) struct Repository {
    /// In the order of asking; the registry itself is the last.
    endpoints: Vec<Endpoint>,
    /// The path below the API's root.
    path: String,
    timeouts: Timeouts,
    retries: Retries,
}

/// A document, its digest computed from its bytes.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) bytes: Vec<u8>,
    pub(crate) digest: Digest,
}

impl Repository {
    /// Prepares clients for the hosts. Blocks on the disk.
    pub(crate) fn new(
        reference: &RegistryReference,
        hosts: Vec<Host>,
        auth: Option<RegistryAuth>,
        timeouts: Timeouts,
        retries: Retries,
    ) -> Result<Self, HostsError> {
        let path = reference.path().to_owned();
        let mut endpoints = Vec::with_capacity(hosts.len());
        for host in hosts {
            let client = tls::client(&host, &timeouts)?;
            let credentials =
                auth.clone().filter(|auth| auth.is_for(reference.domain()) || auth.is_for(&host.authority));
            endpoints.push(Endpoint::new(host, client, &path, credentials, timeouts, retries));
        }
        Ok(Self { endpoints, path, timeouts, retries })
    }

    /// Fetches a manifest or index of at most `limit` bytes and checks its digest: the one asked
    /// for or, of a tag, the one that the registry announces.
    pub(crate) async fn manifest(&self, version: &Version, limit: u64) -> Result<Fetched, RegistryError> {
        let (tail, what, capability) = match version {
            Version::Tag(tag) => (tag.clone(), format!("the manifest of tag {tag}"), "resolve"),
            Version::Digest(digest) => (digest.to_string(), format!("manifest {digest}"), "pull"),
        };
        let url = format!("{}/manifests/{tail}", self.path);
        let want = Want { what: &what, path: &url, accept: ACCEPT, offset: 0, anonymous_elsewhere: true };
        let mut refused = Refused::default();
        for endpoint in self.able(capability) {
            if refused.settles(endpoint) {
                continue;
            }
            match manifest_of(endpoint, &want, version, limit).await {
                Ok(fetched) => return Ok(fetched),
                Err(error) => refused.by(error),
            }
        }
        Err(refused.error(&what, capability))
    }

    /// Fetches a small blob of known size and digest.
    pub(crate) async fn small_blob(
        &self,
        digest: &Digest,
        size: u64,
        what: &str,
    ) -> Result<Vec<u8>, RegistryError> {
        let url = format!("{}/blobs/{digest}", self.path);
        let what = format!("{what} {digest}");
        let want = Want { what: &what, path: &url, accept: "*/*", offset: 0, anonymous_elsewhere: false };
        let mut refused = Refused::default();
        for endpoint in self.able("pull") {
            if refused.settles(endpoint) {
                continue;
            }
            match small_blob_of(endpoint, &want, digest, size).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => refused.by(error),
            }
        }
        Err(refused.error(&what, "pull"))
    }

    /// The hosts that have a capability, in the order of asking.
    fn able(&self, capability: &'static str) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.iter().filter(move |endpoint| endpoint.can(capability))
    }
}

/// The hosts that did not serve something.
#[derive(Default)]
struct Refused(Vec<RegistryError>);

impl Refused {
    fn by(&mut self, error: RegistryError) {
        tracing::debug!(%error, "a registry host did not serve what was asked for");
        self.0.push(error);
    }

    /// Whether what was heard makes a further way to the same host pointless.
    fn settles(&self, endpoint: &Endpoint) -> bool {
        endpoint.host.second_scheme && self.0.last().is_some_and(RegistryError::is_answer)
    }

    fn error(mut self, what: &str, capability: &'static str) -> RegistryError {
        if self.0.len() > 1 {
            return RegistryError::AllHosts(self.0);
        }
        self.0.pop().unwrap_or(RegistryError::NoHost { what: what.to_owned(), capability })
    }
}

async fn manifest_of(
    endpoint: &Endpoint,
    want: &Want<'_>,
    version: &Version,
    limit: u64,
) -> Result<Fetched, RegistryError> {
    let asked = match version {
        Version::Digest(digest) => Some(digest),
        Version::Tag(_) => None,
    };
    let Answer { bytes, headers, host } = endpoint.document(want, limit, asked).await?;
    let expected = asked.cloned().or_else(|| announced(&headers));
    check_digest(bytes, expected, host, want.what)
}

async fn small_blob_of(
    endpoint: &Endpoint,
    want: &Want<'_>,
    digest: &Digest,
    size: u64,
) -> Result<Vec<u8>, RegistryError> {
    let Answer { bytes, host, .. } = endpoint.document(want, size, Some(digest)).await?;
    let got = bytes.len() as u64;
    if got != size {
        return Err(RegistryError::Length { host, what: want.what.to_owned(), expected: size, got });
    }
    check_digest(bytes, Some(digest.clone()), host, want.what).map(|fetched| fetched.bytes)
}

fn check_digest(
    bytes: Vec<u8>,
    expected: Option<Digest>,
    host: String,
    what: &str,
) -> Result<Fetched, RegistryError> {
    match expected {
        Some(expected) if !expected.matches(&bytes) => {
            let got = Digest::sha256(&bytes);
            Err(RegistryError::Digest { host, what: what.to_owned(), expected, got })
        }
        Some(digest) => Ok(Fetched { bytes, digest }),
        None => Ok(Fetched { digest: Digest::sha256(&bytes), bytes }),
    }
}
