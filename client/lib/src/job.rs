//! The library's side of the job protocol: a job holds a region's limit.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use farpage_attach::attach::AttachError;
use farpage_attach::message::{PACKET_BYTES, Packet, kind, tag};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde_json::{Value, json};

use crate::agent::Error;

/// The longest packet of the job protocol.
const MAX_PACKET: usize = 64 << 10;

/// An open job.
#[derive(Debug)]
pub(crate) struct Job {
    socket: OwnedFd,
    /// By which the region's attachment names it.
    pub(crate) token: u64,
}

impl Job {
    /// Opens a job of these limits.
    pub(crate) fn open(socket: &str, local_bytes: u64, far_bytes: u64) -> Result<Self, Error> {
        let failed = |error: AttachError| Error::attach(&error, socket);
        let fd = farpage_attach::sys::socket::connect(socket.as_bytes())
            .map_err(|errno| failed(AttachError::Unreachable(errno)))?;
        let fd = crate::sys::owned(fd);
        let mut hello = Packet::new(tag::HELLO);
        hello.kind = kind::JOB;
        farpage_attach::sys::socket::send(fd.as_raw_fd(), &hello, &[])
            .map_err(|errno| failed(AttachError::Handshake(errno)))?;
        let limits = json!({ "local_bytes": local_bytes, "far_bytes": far_bytes, "replicas": 1 });
        let reply = ask(&fd, &json!({ "open": limits }))?;
        let token = reply
            .pointer("/opened/token")
            .and_then(Value::as_str)
            .and_then(|token| u64::from_str_radix(token, 16).ok())
            .ok_or(Error::Malformed)?;
        Ok(Self { socket: fd, token })
    }

    /// Closes it in order. Without, the agent keeps it until the process is gone.
    pub(crate) fn finish(&self) {
        let _ = ask(&self.socket, &json!("finish"));
    }
}

fn ask(socket: &OwnedFd, request: &Value) -> Result<Value, Error> {
    let failed = |error| Error::System("talking to the agent", io::Error::from(error));
    send(socket, request.to_string().as_bytes(), SendFlags::NOSIGNAL).map_err(failed)?;
    let mut bytes = vec![0u8; MAX_PACKET];
    let (got, _) = recv(socket, &mut bytes, RecvFlags::empty()).map_err(failed)?;
    let bytes = bytes.get(..got).unwrap_or_default();
    if let Some(packet) = Packet::from_bytes(bytes) {
        let reason = bytes.get(PACKET_BYTES..).unwrap_or_default();
        return Err(match packet.tag {
            tag::REFUSAL => Error::Refused(String::from_utf8_lossy(reason).into_owned()),
            _ => Error::Malformed,
        });
    }
    let reply: Value = serde_json::from_slice(bytes).map_err(|_| Error::Malformed)?;
    match reply.pointer("/refused/reason").and_then(Value::as_str) {
        Some(reason) => Err(Error::Refused(reason.to_owned())),
        None => Ok(reply),
    }
}
