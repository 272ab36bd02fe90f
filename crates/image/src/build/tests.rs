use super::*;

fn built(dockerfile: &str) -> (tempfile::TempDir, Result<Digest, BuildError>) {
    built_on(dockerfile, None)
}

fn built_on(dockerfile: &str, base: Option<PathBuf>) -> (tempfile::TempDir, Result<Digest, BuildError>) {
    let dir = tempfile::tempdir().unwrap();
    let context = dir.path().join("context");
    fs::create_dir_all(context.join("d")).unwrap();
    fs::write(context.join("d/f"), "hello").unwrap();
    fs::write(context.join("secret"), "no").unwrap();
    fs::write(context.join(".dockerignore"), "secret\n").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", context.join("d/link")).unwrap();
    std::os::unix::fs::symlink("/etc", context.join("out")).unwrap();
    std::os::unix::fs::symlink("/d/../d/f", context.join("in")).unwrap();
    fs::write(context.join("ten1"), "1").unwrap();
    fs::write(context.join("ten2"), "2").unwrap();
    fs::write(context.join("a.tgz"), archive()).unwrap();
    fs::write(context.join("a.xz"), b"\xfd7zXZ\0rest").unwrap();
    fs::write(context.join("fake.gz"), b"\x1f\x8bno").unwrap();
    fs::write(context.join(".wh.x"), "").unwrap();
    let file = dir.path().join("Dockerfile");
    fs::write(&file, dockerfile).unwrap();
    let names = vec!["docker.io/library/a:1".to_owned()];
    let request = BuildRequest { file, context, base, names, epoch: 7 };
    let output = dir.path().join("image");
    fs::create_dir(&output).unwrap();
    let result = build(&request, &output);
    (dir, result)
}

/// A gzipped tar with what only archives have.
fn archive() -> Vec<u8> {
    let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut tar = tar::Builder::new(gzip);
    let header = |kind, mode, size| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(3_000_000);
        header.set_gid(8);
        header.set_mtime(9);
        header.set_size(size);
        header
    };
    let mut directory = header(tar::EntryType::Directory, 0o700, 0);
    tar.append_data(&mut directory, "sub/", io::empty()).unwrap();
    tar.append_pax_extensions([("SCHILY.xattr.user.a", &b"v"[..])]).unwrap();
    tar.append_data(&mut header(tar::EntryType::Regular, 0o4755, 2), "sub/f", &b"hi"[..]).unwrap();
    tar.append_link(&mut header(tar::EntryType::Link, 0o4755, 0), "hard", "sub/f").unwrap();
    tar.into_inner().unwrap().finish().unwrap()
}

/// Path, type, mode, owner and link of the entries of an image's n-th layer.
fn entries(dir: &Path, manifest: &Digest, layer: usize) -> Vec<String> {
    let (_, manifest) = config(dir, manifest);
    let digest: Digest = manifest["layers"][layer]["digest"].as_str().unwrap().parse().unwrap();
    let blob = File::open(dir.join("image").join(blob_name(&digest))).unwrap();
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(blob));
    let shown = |entry: io::Result<tar::Entry<'_, _>>| {
        let mut entry = entry.unwrap();
        let pax = entry.pax_extensions().unwrap().map_or(0, Iterator::count);
        let header = entry.header();
        let (kind, mode) = (header.entry_type().as_byte() as char, header.mode().unwrap());
        let (uid, gid, mtime) = (header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap());
        let path = entry.path().unwrap().display().to_string();
        let link = entry.link_name().unwrap().map_or(String::new(), |link| format!(" -> {}", link.display()));
        let pax = if pax > 0 { format!(" +{pax}") } else { String::new() };
        format!("{path} {kind} {mode:o} {uid}:{gid} {mtime}{link}{pax}")
    };
    archive.entries().unwrap().map(shown).collect()
}

fn config(dir: &Path, manifest: &Digest) -> (Value, Value) {
    let read = |digest: &str| -> Value {
        let path = dir.join("image").join(blob_name(&digest.parse().unwrap()));
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    };
    let manifest = read(&manifest.to_string());
    (read(manifest["config"]["digest"].as_str().unwrap()), manifest)
}

const AGENT: &str = "FROM scratch\nLABEL a3s.agent.name=\"my agent\"\nENV A=1\nWORKDIR /srv\n\
    COPY --chown=5:6 --chmod=700 d app/\nENTRYPOINT [\"/srv/app/f\"]\nCMD x $A\n";

