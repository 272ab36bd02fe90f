//! What the tests share: fake plugins, and a private node to run real ones on.
//!
//! A [`Node`] is a thread in a network and a mount namespace of its own. Bridges, veths, iptables rules and namespace
//! mounts that a test makes (or leaks) exist only there and vanish with the thread; still they are counted.

// Every test binary has its own copy of this module and uses a part of it.
#![allow(dead_code, unreachable_pub)]

pub mod machine;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::ops::Deref;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use a3s_box_core::BoxId;
use a3s_box_core::network::PodNetwork;
use a3s_box_core::spec::{NetworkMode, PodIdentity};
use a3s_box_net::{
    Fallback, LocalConfig, NetConfig, NetMode, PodNetworking, Redirect, SetupError, SetupRequest,
    TeardownError, TeardownRequest,
};
use a3s_box_testing::skip;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

/// Where Debian's package has the real plugins.
pub const REAL_PLUGINS: &str = "/usr/lib/cni";

/// A directory with a network configuration and plugins.
pub struct Site {
    dir: TempDir,
    /// Settings that stay inside the directory.
    pub config: NetConfig,
}

impl Site {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("net.d")).unwrap();
        fs::create_dir(at("bin")).unwrap();
        let config = NetConfig {
            mode: NetMode::Cni,
            fallback: Fallback::None,
            local: LocalConfig { state_dir: at("local"), ..LocalConfig::default() },
            conf_dir: at("net.d"),
            conf_template: None,
            bin_dirs: vec![at("bin"), REAL_PLUGINS.into()],
            cache_dir: at("cache"),
            other_caches: at("others"),
            gc_lock: at("cni.lock"),
            netns_dir: at("netns"),
            plugin_timeout: Duration::from_secs(20),
            redirect: Redirect::Auto,
            tap_owner: None,
            multi_queue: false,
        };
        Self { dir, config }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn conflist(&self, text: &str) {
        fs::write(self.path("net.d/10-test.conflist"), text).unwrap();
    }

    /// A plugin that sources `does` after having noted what it was told. A link to one script that is never
    /// written, because a file cannot be executed while any process has it open for writing.
    pub fn plugin(&self, name: &str, does: &str) {
        let path = self.path("bin").join(name);
        if !path.exists() {
            symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common/plugin.sh"), &path).unwrap();
        }
        fs::write(path.with_added_extension("does"), does).unwrap();
    }

    /// `COMMAND plugin`, in the order of the calls.
    pub fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("bin/calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    pub fn forget_calls(&self) {
        let _ = fs::remove_file(self.path("bin/calls"));
    }

    /// The configuration that `plugin` got for `command`.
    pub fn stdin(&self, plugin: &str, command: &str) -> serde_json::Value {
        let text = fs::read(self.path(&format!("bin/{plugin}.{command}.stdin"))).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    /// The `CNI_*` variables that `plugin` got for `command`.
    pub fn env(&self, plugin: &str, command: &str) -> BTreeMap<String, String> {
        let text = fs::read_to_string(self.path(&format!("bin/{plugin}.{command}.env"))).unwrap();
        text.lines().filter_map(|l| l.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    }

    pub fn networking(&self) -> PodNetworking {
        PodNetworking::new(self.config.clone())
    }
}

/// What a daemon does to connect a pod.
pub trait SetUp {
    /// Prepares and connects it, and takes down what is there if that fails.
    async fn setup(&self, request: SetupRequest) -> Result<PodNetwork, Failed>;
}

impl SetUp for PodNetworking {
    async fn setup(&self, request: SetupRequest) -> Result<PodNetwork, Failed> {
        let id = request.box_id.clone();
        let connected = match self.prepare(request).await {
            Ok(prepared) => prepared.connect().await,
            Err(error) => Err(error),
        };
        match connected {
            Ok(network) => Ok(network),
            Err(error) => {
                let left_behind = self.teardown(TeardownRequest::of(id)).await;
                Err(Failed { error, left_behind })
            }
        }
    }
}

/// A set-up that failed, and what undoing it could not undo.
#[derive(Debug)]
pub struct Failed {
    error: SetupError,
    pub left_behind: Vec<TeardownError>,
}

impl Deref for Failed {
    type Target = SetupError;

    fn deref(&self) -> &SetupError {
        &self.error
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Failed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

pub fn box_id(n: u8) -> BoxId {
    BoxId::from_random([n; 32])
}

pub fn request(n: u8) -> SetupRequest {
    SetupRequest {
        box_id: box_id(n),
        identity: PodIdentity {
            name: format!("pod-{n}"),
            namespace: "default".into(),
            uid: format!("uid-{n}"),
            attempt: 0,
        },
        mode: NetworkMode::Pod,
        port_mappings: Vec::new(),
        dns: None,
        annotations: BTreeMap::new(),
        cgroup_parent: None,
        egress: None,
    }
}

/// An error and its causes, as the edge would print them.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(&format!(": {source}"));
        next = source.source();
    }
    text
}

/// Everything that a pod's network could leave behind on a node.
#[derive(Debug, PartialEq, Eq)]
pub struct Inventory {
    pub links: Vec<String>,
    pub mounts: Vec<String>,
    pub namespaces: Vec<String>,
    pub records: Vec<String>,
    pub allocations: Vec<String>,
    pub firewall: Vec<String>,
    /// What the built-in network shares, but for what outlasts the last pod.
    pub local: Vec<String>,
    pub tables: Vec<String>,
}

/// A node of its own for one test; see the module.
pub struct Node {
    pub site: Site,
}

impl Node {
    /// What there is now.
    pub fn inventory(&self) -> Inventory {
        let under = |text: &str| text.contains(self.site.dir.path().to_str().unwrap());
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let allocations = list(&self.site.path("ipam/test"));
        Inventory {
            links: run("ip -o link").lines().map(|l| l.split(": ").nth(1).unwrap().to_owned()).collect(),
            mounts: mounts.lines().filter(|l| under(l)).map(str::to_owned).collect(),
            namespaces: list(&self.site.config.netns_dir),
            records: list(&self.site.config.cache_dir),
            allocations: allocations.into_iter().filter(|n| n.parse::<std::net::IpAddr>().is_ok()).collect(),
            firewall: run("iptables-save -t nat")
                .lines()
                .filter(|l| l.starts_with("-A"))
                .map(str::to_owned)
                .collect(),
            local: self.local_state(),
            tables: match has_nft() {
                true => {
                    run("nft list tables").lines().filter(|l| l.contains("a3s")).map(str::to_owned).collect()
                }
                false => Vec::new(),
            },
        }
    }

    fn local_state(&self) -> Vec<String> {
        let shared = list(&self.site.config.local.state_dir).into_iter();
        let lasting = ["boot", "leases", "lock", "last"];
        let mut names: Vec<_> = shared.filter(|name| !lasting.contains(&name.as_str())).collect();
        names.extend(list(&self.site.config.local.state_dir.join("leases")));
        names
    }

    /// The usual network: a bridge with addresses from a private allocator. `more` goes into the bridge's
    /// configuration, `then` are further plugins.
    pub fn bridge_network(&self, version: &str, more: &str, then: &str) {
        let ipam = self.site.path("ipam");
        self.site.conflist(&format!(
            r#"{{ "cniVersion": "{version}", "name": "test", "plugins": [
                {{ "type": "bridge", "bridge": "br-test", "isGateway": true, {more}
                  "ipam": {{ "type": "host-local", "dataDir": "{}",
                    "ranges": [[{{ "subnet": "10.88.7.0/24" }}], [{{ "subnet": "fd00:88::/64" }}]],
                    "routes": [{{ "dst": "0.0.0.0/0" }}, {{ "dst": "::/0" }}] }} }}
                {then} ] }}"#,
            ipam.display()
        ));
    }
}

