//! The agent's end of the handshake socket.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use farpage_attach::message::{MAX_FDS, Packet};
use farpage_attach::sys::socket as raw;

use super::check;

/// A packet with the descriptors that came beside it.
#[derive(Debug)]
pub struct Arrived {
    /// The packet.
    pub packet: Packet,
    /// The descriptors, in order.
    pub fds: Vec<OwnedFd>,
}

/// Receives a packet of the handshake.
///
/// # Errors
/// The kernel's errno; EPROTO for anything that is not a packet.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<Arrived> {
    let received = raw::receive(socket.as_raw_fd())
        .map_err(|errno| io::Error::from_raw_os_error(errno.0 as i32))?;
    let fds = received.fds.into_iter().filter(|fd| *fd >= 0);
    // SAFETY: the kernel has just installed these descriptors for us alone.
    let fds = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
    Ok(Arrived {
        packet: received.packet,
        fds,
    })
}

/// Sends a packet of the handshake.
///
/// # Errors
/// The kernel's errno.
pub fn send(socket: BorrowedFd<'_>, packet: &Packet, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut numbers = [-1; MAX_FDS];
    for (number, fd) in numbers.iter_mut().zip(fds) {
        *number = fd.as_raw_fd();
    }
    raw::send(
        socket.as_raw_fd(),
        packet,
        numbers.get(..fds.len()).unwrap_or_default(),
    )
    .map_err(|errno| io::Error::from_raw_os_error(errno.0 as i32))
}

/// Who is at the other end: pid, uid, gid as they were when it connected.
///
/// # Errors
/// The kernel's errno.
pub fn peer(socket: BorrowedFd<'_>) -> io::Result<(i32, u32, u32)> {
    let mut credentials = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes of a ucred into it.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            std::ptr::from_mut(&mut credentials).cast(),
            &mut len,
        )
    };
    check(i64::from(result))?;
    Ok((credentials.pid, credentials.uid, credentials.gid))
}

/// The supplementary groups of whoever is at the other end, as they were when it connected. Asked of the socket, not of
/// `/proc`: the process may have become another since.
///
/// # Errors
/// The kernel's errno.
pub fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups = vec![0u32; 64];
    loop {
        let mut len = (groups.len() * size_of::<u32>()) as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes of group numbers into the vector, and how many to `len`.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &mut len,
            )
        };
        let needed = len as usize / size_of::<u32>();
        match check(i64::from(result)) {
            Ok(_) => {
                groups.truncate(needed);
                return Ok(groups);
            }
            Err(error) if error.raw_os_error() == Some(libc::ERANGE) && needed > groups.len() => {
                groups.resize(needed, 0);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Waits at most this long in any one receive or send.
///
/// # Errors
/// The kernel's errno.
pub fn set_deadline(socket: BorrowedFd<'_>, deadline: std::time::Duration) -> io::Result<()> {
    let time = libc::timeval {
        tv_sec: deadline.as_secs() as i64,
        tv_usec: i64::from(deadline.subsec_micros()),
    };
    for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        // SAFETY: the kernel reads a timeval.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                std::ptr::from_ref(&time).cast(),
                size_of::<libc::timeval>() as libc::socklen_t,
            )
        };
        check(i64::from(result))?;
    }
    Ok(())
}

/// Takes ownership of a socket that the attach crate has just connected.
#[must_use]
pub fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the caller has this descriptor from `raw::connect`, which gives it to nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    /// A peer could use up the agent's descriptors by sending some beside what is no packet.
    #[test]
    fn descriptors_beside_garbage_are_closed() {
        let (peer, here) = UnixDatagram::pair().unwrap();
        let (mut end, other_end) = io::pipe().unwrap();
        let garbage = Packet::default();
        send(peer.as_fd(), &garbage, &[other_end.as_fd()]).unwrap();
        drop(other_end);
        let error = receive(here.as_fd()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPROTO));
        rustix::io::ioctl_fionbio(&end, true).unwrap();
        // The end of the pipe, and not EAGAIN: nobody holds the other end any more.
        assert_eq!(end.read(&mut [0; 1]).unwrap(), 0);
    }
}
