//! Conversations with the agents of every build, replayed to this build's client: docs/versioning.md.
//!
//! They are recorded by bin/a3s-box-agent/tests/conversation.rs. The client must send, octet by octet, what that agent was
//! sent, and take what it answered for what it meant. The meaning of each step is in [`MEANING`].

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Mutex;
use std::task::{Context, Poll};

use a3s_box_golden::{Golden, Goldens, unhex};
use a3s_box_protocol::framing::FramingError;
use a3s_box_protocol::proto::stream_open::Kind;
use a3s_box_protocol::proto::{Ready, StreamOpen, session_state};
use a3s_box_vmm::error::{AttachError, ConnectError, MachineError};
use a3s_box_vmm::{Attachment, BackendKind, MachineExit, MachineFacts};
use prost::Message;
use prost::bytes::{Buf, BufMut};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Request, body::Body};

use super::*;
use crate::streams::{Output, StreamName, open_input};

const NAME: &str = "life.json";
const LIMIT: Duration = Duration::from_secs(10);

/// What each step of the recording means to a host.
const MEANING: &[(&str, &str)] = &[
    ("create", "done"),
    ("create again", "done"),
    ("list a created one", "life Created"),
    ("start", "runs as user 0 group 0"),
    ("start again", "FailedPrecondition, of the program: None"),
    ("its output", "from 0: up\\n"),
    ("its errors", "from 0: oops\\n"),
    ("list a running one", "life Running"),
    ("stats", "of life, pod: true, processes: false, memory: false"),
    ("an unknown limit", "InvalidArgument, of the program: None"),
    ("no terminal", "InvalidArgument, of the program: None"),
    ("exec", "done"),
    ("exec's output", "from 0: hi\\n"),
    ("exec's end", "code 3 signal 0, output Some(3) and Some(0)"),
    ("exec of nothing", "FailedPrecondition, of the program: Some(NotFound)"),
    ("exec with input", "done"),
    ("exec's input", "sent abc"),
    ("what it made of it", "from 0: abc"),
    ("its end", "code 0 signal 0, output Some(3) and Some(0)"),
    ("exec that stays", "done"),
    ("kill it", "done"),
    ("a killed one's end", "code 137 signal 9, output Some(0) and Some(0)"),
    ("signal", "delivered"),
    ("wait", "code 7 signal 0, output None and None"),
    ("list an ended one", "life Exited with 7"),
    ("signal an ended one", "delivered"),
    ("delete", "done"),
    ("delete again", "done"),
    ("create one without a program", "done"),
    ("start it", "FailedPrecondition, of the program: Some(NotFound)"),
    ("wait for it", "code 128 signal 0, output None and None"),
    ("delete it", "done"),
    ("wait for nobody", "NotFound, of the program: None"),
    ("list nothing", ""),
];

/// Octets as a recording has them.
fn octets(step: &Value, key: &str) -> Vec<u8> {
    unhex(step[key].as_str().unwrap_or_else(|| panic!("{key} of {step}"))).unwrap()
}

/// A message as this build reads it.
fn read<M: Message + Default>(step: &Value) -> M {
    M::decode(octets(step, "request").as_slice()).unwrap()
}

/// A request as an agent of the recording's age hears it: without the fields that came later, which it ignores.
fn as_heard(call: &str, request: &[u8]) -> Vec<u8> {
    match call {
        "SignalExec" => {
            let request = SignalExecRequest::decode(request).unwrap();
            SignalExecRequest { all: false, ..request }.encode_to_vec()
        }
        _ => request.to_vec(),
    }
}

/// An agent that says what was recorded, to a host that says what was recorded.
#[derive(Clone)]
struct Recorded {
    steps: Arc<Mutex<VecDeque<Value>>>,
    /// Of each stream, whether the host has said on it what was recorded.
    streams: mpsc::UnboundedSender<bool>,
}

impl Recorded {
    fn of(golden: &Golden) -> (Self, mpsc::UnboundedReceiver<bool>) {
        let (streams, played) = mpsc::unbounded_channel();
        let steps = golden.json().as_array().unwrap().iter().cloned().collect();
        (Self { steps: Arc::new(Mutex::new(steps)), streams }, played)
    }

    fn steps_left(&self) -> Vec<Value> {
        self.steps.lock().unwrap().iter().cloned().collect()
    }

