//! An agent without a guest: the real service and the real stream protocol over socket pairs.
//!
//! The first word of a process says what it does:
//! `sleep` (until killed) · `deaf` (until SIGKILL) · `immortal` · `print TEXT` · `fail CODE` · `count N` (numbered lines, then sleeps)
//! · `missing` (cannot be executed) · `cat` (until its input ends) · `flood N` (so many bytes, then sleeps)
//! · `mute TEXT` (prints as on a backend that does not pass on the end of a stream)
//! · `pour COUNT WIDTH` (so many lines of so many bytes, in pieces as large as a real agent's)
//!
//! Port 7 of the pod echoes and ends when its client does, port 13 lies about a length, others are closed.

use std::collections::HashMap;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt, split};
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status};

use a3s_box_protocol::framing::{read_message, write_message};
use a3s_box_protocol::proto::agent_server::{Agent, AgentServer};
use a3s_box_protocol::proto::stream_open::Kind;
use a3s_box_protocol::proto::*;
use a3s_box_protocol::{MAX_GUEST_WRITE, chunks};
use a3s_box_vmm::MachineExit;

use super::Faults;

type Exit = Option<MachineExit>;

/// One output stream: everything that was ever written to it, and what was acknowledged.
#[derive(Default)]
struct Pipe {
    bytes: Vec<u8>,
    acknowledged: u64,
    closed: bool,
}

/// One process.
struct Proc {
    args: Vec<String>,
    started: bool,
    exit: watch::Sender<Option<ExitStatus>>,
    out: watch::Sender<Pipe>,
    err: watch::Sender<Pipe>,
    /// The agent keeps the connections of outputs open although they have ended, as those of some backends.
    mute: bool,
    /// Bytes of one write.
    piece: usize,
}

impl Proc {
    fn new(process: Option<Process>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            args: process.unwrap_or_default().args,
            started: false,
            exit: watch::Sender::new(None),
            out: watch::Sender::new(Pipe::default()),
            err: watch::Sender::new(Pipe::default()),
            mute: false,
            // Small and odd, so that lines are torn.
            piece: 777,
        }))
    }

    fn write(&self, text: &str) {
        self.write_bytes(text.as_bytes());
    }

    fn write_bytes(&self, bytes: &[u8]) {
        self.out.send_modify(|pipe| pipe.bytes.extend_from_slice(bytes));
    }

    fn end(&self, code: i32) {
        if self.exit.borrow().is_none() {
            self.out.send_modify(|pipe| pipe.closed = !self.mute);
            self.err.send_modify(|pipe| pipe.closed = !self.mute);
            let length = |pipe: &watch::Sender<Pipe>| Some(pipe.borrow().bytes.len() as u64);
            let (stdout_bytes, stderr_bytes) = (length(&self.out), length(&self.err));
            self.exit.send_replace(Some(ExitStatus {
                code,
                stdout_bytes,
                stderr_bytes,
                ..ExitStatus::default()
            }));
        }
    }

    /// `Err`: it cannot be executed.
    fn start(this: &Arc<Mutex<Self>>, runtime: &Handle) -> Result<(), Status> {
        let mut own = this.lock().unwrap();
        own.started = true;
        let word = |index: usize| own.args.get(index).cloned().unwrap_or_default();
        match word(0).as_str() {
            "print" => {
                own.write(&word(1));
                own.end(0);
            }
            "mute" => {
                let text = word(1);
                own.mute = true;
                own.write(&text);
                own.end(0);
            }
            "flood" => own.write_bytes(&vec![b'x'; word(1).parse().unwrap()]),
            "pour" => {
                let (count, width): (usize, usize) = (word(1).parse().unwrap(), word(2).parse().unwrap());
                let line = [vec![b'x'; width - 1], vec![b'\n']].concat();
                own.piece = MAX_GUEST_WRITE;
                own.write_bytes(&line.repeat(count));
                own.end(0);
            }
            "fail" => own.end(word(1).parse().unwrap()),
            "count" => {
                let (count, this): (u32, _) = (word(1).parse().unwrap(), this.clone());
                runtime.spawn(async move {
                    for number in 0..count {
                        this.lock().unwrap().write(&format!("line {number}\n"));
                        tokio::time::sleep(std::time::Duration::from_micros(200)).await;
                    }
                });
            }
            "missing" => {
                return Err(Status::failed_precondition("exec: \"missing\": not found in \x1b[1m$PATH"));
            }
            _ => {}
        }
        Ok(())
    }

    fn signal(&self, signal: i32) -> bool {
        let deaf = self.args[0] == "immortal" || self.args[0] == "deaf" && signal != 9;
        let ended = self.exit.borrow().is_some();
        if !deaf && !ended {
            self.end(128 + signal);
        }
        !ended
    }
}

