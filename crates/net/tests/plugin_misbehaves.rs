//! Plugins that answer wrongly: every error names the plugin and has its words.

mod common;

use std::time::{Duration, Instant};

use a3s_box_net::cni::{AddError, Chain, CniResult, PluginError, conf};
use a3s_box_net::cni::{Attachment, result::ResultError};
use common::{Site, box_id, chain};

async fn add(does: &str) -> Result<CniResult, AddError> {
    let site = Site::new();
    site.plugin("fake", does);
    add_on(&site).await
}

async fn add_on(site: &Site) -> Result<CniResult, AddError> {
    site.conflist(r#"{ "cniVersion": "1.0.0", "name": "test", "plugins": [{ "type": "fake" }] }"#);
    let list = conf::discover(&site.config.conf_dir).unwrap();
    let chain = Chain { list: &list, bin_dirs: &site.config.bin_dirs, limit: Duration::from_secs(20) };
    chain.add(&Attachment::anonymous(&box_id(1), "/nowhere".into())).await
}

async fn refusal(does: &str) -> (PluginError, String) {
    let error = add(does).await.unwrap_err();
    let text = chain(&error);
    match error {
        AddError::Plugin { source, .. } => (*source, text),
        other @ AddError::NoAddress { .. } => panic!("{other}"),
    }
}

#[tokio::test]
async fn an_error_in_json_is_told_with_its_code_details_and_stderr() {
    let (error, text) = refusal(
        r#"echo '{ "cniVersion": "1.0.0", "code": 11, "msg": "no addresses left", "details": "range 10.0.0.0/30" }'
           echo "ipam: store is full" >&2; exit 1"#,
    )
    .await;
    assert!(matches!(error, PluginError::Refused { code: 11, .. }), "{error:?}");
    for part in ["\"test\"", "\"fake\"", "ADD", "no addresses left: range 10.0.0.0/30", "ipam: store is full"]
    {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[tokio::test]
async fn an_exit_code_without_json_is_told_with_stderr_or_else_with_stdout() {
    let (error, text) = refusal("echo some noise; echo 'panic: nil pointer' >&2; exit 2").await;
    assert!(matches!(&error, PluginError::Failed { status, .. } if status.code() == Some(2)), "{error:?}");
    assert!(text.contains("exit status: 2") && text.contains("panic: nil pointer"), "{text}");
    let (_, text) = refusal("echo only this; exit 1").await;
    assert!(text.contains("only this"), "{text}");
}

#[tokio::test]
async fn a_plugin_that_is_killed_is_told_with_its_signal() {
    let (error, text) = refusal("kill -SEGV $$").await;
    assert!(matches!(error, PluginError::Failed { .. }), "{error:?}");
    assert!(text.contains("SIGSEGV"), "{text}");
}

#[tokio::test]
async fn success_with_garbage_is_told_with_the_garbage() {
    for answer in ["", "Segmentation fault", "[]", "{ \"ips\": [ { \"address\": 5 } ] }", "{"] {
        let (error, text) = refusal(&format!("echo '{answer}'; echo careful >&2")).await;
        assert!(
            matches!(error, PluginError::BadAnswer { source: ResultError::Shape(_), .. }),
            "{answer:?}: {error:?}"
        );
        assert!(text.contains("\"fake\"") && text.contains("careful"), "{text}");
    }
}

#[tokio::test]
async fn success_with_impossible_values_is_refused() {
    let ips = |text: &str| format!(r#"echo '{{ "ips": [ {text} ] }}'"#);
    for (does, expected) in [
        (ips(r#"{ "address": "10.0.0.2" }"#), "\"10.0.0.2\" is not an address with a prefix length"),
        (ips(r#"{ "address": "10.0.0.2/33" }"#), "\"10.0.0.2/33\" is not an address"),
        (ips(r#"{ "address": "::1/129" }"#), "\"::1/129\" is not an address"),
        (ips(r#"{ "address": "10.0.0.2/24", "gateway": "router" }"#), "gateway \"router\" is not an address"),
        (ips(r#"{ "address": "10.0.0.2/24", "interface": 1 }"#), "interface number 1, but there are 0"),
        (ips(r#"{ "address": "10.0.0.2/24", "interface": -7 }"#), "interface number -7"),
        (
            r#"echo '{ "cniVersion": "0.2.0", "ip4": { "ip": "10.0.0.2" } }'"#.to_owned(),
            "\"10.0.0.2\" is not an address with a prefix length",
        ),
        (r#"echo '{ "cniVersion": "2.0.0", "ips": [] }'"#.to_owned(), "\"2.0.0\" is not supported"),
    ] {
        let (_, text) = refusal(&does).await;
        assert!(text.contains(expected), "{expected:?} is not in {text:?}");
    }
}

#[tokio::test]
async fn success_without_an_address_is_a_failure_of_the_network() {
    let error = add(r#"echo '{ "cniVersion": "1.0.0", "ips": [] }'"#).await.unwrap_err();
    assert!(matches!(error, AddError::NoAddress { .. }), "{error:?}");
    assert!(error.to_string().contains("\"fake\""), "{error}");
}

#[tokio::test]
async fn a_plugin_that_does_not_read_its_configuration_may_still_answer() {
    let site = Site::new();
    let script = site.path("bin/fake");
    // Larger than a pipe holds, so that writing it fails once the plugin is gone.
    let answer = r#"{ "cniVersion": "1.0.0", "ips": [{ "address": "10.0.0.2/24" }] }"#;
    std::fs::write(&script, format!("#!/bin/sh\nexec <&-\necho '{answer}'\n")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, mode).unwrap();
    let padding = "x".repeat(200_000);
    site.conflist(&format!(
        r#"{{ "cniVersion": "1.0.0", "name": "test", "plugins": [{{ "type": "fake", "padding": "{padding}" }}] }}"#
    ));
    let list = conf::discover(&site.config.conf_dir).unwrap();
    let chain = Chain { list: &list, bin_dirs: &site.config.bin_dirs, limit: Duration::from_secs(20) };
    let result = chain.add(&Attachment::anonymous(&box_id(1), "/nowhere".into())).await.unwrap();
    assert_eq!(result.ips.len(), 1);
}

#[tokio::test]
async fn a_flood_is_stopped_and_only_the_end_of_stderr_is_kept() {
    let started = Instant::now();
    let (error, _) = refusal("exec cat /dev/zero").await;
    assert!(matches!(error, PluginError::TooMuchOutput { .. }), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(15));
    let (_, text) = refusal("yes long story | head -c 300000 >&2; echo the end >&2; exit 1").await;
    assert!(text.ends_with("the end") && text.len() < 3000, "{}", text.len());
}

#[tokio::test]
async fn a_missing_or_unrunnable_binary_is_named_with_the_directories() {
    let site = Site::new();
    let error = chain(&add_on(&site).await.unwrap_err());
    assert!(
        error.contains("\"fake\" is not in") && error.contains(site.path("bin").to_str().unwrap()),
        "{error}"
    );
    std::fs::write(site.path("bin/fake"), "#!/bin/sh\n").unwrap();
    let error = chain(&add_on(&site).await.unwrap_err());
    assert!(error.contains("\"fake\" is not in"), "a file that nobody may execute is no plugin: {error}");
}
