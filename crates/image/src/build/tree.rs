//! What an image has at its paths, as far as an instruction that copies has to know: overlayfs and other tools would
//! make of a directory's entry a directory, where a link was, and of a file's a file.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use crate::layer::Decompressed;
use crate::tar::{EntryKind, TarReader};

/// Linux follows as many (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// What a path is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Node {
    Directory,
    Link(PathBuf),
    Other,
}

/// The merged tree of some layers, by paths below the root.
#[derive(Debug, Default)]
pub(super) struct Tree(BTreeMap<PathBuf, Node>);

impl Tree {
    /// What a path is; links are not followed. The root is not asked for.
    pub(super) fn get(&self, path: &Path) -> Option<&Node> {
        self.0.get(path)
    }

    /// Whether a path, links not followed, is a directory.
    pub(super) fn is_directory(&self, path: &Path) -> bool {
        path.as_os_str().is_empty() || self.get(path) == Some(&Node::Directory)
    }

    /// Where a path leads inside the root, all its links followed.
    pub(super) fn resolve(&self, path: &Path) -> Result<PathBuf, String> {
        follow(path, |at| match self.get(at)? {
            Node::Link(target) => Some(target.clone()),
            Node::Directory | Node::Other => None,
        })
    }

    /// Puts a layer on top. Its whiteouts speak of what was there before.
    pub(super) fn apply(&mut self, blob: impl Read) -> Result<(), String> {
        let mut tar = TarReader::new(Decompressed::new(blob).map_err(|e| e.to_string())?);
        let mut added = Vec::new();
        while let Some(entry) = tar.next_entry().map_err(|e| e.to_string())? {
            let path = named(&entry.path)?;
            let hidden = path.file_name().and_then(|name| name.as_bytes().strip_prefix(b".wh."));
            match hidden {
                None => added.push((path, entry.kind)),
                Some(b".wh..opq") => self.empty(path.parent().unwrap_or(Path::new("")))?,
                Some(hidden) if hidden.starts_with(b".wh.") => {}
                Some(hidden) => {
                    let path = self.beside(&path, OsStr::from_bytes(hidden))?;
                    self.empty(&path)?;
                    self.0.remove(&path);
                }
            }
        }
        added.into_iter().try_for_each(|(path, kind)| self.add(&path, kind))
    }

    fn add(&mut self, path: &Path, kind: EntryKind) -> Result<(), String> {
        let Some(name) = path.file_name() else { return Ok(()) };
        let path = self.beside(path, name)?;
        let node = match kind {
            EntryKind::Directory => Node::Directory,
            EntryKind::Symlink(target) => Node::Link(OsString::from_vec(target).into()),
            EntryKind::HardLink(target) => self.get(&named(&target)?).cloned().unwrap_or(Node::Other),
            EntryKind::File
            | EntryKind::CharDevice { .. }
            | EntryKind::BlockDevice { .. }
            | EntryKind::Fifo => Node::Other,
        };
        // Parents that no layer lists are directories.
        for parent in path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()) {
            self.0.entry(parent.to_owned()).or_insert(Node::Directory);
        }
        if node != Node::Directory {
            self.empty(&path)?;
        }
        self.0.insert(path, node);
        Ok(())
    }

    /// The path of a name in the directory of `path`, whose links are followed.
    fn beside(&self, path: &Path, name: &OsStr) -> Result<PathBuf, String> {
        Ok(self.resolve(path.parent().unwrap_or(Path::new("")))?.join(name))
    }

    /// Removes all below a path.
    fn empty(&mut self, path: &Path) -> Result<(), String> {
        let path = self.beside(path, path.file_name().unwrap_or_default())?;
        // Paths are in the order of their components: what is below one follows it.
        let below = self.0.range(path.clone()..).skip_while(|(at, _)| **at == path);
        let below: Vec<_> =
            below.take_while(|(at, _)| at.starts_with(&path)).map(|(at, _)| at.clone()).collect();
        below.iter().for_each(|at| drop(self.0.remove(at)));
        Ok(())
    }
}

/// A name of a layer's tar. `..` takes the name before it away, as when the layer is converted.
fn named(path: &[u8]) -> Result<PathBuf, String> {
    let mut names = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(path)).components() {
        match component {
            Component::Normal(part) => names.push(part),
            Component::ParentDir if names.pop() => {}
            Component::ParentDir => {
                return Err(format!("{} climbs out with '..'", String::from_utf8_lossy(path)));
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(names)
}

/// Where a path leads if all links are followed as by chroot; `link` tells what a path links to.
pub(super) fn follow(path: &Path, link: impl Fn(&Path) -> Option<PathBuf>) -> Result<PathBuf, String> {
    let parts = |path: &Path| -> Vec<OsString> {
        let part = |component: Component<'_>| match component {
            Component::Normal(_) | Component::ParentDir => Some(component.as_os_str().to_owned()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        };
        path.components().rev().filter_map(part).collect()
    };
    let mut todo = parts(path);
    let (mut at, mut links) = (PathBuf::new(), 0);
    while let Some(part) = todo.pop() {
        if part == ".." {
            at.pop();
            continue;
        }
        let next = at.join(part);
        let Some(target) = link(&next) else {
            at = next;
            continue;
        };
        links += 1;
        if links > MAX_LINKS {
            return Err(format!("{} leads through more than {MAX_LINKS} links", path.display()));
        }
        if target.is_absolute() {
            at = PathBuf::new();
        }
        todo.extend(parts(&target));
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, kind, target) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_size(0);
            if kind.is_symlink() || kind.is_hard_link() {
                builder.append_link(&mut header, path, target).unwrap();
            } else {
                builder.append_data(&mut header, path, std::io::empty()).unwrap();
            }
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn layers_add_hide_and_replace() {
        use tar::EntryType::{Directory, Regular, Symlink};
        let mut tree = Tree::default();
        let first = [
            ("usr/bin/sh", Regular, ""),
            ("bin", Symlink, "usr/bin"),
            ("opt", Directory, ""),
            ("opt/old", Regular, ""),
            ("gone/a/b", Regular, ""),
            ("loop", Symlink, "loop"),
        ];
        tree.apply(&layer(&first)[..]).unwrap();
        assert!(tree.is_directory(Path::new("usr/bin")) && tree.is_directory(Path::new("")));
        assert_eq!(tree.resolve(Path::new("bin/new")).unwrap(), Path::new("usr/bin/new"));
        assert!(tree.resolve(Path::new("loop")).unwrap_err().contains("more than 40 links"));
        let second = [
            ("opt/.wh..wh..opq", Regular, ""),
            ("opt/new", Regular, ""),
            (".wh.gone", Regular, ""),
            ("bin/tool", Regular, ""),
            ("usr/bin/.wh.sh", Regular, ""),
        ];
        tree.apply(&layer(&second)[..]).unwrap();
        let has = |path: &str| tree.get(Path::new(path)).is_some();
        assert!(has("opt/new") && has("usr/bin/tool") && has("opt"));
        assert!(!has("opt/old") && !has("gone") && !has("gone/a/b") && !has("usr/bin/sh"));
    }

    #[test]
    fn links_are_followed_inside_the_root() {
        let link = |at: &Path| (at == Path::new("a")).then(|| PathBuf::from("../../etc/x"));
        assert_eq!(follow(Path::new("/a/../y"), link).unwrap(), Path::new("etc/y"));
    }
}
