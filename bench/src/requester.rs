//! The measuring side of `bench fabric`: an endpoint that moves pages, in a process of its own, as perftest is.

use std::time::{Duration, Instant};

use farpage_fabric::{
    Completion, Endpoint, FabricAddress, LocalSlice, RegionId, RemoteSlice, WorkId, connect,
};

use crate::BenchError;
use crate::fabric::{DEPTH, EXTENT_BYTES, KEY, What, memory};
use crate::median::quantile;
use crate::region::PAGE;

/// The other machine may be booting yet.
const THERE_WITHIN: Duration = Duration::from_secs(60);

/// Polls in vain between two looks at the clock.
const LOOK_EVERY: u32 = 4096;

/// Nothing completes for so long only if the connection is broken, or the other machine is.
const STALL: Duration = Duration::from_secs(30);

/// Requests by which the length of a stream is judged.
const TRIAL: usize = 256;

/// Bounds of a stream's length, in requests.
const STREAM: std::ops::RangeInclusive<usize> = 1000..=1_000_000;

/// One latency is enough to know the next ones' order; a stream needs more.
const LATENCY_ROUNDS: std::ops::RangeInclusive<usize> = 200..=10_000;

/// Requests that go before a measurement: with the first one the node is asked for the key.
const WARM_UP: usize = 16;

/// How many requests to the fabric address take about so many seconds.
pub(crate) fn count(address: &str, what: What, seconds: f64) -> Result<usize, BenchError> {
    Requester::connect(address)?.count(what, seconds)
}

/// Microseconds, or bytes per second, over so many requests.
pub(crate) fn measure(address: &str, what: What, count: usize) -> Result<f64, BenchError> {
    let mut requester = Requester::connect(address)?;
    requester.measure(what, WARM_UP)?;
    requester.measure(what, count)
}

/// An endpoint, and pages to read into and write from.
struct Requester {
    endpoint: Box<dyn Endpoint>,
    region: RegionId,
    done: Vec<Completion>,
}

impl Requester {
    fn connect(address: &str) -> Result<Self, BenchError> {
        let address: FabricAddress = address.parse().map_err(BenchError::fabric("--peer"))?;
        let give_up = Instant::now() + THERE_WITHIN;
        let mut endpoint = loop {
            match connect(&address, DEPTH, Instant::now() + THERE_WITHIN) {
                Ok(endpoint) => break endpoint,
                Err(error) if Instant::now() >= give_up => {
                    return Err(BenchError::fabric("connecting")(error));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        };
        let region = endpoint.register(memory("local", DEPTH * PAGE)?);
        Ok(Self {
            endpoint,
            region,
            done: Vec::with_capacity(DEPTH),
        })
    }

    /// How many requests take about so many seconds.
    fn count(&mut self, what: What, seconds: f64) -> Result<usize, BenchError> {
        let began = Instant::now();
        let (bounds, trial) = match what {
            What::ReadLatency => (LATENCY_ROUNDS, TRIAL / 4),
            What::ReadBandwidth | What::WriteBandwidth => (STREAM, TRIAL),
        };
        self.measure(what, trial)?;
        let each = began.elapsed().as_secs_f64() / trial as f64;
        Ok(((seconds / each) as usize).clamp(*bounds.start(), *bounds.end()))
    }

    /// Microseconds, or bytes per second, over `count` requests.
    fn measure(&mut self, what: What, count: usize) -> Result<f64, BenchError> {
        if what == What::ReadLatency {
            let mut times = Vec::with_capacity(count);
            for round in 0..count {
                let began = Instant::now();
                self.stream(false, round, 1)?;
                times.push(began.elapsed().as_secs_f64() * 1e6);
            }
            return Ok(quantile(&mut times, 0.5));
        }
        let began = Instant::now();
        self.stream(what == What::WriteBandwidth, 0, count)?;
        Ok((count * PAGE) as f64 / began.elapsed().as_secs_f64())
    }

    /// Moves `count` pages from page `first` on, round and round, [`DEPTH`] at a time.
    fn stream(&mut self, write: bool, first: usize, count: usize) -> Result<(), BenchError> {
        let (mut posted, mut ended) = (0, 0);
        let (mut moved, mut in_vain) = (Instant::now(), 0_u32);
        while ended < count {
            while posted < count && self.endpoint.credits() > 0 {
                let page = first + posted;
                let id = WorkId(page as u64);
                let local = LocalSlice {
                    region: self.region,
                    offset: (page % DEPTH * PAGE) as u64,
                    len: PAGE as u32,
                };
                let remote = RemoteSlice {
                    extent: 0,
                    key: KEY,
                    offset: (page * PAGE) as u64 % EXTENT_BYTES,
                };
                let taken = if write {
                    self.endpoint.post_write(id, local, remote)
                } else {
                    self.endpoint.post_read(id, local, remote)
                };
                taken.map_err(BenchError::fabric("moving pages"))?;
                posted += 1;
            }
            self.endpoint.flush();
            self.done.clear();
            if self.endpoint.poll(&mut self.done) > 0 {
                in_vain = 0;
            } else {
                in_vain = in_vain.wrapping_add(1);
                if in_vain == 1 {
                    moved = Instant::now();
                } else if in_vain.is_multiple_of(LOOK_EVERY) && moved.elapsed() > STALL {
                    return Err(BenchError::fabric("moving pages")(
                        "nothing completes any more",
                    ));
                }
            }
            for completion in &self.done {
                completion
                    .result
                    .map_err(BenchError::fabric("moving pages"))?;
            }
            ended += self.done.len();
        }
        Ok(())
    }
}