#[test]
fn the_same_context_gives_the_same_image() {
    let (dir, first) = built(AGENT);
    let (_other, second) = built(AGENT);
    let first = first.unwrap();
    assert_eq!(first, second.unwrap());
    let (config, manifest) = config(dir.path(), &first);
    assert_eq!(config["config"]["Labels"]["a3s.agent.name"], "my agent");
    assert_eq!(config["config"]["Cmd"], json!(["/bin/sh", "-c", "x $A"]));
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 1);
    let expected = [
        "srv 5 755 5:6 7",
        "srv/app 5 700 5:6 7",
        "srv/app/f 0 700 5:6 7",
        "srv/app/link 2 777 5:6 7 -> /etc/passwd",
    ];
    assert_eq!(entries(dir.path(), &first, 0), expected);
}

/// Regression: a file copied to `/dir` replaced the directory of the base by a file of that name.
#[test]
fn what_the_base_has_decides_where_a_copy_goes() {
    let (base, digest) = built("FROM scratch\nCOPY d/f /srv/x/\nCOPY d /usr/bin/\nCOPY d/f /file\n");
    digest.unwrap();
    let on_base =
        |lines: &str| built(&format!("FROM oci:{}\n{lines}\n", base.path().join("image").display()));
    for (copy, expected) in [
        // Into the directory, not over it.
        ("COPY --chmod=600 ten1 /srv", vec!["srv/ten1 0 600 0:0 7"]),
        ("COPY --chmod=600 ten1 /srv/x", vec!["srv/x/ten1 0 600 0:0 7"]),
        ("COPY --chmod=600 ten1 /srv/y", vec!["srv/y 0 600 0:0 7"]),
        ("COPY --chmod=600 ten1 /new/y", vec!["new 5 755 0:0 7", "new/y 0 600 0:0 7"]),
        ("COPY --chmod=600 ten1 /file", vec!["file 0 600 0:0 7"]),
        // A directory that is there keeps its attributes.
        ("COPY --chmod=600 d /srv", vec!["srv/f 0 600 0:0 7", "srv/link 2 777 0:0 7 -> /etc/passwd"]),
        ("COPY --chmod=600 ten? srv/", vec!["srv/ten1 0 600 0:0 7", "srv/ten2 0 600 0:0 7"]),
        ("COPY --chmod=600 ten[^1] srv", vec!["srv/ten2 0 600 0:0 7"]),
        // A link in the context leads to what is meant, inside the context, under its own name.
        ("COPY --chmod=600 in /srv/", vec!["srv/in 0 600 0:0 7"]),
    ] {
        let (dir, digest) = on_base(copy);
        let digest = digest.unwrap_or_else(|e| panic!("{copy}: {e}"));
        assert_eq!(entries(dir.path(), &digest, 3), expected, "{copy}");
    }
    for (copy, told) in [
        ("COPY d /file", "/file is no directory in the image"),
        ("COPY ten1 /file/", "/file is no directory in the image"),
        ("COPY ten1 ten2 /srv", "must end in a slash"),
        ("COPY ten* /srv", "must end in a slash"),
        ("COPY no* /srv/", "fits nothing"),
        ("COPY secre? /srv/", "fits nothing"),
    ] {
        let error = on_base(copy).1.unwrap_err().to_string();
        assert!(error.contains("Dockerfile:2: ") && error.contains(told), "{copy}: {error}");
    }
}

#[test]
fn links_of_the_base_are_followed_and_later_copies_see_earlier_ones() {
    let lower = tempfile::tempdir().unwrap();
    fs::create_dir_all(lower.path().join("usr/bin")).unwrap();
    std::os::unix::fs::symlink("usr/bin", lower.path().join("bin")).unwrap();
    let mut links = tar::Builder::new(Vec::new());
    links.follow_symlinks(false);
    links.append_dir_all("", lower.path()).unwrap();
    fs::write(lower.path().join("links.tar"), links.into_inner().unwrap()).unwrap();
    fs::write(lower.path().join("f"), "x").unwrap();
    let file = lower.path().join("Dockerfile");
    fs::write(&file, "FROM scratch\nADD links.tar /\nCOPY --chmod=644 f /bin\nCOPY --chmod=644 f /bin/f/\n")
        .unwrap();
    let context = lower.path().to_owned();
    let mut request = BuildRequest { file, context, base: None, names: Vec::new(), epoch: 7 };
    let output = tempfile::tempdir().unwrap();
    let error = build(&request, &output.path().join("image")).unwrap_err().to_string();
    assert!(error.contains("Dockerfile:4: /usr/bin/f is no directory in the image"), "{error}");
    request.file = lower.path().join("Second");
    fs::write(&request.file, "FROM scratch\nADD links.tar /\nCOPY --chmod=644 f /bin\n").unwrap();
    let output = tempfile::tempdir().unwrap();
    let digest = build(&request, &output.path().join("image")).unwrap();
    assert_eq!(entries(output.path(), &digest, 1), ["usr/bin/f 0 644 0:0 7"]);
}

