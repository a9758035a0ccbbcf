//! How far to read ahead: streams that grow with their hits.
//!
//! A fault that continues where a stream's last window ended proves that the window was used, and doubles the
//! next one. A fault anywhere else begins a stream of one page, and so does the first that continues it: something that
//! lies across the end of a page is no walk. So random access fetches nothing in vain. Streams run either way: much is
//! laid out downwards (the lines of a sort, stacks of records), or walked from its end.

use std::ops::Range;

use crate::table::Page;

/// The most pages of a window: 128 KiB, past which a batched install gains nothing more.
pub const MAX_WINDOW: u64 = 32;
/// The window that the second continued fault of a stream gets.
const FIRST_WINDOW: u64 = 4;
/// Streams remembered: threads and cursors that walk memory at the same time.
const STREAMS: usize = 16;

/// Which way a walk goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Towards higher addresses.
    Up,
    /// Towards lower addresses.
    Down,
}

impl Way {
    /// The page so many steps on, if there is one.
    #[must_use]
    pub fn step(self, from: Page, pages: u64) -> Option<Page> {
        match self {
            Self::Up => from.0.checked_add(pages),
            Self::Down => from.0.checked_sub(pages),
        }
        .map(Page)
    }

    /// How many steps it is from one page on to another; none if that lies behind.
    fn steps(self, from: Page, to: Page) -> Option<u64> {
        match self {
            Self::Up => to.0.checked_sub(from.0),
            Self::Down => from.0.checked_sub(to.0),
        }
    }

    /// The pages from one on, so many of them, in the order of their addresses.
    #[must_use]
    pub fn pages(self, from: Page, pages: u64) -> Range<Page> {
        match self {
            Self::Up => from..Page(from.0.saturating_add(pages)),
            Self::Down => Page((from.0 + 1).saturating_sub(pages))..from.plus(1),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// The page of its last fault.
    at: Page,
    /// Pages that the last fault brought, itself included; the stream goes on behind them.
    covered: u64,
    /// Which way it goes; unknown until something continues it.
    way: Option<Way>,
    window: u64,
    last_used: u64,
}

impl Stream {
    /// Which way it would go on with a fault at `page`, if it does.
    fn continued_by(&self, page: Page) -> Option<Way> {
        let slack = self.window / 4;
        let continues = |way: &Way| {
            way.steps(self.at, page)
                .is_some_and(|steps| (self.covered..=self.covered + slack).contains(&steps))
        };
        match self.way {
            Some(way) => Some(way).filter(continues),
            None => [Way::Up, Way::Down].into_iter().find(continues),
        }
    }
}

/// The streams of one address space.
#[derive(Debug, Default)]
pub struct Prefetcher {
    streams: Vec<Stream>,
    clock: u64,
}

/// What to bring home on a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Pages from the faulting one on, itself included.
    pub pages: u64,
    /// Which way they lie.
    pub way: Way,
    /// Pages of the window before, which this fault proves used.
    pub hits: u64,
}

impl Prefetcher {
    /// What the last fault has brought, or found on its way, is so many pages in all: behind them its stream goes on.
    pub fn covered(&mut self, pages: u64) {
        let clock = self.clock;
        if let Some(stream) = self
            .streams
            .iter_mut()
            .find(|stream| stream.last_used == clock)
        {
            stream.covered = pages.max(1);
        }
    }

