//! A host's conversation with this build's agent, recorded: docs/versioning.md.
//!
//! The recordings are replayed to the daemon of every later build (crates/runtime/src/agent_client/conversation.rs),
//! because an agent runs as long as its box. Here today's agent must still say what the newest recording says.

mod common;

use a3s_box_agent::rpc::Service;
use a3s_box_golden::{Goldens, hex, unhex};
use a3s_box_protocol::framing::write_message;
use a3s_box_protocol::proto::agent_server::Agent as _;
use a3s_box_protocol::proto::stream_open::Kind;
use a3s_box_protocol::proto::*;
use common::{TestBox, in_a_box, process, session, shell};
use prost::Message;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Request, Response, Status};

const NAME: &str = "life.json";

/// A host, and what was said so far.
struct Recorder {
    agent: Service,
    steps: Vec<Value>,
}

impl Recorder {
    fn note(
        &mut self,
        step: &str,
        call: &str,
        request: &impl Message,
        answer: Result<Response<impl Message>, Status>,
    ) {
        let mut said = json!({ "step": step, "call": call, "request": digits(&request.encode_to_vec()) });
        match answer {
            Ok(answer) => said["answer"] = digits(&answer.into_inner().encode_to_vec()),
            Err(status) => {
                let (code, message) = (i32::from(status.code()), status.message());
                said["refusal"] =
                    json!({ "code": code, "message": message, "details": digits(status.details()) });
            }
        }
        self.steps.push(said);
    }

    /// An output: what came, with the acknowledgement of all of it.
    async fn output(
        &mut self,
        step: &str,
        b: &TestBox,
        (session, exec): (&str, &str),
        kind: Kind,
        length: usize,
    ) {
        let (mut stream, accept) = b.open(session, exec, kind, 0).await;
        let mut guest = vec![0; length];
        stream.read_exact(&mut guest).await.unwrap();
        let host = (length as u64).to_be_bytes();
        stream.write_all(&host).await.unwrap();
        self.stream(step, (session, exec), kind, &accept, &guest, &host).await;
    }

    async fn stream(
        &mut self,
        step: &str,
        (session, exec): (&str, &str),
        kind: Kind,
        accept: &StreamAccept,
        guest: &[u8],
        host: &[u8],
    ) {
        // As the test's host opens streams.
        let open = StreamOpen {
            session_id: session.to_owned(),
            exec_id: exec.to_owned(),
            kind: kind.into(),
            ..StreamOpen::default()
        };
        let (mut opened, mut accepted) = (Vec::new(), Vec::new());
        write_message(&mut opened, &open).await.unwrap();
        write_message(&mut accepted, accept).await.unwrap();
        self.steps.push(json!({
            "step": step,
            "stream": { "open": digits(&opened), "accept": digits(&accepted), "guest": digits(guest), "host": digits(host) },
        }));
    }
}

fn digits(bytes: &[u8]) -> Value {
    hex(bytes).replace('\n', "").into()
}

macro_rules! call {
    ($host:ident, $step:expr, $call:ident, $method:ident, $request:expr) => {{
        let request = $request;
        let answer = $host.agent.$method(Request::new(request.clone())).await;
        $host.note($step, stringify!($call), &request, answer);
    }};
}

fn id(id: &str) -> String {
    id.to_owned()
}

fn exec(exec_id: &str, args: &[&str], stdin: bool) -> ExecRequest {
    ExecRequest { session_id: id("life"), exec_id: id(exec_id), process: Some(process(args)), stdin }
}

#[test]
fn golden_conversations_are_what_this_agent_says() {
    in_a_box(|b| async move {
        let mut host = Recorder { agent: Service::new(b.table.clone()), steps: Vec::new() };
        life(&mut host, &b).await;
        commands(&mut host, &b).await;
        end(&mut host).await;
        failures(&mut host).await;
        let text = serde_json::to_string_pretty(&host.steps).unwrap() + "\n";
        let goldens =
            Goldens::of(concat!(env!("CARGO_MANIFEST_DIR"), "/../../crates/protocol"), "wire/conversation");
        goldens.check_by(NAME, text.as_bytes(), |golden| {
            let recorded = golden.json();
            let recorded = recorded.as_array().unwrap();
            assert_eq!(recorded.len(), host.steps.len(), "steps of {}", golden.path.display());
            for (recorded, said) in recorded.iter().zip(&host.steps) {
                assert_eq!(steady(said), steady(recorded), "now, and in {}", golden.path.display());
            }
            true
        });
        goldens.are_all_known(&[NAME]);
    });
}

async fn life(host: &mut Recorder, b: &TestBox) {
    let script = "echo up; echo oops >&2; trap 'exit 7' TERM; while :; do sleep 1 & wait $!; done";
    call!(host, "create", CreateSession, create_session, shell("life", script));
    call!(host, "create again", CreateSession, create_session, shell("life", script));
    call!(host, "list a created one", ListSessions, list_sessions, ListSessionsRequest {});
    call!(host, "start", StartSession, start_session, StartSessionRequest { session_id: id("life") });
    call!(host, "start again", StartSession, start_session, StartSessionRequest { session_id: id("life") });
    host.output("its output", b, ("life", ""), Kind::Stdout, 3).await;
    host.output("its errors", b, ("life", ""), Kind::Stderr, 5).await;
    call!(host, "list a running one", ListSessions, list_sessions, ListSessionsRequest {});
    call!(host, "stats", Stats, stats, StatsRequest { session_ids: vec![id("life"), id("nobody")] });
    let settings = vec![CgroupSetting { file: id("memory.nope"), value: id("1") }];
    let update = UpdateResourcesRequest { session_id: id("life"), resources: Some(Resources { settings }) };
    call!(host, "an unknown limit", UpdateResources, update_resources, update);
    let resize =
        ResizeTerminalRequest { session_id: id("life"), exec_id: String::new(), rows: 24, columns: 80 };
    call!(host, "no terminal", ResizeTerminal, resize_terminal, resize);
}

