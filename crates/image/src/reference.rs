//! Image references: registry names as docker/distribution normalises them, and local archives.
//!
//! ```text
//! reference := [domain "/"] path [":" tag] ["@" digest]
//!            | "oci:" DIR [":" ref] | "oci-archive:" FILE [":" ref] | "docker-archive:" FILE [":" ref]
//! ```
//!
//! A first component without `.`, `:` or upper case that is not `localhost` belongs to the path
//! and the domain is docker.io; one-component paths there are under `library/`. A missing tag is
//! `latest`. With a tag and a digest, the digest decides and the tag is dropped, as containerd does.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use thiserror::Error;

use crate::digest::{Digest, DigestError};

/// The registry that names without a domain mean.
pub const DEFAULT_DOMAIN: &str = "docker.io";
const MAX_PATH: usize = 255;
const MAX_TAG: usize = 128;
/// Longer texts are refused unread.
const MAX_REFERENCE: usize = 4096;

/// A parsed reference. Its `Display` is its normal form and parses to itself.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reference {
    /// In a registry.
    Registry(RegistryReference),
    /// In a file or directory of this machine.
    Local(LocalReference),
}

/// `domain/path:tag` or `domain/path@digest`, normalised.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegistryReference {
    domain: String,
    path: String,
    version: Version,
}

/// Which manifest of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Version {
    /// The one a tag points to now.
    Tag(String),
    /// The one with this digest.
    Digest(Digest),
}

/// The kinds of local images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LocalKind {
    /// A directory in the OCI image layout.
    OciDir,
    /// A tar of an OCI image layout.
    OciArchive,
    /// A tar as `docker save` writes it.
    DockerArchive,
}

/// `KIND:PATH[:NAME]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LocalReference {
    /// What lies at the path.
    pub kind: LocalKind,
    /// Where it lies; never empty.
    pub path: PathBuf,
    /// Which image of it, where it holds several.
    pub name: Option<String>,
}

/// Why a text is no image reference.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ReferenceError {
    /// Nothing there.
    #[error("the image reference is empty")]
    Empty,
    /// Longer than any real one.
    #[error("the image reference is {length} bytes long, more than {MAX_REFERENCE}")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// The part before the first slash is no host name with port.
    #[error("image reference {reference:?}: {domain:?} is not a registry host (HOST[:PORT])")]
    Domain {
        /// The whole text.
        reference: String,
        /// The part.
        domain: String,
    },
    /// The repository breaks the grammar.
    #[error(
        "image reference {reference:?}: {path:?} is not a repository name: lower-case letters and digits, \
         separated by single '.', '_' or '/', '__' or dashes, at most {MAX_PATH} bytes"
    )]
    Path {
        /// The whole text.
        reference: String,
        /// The part.
        path: String,
    },
    /// 64 hex digits would be taken for an image id.
    #[error("image reference {reference:?} is 64 hex digits, which is an image id and not a repository name")]
    LooksLikeId {
        /// The whole text.
        reference: String,
    },
    /// The tag breaks the grammar.
    #[error(
        "image reference {reference:?}: {tag:?} is not a tag: letters, digits, '_', '.', '-', not starting with '.' or '-', \
         at most {MAX_TAG}"
    )]
    Tag {
        /// The whole text.
        reference: String,
        /// The part.
        tag: String,
    },
    /// What follows the `@` is no digest.
    #[error("image reference {reference:?}: {source}")]
    Digest {
        /// The whole text.
        reference: String,
        /// What is wrong with it.
        #[source]
        source: DigestError,
    },
    /// `oci:` and its like without a path.
    #[error("image reference {reference:?} names no path after {prefix:?}")]
    NoPath {
        /// The whole text.
        reference: String,
        /// The prefix.
        prefix: &'static str,
    },
}

impl LocalKind {
    const ALL: [Self; 3] = [Self::OciDir, Self::OciArchive, Self::DockerArchive];

    /// The prefix in references, colon included.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::OciDir => "oci:",
            Self::OciArchive => "oci-archive:",
            Self::DockerArchive => "docker-archive:",
        }
    }
}

