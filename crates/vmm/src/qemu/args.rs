//! The arguments of QEMU and its file server, from a plan. Paths are those inside the jail.

use crate::launch::{Accel, QemuSpec, jail};
use crate::seam::{BoxPlan, PlanNic};
use a3s_box_protocol::SHARE_TAG;

/// Where the file server is listening for QEMU.
pub const FS_SOCKET: &str = "/run/fs";
/// Where the vsock device is listening for QEMU.
pub const VSOCK_SOCKET: &str = "/run/vsock";

/// Descriptors that QEMU inherits, so that it need not be allowed to open anything.
#[derive(Debug, Clone)]
pub struct Inherited {
    /// The scratch disk, read-write; a trial has none.
    pub scratch: Option<i32>,
    /// The console's log, append-only.
    pub console: i32,
    /// One tap per NIC of the plan, in its order, with a descriptor for each of its [`queues`].
    pub taps: Vec<Vec<i32>>,
}

/// How many queues a NIC has. On the host's hardware one per processor, up to eight. Software emulation runs the virtual
/// processors in turn, and a second queue is only more to look after: pods were seen to answer each other a tenth slower.
pub fn queues(plan: &BoxPlan, accel: Accel) -> u8 {
    match accel {
        Accel::Kvm => plan.vcpus.clamp(1, 8),
        Accel::Tcg => 1,
    }
}

/// Arguments of `qemu-system-x86_64`.
pub fn emulator(plan: &BoxPlan, spec: &QemuSpec, cmdline: &str, inherited: &Inherited) -> Vec<String> {
    let mut args: Vec<String> = Vec::with_capacity(64);
    let mut add = |option: &str, value: String| args.extend([option.to_owned(), value]);
    // Without ACPI the guest learns of its devices from the command line, which works with any kernel
    // configuration; it then needs the legacy timer, interrupt controller and clock.
    let machine = "microvm,acpi=off,pit=on,pic=on,rtc=on,isa-serial=on,pcie=off,usb=off,x-option-roms=off";
    add("-machine", format!("{machine},memory-backend=mem"));
    add("-accel", accel(spec.accel).to_owned());
    add("-cpu", processor(spec.accel).to_owned());
    add("-smp", plan.vcpus.to_string());
    add("-m", format!("{}M", plan.memory_mib));
    // Shared, because the vhost-user helpers read and write the guest's queues. Backed only where touched.
    add("-object", format!("memory-backend-memfd,id=mem,size={}M,share=on", plan.memory_mib));
    add("-kernel", jail::KERNEL.to_owned());
    add("-initrd", jail::INITRAMFS.to_owned());
    add("-append", cmdline.to_owned());
    add("-add-fd", format!("fd={},set=1", inherited.console));
    add("-chardev", "file,id=console,path=/dev/fdset/1,append=on".to_owned());
    add("-serial", "chardev:console".to_owned());
    add("-chardev", format!("socket,id=fs,path={FS_SOCKET}"));
    add("-device", format!("vhost-user-fs-device,chardev=fs,tag={SHARE_TAG},queue-size=1024"));
    add("-chardev", format!("socket,id=vsock,path={VSOCK_SOCKET}"));
    add("-device", "vhost-user-vsock-device,chardev=vsock".to_owned());
    if let Some(scratch) = inherited.scratch {
        // Nothing on the scratch disk outlives the box: flushing it to the host's disk would only cost time.
        let cache = "discard=unmap,cache.no-flush=on";
        add("-add-fd", format!("fd={scratch},set=2"));
        add("-blockdev", format!("driver=file,node-name=file,filename=/dev/fdset/2,locking=off,{cache}"));
        add("-blockdev", format!("driver=raw,node-name=scratch,file=file,{cache}"));
        add("-device", "virtio-blk-device,drive=scratch,discard=on".to_owned());
    }
    let nics = plan.network.iter().flat_map(|network| &network.nics);
    for (index, (nic, queues)) in nics.zip(&inherited.taps).enumerate() {
        let queues = queues.iter().map(i32::to_string).collect::<Vec<_>>().join(":");
        add("-netdev", format!("tap,id=net{index},fds={queues}"));
        add("-device", nic_device(index, nic));
    }
    add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned());
    add("-display", "none".to_owned());
    add("-monitor", "none".to_owned());
    add("-name", format!("{},debug-threads=on", plan.id.short()));
    args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
    args
}

