//! Questions of a process about its own pages, wherever they are.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc;
use std::time::Duration;

use farpage_attach::message::{MAX_PAGES_ASKED, Packet, tag};

use super::{refuse, send_with};
use crate::job::Job;
use crate::mailbox::Request;
use crate::pager::Question;
use crate::sys::socket;

/// How long a pager may take over a question: longer than it waits for a page that is being taken out, and not as long as
/// who asked waits for us.
const ANSWER_DEADLINE: Duration = Duration::from_secs(8);

/// Serves a process of the job until it closes its connection, or has asked nothing for as long as any step may take.
pub(super) fn serve(peer: &OwnedFd, job: &Job, pid: i32) -> io::Result<()> {
    send_with(peer, tag::DONE, &[])?;
    loop {
        let request = socket::receive(peer.as_fd())?.packet;
        if request.tag != tag::SOFT_DIRTY {
            return Err(io::ErrorKind::InvalidData.into());
        }
        match soft_dirty(job, pid, &request) {
            Ok(bits) => send_with(peer, tag::DONE, &bits)?,
            Err(reason) => refuse(peer, reason)?,
        }
    }
}

/// Nobody asks about another process: who is at the other end of the socket decides whose pages are meant.
fn soft_dirty(job: &Job, pid: i32, request: &Packet) -> Result<Vec<u8>, &'static str> {
    let (start, bytes) = (request.holding, request.drain);
    let whole_pages = start % 4096 == 0 && bytes % 4096 == 0;
    let most = MAX_PAGES_ASKED as u64 * 4096;
    let end = start.checked_add(bytes).filter(|_| whole_pages);
    let Some(end) = end.filter(|_| (1..=most).contains(&bytes)) else {
        return Err("ask about 1 to 4096 whole pages at a time");
    };
    let spaces = job.spaces();
    let space = spaces.iter().rfind(|space| space.pid() == Some(pid));
    let space = space.ok_or(
        "this process has no far memory of this job: it did not load the shim, or is a library's in another job",
    )?;
    let (answer, answered) = mpsc::sync_channel(1);
    let question = Question::new(start..end, request.kind != 0, answer);
    if !space.ask(Request::SoftDirty(question)) {
        return Err("its pager takes no more questions now; ask again");
    }
    match answered.recv_timeout(ANSWER_DEADLINE) {
        Ok(Some(bits)) => Ok(bits),
        Ok(None) => Err(
            "this is not managed memory; that is private anonymous memory, readable and writable when it was first managed, \
             of 128 KiB or more, no thread's stack, and not the heap's last page",
        ),
        Err(_) => Err("its pager did not answer in time; ask again"),
    }
}
