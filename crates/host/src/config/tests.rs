use std::path::{Path, PathBuf};
use std::time::Duration;

use super::parse::apply_file;
use super::*;

fn read(text: &str) -> Result<Config, ConfigError> {
    let mut config = Config::default();
    apply_file(&mut config, Path::new("/etc/x.toml"), text)?;
    Ok(config)
}

fn problems(text: &str) -> Vec<String> {
    match read(text) {
        Err(ConfigError::Settings(problems)) => problems.iter().map(Problem::to_string).collect(),
        other => panic!("expected problems, got {other:?}"),
    }
}

fn no_environment(_: &str) -> Option<String> {
    None
}

#[test]
fn an_unknown_key_names_its_line_and_the_nearest_known_one() {
    assert_eq!(
        problems("root = \"/x\"\n\n[vmm]\nbakend = \"qemu\"\n"),
        ["/etc/x.toml:4: there is no setting vmm.bakend; did you mean vmm.backend?"]
    );
}

#[test]
fn a_key_in_the_wrong_section_is_pointed_to_the_right_one() {
    assert_eq!(
        problems("[vmm]\nmemory_mib = 512\n"),
        ["/etc/x.toml:2: there is no setting vmm.memory_mib; did you mean size.memory_mib?"]
    );
}

#[test]
fn an_unknown_section_names_the_nearest_one() {
    assert_eq!(
        problems("[netwrok]\nmode = \"none\"\n"),
        ["/etc/x.toml:1: there is no setting netwrok; did you mean network?"]
    );
}

#[test]
fn a_key_unlike_all_others_points_to_the_list() {
    assert_eq!(
        problems("xyzzy = 1\n"),
        ["/etc/x.toml:1: there is no setting xyzzy; `a3s-box config default` lists them all"]
    );
}

#[test]
fn a_bad_value_names_key_value_and_what_was_expected() {
    assert_eq!(
        problems("[size]\nvcpus = 0\nmemory_mib = \"2G\"\n[vmm]\nbackend = \"firecracker\"\n"),
        [
            "/etc/x.toml:2: size.vcpus is 0, expected a whole number from 1 to 64",
            "/etc/x.toml:3: size.memory_mib is \"2G\", expected a whole number of MiB from 128 to 1048576",
            "/etc/x.toml:5: vmm.backend is \"firecracker\", expected \"auto\", \"libkrun\" or \"qemu\"",
        ]
    );
}

#[test]
fn a_section_that_is_a_value_is_not_taken_for_a_section() {
    assert_eq!(problems("vmm = 3\n"), ["/etc/x.toml:1: there is no setting vmm; did you mean [vmm]?"]);
}

#[test]
fn broken_toml_names_its_line() {
    match read("root = \"/x\"\nrun_dir = = 3\n") {
        Err(ConfigError::Syntax { line, .. }) => assert_eq!(line, 2),
        other => panic!("expected a syntax error, got {other:?}"),
    }
}

#[test]
fn relative_paths_are_refused_in_a_file() {
    assert_eq!(
        problems("root = \"state\"\n"),
        ["/etc/x.toml:1: root is \"state\", expected an absolute path"]
    );
}

#[test]
fn flags_override_the_environment_and_that_overrides_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    std::fs::write(&file, "root = \"/file\"\nrun_dir = \"/file\"\nsocket = \"/file\"\n[size]\nvcpus = 7\n")
        .unwrap();
    let flags = ConfigFlags { config: Some(file), socket: Some("/flag".into()), ..ConfigFlags::default() };
    let variable = |name: &str| match name {
        "CRI_SOCKET_PATH" | "A3S_BOX_RUN_DIR" => Some("/environment".to_owned()),
        _ => None,
    };
    let config = flags.load_with(&variable).unwrap();
    assert_eq!(config.root, PathBuf::from("/file"));
    assert_eq!(config.run_dir, PathBuf::from("/environment"));
    assert_eq!(config.socket(), PathBuf::from("/flag"));
    assert_eq!(config.size.vcpus, 7);
    assert_eq!(config.origin("run_dir"), Some(&Origin::Environment("A3S_BOX_RUN_DIR")));
    assert_eq!(config.origin("size.memory_mib"), None);
}

#[test]
fn a_named_file_must_exist() {
    let flags = ConfigFlags { config: Some("/nonexistent/a.toml".into()), ..ConfigFlags::default() };
    assert!(matches!(flags.load_with(&no_environment), Err(ConfigError::Read { .. })));
}

