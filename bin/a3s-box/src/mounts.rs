//! `--volume`, `--mount` and `--tmpfs`, in docker's words.

use std::path::PathBuf;

use a3s_box_core::spec::{MountSource, MountSpec};
use anyhow::Context;

use crate::size::parse_bytes;

/// What is mounted, where and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    source: Source,
    target: String,
    readonly: bool,
    /// Of the mount: nosuid, nodev, noexec.
    options: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    /// A file or directory of the host. Whether it exists is seen later.
    Host(PathBuf),
    /// Memory of the box: so many bytes at most, 0 for half of the box's.
    Memory(u64),
}

impl Mount {
    /// Reads `SRC:DST[:OPTIONS]`.
    pub(crate) fn volume(text: &str) -> Result<Self, String> {
        let parts: Vec<_> = text.split(':').collect();
        let (source, target, options) = match parts[..] {
            [source, target] => (source, target, ""),
            [source, target, options] if !options.is_empty() => (source, target, options),
            _ => return Err(format!("{text:?} is not SRC:DST, SRC:DST:ro or SRC:DST:rw")),
        };
        if source.is_empty() {
            return Err(format!("{text:?} names no source"));
        }
        let mut mount = Self::new(Source::Host(source.into()), target)?;
        for option in options.split(',') {
            match option {
                "ro" => mount.readonly = true,
                // Labels of SELinux: the file server of a box needs none.
                "" | "rw" | "z" | "Z" => {}
                other => return Err(format!("{text:?}: {other:?} is none of ro, rw, z and Z")),
            }
        }
        Ok(mount)
    }

