//! Launchers: a connection that holds a job, spoken to in text.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::Door;
use crate::job::Job;
use crate::protocol::{Account, JobReply, JobRequest, MAX_PACKET};
use crate::sys::socket;

impl Door {
    /// A launcher's connection: a job's life. However the connection ends, the job ends with it.
    pub(super) fn serve_launcher(&self, peer: &OwnedFd, pid: i32, uid: u32) -> io::Result<()> {
        socket::set_deadline(peer.as_fd(), Duration::ZERO)?;
        let mut job: Option<Arc<Job>> = None;
        let result = self.talk_to_launcher(peer, (pid, uid), &mut job);
        if let Some(job) = job {
            let kill = !job.is_finished() && !job.is_for_regions();
            if kill {
                tracing::warn!(
                    job = format_args!("{:x}", job.token),
                    "the launcher is gone; its programs are ended"
                );
            }
            self.shared.spawner.end_job(&job, kill);
        }
        result
    }

    fn talk_to_launcher(
        &self,
        peer: &OwnedFd,
        (pid, uid): (i32, u32),
        job: &mut Option<Arc<Job>>,
    ) -> io::Result<()> {
        while let Some(request) = receive_json::<JobRequest>(peer)? {
            let reply = match (request, job.as_ref()) {
                (
                    JobRequest::Open {
                        local_bytes,
                        far_bytes,
                        replicas,
                        fault_deadline_s,
                    },
                    None,
                ) => {
                    let deadline =
                        fault_deadline_s.map_or(self.fault_deadline, Duration::from_secs);
                    let spaces = &self.shared.spawner;
                    let copies = u8::try_from(replicas).unwrap_or(u8::MAX);
                    match spaces.open_job(pid, uid, local_bytes, far_bytes, copies, deadline) {
                        Ok(new) => {
                            spaces.wanted_far_memory(&self.shared.far, copies);
                            let token = format!("{:x}", new.token);
                            let lowered = new.ceiling.lowered();
                            *job = Some(new);
                            JobReply::Opened { token, lowered }
                        }
                        Err(error) => JobReply::Refused {
                            reason: error.to_string(),
                        },
                    }
                }
                (JobRequest::Resume { token }, None) => match self.left_job(&token, pid, uid) {
                    Some(left) => {
                        let lowered = left.ceiling.lowered();
                        *job = Some(left);
                        JobReply::Opened { token, lowered }
                    }
                    None => JobReply::Refused {
                        reason: "it knows no such job: it was not restarted in time, and its programs were ended".into(),
                    },
                },
                (JobRequest::Started { pid: program }, Some(job)) => {
                    // Whatever tree it names is watched, and its sizes told.
                    if crate::tree::descendants(pid).contains(&program) {
                        job.started(program);
                        JobReply::Noted
                    } else {
                        JobReply::Refused {
                            reason: format!("process {program} was not started by process {pid}"),
                        }
                    }
                }
                (JobRequest::Finish, Some(job)) => {
                    job.finish();
                    let fabrics = self.shared.far.fabrics();
                    let fabric = if fabrics.is_empty() {
                        &self.fabric
                    } else {
                        &fabrics
                    };
                    let account = job.account(fabric);
                    JobReply::Account(Box::new(Account {
                        extents_below_replicas: self.shared.far.below_goal(job.limits.copies),
                        ..account
                    }))
                }
                _ => JobReply::Refused {
                    reason: "out of turn".into(),
                },
            };
            send_json(peer, &reply)?;
        }
        Ok(())
    }
}

impl Door {
    /// A job that another agent has left, for the process that opened it.
    fn left_job(&self, token: &str, pid: i32, uid: u32) -> Option<Arc<Job>> {
        let token = u64::from_str_radix(token, 16).ok()?;
        let job = self.shared.spawner.job(token)?;
        (uid == job.uid && job.resume(pid)).then_some(job)
    }
}

pub(super) fn send_json<T: serde::Serialize>(peer: &OwnedFd, value: &T) -> io::Result<()> {
    let bytes = serde_json::to_vec(value)?;
    if bytes.len() > MAX_PACKET {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    send(peer, &bytes, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next JSON packet; `None` when the peer has closed.
fn receive_json<T: serde::de::DeserializeOwned>(peer: &OwnedFd) -> io::Result<Option<T>> {
    let mut bytes = vec![0u8; MAX_PACKET];
    let (got, _) = recv(peer, &mut bytes, RecvFlags::empty())?;
    if got == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&bytes[..got])?))
}