impl RegistryReference {
    /// The registry, `HOST[:PORT]`.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository inside the registry.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Tag or digest.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// `domain/path`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        if text.len() > MAX_REFERENCE {
            return Err(ReferenceError::TooLong { length: text.len() });
        }
        for kind in LocalKind::ALL {
            if let Some(rest) = text.strip_prefix(kind.prefix()) {
                // `oci:1.2` would be a legal docker name, but nothing that people mean.
                return parse_local(text, kind, rest).map(Self::Local);
            }
        }
        parse_registry(text).map(Self::Registry)
    }
}

fn parse_local(text: &str, kind: LocalKind, rest: &str) -> Result<LocalReference, ReferenceError> {
    // As skopeo does: the path ends at the first colon, because the image name may hold more.
    let (path, name) = match rest.split_once(':') {
        Some((path, name)) if !name.is_empty() => (path, Some(name.to_owned())),
        Some((path, _)) => (path, None),
        None => (rest, None),
    };
    if path.is_empty() {
        return Err(ReferenceError::NoPath { reference: text.to_owned(), prefix: kind.prefix() });
    }
    Ok(LocalReference { kind, path: PathBuf::from(path), name })
}

fn parse_registry(text: &str) -> Result<RegistryReference, ReferenceError> {
    let reference = || text.to_owned();
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => {
            let digest = digest
                .parse::<Digest>()
                .map_err(|source| ReferenceError::Digest { reference: reference(), source })?;
            (name, Some(digest))
        }
        None => (text, None),
    };
    let (domain, remainder) = split_domain(name);
    let (path, tag) = match remainder.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (remainder, None),
    };
    if !is_domain(domain) {
        return Err(ReferenceError::Domain { reference: reference(), domain: domain.to_owned() });
    }
    if domain == DEFAULT_DOMAIN && name == remainder && is_hex_id(path) {
        return Err(ReferenceError::LooksLikeId { reference: reference() });
    }
    let path = if domain == DEFAULT_DOMAIN && !path.contains('/') {
        format!("library/{path}")
    } else {
        path.to_owned()
    };
    if !is_path(&path) {
        return Err(ReferenceError::Path { reference: reference(), path });
    }
    if let Some(tag) = tag
        && !is_tag(tag)
    {
        return Err(ReferenceError::Tag { reference: reference(), tag: tag.to_owned() });
    }
    let version = match digest {
        Some(digest) => Version::Digest(digest),
        None => Version::Tag(tag.unwrap_or("latest").to_owned()),
    };
    Ok(RegistryReference { domain: domain.to_owned(), path, version })
}

/// Splits off the registry by the rule in the module doc.
fn split_domain(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            if first == "index.docker.io" {
                (DEFAULT_DOMAIN, rest)
            } else {
                (first, rest)
            }
        }
        Some(_) | None => (DEFAULT_DOMAIN, name),
    }
}

fn is_domain(domain: &str) -> bool {
    let (host, port) = if let Some(rest) = domain.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else { return false };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        return match port.strip_prefix(':') {
            Some(port) => is_port(port),
            None => port.is_empty(),
        };
    } else {
        match domain.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (domain, None),
        }
    };
    let label = |label: &str| {
        let bytes = label.as_bytes();
        !bytes.is_empty()
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-')
            && bytes.first() != Some(&b'-')
            && bytes.last() != Some(&b'-')
    };
    domain.len() <= 255 && host.split('.').all(label) && port.is_none_or(is_port)
}

fn is_port(port: &str) -> bool {
    !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok()
}

fn is_path(path: &str) -> bool {
    path.len() <= MAX_PATH && path.split('/').all(is_path_component)
}

