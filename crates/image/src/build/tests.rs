use super::*;

fn built(dockerfile: &str) -> (tempfile::TempDir, Result<Digest, BuildError>) {
    let dir = tempfile::tempdir().unwrap();
    let context = dir.path().join("context");
    fs::create_dir_all(context.join("d")).unwrap();
    fs::write(context.join("d/f"), "hello").unwrap();
    fs::write(context.join("secret"), "no").unwrap();
    fs::write(context.join(".dockerignore"), "secret\n").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", context.join("d/link")).unwrap();
    std::os::unix::fs::symlink("/etc", context.join("out")).unwrap();
    let file = dir.path().join("Dockerfile");
    fs::write(&file, dockerfile).unwrap();
    let request = BuildRequest { file, context, names: vec!["docker.io/library/a:1".to_owned()], epoch: 7 };
    let output = dir.path().join("image");
    fs::create_dir(&output).unwrap();
    let result = build(&request, &output);
    (dir, result)
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
    COPY --chown=5:6 --chmod=700 d/f d/link app/\nENTRYPOINT [\"/srv/app/f\"]\nCMD x $A\n";

#[test]
fn the_same_context_gives_the_same_image() {
    let (dir, first) = built(AGENT);
    let (_other, second) = built(AGENT);
    let first = first.unwrap();
    assert_eq!(first, second.unwrap());
    let (config, manifest) = config(dir.path(), &first);
    assert_eq!(config["config"]["Labels"]["a3s.agent.name"], "my agent");
    assert_eq!(config["config"]["Cmd"], json!(["/bin/sh", "-c", "x $A"]));
    let digest: Digest = manifest["layers"][0]["digest"].as_str().unwrap().parse().unwrap();
    let blob = File::open(dir.path().join("image").join(blob_name(&digest))).unwrap();
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(blob));
    let mut entries = archive.entries().unwrap().map(Result::unwrap);
    let file = entries.next().unwrap();
    let header = file.header();
    assert_eq!(file.path().unwrap(), Path::new("srv/app/f"));
    assert_eq!((header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap()), (5, 6, 7));
    assert_eq!(header.mode().unwrap(), 0o700);
    let link = entries.next().unwrap();
    assert_eq!(link.link_name().unwrap().unwrap(), Path::new("/etc/passwd"));
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
        ("ADD a /", "use COPY"),
        ("ARG a", "ARG is not supported"),
        ("FROM scratch", "several stages"),
        ("COPY ../x /", "`..`"),
        ("COPY secret /", ".dockerignore"),
        ("COPY out/passwd /", "leads through a link"),
        ("COPY --chown=bob d /", "--chown=UID:GID"),
        ("COPY d/* /", "is a pattern"),
        ("CMD [1]", "is not a list of strings"),
    ] {
        let error = built(&format!("FROM scratch\n{text}\n")).1.unwrap_err().to_string();
        assert!(error.contains(told), "{text}: {error}");
    }
    assert!(built("FROM busybox").1.unwrap_err().to_string().contains("skopeo"));
    assert!(built("").1.unwrap_err().to_string().contains("no FROM"));
}
