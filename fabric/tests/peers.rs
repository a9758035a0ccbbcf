//! Peers that do not behave: garbage, silence, strangers, floods, death in the middle.

// Helpers outside of #[test] functions may panic here as well.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Client, Node, PATIENCE, Random, Responder, Transport, deadline, memory, unique_name};
use farpage_fabric::access::AccessTable;
use farpage_fabric::shm::{PeerPolicy, ShmEndpoint, ShmLimits, ShmResponder};
use farpage_fabric::tcp::{ResponderLimits, TcpEndpoint, TcpResponder};
use farpage_fabric::wire::{
    CLIENT_HELLO_BYTES, ClientHello, REQUEST_BYTES, Request, Response, ServerHello, Status, VERSION,
};
use farpage_fabric::{
    ConnectError, Endpoint, FabricAddress, MAX_TRANSFER, PoolGeometry, RemoteSlice, ShmAddress,
    WorkError, WorkId,
};

fn tcp(node: &Node) -> &TcpResponder {
    match &node.responder {
        Responder::Tcp(responder) => responder,
        _ => panic!("not over TCP"),
    }
}

/// Waits until `condition`, or fails.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = deadline();
    while !condition() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn raw(address: SocketAddr) -> TcpStream {
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn greeted(address: SocketAddr) -> TcpStream {
    let mut socket = raw(address);
    socket
        .write_all(&ClientHello { version: VERSION }.encode())
        .unwrap();
    let mut hello = [0; 32];
    socket.read_exact(&mut hello).unwrap();
    assert!(matches!(
        ServerHello::decode(&hello),
        Ok(ServerHello::Welcome { .. })
    ));
    socket
}

/// Reads until the responder hangs up, however it does so.
fn assert_hung_up(mut socket: TcpStream) {
    let mut rest = Vec::new();
    match socket.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
}

#[test]
fn garbage_closes_its_own_connection_only() {
    let node = Node::start(Transport::Tcp);
    node.access.grant(0, 7).unwrap();
    let address = tcp(&node).local_addr();
    let mut client = Client::new(node.connect());
    for seed in 0..20 {
        let mut socket = raw(address);
        // May fail half-way, once the responder has seen enough.
        let _ = socket.write_all(&Random(seed).bytes(5000));
        assert_hung_up(socket);
        let mut socket = greeted(address);
        let _ = socket.write_all(&[0xee; 5000]);
        assert_hung_up(socket);
        client.write(0, 7, 0, b"well").unwrap();
        assert_eq!(client.read(0, 7, 0, 4).unwrap(), b"well");
    }
    let stats = tcp(&node).stats();
    assert_eq!((stats.bad_handshakes, stats.protocol_errors), (20, 20));
    assert_eq!((stats.reads, stats.writes, stats.bytes), (20, 20, 160));
}

#[test]
fn silence_is_not_waited_for_and_other_versions_are_told() {
    let geometry = PoolGeometry::new(4096, 1).unwrap();
    let access = AccessTable::new(geometry).unwrap();
    let limits = ResponderLimits {
        handshake: Duration::from_millis(50),
        ..ResponderLimits::default()
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let responder = TcpResponder::start(listener, memory(4096), access, limits).unwrap();
    assert_hung_up(raw(responder.local_addr()));
    assert_eq!(responder.stats().bad_handshakes, 1);

    let node = Node::start(Transport::Tcp);
    let mut socket = raw(tcp(&node).local_addr());
    socket
        .write_all(
            &ClientHello {
                version: VERSION + 1,
            }
            .encode(),
        )
        .unwrap();
    let mut hello = [0; 32];
    socket.read_exact(&mut hello).unwrap();
    assert_eq!(
        ServerHello::decode(&hello),
        Ok(ServerHello::OtherVersion(VERSION))
    );
    assert_hung_up(socket);
    assert_eq!(tcp(&node).stats().bad_handshakes, 1);
}

#[test]
fn connections_beyond_the_limit_are_told_that_it_is_busy() {
    let geometry = PoolGeometry::new(4096, 1).unwrap();
    let access = AccessTable::new(geometry).unwrap();
    let limits = ResponderLimits {
        connections: 2,
        ..ResponderLimits::default()
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let responder = TcpResponder::start(listener, memory(4096), access.clone(), limits).unwrap();
    let open = [
        greeted(responder.local_addr()),
        greeted(responder.local_addr()),
    ];
    match TcpEndpoint::connect(responder.local_addr(), 1, deadline()) {
        // The second: the close overtook the courtesy.
        Err(ConnectError::Busy | ConnectError::HungUp) => {}
        other => panic!("{other:?}"),
    }
    drop(open);
    eventually("no place became free", || {
        TcpEndpoint::connect(responder.local_addr(), 1, deadline()).is_ok()
    });

    let address = ShmAddress::Abstract(unique_name());
    let limits = ShmLimits {
        connections: 1,
        ..ShmLimits::default()
    };
    let responder = ShmResponder::start(&address, memory(4096), access, limits).unwrap();
    let open = ShmEndpoint::connect(&address, 1, deadline()).unwrap();
    assert!(matches!(
        ShmEndpoint::connect(&address, 1, deadline()),
        Err(ConnectError::Busy)
    ));
    drop(open);
    eventually("no place became free", || {
        ShmEndpoint::connect(&address, 1, deadline()).is_ok()
    });
    assert!(responder.stats().turned_away >= 1);
}

#[test]
fn a_peer_that_stops_in_the_middle_of_a_transfer_does_not_hold_a_revocation_up() {
    let node = Node::start(Transport::Tcp);
    node.access.grant(0, 7).unwrap();
    let request = |operation| Request {
        operation,
        id: 1,
        extent: 0,
        key: 7,
        offset: 0,
        len: MAX_TRANSFER,
    };
    let mut writer = greeted(tcp(&node).local_addr());
    writer
        .write_all(&request(farpage_fabric::wire::Operation::Write).encode())
        .unwrap();
    writer.write_all(&[9; 1000]).unwrap();
    // One that asks for more than all buffers hold, and reads none of it.
    let mut reader = greeted(tcp(&node).local_addr());
    for _ in 0..64 {
        reader
            .write_all(&request(farpage_fabric::wire::Operation::Read).encode())
            .unwrap();
    }
    let mut byte = [0];
    eventually("the write did not begin", || {
        node.pool.read(999, &mut byte).unwrap();
        byte == [9]
    });
    eventually("the reads did not begin", || tcp(&node).stats().reads > 0);
    node.access.revoke(0).unwrap();
    node.pool.zero(0, MAX_TRANSFER as usize).unwrap();
    // The rest of the write is refused.
    writer
        .write_all(&vec![9; MAX_TRANSFER as usize - 1000])
        .unwrap();
    let mut response = [0; 16];
    writer.read_exact(&mut response).unwrap();
    assert_eq!(
        Response::decode(&response).unwrap().status,
        Status::AccessDenied
    );
    let clean = memory(MAX_TRANSFER as usize)
        .hash128(0, MAX_TRANSFER as usize)
        .unwrap();
    assert_eq!(node.pool.hash128(0, MAX_TRANSFER as usize).unwrap(), clean);
}

/// A responder that answers a hello and the first request as `answer` says, then closes.
fn impostor(
    hello: Vec<u8>,
    answer: impl FnOnce(Request) -> Vec<u8> + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.read_exact(&mut [0; CLIENT_HELLO_BYTES]).unwrap();
        socket.write_all(&hello).unwrap();
        let mut request = [0; REQUEST_BYTES];
        if socket.read_exact(&mut request).is_ok() {
            socket
                .write_all(&answer(Request::decode(&request).unwrap()))
                .unwrap();
            // Until the requester has drawn its conclusion.
            let _ = socket.shutdown(std::net::Shutdown::Write);
            let _ = socket.read_to_end(&mut Vec::new());
        }
    });
    address
}

fn welcome() -> Vec<u8> {
    let geometry = PoolGeometry::new(1 << 20, 1).unwrap();
    ServerHello::Welcome {
        geometry,
        max_transfer: MAX_TRANSFER,
    }
    .encode()
    .to_vec()
}

#[test]
fn an_impostor_gets_no_further_than_its_hello() {
    type Expected = fn(&ConnectError) -> bool;
    let cases: [(Vec<u8>, Expected); 4] = [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n{}{}".to_vec(), |error| {
            matches!(error, ConnectError::Wire(_))
        }),
        (b"short".to_vec(), |error| {
            matches!(error, ConnectError::Deadline | ConnectError::HungUp)
        }),
        (ServerHello::OtherVersion(99).encode().to_vec(), |error| {
            error.to_string().contains("version 99")
        }),
        (ServerHello::Forbidden.encode().to_vec(), |error| {
            matches!(error, ConnectError::Forbidden)
        }),
    ];
    for (hello, expected) in cases {
        // Only the short hello is waited for in vain.
        let end = if hello == b"short" {
            Instant::now() + Duration::from_millis(300)
        } else {
            deadline()
        };
        let error = TcpEndpoint::connect(impostor(hello, |_| Vec::new()), 1, end).unwrap_err();
        assert!(expected(&error), "{error:?}");
    }
}