    /// A fault at `page`: how many pages to bring.
    pub fn fault(&mut self, page: Page) -> Window {
        self.clock += 1;
        let clock = self.clock;
        let found = self
            .streams
            .iter_mut()
            .find_map(|stream| stream.continued_by(page).map(|way| (stream, way)));
        if let Some((stream, way)) = found {
            let hits = stream.covered - 1;
            stream.window = if stream.way.is_some() {
                (stream.window * 2).clamp(FIRST_WINDOW, MAX_WINDOW)
            } else {
                1
            };
            (stream.at, stream.covered) = (page, stream.window);
            (stream.way, stream.last_used) = (Some(way), clock);
            return Window {
                pages: stream.window,
                way,
                hits,
            };
        }
        let fresh = Stream {
            at: page,
            covered: 1,
            way: None,
            window: 1,
            last_used: clock,
        };
        if self.streams.len() < STREAMS {
            self.streams.push(fresh);
        } else if let Some(oldest) = self
            .streams
            .iter_mut()
            .min_by_key(|stream| stream.last_used)
        {
            *oldest = fresh;
        }
        Window {
            pages: 1,
            way: Way::Up,
            hits: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAYS: [Way; 2] = [Way::Up, Way::Down];
    const MIDDLE: Page = Page(1 << 30);

    #[test]
    fn a_walk_reaches_the_largest_window_either_way() {
        for way in WAYS {
            let mut prefetcher = Prefetcher::default();
            let (mut walked, mut faults) = (0, 0);
            while walked < 10_000 {
                let window = prefetcher.fault(way.step(MIDDLE, walked).unwrap());
                assert!(window.pages == 1 || window.way == way, "{window:?}");
                walked += window.pages;
                faults += 1;
            }
            assert!(faults < 10_000 / MAX_WINDOW + 10, "{faults} faults {way:?}");
        }
    }

    #[test]
    fn a_stream_read_ahead_goes_on_where_its_frames_end() {
        for way in WAYS {
            let mut prefetcher = Prefetcher::default();
            let (mut page, mut ahead) = (MIDDLE, 1);
            for _ in 0..20 {
                let window = prefetcher.fault(page);
                prefetcher.covered(ahead);
                page = way.step(page, ahead).unwrap();
                ahead = window.pages;
            }
            assert_eq!(prefetcher.fault(page).pages, MAX_WINDOW);
        }
    }

    #[test]
    fn scattered_faults_bring_one_page_each() {
        let mut prefetcher = Prefetcher::default();
        for i in 0..1000u64 {
            let window = prefetcher.fault(Page(i * 7919 % 100_003 * 50));
            assert_eq!((window.pages, window.hits), (1, 0));
        }
    }

    #[test]
    fn what_lies_across_the_end_of_a_page_is_no_walk() {
        let mut prefetcher = Prefetcher::default();
        for i in 0..1000u64 {
            let page = Page(i * 7919 % 100_003 * 50);
            assert_eq!(prefetcher.fault(page).pages, 1);
            assert_eq!(prefetcher.fault(page.plus(1)).pages, 1);
        }
    }

    #[test]
    fn to_and_fro_is_no_walk() {
        let mut prefetcher = Prefetcher::default();
        for _ in 0..100 {
            assert_eq!(prefetcher.fault(MIDDLE).pages, 1);
            assert_eq!(prefetcher.fault(MIDDLE.plus(1)).pages, 1);
        }
    }

    #[test]
    fn several_walks_at_once_are_told_apart() {
        let mut prefetcher = Prefetcher::default();
        let mut walks: Vec<(Page, Way)> = (1..9)
            .zip(WAYS.into_iter().cycle())
            .map(|(i, way)| (Page(i * 1_000_000), way))
            .collect();
        for _ in 0..20 {
            for (page, way) in &mut walks {
                *page = way.step(*page, prefetcher.fault(*page).pages).unwrap();
            }
        }
        for (page, _) in walks {
            assert_eq!(prefetcher.fault(page).pages, MAX_WINDOW);
        }
    }

    #[test]
    fn the_pages_of_a_way_lie_in_the_order_of_their_addresses() {
        assert_eq!(Way::Up.pages(Page(7), 3), Page(7)..Page(10));
        assert_eq!(Way::Down.pages(Page(7), 3), Page(5)..Page(8));
        assert_eq!(Way::Down.pages(Page(1), 5), Page(0)..Page(2));
        assert_eq!(Way::Down.step(Page(1), 2), None);
    }
}
