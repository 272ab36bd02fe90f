//! The virtual KVM node: a machine where libkrun works, on any machine where QEMU does.
//!
//! QEMU's software processor emulates AMD's SVM with nested paging, so Debian's stock kernel has a working kvm-amd in
//! it. The guest sees this machine's root through 9p, with an overlay in memory on top: programs built here run there
//! unchanged, and nothing they write stays. It is about ten times slower than the machine itself.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::debian::Suite;
use crate::{cpio, digest, paths, process, ui};

/// Debian's full kernel: the cloud flavour has no 9p.
const META_PACKAGE: &str = "linux-image-amd64";
const PACKAGE_PREFIX: &str = "linux-image-6";

/// What init loads, in this order, each after what it depends on. `crc32c_generic` is a dependency that only
/// modules.softdep knows (of libcrc32c, which the packet filter needs).
const MODULES: &[&str] = &[
    "crc32c_generic",
    "virtio_pci",
    "virtio_console",
    "overlay",
    "ext4",
    "loop",
    "9pnet_virtio",
    "9p",
    "kvm-amd",
    "tun",
    "veth",
    "bridge",
    "vhost_vsock",
    "sch_ingress",
    "cls_u32",
    "act_mirred",
    "nf_tables",
    "nft_compat",
    "nft_chain_nat",
    "nft_ct",
    "nft_nat",
    "nft_masq",
    "nft_fib_inet",
    "nft_fwd_netdev",
    "xt_MASQUERADE",
    "xt_comment",
    "xt_addrtype",
    "xt_conntrack",
    "xt_multiport",
    "xt_mark",
    "xt_nat",
    "xt_sctp",
    "xt_tcpudp",
];

/// Part of the cache key: raise it when what is kept in the cache changes.
const RECIPE: &str = "1";

#[derive(Args)]
pub(crate) struct Options {
    /// Memory of the node in MiB.
    #[arg(long, default_value_t = 4096)]
    memory: u32,
    /// Seconds after which the node is switched off.
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// The command to run in it, with its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// How long the node may be silent. It gives a sign of life every five seconds once it has booted, if its one processor gets
/// around to it.
const PULSE_LIMIT: Duration = Duration::from_secs(120);

/// The node itself ended or stood still before the command ended: its kernel crashed, or QEMU no longer runs it. Nothing
/// is known about the command then.
#[derive(Debug)]
pub(crate) struct NodeStopped {
    how: &'static str,
    console: PathBuf,
    words: String,
}

/// How a run of QEMU ended.
enum End {
    /// By itself.
    Off,
    /// We switched it off: no sign of life for [`PULSE_LIMIT`].
    StoodStill,
    /// We switched it off: its time was up.
    TimeUp,
}

impl std::fmt::Display for NodeStopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { how, console, words } = self;
        let console = console.display();
        write!(f, "the virtual node {how} before the command ended; its console ({console}):\n{words}")
    }
}

impl std::error::Error for NodeStopped {}

/// One run of one command.
pub(crate) struct Run<'a> {
    pub(crate) command: &'a [String],
    pub(crate) environment: &'a [(&'a str, String)],
    pub(crate) memory_mib: u32,
    pub(crate) limit: Duration,
}

/// The `node` subcommand: the command's output is ours, and so is its exit code.
pub(crate) fn run_command(options: &Options) -> Result<ExitCode> {
    let run = Run {
        command: &options.command,
        environment: &[],
        memory_mib: options.memory,
        limit: Duration::from_secs(options.timeout),
    };
    let code = run.execute(|line| println!("{line}"))?;
    Ok(ExitCode::from(code))
}

