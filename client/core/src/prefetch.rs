//! How far to read ahead: streams that grow with their hits.
//!
//! A fault that continues where a stream's last window ended proves that the window was used, and doubles the
//! next one. A fault anywhere else begins a stream of one page, and so does the first that continues it: something that
//! lies across the end of a page is no walk. So random access fetches nothing in vain.

use crate::table::Page;

/// The most pages of a window: 128 KiB, past which a batched install gains nothing more.
pub const MAX_WINDOW: u64 = 32;
/// The window that the second continued fault of a stream gets.
const FIRST_WINDOW: u64 = 4;
/// Streams remembered: threads and cursors that walk memory at the same time.
const STREAMS: usize = 16;

#[derive(Clone, Copy, Debug)]
struct Stream {
    next: Page,
    continued: bool,
    window: u64,
    /// Pages that the last fault brought, itself included.
    covered: u64,
    last_used: u64,
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
    /// Pages of the window before, which this fault proves used.
    pub hits: u64,
}

impl Prefetcher {
    /// What a fault at `page` has brought or found on its way reaches up to `end`: there the stream goes on.
    pub fn reached(&mut self, page: Page, end: Page) {
        let clock = self.clock;
        if let Some(stream) = self
            .streams
            .iter_mut()
            .find(|stream| stream.last_used == clock)
        {
            stream.next = end.max(page.plus(1));
            stream.covered = stream.next.0 - page.0;
        }
    }

    /// A fault at `page`: how many pages to bring.
    pub fn fault(&mut self, page: Page) -> Window {
        self.clock += 1;
        let clock = self.clock;
        let near = |stream: &&mut Stream| {
            page.0 >= stream.next.0 && page.0 - stream.next.0 <= stream.window / 4
        };
        if let Some(stream) = self.streams.iter_mut().find(near) {
            let hits = stream.covered - 1;
            stream.window = if stream.continued {
                (stream.window * 2).clamp(FIRST_WINDOW, MAX_WINDOW)
            } else {
                1
            };
            stream.continued = true;
            stream.next = page.plus(stream.window);
            stream.covered = stream.window;
            stream.last_used = clock;
            return Window {
                pages: stream.window,
                hits,
            };
        }
        let fresh = Stream {
            next: page.plus(1),
            continued: false,
            window: 1,
            covered: 1,
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
        Window { pages: 1, hits: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_reaches_the_largest_window() {
        let mut prefetcher = Prefetcher::default();
        let (mut page, mut faults) = (Page(100), 0);
        while page.0 < 10_000 {
            page = page.plus(prefetcher.fault(page).pages);
            faults += 1;
        }
        assert!(faults < 10_000 / MAX_WINDOW + 10, "{faults} faults");
    }

    #[test]
    fn a_stream_read_ahead_goes_on_where_its_frames_end() {
        let mut prefetcher = Prefetcher::default();
        let (mut page, mut ahead) = (Page(0), 1);
        for _ in 0..20 {
            let window = prefetcher.fault(page);
            prefetcher.reached(page, page.plus(ahead));
            page = page.plus(ahead);
            ahead = window.pages;
        }
        assert_eq!(prefetcher.fault(page).pages, MAX_WINDOW);
    }

    #[test]
    fn scattered_faults_bring_one_page_each() {
        let mut prefetcher = Prefetcher::default();
        for i in 0..1000u64 {
            let window = prefetcher.fault(Page(i * 7919 % 100_003 * 50));
            assert_eq!(window, Window { pages: 1, hits: 0 });
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
    fn several_walks_at_once_are_told_apart() {
        let mut prefetcher = Prefetcher::default();
        let mut walks: Vec<Page> = (0..8).map(|i| Page(i * 1_000_000)).collect();
        for _ in 0..20 {
            for page in &mut walks {
                *page = page.plus(prefetcher.fault(*page).pages);
            }
        }
        for page in walks {
            assert_eq!(prefetcher.fault(page).pages, MAX_WINDOW);
        }
    }
}
