//! Takes connections in: a thread for each, as many as there are places, and an end to all of them.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

/// After a failed accept (no descriptors left, say) the listener rests: the cause does not pass in a moment.
const ACCEPT_REST: Duration = Duration::from_millis(20);

/// Who serves connections.
pub(crate) trait Host: Send + Sync + 'static {
    /// Serves one until it ends, which it does when it is shut down. `stopping`: whether that is why.
    fn serve(&self, socket: &TcpStream, stopping: &AtomicBool);

    /// Counts one that has no place, and says so to it, without waiting.
    fn turn_away(&self, socket: &TcpStream);
}

/// A listener with its connections. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Acceptor {
    stopping: Arc<AtomicBool>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    local_addr: SocketAddr,
}

impl Acceptor {
    /// Takes in what comes to `listener`, `places` at a time, in threads whose names begin with `name`.
    pub(crate) fn start<H: Host>(
        listener: TcpListener,
        name: &'static str,
        places: usize,
        host: Arc<H>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let local_addr = listener.local_addr()?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let stopping = Arc::new(AtomicBool::new(false));
        let entrance = Arc::new(Entrance {
            host,
            name,
            places,
            stopping: stopping.clone(),
            connections: Mutex::new(HashMap::new()),
        });
        let thread = std::thread::Builder::new()
            .name(format!("{name}-accept"))
            .spawn({
                let wake = wake.clone();
                move || entrance.accept_loop(&listener, &wake)
            })?;
        Ok(Self {
            stopping,
            wake,
            thread: Some(thread),
            local_addr,
        })
    }

    /// Where it listens.
    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Closes the listener and every connection, and waits for their threads.
    pub(crate) fn stop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        // Writing 1 to a fresh eventfd cannot fail.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // It ends by returning; had it panicked, there would be nothing to wait for.
            let _ = thread.join();
        }
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What the accepting thread and those of the connections share.
struct Entrance<H> {
    host: Arc<H>,
    name: &'static str,
    places: usize,
    stopping: Arc<AtomicBool>,
    /// What is open, to be shut down on a stop.
    connections: Mutex<HashMap<u64, Arc<TcpStream>>>,
}

impl<H: Host> Entrance<H> {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, Arc<TcpStream>>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn accept_loop(self: &Arc<Self>, listener: &TcpListener, wake: &OwnedFd) {
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        let mut next = 0;
        while !self.stopping.load(Ordering::Acquire) {
            let mut fds = [
                PollFd::new(listener, PollFlags::IN),
                PollFd::new(wake, PollFlags::IN),
            ];
            if poll(&mut fds, None).is_err() {
                continue;
            }
            threads.retain(|thread| !thread.is_finished());
            match listener.accept() {
                Ok((socket, _)) => {
                    threads.extend(self.admit(socket, next));
                    next += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => std::thread::sleep(ACCEPT_REST),
            }
        }
        for socket in self.open().values() {
            // Fails for those that are closed already.
            let _ = socket.shutdown(Shutdown::Both);
        }
        for thread in threads {
            let _ = thread.join();
        }
    }

    /// Starts a thread for a connection, if there is a place for it.
    fn admit(self: &Arc<Self>, socket: TcpStream, number: u64) -> Option<JoinHandle<()>> {
        let socket = Arc::new(socket);
        let mut open = self.open();
        if open.len() < self.places {
            let spawned = std::thread::Builder::new()
                .name(format!("{}-{number}", self.name))
                .spawn({
                    let (socket, entrance) = (socket.clone(), self.clone());
                    move || {
                        entrance.host.serve(&socket, &entrance.stopping);
                        // The table has the last handle to the socket.
                        drop(socket);
                        entrance.open().remove(&number);
                    }
                });
            if let Ok(thread) = spawned {
                // The thread waits for the lock to remove it.
                open.insert(number, socket);
                return Some(thread);
            }
        }
        drop(open);
        self.host.turn_away(&socket);
        let _ = socket.shutdown(Shutdown::Write);
        None
    }
}
