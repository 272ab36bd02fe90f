//! The Vmm seam and its backends: the only crate that names a hypervisor.
