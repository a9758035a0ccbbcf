//! What `bench fabric` moves: reads or writes, of which size, over how many queue pairs.

use crate::Options;
use crate::region::PAGE;

/// Requests under way at a time in a stream of pages; perftest's own default.
const DEPTH: usize = 128;

/// Bytes under way at a time, where requests are larger, as long as each queue pair has one.
const BYTES_UNDER_WAY: usize = 8 << 20;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    ReadLatency,
    ReadBandwidth,
    WriteBandwidth,
}

impl What {
    pub(crate) const ALL: [Self; 3] =
        [Self::ReadLatency, Self::ReadBandwidth, Self::WriteBandwidth];

    fn word(self) -> &'static str {
        match self {
            Self::ReadLatency => "read-latency",
            Self::ReadBandwidth => "read-bandwidth",
            Self::WriteBandwidth => "write-bandwidth",
        }
    }

    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::ReadLatency => "us",
            Self::ReadBandwidth | Self::WriteBandwidth => "B/s",
        }
    }
}

/// Requests that are measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Traffic {
    pub(crate) what: What,
    /// Bytes of each request.
    pub(crate) size: usize,
    /// Queue pairs that carry it; ours has a connection for each.
    pub(crate) queues: usize,
}

impl Traffic {
    /// Pages, one at a time.
    pub(crate) const PAGE_LATENCY: Self = Self {
        what: What::ReadLatency,
        size: PAGE,
        queues: 1,
    };

    /// All that is asked for; a latency is of one queue pair, whatever is asked for.
    pub(crate) fn all(options: &Options) -> Vec<Self> {
        let mut all = Vec::new();
        for &size in &options.sizes {
            for &queues in &options.queues {
                for what in What::ALL {
                    let queues = match what {
                        What::ReadLatency => 1,
                        What::ReadBandwidth | What::WriteBandwidth => queues,
                    };
                    let traffic = Self { what, size, queues };
                    if !all.contains(&traffic) {
                        all.push(traffic);
                    }
                }
            }
        }
        all
    }

    /// Whether it is pages over one queue pair.
    #[cfg(feature = "verbs")]
    pub(crate) fn is_usual(self) -> bool {
        (self.size, self.queues) == (PAGE, 1)
    }

    /// Requests under way at a time on each queue pair.
    pub(crate) fn depth(self) -> usize {
        match self.what {
            What::ReadLatency => 1,
            What::ReadBandwidth | What::WriteBandwidth => {
                (DEPTH.min(BYTES_UNDER_WAY / self.size) / self.queues).max(1)
            }
        }
    }

    /// Its name in the report, `of` it: `read4k.latency.p50`, `write64k.bandwidth.q16`, `read1m.messages`.
    pub(crate) fn name(self, of: &str) -> String {
        let way = match self.what {
            What::WriteBandwidth => "write",
            What::ReadLatency | What::ReadBandwidth => "read",
        };
        let size = match self.size {
            size if size.is_multiple_of(1 << 20) => format!("{}m", size >> 20),
            size if size.is_multiple_of(1 << 10) => format!("{}k", size >> 10),
            size => format!("{size}b"),
        };
        let queues = match self.queues {
            1 => String::new(),
            queues => format!(".q{queues}"),
        };
        format!("{way}{size}.{of}{queues}")
    }

    /// As [`Self::of`] reads it.
    pub(crate) fn word(self) -> String {
        format!("{}:{}:{}", self.what.word(), self.size, self.queues)
    }

    /// That of a [`Self::word`].
    pub(crate) fn of(word: &str) -> Option<Self> {
        let mut parts = word.split(':');
        let what = parts.next()?;
        Some(Self {
            what: What::ALL.into_iter().find(|its| its.word() == what)?,
            size: parts.next()?.parse().ok().filter(|size| *size > 0)?,
            queues: parts.next()?.parse().ok().filter(|queues| *queues > 0)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: Traffic = Traffic {
        what: What::ReadBandwidth,
        size: PAGE,
        queues: 1,
    };

    #[test]
    fn names_say_what_is_moved() {
        assert_eq!(
            Traffic::PAGE_LATENCY.name("latency.p50"),
            "read4k.latency.p50"
        );
        let many = Traffic {
            what: What::WriteBandwidth,
            size: 1 << 20,
            queues: 16,
        };
        assert_eq!(many.name("messages"), "write1m.messages.q16");
        assert_eq!(Traffic::of(&many.word()), Some(many));
        assert_eq!(Traffic::of("read-latency:0:1"), None);
    }

    #[test]
    fn what_is_under_way_is_shared_among_queue_pairs() {
        let depth = |size, queues| {
            Traffic {
                size,
                queues,
                ..STREAM
            }
            .depth()
        };
        assert_eq!(
            (depth(PAGE, 1), depth(PAGE, 16), depth(PAGE, 1000)),
            (128, 8, 1)
        );
        assert_eq!((depth(1 << 20, 1), depth(1 << 20, 4)), (8, 2));
    }
}
