// What the fuzz target and its replay on stable do with an input. The first byte says where it goes, the rest is
// what a peer sent.

use std::cell::RefCell;
use std::sync::Arc;

use farpage_fabric::access::AccessTable;
use farpage_fabric::gate::Gate;
use farpage_fabric::memory::MemoryOptions;
use farpage_fabric::tcp::session::{MAX_OUTPUT, Session};
use farpage_fabric::wire::{ClientHello, Request, Response, ServerHello};
use farpage_fabric::{MAX_TRANSFER, PoolGeometry, RegisteredMemory};

/// Extent 0 is granted under this key, extent 1 to nobody.
pub const KEY: u64 = 7;
pub const EXTENT_BYTES: u64 = 8192;

struct Responder {
    pool: RegisteredMemory,
    access: Arc<AccessTable>,
    gate: Gate,
}

fn responder() -> Responder {
    let geometry = PoolGeometry::new(EXTENT_BYTES, 2).unwrap();
    let bytes = geometry.pool_bytes() as usize;
    let (pool, _) = RegisteredMemory::create("fuzz", bytes, MemoryOptions::default()).unwrap();
    let access = AccessTable::new(geometry).unwrap();
    access.grant(0, KEY).unwrap();
    let gate = access.open_gate().unwrap();
    Responder { pool, access, gate }
}

thread_local! {
    static RESPONDER: RefCell<Responder> = RefCell::new(responder());
}

pub fn run(data: &[u8]) {
    let Some((&which, bytes)) = data.split_first() else {
        return;
    };
    match which % 5 {
        0 => {
            if let Some(Ok(hello)) = bytes.first_chunk().map(ClientHello::decode) {
                assert_eq!(ClientHello::decode(&hello.encode()), Ok(hello));
            }
        }
        1 => {
            if let Some(Ok(hello)) = bytes.first_chunk().map(ServerHello::decode) {
                assert_eq!(ServerHello::decode(&hello.encode()), Ok(hello));
            }
        }
        2 => {
            if let Some(Ok(request)) = bytes.first_chunk().map(Request::decode) {
                assert!(request.len <= MAX_TRANSFER);
                assert_eq!(&request.encode(), bytes.first_chunk().unwrap());
            }
        }
        3 => {
            if let Some(Ok(response)) = bytes.first_chunk().map(Response::decode) {
                assert!(response.len <= MAX_TRANSFER);
                assert_eq!(&response.encode(), bytes.first_chunk().unwrap());
            }
        }
        _ => session(bytes),
    }
}

/// A whole session, its bytes arriving in pieces that the first one chooses.
fn session(bytes: &[u8]) {
    RESPONDER.with_borrow_mut(|Responder { pool, access, gate }| {
        let piece = usize::from(bytes.first().copied().unwrap_or(0)) + 1;
        let mut session = Session::new();
        'stream: for bytes in bytes.get(1..).unwrap_or_default().chunks(piece) {
            let mut rest = bytes;
            while !rest.is_empty() {
                match session.feed(pool, gate, rest) {
                    Ok(consumed) => {
                        assert!(consumed > 0, "no progress");
                        rest = &rest[consumed..];
                    }
                    Err(_) => break 'stream,
                }
                assert!(session.output().len() <= MAX_OUTPUT);
                responses(session.output());
                session.clear_output();
            }
        }
        // Nobody wrote what was granted to nobody, and nothing is left standing in the gate.
        let mut other = vec![1; EXTENT_BYTES as usize];
        pool.read(EXTENT_BYTES, &mut other).unwrap();
        assert!(other.iter().all(|&byte| byte == 0));
        access.revoke(0).unwrap();
        access.grant(0, KEY).unwrap();
    });
}

/// Output is whole, well-formed responses.
fn responses(mut output: &[u8]) {
    while let Some((header, rest)) = output.split_first_chunk() {
        let response = Response::decode(header).unwrap();
        output = &rest[response.len as usize..];
    }
    assert!(output.is_empty());
}
