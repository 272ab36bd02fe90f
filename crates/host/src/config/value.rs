//! Reading and writing of single values: each `as_…` answers `None` when the value is not of its kind.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeValue;

pub(super) fn as_text<'v>(value: &'v DeValue<'_>) -> Option<&'v str> {
    value.as_str()
}

/// An absolute path. Relative ones would mean something else for the daemon than for the shell that wrote them.
pub(super) fn as_path(value: &DeValue<'_>) -> Option<PathBuf> {
    let path = Path::new(as_text(value)?);
    path.is_absolute().then(|| path.to_path_buf())
}

pub(super) fn as_paths(value: &DeValue<'_>) -> Option<Vec<PathBuf>> {
    value.as_array()?.iter().map(|item| as_path(item.get_ref())).collect()
}

pub(super) fn as_texts(value: &DeValue<'_>) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|item| as_text(item.get_ref()).map(str::to_owned)).collect()
}

pub(super) fn as_number<N>(value: &DeValue<'_>, least: N, most: N) -> Option<N>
where
    N: TryFrom<u64> + PartialOrd,
{
    let integer = value.as_integer()?;
    let number = u64::from_str_radix(integer.as_str(), integer.radix()).ok()?;
    let number = N::try_from(number).ok()?;
    (least <= number && number <= most).then_some(number)
}

/// `"500ms"`, `"5s"`, `"2m"`, `"1h"`, or a number of seconds; at least a millisecond, at most a day.
pub(super) fn as_duration(value: &DeValue<'_>) -> Option<Duration> {
    match as_text(value) {
        Some(text) => parse_duration(text),
        None => bounded(Duration::from_secs(as_number(value, 0, u64::MAX)?)),
    }
}

/// `"512M"`, `"64GiB"` or a number of bytes.
pub(super) fn as_bytes(value: &DeValue<'_>) -> Option<u64> {
    match as_text(value) {
        Some(text) => parse_size(text),
        None => as_number(value, 0, u64::MAX),
    }
}

/// Reads a duration: a whole number and `ms`, `s`, `m` or `h`; without a unit seconds are meant. At least
/// a millisecond, at most a day.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let (digits, unit) = split_unit(text)?;
    let number: u64 = digits.parse().ok()?;
    let milliseconds = match unit {
        "ms" => number,
        "" | "s" => number.checked_mul(1000)?,
        "m" | "min" => number.checked_mul(60_000)?,
        "h" => number.checked_mul(3_600_000)?,
        _ => return None,
    };
    bounded(Duration::from_millis(milliseconds))
}

fn bounded(duration: Duration) -> Option<Duration> {
    (Duration::from_millis(1)..=Duration::from_secs(86_400)).contains(&duration).then_some(duration)
}

/// Reads a size in bytes: a whole number and `K`, `M`, `G` or `T`, all powers of 1024 as the field's tools take
/// them (`Ki`, `KiB`, `KB` and lower case are the same); without a unit bytes are meant.
pub fn parse_size(text: &str) -> Option<u64> {
    let (digits, unit) = split_unit(text)?;
    let number: u64 = digits.parse().ok()?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "ki" | "kib" => 10,
        "m" | "mb" | "mi" | "mib" => 20,
        "g" | "gb" | "gi" | "gib" => 30,
        "t" | "tb" | "ti" | "tib" => 40,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

fn split_unit(text: &str) -> Option<(&str, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (end > 0).then(|| (&text[..end], text[end..].trim_start()))
}

pub(super) fn show_text(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

pub(super) fn show_path(path: &Path) -> String {
    show_text(&path.to_string_lossy())
}

pub(super) fn show_paths(paths: &[PathBuf]) -> String {
    let items: Vec<_> = paths.iter().map(|path| show_path(path)).collect();
    format!("[{}]", items.join(", "))
}

pub(super) fn show_texts(texts: &[String]) -> String {
    let items: Vec<_> = texts.iter().map(|text| show_text(text)).collect();
    format!("[{}]", items.join(", "))
}

pub(super) fn show_duration(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    show_text(&if milliseconds.is_multiple_of(1000) {
        format!("{}s", milliseconds / 1000)
    } else {
        format!("{milliseconds}ms")
    })
}

pub(super) fn show_bytes(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >= 1 << shift && bytes.is_multiple_of(1 << shift) {
            return show_text(&format!("{}{unit}", bytes >> shift));
        }
    }
    bytes.to_string()
}
