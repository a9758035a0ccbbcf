//! The HTTP server of a page of metrics.
//!
//! One thread with a runtime of its own, which nothing else waits for. Everybody who can connect may ask: so a connection is
//! worth one request, a deadline and a place among few, and pages are made at a bounded pace.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, Notify, Semaphore};

use super::page;

/// Connections at a time; further ones are closed at once. A pair of Prometheus servers and some people need fewer.
const MAX_CONNECTIONS: usize = 16;
/// From a connection's begin to its end, answer included: as long as Prometheus waits for one by itself.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(10);
/// Bytes of a request's head: what hyper takes at least, and many times what a scraper sends.
const MAX_REQUEST_BYTES: usize = 8 << 10;
/// Headers of a request.
const MAX_HEADERS: usize = 64;
/// The pause after a failed accept (no descriptors left, say): the cause does not pass in a moment.
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// How much longer than a page's making the time to the next one is, within bounds: whoever asks without pause is a tenth
/// of a processor's burden at most.
const REST_SHARE: u32 = 10;
const SHORTEST_REST: Duration = Duration::from_millis(10);
const LONGEST_REST: Duration = Duration::from_secs(1);

/// How long the address of a process that was killed may be taken yet: until what it had is closed.
const DEAD_LISTENER_DEADLINE: Duration = Duration::from_secs(5);
/// How often it is tried meanwhile.
const DEAD_LISTENER_POLL: Duration = Duration::from_millis(5);

/// Who makes pages.
pub(crate) trait Source: Send + Sync + 'static {
    /// A page; `None` where there is none to be had now.
    fn page(&self) -> impl Future<Output = Option<String>> + Send;
}

/// Why metrics are not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MetricsError {
    #[error("--metrics {0}: {1}; choose an address of this host and a port that is free")]
    Listen(SocketAddr, io::Error),
    #[error("cannot start the thread that serves metrics: {0}; check the limits on processes")]
    Thread(io::Error),
}

/// A server of pages, for as long as the process lives.
pub(crate) struct Endpoint<S> {
    at: SocketAddr,
    source: Arc<OnceLock<S>>,
    opened: Arc<Notify>,
}

/// When whoever asks is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begin {
    AtOnce,
    Opened,
}

impl<S: Source> Endpoint<S> {
    /// Serves at an address, where one is given. Until there is a source whoever asks is told to come again.
    pub(crate) fn start(at: Option<SocketAddr>) -> Result<Option<Self>, MetricsError> {
        at.map(|at| Self::start_at(at, Begin::AtOnce, Duration::ZERO))
            .transpose()
    }

    /// The same of a process that takes over from one that was killed, which may hold the address for a moment yet. Whoever asks
    /// waits until there is a source: a connection must not take the number of a descriptor that is to be handed over.
    pub(crate) fn start_again(at: Option<SocketAddr>) -> Result<Option<Self>, MetricsError> {
        at.map(|at| Self::start_at(at, Begin::Opened, DEAD_LISTENER_DEADLINE))
            .transpose()
    }

    fn start_at(
        wanted: SocketAddr,
        begin: Begin,
        patience: Duration,
    ) -> Result<Self, MetricsError> {
        let listen = |error| MetricsError::Listen(wanted, error);
        let listener = bind(wanted, patience).map_err(listen)?;
        let at = listener.local_addr().map_err(listen)?;
        listener.set_nonblocking(true).map_err(listen)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(MetricsError::Thread)?;
        let (source, opened) = (Arc::new(OnceLock::new()), Arc::new(Notify::new()));
        let pages = Arc::new(Pages {
            source: Arc::clone(&source),
            next: Mutex::new(Instant::now()),
        });
        std::thread::Builder::new()
            .name("metrics".into())
            .spawn({
                let opened = Arc::clone(&opened);
                let serves = async move {
                    if begin == Begin::Opened {
                        opened.notified().await;
                    }
                    accept(listener, pages).await
                };
                move || {
                    if let Err(error) = runtime.block_on(serves) {
                        tracing::error!(%error, "metrics are not served");
                    }
                }
            })
            .map_err(MetricsError::Thread)?;
        tracing::info!(%at, "metrics are served");
        Ok(Self { at, source, opened })
    }

