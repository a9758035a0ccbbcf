//! Follows the program to its end: passes signals on, stops and continues with it, and dies as it died.
//!
//! All signals are blocked and taken one by one with their sender, so that no handler runs and none is missed.

use std::io;
use std::process::ExitCode;

use crate::sys::{self, ChildState, Received};

/// The longest chain of parents that is walked to tell whose descendant a sender is.
const MAX_ANCESTORS: usize = 256;

/// What the kernel sends to the terminal's whole foreground group, or to all of a hung-up session: the program has
/// its own copy.
const TERMINAL_SIGNALS: [i32; 8] = [
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGHUP,
    libc::SIGCONT,
    libc::SIGWINCH,
];

/// How the program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Exited(i32),
    Killed(i32),
}

impl Ended {
    /// The status as a shell writes it: 128+N for signal N.
    pub(crate) fn status(self) -> i32 {
        match self {
            Self::Exited(code) => code,
            Self::Killed(signal) => 128 + signal,
        }
    }

    /// Ends this process as the program ended. A signal that cannot kill us (we are a container's init, or it is
    /// none that kills) becomes status 128+N.
    pub(crate) fn pass_on(self) -> ExitCode {
        if let Self::Killed(signal) = self {
            sys::forbid_core();
            sys::suffer(signal);
        }
        ExitCode::from((self.status() & 0xff) as u8)
    }
}

/// Waiting for the program failed.
#[derive(Debug, thiserror::Error)]
#[error("lost sight of the program (pid {pid}): {source}; it may still be running")]
pub(crate) struct FollowError {
    pid: u32,
    source: io::Error,
}

/// A signal that came before there was a program to pass it to, if it is one that ends us.
pub(crate) fn fatal_before_start() -> Option<i32> {
    let fatal = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
    std::iter::from_fn(|| sys::next_signal(false))
        .map(|received| received.number)
        .find(|signal| fatal.contains(signal) && !sys::ignored_at_start(*signal))
}

/// Waits until the program ends, and relays between it and the world until then.
pub(crate) fn follow(pid: u32) -> Result<Ended, FollowError> {
    let mut relay = Relay::default();
    loop {
        // Signals of one number merge, so that one SIGCHLD can stand for several changes: ask until there is none.
        match sys::child_state(pid).map_err(|source| FollowError { pid, source })? {
            Some(ChildState::Exited(code)) => return Ok(Ended::Exited(code)),
            Some(ChildState::Killed(signal)) => return Ok(Ended::Killed(signal)),
            Some(ChildState::Stopped(signal)) => {
                if relay.stops_us(sys::in_terminal_foreground()) {
                    sys::suffer(signal);
                    relay.resumed();
                }
            }
            Some(ChildState::Continued) => relay.continued(),
            None => {
                if let Some(received) = sys::next_signal(true) {
                    let own = received
                        .sender
                        .is_some_and(|sender| descends_from(sender, pid));
                    if relay.passes_on(received, own, || is_stopped(pid)) {
                        sys::send(pid, received.number);
                    }
                }
            }
        }
    }
}

/// What is remembered between signals.
#[derive(Debug, Default)]
struct Relay {
    /// We were asked to stop, or told of the terminal's asking, since the program last ran on.
    stop_asked: bool,
    /// We stopped with the program and have not yet seen the SIGCONT that woke us.
    waking: bool,
}

impl Relay {
    /// Whether a signal goes on to the program. `own` says that the program or a descendant sent it, which then
    /// meant its process group: it has its own copy.
    fn passes_on(&mut self, received: Received, own: bool, stopped: impl Fn() -> bool) -> bool {
        let by_kernel = received.sender.is_none();
        match received.number {
            libc::SIGCHLD | libc::SIGPIPE => false,
            libc::SIGCONT => {
                self.stop_asked = false;
                let woken = std::mem::take(&mut self.waking);
                // The shell's `fg` continues the whole group; who continues us alone means the program.
                stopped() || !(woken || own || by_kernel)
            }
            libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU => {
                self.stop_asked = true;
                !by_kernel && !own
            }
            number if by_kernel => !TERMINAL_SIGNALS.contains(&number),
            _ => !own,
        }
    }

    /// Whether we stop because the program did. Somebody who waits for us must see it: the shell that has to take
    /// the terminal back, or whoever asked for it through us. A program that was stopped alone, behind our back, is
    /// continued alone, and nobody would continue us.
    fn stops_us(&self, in_terminal_foreground: bool) -> bool {
        self.stop_asked || in_terminal_foreground
    }

    fn resumed(&mut self) {
        self.waking = true;
    }

    fn continued(&mut self) {
        self.stop_asked = false;
    }
}

/// The state letter and the parent, from `/proc/PID/stat`.
fn stat(pid: u32) -> Option<(char, u32)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name stands in parentheses and may contain anything, also parentheses.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

fn is_stopped(pid: u32) -> bool {
    matches!(stat(pid), Some(('T', _)))
}

fn descends_from(mut pid: u32, ancestor: u32) -> bool {
    for _ in 0..MAX_ANCESTORS {
        if pid == ancestor {
            return true;
        }
        match stat(pid) {
            Some((_, parent)) if parent > 1 => pid = parent,
            _ => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(number: i32, sender: Option<u32>) -> Received {
        Received { number, sender }
    }

    #[test]
    fn terminal_signals_are_not_doubled() {
        let mut relay = Relay::default();
        for number in TERMINAL_SIGNALS {
            assert!(
                !relay.passes_on(from(number, None), false, || false),
                "{number}"
            );
        }
        assert!(relay.passes_on(from(libc::SIGALRM, None), false, || false));
    }

    #[test]
    fn what_others_send_goes_on_and_what_the_program_sends_does_not() {
        let mut relay = Relay::default();
        for number in [
            libc::SIGINT,
            libc::SIGTERM,
            libc::SIGUSR1,
            libc::SIGCONT,
            libc::SIGTSTP,
            40,
        ] {
            assert!(
                relay.passes_on(from(number, Some(7)), false, || false),
                "{number}"
            );
            assert!(
                !relay.passes_on(from(number, Some(7)), true, || false),
                "{number}"
            );
        }
        assert!(!relay.passes_on(from(libc::SIGCHLD, Some(7)), false, || false));
    }

    #[test]
    fn stops_with_the_program_where_somebody_would_continue_both() {
        let mut relay = Relay::default();
        assert!(!relay.stops_us(false) && relay.stops_us(true));
        relay.passes_on(from(libc::SIGTSTP, None), false, || false);
        assert!(relay.stops_us(false));
        relay.resumed();
        // `fg` has continued the program already; a shell's `kill -CONT` of us alone has not.
        assert!(!relay.passes_on(from(libc::SIGCONT, Some(7)), false, || false));
        assert!(relay.passes_on(from(libc::SIGCONT, Some(7)), false, || true));
        assert!(!relay.stops_us(false));
    }

    #[test]
    fn descent_is_read_from_proc() {
        let me = std::process::id();
        assert!(descends_from(me, me));
        assert!(!descends_from(1, me));
        assert!(!is_stopped(me));
    }
}
