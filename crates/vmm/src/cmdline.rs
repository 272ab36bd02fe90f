//! The guest kernel's command line, by backend.
//!
//! Both machines have one serial port, no ACPI and no PCI. A kernel that panics reboots (`panic=-1`), and a
//! reboot ends the VM. The guest must therefore power off by rebooting; without ACPI a power-off would only halt.

use crate::launch::{Accel, Hypervisor};
use crate::seam::BoxPlan;

/// A pod's interfaces are those that its network gave it: no `dummy0` that the driver would make by itself.
const COMMON: &str = "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check dummy.numdummies=0";

/// microvm has no keyboard controller; a triple fault is what QEMU's `-no-reboot` answers by ending.
const REBOOT_QEMU: &str = "reboot=t";

/// libkrun's keyboard controller ends the process.
const REBOOT_LIBKRUN: &str = "reboot=k";

/// Emulation has no speculation to mitigate. A processor beyond the first would spend half a second on measuring how
/// fast it can count; what it is told is a 2.5 GHz clock at 250 ticks per second, and no device here needs it exact.
const EMULATED: &str = "mitigations=off lpj=10000000";

/// With one vCPU the kernel need neither calibrate the local APIC's timer (0.2 s under emulation) nor
/// patch its locks for one processor (0.15 s).
const EMULATED_SINGLE: &str = "nolapic_timer noreplace-smp";

/// What the kernel of `plan` is told. `counter_khz`: how fast the host processor's counter counts, which is also the guest's.
///
/// The guest cannot find that out by itself: it would compare the counter with an emulated timer, which a busy host makes
/// wrong by a tenth. Under software emulation it mostly fails, and the guest then counts that timer's interrupts, of
/// which it loses many.
pub fn compose(plan: &BoxPlan, hypervisor: &Hypervisor, counter_khz: Option<u32>) -> String {
    let (reboot, emulated) = match hypervisor {
        Hypervisor::Libkrun => (REBOOT_LIBKRUN, false),
        Hypervisor::Qemu(qemu) => match qemu.accel {
            Accel::Tcg => (REBOOT_QEMU, true),
            Accel::Kvm => (REBOOT_QEMU, false),
        },
    };
    let counter = counter_khz.map(|khz| format!("tsc_early_khz={khz}"));
    let mut words = vec![COMMON, reboot];
    words.extend(counter.as_deref());
    if emulated {
        words.push(EMULATED);
    }
    if emulated && plan.vcpus == 1 {
        words.push(EMULATED_SINGLE);
    }
    if !plan.cmdline.is_empty() {
        words.push(&plan.cmdline);
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::tests::{plan, spec};

    #[test]
    fn shortcuts_for_emulation_are_not_taken_on_hardware() {
        let single = BoxPlan { vcpus: 1, cmdline: "a3s.debug=1".to_owned(), ..plan() };
        for hypervisor in [Hypervisor::Libkrun, Hypervisor::Qemu(spec(Accel::Kvm))] {
            let on_hardware = compose(&single, &hypervisor, Some(2_500_000));
            for shortcut in ["nolapic_timer", "mitigations=off", "lpj="] {
                assert!(!on_hardware.contains(shortcut), "{shortcut} in {on_hardware}");
            }
        }
        let emulated = compose(&single, &Hypervisor::Qemu(spec(Accel::Tcg)), None);
        assert!(emulated.contains("nolapic_timer noreplace-smp"), "{emulated}");
        assert!(emulated.ends_with(" a3s.debug=1"), "{emulated}");
    }

    /// Clocks of emulated guests lost seconds per minute on a busy host, and ticked in steps of four milliseconds; one on KVM
    /// was half a second ahead after five.
    #[test]
    fn a_guest_is_told_how_fast_its_counter_counts() {
        for accel in [Accel::Tcg, Accel::Kvm] {
            let hypervisor = Hypervisor::Qemu(spec(accel));
            let told = compose(&plan(), &hypervisor, Some(2_445_418));
            assert!(told.split(' ').any(|word| word == "tsc_early_khz=2445418"), "{told}");
            // A host on which it cannot be measured.
            assert!(!compose(&plan(), &hypervisor, None).contains("tsc_early_khz"));
        }
        assert!(compose(&plan(), &Hypervisor::Libkrun, Some(1)).contains("tsc_early_khz=1"));
    }

    #[test]
    fn several_vcpus_keep_their_local_timers() {
        let emulated = compose(&BoxPlan { vcpus: 2, ..plan() }, &Hypervisor::Qemu(spec(Accel::Tcg)), None);
        assert!(emulated.contains("lpj=") && !emulated.contains("nolapic_timer"), "{emulated}");
    }

    #[test]
    fn a_reboot_is_what_each_hypervisor_ends_by() {
        assert!(compose(&plan(), &Hypervisor::Libkrun, None).contains("reboot=k"));
        assert!(compose(&plan(), &Hypervisor::Qemu(spec(Accel::Kvm)), None).contains("reboot=t"));
    }
}
