//! What a session sees of its image: layers of the share stacked, whose the root directory is, and the volumes that the
//! image declares. Needs root, loop devices, and mkfs.erofs (Debian's erofs-utils) to make layers.

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use a3s_box_agent::paths;
use a3s_box_protocol::proto::{CreateSessionRequest, IdRange, Rootfs, UserNamespace};
use common::{TestBox, image, in_a_box, shell, volume};
use rustix::fs::{CWD, FileType, Mode, XattrFlags};

/// Whether layers can be made here; a test that cannot says so and ends.
fn can_make_layers() -> bool {
    let found = Command::new("mkfs.erofs").arg("--version").output().is_ok();
    let mounted = fs::read_to_string("/proc/filesystems").is_ok_and(|all| all.contains("erofs"));
    let looped = Path::new("/dev/loop-control").exists();
    if !found || !mounted || !looped {
        eprintln!("SKIPPED: needs mkfs.erofs and a kernel with EROFS and loop devices");
    }
    found && mounted && looped
}

/// A directory that becomes a layer of the box's share.
struct Source(PathBuf);

impl Source {
    fn new(name: &str) -> Self {
        let path = Path::new("/run/sources").join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    fn directory(self, path: &str, mode: u32, owner: u32) -> Self {
        fs::create_dir_all(self.at(path)).unwrap();
        fs::set_permissions(self.at(path), fs::Permissions::from_mode(mode)).unwrap();
        chown(self.at(path), Some(owner), Some(owner)).unwrap();
        self
    }

    fn file(self, path: &str, content: &str) -> Self {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        fs::write(self.at(path), content).unwrap();
        self
    }

    /// As the host's converter marks a layer whose tar has an entry for the root.
    fn stating_its_root(self, mode: u32, owner: u32) -> Self {
        let mark = "trusted.overlay.a3s-root";
        rustix::fs::setxattr(&self.0, mark, b"y", XattrFlags::empty()).unwrap();
        self.directory("", mode, owner)
    }

    /// Puts it on the share. What the guest's kernel mounts as a file, this machine's may want as a device.
    fn layer(self) -> Loop {
        let name = self.0.file_name().unwrap();
        let file = self.0.with_extension("erofs");
        run(Command::new("mkfs.erofs").arg(&file).arg(&self.0));
        let device = run(Command::new("losetup").args(["--read-only", "--find", "--show"]).arg(&file));
        let place = Path::new(paths::IMAGES).join(name).with_extension("erofs");
        let _ = fs::remove_file(&place);
        symlink(device.trim(), place).unwrap();
        Loop(device.trim().to_owned())
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A loop device, until nobody uses it any more.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

fn with_layers(mut request: CreateSessionRequest, layers: &[&str]) -> CreateSessionRequest {
    let layers = layers.iter().map(|name| format!("{name}.erofs")).collect();
    request.rootfs = Some(Rootfs { layers, readonly: false });
    request
}

async fn map_users(b: &TestBox) {
    let range = Some(IdRange { start: 100_000, count: 65_536 });
    b.table.map_users(&UserNamespace { uids: range, gids: range }, &[], None).await.unwrap();
}

#[test]
fn an_image_that_has_one_layer_twice_runs() {
    // Overlayfs refused to take one directory twice: "Too many levels of symbolic links".
    if !can_make_layers() {
        return;
    }
    for mapped in [false, true] {
        in_a_box(|b| async move {
            let _a = Source::new("a").file("who", "a").file("only-a", "").layer();
            let _b = Source::new("b").file("who", "b").file("only-b", "").layer();
            if mapped {
                map_users(&b).await;
            }
            let script = "cat /who /model/who; ls -d /only-a /only-b /model/only-a";
            let mut request = with_layers(shell("twice", script), &["a", "b", "a", "a"]);
            request.mounts.push(image(&["b.erofs", "a.erofs", "b.erofs"], "", "/model"));
            request.mounts.push(image(&["a.erofs", "a.erofs"], "", "/again"));
            let seen = b.run(request).await;
            assert_eq!((seen.code, seen.stderr.as_str()), (0, ""));
            assert_eq!(seen.stdout, "ab/model/only-a\n/only-a\n/only-b\n");
        });
    }
}

#[test]
fn the_root_directory_is_whose_the_image_says() {
    // It belonged to root with mode 0755 whatever the image said: a user whose root it is could make nothing there.
    if !can_make_layers() {
        return;
    }
    for mapped in [false, true] {
        in_a_box(|b| async move {
            let _silent = Source::new("silent").file("x", "").layer();
            let _below = Source::new("below").stating_its_root(0o700, 7).layer();
            let _above = Source::new("above").stating_its_root(0o1750, 1000).layer();
            if mapped {
                map_users(&b).await;
            }
            let script = "ls -ldn /; ls -ldn /model";
            for (layers, shown) in [
                (&["silent", "below", "above", "silent"][..], "drwxr-x--T"),
                (&["above", "below"], "drwx------"),
                (&["silent"], "drwxr-xr-x"),
            ] {
                let mut request = with_layers(shell("root", script), layers);
                let names: Vec<String> = layers.iter().map(|name| format!("{name}.erofs")).collect();
                request.mounts.push(image(
                    &names.iter().map(String::as_str).collect::<Vec<_>>(),
                    "",
                    "/model",
                ));
                let seen = b.run(request).await;
                assert_eq!(seen.code, 0, "{}", seen.stderr);
                let owner = if shown.ends_with('T') {
                    "1000"
                } else if shown.ends_with('-') {
                    "7"
                } else {
                    "0"
                };
                for line in seen.stdout.lines() {
                    let words: Vec<&str> = line.split_whitespace().collect();
                    assert_eq!(
                        (words[0], words[2], words[3]),
                        (shown, owner, owner),
                        "{layers:?}: {}",
                        seen.stdout
                    );
                }
                assert_eq!(seen.stdout.lines().count(), 2);
            }
        });
    }
}

/// An image with one of everything below /data, which it declares as a volume.
fn image_with_data() -> Loop {
    let source = Source::new("data").directory("data", 0o2770, 1000).file("data/file", "from the image\n");
    fs::hard_link(source.at("data/file"), source.at("data/again")).unwrap();
    symlink("file", source.at("data/link")).unwrap();
    symlink("/nowhere", source.at("data/dangling")).unwrap();
    let source =
        source.directory("data/deep/er", 0o711, 2000).file("data/setuid", "#!").file("data/hole", "");
    chown(source.at("data/setuid"), Some(5), Some(6)).unwrap();
    fs::set_permissions(source.at("data/setuid"), fs::Permissions::from_mode(0o4755)).unwrap();
    rustix::fs::setxattr(source.at("data/setuid"), "trusted.note", b"kept", XattrFlags::empty()).unwrap();
    rustix::fs::mknodat(CWD, source.at("data/fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let hole = fs::File::create(source.at("data/hole")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&hole, b"end", 3 << 20).unwrap();
    // Links on the way to a volume, and a file where a directory should be.
    symlink("data", source.at("alias")).unwrap();
    source.file("plain", "").layer()
}

fn declaring(request: CreateSessionRequest, volumes: &[&str]) -> CreateSessionRequest {
    let mut request = with_layers(request, &["data"]);
    request.image_volumes = volumes.iter().map(|path| (*path).to_owned()).collect();
    request
}

#[test]
fn a_volume_that_the_image_declares_has_the_images_content_and_is_new_for_each_session() {
    // It was read and never used: with a read-only root nothing could be written there, and a directory that the image
    // lacks was not made.
    if !can_make_layers() {
        return;
    }
    for mapped in [false, true] {
        in_a_box(|b| async move {
            let _layer = image_with_data();
            if mapped {
                map_users(&b).await;
            }
            let script = "ls -ldn /data /data/deep/er /data/setuid; ls /data; cat /data/link; \
                echo changed > /data/again; cat /data/file; wc -c < /data/hole; touch /made/x && ls /made; \
                touch /elsewhere 2>&1; sleep 1000";
            for id in ["one", "two"] {
                let mut request = declaring(shell(id, script), &["/data", "/made"]);
                request.rootfs.as_mut().unwrap().readonly = true;
                // The mount points must be there before the root is sealed; nothing else is needed.
                b.table.create(request).await.unwrap();
                let place = paths::session_dir(id).join("volumes/0");
                let mut note = [0; 16];
                let count = rustix::fs::getxattr(place.join("setuid"), "trusted.note", &mut note).unwrap();
                assert_eq!(&note[..count], b"kept");
                let hole = fs::metadata(place.join("hole")).unwrap();
                assert!(std::os::unix::fs::MetadataExt::blocks(&hole) * 512 < 1 << 20, "{hole:?}");
                b.table.start(id).await.unwrap();
                let seen = b
                    .exec(
                        id,
                        &format!("{id}-until"),
                        common::process(&[
                            "sh",
                            "-c",
                            "until test -e /made/x; do sleep 0.05; done; sleep 0.2",
                        ]),
                    )
                    .await;
                assert_eq!(seen.code, 0, "{}", seen.stderr);
                b.table.signal(id, 9, true).unwrap();
                b.table.wait(id).await.unwrap();
                let stdout = b.read(id, "", common::Kind::Stdout).await;
                let lines: Vec<Vec<&str>> =
                    stdout.lines().map(|line| line.split_whitespace().collect()).collect();
                let owners = |line: usize| (lines[line][0], lines[line][2], lines[line][3]);
                assert_eq!(owners(0), ("drwxrws---", "1000", "1000"), "{stdout}");
                assert_eq!(owners(1), ("drwx--x--x", "2000", "2000"), "{stdout}");
                assert_eq!(owners(2), ("-rwsr-xr-x", "5", "6"), "{stdout}");
                let rest: Vec<String> = lines[3..].iter().map(|words| words.join(" ")).collect();
                let names = ["again", "dangling", "deep", "fifo", "file", "hole", "link", "setuid"];
                let after =
                    ["from the image", "changed", "3145731", "x", "touch: /elsewhere: Read-only file system"];
                assert_eq!(rest, [&names[..], &after].concat(), "{stdout}");
                b.table.delete(id).await.unwrap();
                assert!(!place.exists());
            }
        });
    }
}

#[test]
fn a_mount_takes_the_place_of_a_declared_volume_and_others_lie_above_and_below_it() {
    if !can_make_layers() {
        return;
    }
    in_a_box(|b| async move {
        let _layer = image_with_data();
        for name in ["own", "outer", "inner"] {
            let directory = Path::new(paths::VOLUMES).join(name);
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join(name), "").unwrap();
        }
        // By its own name, and by that of a link to it.
        for target in ["/data", "/data/", "/alias"] {
            let mut request = declaring(shell("own", "ls /data"), &["/data"]);
            request.mounts.push(volume("own", target));
            let seen = b.run(request).await;
            assert_eq!((seen.code, seen.stdout.as_str()), (0, "own\n"), "{target}: {}", seen.stderr);
        }
        let mut request = declaring(
            shell("nested", "ls /outer /outer/volume /data/deep; touch /outer/volume/x && ls /outer/volume"),
            &["/outer/volume", "/data"],
        );
        request.mounts.push(volume("outer", "/outer"));
        request.mounts.push(volume("inner", "/alias/deep"));
        let seen = b.run(request).await;
        let shown = "/data/deep:\ninner\n\n/outer:\nouter\nvolume\n\n/outer/volume:\nx\n";
        assert_eq!((seen.code, seen.stdout.as_str()), (0, shown), "{}", seen.stderr);
        assert!(!Path::new(paths::VOLUMES).join("outer/volume/x").exists());
    });
}

#[test]
fn declared_volumes_that_cannot_be_directories_of_the_session_are_left_out() {
    if !can_make_layers() {
        return;
    }
    in_a_box(|b| async move {
        let _layer = image_with_data();
        symlink("/proc", "/run/sources/data/to-proc").unwrap();
        let _with_a_link = Source::new("data").layer();
        let hostile =
            ["/", "/proc", "/proc/x", "/dev/../sys", "/to-proc/self", "/plain", "/plain/below", "/.."];
        let script = "test -e /proc/self/status && test -c /dev/null && test -f /plain && ls / | wc -l";
        let seen = b.run(declaring(shell("hostile", script), &hostile)).await;
        // alias, bin, data, dev, plain, proc, sys, to-proc
        assert_eq!((seen.code, seen.stdout.as_str()), (0, "8\n"), "{}", seen.stderr);
    });
}