    /// Has the source asked from now on. Returns where, as it is said in a line.
    pub(crate) fn open(self, source: S) -> String {
        let _ = self.source.set(source);
        self.opened.notify_one();
        format!("metrics at http://{}/metrics", self.at)
    }
}

fn bind(wanted: SocketAddr, patience: Duration) -> io::Result<TcpListener> {
    let began = Instant::now();
    loop {
        match TcpListener::bind(wanted) {
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse && began.elapsed() < patience =>
            {
                std::thread::sleep(DEAD_LISTENER_POLL);
            }
            result => return result,
        }
    }
}

async fn accept<S: Source>(listener: TcpListener, pages: Arc<Pages<S>>) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "a scraper could not be let in");
                tokio::time::sleep(ACCEPT_REST).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            continue;
        };
        let pages = Arc::clone(&pages);
        tokio::spawn(async move {
            // What is not over by then is dropped with its connection.
            if let Ok(Err(error)) =
                tokio::time::timeout(CONNECTION_DEADLINE, serve(stream, &pages)).await
            {
                tracing::debug!(%error, "a scraper's connection");
            }
            drop(place);
        });
    }
}

async fn serve<S: Source>(stream: TcpStream, pages: &Pages<S>) -> hyper::Result<()> {
    let answer = |request| async move { Ok::<_, Infallible>(pages.answer(&request).await) };
    http1::Builder::new()
        .keep_alive(false)
        .half_close(true)
        .max_buf_size(MAX_REQUEST_BYTES)
        .max_headers(MAX_HEADERS)
        // The connection's own deadline is shorter.
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(stream), service_fn(answer))
        .await
}

/// The pages of a source, made at a bounded pace.
struct Pages<S> {
    source: Arc<OnceLock<S>>,
    /// When the next may be made.
    next: Mutex<Instant>,
}

impl<S: Source> Pages<S> {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if request.uri().path() != "/metrics" {
            return plain(StatusCode::NOT_FOUND, "there is only /metrics\n");
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut refusal = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
            let allowed = HeaderValue::from_static("GET, HEAD");
            refusal.headers_mut().insert(ALLOW, allowed);
            return refusal;
        }
        match self.make().await {
            Some(text) => told(StatusCode::OK, page::CONTENT_TYPE, text.into()),
            None => plain(
                StatusCode::SERVICE_UNAVAILABLE,
                "there are no figures now; try again in a moment\n",
            ),
        }
    }

    async fn make(&self) -> Option<String> {
        let source = self.source.get()?;
        let mut next = self.next.lock().await;
        tokio::time::sleep_until((*next).into()).await;
        let began = Instant::now();
        let page = source.page().await;
        let rest = (began.elapsed() * REST_SHARE).clamp(SHORTEST_REST, LONGEST_REST);
        *next = Instant::now() + rest;
        page
    }
}

fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    told(
        status,
        "text/plain; charset=utf-8",
        Bytes::from_static(text.as_bytes()),
    )
}

