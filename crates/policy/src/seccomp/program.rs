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

use a3s_box_core::seccomp::{SeccompAction, SeccompComparison, SeccompCondition};

/// What happens to a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Always the same.
    Always(SeccompAction),
    /// It depends on the arguments: the first case that holds, or `otherwise`.
    First { cases: Vec<Case>, otherwise: SeccompAction },
}

/// What happens when all conditions hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) conditions: Vec<SeccompCondition>,
    pub(crate) action: SeccompAction,
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
const JUMP_GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

// SECCOMP_RET_*, with the data in the lower half.
const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_KILL_THREAD: u32 = 0;
const RET_TRAP: u32 = 0x0003_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_TRACE: u32 = 0x7ff0_0000;
const RET_LOG: u32 = 0x7ffc_0000;
const RET_ALLOW: u32 = 0x7fff_0000;

/// The kernel's BPF_MAXINSNS.
pub(crate) const MAX_INSTRUCTIONS: usize = 4096;

const NR_OFFSET: u32 = 0;
const ARCH_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Numbers from here on are the x32 interface's, which the guest's kernel does not have.
const X32_BIT: u32 = 0x4000_0000;

const ENOSYS: u16 = 38;

/// The program for a set of rules.
pub(crate) fn compile(rules: &Rules) -> Vec<Instruction> {
    let mut program = vec![
        statement(LOAD, ARCH_OFFSET),
        jump(JUMP_EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        give(SeccompAction::Fail(ENOSYS)),
        statement(LOAD, NR_OFFSET),
        jump(JUMP_GREATER_EQUAL, X32_BIT, 0, 1),
        give(SeccompAction::Fail(ENOSYS)),
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
fn runs(rules: &Rules) -> Vec<(u32, &Verdict)> {
    let mut runs = vec![(0, &rules.otherwise)];
    let mut start = |number: u32, verdict| match runs.last_mut() {
        Some((_, last)) if *last == verdict => {}
        Some((first, last)) if *first == number => *last = verdict,
        Some(_) | None => runs.push((number, verdict)),
    };
    for (&number, verdict) in &rules.verdicts {
        start(number, verdict);
        if !rules.verdicts.contains_key(&(number + 1)) {
            start(number + 1, &rules.otherwise);
        }
    }
    runs
}

fn search(runs: &[(u32, &Verdict)]) -> Vec<Instruction> {
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
    leaf(verdict)
}

fn leaf(verdict: &Verdict) -> Vec<Instruction> {
    match verdict {
        Verdict::Always(action) => vec![give(*action)],
        Verdict::First { cases, otherwise } => {
            cases.iter().flat_map(case).chain(std::iter::once(give(*otherwise))).collect()
        }
    }
}

/// Gives the action if all conditions hold, and otherwise goes on behind itself.
fn case(case: &Case) -> Vec<Instruction> {
    let mut code = vec![give(case.action)];
    for wanted in case.conditions.iter().rev() {
        let mut with = condition(wanted, code.len());
        with.append(&mut code);
        code = with;
    }
    code
}

/// Where a comparison leads.
#[derive(Clone, Copy)]
enum To {
    /// To the next instruction.
    On,
    /// To what follows the condition: it holds.
    Holds,
    /// Past the whole case: it does not hold.
    Fails,
}

/// Goes on if the condition holds, else over the `rest` instructions of the case that follow. The machine has
/// 32 bits, so the upper half of an argument decides first, and the lower one where the upper halves are equal.
///
/// The distances fit into an octet: a case has at most [`super::file::MAX_CONDITIONS`] conditions of six instructions.
fn condition(condition: &SeccompCondition, rest: usize) -> Vec<Instruction> {
    use SeccompComparison::{Equal, Greater, GreaterOrEqual, Less, LessOrEqual, NotEqual};
    let halves = |whole: u64| ((whole >> 32) as u32, whole as u32);
    let ((high_mask, low_mask), (high, low)) = (halves(condition.mask), halves(condition.value));
    // Each comparison with where it leads when true and when false.
    let (upper, lower) = match condition.comparison {
        Equal => (vec![(JUMP_EQUAL, To::On, To::Fails)], (JUMP_EQUAL, To::Holds, To::Fails)),
        NotEqual => (vec![(JUMP_EQUAL, To::On, To::Holds)], (JUMP_EQUAL, To::Fails, To::Holds)),
        Greater | GreaterOrEqual => (
            vec![(JUMP_GREATER, To::Holds, To::On), (JUMP_EQUAL, To::On, To::Fails)],
            (orders(condition.comparison), To::Holds, To::Fails),
        ),
        Less | LessOrEqual => (
            vec![(JUMP_GREATER, To::Fails, To::On), (JUMP_EQUAL, To::On, To::Holds)],
            (orders(condition.comparison), To::Fails, To::Holds),
        ),
    };
    let offset = ARGUMENTS_OFFSET + 8 * u32::from(condition.argument);
    let mut steps = Vec::new();
    // An upper half that does not count is zero after masking.
    if high_mask != 0 || high != 0 {
        steps.extend(load(offset + 4, high_mask).into_iter().map(Step::Plain));
        steps.extend(upper.into_iter().map(|(code, yes, no)| Step::Compare(code, high, yes, no)));
    }
    steps.extend(load(offset, low_mask).into_iter().map(Step::Plain));
    steps.push(Step::Compare(lower.0, low, lower.1, lower.2));
    let length = steps.len();
    let distance = |at: usize, to| match to {
        To::On => 0,
        To::Holds => (length - at - 1) as u8,
        To::Fails => (length - at - 1 + rest) as u8,
    };
    steps
        .into_iter()
        .enumerate()
        .map(|(at, step)| match step {
            Step::Plain(instruction) => instruction,
            Step::Compare(code, k, yes, no) => jump(code, k, distance(at, yes), distance(at, no)),
        })
        .collect()
}

enum Step {
    Plain(Instruction),
    Compare(u16, u32, To, To),
}

/// The comparison of the lower halves whose outcome tells an ordering or its opposite.
fn orders(comparison: SeccompComparison) -> u16 {
    use SeccompComparison::{Equal, Greater, GreaterOrEqual, Less, LessOrEqual, NotEqual};
    match comparison {
        Greater | LessOrEqual => JUMP_GREATER,
        GreaterOrEqual | Less => JUMP_GREATER_EQUAL,
        Equal | NotEqual => JUMP_EQUAL,
    }
}

fn load(offset: u32, mask: u32) -> Vec<Instruction> {
    let mut code = vec![statement(LOAD, offset)];
    if mask != u32::MAX {
        code.push(statement(AND, mask));
    }
    code
}

fn statement(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k }
}

fn give(action: SeccompAction) -> Instruction {
    let value = match action {
        SeccompAction::Allow => RET_ALLOW,
        SeccompAction::Log => RET_LOG,
        SeccompAction::Fail(errno) => RET_ERRNO | u32::from(errno),
        SeccompAction::Trace(message) => RET_TRACE | u32::from(message),
        SeccompAction::Trap => RET_TRAP,
        SeccompAction::KillThread => RET_KILL_THREAD,
        SeccompAction::KillProcess => RET_KILL_PROCESS,
    };
    statement(RETURN, value)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the kernel would do with a call, by executing the program.
    pub(crate) fn execute(
        program: &[Instruction],
        arch: u32,
        number: u32,
        arguments: [u64; 6],
    ) -> SeccompAction {
        let word = |offset: u32| match offset {
            NR_OFFSET => number,
            ARCH_OFFSET => arch,
            _ => {
                let argument = arguments[((offset - ARGUMENTS_OFFSET) / 8) as usize];
                (argument >> (8 * ((offset - ARGUMENTS_OFFSET) % 8))) as u32
            }
        };
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let i = program[at];
            let taken = match i.code {
                LOAD => {
                    accumulator = word(i.k);
                    0
                }
                AND => {
                    accumulator &= i.k;
                    0
                }
                JUMP => i.k as usize,
                JUMP_EQUAL => usize::from(if accumulator == i.k { i.jt } else { i.jf }),
                JUMP_GREATER_EQUAL => usize::from(if accumulator >= i.k { i.jt } else { i.jf }),
                JUMP_GREATER => usize::from(if accumulator > i.k { i.jt } else { i.jf }),
                RETURN => return action(i.k),
                other => panic!("unknown instruction {other:#x}"),
            };
            at += 1 + taken;
        }
    }

    fn action(value: u32) -> SeccompAction {
        let data = value as u16;
        match value & 0xffff_0000 {
            RET_ALLOW => SeccompAction::Allow,
            RET_LOG => SeccompAction::Log,
            RET_ERRNO => SeccompAction::Fail(data),
            RET_TRACE => SeccompAction::Trace(data),
            RET_TRAP => SeccompAction::Trap,
            RET_KILL_THREAD => SeccompAction::KillThread,
            RET_KILL_PROCESS => SeccompAction::KillProcess,
            other => panic!("unknown action {other:#x}"),
        }
    }

    pub(crate) fn call(program: &[Instruction], number: u32, arguments: [u64; 6]) -> SeccompAction {
        execute(program, AUDIT_ARCH_X86_64, number, arguments)
    }

    fn any_action() -> impl Strategy<Value = SeccompAction> {
        prop_oneof![
            Just(SeccompAction::Allow),
            Just(SeccompAction::Log),
            Just(SeccompAction::Fail(1)),
            Just(SeccompAction::Fail(38)),
            Just(SeccompAction::Trace(7)),
            Just(SeccompAction::Trap),
            Just(SeccompAction::KillThread),
            Just(SeccompAction::KillProcess),
        ]
    }

    /// Few values, so that they meet.
    fn word() -> impl Strategy<Value = u64> {
        let half = || prop_oneof![Just(0u64), Just(1), Just(2), Just(0x8000_0000), Just(0xffff_ffff)];
        (half(), half()).prop_map(|(high, low)| high << 32 | low)
    }

    fn any_condition() -> impl Strategy<Value = SeccompCondition> {
        use SeccompComparison::{Equal, Greater, GreaterOrEqual, Less, LessOrEqual, NotEqual};
        let comparison =
            proptest::sample::select(vec![Equal, NotEqual, Greater, GreaterOrEqual, Less, LessOrEqual]);
        (0u8..3, word(), comparison, word()).prop_map(|(argument, mask, comparison, value)| {
            let mask = if comparison == Equal { mask } else { u64::MAX };
            SeccompCondition { argument, mask, comparison, value }
        })
    }

    fn any_verdict() -> impl Strategy<Value = Verdict> {
        let case = (prop::collection::vec(any_condition(), 0..4), any_action())
            .prop_map(|(conditions, action)| Case { conditions, action });
        prop_oneof![
            3 => any_action().prop_map(Verdict::Always),
            1 => (prop::collection::vec(case, 1..4), any_action())
                .prop_map(|(cases, otherwise)| Verdict::First { cases, otherwise }),
        ]
    }

    fn holds(condition: &SeccompCondition, arguments: [u64; 6]) -> bool {
        let argument = arguments[usize::from(condition.argument)] & condition.mask;
        match condition.comparison {
            SeccompComparison::Equal => argument == condition.value,
            SeccompComparison::NotEqual => argument != condition.value,
            SeccompComparison::Greater => argument > condition.value,
            SeccompComparison::GreaterOrEqual => argument >= condition.value,
            SeccompComparison::Less => argument < condition.value,
            SeccompComparison::LessOrEqual => argument <= condition.value,
        }
    }

    fn model(verdict: &Verdict, arguments: [u64; 6]) -> SeccompAction {
        match verdict {
            Verdict::Always(action) => *action,
            Verdict::First { cases, otherwise } => cases
                .iter()
                .find(|case| case.conditions.iter().all(|condition| holds(condition, arguments)))
                .map_or(*otherwise, |case| case.action),
        }
    }

    proptest! {
        #[test]
        fn the_program_gives_every_call_its_verdict(
            verdicts in prop::collection::btree_map(0u32..600, any_verdict(), 0..100),
            otherwise in any_verdict(),
            words in prop::collection::vec(word(), 30),
        ) {
            let rules = Rules { verdicts, otherwise };
            let program = compile(&rules);
            for number in 0..620 {
                for three in words.chunks_exact(3) {
                    let arguments = [three[0], three[1], three[2], 0, 0, 0];
                    let expected = model(rules.verdicts.get(&number).unwrap_or(&rules.otherwise), arguments);
                    prop_assert_eq!(call(&program, number, arguments), expected, "{} {:x?}", number, three);
                }
            }
        }
    }

    #[test]
    fn other_machine_interfaces_are_unknown_calls() {
        let otherwise = Verdict::Always(SeccompAction::Allow);
        let program = compile(&Rules { verdicts: BTreeMap::new(), otherwise });
        assert_eq!(call(&program, 1, [0; 6]), SeccompAction::Allow);
        assert_eq!(call(&program, X32_BIT | 1, [0; 6]), SeccompAction::Fail(ENOSYS));
        assert_eq!(execute(&program, 0x4000_0003, 1, [0; 6]), SeccompAction::Fail(ENOSYS));
    }
}
