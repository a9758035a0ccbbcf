//! A hello with descriptors beside it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::PollFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::connect::{receive_exact, until_ready};
use crate::wire::SERVER_HELLO_BYTES;

/// Pool, keys, gate.
pub(super) const DESCRIPTORS: usize = 3;

/// Sends a hello and its descriptors. The socket is fresh, so all of it fits the buffer or nothing does.
pub(super) fn send(
    socket: impl AsFd,
    hello: &[u8; SERVER_HELLO_BYTES],
    descriptors: [BorrowedFd<'_>; DESCRIPTORS],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let sent = sendmsg(socket, &[IoSlice::new(hello)], &mut control, flags)?;
    if sent == hello.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Receives a hello and as many descriptors as came with it, [`DESCRIPTORS`] at most.
pub(super) fn receive(
    socket: impl AsFd,
    deadline: Instant,
) -> io::Result<([u8; SERVER_HELLO_BYTES], Vec<OwnedFd>)> {
    let mut hello = [0; SERVER_HELLO_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = until_ready(&socket, PollFlags::IN, deadline, || {
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        Ok(recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut hello)],
            &mut control,
            flags,
        )?)
    })?;
    let mut descriptors = Vec::with_capacity(DESCRIPTORS);
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    if message.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other(
            "not all descriptors of the memory node arrived; raise `ulimit -n` or LimitNOFILE= in the unit",
        ));
    }
    receive_exact(
        &socket,
        hello.get_mut(message.bytes..).unwrap_or_default(),
        deadline,
    )?;
    Ok((hello, descriptors))
}
