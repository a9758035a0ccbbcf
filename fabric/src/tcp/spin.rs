//! How long a responder looks for the next request before it sleeps.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A budget that grows back when requests follow each other closely, and shrinks when they do not.
///
/// Waking a thread that sleeps costs some 30 us on an idle virtual CPU, as much as the rest of a round trip.
/// Looking costs a core. So a connection looks only while that has lately paid, for `longest` at most, and
/// only `seats` connections at a time.
#[derive(Debug)]
pub(super) struct Spinner<'a> {
    longest: Duration,
    budget: Duration,
    seats: &'a Seats,
    answered: Option<Instant>,
}

/// Below this a look is not worth its clock calls; the budget drops to nothing.
const SHORTEST: Duration = Duration::from_micros(2);

/// A request that arrives within so many budgets of the last answer shows that traffic is dense again. It was
/// noticed by a sleeper, so its time includes a wake-up.
const DENSE_FACTOR: u32 = 4;

impl<'a> Spinner<'a> {
    pub(super) fn new(longest: Duration, seats: &'a Seats) -> Self {
        Self {
            longest,
            budget: longest,
            seats,
            answered: None,
        }
    }

    /// Notes that answers were just sent.
    pub(super) fn answered(&mut self) {
        if !self.longest.is_zero() {
            self.answered = Some(Instant::now());
        }
    }

    /// Calls `look` until it yields something or the budget is spent. `None`: go to sleep.
    pub(super) fn spin<T>(&mut self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        // The first request after a connection or a sleep has no answer before it.
        let since = self.answered?;
        if self.budget < SHORTEST {
            return None;
        }
        let _seat = self.seats.take()?;
        loop {
            if let Some(found) = look() {
                self.budget = self.longest;
                return Some(found);
            }
            if since.elapsed() >= self.budget {
                self.budget /= 2;
                return None;
            }
            std::thread::yield_now();
        }
    }

    /// Notes that a request ended a sleep.
    pub(super) fn woken(&mut self) {
        if self
            .answered
            .is_some_and(|since| since.elapsed() < self.longest * DENSE_FACTOR)
        {
            self.budget = self.longest;
        }
    }
}

/// How many connections may look at the same time.
#[derive(Debug)]
pub(super) struct Seats {
    taken: AtomicUsize,
    seats: usize,
}

pub(super) struct Seat<'a>(&'a AtomicUsize);

impl Seats {
    pub(super) fn new(seats: usize) -> Self {
        Self {
            taken: AtomicUsize::new(0),
            seats,
        }
    }

    fn take(&self) -> Option<Seat<'_>> {
        if self.taken.fetch_add(1, Ordering::Relaxed) < self.seats {
            return Some(Seat(&self.taken));
        }
        self.taken.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spinner_that_finds_nothing_soon_stops_looking() {
        let seats = Seats::new(1);
        let mut spinner = Spinner::new(Duration::from_micros(50), &seats);
        let mut looks = 0;
        for _ in 0..20 {
            spinner.answered();
            assert_eq!(
                spinner.spin(|| -> Option<()> {
                    looks += 1;
                    None
                }),
                None
            );
        }
        looks = 0;
        spinner.answered();
        assert_eq!(
            spinner.spin(|| -> Option<()> {
                looks += 1;
                None
            }),
            None
        );
        assert_eq!(looks, 0);
        spinner.longest = Duration::from_secs(60);
        spinner.woken();
        assert_eq!(spinner.spin(|| Some(1)), Some(1));
    }

    #[test]
    fn seats_are_given_back() {
        let seats = Seats::new(1);
        let seat = seats.take();
        assert!(seat.is_some());
        assert!(seats.take().is_none());
        drop(seat);
        assert!(seats.take().is_some());
    }
}
