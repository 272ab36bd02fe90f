use super::*;

fn digest(byte: char) -> String {
    format!("sha256:{}", String::from(byte).repeat(64))
}

fn linux(architecture: &str) -> Platform {
    Platform { os: "linux".into(), architecture: architecture.into(), variant: String::new() }
}

fn index(entries: &[(char, &str)]) -> Index {
    let entries: Vec<_> = entries
        .iter()
        .map(|(byte, platform)| format!(r#"{{"digest":"{}","size":1{platform}}}"#, digest(*byte)))
        .collect();
    let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
    match parse(text.as_bytes()).unwrap() {
        Document::Index(index) => index,
        Document::Manifest(_) => panic!("an index was read as a manifest"),
    }
}

fn manifest(layer_type: &str) -> Result<Document, ManifestError> {
    let text = format!(
        r#"{{"schemaVersion":2,"config":{{"digest":"{}","size":7}},"layers":[{{"mediaType":"{layer_type}","digest":"{}","size":9}}]}}"#,
        digest('a'),
        digest('b')
    );
    parse(text.as_bytes())
}

#[test]
fn the_baseline_variant_of_this_platform_is_chosen() {
    let index = index(&[
        ('1', r#","platform":{"os":"linux","architecture":"arm64","variant":"v8"}"#),
        ('2', r#","platform":{"os":"linux","architecture":"amd64","variant":"v3"}"#),
        ('3', r#","platform":{"os":"linux","architecture":"amd64"}"#),
        ('4', r#","platform":{"os":"unknown","architecture":"unknown"}"#),
    ]);
    assert_eq!(index.choose(&linux("amd64")).unwrap().digest.to_string(), digest('3'));
    assert_eq!(index.choose(&linux("arm64")).unwrap().digest.to_string(), digest('1'));
    let error = index.choose(&linux("riscv64")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("linux/arm64/v8"), "{error}");
}

#[test]
fn an_index_with_one_entry_need_not_name_its_platform() {
    assert_eq!(index(&[('5', "")]).choose(&linux("amd64")).unwrap().digest.to_string(), digest('5'));
    assert!(index(&[('5', ""), ('6', "")]).choose(&linux("amd64")).is_err());
    // An artifact of this platform is not run, whatever else there is.
    let only = index(&[('7', r#","artifactType":"x/y","platform":{"os":"linux","architecture":"amd64"}"#)]);
    assert!(only.choose(&linux("amd64")).is_err());
}

#[test]
fn schema_1_and_foreign_and_unknown_layers_are_refused_by_name() {
    assert!(matches!(parse(br#"{"schemaVersion":1,"fsLayers":[]}"#), Err(ManifestError::Schema1)));
    for media_type in [
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    ] {
        assert!(matches!(manifest(media_type), Err(ManifestError::Foreign { .. })), "{media_type}");
    }
    for media_type in ["application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "text/plain", ""] {
        assert!(matches!(manifest(media_type), Err(ManifestError::LayerType { .. })), "{media_type}");
    }
    for media_type in [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
    ] {
        assert!(manifest(media_type).is_ok(), "{media_type}");
    }
}

#[test]
fn a_document_that_could_be_read_two_ways_is_refused() {
    let text = format!(r#"{{"manifests":[],"config":{{"digest":"{}","size":1}}}}"#, digest('a'));
    assert!(matches!(parse(text.as_bytes()), Err(ManifestError::NotAnImage { .. })));
    assert!(matches!(parse(b"{}"), Err(ManifestError::NotAnImage { .. })));
    assert!(matches!(parse(b"<html>"), Err(ManifestError::Json { .. })));
}

#[test]
fn a_config_with_nulls_is_read_and_the_layers_are_counted() {
    let text = format!(
        r#"{{"os":"linux","architecture":"amd64","config":{{"Env":null,"Cmd":["sh"],"Volumes":{{"/v":{{}}}},"User":"1:2"}},"rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
        digest('c')
    );
    let config = parse_config(text.as_bytes(), 1, &linux("amd64")).unwrap();
    assert_eq!((config.run.cmd, config.run.volumes), (vec!["sh".to_owned()], vec!["/v".to_owned()]));
    assert!(matches!(
        parse_config(text.as_bytes(), 2, &linux("amd64")),
        Err(ManifestError::LayerCount { layers: 2, diff_ids: 1 })
    ));
    assert!(matches!(parse_config(text.as_bytes(), 1, &linux("arm64")), Err(ManifestError::Platform { .. })));
}

#[test]
fn nulls_are_nothing_wherever_they_stand() {
    // One label without a value made an image unusable that runs everywhere else.
    let text = format!(
        r#"{{"os":"linux","architecture":"amd64","variant":null,"created":null,"config":{{
            "User":null,"ExposedPorts":{{"80/tcp":null}},"Env":["A=1",null],"Entrypoint":null,"Cmd":null,
            "Volumes":{{"/v":null}},"WorkingDir":null,"Labels":{{"a":null,"b":"c"}},"StopSignal":null
        }},"rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
        digest('c')
    );
    let run = parse_config(text.as_bytes(), 1, &linux("amd64")).unwrap().run;
    let labels = [("a", ""), ("b", "c")].map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(run.labels, BTreeMap::from(labels));
    assert_eq!((run.env, run.volumes), (vec!["A=1".to_owned(), String::new()], vec!["/v".to_owned()]));
    for text in [r#"{"rootfs":null,"config":null}"#, r#"{"os":null,"architecture":null}"#, "{}"] {
        parse_config(text.as_bytes(), 0, &linux("amd64")).unwrap_or_else(|error| panic!("{text}: {error}"));
    }
    let text = format!(
        r#"{{"schemaVersion":2,"annotations":{{"a":null}},"config":{{"mediaType":null,"digest":"{}","size":7,
            "platform":null,"annotations":null}},"layers":null,"manifests":null}}"#,
        digest('a')
    );
    let Document::Manifest(manifest) = parse(text.as_bytes()).unwrap() else { panic!("no manifest") };
    assert_eq!((manifest.layers.len(), manifest.annotations["a"].as_str()), (0, ""));
}
