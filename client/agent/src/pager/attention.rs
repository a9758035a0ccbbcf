//! How long something has waited while those were there who could do something for it.
//!
//! A pager that has not run (its machine stood still, its agent was stopped or got no processor) has not asked any node for
//! anything meanwhile, and a helper that is stopped or frozen with its program moves no page. Such time counts for nobody's
//! deadline: afterwards there is as much left as before.

use std::time::{Duration, Instant};

/// The longest time between two looks of a pager that runs: it looks up from whatever it waits for.
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
    looked: Moment,
    missed: Duration,
}

impl Attention {
    pub(super) fn since(now: Instant) -> Self {
        let missed = Duration::ZERO;
        Self {
            looked: Moment { at: now, missed },
            missed,
        }
    }

    /// The pager is there. To be called in each loop in which it may wait, before anything is judged late.
    pub(super) fn look(&mut self, now: Instant) {
        let away = self.waited(self.looked, now);
        if away > PRESENT {
            self.missed += away;
            tracing::info!(
                ?away,
                "nothing was looked after for so long: this agent, or its machine, stood still"
            );
        }
        self.looked = self.moment(now);
    }

    /// Until now, since then, what was waited for could not go on.
    pub(super) fn miss_since(&mut self, then: Moment, now: Instant) {
        self.missed += self.waited(then, now);
    }

    pub(super) fn moment(&self, at: Instant) -> Moment {
        Moment {
            at,
            missed: self.missed,
        }
    }

    /// How long has been waited since then, the time apart in which there was no pager.
    pub(super) fn waited(&self, since: Moment, now: Instant) -> Duration {
        let missed = self.missed.saturating_sub(since.missed);
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

    /// Both have been stopped: that is the same time.
    #[test]
    fn what_is_missed_twice_counts_once() {
        let start = Instant::now();
        let mut attention = Attention::since(start);
        let before = attention.moment(start);
        let now = start + 60 * SECOND;
        attention.look(now);
        attention.miss_since(before, now);
        assert_eq!(attention.waited(before, now), Duration::ZERO);
        let at_once = attention.moment(now);
        attention.miss_since(at_once, now + 3 * SECOND);
        attention.look(now + 3 * SECOND);
        assert_eq!(attention.waited(before, now + 4 * SECOND), SECOND);
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
