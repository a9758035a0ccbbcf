//! How long a fault has waited while its pager was there to do something for it.
//!
//! A pager that has not run (its machine stood still, its agent was stopped or got no processor) has not asked any node for
//! anything meanwhile. That time is the fault's misfortune, not its deadline's: once the pager runs again its nodes have as long
//! to answer as they had left before.

use std::time::{Duration, Instant};

/// Between two looks: more was not spent waiting for something, of which a pager looks up more often.
const PRESENT: Duration = Duration::from_secs(1);

/// When something began to wait, as the pager's own time goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(super) at: Instant,
    /// What had been missed by then.
    missed: Duration,
}

/// A pager's own time.
#[derive(Debug)]
pub(super) struct Attention {
    looked: Instant,
    missed: Duration,
}

impl Attention {
    pub(super) fn since(now: Instant) -> Self {
        Self {
            looked: now,
            missed: Duration::ZERO,
        }
    }

    /// The pager is there. To be called in each loop in which it may wait, before anything is judged late.
    pub(super) fn look(&mut self, now: Instant) {
        let away = now.saturating_duration_since(self.looked);
        if away > PRESENT {
            self.missed += away;
            tracing::warn!(
                ?away,
                "this agent has not run, or its machine stood still; nobody's deadline goes on meanwhile"
            );
        }
        self.looked = now;
    }

    pub(super) fn moment(&self, at: Instant) -> Moment {
        Moment {
            at,
            missed: self.missed,
        }
    }

    /// How long has been waited since then, the time apart in which there was no pager.
    pub(super) fn waited(&self, since: Moment, now: Instant) -> Duration {
        let missed = self.missed - since.missed;
        now.saturating_duration_since(since.at)
            .saturating_sub(missed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn time_in_which_the_pager_was_away_is_not_waited_for() {
        let start = Instant::now();
        let mut attention = Attention::since(start);
        let before = attention.moment(start);
        attention.look(start + SECOND / 2);
        attention.look(start + 60 * SECOND);
        let after = attention.moment(start + 60 * SECOND);
        attention.look(start + 61 * SECOND);
        let now = start + 61 * SECOND;
        assert_eq!(attention.waited(before, now), SECOND * 3 / 2);
        assert_eq!(attention.waited(after, now), SECOND);
    }

    #[test]
    fn a_pager_that_looks_up_often_misses_nothing() {
        let start = Instant::now();
        let mut attention = Attention::since(start);
        let before = attention.moment(start);
        for second in 1..=60 {
            attention.look(start + second * SECOND);
        }
        assert_eq!(attention.waited(before, start + 60 * SECOND), 60 * SECOND);
    }
}
