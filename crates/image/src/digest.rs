//! Content digests: `sha256:…` and `sha512:…` (OCI image-spec, "Descriptors").

use std::fmt;
use std::str::FromStr;

use ring::digest::{Context, SHA256, SHA512};
use thiserror::Error;

/// How a digest is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// SHA-256, 64 hex digits.
    Sha256,
    /// SHA-512, 128 hex digits.
    Sha512,
}

impl Algorithm {
    fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    fn hex_len(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

/// A digest that was checked for its form: its hex digits are lower case and complete, so it
/// is safe as a file name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    algorithm: Algorithm,
    hex: String,
}

/// A text that is no digest we can check.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{text:?} is not a digest: expected sha256: and 64 or sha512: and 128 lower-case hex digits")]
pub struct DigestError {
    /// The text, cut to 200 characters.
    pub text: String,
}

impl Digest {
    /// How it is computed.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The digits without the algorithm.
    pub fn hex(&self) -> &str {
        &self.hex
    }

    /// The SHA-256 digest of some bytes.
    pub fn sha256(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(bytes);
        hasher.finish()
    }

    /// Computes the digest of `bytes` with this one's algorithm and compares.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        let mut hasher = Hasher::new(self.algorithm);
        hasher.update(bytes);
        hasher.finish() == *self
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let error = || DigestError { text: text.chars().take(200).collect() };
        let (name, hex) = text.split_once(':').ok_or_else(error)?;
        let algorithm = match name {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            _ => return Err(error()),
        };
        let digits = hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if hex.len() != algorithm.hex_len() || !digits {
            return Err(error());
        }
        Ok(Self { algorithm, hex: hex.to_owned() })
    }
}

/// A digest being computed. By ring: where a processor has no instructions for SHA, it is almost twice as fast as portable
/// code, and nothing takes longer in a pull.
#[derive(Clone)]
pub struct Hasher {
    algorithm: Algorithm,
    context: Context,
}

impl Hasher {
    /// Starts one.
    pub fn new(algorithm: Algorithm) -> Self {
        let context = Context::new(match algorithm {
            Algorithm::Sha256 => &SHA256,
            Algorithm::Sha512 => &SHA512,
        });
        Self { algorithm, context }
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.context.update(bytes);
    }

    /// The digest of all bytes so far.
    pub fn finish(self) -> Digest {
        let hex = self.context.finish().as_ref().iter().map(|b| format!("{b:02x}")).collect();
        Digest { algorithm: self.algorithm, hex }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_that_could_escape_a_directory_is_refused() {
        for text in ["sha256:../../etc", "md5:00", "sha256", "", "sha256:ABCDEF"] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
        let upper = format!("sha256:{}", "A".repeat(64));
        assert!(upper.parse::<Digest>().is_err());
    }

    #[test]
    fn both_algorithms_verify_their_own_bytes() {
        let known = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
        assert_eq!(Digest::sha256(b"hello").to_string(), known);
        let mut hasher = Hasher::new(Algorithm::Sha512);
        hasher.update(b"hello");
        let digest = hasher.finish();
        assert!(digest.matches(b"hello"));
        assert!(!digest.matches(b"hallo"));
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
    }
}
