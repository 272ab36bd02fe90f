//! Images in files of this machine.

use std::fs;
use std::path::{Path, PathBuf};

use a3s_box_image::{ErrorKind, Limits, archived_images, decompress_archive};

use crate::common::{Fixture, Image, Layer, gzip, tar};

fn image(content: &[u8]) -> Image {
    Image::new(&[Layer::gzip(tar(&[("a", content)])), Layer::gzip(tar(&[("b", content)]))])
}

/// An OCI layout of some images by name.
fn layout(directory: &Path, images: &[(&str, &Image)]) -> PathBuf {
    let path = directory.join("layout");
    let blobs = path.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let mut entries = Vec::new();
    for (name, image) in images {
        for (digest, bytes) in &image.blobs {
            fs::write(blobs.join(digest.strip_prefix("sha256:").unwrap()), bytes).unwrap();
        }
        fs::write(blobs.join(image.manifest_digest.hex()), &image.manifest).unwrap();
        entries.push(serde_json::json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": image.manifest_digest.to_string(), "size": image.manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": name},
        }));
    }
    let index = serde_json::json!({"schemaVersion": 2, "manifests": entries});
    fs::write(path.join("index.json"), index.to_string()).unwrap();
    path
}

/// A docker archive of one image, whose second layer is a link to its first where `shared`.
fn docker_archive(directory: &Path, shared: bool) -> (PathBuf, Vec<u8>) {
    let layer = tar(&[("a", b"docker")]);
    let diff_id = a3s_box_image::digest::Digest::sha256(&layer).to_string();
    let diff_ids = vec![diff_id; if shared { 2 } else { 1 }];
    let config =
        serde_json::json!({"config": null, "rootfs": {"type": "layers", "diff_ids": diff_ids}}).to_string();
    let layers = if shared { vec!["one/layer.tar", "two/layer.tar"] } else { vec!["one/layer.tar"] };
    let manifest =
        serde_json::json!([{"Config": "c.json", "RepoTags": ["team/app:1"], "Layers": layers}]).to_string();
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in
        [("./c.json", config.as_bytes()), ("manifest.json", manifest.as_bytes()), ("one/layer.tar", &layer)]
    {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_cksum();
        builder.append_data(&mut header, name, bytes).unwrap();
    }
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    builder.append_link(&mut link, "two/layer.tar", "../one/layer.tar").unwrap();
    let bytes = builder.into_inner().unwrap();
    let path = directory.join("docker.tar");
    fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

#[tokio::test]
async fn a_layouts_images_are_chosen_by_name() {
    let fixture = Fixture::new();
    let (one, two) = (image(b"1"), image(b"2"));
    let path = layout(fixture.directory.path(), &[("one", &one), ("registry.example/two:2", &two)]);
    let reference = |name: &str| format!("oci:{}{name}", path.display());
    let record = fixture.store.pull(&reference(":one"), None, None).await.unwrap();
    assert_eq!((record.id.clone(), record.repo_tags.len()), (one.id.to_string(), 0));
    assert_eq!(fixture.store.find(&reference(":one")).unwrap(), Some(record));
    let record = fixture.store.pull(&reference(":registry.example/two:2"), None, None).await.unwrap();
    assert_eq!(record.repo_tags, ["registry.example/two:2"]);
    assert!(fixture.store.find("registry.example/two:2").unwrap().is_some());

    let ambiguous = fixture.store.pull(&reference(""), None, None).await.unwrap_err();
    assert_eq!(ambiguous.kind(), ErrorKind::InvalidReference);
    assert!(ambiguous.to_string().contains("one, registry.example/two:2"), "{ambiguous}");
    let missing = fixture.store.pull(&reference(":three"), None, None).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    fixture.assert_tmp_is_empty().await;
}

#[tokio::test]
async fn an_archive_of_a_layout_gives_the_same_image() {
    let fixture = Fixture::new();
    let one = image(b"1");
    let path = layout(fixture.directory.path(), &[("one", &one)]);
    let archive = fixture.directory.path().join("layout.tar");
    let mut builder = tar::Builder::new(fs::File::create(&archive).unwrap());
    builder.append_dir_all(".", &path).unwrap();
    builder.finish().unwrap();
    let record = fixture.store.pull(&format!("oci-archive:{}", archive.display()), None, None).await.unwrap();
    assert_eq!(record.id, one.id.to_string());
    assert_eq!(record.layers.len(), 2);
}

#[tokio::test]
async fn a_docker_archive_keeps_its_tags_and_follows_links_between_layers() {
    let fixture = Fixture::new();
    let (path, _) = docker_archive(fixture.directory.path(), true);
    let reference = format!("docker-archive:{}:team/app:1", path.display());
    let record = fixture.store.pull(&reference, None, None).await.unwrap();
    assert_eq!(record.repo_tags, ["docker.io/team/app:1"]);
    assert_eq!(record.layers.len(), 2);
    assert_eq!(record.layers[0].file, record.layers[1].file);
    assert_eq!(fixture.store.resolve("team/app:1").unwrap().digest_ref, record.id);
    fixture.store.remove("team/app:1").await.unwrap();
    assert!(fixture.store.list().is_empty());
}

#[tokio::test]
async fn local_images_that_are_broken_say_how() {
    let fixture = Fixture::new();
    let directory = fixture.directory.path();
    let one = image(b"1");
    let path = layout(directory, &[("one", &one)]);
    let layer = one.blobs.keys().find(|digest| **digest != one.id.to_string()).unwrap();
    fs::write(path.join("blobs").join(layer.replacen(':', "/", 1)), b"other bytes").unwrap();
    let (_, archive) = docker_archive(directory, false);
    fs::write(directory.join("compressed.tar"), gzip(&archive)).unwrap();
    fs::write(directory.join("cut.tar"), &archive[..520]).unwrap();
    fs::write(directory.join("none.tar"), tar(&[("x", b"")])).unwrap();
    let shown = directory.display();
    let table = [
        (format!("oci:{shown}/layout"), ErrorKind::Corrupt, "bytes instead of"),
        (format!("oci:{shown}/missing"), ErrorKind::NotFound, "index.json"),
        (format!("docker-archive:{shown}/missing"), ErrorKind::NotFound, "could not read"),
        (format!("docker-archive:{shown}/compressed.tar"), ErrorKind::Unsupported, "compressed as a whole"),
        (format!("docker-archive:{shown}/cut.tar"), ErrorKind::Corrupt, "ends in the middle"),
        (format!("docker-archive:{shown}/none.tar"), ErrorKind::Corrupt, "no manifest.json"),
        (format!("docker-archive:{shown}/docker.tar:other:2"), ErrorKind::NotFound, "team/app:1"),
    ];
    for (reference, kind, part) in table {
        let error = fixture.store.pull(&reference, None, None).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(part), "{part:?} is not in: {error}");
    }
    fixture.assert_tmp_is_empty().await;
    assert!(fixture.store.list().is_empty());
}