    /// The next step, if it is this call with this request.
    fn answer(&self, call: &str, request: &[u8]) -> Result<Vec<u8>, Status> {
        let step = self
            .steps
            .lock()
            .unwrap()
            .pop_front()
            .ok_or_else(|| Status::aborted("nothing more was recorded"))?;
        if step["call"] != call || octets(&step, "request") != as_heard(call, request) {
            let said = a3s_box_golden::hex(request);
            return Err(Status::aborted(format!("the host said {call} {said}, and recorded is {step}")));
        }
        match step.get("refusal") {
            None => Ok(octets(&step, "answer")),
            Some(refusal) => {
                let code = Code::from_i32(refusal["code"].as_i64().unwrap() as i32);
                let message = refusal["message"].as_str().unwrap();
                Err(Status::with_details(code, message, octets(refusal, "details").into()))
            }
        }
    }

    /// One stream, with everything that was said on it.
    async fn serve_stream(self, mut stream: UnixStream) {
        let step = self.steps.lock().unwrap().pop_front().unwrap()["stream"].clone();
        let opened = octets(&step, "open");
        let mut said = vec![0; opened.len()];
        stream.read_exact(&mut said).await.unwrap();
        // A host that says something else finds the stream closed.
        if said != opened {
            return;
        }
        stream.write_all(&octets(&step, "accept")).await.unwrap();
        stream.write_all(&octets(&step, "guest")).await.unwrap();
        let mut said = vec![0; octets(&step, "host").len()];
        let read = stream.read_exact(&mut said).await;
        let as_recorded = read.is_ok() && said == octets(&step, "host");
        self.streams.send(as_recorded).unwrap();
    }
}

/// Messages as octets.
#[derive(Debug, Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining()).to_vec()))
    }
}

struct Answer {
    recorded: Recorded,
    call: String,
}

impl UnaryService<Vec<u8>> for Answer {
    type Response = Vec<u8>;
    type Future = BoxFuture<Response<Vec<u8>>, Status>;

    fn call(&mut self, request: Request<Vec<u8>>) -> Self::Future {
        let answer = self.recorded.answer(&self.call, request.get_ref());
        Box::pin(std::future::ready(answer.map(Response::new)))
    }
}

impl NamedService for Recorded {
    const NAME: &'static str = "a3s.agent.v1.Agent";
}

impl Service<http::Request<Body>> for Recorded {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<http::Response<Body>, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let call = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        let answer = Answer { recorded: self.clone(), call };
        Box::pin(async move { Ok(Grpc::new(Raw).unary(answer, request).await) })
    }
}

#[tonic::async_trait]
impl Machine for Recorded {
    fn facts(&self) -> MachineFacts {
        MachineFacts { backend: BackendKind::Qemu, pid: 1, start_ticks: 1 }
    }

    async fn ready(&self, _: Duration) -> Result<Ready, MachineError> {
        Err(FramingError::from(std::io::Error::from(std::io::ErrorKind::Unsupported)).into())
    }

    async fn connect(&self, port: u32) -> Result<UnixStream, ConnectError> {
        let (host, guest) = UnixStream::pair().map_err(|source| ConnectError { port, source })?;
        if port == RPC_PORT {
            // It ends with the connection, not with the last of them.
            let incoming =
                tokio_stream::iter([Ok::<_, std::io::Error>(guest)]).chain(tokio_stream::pending());
            let server = tonic::transport::Server::builder().add_service(self.clone());
            tokio::spawn(server.serve_with_incoming(incoming));
        } else {
            tokio::spawn(self.clone().serve_stream(guest));
        }
        Ok(host)
    }

    async fn attach(&self, _: Attachment) -> Result<(), AttachError> {
        Ok(())
    }

    async fn detach(&self, _: &str) -> Result<(), AttachError> {
        Ok(())
    }

    async fn set_readonly(&self, _: &str, _: bool) -> Result<(), AttachError> {
        Ok(())
    }

    async fn wait(&self) -> MachineExit {
        std::future::pending().await
    }

    async fn kill(&self) -> Result<(), MachineError> {
        Ok(())
    }

    async fn last_words(&self, _: usize) -> String {
        String::new()
    }
}

fn ended(exit: &ExitStatus) -> String {
    let ExitStatus { code, signal, stdout_bytes, stderr_bytes, .. } = exit;
    format!("code {code} signal {signal}, output {stdout_bytes:?} and {stderr_bytes:?}")
}