#[test]
fn broken_answers_complete_everything_once() {
    let done = |id, len| {
        Response {
            id,
            status: Status::Done,
            len,
        }
        .encode()
        .to_vec()
    };
    type Answer = Box<dyn FnOnce(Request) -> Vec<u8> + Send>;
    let cases: Vec<(&str, Answer, WorkError)> = vec![
        ("silence", Box::new(|_| Vec::new()), WorkError::Disconnected),
        (
            "half a header",
            Box::new(move |r| done(r.id, 4096)[..9].to_vec()),
            WorkError::Disconnected,
        ),
        (
            "half a payload",
            Box::new(move |r| [done(r.id, 4096), vec![1; 999]].concat()),
            WorkError::Disconnected,
        ),
        ("noise", Box::new(|_| vec![0xaa; 999]), WorkError::Protocol),
        (
            "another id",
            Box::new(move |r| [done(r.id + 1, 4096), vec![1; 4096]].concat()),
            WorkError::Protocol,
        ),
        (
            "another length",
            Box::new(move |r| [done(r.id, 4000), vec![1; 4000]].concat()),
            WorkError::Protocol,
        ),
        (
            "a huge length",
            Box::new(move |r| done(r.id, 0xff_ffff)),
            WorkError::Protocol,
        ),
    ];
    for (name, answer, expected) in cases {
        let endpoint = TcpEndpoint::connect(impostor(welcome(), answer), 8, deadline()).unwrap();
        let mut client = Client::new(Box::new(endpoint));
        for i in 0..8 {
            let remote = RemoteSlice {
                extent: 0,
                key: 1,
                offset: 0,
            };
            client
                .endpoint
                .post_read(WorkId(i), client.slice(i * 4096, 4096), remote)
                .unwrap();
        }
        client.endpoint.flush();
        let completions = client.complete(8);
        assert!(
            completions
                .iter()
                .map(|completion| completion.id.0)
                .eq(0..8),
            "{name}"
        );
        assert!(
            completions
                .iter()
                .all(|completion| completion.result == Err(expected)),
            "{name}: {completions:?}"
        );
        assert!(!client.endpoint.is_connected());
        assert_eq!(client.endpoint.poll(&mut Vec::new()), 0);
    }
}