async fn commands(host: &mut Recorder, b: &TestBox) {
    call!(host, "exec", Exec, exec, exec("short", &["sh", "-c", "echo hi; exit 3"], false));
    host.output("exec's output", b, ("life", "short"), Kind::Stdout, 3).await;
    call!(host, "exec's end", WaitExec, wait_exec, WaitExecRequest { exec_id: id("short") });
    call!(host, "exec of nothing", Exec, exec, exec("none", &["no-such-program"], false));
    call!(host, "exec with input", Exec, exec, exec("cat", &["cat"], true));
    let (mut stdin, accept) = b.open("life", "cat", Kind::Stdin, 0).await;
    stdin.write_all(b"abc").await.unwrap();
    stdin.shutdown().await.unwrap();
    host.stream("exec's input", ("life", "cat"), Kind::Stdin, &accept, b"", b"abc").await;
    host.output("what it made of it", b, ("life", "cat"), Kind::Stdout, 3).await;
    call!(host, "its end", WaitExec, wait_exec, WaitExecRequest { exec_id: id("cat") });
    call!(host, "exec that stays", Exec, exec, exec("stay", &["sleep", "1000"], false));
    call!(
        host,
        "kill it",
        SignalExec,
        signal_exec,
        SignalExecRequest { exec_id: id("stay"), signal: 9, all: false }
    );
    call!(host, "a killed one's end", WaitExec, wait_exec, WaitExecRequest { exec_id: id("stay") });
}

async fn end(host: &mut Recorder) {
    let signal = |all| SignalSessionRequest { session_id: id("life"), signal: 15, all };
    call!(host, "signal", SignalSession, signal_session, signal(false));
    call!(host, "wait", WaitSession, wait_session, WaitSessionRequest { session_id: id("life") });
    call!(host, "list an ended one", ListSessions, list_sessions, ListSessionsRequest {});
    call!(host, "signal an ended one", SignalSession, signal_session, signal(true));
    call!(host, "delete", DeleteSession, delete_session, DeleteSessionRequest { session_id: id("life") });
    call!(
        host,
        "delete again",
        DeleteSession,
        delete_session,
        DeleteSessionRequest { session_id: id("life") }
    );
}

async fn failures(host: &mut Recorder) {
    call!(
        host,
        "create one without a program",
        CreateSession,
        create_session,
        session("none", &["no-such-program"])
    );
    call!(host, "start it", StartSession, start_session, StartSessionRequest { session_id: id("none") });
    call!(host, "wait for it", WaitSession, wait_session, WaitSessionRequest { session_id: id("none") });
    call!(host, "delete it", DeleteSession, delete_session, DeleteSessionRequest { session_id: id("none") });
    call!(
        host,
        "wait for nobody",
        WaitSession,
        wait_session,
        WaitSessionRequest { session_id: id("nobody") }
    );
    call!(host, "list nothing", ListSessions, list_sessions, ListSessionsRequest {});
}

/// A step without what differs from run to run.
fn steady(step: &Value) -> Value {
    let mut steady = step.clone();
    let bytes = |value: &Value| unhex(value.as_str().unwrap_or_default()).unwrap();
    if let Some(answer) = step.get("answer") {
        steady["answer"] = steady_answer(step["call"].as_str().unwrap_or_default(), &bytes(answer)).into();
    }
    steady
}

fn steady_answer(call: &str, bytes: &[u8]) -> String {
    let steady_exit =
        |exit: ExitStatus| ExitStatus { exited_at_ns: u64::from(exit.exited_at_ns > 0), ..exit };
    match call {
        "StartSession" => {
            let answer = StartSessionResponse::decode(bytes).unwrap();
            format!("{:?}", StartSessionResponse { pid: u32::from(answer.pid > 0), ..answer })
        }
        "Exec" => {
            format!("{:?}", ExecResponse { pid: u32::from(ExecResponse::decode(bytes).unwrap().pid > 0) })
        }
        "WaitSession" | "WaitExec" => format!("{:?}", steady_exit(ExitStatus::decode(bytes).unwrap())),
        "ListSessions" => {
            let mut answer = ListSessionsResponse::decode(bytes).unwrap();
            for state in &mut answer.sessions {
                (state.pid, state.exit) = (u32::from(state.pid > 0), state.exit.map(steady_exit));
            }
            format!("{answer:?}")
        }
        "Stats" => {
            // What a kernel counts, and how much, is another on every machine.
            let answer = StatsResponse::decode(bytes).unwrap();
            let said = |stats: &SessionStats| {
                (stats.session_id.clone(), stats.cpu.is_some(), stats.memory.is_some())
            };
            format!(
                "{:?} {:?}",
                answer.sessions.iter().map(said).collect::<Vec<_>>(),
                answer.pod.as_ref().map(said)
            )
        }
        _ => hex(bytes),
    }
}
