//! The one thread that owns the state and its store.
//!
//! It takes the commands that wait, applies them, stores what changed in one transaction, and only then lets the answers
//! go: nobody ever hears of something that a crash could undo. Waiting commands share a transaction, so the disk's pace
//! bounds the latency and not the throughput. When storing fails the thread ends and with it the coordinator: what is in
//! memory is ahead of the disk, and only a restart brings them together.

use std::time::Instant;

use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use super::clock::{Millis, millis};
use super::state::{State, Timing};
use super::store::{self, Store, StoreError, StoreUrl};

/// Commands that may wait. More than all connections' streams would mean a disk that hangs.
const QUEUE: usize = 1024;
/// Commands that share one transaction: bounds how long the first of them waits for the last.
const BATCH: usize = 64;

type Reply = Box<dyn FnOnce() + Send>;
type Apply = Box<dyn FnOnce(&mut State, Millis) -> Reply + Send>;

enum Command {
    Apply(Apply),
    Stop,
}

/// The owner has ended, or its queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the coordinator is stopping or cannot write its state; try again in a moment")]
pub(crate) struct OwnerGone;

impl From<OwnerGone> for Status {
    fn from(error: OwnerGone) -> Self {
        Status::unavailable(error.to_string())
    }
}

/// A handle to the owner. The thread ends when it is told to, or after the last handle is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Owner {
    commands: mpsc::Sender<Command>,
}

/// Tells how the thread ended.
pub(crate) type Ended = oneshot::Receiver<Result<(), StoreError>>;

impl Owner {
    /// Opens the store and starts the thread. Returns once the state is loaded.
    pub(crate) async fn start(url: &StoreUrl, timing: Timing) -> Result<(Self, Ended), StoreError> {
        let (commands, queue) = mpsc::channel(QUEUE);
        let (loaded, ready) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let url = url.clone();
        let thread = std::thread::Builder::new()
            .name("coordinator".to_owned())
            .spawn(move || {
                let started = Instant::now();
                let opened = open(&url, timing);
                match opened {
                    Err(error) => drop(loaded.send(Err(error))),
                    Ok((state, store)) => {
                        // The receiver waits below; if it does not, the queue ends at once too.
                        let _ = loaded.send(Ok(()));
                        let result = run(state, store, queue, started);
                        let _ = end.send(result);
                    }
                }
            });
        let gone = |cause: String| StoreError::Io {
            path: "coordinator thread".into(),
            cause,
        };
        thread.map_err(|error| gone(error.to_string()))?;
        ready
            .await
            .map_err(|_| gone("ended at its start".to_owned()))??;
        Ok((Self { commands }, ended))
    }

    /// Runs a function on the state, and returns its answer once everything that it changed is stored.
    pub(crate) async fn call<R, F>(&self, apply: F) -> Result<R, OwnerGone>
    where
        R: Send + 'static,
        F: FnOnce(&mut State, Millis) -> R + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let command = Command::Apply(Box::new(move |state, now| {
            let result = apply(state, now);
            // The caller may have given up; what it asked for has happened.
            Box::new(move || drop(answer.send(result)))
        }));
        self.commands.send(command).await.map_err(|_| OwnerGone)?;
        answered.await.map_err(|_| OwnerGone)
    }

    /// Ends the thread after what waits before this; it closes the store.
    pub(crate) async fn stop(&self) {
        // One that has ended already needs no telling.
        let _ = self.commands.send(Command::Stop).await;
    }
}

fn open(url: &StoreUrl, timing: Timing) -> Result<(State, Box<dyn Store>), StoreError> {
    let mut store = store::open(url)?;
    let records = store::load(store.as_mut())?;
    Ok((State::load(records, timing, Millis(0)), store))
}

fn run(
    mut state: State,
    mut store: Box<dyn Store>,
    mut queue: mpsc::Receiver<Command>,
    started: Instant,
) -> Result<(), StoreError> {
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        if queue.blocking_recv_many(&mut batch, BATCH) == 0 {
            return Ok(());
        }
        let now = Millis(millis(started.elapsed()));
        let mut replies: Vec<Reply> = Vec::with_capacity(batch.len());
        let mut stop = false;
        for command in batch.drain(..) {
            match command {
                Command::Apply(apply) => replies.push(apply(&mut state, now)),
                Command::Stop => stop = true,
            }
        }
        let stored = state
            .take_changes()
            .map_err(StoreError::from)
            .and_then(|changes| {
                if changes.is_empty() {
                    Ok(())
                } else {
                    store.apply(&changes)
                }
            });
        if let Err(error) = stored {
            tracing::error!(%error, "the state cannot be stored, the coordinator ends");
            return Err(error);
        }
        replies.into_iter().for_each(|reply| reply());
        if stop {
            return Ok(());
        }
    }
}
