//! Descriptors by their numbers: kept ones have the same number in every agent that has them, so that the state can name them.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::check;

/// What is kept has a number from here on. An agent occupies all below before it opens anything of that kind.
pub const FIRST_KEPT: i32 = 64;
/// As many descriptors as an agent uses at most.
pub const MOST: u64 = 65536;
/// Most that one packet carries (the kernel's limit is 253).
const PER_PACKET: usize = 64;
/// A packet's first word.
const WORD: usize = 4;

/// Lets this process have as many descriptors as it may, up to [`MOST`].
pub fn raise_limit() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let most = limit.maximum.unwrap_or(MOST).min(MOST);
    let raised = rustix::process::Rlimit {
        current: Some(limit.current.unwrap_or(MOST).max(most)),
        maximum: limit.maximum,
    };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised);
}

/// Occupies every free number below [`FIRST_KEPT`], for good.
///
/// # Errors
/// The kernel's errno.
pub fn occupy_low_numbers(with: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        let fd = rustix::io::fcntl_dupfd_cloexec(with, 0)?;
        if fd.as_raw_fd() >= FIRST_KEPT {
            return Ok(());
        }
        std::mem::forget(fd);
    }
}

/// A set of descriptor numbers, of fixed size.
#[derive(Clone)]
pub struct Numbers([u64; MOST as usize / 64]);

impl Default for Numbers {
    fn default() -> Self {
        Self([0; MOST as usize / 64])
    }
}

impl Numbers {
    /// Adds one.
    pub fn add(&mut self, number: i32) {
        if let Ok(number) = usize::try_from(number)
            && let Some(word) = self.0.get_mut(number / 64)
        {
            *word |= 1 << (number % 64);
        }
    }

    /// Whether it is in it.
    #[must_use]
    pub fn contains(&self, number: i32) -> bool {
        usize::try_from(number)
            .ok()
            .and_then(|number| Some(self.0.get(number / 64)? >> (number % 64) & 1 == 1))
            .unwrap_or(false)
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = i32> + '_ {
        (0..MOST as i32).filter(|number| self.contains(*number))
    }
}

/// Closes every descriptor but these. Connections are broken off at once: what a dead agent sent last is not sent on.
pub fn close_all_but(kept: &Numbers) {
    let mut from = 0;
    for kept in kept.iter().chain([MOST as i32]) {
        for number in from..kept {
            let linger = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            // SAFETY: the kernel reads a linger, or says that this is no socket.
            unsafe {
                libc::setsockopt(
                    number,
                    libc::SOL_SOCKET,
                    libc::SO_LINGER,
                    std::ptr::from_ref(&linger).cast(),
                    size_of::<libc::linger>() as libc::socklen_t,
                )
            };
        }
        if from < kept {
            // SAFETY: who owned them has died, and this process uses none of them.
            unsafe { libc::syscall(libc::SYS_close_range, from, kept - 1, 0) };
        }
        from = kept + 1;
    }
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_close_range, from, u32::MAX, 0) };
}

/// Room for the descriptors of one packet, laid out as the kernel's `cmsghdr` and its data.
#[repr(C, align(8))]
struct Rights {
    header: libc::cmsghdr,
    numbers: [i32; PER_PACKET],
}

impl Rights {
    fn new() -> Self {
        Self {
            header: libc::cmsghdr {
                cmsg_len: size_of::<libc::cmsghdr>(),
                cmsg_level: libc::SOL_SOCKET,
                cmsg_type: libc::SCM_RIGHTS,
            },
            numbers: [-1; PER_PACKET],
        }
    }
}

/// Sends descriptors with their numbers, in packets; an empty one is the end.
///
/// # Errors
/// The kernel's errno.
pub fn send_all(socket: BorrowedFd<'_>, numbers: &Numbers) -> io::Result<()> {
    let mut rights = Rights::new();
    let mut count = 0;
    for number in numbers.iter() {
        rights.numbers[count] = number;
        count += 1;
        if count == PER_PACKET {
            send(socket, &mut rights, count)?;
            count = 0;
        }
    }
    if count > 0 {
        send(socket, &mut rights, count)?;
    }
    send(socket, &mut rights, 0)
}

fn send(socket: BorrowedFd<'_>, rights: &mut Rights, count: usize) -> io::Result<()> {
    let mut words = [0i32; PER_PACKET + 1];
    words[0] = count as i32;
    words[1..=count].copy_from_slice(&rights.numbers[..count]);
    let mut iov = libc::iovec {
        iov_base: words.as_mut_ptr().cast(),
        iov_len: WORD * (count + 1),
    };
    let len = size_of::<libc::cmsghdr>() + WORD * count;
    rights.header.cmsg_len = len;
    // SAFETY: zeros are a value of a msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    if count > 0 {
        message.msg_control = std::ptr::from_mut(rights).cast();
        message.msg_controllen = len.next_multiple_of(size_of::<usize>());
    }
    // SAFETY: the message names live memory of these lengths.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
    check(sent as i64).map(drop)
}