impl Run<'_> {
    /// Boots the node, runs the command in it, shows its output line by line and returns its exit code.
    pub(crate) fn execute(&self, mut show: impl FnMut(&str)) -> Result<u8> {
        let kernel = Kernel::ensure()?;
        let folder = paths::target().join("node");
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let work = tempfile::Builder::new()
            .prefix("run-")
            .tempdir_in(&folder)
            .with_context(|| format!("creating a folder in {}", folder.display()))?;
        let script = work.path().join("script");
        fs::write(&script, self.script()?).with_context(|| format!("writing {}", script.display()))?;
        let initrd = work.path().join("initrd");
        fs::write(&initrd, kernel.initrd()?).with_context(|| format!("writing {}", initrd.display()))?;
        let console = work.path().join("console");
        let status = work.path().join("status");
        let pulse = work.path().join("pulse");

        let mut qemu = self.qemu(&kernel, &initrd, &script, &console);
        port(&mut qemu, "status", &format!("file,path={}", status.display()));
        port(&mut qemu, "pulse", &format!("file,path={}", pulse.display()));
        let child = qemu
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting qemu-system-x86_64 for the virtual node")?;
        let end = attend(child, self.limit, &pulse, &mut show)?;
        // The run's folder goes; the kernel's words are worth keeping when a run ended oddly.
        let console = keep_console(&console, &folder)?;
        let reported = paths::read_optional(&status)?.unwrap_or_default();
        match reported.trim().strip_prefix("exit ").and_then(|code| code.parse().ok()) {
            Some(code) => Ok(code),
            None => {
                let words = process::tail(&console, 20);
                let how = match end {
                    End::Off => "stopped",
                    End::StoodStill => "stood still",
                    End::TimeUp => bail!(
                        "the virtual node was switched off after {}: the command had not ended; its console ({}):\n{words}",
                        ui::time(self.limit),
                        console.display(),
                    ),
                };
                Err(NodeStopped { how, console, words }.into())
            }
        }
    }

    fn script(&self) -> Result<String> {
        let here = std::env::current_dir().context("finding the current folder")?;
        let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
        let home = std::env::var("HOME").unwrap_or_else(|_| "/root".to_owned());
        let mut script =
            format!("export PATH={} HOME={} A3S_BOX_VIRTUAL_NODE=1\n", quote(&path), quote(&home));
        for (name, value) in self.environment {
            script.push_str(&format!("export {name}={}\n", quote(value)));
        }
        script.push_str(&format!("cd {} || exit 126\nexec", quote(&here.to_string_lossy())));
        for word in self.command {
            script.push_str(&format!(" {}", quote(word)));
        }
        script.push('\n');
        Ok(script)
    }

    fn qemu(&self, kernel: &Kernel, initrd: &Path, script: &Path, console: &Path) -> Command {
        // The kernel ends QEMU if we die without a chance to do it ourselves.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        // One processor. With two, the kernel patches its own code (KVM's static keys, at every start of a guest) while the
        // other one runs it, and QEMU's threads now and then execute a breakpoint that is no longer there: "Oops: int3".
        // Emulated string moves go byte by byte: the kernels in there shall not take them for fast.
        command.args(["-machine", "q35", "-accel", "tcg", "-cpu", "max,+svm,-erms,-fsrm", "-smp", "1"]);
        command.args(["-m", &self.memory_mib.to_string()]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-serial", &format!("file:{}", console.display())]);
        command
            .args(["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"]);
        command.args(["-device", "virtio-serial-pci"]);
        // Not `stdio`: that one counts as closed once our empty standard input ends, and the guest's writes would block.
        port(&mut command, "output", "file,path=/dev/fd/1");
        command.arg("-kernel").arg(&kernel.vmlinuz).arg("-initrd").arg(initrd);
        command.args(["-append", &format!("console=ttyS0 panic=-1 quiet a3s.script={}", script.display())]);
        command
    }
}

/// Gives the node a virtio port of this name, connected to what QEMU calls a character device.
fn port(qemu: &mut Command, name: &str, device: &str) {
    qemu.args(["-chardev", &format!("{device},id={name}")]);
    qemu.args(["-device", &format!("virtserialport,chardev={name},name=a3s.{name}")]);
}

fn keep_console(console: &Path, folder: &Path) -> Result<PathBuf> {
    let kept = folder.join("console.log");
    fs::copy(console, &kept).with_context(|| format!("keeping {}", kept.display()))?;
    Ok(kept)
}

