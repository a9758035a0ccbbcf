//! The measuring side of `bench fabric`: an endpoint that moves pages, in a process of its own, as perftest is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farpage_fabric::{
    Completion, Endpoint, FabricAddress, LocalSlice, RegionId, RegisteredMemory, RemoteSlice,
    WorkId, connect,
};

use crate::BenchError;
use crate::fabric::{EXTENT_BYTES, KEY, memory};
use crate::median::quantile;
use crate::region::PAGE;
use crate::traffic::{Traffic, What};

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
pub(crate) fn count(address: &str, traffic: Traffic, seconds: f64) -> Result<usize, BenchError> {
    Requester::connect(address, traffic)?.count(seconds)
}

/// Microseconds, or bytes per second, over so many requests.
pub(crate) fn measure(address: &str, traffic: Traffic, count: usize) -> Result<f64, BenchError> {
    let mut requester = Requester::connect(address, traffic)?;
    // On every queue pair.
    requester.measure(WARM_UP.max(traffic.queues * traffic.depth()))?;
    requester.measure(count)
}

/// Connections, and memory to read into and write from.
pub(crate) struct Requester {
    traffic: Traffic,
    queues: Vec<Queue>,
    memory: Arc<RegisteredMemory>,
    done: Vec<Completion>,
}

/// A connection, and its memory on it.
struct Queue {
    endpoint: Box<dyn Endpoint>,
    region: RegionId,
    posted: usize,
}

impl Requester {
    pub(crate) fn connect(address: &str, traffic: Traffic) -> Result<Self, BenchError> {
        let address: FabricAddress = address.parse().map_err(BenchError::fabric("--peer"))?;
        let memory = memory("local", traffic.depth() * traffic.size)?;
        let queues = (0..traffic.queues).map(|_| Queue::connect(&address, traffic, &memory));
        Ok(Self {
            traffic,
            queues: queues.collect::<Result<_, _>>()?,
            memory,
            done: Vec::with_capacity(traffic.depth()),
        })
    }

    /// How many requests take about so many seconds.
    fn count(&mut self, seconds: f64) -> Result<usize, BenchError> {
        let began = Instant::now();
        let Traffic { what, size, queues } = self.traffic;
        let (bounds, trial) = match what {
            What::ReadLatency => (LATENCY_ROUNDS, TRIAL / 4),
            What::ReadBandwidth | What::WriteBandwidth => (STREAM, TRIAL),
        };
        let trial = (trial * PAGE / size).max(queues * self.traffic.depth());
        self.measure(trial)?;
        let each = began.elapsed().as_secs_f64() / trial as f64;
        let least = (bounds.start() * PAGE / size).max(WARM_UP);
        let count = ((seconds / each) as usize).clamp(least, *bounds.end());
        // As many on each queue pair, of which perftest wants five at least.
        Ok(count.div_ceil(queues).max(5) * queues)
    }

    /// Microseconds, or bytes per second, over `count` requests.
    fn measure(&mut self, count: usize) -> Result<f64, BenchError> {
        if self.traffic.what == What::ReadLatency {
            let mut times = Vec::with_capacity(count);
            for round in 0..count {
                let began = Instant::now();
                self.stream(round, 1)?;
                times.push(began.elapsed().as_secs_f64() * 1e6);
            }
            return Ok(quantile(&mut times, 0.5));
        }
        let began = Instant::now();
        self.stream(0, count)?;
        Ok((count * self.traffic.size) as f64 / began.elapsed().as_secs_f64())
    }

    /// Reads the request with this number, whose bytes go to `into`.
    pub(crate) fn read(&mut self, number: usize, into: &mut [u8]) -> Result<(), BenchError> {
        self.stream(number, 1)?;
        self.memory
            .read(0, into)
            .map_err(BenchError::fabric("reading a page"))
    }

    /// Moves `count` requests from the `first` on, round and round the extent, as many at a time as may be under way.
    fn stream(&mut self, first: usize, count: usize) -> Result<(), BenchError> {
        let (mut posted, mut ended) = (0, 0);
        let (mut moved, mut in_vain) = (Instant::now(), 0_u32);
        while ended < count {
            for queue in &mut self.queues {
                while posted < count && queue.endpoint.credits() > 0 {
                    queue.post(self.traffic, first + posted)?;
                    posted += 1;
                }
                queue.endpoint.flush();
                queue.endpoint.poll(&mut self.done);
            }
            if self.done.is_empty() {
                in_vain = in_vain.wrapping_add(1);
                if in_vain == 1 {
                    moved = Instant::now();
                } else if in_vain.is_multiple_of(LOOK_EVERY) && moved.elapsed() > STALL {
                    return Err(BenchError::fabric("moving pages")(
                        "nothing completes any more",
                    ));
                }
            } else {
                in_vain = 0;
            }
            ended += self.done.len();
            for completion in self.done.drain(..) {
                completion
                    .result
                    .map_err(BenchError::fabric("moving pages"))?;
            }
        }
        Ok(())
    }
}

impl Queue {
    fn connect(
        address: &FabricAddress,
        traffic: Traffic,
        memory: &Arc<RegisteredMemory>,
    ) -> Result<Self, BenchError> {
        let give_up = Instant::now() + THERE_WITHIN;
        let mut endpoint = loop {
            match connect(address, traffic.depth(), Instant::now() + THERE_WITHIN) {
                Ok(endpoint) => break endpoint,
                Err(error) if Instant::now() >= give_up => {
                    return Err(BenchError::fabric("connecting")(error));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        };
        let region = endpoint.register(Arc::clone(memory));
        Ok(Self {
            endpoint,
            region,
            posted: 0,
        })
    }

    /// Posts the request with this number.
    fn post(&mut self, traffic: Traffic, number: usize) -> Result<(), BenchError> {
        let size = traffic.size;
        let local = LocalSlice {
            region: self.region,
            offset: (self.posted % traffic.depth() * size) as u64,
            len: size as u32,
        };
        let remote = RemoteSlice {
            extent: 0,
            key: KEY,
            offset: (number * size) as u64 % EXTENT_BYTES,
        };
        let id = WorkId(number as u64);
        self.posted += 1;
        if traffic.what == What::WriteBandwidth {
            self.endpoint.post_write(id, local, remote)
        } else {
            self.endpoint.post_read(id, local, remote)
        }
        .map_err(BenchError::fabric("moving pages"))
    }
}
