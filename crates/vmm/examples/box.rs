//! Boots one box without the rest of a3s-box and prints when it reached which stage. For working on a backend:
//!
//! ```text
//! cargo run -p a3s-box-vmm --example box -- libkrun|tcg|kvm KERNEL INITRAMFS [vcpus] [command …]
//! ```
//!
//! Each command is sent to guest port 1025 on a connection of its own and the answer is printed.
#![allow(missing_docs)]

use std::path::PathBuf;
use std::time::Duration;

use a3s_box_vmm::{Accel, Attachment, BoxPlan, LibkrunVmm, PlanNetwork, PlanNic, QemuParts, QemuVmm, Vmm};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let dir = std::env::var_os("BOX_DIR")
        .map_or_else(|| std::env::temp_dir().join("a3s-box-example"), PathBuf::from);
    std::fs::create_dir_all(&dir).unwrap();
    let vmm = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("a3s-box-vmm");
    let scratch = std::env::var_os("BOX_SCRATCH").map_or_else(|| dir.join("scratch.raw"), PathBuf::from);
    if !scratch.exists() {
        std::fs::File::create(&scratch).unwrap().set_len(64 << 20).unwrap();
    }
    let parts = QemuParts { vmm: vmm.clone(), emulator: "/usr/bin/qemu-system-x86_64".into() };
    if args[0] == "probe" {
        let config = a3s_box_vmm::ProbeConfig {
            requested: a3s_box_vmm::Requested::Auto,
            parts,
            kernel: args[1].clone().into(),
            initramfs: args[2].clone().into(),
            dir: dir.clone(),
            cache: dir.join("verdict.json"),
            limit: a3s_box_vmm::probe::TRIAL_LIMIT,
        };
        for _ in 0..2 {
            let started = std::time::Instant::now();
            let verdict = a3s_box_vmm::probe(&config).await;
            println!("{verdict:#?} after {:?}", started.elapsed());
        }
        return;
    }
    let limit = Duration::from_secs(20);
    let backend: Box<dyn Vmm> = match args[0].as_str() {
        "libkrun" => Box::new(LibkrunVmm::new(vmm, limit)),
        "kvm" => Box::new(QemuVmm::new(parts, Accel::Kvm, limit)),
        _ => Box::new(QemuVmm::new(parts, Accel::Tcg, limit)),
    };
    let network = std::env::var("BOX_TAP").ok().map(|tap| PlanNetwork {
        netns: std::env::var_os("BOX_NETNS").map(PathBuf::from).unwrap(),
        nics: vec![PlanNic::new(0, tap)],
    });
    let plan = BoxPlan {
        id: a3s_box_id(),
        dir: dir.clone(),
        vcpus: args.get(3).map_or(1, |n| n.parse().unwrap()),
        memory_mib: 256,
        kernel: args[1].clone().into(),
        initramfs: args[2].clone().into(),
        cmdline: std::env::var("BOX_CMDLINE").unwrap_or_default(),
        scratch,
        network,
        cgroups: Vec::new(),
        guest_ports: Vec::new(),
    };
    let machine = backend.launch(&plan).await.unwrap_or_else(|error| panic!("{error}"));
    println!("{:?}", machine.facts());
    match machine.ready(Duration::from_secs(30)).await {
        Ok(ready) => println!("{ready:?}\n{:?}", machine.times()),
        Err(error) => println!("{error}\n{:?}", machine.times()),
    }
    for command in &args[4.min(args.len())..] {
        if let Some(seconds) = command.strip_prefix("sleep ") {
            tokio::time::sleep(Duration::from_secs_f64(seconds.parse().unwrap())).await;
        } else if let Some(rest) = command.strip_prefix("attach ") {
            let (source, target) = rest.split_once(' ').unwrap();
            let (target, readonly) =
                target.strip_suffix(" ro").map_or((target, false), |target| (target, true));
            let source = rustix::fs::open(
                source,
                rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )
            .unwrap();
            let attachment = Attachment {
                source,
                target: target.to_owned(),
                readonly,
                recursive_readonly: false,
                propagate: false,
                id_mapped: None,
            };
            println!("{command}: {:?}", machine.attach(attachment).await.map_err(|error| error.to_string()));
        } else if let Some(target) = command.strip_prefix("detach ") {
            println!("{command}: {:?}", machine.detach(target).await.map_err(|error| error.to_string()));
        } else if command == "kill" {
            machine.kill().await.unwrap();
        } else if let Some(shell) = command.strip_prefix("sh ") {
            std::process::Command::new("sh")
                .args(["-c", shell])
                .env("PID", machine.facts().pid.to_string())
                .status()
                .unwrap();
        } else {
            match machine.connect(1025).await {
                Ok(mut stream) => {
                    stream.write_all(command.as_bytes()).await.unwrap();
                    let mut answer = Vec::new();
                    let read =
                        tokio::time::timeout(Duration::from_secs(4), stream.read_to_end(&mut answer)).await;
                    println!("{command}: {} {read:?}", String::from_utf8_lossy(&answer));
                }
                Err(error) => println!("{command}: {error}"),
            }
        }
    }
    if std::env::var_os("BOX_STAY").is_none() {
        let waited = tokio::time::timeout(Duration::from_millis(1500), machine.wait()).await;
        println!("exit: {waited:?}; last words: {}", machine.last_words(1500).await);
        machine.kill().await.unwrap();
        println!("exit: {:?}", machine.wait().await);
    }
}

fn a3s_box_id() -> a3s_box_core::BoxId {
    a3s_box_core::BoxId::from_random([7; 32])
}
