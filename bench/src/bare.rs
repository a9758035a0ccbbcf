//! The baselines: a bare userfaultfd loop that answers another process, and a bare round trip over TCP.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Child;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::far::{finish, spawn_child};
use crate::median::quantile;
use crate::region::PAGE;
use crate::requester::Requester;
use crate::{BenchError, Options};

/// Bytes of a request for a page, and of a page.
pub(crate) const REQUEST_BYTES: usize = 32;

/// Where the answering loop has its pages from.
pub(crate) enum Source<'a> {
    /// From its own memory, so many at each fault.
    AtHand(usize),
    /// One at each fault, from the other end of a connection, which it looks at until the page is there.
    Fabric(&'a mut Requester),
}

/// Runs a measuring process whose faults this process answers. Returns what it printed.
pub(crate) fn answered<T: serde::de::DeserializeOwned>(
    options: &Options,
    words: &[&str],
    source: Source<'_>,
) -> Result<T, BenchError> {
    let path = std::env::temp_dir().join(format!("farpage-bench-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path)
        .map_err(BenchError::system("listening for the measuring process"))?;
    let at = path.to_string_lossy().into_owned();
    let mut child = spawn_child(options, words, &[&at])?;
    let result = answer_child(&listener, source);
    let _ = std::fs::remove_file(&path);
    if let Err(error) = result {
        // Its touch would wait for ever.
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    finish(child, words)
}

fn answer_child(listener: &UnixListener, source: Source<'_>) -> Result<(), BenchError> {
    let failed = BenchError::system("answering the measuring process");
    let (program, _) = listener.accept().map_err(failed)?;
    let uffd = receive_fd(&program).map_err(BenchError::system("receiving its userfaultfd"))?;
    answer(&uffd, program.as_fd(), source)
}

/// The loop: wait, read a message, install. Until the program closes its end of the socket.
fn answer(
    uffd: &OwnedFd,
    program: BorrowedFd<'_>,
    mut source: Source<'_>,
) -> Result<(), BenchError> {
    let failed = || BenchError::system("answering the measuring process");
    let mut pages = match &source {
        Source::AtHand(pages) => vec![7; pages * PAGE],
        Source::Fabric(_) => vec![0; PAGE],
    };
    let mut fds = [
        PollFd::new(uffd, PollFlags::IN),
        PollFd::from_borrowed_fd(program, PollFlags::IN),
    ];
    loop {
        poll(&mut fds, None).map_err(|errno| failed()(errno.into()))?;
        if fds[0].revents().is_empty() {
            return Ok(());
        }
        let Some(to) = next_fault(uffd).map_err(failed())? else {
            continue;
        };
        if let Source::Fabric(requester) = &mut source {
            requester.read(to as usize / PAGE, &mut pages)?;
        }
        crate::sys::copy(uffd.as_fd(), to, &pages).map_err(failed())?;
    }
}

/// The page that a thread waits for, if that is what there is to say.
fn next_fault(uffd: &OwnedFd) -> std::io::Result<Option<u64>> {
    const EVENT_PAGEFAULT: u8 = 0x12;
    let mut message = [0u8; 32];
    if rustix::io::read(uffd, &mut message)? != 32 || message[0] != EVENT_PAGEFAULT {
        return Ok(None);
    }
    let mut address = [0u8; 8];
    address.copy_from_slice(&message[16..24]);
    Ok(Some(u64::from_ne_bytes(address) & !(PAGE as u64 - 1)))
}

/// Hands a descriptor to the answering process.
pub(crate) fn send_fd(socket: &UnixStream, fd: BorrowedFd<'_>) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    rights.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(
        socket,
        &[IoSlice::new(&[1])],
        &mut rights,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

fn receive_fd(socket: &UnixStream) -> std::io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8];
    recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut rights,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fds = rights.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fds.next()
        .ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
}

/// p50 and p99 of asking another process over TCP loopback for 4 KiB, microseconds.
pub(crate) fn tcp_round_trip(options: &Options, rounds: usize) -> Result<(f64, f64), BenchError> {
    let failed = || BenchError::system("the bare round trip over TCP");
    let listener = TcpListener::bind("127.0.0.1:0").map_err(failed())?;
    let address = listener.local_addr().map_err(failed())?.to_string();
    let mut child: Child = spawn_child(options, &["peer", &address], &[])?;
    let times = listener
        .accept()
        .and_then(|(peer, _)| round_trips(peer, rounds));
    let _ = child.kill();
    let _ = child.wait();
    let mut times = times.map_err(failed())?;
    Ok((quantile(&mut times, 0.5), quantile(&mut times, 0.99)))
}

fn round_trips(mut peer: TcpStream, rounds: usize) -> std::io::Result<Vec<f64>> {
    peer.set_nodelay(true)?;
    let mut page = [0u8; PAGE];
    let mut times = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let began = Instant::now();
        peer.write_all(&[1; REQUEST_BYTES])?;
        peer.read_exact(&mut page)?;
        times.push(began.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}
