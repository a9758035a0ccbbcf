//! How long a pager looks for what comes next before it sleeps: the answer that a fault waits for, and the next fault.
//!
//! Falling asleep and being woken costs some microseconds, on an idle virtual CPU some tens: as much as a whole round trip
//! to a near node, or as all else that happens in a fault. Looking costs the CPU. So it is done only while what was looked
//! for has lately come within a bound.

use std::time::{Duration, Instant};

/// Nodes in the same rack answer within this; for those further away sleeping is no loss.
pub(super) const FOR_ANSWERS: Duration = Duration::from_micros(50);
/// A program that lives on far memory touches its next page within this, its own wake-up included.
pub(super) const FOR_FAULTS: Duration = Duration::from_micros(100);
/// Below this a look is not worth its clock calls.
const SHORTEST: Duration = Duration::from_micros(2);
/// What comes within so many times the bound may have come within it: the time of what ended a sleep includes waking.
const NEAR_FACTOR: u32 = 2;

/// The patience for one node's answers, or for one program's faults.
#[derive(Debug)]
pub(super) struct Patience {
    longest: Duration,
    budget: Duration,
    since: Option<Instant>,
    spent: bool,
}

impl Patience {
    /// Patience for what comes within `longest`.
    pub(super) fn new(longest: Duration) -> Self {
        Self {
            longest,
            budget: longest,
            since: None,
            spent: false,
        }
    }

    /// From now on it may come.
    pub(super) fn begin(&mut self, now: Instant) {
        (self.since, self.spent) = (Some(now), false);
    }

    /// Whether to look once more rather than sleep.
    pub(super) fn looks_on(&mut self, now: Instant) -> bool {
        let Some(since) = self.since.filter(|_| !self.spent) else {
            return false;
        };
        self.spent = now.duration_since(since) >= self.budget;
        if self.spent {
            self.budget /= 2;
            if self.budget < SHORTEST {
                self.budget = Duration::ZERO;
            }
        }
        !self.spent
    }

    /// It came.
    pub(super) fn came(&mut self, now: Instant) {
        let Some(since) = self.since.take() else {
            return;
        };
        let near = self.longest * if self.spent { NEAR_FACTOR } else { 1 };
        if now.duration_since(since) < near {
            self.budget = self.longest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(patience: &mut Patience, start: Instant, answer_after: u64) -> u64 {
        let at = |us| start + Duration::from_micros(us);
        patience.begin(at(0));
        let looked = (0..answer_after)
            .take_while(|us| patience.looks_on(at(*us)))
            .count() as u64;
        patience.came(at(answer_after));
        looked
    }

    #[test]
    fn far_nodes_are_not_looked_for_and_near_ones_are() {
        let (mut patience, start) = (Patience::new(FOR_ANSWERS), Instant::now());
        assert_eq!(round(&mut patience, start, 30), 30);
        for _ in 0..10 {
            round(&mut patience, start, 1000);
        }
        assert_eq!(round(&mut patience, start, 1000), 0);
        // One that was near, as far as one who slept can tell.
        assert_eq!(round(&mut patience, start, 80), 0);
        assert_eq!(round(&mut patience, start, 30), 30);
    }

    #[test]
    fn nothing_is_looked_for_that_was_not_asked() {
        assert!(!Patience::new(FOR_ANSWERS).looks_on(Instant::now()));
    }
}
