//! From rules to a classic BPF program for seccomp.
//!
//! ```text
//! ld arch; != x86-64 -> ENOSYS;  ld nr; x32 range -> ENOSYS;  binary search over runs of equal verdicts
//! ```
//!
//! Every system call of every container passes through this, so the search is a tree: nine
//! comparisons instead of some three hundred. A jump of classic BPF reaches 255 instructions; longer ones go
//! through an unconditional jump.
//!
//! References: kernel `Documentation/userspace-api/seccomp_filter.rst`, `include/uapi/linux/bpf_common.h`.

use std::collections::BTreeMap;

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is executed.
    Allow,
    /// It fails with this error number.
    Fail(u16),
    /// It depends on an argument.
    Check(Check),
}

/// A condition on the lower 32 bits of one argument. What does not fulfil it fails with EPERM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Check {
    /// None of these bits is set.
    NoneOf { argument: u32, bits: u32 },
    /// It is none of these values.
    NotIn { argument: u32, values: &'static [u32] },
    /// It is one of these values.
    In { argument: u32, values: &'static [u32] },
}

/// Verdicts by system call number; what is missing gets `otherwise`.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) verdicts: BTreeMap<u32, Verdict>,
    pub(crate) otherwise: Verdict,
}

/// One instruction: `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instruction {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_GREATER_EQUAL: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const JUMP_SET: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

const RET_ALLOW: u32 = 0x7fff_0000;
const RET_ERRNO: u32 = 0x0005_0000;

const NR_OFFSET: u32 = 0;
const ARCH_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Numbers from here on are the x32 interface's, which the guest's kernel does not have.
const X32_BIT: u32 = 0x4000_0000;

const EPERM: u16 = 1;
const ENOSYS: u16 = 38;

/// The program for a set of rules.
pub(crate) fn compile(rules: &Rules) -> Vec<Instruction> {
    let mut program = vec![
        statement(LOAD, ARCH_OFFSET),
        jump(JUMP_EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        fail(ENOSYS),
        statement(LOAD, NR_OFFSET),
        jump(JUMP_GREATER_EQUAL, X32_BIT, 0, 1),
        fail(ENOSYS),
    ];
    program.extend(search(&runs(rules)));
    program
}

/// As the kernel takes it: little endian, 8 octets per instruction.
pub(crate) fn encode(program: &[Instruction]) -> Vec<u8> {
    program
        .iter()
        .flat_map(|i| {
            let [c0, c1] = i.code.to_le_bytes();
            let [k0, k1, k2, k3] = i.k.to_le_bytes();
            [c0, c1, i.jt, i.jf, k0, k1, k2, k3]
        })
        .collect()
}

/// Runs of neighbouring numbers with one verdict, by their first number; the first run starts at 0.
fn runs(rules: &Rules) -> Vec<(u32, Verdict)> {
    let mut runs = vec![(0, rules.otherwise)];
    let mut start = |number: u32, verdict: Verdict| match runs.last_mut() {
        Some((_, last)) if *last == verdict => {}
        Some((first, last)) if *first == number => *last = verdict,
        Some(_) | None => runs.push((number, verdict)),
    };
    for (&number, &verdict) in &rules.verdicts {
        start(number, verdict);
        if !rules.verdicts.contains_key(&(number + 1)) {
            start(number + 1, rules.otherwise);
        }
    }
    runs
}

fn search(runs: &[(u32, Verdict)]) -> Vec<Instruction> {
    let [(_, verdict)] = runs else {
        let (low, high) = runs.split_at(runs.len() / 2);
        let (boundary, low, high) = (high[0].0, search(low), search(high));
        let mut code = match u8::try_from(low.len()) {
            Ok(distance) => vec![jump(JUMP_GREATER_EQUAL, boundary, distance, 0)],
            Err(_) => {
                vec![jump(JUMP_GREATER_EQUAL, boundary, 0, 1), statement(JUMP, low.len() as u32)]
            }
        };
        code.extend(low);
        code.extend(high);
        return code;
    };
    leaf(*verdict)
}

fn leaf(verdict: Verdict) -> Vec<Instruction> {
    match verdict {
        Verdict::Allow => vec![allow()],
        Verdict::Fail(errno) => vec![fail(errno)],
        Verdict::Check(Check::NoneOf { argument, bits }) => {
            vec![load_argument(argument), jump(JUMP_SET, bits, 0, 1), fail(EPERM), allow()]
        }
        Verdict::Check(Check::NotIn { argument, values }) => {
            membership(argument, values, fail(EPERM), allow())
        }
        Verdict::Check(Check::In { argument, values }) => membership(argument, values, allow(), fail(EPERM)),
    }
}

/// `found` if the argument is one of the values (at most 254), else `missing`.
fn membership(argument: u32, values: &[u32], found: Instruction, missing: Instruction) -> Vec<Instruction> {
    let mut code = vec![load_argument(argument)];
    for (index, value) in values.iter().enumerate() {
        let remaining = values.len() - 1 - index;
        // Over the remaining comparisons and over `missing`.
        code.push(jump(JUMP_EQUAL, *value, remaining as u8 + 1, 0));
    }
    code.extend([missing, found]);
    code
}

fn statement(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k }
}

