//! Makes kubelet's calls readable for an HTTP/2 server that checks `:authority`.
//!
//! kubelet dials a registration socket by its path and lets that path stand as `:authority`, with
//! its slashes as `%2F` (`dial` in `pkg/kubelet/pluginmanager/operationexecutor`; its CSI calls
//! say `localhost`). That is no valid authority, and the server of this crate's stack answers
//! such a request with `RST_STREAM PROTOCOL_ERROR` before any of our code sees it. So the bytes
//! are read on their way in, and the value is replaced by `localhost`.
//!
//! It is a narrow thing: frames (RFC 9113, section 4) are passed on as they are but for HEADERS,
//! and of those only the value of a literal field whose name is entry 1 of the static table
//! (RFC 7541, section 6.2 and appendix A). No value is decoded. A request that refers to the
//! field by its index in the dynamic table finds what the first one put there: our value.

use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;

/// What stands in for a path, length first: seven bits of length, not Huffman-coded.
const LOCALHOST: &[u8] = b"\x09localhost";
/// The client's first bytes: RFC 9113, section 3.4.
const PREFACE: usize = 24;
const FRAME_HEADER: usize = 9;
const HEADERS: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// A frame may not be larger unless the server says so, and ours does not.
const MAX_FRAME: usize = 16 * 1024;
/// `:authority` in the static table.
const AUTHORITY: usize = 1;

/// The same connection, as a server can read it.
pub(super) fn mended(connection: UnixStream) -> DuplexStream {
    let (server_end, our_end) = tokio::io::duplex(MAX_FRAME);
    let (from_kubelet, mut to_kubelet) = connection.into_split();
    let (mut from_server, to_server) = tokio::io::split(our_end);
    // Each ends with the connection: when kubelet or the server closes it.
    tokio::spawn(pass_on(from_kubelet, to_server));
    tokio::spawn(async move {
        let _closed = tokio::io::copy(&mut from_server, &mut to_kubelet).await;
        let _gone = to_kubelet.shutdown().await;
    });
    server_end
}

/// Until one side closes, or sends what is not HTTP/2; the server then sees the end.
async fn pass_on(
    mut from: OwnedReadHalf,
    mut to: tokio::io::WriteHalf<DuplexStream>,
) -> io::Result<()> {
    let mut frame = vec![0; PREFACE];
    from.read_exact(&mut frame).await?;
    to.write_all(&frame).await?;
    loop {
        frame.resize(FRAME_HEADER, 0);
        from.read_exact(&mut frame).await?;
        let length =
            usize::from(frame[0]) << 16 | usize::from(frame[1]) << 8 | usize::from(frame[2]);
        if length > MAX_FRAME {
            to.shutdown().await?;
            return Err(io::Error::other("a frame larger than allowed"));
        }
        frame.resize(FRAME_HEADER + length, 0);
        from.read_exact(&mut frame[FRAME_HEADER..]).await?;
        match mend(&frame) {
            Some(mended) => to.write_all(&mended).await?,
            None => to.write_all(&frame).await?,
        }
    }
}

/// The frame with another authority; none when it has no literal one, or is not understood.
fn mend(frame: &[u8]) -> Option<Vec<u8>> {
    let (kind, flags) = (frame[3], frame[4]);
    // A block that continues in further frames is larger than any of kubelet's.
    if kind != HEADERS || flags & END_HEADERS == 0 || flags & PADDED != 0 {
        return None;
    }
    let fields = FRAME_HEADER + if flags & PRIORITY == 0 { 0 } else { 5 };
    let value = authority(frame.get(fields..)?)?;
    let mut mended = frame[..fields + value.start].to_vec();
    mended.extend_from_slice(LOCALHOST);
    mended.extend_from_slice(&frame[fields + value.end..]);
    let length = u32::try_from(mended.len() - FRAME_HEADER).ok()?;
    mended[..3].copy_from_slice(&length.to_be_bytes()[1..]);
    Some(mended)
}

/// Where in a block of fields the value of `:authority` stands, with its length.
fn authority(block: &[u8]) -> Option<std::ops::Range<usize>> {
    let mut at = 0;
    while let Some(first) = block.get(at) {
        // Section 6: indexed, literal with indexing, size update, literal without.
        let (prefix, literal) = match first {
            0x80.. => (7, false),
            0x40..0x80 => (6, true),
            0x20..0x40 => (5, false),
            ..0x20 => (4, true),
        };
        let (name, after) = integer(block, at, prefix)?;
        at = after;
        if !literal {
            continue;
        }
        if name == 0 {
            at = after_text(block, at)?;
        }
        let end = after_text(block, at)?;
        if name == AUTHORITY {
            return Some(at..end);
        }
        at = end;
    }
    None
}