fn pack(path: &Path, files: &[(String, Vec<u8>)]) {
    let mut builder = tar::Builder::new(fs::File::create(path).unwrap());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_cksum();
        builder.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    builder.finish().unwrap();
}

/// What `docker save` writes of some images with their tags; from version 25 on it is a layout as well.
fn saved(path: &Path, images: &[(&[&str], &Image)], layout: bool) {
    let mut files = Vec::new();
    let (mut docker, mut oci) = (Vec::new(), Vec::new());
    for (tags, image) in images {
        let blob = |digest: &str| format!("blobs/{}", digest.replacen(':', "/", 1));
        files.extend(image.blobs.iter().map(|(digest, bytes)| (blob(digest), bytes.clone())));
        files.push((blob(&image.manifest_digest.to_string()), image.manifest.clone()));
        let manifest: serde_json::Value = serde_json::from_slice(&image.manifest).unwrap();
        let layers = manifest["layers"].as_array().unwrap().iter();
        let layers: Vec<_> = layers.map(|layer| blob(layer["digest"].as_str().unwrap())).collect();
        docker.push(
            serde_json::json!({"Config": blob(&image.id.to_string()), "RepoTags": tags, "Layers": layers}),
        );
        for tag in *tags {
            oci.push(serde_json::json!({
                "digest": image.manifest_digest.to_string(), "size": image.manifest.len(),
                "annotations": {
                    "io.containerd.image.name": format!("docker.io/library/{tag}"),
                    "org.opencontainers.image.ref.name": tag.split_once(':').unwrap().1,
                },
            }));
        }
    }
    files.push(("manifest.json".to_owned(), serde_json::Value::from(docker).to_string().into_bytes()));
    if layout {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": oci});
        files.push(("index.json".to_owned(), index.to_string().into_bytes()));
    }
    pack(path, &files);
}