#[test]
fn surplus_answers_break_the_connection() {
    let address = impostor(welcome(), |request| {
        let answer = Response {
            id: request.id,
            status: Status::AccessDenied,
            len: 0,
        }
        .encode();
        [answer, answer].concat()
    });
    let mut client = Client::new(Box::new(
        TcpEndpoint::connect(address, 8, deadline()).unwrap(),
    ));
    assert_eq!(
        client.read(0, 1, 0, 16).unwrap_err(),
        WorkError::AccessDenied
    );
    eventually("the surplus went unnoticed", || {
        client.endpoint.poll(&mut Vec::new());
        !client.endpoint.is_connected()
    });
}

#[test]
fn strangers_are_not_handed_the_pool() {
    let access = AccessTable::new(PoolGeometry::new(4096, 1).unwrap()).unwrap();
    let address = ShmAddress::Abstract(unique_name());
    let limits = ShmLimits {
        policy: PeerPolicy::Allow(Arc::new(|_| false)),
        ..ShmLimits::default()
    };
    let responder = ShmResponder::start(&address, memory(4096), access, limits).unwrap();
    assert!(matches!(
        ShmEndpoint::connect(&address, 1, deadline()),
        Err(ConnectError::Forbidden)
    ));
    assert_eq!(responder.stats().forbidden, 1);
}