/// An integer whose first `prefix` bits stand in the byte at a position, and what comes after.
fn integer(block: &[u8], at: usize, prefix: u32) -> Option<(usize, usize)> {
    let full = (1_usize << prefix) - 1;
    let mut value = usize::from(*block.get(at)?) & full;
    let mut next = at + 1;
    if value < full {
        return Some((value, next));
    }
    for shift in [0, 7, 14] {
        let byte = usize::from(*block.get(next)?);
        next += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((value, next));
        }
    }
    None
}

/// What comes after a text with its length before it.
fn after_text(block: &[u8], at: usize) -> Option<usize> {
    let (length, start) = integer(block, at, 7)?;
    let end = start + length;
    (end <= block.len()).then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registration::Registrar;
    use std::time::Duration;
    use tokio_util::sync::CancellationToken;

    /// The path of a registration socket as grpc-go writes it, with its length.
    const PATH: &[u8] = b"\x23%2Fvar%2Flib%2Fkubelet%2Fd-reg.sock";

    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).unwrap();
        let mut frame = vec![0, 0, length, kind, flags, 0, 0, 0, stream];
        frame.extend_from_slice(payload);
        frame
    }

    /// POST, http, the path of `GetInfo`, then this field, and what gRPC demands.
    fn get_info(authority: &[u8]) -> Vec<u8> {
        let mut block = vec![0x83, 0x86];
        let path = b"/pluginregistration.Registration/GetInfo";
        block.extend_from_slice(&[0x44, u8::try_from(path.len()).unwrap()]);
        block.extend_from_slice(path);
        block.extend_from_slice(authority);
        block.extend_from_slice(b"\x5f\x10application/grpc");
        block.extend_from_slice(b"\x40\x02te\x08trailers");
        block
    }

    fn literal() -> Vec<u8> {
        [&[0x41], PATH].concat()
    }

    #[test]
    fn only_the_authority_changes() {
        let sent = frame(HEADERS, END_HEADERS, 1, &get_info(&literal()));
        let mended = mend(&sent).unwrap();
        let wanted = get_info(b"\x41\x09localhost");
        assert_eq!(mended, frame(HEADERS, END_HEADERS, 1, &wanted));
        // With a priority before the fields.
        let weight = [0, 0, 0, 0, 1];
        let sent = [&weight, &get_info(&literal())[..]].concat();
        let mended = mend(&frame(HEADERS, END_HEADERS | PRIORITY, 1, &sent)).unwrap();
        assert_eq!(mended[FRAME_HEADER..], [&weight, &wanted[..]].concat());
        // A name in full, and one of many bytes, stand before it.
        let before = [b"\x00\x01a\x01b\x0f\x2f\x01c".as_slice(), &literal()].concat();
        assert_eq!(authority(&before), Some(10..before.len()));
    }

    #[test]
    fn what_is_not_understood_is_passed_on() {
        let block = get_info(&literal());
        assert_eq!(mend(&frame(HEADERS, 0, 1, &block)), None);
        assert_eq!(mend(&frame(0, END_HEADERS, 1, &block)), None);
        assert_eq!(
            mend(&frame(HEADERS, END_HEADERS, 1, &get_info(&[0xbe]))),
            None
        );
        for length in 0..block.len() {
            // Cut anywhere: no panic.
            let _ = mend(&frame(HEADERS, END_HEADERS, 1, &block[..length]));
        }
        assert_eq!(integer(&[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff], 0, 7), None);
    }

    /// kubelet's two calls on one connection, byte by byte: the second names the authority by
    /// its index alone.
    #[tokio::test]
    async fn kubelets_bytes_are_answered() {
        let dir = tempfile::tempdir().unwrap();
        let stop = CancellationToken::new();
        let registrar = Registrar {
            dir: dir.path().to_owned(),
            driver_name: "driver.example".into(),
            endpoint: "/csi.sock".into(),
        };
        let running = tokio::spawn(registrar.run(stop.clone()));
        let socket = dir.path().join("driver.example-reg.sock");
        let mut kubelet = loop {
            match UnixStream::connect(&socket).await {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        sent.extend(frame(4, 0, 0, &[]));
        // After the first request and the second path it is entry 65 of the table.
        for (stream, authority) in [(1, literal()), (3, vec![0xc1])] {
            sent.extend(frame(HEADERS, END_HEADERS, stream, &get_info(&authority)));
            // An empty message, and the end of the stream.
            sent.extend(frame(0, 1, stream, &[0; 5]));
        }
        kubelet.write_all(&sent).await.unwrap();
        let mut answer = Vec::new();
        let names = |answer: &[u8]| {
            let name = b"driver.example";
            answer
                .windows(name.len())
                .filter(|found| found == name)
                .count()
        };
        let answered = async {
            while names(&answer) < 2 {
                assert_ne!(
                    kubelet.read_buf(&mut answer).await.unwrap(),
                    0,
                    "{answer:?}"
                );
            }
        };
        tokio::time::timeout(Duration::from_secs(5), answered)
            .await
            .expect("two answers");
        stop.cancel();
        running.await.unwrap();
    }
}
