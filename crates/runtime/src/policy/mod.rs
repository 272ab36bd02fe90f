//! What a process may do: capabilities, system calls, limits; computed on the host, applied in the guest.

pub(crate) mod capabilities;
pub(crate) mod limits;
pub(crate) mod seccomp;