/// Shows the child's output until it ends, its time is up or the file `pulse` grows no more. The child is gone after.
fn attend(mut child: Child, limit: Duration, pulse: &Path, show: &mut impl FnMut(&str)) -> Result<End> {
    let deadline = Instant::now() + limit;
    let mut last_pulse = (0, Instant::now());
    let (sender, lines) = mpsc::channel();
    let output = child.stdout.take().context("the virtual node has no output")?;
    let reader = thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
    let end = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left.min(Duration::from_secs(5))) {
            Ok(line) => show(line.trim_end_matches('\r')),
            Err(mpsc::RecvTimeoutError::Disconnected) => break End::Off,
            Err(mpsc::RecvTimeoutError::Timeout) if left.is_zero() => break End::TimeUp,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        let length = fs::metadata(pulse).map_or(0, |metadata| metadata.len());
        if length != last_pulse.0 {
            last_pulse = (length, Instant::now());
        } else if last_pulse.1.elapsed() > PULSE_LIMIT {
            break End::StoodStill;
        }
    };
    if !matches!(end, End::Off) {
        child.kill().context("switching the virtual node off")?;
    }
    child.wait().context("waiting for the virtual node's end")?;
    drop(lines);
    let _ = reader.join();
    Ok(end)
}

/// Single quotes for the shell.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Debian's kernel with the modules that init loads, unpacked in the cache.
struct Kernel {
    vmlinuz: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    fn ensure() -> Result<Self> {
        let cache = paths::cache()?.join("node");
        let names = MODULES.join(" ");
        let pointer = cache.join(format!("built-{}", digest::key(&[names.as_bytes(), RECIPE.as_bytes()])));
        if let Some(entry) = paths::read_optional(&pointer)? {
            let kernel = Self::at(&cache.join(entry.trim()));
            if kernel.vmlinuz.exists() {
                return Ok(kernel);
            }
        }
        ui::heading("virtual KVM node: Debian's kernel");
        let suite = Suite::trixie()?;
        let package = suite.behind(META_PACKAGE, PACKAGE_PREFIX)?;
        let key = digest::key(&[names.as_bytes(), package.version.as_bytes(), RECIPE.as_bytes()]);
        let entry = format!("{}-{key}", package.version);
        let destination = cache.join(&entry);
        let staging = paths::Staging::for_destination(destination.clone())?;
        ui::note(&format!("{} {}; kept in {}", package.name, package.version, destination.display()));
        suite.unpack(&package, staging.path())?;
        let finished = staging.path().join("finished");
        keep_what_init_needs(staging.path(), &finished)?;
        let kernel = Self::at(&staging.publish(&finished)?);
        paths::write_atomic(&pointer, format!("{entry}\n").as_bytes())?;
        Ok(kernel)
    }

    fn at(entry: &Path) -> Self {
        Self { vmlinuz: entry.join("vmlinuz"), modules: entry.join("modules") }
    }

    /// Init, busybox and the modules.
    fn initrd(&self) -> Result<Vec<u8>> {
        let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
        let mut archive = cpio::Archive::new();
        for directory in ["bin", "dev", "proc", "sys", "modules", "host", "upper", "new"] {
            archive.directory(directory, 0o755);
        }
        archive.character_device("dev/console", 0o600, 5, 1);
        archive.file("bin/busybox", 0o755, &read(Path::new("/bin/busybox"))?);
        archive.symlink("bin/sh", "busybox");
        archive.file("init", 0o755, &read(&paths::repo().join("guest/node/init"))?);
        let list = read(&self.modules.join("list"))?;
        for name in String::from_utf8_lossy(&list).lines() {
            archive.file(&format!("modules/{name}"), 0o644, &read(&self.modules.join(name))?);
        }
        archive.file("modules/list", 0o644, &list);
        Ok(archive.finish(4096))
    }
}

