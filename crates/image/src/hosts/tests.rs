use super::*;

fn parsed(text: &str, domain: &str) -> Vec<Host> {
    parse(text, Path::new("/certs.d/x/hosts.toml"), domain).unwrap_or_else(|e| panic!("{e}"))
}

fn origins(hosts: &[Host]) -> Vec<String> {
    hosts.iter().map(|h| format!("{}{}", h.origin(), h.path)).collect()
}

#[test]
fn mirrors_keep_the_order_of_the_file_and_the_server_comes_last() {
    let hosts = parsed(
        r#"
        server = "https://docker.io"
        [host."https://zzz.example"]
        [host."http://127.0.0.1:5000"]
        capabilities = ["pull"]
        [host."https://aaa.example/proxy"]
        "#,
        "docker.io",
    );
    let expected = [
        "https://zzz.example/v2",
        "http://127.0.0.1:5000/v2",
        "https://aaa.example/proxy/v2",
        "https://registry-1.docker.io/v2",
    ];
    assert_eq!(origins(&hosts), expected);
    assert_eq!((hosts[1].resolve, hosts[1].pull), (false, true));
    assert_eq!(hosts[0].namespace.as_deref(), Some("docker.io"));
    assert_eq!(hosts[3].namespace, None);
}

#[test]
fn override_path_takes_the_path_as_it_is() {
    let hosts = parsed(
        r#"
        [host."https://h.example/v2/prefix/"]
        override_path = true
        "#,
        "quay.io",
    );
    assert_eq!(origins(&hosts), ["https://h.example/v2/prefix", "https://quay.io/v2"]);
}

#[test]
fn tls_files_are_relative_to_the_directory_of_the_file() {
    let hosts = parsed(
        r#"
        server = "https://r.example"
        ca = "ca.pem"
        client = [["c.pem", "/k.pem"], ["both.pem", ""]]
        skip_verify = true
        dial_timeout = "1.5s"
        [header]
        x-one = "1"
        x-many = ["a", "b"]
        "#,
        "r.example",
    );
    let host = &hosts[0];
    assert_eq!(host.tls.ca, [PathBuf::from("/certs.d/x/ca.pem")]);
    let client = [
        (PathBuf::from("/certs.d/x/c.pem"), Some(PathBuf::from("/k.pem"))),
        (PathBuf::from("/certs.d/x/both.pem"), None),
    ];
    assert_eq!(host.tls.client, client);
    assert!(host.tls.skip_verify);
    assert_eq!(host.connect_timeout, Some(Duration::from_millis(1500)));
    assert_eq!(host.headers.len(), 3);
}

#[test]
fn this_machine_is_asked_over_plain_http_first() {
    let hosts = hosts_for("localhost:5000", &[]).unwrap();
    assert_eq!(origins(&hosts), ["http://localhost:5000/v2", "https://localhost:5000/v2"]);
    assert!(hosts[1].tls.skip_verify);
    for (authority, expected) in
        [("127.8.9.1:1", true), ("[::1]:5000", true), ("localhost.example", false), ("10.0.0.1", false)]
    {
        assert_eq!(is_loopback(authority), expected, "{authority}");
    }
}

#[test]
fn the_first_directory_that_exists_decides() {
    let certs = tempfile::tempdir().unwrap();
    let write = |name: &str, server: &str| {
        let directory = certs.path().join(name);
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("hosts.toml"), format!("server = {server:?}")).unwrap();
    };
    let dirs = [certs.path().join("missing"), certs.path().to_owned()];
    write("_default", "https://default.example");
    assert_eq!(hosts_for("r.example:5000", &dirs).unwrap()[0].authority, "default.example");
    write("r.example:5000", "https://colon.example");
    assert_eq!(hosts_for("r.example:5000", &dirs).unwrap()[0].authority, "colon.example");
    write("r.example_5000_", "https://underscore.example");
    assert_eq!(hosts_for("r.example:5000", &dirs).unwrap()[0].authority, "underscore.example");
}

#[test]
fn docker_style_certificates_are_taken_without_a_hosts_file() {
    let certs = tempfile::tempdir().unwrap();
    let directory = certs.path().join("r.example");
    std::fs::create_dir(&directory).unwrap();
    for name in ["ca.crt", "client.cert", "client.key", "readme.txt"] {
        std::fs::write(directory.join(name), "").unwrap();
    }
    let hosts = hosts_for("r.example", &[certs.path().to_owned()]).unwrap();
    assert_eq!(hosts[0].tls.ca, [directory.join("ca.crt")]);
    assert_eq!(hosts[0].tls.client, [(directory.join("client.cert"), Some(directory.join("client.key")))]);
    std::fs::remove_file(directory.join("client.key")).unwrap();
    let error = hosts_for("r.example", &[certs.path().to_owned()]).unwrap_err();
    assert!(matches!(error, HostsError::Certificate { .. }));
}

#[test]
fn a_wrong_value_names_file_and_key() {
    let text = "[host.\"https://m.example\"]\nskip_verify = \"yes\"";
    let error = parse(text, Path::new("/c/hosts.toml"), "x").unwrap_err().to_string();
    assert_eq!(error, r#"/c/hosts.toml: host."https://m.example".skip_verify must be true or false"#);
    assert!(matches!(parse("= 1", Path::new("/c"), "x"), Err(HostsError::Toml { .. })));
}
