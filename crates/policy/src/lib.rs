//! What a process may do: capabilities and system call filters, computed on the host and applied in the guest.
//!
//! The crate is pure but for [`seccomp::read_seccomp_profile`], and it knows neither boxes nor the wire to the guest.

pub mod capabilities;
pub mod seccomp;