/// `[a-z0-9]+ (separator [a-z0-9]+)*` with separators `.`, `_`, `__` and any run of dashes.
fn is_path_component(component: &str) -> bool {
    let bytes = component.as_bytes();
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut i = 0;
    loop {
        let start = i;
        while i < bytes.len() && alphanumeric(bytes[i]) {
            i += 1;
        }
        if i == start {
            return false;
        }
        if i == bytes.len() {
            return true;
        }
        let start = i;
        while i < bytes.len() && !alphanumeric(bytes[i]) {
            i += 1;
        }
        let separator = &bytes[start..i];
        let fits = matches!(separator, b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-');
        if !fits {
            return false;
        }
    }
}

fn is_tag(tag: &str) -> bool {
    let bytes = tag.as_bytes();
    let word = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
    (1..=MAX_TAG).contains(&bytes.len())
        && bytes.first().is_some_and(word)
        && bytes.iter().all(|b| word(b) || matches!(b, b'.' | b'-'))
}

fn is_hex_id(path: &str) -> bool {
    path.len() == 64 && path.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

impl fmt::Display for RegistryReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Version::Tag(tag) => write!(f, "{}/{}:{tag}", self.domain, self.path),
            Version::Digest(digest) => write!(f, "{}/{}@{digest}", self.domain, self.path),
        }
    }
}

impl fmt::Display for LocalReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.kind.prefix(), Path::display(&self.path))?;
        match &self.name {
            Some(name) => write!(f, ":{name}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => reference.fmt(f),
            Self::Local(reference) => reference.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn normal(text: &str) -> String {
        text.parse::<Reference>().unwrap_or_else(|e| panic!("{text}: {e}")).to_string()
    }

    #[test]
    fn names_are_normalised_as_docker_does() {
        let hex = "a".repeat(64);
        let table = [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36", "docker.io/library/busybox:1.36".to_owned()),
            ("a/b", "docker.io/a/b:latest".to_owned()),
            ("docker.io/busybox", "docker.io/library/busybox:latest".to_owned()),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest".to_owned()),
            ("quay.io/x/y/z:t", "quay.io/x/y/z:t".to_owned()),
            ("localhost/x", "localhost/x:latest".to_owned()),
            ("localhost:5000/x:y", "localhost:5000/x:y".to_owned()),
            ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest".to_owned()),
            ("[::1]:5000/x", "[::1]:5000/x:latest".to_owned()),
            ("Upper/x", "Upper/x:latest".to_owned()),
            ("a_b/c__d-----e.f", "docker.io/a_b/c__d-----e.f:latest".to_owned()),
            ("host:5000/x/y", "host:5000/x/y:latest".to_owned()),
        ];
        for (given, expected) in table {
            assert_eq!(normal(given), expected, "{given}");
        }
        let both = format!("reg.example/x:tag@sha256:{hex}");
        assert_eq!(normal(&both), format!("reg.example/x@sha256:{hex}"));
    }

    #[test]
    fn a_tag_with_port_like_digits_belongs_to_the_last_component() {
        assert_eq!(normal("x:5000"), "docker.io/library/x:5000");
    }

    #[test]
    fn bad_names_are_refused_with_the_part_that_is_bad() {
        let hex = "a".repeat(64);
        for text in [
            "",
            ":x",
            "a:",
            "a//b",
            "/a",
            "a/",
            "A",
            "a..b",
            "a___b",
            "a/B",
            "a@sha256:12",
            "a b",
            "a:-x",
            "-h.x/y",
            "h:99999/x",
            "x:y:z",
            "[::x]/a",
            "a@",
            "http://x/y",
            "ü",
            "a/../b",
            &hex,
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?} was taken");
        }
        assert!(matches!("a:-x".parse::<Reference>(), Err(ReferenceError::Tag { tag, .. }) if tag == "-x"));
        let long = "a".repeat(5000);
        assert!(matches!(long.parse::<Reference>(), Err(ReferenceError::TooLong { length: 5000 })));
    }

    #[test]
    fn local_references_keep_their_path_and_name() {
        let parsed: Reference = "oci:/srv/images:reg.example/a/b:1.0".parse().unwrap();
        let expected = LocalReference {
            kind: LocalKind::OciDir,
            path: "/srv/images".into(),
            name: Some("reg.example/a/b:1.0".into()),
        };
        assert_eq!(parsed, Reference::Local(expected));
        assert_eq!(normal("docker-archive:x.tar"), "docker-archive:x.tar");
        assert!("oci-archive:".parse::<Reference>().is_err());
    }

    proptest! {
        #[test]
        fn the_normal_form_parses_to_itself(text in "[a-zA-Z0-9.:/@_-]{1,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                let normal = reference.to_string();
                prop_assert_eq!(normal.parse::<Reference>().unwrap(), reference);
            }
        }
    }
}