fn list(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Runs a command on the node of the calling thread and returns its output.
pub fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `test` on a private node; says so and returns if this machine cannot have one.
pub fn on_a_node<F>(test: F)
where
    F: AsyncFnOnce(Node) + Send + 'static,
{
    if !Path::new(REAL_PLUGINS).join("bridge").exists() {
        skip(&format!("needs the package containernetworking-plugins ({REAL_PLUGINS})"));
        return;
    }
    on_any_node(test);
}

/// The same without CNI: with the built-in network instead.
pub fn on_a_local_node<F>(test: F)
where
    F: AsyncFnOnce(Node) + Send + 'static,
{
    if !has_nft() {
        skip("needs the package nftables");
        return;
    }
    on_any_node(async |mut node: Node| {
        node.site.config.fallback = Fallback::Local;
        test(node).await;
    });
}

fn has_nft() -> bool {
    Command::new("nft").arg("--version").output().is_ok()
}

fn on_any_node<F>(test: F)
where
    F: AsyncFnOnce(Node) + Send + 'static,
{
    if !nix::unistd::geteuid().is_root() {
        skip("needs root (network and mount namespaces)");
        return;
    }
    // The thread keeps the test's name: a test that turns out to be skipped says it.
    let thread =
        std::thread::Builder::new().name(std::thread::current().name().unwrap_or_default().to_owned());
    let node = thread.spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        run("ip link set lo up");
        // All of its threads start from this one and so live on the same node.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(Node { site: Site::new() }));
    });
    if let Err(panic) = node.unwrap().join() {
        std::panic::resume_unwind(panic);
    }
}