/// Takes the kernel and the decompressed modules, in loading order, out of an unpacked package.
fn keep_what_init_needs(unpacked: &Path, finished: &Path) -> Result<()> {
    let log = unpacked.join("log");
    let modules = finished.join("modules");
    fs::create_dir_all(&modules).with_context(|| format!("creating {}", modules.display()))?;
    let base = unpacked.join("usr/lib/modules");
    let release = only_name(&base)?;
    fs::rename(unpacked.join("boot").join(format!("vmlinuz-{release}")), finished.join("vmlinuz"))
        .context("finding the kernel in its package")?;
    // The package leaves the dependency list to its installation.
    process::logged(
        &mut process::command("depmod", ["-b".as_ref(), unpacked.join("usr").as_os_str(), release.as_ref()]),
        &log,
    )?;
    let tree = base.join(&release);
    let dependencies = fs::read_to_string(tree.join("modules.dep")).context("reading modules.dep")?;
    let builtin = fs::read_to_string(tree.join("modules.builtin")).context("reading modules.builtin")?;
    let mut list = String::new();
    for path in load_order(MODULES, &dependencies, &builtin)? {
        let compressed = tree.join(&path);
        let name = module_name(&path);
        let contents = Command::new("xz")
            .args(["-dc"])
            .arg(&compressed)
            .output()
            .with_context(|| format!("decompressing {}", compressed.display()))?;
        if !contents.status.success() {
            bail!("decompressing {} ended with {}", compressed.display(), contents.status);
        }
        let file = format!("{name}.ko");
        fs::write(modules.join(&file), contents.stdout).with_context(|| format!("writing {file}"))?;
        list.push_str(&file);
        list.push('\n');
    }
    fs::write(modules.join("list"), list).context("writing the list of modules")
}

/// The paths of the wanted modules, each after its dependencies. Built-in ones need no loading.
fn load_order(wanted: &[&str], dependencies: &str, builtin: &str) -> Result<Vec<String>> {
    let mut order: Vec<String> = Vec::new();
    for name in wanted {
        if builtin.lines().any(|path| module_name(path) == normal(name)) {
            continue;
        }
        let (path, needs) = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(path, _)| module_name(path) == normal(name))
            .with_context(|| format!("Debian's kernel has no module {name}"))?;
        // modules.dep names what must be loaded first last.
        for module in needs.split_whitespace().rev().chain([path]) {
            if !order.iter().any(|known| known == module) {
                order.push(module.to_owned());
            }
        }
    }
    Ok(order)
}

/// `kernel/arch/x86/kvm/kvm-amd.ko.xz` is the module kvm_amd: dashes and underscores are the same.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normal(file.split(".ko").next().unwrap_or(file))
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn only_name(dir: &Path) -> Result<String> {
    let mut entries = fs::read_dir(dir).with_context(|| format!("listing {}", dir.display()))?;
    let first = entries.next().with_context(|| format!("{} is empty", dir.display()))??;
    Ok(first.file_name().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::{load_order, quote};

    #[test]
    fn modules_come_after_what_they_depend_on_and_only_once() {
        let dependencies = "k/kvm/kvm-amd.ko.xz: k/kvm/kvm.ko.xz k/ccp.ko.xz k/irq.ko.xz\nk/kvm/kvm.ko.xz: k/irq.ko.xz\nk/tun.ko.xz:\n";
        let order = load_order(&["kvm-amd", "kvm", "virtio_pci"], dependencies, "k/virtio_pci.ko\n")
            .expect("all known");
        assert_eq!(order, ["k/irq.ko.xz", "k/ccp.ko.xz", "k/kvm/kvm.ko.xz", "k/kvm/kvm-amd.ko.xz"]);
    }

    #[test]
    fn a_module_that_debian_dropped_is_named() {
        let error = load_order(&["gone"], "k/tun.ko.xz:\n", "").expect_err("not there");
        assert!(error.to_string().contains("gone"));
    }

    #[test]
    fn words_survive_the_shell() {
        assert_eq!(quote("it's"), r"'it'\''s'");
    }
}
