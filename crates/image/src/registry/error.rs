//! What can go wrong with a registry. No variant holds a URL with its query, a header or a body
//! as it came: those may hold secrets.

use std::time::Duration;

use thiserror::Error;

use crate::digest::Digest;
use crate::error::ErrorKind;

/// A registry did not give what was asked for.
#[derive(Debug, Error)]
pub enum RegistryError {
    /// No connection, or it broke before the response.
    #[error("no answer from {host} for {what}: {detail}")]
    Connect {
        /// `scheme://HOST[:PORT]`.
        host: String,
        /// The object asked for.
        what: String,
        /// The innermost cause.
        detail: String,
    },
    /// It took too long.
    #[error("{host} did not {step} within {} s ({what})", limit.as_secs_f32())]
    Timeout {
        /// `scheme://HOST[:PORT]`.
        host: String,
        /// The object asked for.
        what: String,
        /// What it should have done.
        step: &'static str,
        /// The time it had.
        limit: Duration,
    },
    /// A status that is not handled otherwise.
    #[error("{host} answered {status} for {what}{}", told(detail))]
    Status {
        /// `scheme://HOST[:PORT]`.
        host: String,
        /// The object asked for.
        what: String,
        /// The HTTP status.
        status: u16,
        /// The registry's own error codes and messages.
        detail: String,
    },
    /// 401 or 403, with whatever credentials there were.
    #[error("{host} refused access to {what} with {presented}{}", told(detail))]
    Denied {
        /// `scheme://HOST[:PORT]`, of the registry or its token service.
        host: String,
        /// The object asked for.
        what: String,
        /// What was presented, by kind.
        presented: &'static str,
        /// The registry's own error codes and messages.
        detail: String,
    },
    /// A demand for authentication that cannot be met.
    #[error("{host} asks for authentication in a way that cannot be followed: {problem}")]
    Challenge {
        /// `scheme://HOST[:PORT]`.
        host: String,
        /// Why.
        problem: &'static str,
    },
    /// A redirect that is not followed.
    #[error("{host} redirects {what} {problem}")]
    Redirect {
        /// `scheme://HOST[:PORT]`.
        host: String,
        /// The object asked for.
        what: String,
        /// Why.
        problem: &'static str,
    },
    /// The body broke off.
    #[error("{host} broke off {what} after {got} bytes{}", told(detail))]
    Broken {
        /// `scheme://HOST[:PORT]`.
        host: String,
        /// The object asked for.
        what: String,
        /// How many came.
        got: u64,
        /// The innermost cause.
        detail: String,
    },
    /// The body has another length than the manifest states.
    #[error("{host} serves {got} bytes of {what} instead of {expected}")]
    Length {
        /// `scheme://HOST[:PORT]`.
        host: String,
        /// The object asked for.
        what: String,
        /// What the manifest states.
        expected: u64,
        /// What came or was announced.
        got: u64,
    },
    /// More than we take.
    #[error("{host} serves more than {limit} bytes for {what}")]
    TooLarge {
        /// `scheme://HOST[:PORT]`.
        host: String,
        /// The object asked for.
        what: String,
        /// The limit.
        limit: u64,
    },
    /// The bytes are not those asked for.
    #[error("{host} serves {what} with the digest {got} instead of {expected}")]
    Digest {
        /// `scheme://HOST[:PORT]`.
        host: String,
        /// The object asked for.
        what: String,
        /// What was asked for or announced.
        expected: Digest,
        /// What came.
        got: Digest,
    },
    /// None of several hosts served it; the last one is the registry itself.
    #[error("none of {} hosts served it: {}", .0.len(), list(.0))]
    AllHosts(Vec<RegistryError>),
    /// hosts.toml forbids all hosts to serve it.
    #[error("hosts.toml gives no host the capability to {capability} for {what}")]
    NoHost {
        /// The object asked for.
        what: String,
        /// `resolve` or `pull`.
        capability: &'static str,
    },
}

impl RegistryError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Connect { .. } | Self::Broken { .. } | Self::Redirect { .. } => ErrorKind::Unavailable,
            Self::Timeout { .. } => ErrorKind::Timeout,
            Self::Status { status: 404 | 410, .. } => ErrorKind::NotFound,
            Self::Status { .. } => ErrorKind::Unavailable,
            Self::Denied { .. } | Self::Challenge { .. } => ErrorKind::Unauthorized,
            Self::Length { .. } | Self::Digest { .. } => ErrorKind::Corrupt,
            Self::TooLarge { .. } | Self::NoHost { .. } => ErrorKind::Unsupported,
            // The registry itself, asked last, knows better than its mirrors, if it answers at all.
            Self::AllHosts(errors) => {
                let told = errors.iter().rev().find(|error| error.is_answer());
                told.or(errors.last()).map_or(ErrorKind::Unavailable, Self::kind)
            }
        }
    }

    /// Whether a host would not send a part of something.
    pub(super) fn refuses_range(&self) -> bool {
        match self {
            Self::Status { status, .. } => *status == 416,
            Self::AllHosts(errors) => errors.iter().any(Self::refuses_range),
            Self::Connect { .. }
            | Self::Timeout { .. }
            | Self::Denied { .. }
            | Self::Challenge { .. }
            | Self::Redirect { .. }
            | Self::Broken { .. }
            | Self::Length { .. }
            | Self::TooLarge { .. }
            | Self::Digest { .. }
            | Self::NoHost { .. } => false,
        }
    }

    /// Whether the host understood the request: a TLS server answers 400 to plain HTTP.
    pub(super) fn is_answer(&self) -> bool {
        !matches!(self, Self::Connect { .. } | Self::Status { status: 400, .. })
    }
}

fn told(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(" ({detail})") }
}

fn list(errors: &[RegistryError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// The innermost cause of a transport error, which never holds a URL.
pub(super) fn innermost(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    printable(&innermost.to_string())
}

/// A foreign text for a message: one line, no control characters, not long.
pub(super) fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}
