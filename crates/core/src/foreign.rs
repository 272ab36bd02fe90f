//! JSON that other programs write, read as they read it themselves.
//!
//! Most of them are written in Go, where a `null` is the same as a member that is not there, on every level: a field,
//! an entry of a list, a value of a map. Tools write such documents, registries keep them, and what reads them
//! elsewhere takes them, so a reader that stops at one refuses an image that runs everywhere else.

use serde::{Deserialize, Deserializer};

/// A value that may be `null`, which means its default: for entries of lists and values of maps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Nullable<T>(pub T);

impl<'de, T: Default + Deserialize<'de>> Deserialize<'de> for Nullable<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        or_default(deserializer).map(Self)
    }
}

/// For `#[serde(default, deserialize_with = "…")]`: a field where `null` means the default.
///
/// # Errors
/// What is there is neither `null` nor of the field's type.
pub fn or_default<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: Default + Deserialize<'de>,
    D: Deserializer<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// The same for a list of values that may be `null` each.
///
/// # Errors
/// What is there is neither `null` nor such a list.
pub fn list<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: Default + Deserialize<'de>,
    D: Deserializer<'de>,
{
    let list: Vec<Nullable<T>> = or_default(deserializer)?;
    Ok(list.into_iter().map(|Nullable(value)| value).collect())
}

/// The same for a map of values that may be `null` each, into any kind of map.
///
/// # Errors
/// What is there is neither `null` nor such a map.
pub fn map<'de, M, T, D>(deserializer: D) -> Result<M, D::Error>
where
    M: FromIterator<(String, T)>,
    T: Default + Deserialize<'de>,
    D: Deserializer<'de>,
{
    let map: std::collections::BTreeMap<String, Nullable<T>> = or_default(deserializer)?;
    Ok(map.into_iter().map(|(key, Nullable(value))| (key, value)).collect())
}
