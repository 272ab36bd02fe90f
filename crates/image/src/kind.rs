//! What sort of failure an error is.

/// What sort of failure it is: what a caller decides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The image, tag or digest does not exist.
    NotFound,
    /// The registry wants (other) credentials.
    Unauthorized,
    /// The text is no image reference, or names several images.
    InvalidReference,
    /// Bytes that do not match their digest, size or format.
    Corrupt,
    /// The disk is full.
    NoSpace,
    /// The registry or network does not work now; trying later may help.
    Unavailable,
    /// The registry took too long.
    Timeout,
    /// Well-formed, but nothing we run: another platform, schema 1, over a limit.
    Unsupported,
    /// Our own state or this machine is at fault.
    Internal,
}

impl ErrorKind {
    /// What an operator can do about it.
    pub(crate) fn remedy(self) -> &'static str {
        match self {
            Self::NotFound => "check the name and tag, and that the registry has it",
            Self::Unauthorized => "check the credentials (imagePullSecrets) and that the repository exists",
            Self::InvalidReference => "write it as [HOST[:PORT]/]NAME[:TAG|@DIGEST]",
            Self::Corrupt => {
                "the registry, a proxy or the archive holds bad bytes: push or save the image again, or ask its owner"
            }
            Self::NoSpace => {
                "free disk space under the state directory, for instance by removing unused images"
            }
            Self::Unavailable => {
                "check that the registry runs and is reachable, and hosts.toml; then try again"
            }
            Self::Timeout => "check the network path to the registry; then try again",
            Self::Unsupported => "use an image built for this platform, in OCI or docker schema 2 format",
            Self::Internal => "see the source of the error and the daemon's log",
        }
    }
}
