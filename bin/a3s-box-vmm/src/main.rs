//! One per box: enters the pod's namespaces, jails itself, becomes the virtual machine.

fn main() {}
