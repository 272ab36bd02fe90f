//! Extended attributes with names that only an administrator of the host may use.
//!
//! `trusted.` attributes take CAP_SYS_ADMIN, which no file server has. Root in a box has use for them (an overlay keeps its
//! state in them), so they lie on the host under names of ours, which a guest can neither see nor write as such:
//!
//! ```text
//! guest                        host
//! trusted.overlay.opaque   ◄─► user.a3s-box.trusted.overlay.opaque
//! user.a3s-box.…               refused
//! trusted.… of the host        not shown
//! ```
//!
//! The kernel keeps `user.` attributes on files and directories only. Whoever sets one on a link is told EPERM, which an
//! overlay takes for granted.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::io;

const TRUSTED: &[u8] = b"trusted.";
/// Names that are ours alone.
const OURS: &[u8] = b"user.a3s-box.";

/// The longest list of names that the kernel gives (`XATTR_LIST_MAX`).
pub(crate) const LONGEST_LIST: u32 = 65536;

/// The name on the host. `refusal` is the error for names that are ours alone.
pub(crate) fn on_host(name: &CStr, refusal: i32) -> io::Result<Cow<'_, CStr>> {
    let bytes = name.to_bytes();
    if bytes.starts_with(OURS) {
        return Err(io::Error::from_raw_os_error(refusal));
    }
    if !bytes.starts_with(TRUSTED) {
        return Ok(Cow::Borrowed(name));
    }
    Ok(Cow::Owned(CString::new([OURS, bytes].concat())?))
}

/// The names that a guest is told, of the host's list: each ends in a zero.
pub(crate) fn in_guest(host: &[u8]) -> Vec<u8> {
    let mut guest = Vec::with_capacity(host.len());
    for name in host.split_inclusive(|byte| *byte == 0) {
        match name.strip_prefix(OURS) {
            Some(trusted) if trusted.starts_with(TRUSTED) => guest.extend(trusted),
            Some(_) => {}
            None if name.starts_with(TRUSTED) => {}
            None => guest.extend(name),
        }
    }
    guest
}

/// A list for a guest that has `room` bytes for it; with none it asks for the length.
pub(crate) enum List {
    Names(Vec<u8>),
    Length(u32),
}

/// What a guest with so much room is answered.
pub(crate) fn list(host: &[u8], room: u32) -> io::Result<List> {
    let names = in_guest(host);
    let length = u32::try_from(names.len()).unwrap_or(u32::MAX);
    match room {
        0 => Ok(List::Length(length)),
        room if length > room => Err(io::Error::from_raw_os_error(libc::ERANGE)),
        _ => Ok(List::Names(names)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trusted_names_are_kept_under_ours_and_others_as_they_are() {
        let kept = on_host(c"trusted.overlay.opaque", libc::EPERM).unwrap();
        assert_eq!(kept.as_ref(), c"user.a3s-box.trusted.overlay.opaque");
        for name in [c"user.mine", c"security.capability", c"system.posix_acl_access", c"trusted", c""] {
            assert_eq!(on_host(name, libc::EPERM).unwrap().as_ref(), name);
        }
    }

    // A container without privileges could set what only its pod's root may set.
    #[test]
    fn a_guest_cannot_use_our_names() {
        for name in [c"user.a3s-box.trusted.overlay.opaque", c"user.a3s-box.x", c"user.a3s-box."] {
            for refusal in [libc::EPERM, libc::ENODATA] {
                assert_eq!(on_host(name, refusal).unwrap_err().raw_os_error(), Some(refusal));
            }
        }
        assert!(on_host(c"user.a3s-boxes", libc::EPERM).is_ok());
    }

    #[test]
    fn a_list_tells_ours_as_trusted_and_hides_the_hosts() {
        let host = b"user.x\0user.a3s-box.trusted.overlay.origin\0trusted.of.the.host\0user.a3s-box.later\0security.y\0";
        assert_eq!(in_guest(host), b"user.x\0trusted.overlay.origin\0security.y\0");
        assert_eq!(in_guest(b""), b"");
    }

    #[test]
    fn a_list_is_measured_as_the_guest_sees_it() {
        let host = b"user.a3s-box.trusted.x\0";
        let names = b"trusted.x\0";
        assert!(matches!(list(host, 0), Ok(List::Length(10))));
        assert!(matches!(list(host, 10), Ok(List::Names(told)) if told == names));
        assert_eq!(list(host, 9).err().and_then(|error| error.raw_os_error()), Some(libc::ERANGE));
    }
}
