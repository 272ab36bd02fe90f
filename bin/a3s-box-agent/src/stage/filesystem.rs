//! New file systems as detached mounts.

use std::io;
use std::os::fd::OwnedFd;

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// Mount attributes of a new file system.
pub type Attributes = MountAttrFlags;

/// nosuid, nodev, noexec.
pub fn harmless() -> Attributes {
    Attributes::MOUNT_ATTR_NOSUID | Attributes::MOUNT_ATTR_NODEV | Attributes::MOUNT_ATTR_NOEXEC
}

/// Makes a file system; keys without a value are flags. Keys may repeat: overlay's `lowerdir+` has no
/// other way past the page that mount(2) allows for all options.
pub fn make(kind: &str, options: &[(&str, Option<&str>)], attributes: Attributes) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        let set = match value {
            Some(value) => rustix::mount::fsconfig_set_string(&context, *key, *value),
            None => rustix::mount::fsconfig_set_flag(&context, *key),
        };
        set.map_err(|e| explain(&context, format_args!("option {key}"), e.into()))?;
    }
    rustix::mount::fsconfig_create(&context)
        .map_err(|e| explain(&context, format_args!("{kind}"), e.into()))?;
    Ok(rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Adds the kernel's own words, which it leaves in the context for whoever reads them.
fn explain(context: &OwnedFd, what: std::fmt::Arguments<'_>, error: io::Error) -> io::Error {
    let mut words = Vec::with_capacity(1024);
    let mut texts = String::new();
    while let Ok(1..) = rustix::io::read(context, rustix::buffer::spare_capacity(&mut words)) {
        let text = String::from_utf8_lossy(&words);
        // Lines start with their severity, e.g. "e ".
        texts.push_str(text.get(2..).unwrap_or(&text).trim_end());
        texts.push_str("; ");
        words.clear();
    }
    let texts = texts.trim_end_matches("; ");
    if texts.is_empty() {
        io::Error::new(error.kind(), format!("{what}: {error}"))
    } else {
        io::Error::new(error.kind(), format!("{what}: {error} ({texts})"))
    }
}