/// Receives descriptors and puts each where it was, under the number that came with it. Returns how many.
///
/// # Errors
/// The kernel's errno; `InvalidData` for anything else than [`send_all`] sends, or where a number is taken.
pub fn receive_all(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut received: Vec<(OwnedFd, i32)> = Vec::new();
    while receive(socket, &mut received)? {}
    let highest = received.iter().map(|(_, number)| *number).max();
    let beyond = highest.unwrap_or(0) + 1;
    // Out of the way of each other first.
    let mut aside = Vec::with_capacity(received.len());
    for (fd, number) in received {
        aside.push((rustix::io::fcntl_dupfd_cloexec(&fd, beyond)?, number));
        drop(fd);
    }
    for (fd, number) in &aside {
        // SAFETY: an integer; whether the number is free is what is asked.
        let is_free = unsafe { libc::fcntl(*number, libc::F_GETFD) } < 0;
        if *number < FIRST_KEPT || !is_free {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // SAFETY: the number is free, so that nobody's descriptor is closed by this; it stays open for who takes it by number.
        check(i64::from(unsafe {
            libc::dup3(fd.as_raw_fd(), *number, libc::O_CLOEXEC)
        }))?;
    }
    Ok(aside.len())
}

/// Takes one packet; false where it was the last.
fn receive(socket: BorrowedFd<'_>, received: &mut Vec<(OwnedFd, i32)>) -> io::Result<bool> {
    let mut words = [0i32; PER_PACKET + 1];
    let mut iov = libc::iovec {
        iov_base: words.as_mut_ptr().cast(),
        iov_len: size_of_val(&words),
    };
    let mut rights = Rights::new();
    rights.header.cmsg_len = 0;
    // SAFETY: zeros are a value of a msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    message.msg_control = std::ptr::from_mut(&mut rights).cast();
    message.msg_controllen = size_of::<Rights>();
    // SAFETY: the message names live memory of these lengths.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
    let got = check(got as i64)? as usize;
    let arrived = if message.msg_controllen >= size_of::<libc::cmsghdr>() {
        (rights
            .header
            .cmsg_len
            .saturating_sub(size_of::<libc::cmsghdr>())
            / WORD)
            .min(PER_PACKET)
    } else {
        0
    };
    // SAFETY: the kernel has just installed these descriptors for us alone.
    let fds = rights.numbers[..arrived]
        .iter()
        .map(|number| unsafe { OwnedFd::from_raw_fd(*number) });
    let fds: Vec<OwnedFd> = fds.collect();
    let count = usize::try_from(words[0]).unwrap_or(usize::MAX);
    if got < WORD || count != arrived || got != WORD * (count + 1) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    received.extend(fds.into_iter().zip(words[1..=count].iter().copied()));
    Ok(count > 0)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn they_arrive_under_their_numbers() {
        let (here, there) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        // Others of this process's tests open descriptors too: far away from those.
        let (mut end, begin) = io::pipe().unwrap();
        let mut numbers = Numbers::default();
        let mut sent = Vec::new();
        for i in 0..PER_PACKET as i32 + 3 {
            let fd = rustix::io::fcntl_dupfd_cloexec(&begin, 600 + i).unwrap();
            numbers.add(fd.as_raw_fd());
            sent.push(fd);
        }
        let count = sent.len();
        send_all(here.as_fd(), &numbers).unwrap();
        // Taken: nothing is put there.
        assert!(receive_all(there.as_fd()).is_err());
        send_all(here.as_fd(), &numbers).unwrap();
        drop((sent, begin));
        assert_eq!(receive_all(there.as_fd()).unwrap(), count);
        for (at, number) in numbers.iter().enumerate() {
            let fd = super::super::left_at(number).unwrap();
            std::fs::File::from(fd).write_all(&[at as u8]).unwrap();
        }
        let mut all = Vec::new();
        end.read_to_end(&mut all).unwrap();
        assert_eq!(all, (0..count as u8).collect::<Vec<_>>());
    }

    #[test]
    fn a_set_of_numbers_is_one() {
        let mut numbers = Numbers::default();
        for number in [64, 3, 65535, 65536, -1] {
            numbers.add(number);
        }
        assert_eq!(numbers.iter().collect::<Vec<_>>(), [3, 64, 65535]);
    }
}