    /// Reads `DST[:OPTIONS]`.
    pub(crate) fn tmpfs(text: &str) -> Result<Self, String> {
        let (target, options) = text.split_once(':').unwrap_or((text, ""));
        let mut mount = Self::new(Source::Memory(0), target)?;
        // As docker mounts one.
        let mut executable = false;
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=').unwrap_or((option, "")) {
                ("ro", "") => mount.readonly = true,
                ("exec", "") => executable = true,
                ("rw" | "noexec" | "nosuid" | "nodev", "") => {}
                ("size", size) => mount.source = Source::Memory(parse_bytes(size)?),
                _ => return Err(format!("{text:?}: {option:?} is none of size=SIZE, ro, rw and exec")),
            }
        }
        mount.options = ["nosuid", "nodev"].map(str::to_owned).to_vec();
        if !executable {
            mount.options.push("noexec".to_owned());
        }
        Ok(mount)
    }

    /// Reads `type=bind|tmpfs,source=SRC,target=DST[,readonly][,tmpfs-size=SIZE]`, in any order.
    pub(crate) fn long(text: &str) -> Result<Self, String> {
        let (mut kind, mut source, mut target, mut size, mut readonly) = ("bind", None, None, 0, false);
        for word in text.split(',') {
            match word.split_once('=').unwrap_or((word, "")) {
                ("type", given) => kind = given,
                ("source" | "src", given) => source = Some(given).filter(|path| !path.is_empty()),
                ("target" | "destination" | "dst", given) => target = Some(given),
                ("readonly" | "ro", "" | "true" | "1") => readonly = true,
                ("readonly" | "ro", "false" | "0") => readonly = false,
                ("tmpfs-size", given) => size = parse_bytes(given)?,
                _ => {
                    return Err(format!(
                        "{text:?}: {word:?} is none of type, source, target, readonly and tmpfs-size"
                    ));
                }
            }
        }
        let source = match (kind, source) {
            ("bind", Some(path)) => Source::Host(path.into()),
            ("bind", None) => return Err(format!("{text:?} names no source")),
            ("tmpfs", None) => Source::Memory(size),
            ("tmpfs", Some(_)) => return Err(format!("{text:?}: memory has no source")),
            ("volume", _) => {
                return Err(
                    "there are no named volumes: give a directory of the host with type=bind".to_owned()
                );
            }
            (other, _) => return Err(format!("{text:?}: the type {other:?} is neither bind nor tmpfs")),
        };
        let target = target.ok_or_else(|| format!("{text:?} names no target"))?;
        Ok(Self { readonly, ..Self::new(source, target)? })
    }

    fn new(source: Source, target: &str) -> Result<Self, String> {
        if !target.starts_with('/') || target.split('/').any(|part| part == "..") {
            return Err(format!("the destination {target:?} must be an absolute path without .."));
        }
        Ok(Self { source, target: target.to_owned(), readonly: false, options: Vec::new() })
    }

    /// Whether it shows something of the host.
    pub(crate) fn is_host(&self) -> bool {
        matches!(self.source, Source::Host(_))
    }

    /// What the session is given.
    pub(crate) fn spec(&self) -> anyhow::Result<MountSpec> {
        let source = match &self.source {
            Source::Host(path) => MountSource::Host {
                path: std::fs::canonicalize(path).with_context(|| self.missing(path))?,
                propagate: false,
                // A user who says `ro` means all that is seen below DST, as with docker.
                recursive_readonly: self.readonly,
                id_mapped: None,
            },
            Source::Memory(size) => MountSource::Tmpfs { size: *size },
        };
        Ok(MountSpec {
            source,
            target: self.target.clone(),
            readonly: self.readonly,
            options: self.options.clone(),
        })
    }

    /// A bare word is a named volume to docker.
    fn missing(&self, path: &std::path::Path) -> String {
        let path = path.display().to_string();
        let hint = match path.contains(['/', '.']) {
            true => "",
            false => " (there are no named volumes: make a directory and name its path)",
        };
        format!("cannot use the volume source {path}{hint}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_resolved_on_the_host() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("link")).unwrap();
        let text = format!("{}/link:/data:ro", dir.path().display());
        let mount = Mount::volume(&text).unwrap().spec().unwrap();
        let source = MountSource::Host {
            path: dir.path().canonicalize().unwrap(),
            propagate: false,
            recursive_readonly: true,
            id_mapped: None,
        };
        assert_eq!(
            mount,
            MountSpec { source, target: "/data".to_owned(), readonly: true, options: Vec::new() }
        );
        let missing = Mount::volume("/nonexistent/x:/data").unwrap().spec().unwrap_err();
        assert_eq!(missing.to_string(), "cannot use the volume source /nonexistent/x");
    }

    /// `-v /:/host:ro` left everything writable that the host has mounted below `/`.
    #[test]
    fn a_volume_is_read_only_with_all_that_is_mounted_below_it() {
        let dir = tempfile::tempdir().unwrap();
        for (suffix, expected) in [(":ro", true), (":rw", false), ("", false), (":z", false), (":Z,ro", true)]
        {
            let text = format!("{}:/data{suffix}", dir.path().display());
            let mount = Mount::volume(&text).unwrap().spec().unwrap();
            let MountSource::Host { recursive_readonly, .. } = mount.source else { panic!("{mount:?}") };
            assert_eq!((mount.readonly, recursive_readonly), (expected, expected), "{text}");
        }
    }

    #[test]
    fn volumes_that_mean_nothing_are_refused() {
        for bad in ["/a", "/a:b", ":/b", "/a:/b:rx", "/a:/b/../c", "/a:/b:ro:z", "/a:/b:"] {
            assert!(Mount::volume(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn memory_is_mounted_as_docker_does() {
        let seen = |mount: Result<Mount, String>| {
            let spec = mount.unwrap().spec().unwrap();
            let MountSource::Tmpfs { size } = spec.source else { panic!("{spec:?}") };
            (spec.target, size, spec.readonly, spec.options.join(","))
        };
        let (plain, executable) = ("nosuid,nodev,noexec".to_owned(), "nosuid,nodev".to_owned());
        assert_eq!(seen(Mount::tmpfs("/run")), ("/run".to_owned(), 0, false, plain.clone()));
        assert_eq!(seen(Mount::tmpfs("/t:rw,size=64m")), ("/t".to_owned(), 64 << 20, false, plain));
        assert_eq!(seen(Mount::tmpfs("/t:exec,ro,size=4096")), ("/t".to_owned(), 4096, true, executable));
        assert_eq!(
            seen(Mount::long("type=tmpfs,dst=/t,tmpfs-size=1G")),
            ("/t".to_owned(), 1 << 30, false, String::new())
        );
        for bad in ["run", "/t:size=much", "/t:size=0", "/t:uid=0", "/t:size"] {
            assert!(Mount::tmpfs(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_long_form_says_the_same_in_any_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        let path = path.display();
        for (long, short) in [
            (format!("type=bind,source={path},target=/x"), format!("{path}:/x")),
            (format!("readonly,dst=/x,src={path}"), format!("{path}:/x:ro")),
        ] {
            assert_eq!(Mount::long(&long), Mount::volume(&short));
        }
        for bad in [
            "",
            "type=bind,target=/x",
            "src=/a",
            "type=volume,src=n,dst=/x",
            "type=tmpfs,src=/a,dst=/x",
            "src=/a,dst=x",
        ] {
            assert!(Mount::long(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_named_volume_is_told_from_a_path_that_is_missing() {
        let told = |text: &str| Mount::volume(text).unwrap().spec().unwrap_err().to_string();
        assert!(told("no-such-volume:/x").contains("named volumes"));
        assert!(!told("/no/such/path:/x").contains("named volumes"));
    }
}
