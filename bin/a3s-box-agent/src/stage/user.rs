//! Who a process is: `User` of the wire resolved in the session's own /etc/passwd and /etc/group.
//!
//! The files are the image's, so they are foreign bytes: they are read up to a limit, and lines that are no
//! entries are skipped. (Static glibc's getpwnam would load code from the image.)

use std::io::Read;
use std::os::unix::fs::FileTypeExt;

use a3s_box_protocol::proto::{ResolvedUser, User};
use rustix::fs::{Mode, OFlags};
use thiserror::Error;

/// No more of /etc/passwd or /etc/group is read.
const MAX_FILE: u64 = 8 * 1024 * 1024;
/// The kernel's NGROUPS_MAX.
const MAX_GROUPS: usize = 65_536;

/// A user or group that does not exist, or a number out of range.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum UserError {
    /// No such name in /etc/passwd.
    #[error("user {name:?} is not in the container's /etc/passwd")]
    UnknownUser {
        /// As asked for.
        name: String,
    },
    /// No such name in /etc/group.
    #[error("group {name:?} is not in the container's /etc/group")]
    UnknownGroup {
        /// As asked for.
        name: String,
    },
    /// An id that the pod's user namespace does not have.
    #[error("{kind} {id} is not in the pod's user namespace, which has 0 to {}", .count.saturating_sub(1))]
    Unmapped {
        /// `user` or `group`.
        kind: &'static str,
        /// As asked for.
        id: u32,
        /// How many there are.
        count: u32,
    },
    /// Ids are 0 to 4294967294.
    #[error("{text} is no user or group id")]
    OutOfRange {
        /// As asked for.
        text: String,
    },
}

/// A user with the home directory that /etc/passwd gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Numbers; the groups start with the primary one.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Primary group, then the others, without duplicates.
    pub groups: Vec<u32>,
    /// `/` for users without an entry.
    pub home: String,
}

impl Identity {
    /// For the host.
    pub fn to_wire(&self) -> ResolvedUser {
        ResolvedUser { uid: self.uid, gid: self.gid, groups: self.groups.clone() }
    }
}

/// Resolves `user` in the files below the current root directory.
pub fn resolve_here(user: &User) -> Result<Identity, UserError> {
    resolve(user, &read_bounded("/etc/passwd"), &read_bounded("/etc/group"))
}

/// Resolves `user` in the given contents of /etc/passwd and /etc/group.
pub fn resolve(user: &User, passwd: &str, group: &str) -> Result<Identity, UserError> {
    let (user_part, group_part) = match user.user.split_once(':') {
        Some((name, group)) => (name, Some(group).filter(|g| !g.is_empty())),
        None => (user.user.as_str(), None),
    };
    let entry = find_user(user_part, passwd);
    let uid = match (&entry, user_part) {
        (Some(entry), _) => entry.uid,
        (None, "") => 0,
        (None, text) => id(text)?.ok_or_else(|| UserError::UnknownUser { name: text.to_owned() })?,
    };
    let gid = match (user.group, group_part) {
        (Some(gid), _) => gid,
        (None, Some(name)) => find_group(name, group)?,
        (None, None) => entry.as_ref().map_or(0, |e| e.gid),
    };
    let mut groups = vec![gid];
    let name = entry.as_ref().map(|e| e.name);
    let of_image = name.filter(|_| !user.strict_groups).into_iter().flat_map(|n| groups_of(n, group));
    for further in of_image.chain(user.supplemental_groups.iter().copied()) {
        if groups.len() < MAX_GROUPS && !groups.contains(&further) {
            groups.push(further);
        }
    }
    let home = entry.map(|e| e.home).filter(|h| h.starts_with('/')).unwrap_or("/").to_owned();
    Ok(Identity { uid, gid, groups, home })
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// By name first, as people may have users whose names are digits; then by number. An empty text is root.
fn find_user<'a>(text: &str, passwd: &'a str) -> Option<PasswdEntry<'a>> {
    let number = if text.is_empty() { Some(0) } else { id(text).ok().flatten() };
    let entries = || passwd.lines().filter_map(passwd_entry);
    entries().find(|e| e.name == text).or_else(|| entries().find(|e| Some(e.uid) == number))
}

fn passwd_entry(line: &str) -> Option<PasswdEntry<'_>> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|n| !n.is_empty() && !n.starts_with('#'))?;
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1).unwrap_or("");
    Some(PasswdEntry { name, uid, gid, home })
}

fn find_group(text: &str, group: &str) -> Result<u32, UserError> {
    match group.lines().filter_map(group_entry).find(|(name, _, _)| *name == text) {
        Some((_, gid, _)) => Ok(gid),
        None => id(text)?.ok_or_else(|| UserError::UnknownGroup { name: text.to_owned() }),
    }
}

