//! Whether a pager looks for what comes next before it sleeps: the answer that a fault waits for, and the next fault.
//!
//! Falling asleep and being woken costs some microseconds, on an idle virtual CPU some tens: as much as a whole round trip
//! to a near node, or as all else that happens in a fault. Looking costs the CPU, and where the one that is waited for needs
//! this very CPU, it only comes later. Which it is shows: both are tried, and what comes sooner one way is waited for
//! that way.

use std::time::{Duration, Instant};

/// Nodes in the same rack answer within this; for those further away sleeping is no loss.
pub(super) const FOR_ANSWERS: Duration = Duration::from_micros(50);
/// A program that lives on far memory touches its next page within this, its own wake-up included.
pub(super) const FOR_FAULTS: Duration = Duration::from_micros(100);

/// Every so many rounds the way that seems worse is tried.
const TRY_EVERY: u32 = 64;
/// The weight of one round in what is known of its way.
const WEIGHT: u32 = 8;

/// The patience for one node's answers, or for one program's faults.
#[derive(Debug)]
pub(super) struct Patience {
    longest: Duration,
    /// What a round has cost on average, by looking and by sleeping. Nothing, until it is known.
    by_looking: Duration,
    by_sleeping: Duration,
    rounds: u32,
    round: Option<Round>,
}

/// One wait.
#[derive(Clone, Copy, Debug)]
struct Round {
    since: Instant,
    looks: bool,
    spent: bool,
}

impl Patience {
    /// Patience for what comes within `longest`.
    pub(super) fn new(longest: Duration) -> Self {
        Self {
            longest,
            by_looking: Duration::ZERO,
            by_sleeping: Duration::ZERO,
            rounds: 0,
            round: None,
        }
    }

    /// From now on it may come.
    pub(super) fn begin(&mut self, now: Instant) {
        self.rounds = self.rounds.wrapping_add(1);
        let other_way = self.rounds.is_multiple_of(TRY_EVERY);
        self.round = Some(Round {
            since: now,
            looks: (self.by_looking <= self.by_sleeping) != other_way,
            spent: false,
        });
    }

    /// Whether to look once more rather than sleep.
    pub(super) fn looks_on(&mut self, now: Instant) -> bool {
        let Some(round) = self.round.as_mut().filter(|round| round.looks) else {
            return false;
        };
        round.spent |= now.duration_since(round.since) >= self.longest;
        !round.spent
    }

    /// It came.
    pub(super) fn came(&mut self, now: Instant) {
        let Some(round) = self.round.take() else {
            return;
        };
        // What takes longer is far, however long it takes.
        let mut cost = now.duration_since(round.since).min(self.longest * 2);
        if round.spent {
            cost += self.longest;
        }
        let known = if round.looks {
            &mut self.by_looking
        } else {
            &mut self.by_sleeping
        };
        *known = if known.is_zero() {
            cost
        } else {
            (*known * (WEIGHT - 1) + cost) / WEIGHT
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Has it come after so many microseconds where it is looked for, and where it is slept for. Returns in how many rounds
    /// of a hundred it was looked for, once there was time to learn.
    fn looked(when_looked_for: u64, when_slept_for: u64) -> usize {
        let (mut patience, start) = (Patience::new(FOR_ANSWERS), Instant::now());
        let at = |us| start + Duration::from_micros(us);
        let rounds = (0..200).map(|_| {
            patience.begin(at(0));
            let looks = patience.looks_on(at(1));
            let after = if looks {
                when_looked_for
            } else {
                when_slept_for
            };
            patience.looks_on(at(after.min(FOR_ANSWERS.as_micros() as u64)));
            patience.came(at(after));
            looks
        });
        rounds.skip(100).filter(|looks| *looks).count()
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
    fn nothing_is_looked_for_that_was_not_asked() {
        assert!(!Patience::new(FOR_ANSWERS).looks_on(Instant::now()));
    }
}