#[test]
fn add_unpacks_archives_and_copies_what_is_none() {
    for (add, expected) in [
        (
            "ADD a.tgz /x",
            vec![
                "x 5 755 0:0 7",
                "x/sub 5 700 3000000:8 9",
                "x/sub/f 0 4755 3000000:8 9 +1",
                "x/hard 1 4755 3000000:8 9 -> x/sub/f",
            ],
        ),
        (
            "ADD --chown=5:6 a.tgz /",
            vec!["sub 5 700 5:6 9", "sub/f 0 4755 5:6 9 +1", "hard 1 4755 5:6 9 -> sub/f"],
        ),
        ("ADD --chmod=600 fake.gz ten1 /", vec!["fake.gz 0 600 0:0 7", "ten1 0 600 0:0 7"]),
        ("COPY --chmod=600 a.tgz /", vec!["a.tgz 0 600 0:0 7"]),
    ] {
        let (dir, digest) = built(&format!("FROM scratch\n{add}\n"));
        let digest = digest.unwrap_or_else(|e| panic!("{add}: {e}"));
        let strip = |entry: String| entry.replace("/ 5", " 5");
        let found: Vec<_> = entries(dir.path(), &digest, 0).into_iter().map(strip).collect();
        assert_eq!(found, expected, "{add}");
    }
}

#[test]
fn an_image_of_a_registry_is_a_base_as_an_archive() {
    let (base, digest) = built(AGENT);
    digest.unwrap();
    let path = base.path().join("base.tar");
    let mut tar = tar::Builder::new(File::create(&path).unwrap());
    tar.append_dir_all("", base.path().join("image")).unwrap();
    tar.into_inner().unwrap();
    let (dir, digest) = built_on("FROM busybox AS base\nENTRYPOINT [\"/x\"]\n", Some(path));
    let (config, manifest) = config(dir.path(), &digest.unwrap());
    assert_eq!(config["config"]["Labels"]["a3s.agent.name"], "my agent");
    // Arguments are for the program that they came with.
    assert_eq!((&config["config"]["Cmd"], &config["config"]["Entrypoint"]), (&Value::Null, &json!(["/x"])));
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 1);
    let file = |text: &str| {
        let path = dir.path().join("Dockerfile");
        fs::write(&path, text).unwrap();
        registry_base(&path).unwrap()
    };
    assert_eq!(file("# x\nFROM busybox:1 as base\n").as_deref(), Some("busybox:1"));
    assert_eq!([file("FROM scratch"), file("FROM oci:/x"), file("RUN x")], [None, None, None]);
}

#[test]
fn a_built_image_is_a_base() {
    let (base, digest) = built(AGENT);
    digest.unwrap();
    let from = format!("FROM oci:{}\nENV B=${{A}}2\nCOPY d /\n", base.path().join("image").display());
    let (dir, digest) = built(&from);
    let (config, manifest) = config(dir.path(), &digest.unwrap());
    assert_eq!(config["config"]["Env"], json!(["A=1", "B=12"]));
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 2);
}

#[test]
fn what_is_not_supported_is_told_with_its_line() {
    for (text, told) in [
        ("RUN make", "Dockerfile:2: RUN is not supported"),
        ("ADD https://example.org/a /", "download it first"),
        ("ADD a.xz /", "compressed with xz"),
        ("COPY <<EOF /x", "make it a file"),
        ("COPY .wh.x /", "hidden files"),
        ("ARG a", "ARG is not supported"),
        ("FROM scratch", "several stages"),
        ("COPY ../x /", "`..`"),
        ("COPY secret /", ".dockerignore"),
        ("COPY out/passwd /", "could not read etc/passwd in the context"),
        ("COPY --chown=bob d /", "--chown=UID:GID"),
        ("CMD [1]", "is not a list of strings"),
    ] {
        let error = built(&format!("FROM scratch\n{text}\n")).1.unwrap_err().to_string();
        assert!(error.contains(told), "{text}: {error}");
    }
    assert!(
        built("FROM docker-archive:/x").1.unwrap_err().to_string().contains("load another archive first")
    );
    assert!(built("").1.unwrap_err().to_string().contains("no FROM"));
}
