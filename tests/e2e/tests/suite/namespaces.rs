//! What the containers of a pod share and what they do not: users, kernel parameters, processes.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use a3s_box_cri::proto::{
    ContainerConfig, IdMapping, Int64Value, LinuxContainerConfig, LinuxContainerSecurityContext,
    LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig, UserNamespace,
};
use anyhow::{Context, Result, ensure};
use tonic::Code;

use crate::suite::{Suite, launch, logged};

/// What kubelet gives its first pod with `hostUsers: false`.
fn mapping() -> Vec<IdMapping> {
    vec![IdMapping { host_id: 65_536, container_id: 0, length: 65_536 }]
}

fn with_users(config: PodSandboxConfig) -> PodSandboxConfig {
    let users = UserNamespace { mode: NamespaceMode::Pod.into(), uids: mapping(), gids: mapping() };
    let mut linux = config.linux.clone().unwrap_or_default();
    linux.security_context = Some(LinuxSandboxSecurityContext {
        namespace_options: Some(NamespaceOption { userns_options: Some(users), ..Default::default() }),
        ..Default::default()
    });
    PodSandboxConfig { linux: Some(linux), ..config }
}

fn confined(container: ContainerConfig, context: LinuxContainerSecurityContext) -> ContainerConfig {
    let linux = LinuxContainerConfig { security_context: Some(context), ..Default::default() };
    ContainerConfig { linux: Some(linux), ..container }
}

