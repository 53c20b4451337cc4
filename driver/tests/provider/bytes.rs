//! Checks attacks by bytes on a provider's socket. Each of them ends one call with a sentence, and a
//! call at the same time is answered.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{LONG, Node, refused};

/// Encodes a frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH: u8 = 5;
const PING: u8 = 6;
const GO_AWAY: u8 = 7;
const WINDOW: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

/// Encodes a header field that enters no table.
fn field(name: &str, value: &[u8]) -> Vec<u8> {
    let length = |length: usize| match u8::try_from(length) {
        Ok(short @ ..127) => vec![short],
        _ => {
            let mut rest = length - 127;
            let mut bytes = vec![127];
            while rest >= 128 {
                bytes.push((rest % 128 + 128) as u8);
                rest /= 128;
            }
            bytes.push(rest as u8);
            bytes
        }
    };
    [
        vec![0],
        length(name.len()),
        name.as_bytes().to_vec(),
        length(value.len()),
        value.to_vec(),
    ]
    .concat()
}

/// Encodes the headers of an answer: `:status 200` and the content type.
fn answer_begins() -> Vec<u8> {
    let block = [vec![0x88], field("content-type", b"application/grpc")].concat();
    frame(HEADERS, END_HEADERS, 1, &block)
}

/// Encodes trailers that end the stream.
fn trailers(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let block: Vec<u8> = fields
        .iter()
        .flat_map(|(name, value)| field(name, value))
        .collect();
    frame(HEADERS, END_HEADERS | END_STREAM, 1, &block)
}

/// Encodes an answer with one object: the prefix, and protobuf.
fn message() -> Vec<u8> {
    frame(DATA, 0, 1, &[0, 0, 0, 0, 5, 0x0a, 0x03, 0x0a, 0x01, b'x'])
}

/// The name of an attack, the bytes that are sent first, and bytes that are sent repeatedly after
/// them.
type Attack = (&'static str, Vec<u8>, Option<Vec<u8>>);

/// Returns the attacks of a hostile provider, which it sends after its SETTINGS. Repeated bytes are
/// sent for as long as the driver reads them.
fn attacks() -> Vec<Attack> {
    let begun = |rest: Vec<u8>| [answer_begins(), rest].concat();
    let endless_head = frame(
        HEADERS,
        0,
        1,
        &[vec![0x88], field("a", &[b'a'; 1000])].concat(),
    );
    vec![
        ("nothing and an end", vec![], None),
        (
            "another protocol",
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            None,
        ),
        (
            "GOAWAY before the answer",
            frame(GO_AWAY, 0, 0, &[0; 8]),
            None,
        ),
        (
            "GOAWAY within the answer",
            begun(frame(GO_AWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 11])),
            None,
        ),
        (
            "RST_STREAM within the answer",
            begun([message(), frame(RESET, 0, 1, &[0, 0, 0, 2])].concat()),
            None,
        ),
        (
            "a reset of the wrong size",
            begun(frame(RESET, 0, 1, &[0, 0])),
            None,
        ),
        (
            "a frame that is too large",
            begun(vec![0xff, 0xff, 0xff, DATA, 0, 0, 0, 0, 1]),
            None,
        ),
        ("settings on a stream", frame(SETTINGS, 0, 1, &[]), None),
        (
            "settings of the wrong size",
            frame(SETTINGS, 0, 0, &[0; 5]),
            None,
        ),
        (
            "a window that overflows",
            begun(frame(WINDOW, 0, 0, &[0x7f, 0xff, 0xff, 0xff]).repeat(3)),
            None,
        ),
        (
            "a push",
            begun(frame(PUSH, END_HEADERS, 1, &[0, 0, 0, 2, 0x88])),
            None,
        ),
        (
            "a head that ends nowhere",
            endless_head,
            Some(frame(CONTINUATION, 0, 1, &field("b", &[b'b'; 16_000]))),
        ),
        (
            "a head of empty pieces",
            frame(HEADERS, 0, 1, &[0x88]),
            Some(frame(CONTINUATION, 0, 1, &[]).repeat(100)),
        ),
        (
            "a head that is no HPACK",
            frame(HEADERS, END_HEADERS, 1, &[0xff; 40]),
            None,
        ),
        (
            "a status that is none",
            frame(
                HEADERS,
                END_HEADERS | END_STREAM,
                1,
                &field(":status", b"abc"),
            ),
            None,
        ),
        (
            "an HTTP error",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x8d]),
            None,
        ),
        (
            "trailers without a status",
            begun([message(), trailers(&[("a", b"b")])].concat()),
            None,
        ),
        (
            "a status of letters",
            begun([message(), trailers(&[("grpc-status", b"many")])].concat()),
            None,
        ),
        (
            "a message that is no text",
            begun(trailers(&[
                ("grpc-status", b"7"),
                ("grpc-message", b"%ff%fe%zz%"),
            ])),
            None,
        ),
        (
            "details that are no base64",
            begun(trailers(&[
                ("grpc-status", b"7"),
                ("grpc-status-details-bin", b"!!!"),
            ])),
            None,
        ),
        (
            "an answer of four gigabytes",
            begun(frame(DATA, 0, 1, &[0, 0xff, 0xff, 0xff, 0xff, 1])),
            None,
        ),
        (
            "an answer that is compressed",
            begun(frame(DATA, 0, 1, &[1, 0, 0, 0, 1, 1])),
            None,
        ),
        (
            "an answer that is no protobuf",
            begun(
                [
                    frame(DATA, 0, 1, &[0, 0, 0, 0, 3, 0xff, 0xff, 0xff]),
                    trailers(&[("grpc-status", b"0")]),
                ]
                .concat(),
            ),
            None,
        ),
        (
            "half a prefix",
            begun(
                [
                    frame(DATA, 0, 1, &[0, 0]),
                    trailers(&[("grpc-status", b"0")]),
                ]
                .concat(),
            ),
            None,
        ),
        ("no answer", begun(trailers(&[("grpc-status", b"0")])), None),
        (
            "two answers",
            begun([message(), message(), trailers(&[("grpc-status", b"0")])].concat()),
            None,
        ),
        (
            "pings",
            begun(vec![]),
            Some(frame(PING, 0, 0, &[7; 8]).repeat(100)),
        ),
        (
            "window updates",
            begun(vec![]),
            Some(frame(WINDOW, 0, 0, &1_u32.to_be_bytes()).repeat(100)),
        ),
        (
            "heads of information",
            vec![],
            Some(frame(HEADERS, END_HEADERS, 1, b"\x08\x03100").repeat(100)),
        ),
        (
            "settings",
            begun(vec![]),
            Some(frame(SETTINGS, 0, 0, &[]).repeat(100)),
        ),
        (
            "frames of no known type",
            begun(vec![]),
            Some(frame(0x77, 0, 1, &[1; 20]).repeat(100)),
        ),
        (
            "empty data for ever",
            begun(vec![]),
            Some(frame(DATA, 0, 1, &[]).repeat(100)),
        ),
    ]
}

