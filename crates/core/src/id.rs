//! Identifiers of boxes and sessions.
//!
//! An id is 64 lower-case hexadecimal digits, as CRI clients know them from other runtimes.
//! Whoever makes one supplies the randomness, so that this crate does no I/O.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{text:?} is not an id: expected 64 lower-case hexadecimal digits")]
pub struct IdError {
    /// The text, cut to its first 80 characters.
    pub text: String,
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Makes an id of 32 random bytes.
            pub fn from_random(bytes: [u8; 32]) -> Self {
                Self(hex(&bytes))
            }

            /// All 64 digits.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The first 12 digits: enough for people and for names with a length limit.
            pub fn short(&self) -> &str {
                &self.0[..12]
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                if is_id(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(IdError { text: text.chars().take(80).collect() })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.short())
            }
        }
    };
}

id_type! {
    /// The id of a box: CRI's `pod_sandbox_id`.
    BoxId
}
id_type! {
    /// The id of a session: CRI's `container_id`.
    SessionId
}

fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]])
        .map(char::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_text_form() {
        let id = BoxId::from_random([0xa5; 32]);
        assert_eq!(id.as_str().parse::<BoxId>().unwrap(), id);
        assert_eq!(id.short(), "a5a5a5a5a5a5");
    }

    #[test]
    fn texts_that_could_leave_a_directory_are_no_ids() {
        for text in ["", "..", "a/b", &"A".repeat(64), &"0".repeat(63), &format!("{}/", "0".repeat(63))] {
            assert!(text.parse::<SessionId>().is_err(), "{text}");
        }
    }
}