fn load_argument(argument: u32) -> Instruction {
    statement(LOAD, ARGUMENTS_OFFSET + 8 * argument)
}

fn allow() -> Instruction {
    statement(RETURN, RET_ALLOW)
}

fn fail(errno: u16) -> Instruction {
    statement(RETURN, RET_ERRNO | u32::from(errno))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the kernel would do with a call, by executing the program.
    pub(crate) fn execute(program: &[Instruction], arch: u32, number: u32, arguments: [u64; 6]) -> Verdict {
        let word = |offset: u32| match offset {
            NR_OFFSET => number,
            ARCH_OFFSET => arch,
            _ => arguments[((offset - ARGUMENTS_OFFSET) / 8) as usize] as u32,
        };
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let i = program[at];
            let taken = match i.code {
                LOAD => {
                    accumulator = word(i.k);
                    0
                }
                JUMP => i.k as usize,
                JUMP_EQUAL => usize::from(if accumulator == i.k { i.jt } else { i.jf }),
                JUMP_GREATER_EQUAL => usize::from(if accumulator >= i.k { i.jt } else { i.jf }),
                JUMP_SET => usize::from(if accumulator & i.k != 0 { i.jt } else { i.jf }),
                RETURN if i.k == RET_ALLOW => return Verdict::Allow,
                RETURN => return Verdict::Fail((i.k & 0xffff) as u16),
                other => panic!("unknown instruction {other:#x}"),
            };
            at += 1 + taken;
        }
    }

    pub(crate) fn call(program: &[Instruction], number: u32, arguments: [u64; 6]) -> Verdict {
        execute(program, AUDIT_ARCH_X86_64, number, arguments)
    }

    fn verdict() -> impl Strategy<Value = Verdict> {
        prop_oneof![Just(Verdict::Allow), Just(Verdict::Fail(1)), Just(Verdict::Fail(38))]
    }

    proptest! {
        #[test]
        fn the_program_gives_every_number_its_verdict(
            verdicts in prop::collection::btree_map(0u32..600, verdict(), 0..400),
            otherwise in verdict(),
        ) {
            let rules = Rules { verdicts, otherwise };
            let program = compile(&rules);
            prop_assert!(program.len() < 4096);
            for number in 0..620 {
                let expected = rules.verdicts.get(&number).copied().unwrap_or(otherwise);
                prop_assert_eq!(call(&program, number, [0; 6]), expected, "number {}", number);
            }
        }
    }

    #[test]
    fn arguments_decide_where_they_are_checked() {
        let verdicts = [
            (1, Verdict::Check(Check::NoneOf { argument: 0, bits: 0x30 })),
            (2, Verdict::Check(Check::NotIn { argument: 1, values: &[40, 41] })),
            (3, Verdict::Check(Check::In { argument: 2, values: &[7, 8, 9] })),
        ];
        let program = compile(&Rules { verdicts: verdicts.into(), otherwise: Verdict::Fail(38) });
        let with = |index: usize, value: u64| {
            let mut arguments = [0; 6];
            arguments[index] = value;
            arguments
        };
        let denied = Verdict::Fail(EPERM);
        assert_eq!(call(&program, 1, with(0, 0x0f)), Verdict::Allow);
        assert_eq!(call(&program, 1, with(0, 0x20)), denied);
        for (value, expected) in [(40, denied), (41, denied), (42, Verdict::Allow)] {
            assert_eq!(call(&program, 2, with(1, value)), expected, "{value}");
        }
        for (value, expected) in [(6, denied), (7, Verdict::Allow), (9, Verdict::Allow), (10, denied)] {
            assert_eq!(call(&program, 3, with(2, value)), expected, "{value}");
        }
    }

    #[test]
    fn other_machine_interfaces_are_unknown_calls() {
        let program = compile(&Rules { verdicts: BTreeMap::new(), otherwise: Verdict::Allow });
        assert_eq!(call(&program, 1, [0; 6]), Verdict::Allow);
        assert_eq!(call(&program, X32_BIT | 1, [0; 6]), Verdict::Fail(ENOSYS));
        assert_eq!(execute(&program, 0x4000_0003, 1, [0; 6]), Verdict::Fail(ENOSYS));
    }
}
