//! How long a pager looks for the answer that a fault waits for before it sleeps.
//!
//! Falling asleep and being woken costs some microseconds, on an idle virtual CPU some tens: as much as a whole round trip
//! to a near node. Looking costs the CPU. So it is done only while answers have lately come within [`LONGEST`].

use std::time::{Duration, Instant};

/// Nodes in the same rack answer within this; for those further away sleeping is no loss.
const LONGEST: Duration = Duration::from_micros(50);
/// Below this a look is not worth its clock calls.
const SHORTEST: Duration = Duration::from_micros(2);
/// An answer within so many times [`LONGEST`] may have come within it: the time of one that ended a sleep includes waking.
const NEAR_FACTOR: u32 = 2;

/// The patience for one node.
#[derive(Debug)]
pub(super) struct Patience {
    budget: Duration,
    asked: Option<Instant>,
    spent: bool,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            budget: LONGEST,
            asked: None,
            spent: false,
        }
    }
}

impl Patience {
    /// A page has been asked for that a thread waits for.
    pub(super) fn asked(&mut self, now: Instant) {
        (self.asked, self.spent) = (Some(now), false);
    }

    /// Whether to look once more rather than sleep.
    pub(super) fn looks_on(&mut self, now: Instant) -> bool {
        let Some(asked) = self.asked.filter(|_| !self.spent) else {
            return false;
        };
        self.spent = now.duration_since(asked) >= self.budget;
        if self.spent {
            self.budget /= 2;
            if self.budget < SHORTEST {
                self.budget = Duration::ZERO;
            }
        }
        !self.spent
    }

    /// The answer came.
    pub(super) fn answered(&mut self, now: Instant) {
        let Some(asked) = self.asked.take() else {
            return;
        };
        let near = LONGEST * if self.spent { NEAR_FACTOR } else { 1 };
        if now.duration_since(asked) < near {
            self.budget = LONGEST;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(patience: &mut Patience, start: Instant, answer_after: u64) -> u64 {
        let at = |us| start + Duration::from_micros(us);
        patience.asked(at(0));
        let looked = (0..answer_after)
            .take_while(|us| patience.looks_on(at(*us)))
            .count() as u64;
        patience.answered(at(answer_after));
        looked
    }

    #[test]
    fn far_nodes_are_not_looked_for_and_near_ones_are() {
        let (mut patience, start) = (Patience::default(), Instant::now());
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
        assert!(!Patience::default().looks_on(Instant::now()));
    }
}
