//! The codec and the responder's session: round trips, garbage, and the fuzz corpus on stable.

// Helpers outside of #[test] functions may panic here as well.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

#[path = "../fuzz/body.rs"]
#[allow(unreachable_pub)]
mod body;
mod common;

use common::Random;
use farpage_fabric::wire::{
    ClientHello, Operation, Request, Response, ServerHello, Status, VERSION, WireError,
};
use farpage_fabric::{MAX_TRANSFER, PoolGeometry};
use proptest::prelude::*;

fn requests() -> impl Strategy<Value = Request> {
    let operation = prop_oneof![Just(Operation::Read), Just(Operation::Write)];
    (
        operation,
        any::<u64>(),
        any::<u32>(),
        any::<u64>(),
        any::<u64>(),
        0..=MAX_TRANSFER,
    )
        .prop_map(|(operation, id, extent, key, offset, len)| Request {
            operation,
            id,
            extent,
            key,
            offset,
            len,
        })
}

fn responses() -> impl Strategy<Value = Response> {
    let status = prop_oneof![
        Just(Status::Done),
        Just(Status::AccessDenied),
        Just(Status::RemoteBounds)
    ];
    (any::<u64>(), status, 0..=MAX_TRANSFER).prop_map(|(id, status, len)| Response {
        id,
        status,
        len: if status == Status::Done { len } else { 0 },
    })
}

fn hellos() -> impl Strategy<Value = ServerHello> {
    let welcome = (1..1u64 << 20, 1..1u32 << 20, 1..=MAX_TRANSFER).prop_map(
        |(pages, extents, max_transfer)| {
            let geometry = PoolGeometry::new(pages * 4096, extents).unwrap();
            ServerHello::Welcome {
                geometry,
                max_transfer,
            }
        },
    );
    prop_oneof![
        welcome,
        Just(ServerHello::Busy),
        Just(ServerHello::Forbidden),
        any::<u16>().prop_map(ServerHello::OtherVersion)
    ]
}

proptest! {
    #[test]
    fn frames_come_back_as_they_went(request in requests(), response in responses(), hello in hellos(), version: u16) {
        prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
        prop_assert_eq!(Response::decode(&response.encode()), Ok(response));
        prop_assert_eq!(ServerHello::decode(&hello.encode()), Ok(hello));
        let hello = ClientHello { version };
        prop_assert_eq!(ClientHello::decode(&hello.encode()), Ok(hello));
    }

    #[test]
    fn garbage_is_an_error_or_something_within_bounds(bytes: [u8; 32], which: u8) {
        let mut data = vec![which];
        data.extend(bytes);
        body::run(&data);
    }

    #[test]
    fn one_wrong_byte_never_decodes_to_more_than_was_sent(request in requests(), at in 0..32usize, byte: u8) {
        let mut bytes = request.encode();
        bytes[at] = byte;
        match Request::decode(&bytes) {
            Ok(other) => prop_assert!(other.len <= MAX_TRANSFER),
            Err(error) => prop_assert!(matches!(error, WireError::Operation(_) | WireError::TooLong(_))),
        }
    }
}

#[test]
fn errors_are_the_ones_that_help() {
    let mut hello = ClientHello { version: VERSION }.encode();
    hello[0] = b'G';
    assert!(matches!(
        ClientHello::decode(&hello),
        Err(WireError::Magic(_))
    ));
    let mut hello = ServerHello::Busy.encode();
    hello[4] = 9;
    assert_eq!(ServerHello::decode(&hello), Err(WireError::Version(9)));
    let error = WireError::Version(9).to_string();
    assert!(error.contains("same farpage release"), "{error}");
    let mut response = Response {
        id: 1,
        status: Status::AccessDenied,
        len: 0,
    }
    .encode();
    response[8] = 1;
    assert_eq!(
        Response::decode(&response),
        Err(WireError::PayloadLength(1))
    );
    response[12] = 0;
    assert!(matches!(
        Response::decode(&response),
        Err(WireError::Magic(_))
    ));
}

/// Inputs that are worth starting from, also kept as files for the fuzzer.
fn seeds() -> Vec<Vec<u8>> {
    let request = |operation, extent, key, offset, len| {
        Request {
            operation,
            id: 5,
            extent,
            key,
            offset,
            len,
        }
        .encode()
        .to_vec()
    };
    let session = |piece: u8, parts: &[Vec<u8>]| [vec![4, piece], parts.concat()].concat();
    let (read, write) = (Operation::Read, Operation::Write);
    let geometry = PoolGeometry::new(body::EXTENT_BYTES, 2).unwrap();
    let welcome = ServerHello::Welcome {
        geometry,
        max_transfer: MAX_TRANSFER,
    };
    let with = |which: u8, bytes: &[u8]| [&[which], bytes].concat();
    vec![
        with(0, &ClientHello { version: VERSION }.encode()),
        with(1, &welcome.encode()),
        with(1, &ServerHello::Busy.encode()),
        with(1, &ServerHello::OtherVersion(2).encode()),
        with(2, &request(read, 0, body::KEY, 0, 4096)),
        with(
            3,
            &Response {
                id: 5,
                status: Status::Done,
                len: 4096,
            }
            .encode(),
        ),
        session(
            255,
            &[
                request(read, 0, body::KEY, 4096, 4096),
                request(read, 0, 8, 0, 16),
            ],
        ),
        session(
            9,
            &[
                request(write, 0, body::KEY, 8, 20),
                vec![1; 20],
                request(read, 0, body::KEY, 0, 64),
            ],
        ),
        session(
            30,
            &[
                request(write, 1, body::KEY, 0, 40),
                vec![2; 40],
                request(write, 0, body::KEY, 0, 0),
            ],
        ),
        session(
            0,
            &[
                request(write, 0, body::KEY, 8190, 4),
                vec![3; 4],
                request(read, 0, body::KEY, 8192, 0),
            ],
        ),
    ]
}

#[test]
fn the_corpus_and_its_mutations_do_no_harm() {
    let mut corpus = seeds();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/wire");
    for entry in std::fs::read_dir(folder).unwrap() {
        corpus.push(std::fs::read(entry.unwrap().path()).unwrap());
    }
    assert!(
        corpus.len() > seeds().len(),
        "the corpus in {folder} is gone"
    );
    for data in &corpus {
        body::run(data);
    }
    let mut random = Random(0x5eed);
    for _ in 0..100_000 {
        let mut data = corpus[random.below(corpus.len() as u64) as usize].clone();
        for _ in 0..=random.below(4) {
            mutate(&mut data, &corpus, &mut random);
        }
        body::run(&data);
    }
}

fn mutate(data: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut Random) {
    let at = random.below(data.len() as u64 + 1) as usize;
    match random.below(6) {
        0 => data.truncate(at),
        1 => data.insert(at, random.next() as u8),
        2 => data.extend(&corpus[random.below(corpus.len() as u64) as usize]),
        3 => {
            let extra = vec![random.next() as u8; random.below(5000) as usize];
            data.splice(at..at, extra);
        }
        _ => {
            if let Some(byte) = data.get_mut(at) {
                *byte = match random.below(4) {
                    0 => 0,
                    1 => 0xff,
                    2 => *byte ^ (1 << random.below(8)),
                    _ => random.next() as u8,
                };
            }
        }
    }
}

/// `cargo test -p farpage-fabric --test wire -- --ignored write_the_corpus` after a change of the format.
#[test]
#[ignore = "writes files"]
fn write_the_corpus() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/wire");
    for (i, data) in seeds().iter().enumerate() {
        std::fs::write(format!("{folder}/seed-{i:02}"), data).unwrap();
    }
}