fn listed(sessions: &[SessionState]) -> String {
    let one = |state: &SessionState| {
        let exit = state.exit.as_ref().map(|exit| format!(" with {}", exit.code)).unwrap_or_default();
        let phase: session_state::Phase = state.phase();
        format!("{} {phase:?}{exit}", state.session_id)
    };
    sessions.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn measured(stats: &StatsResponse) -> String {
    let of: Vec<&str> = stats.sessions.iter().map(|stats| stats.session_id.as_str()).collect();
    let first = stats.sessions.first();
    format!(
        "of {}, pod: {}, processes: {}, memory: {}",
        of.join(" "),
        stats.pod.is_some(),
        first.is_some_and(|stats| stats.pids > 0),
        first.and_then(|stats| stats.memory.as_ref()).is_some()
    )
}

/// Says to the agent what was said in this step, through the client's own functions; what the host makes of the answer.
async fn say(agent: &Agent, step: &Value) -> Result<String, AgentError> {
    let done = |()| "done".to_owned();
    match step["call"].as_str().unwrap() {
        "CreateSession" => agent.create_session(read(step)).await.map(done),
        "StartSession" => {
            let user = agent.start_session(read::<StartSessionRequest>(step).session_id).await?.user;
            let user = user.unwrap_or_default();
            Ok(format!("runs as user {} group {}", user.uid, user.gid))
        }
        "ListSessions" => Ok(listed(&agent.list_sessions().await?)),
        "Stats" => Ok(measured(&agent.stats(read::<StatsRequest>(step).session_ids).await?)),
        "UpdateResources" => {
            let UpdateResourcesRequest { session_id, resources } = read(step);
            agent.update_resources(session_id, resources.unwrap().settings).await.map(done)
        }
        "ResizeTerminal" => agent.resize(read(step)).await.map(done),
        "Exec" => agent.exec(read(step)).await.map(done),
        "WaitExec" => Ok(ended(&agent.wait_exec(read::<WaitExecRequest>(step).exec_id).await?)),
        "SignalExec" => {
            let SignalExecRequest { exec_id, signal, all: _ } = read(step);
            agent.signal_exec(exec_id, signal).await.map(done)
        }
        "SignalSession" => {
            let SignalSessionRequest { session_id, signal, all } = read(step);
            let delivered = agent.signal_session(session_id, signal, all).await?;
            Ok(if delivered { "delivered" } else { "it has ended" }.to_owned())
        }
        "WaitSession" => Ok(ended(&agent.wait_session(read::<WaitSessionRequest>(step).session_id).await?)),
        "DeleteSession" => {
            agent.delete_session(read::<DeleteSessionRequest>(step).session_id).await.map(done)
        }
        other => panic!("the recording has a call that no host makes: {other}"),
    }
}

/// Opens the stream of this step as the host does, and reads or writes what was read or written.
async fn stream(machine: &dyn Machine, step: &Value) -> String {
    let step = &step["stream"];
    let open = StreamOpen::decode(&octets(step, "open")[4..]).unwrap();
    let kind: Kind = open.kind();
    let name = StreamName { session_id: open.session_id, exec_id: open.exec_id, kind };
    if kind == Kind::Stdin {
        let mut input = open_input(machine, &name, open.keep_open).await.unwrap();
        let said = octets(step, "host");
        input.write_all(&said).await.unwrap();
        input.shutdown().await.unwrap();
        return format!("sent {}", said.escape_ascii());
    }
    let (mut output, first) = Output::open(machine, &name, open.offset).await.unwrap();
    let (mut bytes, expected) = (Vec::new(), octets(step, "guest").len());
    while bytes.len() < expected {
        assert!(output.read(&mut bytes).await.unwrap() > 0, "the stream ended early");
    }
    output.acknowledge(first + bytes.len() as u64);
    format!("from {first}: {}", bytes.escape_ascii())
}

#[tokio::test]
async fn golden_conversations_with_agents_of_every_age_go_as_they_went() {
    let goldens = Goldens::of(concat!(env!("CARGO_MANIFEST_DIR"), "/../protocol"), "wire/conversation");
    for golden in goldens.ages(NAME) {
        let (recorded, mut played) = Recorded::of(&golden);
        let steps = recorded.steps_left();
        let machine: Arc<dyn Machine> = Arc::new(recorded.clone());
        let agent = Agent::new(machine.clone(), LIMIT);
        assert_eq!(steps.len(), MEANING.len(), "{}", golden.path.display());
        for (step, (name, meaning)) in steps.iter().zip(MEANING) {
            assert_eq!(step["step"], *name, "{}", golden.path.display());
            let heard = match step.get("stream") {
                Some(_) => {
                    let heard = stream(machine.as_ref(), step).await;
                    let as_recorded = tokio::time::timeout(LIMIT, played.recv()).await.unwrap();
                    assert_eq!(as_recorded, Some(true), "what the host says in {name}");
                    heard
                }
                None => say(&agent, step).await.unwrap_or_else(|error| match &error {
                    AgentError::Refused { code, .. } => {
                        format!("{code:?}, of the program: {:?}", error.program_fault())
                    }
                    AgentError::Lost { .. } | AgentError::Timeout { .. } => {
                        panic!("{name} of {}: {error}", golden.path.display())
                    }
                }),
            };
            assert_eq!(heard, *meaning, "{name} of {}", golden.path.display());
        }
        assert_eq!(recorded.steps_left(), Vec::<Value>::new());
    }
}
