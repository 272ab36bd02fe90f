//! Which devices a session may open: those in its /dev and no others, although its processes may make nodes
//! (CAP_MKNOD is among the usual capabilities). Otherwise any container could read the scratch disk.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use crate::sys;

// include/uapi/linux/bpf.h, struct bpf_cgroup_dev_ctx.
const CTX_ACCESS: i16 = 0;
const CTX_MAJOR: i16 = 4;
const CTX_MINOR: i16 = 8;
const ACCESS_MKNOD: u32 = 1;
const TYPE_CHAR: u32 = 2;

/// Character devices that may be opened: null, zero, full, random, urandom, tty, ptmx.
const ALLOWED: [(u32, u32); 7] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)];
/// Terminals.
const PTS_MAJOR: u32 = 136;

/// Confines the processes of a cgroup to the usual devices.
pub fn confine(cgroup: BorrowedFd<'_>) -> io::Result<()> {
    static PROGRAM: OnceLock<OwnedFd> = OnceLock::new();
    let program = match PROGRAM.get() {
        Some(program) => program,
        None => {
            let loaded = load()?;
            PROGRAM.get_or_init(|| loaded)
        }
    };
    sys::attach_device_program(cgroup, program.as_fd())
}

/// The verifier gives up with EAGAIN when a signal is pending, and a process that reaps gets many.
fn load() -> io::Result<OwnedFd> {
    const ATTEMPTS: u32 = 32;
    let program = program();
    for _ in 1..ATTEMPTS {
        match sys::load_device_program(&program) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
    sys::load_device_program(&program)
}

/// One eBPF instruction: opcode, registers, offset, immediate.
fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> u64 {
    u64::from(code)
        | u64::from(destination | source << 4) << 8
        | u64::from(offset as u16) << 16
        | u64::from(immediate) << 32
}

/// r0 = value; return r0
fn answer(value: u32) -> [u64; 2] {
    const MOV_IMM: u8 = 0xb7;
    const EXIT: u8 = 0x95;
    [instruction(MOV_IMM, 0, 0, 0, value), instruction(EXIT, 0, 0, 0, 0)]
}

/// The program; it returns 1 to allow and 0 to refuse.
fn program() -> Vec<u64> {
    const LOAD_WORD: u8 = 0x61;
    const AND_IMM: u8 = 0x57;
    const SHIFT_RIGHT_IMM: u8 = 0x77;
    const MOV_REG: u8 = 0xbf;
    const JUMP_NOT_EQUAL_IMM: u8 = 0x55;
    let load = |register, offset| instruction(LOAD_WORD, register, 1, offset, 0);
    let unless = |register, value, skip| instruction(JUMP_NOT_EQUAL_IMM, register, 0, skip, value);

    // r2 = access, r3 = type, r4 = major, r5 = minor
    let mut code = vec![
        load(2, CTX_ACCESS),
        instruction(MOV_REG, 3, 2, 0, 0),
        instruction(AND_IMM, 3, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT_IMM, 2, 0, 0, 16),
        load(4, CTX_MAJOR),
        load(5, CTX_MINOR),
    ];
    // Making a node opens nothing.
    code.push(unless(2, ACCESS_MKNOD, 2));
    code.extend(answer(1));
    // What is no character device ends here; the others skip the refusal.
    const JUMP_EQUAL_IMM: u8 = 0x15;
    code.push(instruction(JUMP_EQUAL_IMM, 3, 0, 2, TYPE_CHAR));
    code.extend(answer(0));
    code.push(unless(4, PTS_MAJOR, 2));
    code.extend(answer(1));
    for (major, minor) in ALLOWED {
        code.push(unless(4, major, 3));
        code.push(unless(5, minor, 2));
        code.extend(answer(1));
    }
    code.extend(answer(0));
    code
}