/// What runs in one VM.
pub struct Guest {
    faults: Arc<Faults>,
    runtime: Handle,
    exit: watch::Sender<Exit>,
    connections: mpsc::UnboundedSender<std::io::Result<UnixStream>>,
    processes: Mutex<HashMap<String, Arc<Mutex<Proc>>>>,
    pub sessions: Mutex<Vec<String>>,
    /// Those of the session that was made last.
    pub mounts: Mutex<Vec<Mount>>,
    /// The answer to Stats; without one it is refused.
    pub usage: Mutex<Option<StatsResponse>>,
    /// Changes of limits: whose, and `file=value`.
    pub updates: Mutex<Vec<(String, Vec<String>)>>,
    /// Execs that were signalled, and whether with all that they had started.
    pub signalled: Mutex<Vec<bool>>,
}

impl Guest {
    pub fn start(faults: Arc<Faults>, runtime: Handle, exit: watch::Sender<Exit>) -> Arc<Self> {
        let (connections, incoming) = mpsc::unbounded_channel();
        let guest = Arc::new(Self {
            faults,
            runtime: runtime.clone(),
            exit,
            connections,
            processes: Mutex::default(),
            sessions: Mutex::default(),
            mounts: Mutex::default(),
            usage: Mutex::default(),
            updates: Mutex::default(),
            signalled: Mutex::default(),
        });
        let service = AgentServer::new(Service(guest.clone()));
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(UnboundedReceiverStream::new(incoming)),
        );
        guest
    }

    pub fn accept_rpc(&self, stream: StdUnixStream) {
        let _inside = self.runtime.enter();
        self.connections.send(UnixStream::from_std(stream)).ok();
    }

    pub fn accept_stream(self: &Arc<Self>, stream: StdUnixStream) {
        let (guest, mut dead) = (self.clone(), self.exit.subscribe());
        self.runtime.spawn(async move {
            let stream = UnixStream::from_std(stream).unwrap();
            tokio::select! {
                _ = guest.serve_stream(stream) => {}
                _ = dead.wait_for(Option::is_some) => {}
            }
        });
    }

    async fn serve_stream(&self, mut stream: UnixStream) -> Option<()> {
        let open: StreamOpen = read_message(&mut stream).await.ok()?;
        if open.kind() == Kind::Tcp {
            return serve_port(stream, open.port).await;
        }
        let key = if open.exec_id.is_empty() { &open.session_id } else { &open.exec_id };
        let process = self.find(key);
        let Ok(process) = process else {
            let refusal = StreamAccept { error: "no such process".to_owned(), offset: 0 };
            return write_message(&mut stream, &refusal).await.ok();
        };
        if open.kind() == Kind::Stdin {
            write_message(&mut stream, &StreamAccept::default()).await.ok()?;
            let mut bytes = Vec::with_capacity(4096);
            while stream.read_buf(&mut bytes).await.ok()? > 0 {
                process.lock().unwrap().write_bytes(&bytes);
                bytes.clear();
            }
            if !open.keep_open {
                process.lock().unwrap().end(0);
            }
            return Some(());
        }
        let pipe = {
            let process = process.lock().unwrap();
            if open.kind() == Kind::Stderr { process.err.clone() } else { process.out.clone() }
        };
        pipe.send_modify(|pipe| pipe.acknowledged = pipe.acknowledged.max(open.offset));
        let mut offset = pipe.borrow().acknowledged;
        write_message(&mut stream, &StreamAccept { error: String::new(), offset }).await.ok()?;
        let (mut from_host, mut to_host) = stream.into_split();
        let acks = pipe.clone();
        let acknowledge = async {
            while let Ok(ack) = from_host.read_u64().await {
                acks.send_modify(|pipe| {
                    assert!(ack <= pipe.bytes.len() as u64, "only what was sent is acknowledged");
                    pipe.acknowledged = pipe.acknowledged.max(ack);
                });
            }
        };
        let send = async {
            let mut news = pipe.subscribe();
            loop {
                let ready = |pipe: &Pipe| pipe.bytes.len() as u64 > offset || pipe.closed;
                // Not under the pipe's lock: who writes takes these two in this order.
                let piece = process.lock().unwrap().piece;
                let chunk = {
                    let pipe = news.wait_for(ready).await.unwrap();
                    let end = pipe.bytes.len().min(offset as usize + piece);
                    pipe.bytes[offset as usize..end].to_vec()
                };
                if chunk.is_empty() {
                    return;
                }
                if to_host.write_all(&chunk).await.is_err() {
                    return;
                }
                offset += chunk.len() as u64;
            }
        };
        let mut all_acknowledged = pipe.subscribe();
        tokio::select! {
            () = acknowledge => {}
            // As the real agent: the connection closes when all is acknowledged.
            () = async {
                send.await;
                all_acknowledged.wait_for(|pipe| pipe.acknowledged == pipe.bytes.len() as u64).await.ok();
            } => {}
        }
        Some(())
    }

    fn hit(&self, call: &str) -> Result<(), Status> {
        self.faults.hit(call).map_err(|error| Status::internal(error.to_string()))
    }

    fn find(&self, id: &str) -> Result<Arc<Mutex<Proc>>, Status> {
        self.processes.lock().unwrap().get(id).cloned().ok_or_else(|| Status::not_found("no such process"))
    }

    async fn wait(&self, id: &str) -> Result<Response<ExitStatus>, Status> {
        let mut exit = self.find(id)?.lock().unwrap().exit.subscribe();
        let mut dead = self.exit.subscribe();
        tokio::select! {
            status = exit.wait_for(Option::is_some) => Ok(Response::new(status.unwrap().unwrap())),
            _ = dead.wait_for(Option::is_some) => Err(Status::unavailable("the VM ended")),
        }
    }
}