#[test]
fn set_takes_plain_words_and_toml_values() {
    let set = |pairs: &[(&str, &str)]| ConfigFlags {
        config: Some("/dev/null".into()),
        set: pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        ..ConfigFlags::default()
    };
    let config = set(&[
        ("vmm.backend", "qemu"),
        ("vmm.boot_limit", "90s"),
        ("size.vcpus", "4"),
        ("runtime_handlers", "[\"\", \"vm\"]"),
        ("images.max_layer_bytes", "1GiB"),
        ("images.cache_bytes", "0"),
        ("images.pinned", "[\"pause:3.10\"]"),
    ])
    .load_with(&no_environment)
    .unwrap();
    assert_eq!(config.vmm.backend, Backend::Qemu);
    assert_eq!(config.vmm.boot_limit, Duration::from_secs(90));
    assert_eq!(config.size.vcpus, 4);
    assert_eq!(config.runtime_handlers, ["", "vm"]);
    assert_eq!(config.images.max_layer_bytes, 1 << 30);
    assert_eq!((config.images.cache_bytes, config.images.pinned), (0, vec!["pause:3.10".to_owned()]));

    let error = set(&[("images.pinned", "[\"no reference\"]")]).load_with(&no_environment).unwrap_err();
    assert!(error.to_string().contains("images.pinned"), "{error}");
    let error = set(&[("vmm.bootlimit", "1s")]).load_with(&no_environment).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the flag --set vmm.bootlimit: there is no setting vmm.bootlimit; did you mean vmm.boot_limit?"
    );
}

#[test]
fn subnets_of_the_built_in_network_are_whole_and_of_their_family() {
    let text = "[network]\nfallback = \"local\"\nlocal_subnet = \"10.9.0.0/24\"\nlocal_subnet6 = \"\"\n";
    let network = read(text).unwrap().network;
    assert_eq!(network.fallback, NetworkFallback::Local);
    assert_eq!((network.local_subnet.to_string(), network.local_subnet6), ("10.9.0.0/24".to_owned(), None));
    for (key, value) in [
        ("fallback", "bridge"),
        ("local_subnet", ""),
        ("local_subnet", "10.9.0.1/24"),
        ("local_subnet", "fd00:9::/64"),
        ("local_subnet6", "10.9.0.0/24"),
        ("local_subnet6", "fd00:9::/120"),
    ] {
        let found = problems(&format!("[network]\n{key} = \"{value}\"\n"));
        let expected = format!("/etc/x.toml:2: network.{key} is \"{value}\", expected ");
        assert!(found.len() == 1 && found[0].starts_with(&expected), "{found:?}");
    }
}

#[test]
fn the_networks_of_the_cluster_are_a_list_of_networks() {
    let network = read("[network]\ncluster_cidrs = [\"10.0.0.0/8\", \"fd00::/8\"]\n").unwrap().network;
    assert_eq!(network.cluster_cidrs, ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()]);
    for value in ["\"10.0.0.0/8\"", "[\"10.0.0.1/8\"]", "[\"cluster\"]", "[8]"] {
        let found = problems(&format!("[network]\ncluster_cidrs = {value}\n"));
        assert!(found.len() == 1 && found[0].contains("network.cluster_cidrs is "), "{found:?}");
    }
}

#[test]
fn a_moved_run_directory_moves_the_socket_unless_it_was_set() {
    let mut config = Config::default();
    assert_eq!(config.socket(), PathBuf::from("/var/run/a3s-box/a3s-box.sock"));
    config.run_dir = "/tmp/two".into();
    assert_eq!(config.socket(), PathBuf::from("/tmp/two/a3s-box.sock"));
    config.socket_override = Some("/tmp/s".into());
    assert_eq!(config.socket(), PathBuf::from("/tmp/s"));
}

#[test]
fn the_default_file_uncommented_is_the_default_configuration() {
    let text: String = Config::default_file()
        .lines()
        .filter(|line| !line.starts_with("# ") && !line.contains('…'))
        .map(|line| format!("{}\n", line.strip_prefix('#').unwrap_or(line)))
        .collect();
    let config = read(&text).unwrap();
    assert_eq!(config.entries(), Config::default().entries());
}

#[test]
fn the_effective_settings_can_be_read_back() {
    let mut config =
        read("[vmm]\nprobe_limit = \"1500ms\"\nkernel = \"/k\\\"x\"\n[log]\nformat = \"json\"\n").unwrap();
    config.size.vcpus = 3;
    assert_eq!(read(&config.render()).unwrap().entries(), config.entries());
}

#[test]
fn the_shipped_file_is_the_default_file() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/config.toml");
    assert_eq!(
        std::fs::read_to_string(&shipped).unwrap(),
        Config::default_file(),
        "write it again: cargo run -p a3s-box -- config default > deploy/config.toml"
    );
}

#[test]
fn sizes_are_read_with_the_units_people_use() {
    for (text, bytes) in [
        ("0", Some(0)),
        ("4096", Some(4096)),
        ("512M", Some(512 << 20)),
        ("2G", Some(2 << 30)),
        ("2 GiB", Some(2 << 30)),
        ("1k", Some(1024)),
        ("17179869184G", None),
        ("", None),
        ("G", None),
        ("1.5G", None),
        ("-1", None),
        ("5X", None),
    ] {
        assert_eq!(parse_size(text), bytes, "{text:?}");
    }
}

#[test]
fn durations_are_read_with_their_units_and_bounded() {
    for (text, milliseconds) in [
        ("500ms", Some(500)),
        ("5s", Some(5000)),
        ("5", Some(5000)),
        ("2m", Some(120_000)),
        ("0s", None),
        ("25h", None),
    ] {
        assert_eq!(parse_duration(text), milliseconds.map(Duration::from_millis), "{text:?}");
    }
}
