//! What every build has written about VMs, read by this one: docs/versioning.md.
//!
//! While a package is being installed the daemon is of one build and `a3s-box-vmm` of another, so plan and reports pass
//! between builds too.

use a3s_box_core::BoxId;
use a3s_box_golden::{Goldens, with_unknown_fields};
use serde_json::Value;

use super::*;
use crate::seam::{PlanNetwork, PlanNic};

const FACTS: [(&str, BackendKind); 2] =
    [("machine-libkrun.json", BackendKind::Libkrun), ("machine-qemu.json", BackendKind::Qemu)];

fn goldens() -> Goldens {
    Goldens::of(env!("CARGO_MANIFEST_DIR"), "records")
}

fn plan(dir: &Path) -> BoxPlan {
    BoxPlan {
        id: BoxId::from_random([0xb0; 32]),
        dir: dir.to_owned(),
        vcpus: 4,
        memory_mib: 1536,
        kernel: "/dev/null".into(),
        initramfs: "/dev/null".into(),
        cmdline: "a3s.debug".to_owned(),
        scratch: "/var/lib/a3s-box/boxes/b0b0/scratch.img".into(),
        network: Some(PlanNetwork {
            netns: "/run/a3s-box/netns/a3s-b0b0".into(),
            nics: vec![PlanNic::new(0, "a3s-tap0".to_owned()), PlanNic::new(1, "a3s-tap1".to_owned())],
        }),
        cgroups: vec!["/sys/fs/cgroup/a3s-box-b0b0".into()],
        guest_ports: vec![4088],
    }
}

fn qemu(accel: Accel) -> Hypervisor {
    Hypervisor::Qemu(QemuSpec { emulator: "/usr/bin/qemu-system-x86_64".into(), accel, uid: 65534 })
}

/// Where the golden plans say that their boxes are.
const DIR: &str = "/run/a3s-box/boxes/b0b0";

fn launches() -> Vec<(&'static str, LaunchSpec)> {
    let launch = |hypervisor, trial| LaunchSpec { plan: plan(Path::new(DIR)), hypervisor, trial };
    let bare =
        BoxPlan { network: None, cgroups: Vec::new(), guest_ports: Vec::new(), ..plan(Path::new(DIR)) };
    vec![
        ("plan-libkrun.json", LaunchSpec { plan: bare, ..launch(Hypervisor::Libkrun, true) }),
        ("plan-qemu-tcg.json", launch(qemu(Accel::Tcg), false)),
        ("plan-qemu-kvm.json", launch(qemu(Accel::Kvm), false)),
    ]
}

fn reports() -> Vec<(&'static str, Report)> {
    vec![
        ("report-started.json", Report::Started { pid: 4321, start_ticks: 987_654_321 }),
        ("report-up.json", Report::Up),
        ("report-failed.json", Report::Failed { message: "open /dev/kvm: no such file".to_owned() }),
    ]
}

fn value(of: &impl Serialize) -> Value {
    serde_json::to_value(of).unwrap()
}

#[test]
fn golden_plans_facts_and_reports_are_what_this_build_writes() {
    for (name, launch) in launches() {
        goldens().check_json(name, &serde_json::to_vec_pretty(&launch).unwrap());
    }
    for (name, backend) in FACTS {
        let facts = MachineFacts { backend, pid: 4321, start_ticks: 987_654_321 };
        goldens().check_json(name, &serde_json::to_vec(&facts).unwrap());
    }
    for (name, report) in reports() {
        goldens().check_json(name, &serde_json::to_vec(&report).unwrap());
    }
    let names = launches().into_iter().map(|(name, _)| name).chain(FACTS.map(|(name, _)| name));
    let names = names.chain(reports().into_iter().map(|(name, _)| name)).chain(["hypervisor.json"]);
    goldens().are_all_known(&names.collect::<Vec<_>>());
}

/// A VM of whose process nothing can be read runs on for ever, and nobody knows whose it is.
#[test]
fn golden_plans_facts_and_reports_of_every_age_are_read_with_their_meaning() {
    let dir = tempfile::tempdir().unwrap();
    for (name, launch) in launches() {
        for golden in goldens().ages(name) {
            for json in [golden.json(), with_unknown_fields(golden.json(), &[])] {
                std::fs::write(dir.path().join(PLAN_FILE), json.to_string()).unwrap();
                let plan = read_plan(dir.path()).unwrap().unwrap();
                assert_eq!(value(&plan), value(&launch.plan), "{}", golden.path.display());
                let read: LaunchSpec = serde_json::from_value(json).unwrap();
                assert_eq!(value(&read), value(&launch), "{}", golden.path.display());
                assert_eq!(read.backend(), launch.backend());
            }
        }
    }
    for (name, backend) in FACTS {
        for golden in goldens().ages(name) {
            for json in [golden.json(), with_unknown_fields(golden.json(), &[])] {
                std::fs::write(dir.path().join(FACTS_FILE), json.to_string()).unwrap();
                let facts = MachineFacts { backend, pid: 4321, start_ticks: 987_654_321 };
                assert_eq!(read_facts(dir.path()).unwrap(), Some(facts), "{}", golden.path.display());
            }
        }
    }
    for (name, report) in reports() {
        for golden in goldens().ages(name) {
            let read: Report = serde_json::from_value(golden.json()).unwrap();
            assert_eq!(read, report, "{}", golden.path.display());
        }
    }
}
