//! The handshake's socket: `SOCK_SEQPACKET` packets with descriptors beside them.

use linux_raw_sys::general as k;

use super::calls::{Errno, raw};
use crate::message::{MAX_FDS, MAX_PACKET, MAX_TEXT, PACKET_BYTES, Packet};

const AF_UNIX: usize = 1;
const SOCK_SEQPACKET: usize = 5;
const SOCK_CLOEXEC: usize = 0o2_000_000;
const SOL_SOCKET: u32 = 1;
const SO_RCVTIMEO: usize = 20;
const SO_SNDTIMEO: usize = 21;
const SCM_RIGHTS: u32 = 1;
const MSG_CMSG_CLOEXEC: usize = 0x4000_0000;
const MSG_NOSIGNAL: usize = 0x4000;
const SUN_PATH: usize = 108;
const ENAMETOOLONG: u32 = 36;
const EPROTO: u32 = 71;
const EINTR: u32 = 4;
const ECONNRESET: u32 = 104;

/// How long the agent may take over any one step of the handshake.
const DEADLINE_SECONDS: i64 = 10;

#[repr(C)]
struct IoVec {
    base: usize,
    len: usize,
}

#[repr(C)]
struct MsgHdr {
    name: usize,
    name_len: u32,
    iov: usize,
    iov_len: usize,
    control: usize,
    control_len: usize,
    flags: i32,
}

/// Room for one `SCM_RIGHTS` message, laid out as the kernel's `cmsghdr` and its data.
#[repr(C, align(8))]
#[derive(Default)]
struct Rights {
    len: usize,
    level: u32,
    kind: u32,
    fds: [i32; MAX_FDS],
}

const RIGHTS_HEADER: usize = 16;

fn call(number: u32, args: [usize; 6]) -> Result<usize, Errno> {
    // SAFETY: every use in this file passes pointers to live locals of the layout the kernel expects.
    let result = unsafe { raw(number, args) };
    if result < 0 {
        Err(Errno(result.unsigned_abs() as u32))
    } else {
        Ok(result as usize)
    }
}

/// Connects to the agent's socket: a path, or `@name` in the abstract namespace.
///
/// # Errors
/// The kernel's errno; ENAMETOOLONG past 107 bytes.
pub fn connect(path: &[u8]) -> Result<i32, Errno> {
    let mut address = [0u8; 2 + SUN_PATH];
    address[0] = AF_UNIX as u8;
    if path.len() >= SUN_PATH {
        return Err(Errno(ENAMETOOLONG));
    }
    for (to, from) in address.iter_mut().skip(2).zip(path) {
        *to = *from;
    }
    let mut len = 2 + path.len() + 1;
    if path.first() == Some(&b'@') {
        address[2] = 0;
        len -= 1;
    }
    let fd = call(
        k::__NR_socket,
        [AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, 0, 0, 0],
    )? as i32;
    let deadline = [DEADLINE_SECONDS, 0i64];
    for option in [SO_RCVTIMEO, SO_SNDTIMEO] {
        let _ = call(
            k::__NR_setsockopt,
            [
                fd as usize,
                SOL_SOCKET as usize,
                option,
                deadline.as_ptr() as usize,
                16,
                0,
            ],
        );
    }
    match call(
        k::__NR_connect,
        [fd as usize, address.as_ptr() as usize, len, 0, 0, 0],
    ) {
        Ok(_) => Ok(fd),
        Err(error) => {
            super::calls::close(fd);
            Err(error)
        }
    }
}

/// Sends one packet with descriptors beside it.
///
/// # Errors
/// The kernel's errno.
pub fn send(fd: i32, packet: &Packet, fds: &[i32]) -> Result<(), Errno> {
    let bytes = packet.to_bytes();
    let iov = IoVec {
        base: bytes.as_ptr() as usize,
        len: bytes.len(),
    };
    let mut rights = Rights {
        level: SOL_SOCKET,
        kind: SCM_RIGHTS,
        ..Rights::default()
    };
    let count = fds.len().min(MAX_FDS);
    for (to, from) in rights.fds.iter_mut().zip(fds) {
        *to = *from;
    }
    rights.len = RIGHTS_HEADER + 4 * count;
    let header = MsgHdr {
        name: 0,
        name_len: 0,
        iov: core::ptr::from_ref(&iov) as usize,
        iov_len: 1,
        control: if count == 0 {
            0
        } else {
            core::ptr::from_ref(&rights) as usize
        },
        control_len: if count == 0 { 0 } else { (rights.len + 7) & !7 },
        flags: 0,
    };
    call(
        k::__NR_sendmsg,
        [
            fd as usize,
            core::ptr::from_ref(&header) as usize,
            MSG_NOSIGNAL,
            0,
            0,
            0,
        ],
    )
    .map(drop)
}

/// A packet received, its descriptors (owned by the caller, -1 where there is none) and any text behind it.
#[derive(Debug)]
pub struct Received {
    /// The packet.
    pub packet: Packet,
    /// Descriptors, in order.
    pub fds: [i32; MAX_FDS],
    /// What followed the packet.
    pub text: [u8; MAX_TEXT],
    /// How much of it counts.
    pub text_len: usize,
}

/// Receives one packet.
///
/// # Errors
/// The kernel's errno, EAGAIN past the deadline, ECONNRESET when the agent hung up, EPROTO when it is not a packet of ours.
pub fn receive(fd: i32) -> Result<Received, Errno> {
    let mut bytes = [0u8; MAX_PACKET];
    let iov = IoVec {
        base: bytes.as_mut_ptr() as usize,
        len: bytes.len(),
    };
    let mut rights = Rights::default();
    let mut header = MsgHdr {
        name: 0,
        name_len: 0,
        iov: core::ptr::from_ref(&iov) as usize,
        iov_len: 1,
        control: core::ptr::from_mut(&mut rights) as usize,
        control_len: core::mem::size_of::<Rights>(),
        flags: 0,
    };
    let got = loop {
        let got = call(
            k::__NR_recvmsg,
            [
                fd as usize,
                core::ptr::from_mut(&mut header) as usize,
                MSG_CMSG_CLOEXEC,
                0,
                0,
                0,
            ],
        );
        // With a deadline on the socket a process that is stopped and continued gets this too, without any handler.
        if got != Err(Errno(EINTR)) {
            break got?;
        }
    };
    let mut fds = [-1i32; MAX_FDS];
    if header.control_len >= RIGHTS_HEADER && rights.kind == SCM_RIGHTS {
        let count = (rights.len.saturating_sub(RIGHTS_HEADER) / 4).min(MAX_FDS);
        for (to, from) in fds.iter_mut().zip(rights.fds).take(count) {
            *to = from;
        }
    }
    if got == 0 {
        return Err(Errno(ECONNRESET));
    }
    let Some(packet) = bytes.get(..got).and_then(Packet::from_bytes) else {
        // The caller is not told of descriptors beside what is no packet: they are closed here, or never.
        for fd in fds.into_iter().filter(|fd| *fd >= 0) {
            super::calls::close(fd);
        }
        return Err(Errno(EPROTO));
    };
    let mut text = [0u8; MAX_TEXT];
    let text_len = (got - PACKET_BYTES)
        .min(packet.text_len as usize)
        .min(text.len());
    for (to, from) in text
        .iter_mut()
        .zip(bytes.iter().skip(PACKET_BYTES))
        .take(text_len)
    {
        *to = *from;
    }
    Ok(Received {
        packet,
        fds,
        text,
        text_len,
    })
}
