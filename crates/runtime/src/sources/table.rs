//! Which sources a box has attached, and who holds them. Decided here, done by the box's owner.
//!
//! ```text
//!   (not there) ── hold ──► due: attach ──► attached ── last holder released ──► due: detach ──► (not there)
//!                                           │      ▲
//!                        first writer: due: open   last writer released: due: close
//! ```
//!
//! Holders are on record before anything is attached. What the host has really done is not: after a restart of the daemon it
//! is unknown, and is done again, which changes nothing where it was done already.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use a3s_box_core::SessionId;
use a3s_box_core::spec::UserNamespace;

use super::identity::{SourceKey, Tree};

/// What may be done to files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Access {
    /// Read them.
    ReadOnly,
    /// Change them too.
    Writable,
}

impl Access {
    /// That of a mount.
    pub(crate) fn of(readonly: bool) -> Self {
        if readonly { Self::ReadOnly } else { Self::Writable }
    }
}

/// A source that is attached, or is to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Source {
    /// Below the share's `pod/`; never used twice in a box.
    pub(crate) name: String,
    pub(crate) key: SourceKey,
    /// Where the host had it.
    pub(crate) path: PathBuf,
    /// Where it lies in its file system.
    pub(crate) location: Option<PathBuf>,
    /// The sessions that show it, and the most that one of their mounts may do.
    holders: BTreeMap<SessionId, Access>,
    /// What the host lets through where it is attached. `None`: this daemon has not seen to it.
    #[serde(skip)]
    attached: Option<Access>,
}

impl Source {
    /// One that nobody holds yet.
    pub(crate) fn new(name: String, key: SourceKey, path: PathBuf, location: Option<PathBuf>) -> Self {
        Self { name, key, path, location, holders: BTreeMap::new(), attached: None }
    }

    /// The most that a holder may do. What the host itself has read-only nobody may write.
    fn wanted(&self) -> Option<Access> {
        let most = self.holders.values().max().copied();
        if self.key.readonly_on_host { most.map(|_| Access::ReadOnly) } else { most }
    }
}

/// What the host is to do about a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// Attach it; it may be there already.
    Attach(Access),
    /// It is attached: let writes through.
    Open,
    /// It is attached and nobody may write any more: refuse writes.
    Close,
    /// Nobody holds it: detach it; it may be gone already.
    Detach,
}

/// All sources of a box.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Sources(Vec<Source>);

impl Sources {
    /// The source with this key. One that nobody holds is on its way out and is not used again.
    pub(crate) fn whole(&self, key: &SourceKey) -> Option<&Source> {
        self.0.iter().find(|source| source.key == *key && !source.holders.is_empty())
    }

    /// Sources that may contain what lies at `location`, and where in them; the nearest first. Where names lead may have
    /// changed, so this is a guess.
    pub(crate) fn around(&self, key: &SourceKey, location: &Path) -> Vec<(&Source, PathBuf)> {
        let alike = |source: &&Source| {
            let other = &source.key;
            !source.holders.is_empty()
                && (other.device, other.readonly_on_host, other.users)
                    == (key.device, key.readonly_on_host, key.users)
                && (&other.tree, &key.tree) == (&Tree::Single, &Tree::Single)
        };
        let inside = |source: &Source| {
            let inside = location.strip_prefix(source.location.as_ref()?).ok()?;
            (!inside.as_os_str().is_empty()).then(|| inside.to_owned())
        };
        let mut found: Vec<_> =
            self.0.iter().filter(alike).filter_map(|source| Some((source, inside(source)?))).collect();
        found.sort_by_key(|(_, inside)| inside.components().count());
        found
    }

    /// Whose the files of a source seem to be.
    pub(crate) fn users(&self, name: &str) -> Option<UserNamespace> {
        self.0.iter().find(|source| source.name == name)?.key.users
    }

    /// Where the host had a source.
    pub(crate) fn path(&self, name: &str) -> Option<PathBuf> {
        self.0.iter().find(|source| source.name == name).map(|source| source.path.clone())
    }

    /// Adds a source.
    pub(crate) fn add(&mut self, source: Source) {
        self.0.push(source);
    }

    /// Notes that a mount of `session` shows a source.
    pub(crate) fn hold(&mut self, name: &str, session: &SessionId, access: Access) {
        if let Some(source) = self.get_mut(name) {
            let held = source.holders.entry(session.clone()).or_insert(access);
            *held = access.max(*held);
        }
    }

    /// Takes a session out of all holders; whether it was one.
    pub(crate) fn release(&mut self, session: &SessionId) -> bool {
        let released = self.0.iter_mut().filter_map(|source| source.holders.remove(session));
        released.count() > 0
    }

    /// Takes out all holders that do not exist; whether there were any.
    pub(crate) fn keep_holders(&mut self, exists: impl Fn(&SessionId) -> bool) -> bool {
        let count = |sources: &Self| sources.0.iter().map(|source| source.holders.len()).sum::<usize>();
        let before = count(self);
        for source in &mut self.0 {
            source.holders.retain(|holder, _| exists(holder));
        }
        count(self) != before
    }

    /// What is to be done about one source.
    pub(crate) fn due(&self, name: &str) -> Option<Due> {
        let source = self.0.iter().find(|source| source.name == name)?;
        match (source.wanted(), source.attached) {
            (None, _) => Some(Due::Detach),
            (Some(wanted), None) => Some(Due::Attach(wanted)),
            (Some(Access::Writable), Some(Access::ReadOnly)) => Some(Due::Open),
            (Some(Access::ReadOnly), Some(Access::Writable)) => Some(Due::Close),
            (Some(_), Some(_)) => None,
        }
    }

    /// What is to be done after a session was released. What has holders and was not looked after by this daemon stays as it is.
    pub(crate) fn due_after_release(&self) -> Vec<(String, Due)> {
        let due = self.0.iter().filter_map(|source| Some((source.name.clone(), self.due(&source.name)?)));
        due.filter(|(_, due)| matches!(due, Due::Close | Due::Detach)).collect()
    }

    /// The host has it attached so.
    pub(crate) fn is_attached(&mut self, name: &str, access: Access) {
        if let Some(source) = self.get_mut(name) {
            source.attached = Some(access);
        }
    }

    /// The host has it no more.
    pub(crate) fn is_detached(&mut self, name: &str) {
        self.0.retain(|source| source.name != name);
    }

    fn get_mut(&mut self, name: &str) -> Option<&mut Source> {
        self.0.iter_mut().find(|source| source.name == name)
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