#[test]
fn garbage_and_silence_on_the_unix_socket_close_that_connection_only() {
    let access = AccessTable::new(PoolGeometry::new(4096, 1).unwrap()).unwrap();
    let name = unique_name();
    let address = ShmAddress::Abstract(name.clone());
    let limits = ShmLimits {
        handshake: Duration::from_millis(500),
        ..ShmLimits::default()
    };
    let responder = ShmResponder::start(&address, memory(4096), access, limits).unwrap();
    let endpoint = ShmEndpoint::connect(&address, 1, deadline()).unwrap();
    for bytes in [&[0xee; 5000][..], b"x", b""] {
        let name = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let mut socket = UnixStream::connect_addr(&name).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let _ = socket.write_all(bytes);
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest);
        assert!(rest.is_empty());
    }
    eventually("not counted", || responder.stats().bad_handshakes == 3);
    assert!(endpoint.is_connected());
}

#[test]
fn paths_are_taken_over_from_the_dead_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fabric.sock");
    let address = ShmAddress::Path(path.clone());
    let start = || {
        let access = AccessTable::new(PoolGeometry::new(4096, 1).unwrap()).unwrap();
        ShmResponder::start(&address, memory(4096), access, ShmLimits::default())
    };
    // Bound and closed without being removed, as by a process that was killed.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let responder = start().unwrap();
    let error = start().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    assert!(
        error.to_string().contains("choose another address"),
        "{error}"
    );
    let url: FabricAddress = format!("shm:{}", path.display()).parse().unwrap();
    assert!(
        farpage_fabric::connect(&url, 4, deadline())
            .unwrap()
            .is_connected()
    );
    drop(responder);
    assert!(!path.exists());
    let error = farpage_fabric::connect(&url, 4, deadline())
        .map(|_| ())
        .unwrap_err();
    assert!(
        error.to_string().contains("memory node runs there"),
        "{error}"
    );
}

#[test]
fn connecting_by_name_and_failing_to() {
    let node = Node::start(Transport::Tcp);
    let port = tcp(&node).local_addr().port();
    let url: FabricAddress = format!("tcp:localhost:{port}").parse().unwrap();
    assert_eq!(
        farpage_fabric::connect(&url, 4, deadline())
            .unwrap()
            .window(),
        4
    );
    assert!(matches!(
        farpage_fabric::connect(&url, 0, deadline()),
        Err(ConnectError::Window(0))
    ));
    assert!(matches!(
        farpage_fabric::connect(&url, 4, Instant::now()),
        Err(ConnectError::Deadline)
    ));
    drop(node);
    assert!(matches!(
        farpage_fabric::connect(&url, 4, deadline()),
        Err(ConnectError::Unreachable { .. })
    ));
}
