//! Descriptors that a role of this program is given by number.

use std::ffi::OsStr;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, ensure};

/// The number in an argument.
pub(crate) fn number(argument: &OsStr) -> anyhow::Result<RawFd> {
    let number = argument.to_str().and_then(|text| text.parse().ok());
    let number = number.with_context(|| format!("{argument:?} is no descriptor's number"))?;
    ensure!(number > 2, "{argument:?} is a standard stream, no descriptor of its own");
    Ok(number)
}

/// The descriptor with this number. Whoever started this process opened it for this process alone; the caller takes each
/// number once, before anything else is opened.
#[allow(unsafe_code)]
pub(crate) fn descriptor(number: RawFd) -> OwnedFd {
    // SAFETY: see above: nothing else in this process owns it.
    unsafe { OwnedFd::from_raw_fd(number) }
}
