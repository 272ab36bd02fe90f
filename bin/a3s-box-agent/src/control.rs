//! The conversation between the agent and a stage (a helper process that becomes a session's or an
//! exec's process) over a SEQPACKET socket pair: one protobuf message per packet.
//!
//! ```text
//! stage -> agent   Report::Ready (with the terminal's master, if any) | Report::Failure
//! agent -> stage   one octet: go                                        (sessions only)
//! stage -> agent   Report::Failure, or the end of the connection: execve closed it
//! ```

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use a3s_box_protocol::proto;
use prost::Message;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// No report is longer; error texts are cut to fit.
const MAX_REPORT: usize = 512 * 1024;
/// Error texts are cut here.
const MAX_TEXT: usize = 4096;

/// What a stage tells the agent.
#[derive(Clone, PartialEq, Message)]
pub struct StageReport {
    /// One of the two.
    #[prost(oneof = "Report", tags = "1, 2")]
    pub report: Option<Report>,
}

/// The two things that a stage can say.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Report {
    /// Everything up to execve is set up.
    #[prost(message, tag = "1")]
    Ready(proto::ResolvedUser),
    /// It gave up.
    #[prost(message, tag = "2")]
    Failure(Failure),
}

/// Why a stage gave up.
#[derive(Clone, PartialEq, Message)]
pub struct Failure {
    /// What kind of failure.
    #[prost(enumeration = "FailureKind", tag = "1")]
    pub kind: i32,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// Kinds of failures that callers must tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum FailureKind {
    /// The guest could not do what was asked.
    Internal = 0,
    /// What was asked for makes no sense or does not fit the image.
    Invalid = 1,
    /// The program does not exist.
    ProgramNotFound = 2,
    /// The program may not be executed.
    ProgramDenied = 3,
    /// The kernel cannot execute the file.
    ProgramBroken = 4,
}

impl Failure {
    /// A failure whose text is cut to a length that fits a packet.
    pub fn new(kind: FailureKind, message: String) -> Self {
        let end =
            message.char_indices().map(|(at, _)| at).take_while(|at| *at <= MAX_TEXT).last().unwrap_or(0);
        let message = if message.len() <= MAX_TEXT { message } else { message[..end].to_owned() };
        Self { kind: kind.into(), message }
    }
}

/// Both ends, close-on-exec: the agent's (non-blocking) and the stage's.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (agent, stage) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&agent, true)?;
    Ok((agent, stage))
}

/// Sends a report, with a descriptor if one is given.
pub fn send_report(
    socket: BorrowedFd<'_>,
    report: Report,
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let bytes = StageReport { report: Some(report) }.encode_to_vec();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one report; `None` is the end of the connection.
pub fn receive_report(socket: BorrowedFd<'_>) -> io::Result<Option<(Report, Option<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_REPORT];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut descriptor = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            descriptor = descriptors.next();
        }
    }
    let report = StageReport::decode(&bytes[..received.bytes])
        .ok()
        .and_then(|r| r.report)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a stage sent a malformed report"))?;
    Ok(Some((report, descriptor)))
}

/// Lets a session's stage go on to execve.
pub fn send_go(socket: impl AsFd) -> io::Result<()> {
    rustix::net::send(socket, &[1], SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Waits for the agent's word; `false` if the agent hung up instead.
pub fn wait_for_go(socket: impl AsFd) -> io::Result<bool> {
    let mut octet = [0];
    let (_, length) =
        rustix::io::retry_on_intr(|| rustix::net::recv(&socket, &mut octet, RecvFlags::empty()))?;
    Ok(length == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_carries_a_descriptor_and_the_end_is_seen() {
        let (agent, stage) = pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let user = proto::ResolvedUser { uid: 7, gid: 8, groups: vec![9] };
        send_report(stage.as_fd(), Report::Ready(user.clone()), Some(null.as_fd())).unwrap();
        let (report, descriptor) = receive_report(agent.as_fd()).unwrap().unwrap();
        assert_eq!(report, Report::Ready(user));
        assert!(descriptor.is_some());
        drop(stage);
        assert!(receive_report(agent.as_fd()).unwrap().is_none());
    }

    #[test]
    fn a_stage_that_waits_learns_that_the_agent_hung_up() {
        let (agent, stage) = pair().unwrap();
        send_go(&agent).unwrap();
        assert!(wait_for_go(&stage).unwrap());
        drop(agent);
        assert!(!wait_for_go(&stage).unwrap());
    }

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        let failure = Failure::new(FailureKind::Internal, "ä".repeat(MAX_TEXT));
        assert!(failure.message.len() <= MAX_TEXT && failure.message.ends_with('ä'));
    }
}