pub(crate) async fn a_pods_root_is_nobody_outside_of_it(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let mut config = with_users(suite.pod("users")?);
    let sysctl = ("net.core.somaxconn".to_owned(), "321".to_owned());
    config.linux.get_or_insert_default().sysctls.extend([sysctl]);
    let pod = client.run_pod(&config).await?;
    // A tmpfs: not every file system allows id-mapped mounts.
    let folder = tempfile::Builder::new().prefix("e2e-users-").tempdir_in("/dev/shm")?;
    let folder = folder.path();
    fs::set_permissions(folder, Permissions::from_mode(0o755))?;
    fs::write(folder.join("seven"), "")?;
    chown(folder.join("seven"), Some(7), Some(7))?;
    let volume = |uid_mappings: Vec<IdMapping>, inside: &str| Mount {
        host_path: folder.to_string_lossy().into_owned(),
        container_path: inside.to_owned(),
        gid_mappings: uid_mappings.clone(),
        uid_mappings,
        ..Default::default()
    };
    let mounts = vec![volume(mapping(), "/mapped"), volume(vec![], "/plain")];
    let main = ContainerConfig {
        mounts,
        working_dir: "/made/for/it".to_owned(),
        ..suite.script("main", "sleep 3600")
    };
    let main = launch(&mut client, &pod, main, &config).await?;

    let script = "
        set -- $(cat /proc/self/uid_map) $(cat /proc/self/gid_map); echo $*
        id -u; stat -c %u:%g / /bin /bin/sh . .. /etc/hostname /dev /mapped/seven /plain/seven
        echo x > /new && stat -c %u /new
        echo x > /mapped/new; echo x > /plain/new || echo refused
        hostname; cat /proc/sys/net/core/somaxconn; ip addr show eth0 | grep -c 'inet '
        mount -t tmpfs none /mnt 2>&1 || echo no right to mount
        nc -l -p 80 & sleep 1; kill $! && echo bound";
    let seen = client.exec(&main, &["sh", "-c", script], 60).await?;
    let output = String::from_utf8_lossy(&seen.stdout).into_owned();
    let lines: Vec<&str> = output.lines().collect();
    let mut expected = vec!["0 65536 65536 0 65536 65536", "0"];
    // Root, the image's files, what was made, what the runtime gives, /dev.
    expected.extend(["0:0"; 7]);
    expected.extend(["7:7", "65534:65534", "0", "refused", "users", "321", "1"]);
    ensure!(lines.len() > expected.len() && lines[..expected.len()] == expected, "{output}\n{seen:?}");
    ensure!(lines.contains(&"no right to mount") && lines.last() == Some(&"bound"), "{output}\n{seen:?}");
    let made = fs::metadata(folder.join("new"))?;
    ensure!((made.uid(), made.gid()) == (0, 0), "the host sees {}:{}", made.uid(), made.gid());

    let user = |uid| LinuxContainerSecurityContext {
        run_as_user: Some(Int64Value { value: uid }),
        ..Default::default()
    };
    let beyond = confined(suite.script("beyond", "true"), user(70_000));
    let error = client.create(&pod, beyond, &config).await.err().context("an id beyond the mapping")?;
    ensure!(error.code() == Code::InvalidArgument, "{error}");
    ensure!(error.message().contains("user 70000 is not in the pod's user namespace"), "{error}");

    let mut other = LinuxContainerSecurityContext::default();
    let nodes = UserNamespace { mode: NamespaceMode::Node.into(), ..Default::default() };
    other.namespace_options = Some(NamespaceOption { userns_options: Some(nodes), ..Default::default() });
    let other = confined(suite.script("other", "true"), other);
    let error = client.create(&pod, other, &config).await.err().context("other users than the pod's")?;
    ensure!(error.code() == Code::InvalidArgument && error.message().contains("userns_options"), "{error}");

    // The kernel hangs a terminal up when the first process of its session ends, and throws away what has not come through by
    // then: on a busy machine that can be the last lines.
    let script = "tty; stat -c %u $(tty); echo out > /dev/stdout; sleep 1";
    let terminal = ContainerConfig { tty: true, ..confined(suite.script("tty", script), user(1000)) };
    let terminal = launch(&mut client, &pod, terminal, &config).await?;
    crate::suite::exit_code(&client, &terminal).await?;
    logged(&config, "tty", "out").await?;
    let lines: Vec<String> =
        crate::suite::log_lines(&config, "tty")?.into_iter().map(|line| line.2).collect();
    let lines: Vec<&str> = lines.iter().map(|line| line.trim_end()).collect();
    ensure!(lines == ["/dev/pts/0", "1000", "out"], "{lines:?}");
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn kernel_parameters_are_the_pods(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let with = |name: &str, key: &str, value: &str| -> Result<PodSandboxConfig> {
        let mut config = suite.pod(name)?;
        config.linux.get_or_insert_default().sysctls.insert(key.to_owned(), value.to_owned());
        Ok(config)
    };
    let mut config = with("sysctls", "net.ipv4.ip_local_port_range", "40000 40100")?;
    let more =
        [("kernel.shm_rmid_forced", "1"), ("net.ipv4.conf.eth0.rp_filter", "2"), ("vm.swappiness", "7")];
    let sysctls = &mut config.linux.get_or_insert_default().sysctls;
    sysctls.extend(more.map(|(key, value)| (key.to_owned(), value.to_owned())));
    let pod = client.run_pod(&config).await?;
    let main = launch(&mut client, &pod, suite.script("main", "sleep 3600"), &config).await?;
    let script = "cd /proc/sys; cat net/ipv4/ip_local_port_range kernel/shm_rmid_forced \
        net/ipv4/conf/eth0/rp_filter vm/swappiness";
    let seen = client.exec(&main, &["sh", "-c", script], 30).await?;
    ensure!(seen.stdout == b"40000\t40100\n1\n2\n7\n", "{seen:?}");
    client.remove_pod(&pod).await?;

    for (key, value, word) in [
        ("net.no.such", "1", "net.no.such"),
        ("vm.swappiness", "many", "vm.swappiness"),
        ("net/../../etc", "1", "net/../../etc"),
    ] {
        let error = client.run_pod(&with("badsysctl", key, value)?).await.err().context(key)?;
        ensure!(error.code() == Code::InvalidArgument && error.message().contains(word), "{key}: {error}");
    }
    Ok(())
}

/// `kubectl debug --target`.
pub(crate) async fn a_debugger_sees_the_processes_of_its_target(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("debug")?;
    let pod = client.run_pod(&config).await?;
    let own = NamespaceOption { pid: NamespaceMode::Container.into(), ..Default::default() };
    let in_namespace = |container: ContainerConfig, options: NamespaceOption| {
        let context =
            LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() };
        confined(container, context)
    };
    let main = in_namespace(suite.script("main", "echo secret > /mark; exec sleep 3600"), own);
    let main = launch(&mut client, &pod, main, &config).await?;
    let target = |id: &str| NamespaceOption {
        pid: NamespaceMode::Target.into(),
        target_id: id.to_owned(),
        ..Default::default()
    };
    let debugger = in_namespace(suite.script("debugger", "exec sleep 4800"), target(&main));
    let debugger = launch(&mut client, &pod, debugger, &config).await?;
    let script = "ps; cat /proc/1/root/mark";
    let seen = client.exec(&debugger, &["sh", "-c", script], 30).await?;
    let output = String::from_utf8_lossy(&seen.stdout).into_owned();
    ensure!(output.contains("sleep 3600") && output.contains("sleep 4800"), "{seen:?}");
    ensure!(output.contains("secret"), "the files of a process that it may trace: {seen:?}");
    let own = client.exec(&main, &["ls", "/mark"], 30).await?;
    ensure!(own.exit_code == 0, "{own:?}");

    let unknown = in_namespace(suite.script("unknown", "true"), target(&"0".repeat(64)));
    let error = client.create(&pod, unknown, &config).await.err().context("a target that is not there")?;
    ensure!(error.code() == Code::InvalidArgument && error.message().contains("has no container"), "{error}");
    client.remove_pod(&pod).await?;
    Ok(())
}