async fn serve_port(mut stream: UnixStream, port: u32) -> Option<()> {
    let error = if matches!(port, 7 | 13) { "" } else { "port 80: Connection refused" };
    write_message(&mut stream, &StreamAccept { error: error.to_owned(), offset: 0 }).await.ok()?;
    let (mut from_host, mut to_host) = stream.into_split();
    if port == 13 {
        to_host.write_all(&[0xff; 8]).await.ok()?;
    } else if port == 7 {
        let (server, inner) = tokio::io::duplex(1000);
        let ((mut from, mut to), (mut read, mut write)) = (split(server), split(inner));
        let echo = async {
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).await?;
            to.write_all(&bytes).await?;
            to.shutdown().await
        };
        tokio::try_join!(chunks::carry(&mut from_host, &mut to_host, &mut read, &mut write), echo).ok()?;
    }
    Some(())
}

struct Service(Arc<Guest>);

#[tonic::async_trait]
impl Agent for Service {
    async fn configure_sandbox(
        &self,
        request: Request<ConfigureSandboxRequest>,
    ) -> Result<Response<ConfigureSandboxResponse>, Status> {
        self.0.hit("agent configure")?;
        for (place, interface) in (0..).zip(&request.get_ref().interfaces) {
            assert_eq!(
                interface.device_mac,
                [0x02, 0xa3, 0x5b, 0, 0, place],
                "every NIC is found by its own"
            );
        }
        Ok(Response::new(ConfigureSandboxResponse {}))
    }

    async fn create_session(
        &self,
        request: Request<CreateSessionRequest>,
    ) -> Result<Response<CreateSessionResponse>, Status> {
        self.0.hit("agent create")?;
        let request = request.into_inner();
        self.0.processes.lock().unwrap().insert(request.session_id.clone(), Proc::new(request.process));
        self.0.sessions.lock().unwrap().push(request.session_id);
        *self.0.mounts.lock().unwrap() = request.mounts;
        Ok(Response::new(CreateSessionResponse {}))
    }

    async fn start_session(
        &self,
        request: Request<StartSessionRequest>,
    ) -> Result<Response<StartSessionResponse>, Status> {
        self.0.hit("agent start")?;
        Proc::start(&self.0.find(&request.get_ref().session_id)?, &self.0.runtime)?;
        let user = ResolvedUser { uid: 0, gid: 0, groups: vec![] };
        Ok(Response::new(StartSessionResponse { pid: 9, user: Some(user) }))
    }

    async fn signal_session(
        &self,
        request: Request<SignalSessionRequest>,
    ) -> Result<Response<SignalSessionResponse>, Status> {
        self.0.hit("agent signal")?;
        let request = request.get_ref();
        match self.0.find(&request.session_id)?.lock().unwrap().signal(request.signal) {
            true => Ok(Response::new(SignalSessionResponse {})),
            false => Err(Status::not_found("it has ended")),
        }
    }

