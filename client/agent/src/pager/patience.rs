//! Whether a pager looks for what comes next before it sleeps: the answer that a fault waits for, and the next fault.
//!
//! Falling asleep and being woken costs some microseconds, on an idle virtual CPU some tens: as much as a whole round trip
//! to a near node, or as all else that happens in a fault. Looking costs the CPU, and where the one that is waited for needs
//! this very CPU, it only comes later. Which it is shows: both are tried, and what comes sooner one way is waited for
//! that way.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

/// What sleeping typically takes, twice, is how long is looked; within these bounds. Beyond them a wake-up is a small part of
/// the wait, on emulated processors too.
const LONGEST: Duration = Duration::from_millis(1);
const SHORTEST: Duration = Duration::from_micros(50);

/// Looking has to save this share of the wait to be worth the CPU.
const WORTH: u32 = 10;

/// Every so many rounds the way that seems worse is tried. Every second at first, and while it was the better one when it was
/// last tried: what was learnt under other circumstances is soon corrected.
const TRY_EVERY: u32 = 64;

/// The share of what is known of a way by which one round can change it; more, while few rounds went that way.
const STEP: u32 = 16;

/// The patience for one node's answers, or for one program's faults.
#[derive(Debug, Default)]
pub(super) struct Patience {
    by_looking: Typical,
    by_sleeping: Typical,
    rounds: u32,
    /// Whether the way that seems worse was the better one when it was last tried.
    promising: bool,
    round: Option<Round>,
}

/// What a way typically takes: follows the median, which the few rounds that something else delayed do not move. Nothing,
/// until it is known.
#[derive(Clone, Copy, Debug, Default)]
struct Typical {
    known: Duration,
    rounds: u32,
}

impl Typical {
    fn learn(&mut self, took: Duration) {
        // The first answer of a connection takes longer than any other: with it the node is asked for the key.
        let step = self.known / (self.rounds + 1).min(STEP);
        self.known = match took.cmp(&self.known) {
            _ if self.rounds == 0 => took,
            Ordering::Greater => self.known + step,
            Ordering::Less => self.known - step,
            Ordering::Equal => self.known,
        };
        self.rounds = (self.rounds + 1).min(STEP);
    }
}

/// One wait.
#[derive(Clone, Copy, Debug)]
struct Round {
    since: Instant,
    looks: bool,
    /// Goes the way that seems worse, to learn.
    is_try: bool,
    spent: bool,
}

impl Patience {
    /// From now on it may come.
    pub(super) fn begin(&mut self, now: Instant) {
        self.rounds = self.rounds.wrapping_add(1);
        let every = if self.promising || self.rounds < TRY_EVERY {
            2
        } else {
            TRY_EVERY
        };
        let is_try = self.rounds.is_multiple_of(every);
        let pays = self.by_looking.known <= self.by_sleeping.known - self.by_sleeping.known / WORTH;
        self.round = Some(Round {
            since: now,
            looks: pays != is_try,
            is_try,
            spent: false,
        });
    }

    /// Whether to look once more rather than sleep.
    pub(super) fn looks_on(&mut self, now: Instant) -> bool {
        let longest = self.longest();
        let Some(round) = self.round.as_mut().filter(|round| round.looks) else {
            return false;
        };
        round.spent |= now.duration_since(round.since) >= longest;
        !round.spent
    }

    fn longest(&self) -> Duration {
        (self.by_sleeping.known * 2).clamp(SHORTEST, LONGEST)
    }

    /// It came.
    pub(super) fn came(&mut self, now: Instant) {
        let Some(round) = self.round.take() else {
            return;
        };
        let took = now.duration_since(round.since);
        if round.is_try {
            let usual = if round.looks {
                self.by_sleeping.known
            } else {
                self.by_looking.known
            };
            self.promising = !round.spent && took < usual - usual / WORTH;
        }
        if round.looks {
            // What came too late was looked for in vain.
            let in_vain = if round.spent {
                self.longest()
            } else {
                Duration::ZERO
            };
            self.by_looking.learn(took + in_vain);
        } else {
            self.by_sleeping.learn(took);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Has it come after so many microseconds where it is looked for, and where it is slept for. Returns in how many rounds
    /// of the last hundred it was looked for, once there was time to learn.
    fn looked(when_looked_for: u64, when_slept_for: u64) -> usize {
        looked_where(|round, looks| match (round, looks) {
            (_, true) => when_looked_for,
            (_, false) => when_slept_for,
        })
    }

    fn looked_where(takes: impl Fn(u32, bool) -> u64) -> usize {
        let (mut patience, start) = (Patience::default(), Instant::now());
        let at = |us| start + Duration::from_micros(us);
        let rounds = (0..300).map(|round| {
            patience.begin(at(0));
            let looks = patience.looks_on(at(1));
            let after = takes(round, looks);
            patience.looks_on(at(after.min(LONGEST.as_micros() as u64)));
            patience.came(at(after));
            looks
        });
        rounds.skip(200).filter(|looks| *looks).count()
    }

    #[test]
    fn what_is_near_is_looked_for() {
        assert!(looked(30, 45) > 90);
    }

    #[test]
    fn what_is_far_is_slept_for() {
        assert!(looked(1000, 1000) < 10);
    }

    #[test]
    fn what_needs_this_cpu_is_slept_for() {
        assert!(looked(55, 9) < 10);
    }

    #[test]
    fn one_round_in_eight_that_is_delayed_changes_nothing() {
        let looked = looked_where(|round, looks| match (round % 8, looks) {
            (3, _) => 3000,
            (_, true) => 150,
            (_, false) => 200,
        });
        assert!(looked > 90);
    }

    #[test]
    fn a_slow_first_round_is_soon_forgotten() {
        let looked = looked_where(|round, looks| match (round, looks) {
            (0, _) => 5000,
            (_, true) => 150,
            (_, false) => 200,
        });
        assert!(looked > 90);
        let looked = looked_where(|round, looks| match (round, looks) {
            (1, _) => 5000,
            (_, true) => 200,
            (_, false) => 150,
        });
        assert!(looked < 10);
    }

    #[test]
    fn what_was_learnt_before_is_soon_corrected() {
        let looked = looked_where(|round, looks| match (round, looks) {
            (..80, true) => 2500,
            (..80, false) => 1500,
            (_, true) => 150,
            (_, false) => 600,
        });
        assert!(looked > 90);
    }

    #[test]
    fn nothing_is_looked_for_that_was_not_asked() {
        assert!(!Patience::default().looks_on(Instant::now()));
    }
}
