//! Containers: signals, exec, identity, failures.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use a3s_box_cri::proto::{
    Capability, ContainerConfig, ContainerState, Int64Value, KeyValue, LinuxContainerConfig,
    LinuxContainerSecurityContext,
};
use a3s_box_e2e::client::Client;
use a3s_box_e2e::wait::until;
use anyhow::{Context, Result, ensure};
use tonic::Code;

use crate::suite::{Suite, exit_code, launch, log_lines, logged};

pub(crate) async fn stopping_means_sigterm_then_grace_then_sigkill(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("stopping")?;
    let pod = client.run_pod(&config).await?;
    let wait = "while :; do sleep 1 & wait $!; done";
    let polite = suite.script("polite", &format!("trap 'echo bye; exit 7' TERM; echo up; {wait}"));
    let stubborn = suite.script("stubborn", &format!("trap 'echo never' TERM; echo up; {wait}"));
    let polite = launch(&mut client, &pod, polite, &config).await?;
    let stubborn = launch(&mut client, &pod, stubborn, &config).await?;
    logged(&config, "polite", "up").await?;
    logged(&config, "stubborn", "up").await?;

    let asked = Instant::now();
    client.stop(&polite, 30).await?;
    ensure!(
        asked.elapsed() < Duration::from_secs(15),
        "the grace period was waited out: {:?}",
        asked.elapsed()
    );
    let status = client.container_status(&polite).await?;
    ensure!(status.exit_code == 7, "{status:?}");
    logged(&config, "polite", "bye").await?;

    let asked = Instant::now();
    client.stop(&stubborn, 2).await?;
    let took = asked.elapsed();
    ensure!(took >= Duration::from_secs(2) && took < Duration::from_secs(15), "killed after {took:?}");
    let status = client.container_status(&stubborn).await?;
    ensure!(status.exit_code == 137 && status.state() == ContainerState::ContainerExited, "{status:?}");
    logged(&config, "stubborn", "never").await?;
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn exec_gives_output_code_and_keeps_its_limit(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("exec")?;
    let pod = client.run_pod(&config).await?;
    let container = launch(&mut client, &pod, suite.script("main", "sleep 3600"), &config).await?;

    let answer = client.exec(&container, &["sh", "-c", "echo out; echo err >&2; exit 5"], 20).await?;
    ensure!(answer.stdout == b"out\n" && answer.stderr == b"err\n" && answer.exit_code == 5, "{answer:?}");
    let large = client.exec(&container, &["sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x"], 60).await?;
    ensure!(large.stdout.len() == 300_000, "{} bytes of 300000 arrived", large.stdout.len());

    let asked = Instant::now();
    let late = client
        .exec(&container, &["sh", "-c", "sleep 600; true"], 2)
        .await
        .err()
        .context("an exec over its limit fails")?;
    ensure!(late.code() == Code::DeadlineExceeded, "{late}");
    ensure!(asked.elapsed() < Duration::from_secs(20), "the limit of 2 s took {:?}", asked.elapsed());
    let processes = client.exec(&container, &["ps"], 20).await?;
    let processes = String::from_utf8_lossy(&processes.stdout).into_owned();
    ensure!(!processes.contains("sleep 600"), "the process over its limit lives on: {processes}");

    let missing = client.exec(&container, &["/no/such/program"], 20).await;
    let refused = match &missing {
        Ok(answer) => matches!(answer.exit_code, 126 | 127),
        Err(status) => status.message().contains("/no/such/program"),
    };
    ensure!(refused, "a missing program: {missing:?}");
    client.remove_pod(&pod).await?;
    Ok(())
}

/// Under emulation clocks lost seconds per minute on a busy host, and ticked every four milliseconds.
pub(crate) async fn the_time_is_the_hosts_and_no_timers(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("clock")?;
    let pod = client.run_pod(&config).await?;
    let mut container = suite.script("main", "sleep 3600");
    container.linux = Some(may_set_the_clock());
    let container = launch(&mut client, &pod, container, &config).await?;
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let seen = client.exec(&container, &["cat", source], 30).await?;
    let source = String::from_utf8_lossy(&seen.stdout).trim().to_owned();
    // It begins under the first of these names. Others are a timer's interrupts, and no finer than these.
    ensure!(["tsc-early", "tsc", "kvm-clock"].contains(&source.as_str()), "the clock source is {source}");

    let off = off_by(&mut client, &container).await?;
    ensure!(off <= CLOCK_TOLERANCE, "the guest's time is {off:?} off");
    // Following the host is more than being told its time once: a device that did not let the guest ask went unnoticed.
    let set = client.exec(&container, &["date", "-s", "2001-01-01 00:00"], 30).await?;
    ensure!(set.exit_code == 0, "{set:?}");
    ensure!(off_by(&mut client, &container).await? > Duration::from_secs(86_400), "the clock was not set");
    until("the return of the host's time", Duration::from_secs(60), async || {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut client = suite.client()?;
        Ok((off_by(&mut client, &container).await? <= CLOCK_TOLERANCE).then_some(()))
    })
    .await?;
    client.remove_pod(&pod).await?;
    Ok(())
}

const CLOCK_TOLERANCE: Duration = Duration::from_millis(100);

fn may_set_the_clock() -> LinuxContainerConfig {
    let capabilities = Capability { add_capabilities: vec!["SYS_TIME".to_owned()], ..Default::default() };
    let context = LinuxContainerSecurityContext { capabilities: Some(capabilities), ..Default::default() };
    LinuxContainerConfig { security_context: Some(context), ..Default::default() }
}

/// How far the guest's clock is from the host's, at least.
async fn off_by(client: &mut Client, container: &str) -> Result<Duration> {
    let host = || SystemTime::now().duration_since(UNIX_EPOCH);
    let (before, seen) = (host()?, client.exec(container, &["adjtimex"], 30).await?);
    let after = host()?;
    let output = String::from_utf8_lossy(&seen.stdout).into_owned();
    let field = |name: &str| -> Result<u64> {
        let line = output.lines().find(|line| line.contains(name)).context("adjtimex does not say it")?;
        Ok(line.rsplit([':', ' ']).next().unwrap_or_default().parse()?)
    };
    let guest = Duration::from_secs(field("time.tv_sec")?) + Duration::from_micros(field("time.tv_usec")?);
    Ok(before.saturating_sub(guest).max(guest.saturating_sub(after)))
}

pub(crate) async fn environment_user_and_folder_come_from_image_and_pod(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("identity")?;
    let pod = client.run_pod(&config).await?;
    let script =
        "echo $FROM_IMAGE/$FROM_POD; id -u; id -g; id -G; pwd; ls -d /proc/[0-9]* | wc -l; touch /new 2>&1";
    let container = ContainerConfig {
        working_dir: "/home/app".to_owned(),
        envs: vec![KeyValue { key: "FROM_POD".to_owned(), value: "too".into() }],
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                run_as_user: Some(Int64Value { value: 1000 }),
                run_as_group: Some(Int64Value { value: 1000 }),
                supplemental_groups: vec![3000],
                readonly_rootfs: true,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..suite.script("main", script)
    };
    let container = launch(&mut client, &pod, container, &config).await?;
    exit_code(&client, &container).await?;
    logged(&config, "main", "/home/app").await?;
    let lines: Vec<String> = log_lines(&config, "main")?.into_iter().map(|(_, _, message)| message).collect();
    ensure!(lines[..3] == ["yes/too", "1000", "1000"], "{lines:?}");
    let groups: Vec<&str> = lines[3].split(' ').collect();
    // 2000 comes from the image's /etc/group, 3000 from the pod.
    ensure!(["1000", "2000", "3000"].iter().all(|group| groups.contains(group)), "groups {groups:?}");
    let processes: u32 = lines[5].trim().parse().with_context(|| format!("a number: {lines:?}"))?;
    ensure!(processes <= 4, "the container sees {processes} processes: not a pid namespace of its own");
    ensure!(lines[6].contains("Read-only file system"), "a read-only root can be written: {lines:?}");
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn a_program_that_cannot_be_started_says_why(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("noprogram")?;
    let pod = client.run_pod(&config).await?;
    let container =
        ContainerConfig { command: vec!["/no/such/program".to_owned()], ..suite.script("main", "") };
    let container = client.create(&pod, container, &config).await?;
    let error = client.start(&container).await.err().context("starting a program that is not there fails")?;
    ensure!(error.message().contains("/no/such/program"), "the message does not name the program: {error}");
    let status = client.container_status(&container).await?;
    ensure!(status.state() == ContainerState::ContainerExited, "{status:?}");
    ensure!((status.exit_code, status.reason.as_str()) == (128, "StartError"), "{status:?}");
    ensure!(status.message.contains("/no/such/program"), "{status:?}");
    client.remove_pod(&pod).await?;
    Ok(())
}

/// As many as a node with many pods sends at once; fewer where the VM runs in an emulated one.
pub(crate) async fn a_storm_of_probes_is_answered(suite: &Suite) -> Result<()> {
    let probes = if suite.backend() == "libkrun" { 10 } else { 50 };
    let mut client = suite.client()?;
    let config = suite.pod("storm")?;
    let pod = client.run_pod(&config).await?;
    let container = launch(&mut client, &pod, suite.script("main", "sleep 3600"), &config).await?;
    let mut running = tokio::task::JoinSet::new();
    for number in 0..probes {
        let (mut client, container) = (client.clone(), container.clone());
        let script = format!("echo {number}; exit {number}");
        running.spawn(async move { (number, client.exec(&container, &["sh", "-c", &script], 60).await) });
    }
    while let Some(probe) = running.join_next().await {
        let (number, answer) = probe?;
        let answer = answer.with_context(|| format!("probe {number} of {probes}"))?;
        ensure!(answer.stdout == format!("{number}\n").as_bytes(), "probe {number}: {answer:?}");
        ensure!(answer.exit_code == number, "probe {number}: {answer:?}");
    }
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn a_profile_of_the_node_filters_system_calls(suite: &Suite) -> Result<()> {
    use a3s_box_cri::proto::SecurityProfile;
    use a3s_box_cri::proto::security_profile::ProfileType;
    let profiles = suite.state().join("profiles");
    std::fs::create_dir_all(&profiles)?;
    let write = |name: &str, content: &str| {
        let path = profiles.join(name);
        std::fs::write(&path, content).map(|()| path.to_string_lossy().into_owned())
    };
    let rules = r#"{"names":["chmod","fchmod","fchmodat","fchmodat2"],"action":"SCMP_ACT_ERRNO","errnoRet":28},
        {"names":["kill"],"action":"SCMP_ACT_ERRNO","errnoRet":16,"args":[{"index":1,"value":10,"op":"SCMP_CMP_EQ"}]},
        {"names":["sethostname"],"action":"SCMP_ACT_KILL_PROCESS"},
        {"names":["no_call_of_any_kernel"],"action":"SCMP_ACT_TRAP"}"#;
    let good = write("good.json", &format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{rules}]}}"#))?;
    let broken = write("broken.json", r#"{"defaultAction":"SCMP_ACT_ALLOW","#)?;
    let confined = |name: &str, script: &str, localhost_ref: &str| ContainerConfig {
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                seccomp: Some(SecurityProfile {
                    profile_type: ProfileType::Localhost.into(),
                    localhost_ref: localhost_ref.to_owned(),
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..suite.script(name, script)
    };
    let mut client = suite.client()?;
    let config = suite.pod("seccomp")?;
    let pod = client.run_pod(&config).await?;
    for (path, word) in [
        (broken.as_str(), "broken.json"),
        ("/no/such/profile.json", "/no/such/profile.json"),
        ("relative.json", "absolute"),
        ("/etc", "regular file"),
    ] {
        let error = client.create(&pod, confined("bad", "true", path), &config).await.err().context(word)?;
        ensure!(error.code() == Code::InvalidArgument, "{path}: {error}");
        let message = error.message();
        ensure!(
            message.contains("security_context.seccomp.localhost_ref") && message.contains(word),
            "{error}"
        );
    }
    let main = launch(&mut client, &pod, confined("main", "sleep 3600", &good), &config).await?;
    std::fs::remove_file(&good).context("the profile is read once")?;
    let script = "chmod 600 /tmp; kill -USR1 $$; echo alive; hostname x; echo $?";
    let answer = client.exec(&main, &["sh", "-c", script], 30).await?;
    let errors = String::from_utf8_lossy(&answer.stderr).into_owned();
    ensure!(errors.contains("No space left on device"), "chmod: {answer:?}");
    ensure!(errors.contains("busy"), "kill: {answer:?}");
    // 128 and SIGSYS.
    ensure!(answer.stdout == b"alive\n159\n", "{answer:?}");
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn bad_paths_fail_with_their_reason(suite: &Suite) -> Result<()> {
    use a3s_box_cri::proto::{Device, Mount};
    let mut client = suite.client()?;
    let config = suite.pod("badpaths")?;
    let pod = client.run_pod(&config).await?;
    let long = format!("/{}", "x".repeat(5000));
    let mount = |host: &str, inside: &str| Mount {
        host_path: host.to_owned(),
        container_path: inside.to_owned(),
        ..Default::default()
    };
    let base = |name: &str| suite.script(name, "true");
    let broken = [
        (
            "missing",
            ContainerConfig { mounts: vec![mount("/etc/passwd/below", "/data")], ..base("missing") },
            "/etc/passwd/below",
        ),
        ("longmount", ContainerConfig { mounts: vec![mount("/tmp", &long)], ..base("longmount") }, "xxx"),
        (
            "device",
            ContainerConfig {
                devices: vec![Device {
                    host_path: "/dev/no-such-device".to_owned(),
                    container_path: long.clone(),
                    permissions: "rw".to_owned(),
                }],
                ..base("device")
            },
            "device",
        ),
        (
            "logpath",
            ContainerConfig { log_path: "../../../escape.log".to_owned(), ..base("logpath") },
            "escape.log",
        ),
    ];
    for (name, container, word) in broken {
        let outcome = match client.create(&pod, container, &config).await {
            Ok(id) => client.start(&id).await,
            Err(status) => Err(status),
        };
        let error = outcome.err().with_context(|| format!("{name}: accepted"))?;
        ensure!(error.code() != Code::Unknown && error.message().contains(word), "{name}: {error}");
    }
    client.remove_pod(&pod).await?;
    Ok(())
}