/// Answers one connection with the attack, or well if the call asks for it.
async fn raw(mut stream: UnixStream, attack: (Vec<u8>, Option<Vec<u8>>)) -> std::io::Result<()> {
    let mut came = Vec::new();
    let wishes = |came: &[u8], wish: &[u8]| came.windows(wish.len()).any(|part| part == wish);
    while !wishes(&came, b"WELL") && !wishes(&came, b"ATTACK") {
        if stream.read_buf(&mut came).await? == 0 {
            return Ok(());
        }
    }
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
    stream.write_all(&frame(SETTINGS, ACK, 0, &[])).await?;
    if wishes(&came, b"WELL") {
        sleep(Duration::from_secs(1)).await;
        let whole = [
            answer_begins(),
            message(),
            trailers(&[("grpc-status", b"0")]),
        ]
        .concat();
        stream.write_all(&whole).await?;
        sleep(LONG).await;
        return Ok(());
    }
    stream.write_all(&attack.0).await?;
    while let Some(more) = &attack.1 {
        stream.write_all(more).await?;
        // Reads the answers to pings, so that the driver can go on writing.
        came.clear();
        let _ = timeout(Duration::ZERO, stream.read_buf(&mut came)).await;
        tokio::task::yield_now().await;
    }
    sleep(Duration::from_millis(100)).await;
    Ok(())
}

#[tokio::test]
async fn whatever_a_provider_sends_ends_one_call_with_a_sentence() {
    let mut tried = JoinSet::new();
    for (name, first, forever) in attacks() {
        let is_endless = forever.is_some();
        tried.spawn(async move {
            let node = Node::new(16);
            let listener = UnixListener::bind(node.socket("last")).unwrap();
            tokio::spawn(async move {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    tokio::spawn(raw(stream, (first.clone(), forever.clone())));
                }
            });
            let deadline = Duration::from_secs(60);
            let since = Instant::now();
            let attack = async {
                let attacked = node.mount("shop/db", "ATTACK", deadline).await;
                (attacked, since.elapsed())
            };
            let ((attacked, took), well) = tokio::join!(attack, node.mount("web/db", "WELL", LONG));
            // An endless attack ends by what was sent, not by the deadline.
            assert!(!is_endless || took < deadline / 2, "{name}: {took:?}");
            assert!(well.is_ok(), "{name}: {}", refused(well));
            let error = refused(attacked);
            assert!(
                error.to_string().contains("provider \"test\""),
                "{name}: {error}"
            );
            assert!(error.to_string().len() < 1000, "{name}: {error}");
            let page = node.metrics.render();
            let left = "secrets_store_provider_calls_in_flight{provider=\"test\"} 0";
            assert!(page.contains(left), "{name}: {page}");
            println!("{name}: {:?} {error}", error.code());
        });
    }
    tried.join_all().await;
}