#[tokio::test]
async fn all_images_of_an_archive_are_found_with_all_their_tags() {
    // An archive of two images was refused, and there was no way to name one that has no tag, or of two with one tag.
    let (one, two) = (image(b"1"), image(b"2"));
    for layout in [false, true] {
        let fixture = Fixture::new();
        let path = fixture.directory.path().join("several.tar");
        let mut images = vec![(&["one:1", "same:latest"][..], &one), (&["two:latest"], &two)];
        let untagged = image(b"3");
        if !layout {
            images.push((&[], &untagged));
        }
        saved(&path, &images, layout);
        for archived in archived_images(&path, &Limits::default()).unwrap() {
            let record = fixture.store.pull(&archived.source, None, None).await.unwrap();
            assert!(
                archived.tags.iter().all(|tag| record.repo_tags.contains(tag)),
                "{archived:?} {record:?}"
            );
        }
        let tags = |id: &str| fixture.store.find(id).unwrap().unwrap().repo_tags;
        let normal =
            |names: &[&str]| names.iter().map(|n| format!("docker.io/library/{n}")).collect::<Vec<_>>();
        assert_eq!(tags(&one.id.to_string()), normal(&["one:1", "same:latest"]), "layout: {layout}");
        assert_eq!(tags(&two.id.to_string()), normal(&["two:latest"]), "layout: {layout}");
        assert_eq!(fixture.store.list().len(), images.len());
        let beyond = format!("{}-archive:{}:@9", if layout { "oci" } else { "docker" }, path.display());
        assert_eq!(fixture.store.pull(&beyond, None, None).await.unwrap_err().kind(), ErrorKind::NotFound);
    }
}

#[test]
fn an_archive_that_is_compressed_as_a_whole_is_unpacked_or_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("archive");
    let plain = tar(&[("x", &[7; 5000])]);
    let unpacked = |bytes: &[u8], limit| {
        fs::write(&path, bytes).unwrap();
        decompress_archive(&path, limit).map(|file| file.map(|file| fs::read(file.path()).unwrap()))
    };
    let (gz, zst) = (gzip(&plain), zstd::encode_all(&plain[..], 3).unwrap());
    assert_eq!(unpacked(&plain, 1 << 20).unwrap(), None);
    assert_eq!(unpacked(&gz, 1 << 20).unwrap().as_ref(), Some(&plain));
    assert_eq!(unpacked(&zst, plain.len() as u64).unwrap().as_ref(), Some(&plain));
    for (bytes, limit, kind, part) in [
        (&gz[..], plain.len() as u64 - 1, ErrorKind::Unsupported, "more than the limit"),
        (&gz[..30], 1 << 20, ErrorKind::Corrupt, "could not be decompressed"),
        (b"\xfd7zXZ\0\0\x04rest", 1 << 20, ErrorKind::Unsupported, "compressed with xz"),
        (b"BZh91AY&SYrest", 1 << 20, ErrorKind::Unsupported, "compressed with bzip2"),
    ] {
        let error = unpacked(bytes, limit).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(part), "{error}");
    }
    fs::write(&path, tar(&[("BZhome", b"")])).unwrap();
    assert!(decompress_archive(&path, 1).unwrap().is_none(), "a name is no magic");
    let error = archived_images(&path, &Limits::default()).unwrap_err();
    assert!(error.to_string().contains("neither an OCI archive"), "{error}");
}