/// Software emulation takes the virtual CPUs in turn, on one thread. With a thread for each, QEMU now and then runs code
/// that another virtual CPU has just changed, and the guest's kernel changes its own code (its static keys): a box then
/// ends with "Oops: int3", at its start or at any later time.
fn accel(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg,thread=single",
    }
}

/// Everything that can be had, but for one promise that software emulation does not keep: "fast" string moves go byte by
/// byte there. Without it the guest's kernel copies eight bytes at a time, which was seen to be five times as fast.
fn processor(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "max",
        Accel::Tcg => "max,-erms,-fsrm",
    }
}

fn nic_device(index: usize, nic: &PlanNic) -> String {
    let mac = nic.mac.map(|octet| format!("{octet:02x}")).join(":");
    format!("virtio-net-device,netdev=net{index},mq=on,mac={mac}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::tests::{plan, spec};
    use crate::seam::PlanNetwork;

    fn arguments(plan: &BoxPlan, accel: Accel, taps: Vec<Vec<i32>>) -> String {
        emulator(plan, &spec(accel), "console=ttyS0", &Inherited { scratch: Some(7), console: 8, taps })
            .join(" ")
    }

    #[test]
    fn a_box_without_network_has_no_nic_and_no_default_device() {
        let args = arguments(&plan(), Accel::Tcg, vec![]);
        assert!(args.contains("-smp 2 -m 512M"), "{args}");
        assert!(args.contains("-accel tcg,thread=single"), "{args}");
        assert!(args.contains("id=mem,size=512M,share=on"), "{args}");
        assert!(args.contains("-nodefaults -no-user-config -no-reboot"), "{args}");
        assert!(!args.contains("virtio-net") && !args.contains("-netdev"), "{args}");
    }

    #[test]
    fn every_nic_gets_its_own_tap_in_order() {
        let nic = |place| PlanNic::new(place, "unused".to_owned());
        let network = PlanNetwork { netns: "/run/netns/x".into(), nics: vec![nic(0x0a), nic(0xff)] };
        let args = arguments(
            &BoxPlan { network: Some(network), ..plan() },
            Accel::Tcg,
            vec![vec![11, 12], vec![13, 14]],
        );
        let first = args
            .find("tap,id=net0,fds=11:12 -device virtio-net-device,netdev=net0,mq=on,mac=02:a3:5b:00:00:0a");
        let second = args
            .find("tap,id=net1,fds=13:14 -device virtio-net-device,netdev=net1,mq=on,mac=02:a3:5b:00:00:ff");
        assert!(first.is_some() && first < second, "{args}");
    }

    #[test]
    fn a_nic_has_a_queue_per_processor_where_processors_run_side_by_side() {
        let plan = |vcpus| BoxPlan { vcpus, ..plan() };
        assert_eq!([1, 2, 64].map(|vcpus| queues(&plan(vcpus), Accel::Kvm)), [1, 2, 8]);
        assert_eq!(queues(&plan(4), Accel::Tcg), 1);
    }

    #[test]
    fn hardware_is_used_only_when_asked_for() {
        assert!(arguments(&plan(), Accel::Kvm, vec![]).contains("-accel kvm "));
        assert!(arguments(&plan(), Accel::Kvm, vec![]).contains("-cpu max "));
        assert!(arguments(&plan(), Accel::Tcg, vec![]).contains("-cpu max,-erms,-fsrm "));
    }

    #[test]
    fn the_emulator_is_given_no_path_outside_its_jail() {
        let args = arguments(&plan(), Accel::Tcg, vec![]);
        for outside in ["/var/lib", "/run/a3s-box", "/usr"] {
            assert!(!args.contains(outside), "{outside} in {args}");
        }
    }
}