fn told(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let content_type = HeaderValue::from_static(content_type);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

impl<S> fmt::Debug for Endpoint<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("at", &self.at)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, Shutdown};
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// What a test waits for at most.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Counts its pages.
    #[derive(Default)]
    struct Counting {
        made: AtomicU64,
    }

    impl Source for Counting {
        async fn page(&self) -> Option<String> {
            let number = self.made.fetch_add(1, Ordering::Relaxed);
            Some(format!("page {number}\n"))
        }
    }

    fn started() -> (SocketAddr, Endpoint<Counting>) {
        let endpoint = Endpoint::start(Some((Ipv4Addr::LOCALHOST, 0).into()));
        let endpoint = endpoint.unwrap().unwrap();
        assert_ne!(endpoint.at.port(), 0);
        (endpoint.at, endpoint)
    }

    fn connect(at: SocketAddr) -> std::net::TcpStream {
        let stream = std::net::TcpStream::connect(at).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// The answer to these bytes, if any; a server that hangs up in their middle is one that does not answer.
    fn answer(at: SocketAddr, request: &[u8]) -> String {
        let mut stream = connect(at);
        let _ = stream.write_all(request);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    const GET: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n";

    #[test]
    fn a_page_is_served_and_nothing_else() {
        let (at, endpoint) = started();
        assert!(answer(at, GET).starts_with("HTTP/1.1 503"));
        let said = endpoint.open(Counting::default());
        assert_eq!(said, format!("metrics at http://{at}/metrics"));
        let page = answer(at, GET);
        assert!(page.starts_with("HTTP/1.1 200"), "{page}");
        assert!(page.contains("text/plain; version=0.0.4"), "{page}");
        assert!(page.ends_with("\r\n\r\npage 0\n"), "{page}");
        let head = answer(at, b"HEAD /metrics HTTP/1.0\r\n\r\n");
        assert!(
            head.starts_with("HTTP/1.0 200") && head.ends_with("\r\n\r\n"),
            "{head}"
        );
        assert!(answer(at, b"GET / HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 404"));
        let post = answer(at, b"POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n");
        assert!(post.starts_with("HTTP/1.1 405"), "{post}");
    }

    #[test]
    fn garbage_costs_its_own_connection() {
        let (at, endpoint) = started();
        endpoint.open(Counting::default());
        let endless = [
            b"GET /metrics HTTP/1.1\r\nX: ".as_slice(),
            &vec![b'x'; 1 << 20],
        ]
        .concat();
        let many = b"X: y\r\n".repeat(2 * MAX_HEADERS);
        let many = [b"GET /metrics HTTP/1.1\r\n".as_slice(), &many, b"\r\n"].concat();
        let mut seed = 7u32;
        let mut random = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as u8
        };
        let mut noise = vec![
            Vec::new(),
            endless,
            many,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        ];
        for _ in 0..100 {
            // All of it noise; and a request of which some bytes are.
            noise.push((0..1000).map(|_| random()).collect());
            let mut nearly = GET.to_vec();
            for _ in 0..3 {
                let place = usize::from(random()) % nearly.len();
                nearly[place] = random();
            }
            noise.push(nearly);
        }
        for bytes in noise {
            let answer = answer(at, &bytes);
            assert!(
                answer.is_empty() || answer.starts_with("HTTP/1."),
                "{answer}"
            );
        }
        assert!(answer(at, GET).starts_with("HTTP/1.1 200"));
    }

    #[test]
    fn those_who_hang_have_few_places_and_lose_them() {
        let (at, endpoint) = started();
        endpoint.open(Counting::default());
        let mut hanging: Vec<_> = (0..MAX_CONNECTIONS).map(|_| connect(at)).collect();
        for stream in &mut hanging {
            stream.write_all(b"GET /metr").unwrap();
        }
        // There may be a place for as long as the last of them has not been taken in.
        let deadline = Instant::now() + PATIENCE;
        while !answer(at, GET).is_empty() {
            assert!(Instant::now() < deadline, "there is always a place");
        }
        // The end of each is seen, not waited for by those that come later.
        for stream in &mut hanging {
            let mut rest = Vec::new();
            assert!(
                !matches!(stream.read_to_end(&mut rest), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
            );
        }
        while answer(at, GET).is_empty() {
            assert!(Instant::now() < deadline, "their places are not free again");
        }
    }

    #[test]
    fn an_address_that_is_free_soon_is_waited_for_and_nobody_let_in_before_there_is_a_source() {
        let before = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let at = before.local_addr().unwrap();
        let starting = std::thread::spawn(move || Endpoint::start_again(Some(at)));
        drop(before);
        let endpoint: Endpoint<Counting> = starting.join().unwrap().unwrap().unwrap();
        let mut asking = connect(at);
        asking.write_all(GET).unwrap();
        asking.shutdown(Shutdown::Write).unwrap();
        endpoint.open(Counting::default());
        let mut answer = String::new();
        asking.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    #[test]
    fn an_address_that_is_taken_is_told() {
        let (at, _endpoint) = started();
        let error = Endpoint::<Counting>::start(Some(at)).unwrap_err();
        assert!(
            error.to_string().starts_with(&format!("--metrics {at}: ")),
            "{error}"
        );
    }
}
