use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::*;

/// A `config.json` and helpers in a directory of their own.
struct Home(tempfile::TempDir);

impl Home {
    fn new(config: &str) -> Self {
        let home = Self(tempfile::tempdir().unwrap());
        std::fs::write(home.0.path().join("config.json"), config).unwrap();
        home
    }

    /// A helper that notes what it is asked, and its arguments.
    fn helper(self, name: &str, then: &str) -> Self {
        let path = self.0.path().join(format!("docker-credential-{name}"));
        let asked = self.0.path().join("asked");
        let script = format!(
            "#!/bin/sh\nPATH=/usr/bin:/bin\nserver=$(cat)\necho \"$* $server\" >> {}\n{then}\n",
            asked.display()
        );
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    fn login(&self) -> Login {
        let file = self.0.path().join("config.json");
        Login::Kept { file: Some(file), must_exist: false, helpers: self.0.path().into() }
    }

    async fn found(&self, image: &str) -> Option<RegistryAuth> {
        self.login().for_image(image).await.unwrap()
    }

    async fn refused(&self, image: &str) -> String {
        format!("{:#}", self.login().for_image(image).await.unwrap_err())
    }

    fn asked(&self) -> String {
        std::fs::read_to_string(self.0.path().join("asked")).unwrap_or_default()
    }
}

fn auth(text: &str, server: &str) -> Option<RegistryAuth> {
    Some(RegistryAuth { auth: text.into(), server_address: server.into(), ..RegistryAuth::default() })
}

#[tokio::test]
async fn entries_of_the_file_are_for_their_registry_however_it_is_written() {
    let home = Home::new(
        r#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "aHVi"},
            "r.example:5000": {"auth": "cG9ydA=="},
            "https://v2.example/v2/": {"auth": "djI="},
            "ns.example": {"auth": "aG9zdA=="},
            "ns.example/team": {"auth": "dGVhbQ=="},
            "elsewhere.example": {}
        }}"#,
    );
    let table = [
        ("busybox", Some(("aHVi", "docker.io"))),
        ("r.example:5000/a/b:1", Some(("cG9ydA==", "r.example:5000"))),
        ("r.example/a", None),
        ("v2.example/a", Some(("djI=", "v2.example"))),
        ("ns.example/team/app", Some(("dGVhbQ==", "ns.example"))),
        ("ns.example/teams/app", Some(("aG9zdA==", "ns.example"))),
        ("elsewhere.example/a", None),
        ("oci:/x", None),
    ];
    for (image, expected) in table {
        let expected = expected.and_then(|(text, server)| auth(text, server));
        assert!(home.found(image).await == expected, "{image}");
    }
}

#[tokio::test]
async fn identity_tokens_of_the_file_are_kept_apart_from_passwords() {
    let home = Home::new(r#"{"auths": {"r.example": {"auth": "MDo=", "identitytoken": "refresh"}}}"#);
    let found = home.found("r.example/x").await.unwrap();
    assert_eq!((found.auth.as_str(), found.identity_token.as_str()), ("MDo=", "refresh"));
}

#[tokio::test]
async fn a_helper_is_asked_for_its_registry_and_the_store_for_the_others() {
    let home = Home::new(
        r#"{"credsStore": "all", "credHelpers": {"special.example": "one"},
            "auths": {"special.example": {}, "file.example": {"auth": "ZmlsZQ=="}}}"#,
    )
    .helper("one", r#"echo '{"ServerURL":"x","Username":"alice","Secret":"s3cret"}'"#)
    .helper(
        "all",
        r#"case $server in
        https://index.docker.io/v1/) echo '{"Username":"<token>","Secret":"refresh"}' ;;
        *) echo "credentials not found in native keychain"; exit 1 ;;
        esac"#,
    );
    let found = home.found("special.example/x").await.unwrap();
    assert_eq!((found.username.as_str(), found.password.as_str()), ("alice", "s3cret"));
    assert_eq!(found.server_address, "special.example");
    let found = home.found("busybox").await.unwrap();
    assert_eq!((found.identity_token.as_str(), found.username.as_str()), ("refresh", ""));
    assert!(home.found("file.example/x").await == auth("ZmlsZQ==", "file.example"));
    assert!(home.found("unknown.example/x").await.is_none());
    let asked =
        "get special.example\nget https://index.docker.io/v1/\nget file.example\nget unknown.example\n";
    assert_eq!(home.asked(), asked);
}

#[tokio::test]
async fn what_fails_is_named_and_its_secrets_are_not() {
    let failing = Home::new(r#"{"credsStore": "bad"}"#).helper("bad", "echo s3cret; exit 3");
    let message = failing.refused("r.example/x").await;
    assert!(message.contains("docker-credential-bad") && message.contains("exit status: 3"), "{message}");
    let garbled = Home::new(r#"{"credsStore": "bad"}"#).helper("bad", "echo '{\"Secret\":\"s3cret\"}'");
    let none = Home::new(r#"{"credsStore": "missing"}"#);
    let climbing = Home::new(r#"{"credsStore": "../../bin/sh"}"#);
    let broken = Home::new(r#"{"auths": {"r.example": {"auth": s3cret"#);
    for (home, part) in [
        (&failing, "try it by hand"),
        (&garbled, "no credentials that can be read"),
        (&none, "could not start docker-credential-missing"),
        (&climbing, "which is no program's name"),
        (&broken, "is not a docker configuration"),
    ] {
        let message = home.refused("r.example/x").await;
        assert!(message.contains(part), "{part:?} is not in {message}");
        assert!(!message.contains("s3cret"), "{message}");
    }
}

#[tokio::test]
async fn a_helper_that_never_stops_writing_is_cut_off() {
    let home = Home::new(r#"{"credsStore": "endless"}"#).helper("endless", "exec cat /dev/zero");
    assert!(home.refused("r.example/x").await.contains("docker-credential-endless"));
}

#[tokio::test]
async fn a_missing_file_is_no_error_unless_the_user_named_it() {
    for must_exist in [false, true] {
        let file = Some(Path::new("/nonexistent/config.json").to_owned());
        let login = Login::Kept { file, must_exist, helpers: OsString::new() };
        match login.for_image("x").await {
            Ok(found) => assert!(!must_exist && found.is_none()),
            Err(error) => assert!(must_exist && error.to_string().contains("/nonexistent"), "{error}"),
        }
    }
}

#[test]
fn a_password_loses_its_line_end_only() {
    assert_eq!(password(&b"p w\n\n"[..]).unwrap(), "p w\n");
    assert_eq!(password(&b"pw\r\n"[..]).unwrap(), "pw");
    for bad in [&b""[..], b"\n", &[b'x'; 70_000], b"s3cret\xff"] {
        let message = format!("{:#}", password(bad).unwrap_err());
        assert!(message.contains("stdin") && !message.contains("s3cret"), "{message}");
    }
}

#[test]
fn nulls_in_the_configuration_are_nothing() {
    // One entry without a value made all credentials of the file unusable.
    let text = r#"{"auths":{"a.example":null,"b.example":{"auth":"eDp5","username":null,"identitytoken":null}},
        "credsStore":null,"credHelpers":{"c.example":null}}"#;
    let config: DockerConfig = serde_json::from_str(text).unwrap();
    assert_eq!(
        (config.auths["b.example"].auth.as_str(), config.auths["a.example"].auth.as_str()),
        ("eDp5", "")
    );
    let config: DockerConfig = serde_json::from_str(r#"{"auths":null,"credHelpers":null}"#).unwrap();
    assert!(config.auths.is_empty() && config.helpers.is_empty());
}