    async fn update_resources(
        &self,
        request: Request<UpdateResourcesRequest>,
    ) -> Result<Response<UpdateResourcesResponse>, Status> {
        let UpdateResourcesRequest { session_id, resources } = request.into_inner();
        let lines: Vec<String> = resources
            .unwrap_or_default()
            .settings
            .into_iter()
            .map(|setting| format!("{}={}", setting.file, setting.value))
            .collect();
        if lines.iter().any(|line| line == "memory.max=1") {
            return Err(Status::failed_precondition("it is in use"));
        }
        self.0.updates.lock().unwrap().push((session_id, lines));
        Ok(Response::new(UpdateResourcesResponse {}))
    }

    async fn wait_session(
        &self,
        request: Request<WaitSessionRequest>,
    ) -> Result<Response<ExitStatus>, Status> {
        self.0.hit("agent wait")?;
        self.0.wait(&request.get_ref().session_id).await
    }

    async fn delete_session(
        &self,
        request: Request<DeleteSessionRequest>,
    ) -> Result<Response<DeleteSessionResponse>, Status> {
        self.0.hit("agent delete")?;
        let id = request.into_inner().session_id;
        if let Some(process) = self.0.processes.lock().unwrap().remove(&id) {
            process.lock().unwrap().end(137);
        }
        self.0.sessions.lock().unwrap().retain(|known| *known != id);
        Ok(Response::new(DeleteSessionResponse {}))
    }

    async fn list_sessions(
        &self,
        _: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        self.0.hit("agent list")?;
        let sessions = self.0.sessions.lock().unwrap().clone();
        let state = |id: String| {
            let process = self.0.find(&id).unwrap();
            let process = process.lock().unwrap();
            let exit = *process.exit.borrow();
            let phase = match (process.started, &exit) {
                (false, _) => session_state::Phase::Created,
                (true, None) => session_state::Phase::Running,
                (true, Some(_)) => session_state::Phase::Exited,
            };
            SessionState { session_id: id, phase: phase.into(), pid: 9, exit }
        };
        Ok(Response::new(ListSessionsResponse { sessions: sessions.into_iter().map(state).collect() }))
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Result<Response<ExecResponse>, Status> {
        self.0.hit("agent exec")?;
        let request = request.into_inner();
        let process = Proc::new(request.process);
        self.0.processes.lock().unwrap().insert(request.exec_id, process.clone());
        Proc::start(&process, &self.0.runtime)?;
        Ok(Response::new(ExecResponse { pid: 10 }))
    }

    async fn wait_exec(&self, request: Request<WaitExecRequest>) -> Result<Response<ExitStatus>, Status> {
        self.0.hit("agent wait exec")?;
        self.0.wait(&request.get_ref().exec_id).await
    }

    async fn signal_exec(
        &self,
        request: Request<SignalExecRequest>,
    ) -> Result<Response<SignalExecResponse>, Status> {
        let request = request.get_ref();
        self.0.find(&request.exec_id)?.lock().unwrap().signal(request.signal);
        self.0.signalled.lock().unwrap().push(request.all);
        Ok(Response::new(SignalExecResponse {}))
    }

    async fn close_stdin(
        &self,
        _: Request<CloseStdinRequest>,
    ) -> Result<Response<CloseStdinResponse>, Status> {
        Ok(Response::new(CloseStdinResponse {}))
    }

    async fn resize_terminal(
        &self,
        _: Request<ResizeTerminalRequest>,
    ) -> Result<Response<ResizeTerminalResponse>, Status> {
        Ok(Response::new(ResizeTerminalResponse {}))
    }

    async fn stats(&self, _: Request<StatsRequest>) -> Result<Response<StatsResponse>, Status> {
        let usage = self.0.usage.lock().unwrap().clone();
        usage.map(Response::new).ok_or_else(|| Status::internal("the counters cannot be read"))
    }

    async fn shutdown(&self, _: Request<ShutdownRequest>) -> Result<Response<ShutdownResponse>, Status> {
        self.0.hit("agent shutdown")?;
        let exit = self.0.exit.clone();
        self.0.runtime.spawn(async move {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            exit.send_if_modified(|state| {
                state.get_or_insert(MachineExit::PowerOff) == &MachineExit::PowerOff
            });
        });
        Ok(Response::new(ShutdownResponse {}))
    }
}

impl Guest {
    /// Signals a process from within the guest.
    pub fn signal(&self, id: &str, signal: i32) {
        self.find(id).unwrap().lock().unwrap().signal(signal);
    }
}