fn groups_of<'a>(user: &'a str, group: &'a str) -> impl Iterator<Item = u32> + 'a {
    group
        .lines()
        .filter_map(group_entry)
        .filter(move |(_, _, members)| members.split(',').any(|member| member == user))
        .map(|(_, gid, _)| gid)
}

fn group_entry(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|n| !n.is_empty() && !n.starts_with('#'))?;
    let gid = fields.nth(1)?.parse().ok()?;
    Some((name, gid, fields.next().unwrap_or("")))
}

/// `None` if the text is no number at all; an error if it is one that is no id.
fn id(text: &str) -> Result<Option<u32>, UserError> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse::<u32>() {
        Ok(id) if id != u32::MAX => Ok(Some(id)),
        _ => Err(UserError::OutOfRange { text: text.to_owned() }),
    }
}

/// A file that is missing, no regular file, or no UTF-8 has no (further) entries. It is opened without
/// blocking: an image may have a FIFO in its place.
fn read_bounded(path: &str) -> String {
    let Ok(file) = rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
        Mode::empty(),
    ) else {
        return String::new();
    };
    let file = std::fs::File::from(file);
    let special = file.metadata().map_or(true, |m| {
        let kind = m.file_type();
        kind.is_fifo() || kind.is_char_device() || kind.is_block_device() || kind.is_socket() || kind.is_dir()
    });
    let mut bytes = Vec::new();
    if special || file.take(MAX_FILE).read_to_end(&mut bytes).is_err() {
        return String::new();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# a comment\nbroken line\n\
        daemon:x:1:1::/usr/sbin:/usr/sbin/nologin\napp:x:1000:1001:App,,,:/home/app:/bin/sh\n\
        nohome:x:1002:1002\n77:x:78:79::/digits:\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:app,daemon\napp:x:1001:\nwheel:x:10:app\nbad\n";

    fn user(text: &str) -> User {
        User { user: text.to_owned(), ..User::default() }
    }

    fn resolved(user: &User) -> (u32, u32, Vec<u32>, String) {
        let identity = resolve(user, PASSWD, GROUP).unwrap();
        (identity.uid, identity.gid, identity.groups, identity.home)
    }

    #[test]
    fn nobody_in_particular_is_root() {
        assert_eq!(resolved(&user("")), (0, 0, vec![0], "/root".to_owned()));
        assert_eq!(resolve(&user(""), "", "").unwrap().home, "/");
    }

    #[test]
    fn a_name_brings_its_groups_and_home() {
        assert_eq!(resolved(&user("app")), (1000, 1001, vec![1001, 50, 10], "/home/app".to_owned()));
        assert_eq!(resolved(&user("1000")), resolved(&user("app")));
        assert_eq!(resolved(&user("nohome")).3, "/");
    }

    #[test]
    fn a_number_without_an_entry_is_taken_as_it_is() {
        assert_eq!(resolved(&user("4242")), (4242, 0, vec![0], "/".to_owned()));
        assert_eq!(resolved(&user("4242:staff")), (4242, 50, vec![50], "/".to_owned()));
        assert_eq!(resolved(&user("app:7")), (1000, 7, vec![7, 50, 10], "/home/app".to_owned()));
    }

    #[test]
    fn a_name_of_digits_is_a_name_first() {
        assert_eq!(resolved(&user("77")).0, 78);
    }

    #[test]
    fn strict_groups_leave_out_those_of_the_image() {
        let strict =
            User { strict_groups: true, supplemental_groups: vec![50, 9, 9], group: Some(3), ..user("app") };
        assert_eq!(resolved(&strict), (1000, 3, vec![3, 50, 9], "/home/app".to_owned()));
    }

    #[test]
    fn unknown_names_and_impossible_numbers_are_errors() {
        assert_eq!(
            resolve(&user("ghost"), PASSWD, GROUP),
            Err(UserError::UnknownUser { name: "ghost".to_owned() })
        );
        assert_eq!(
            resolve(&user("app:ghosts"), PASSWD, GROUP),
            Err(UserError::UnknownGroup { name: "ghosts".to_owned() })
        );
        for text in ["-1", "4294967295", "99999999999"] {
            assert_eq!(
                resolve(&user(text), PASSWD, GROUP),
                Err(UserError::OutOfRange { text: text.to_owned() })
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn foreign_files_never_panic(text in ".{0,12}", passwd in "(.|\n){0,200}", group in "(.|\n){0,200}") {
            let _ = resolve(&user(&text), &passwd, &group);
        }
    }
}
