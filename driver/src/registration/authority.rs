//! Replaces the authority of requests, which kubelet sets to a socket's path.
//!
//! kubelet connects to a registration socket by its path, and its gRPC library then sends that
//! path, percent-encoded, as the `:authority` of each request (gRPC for Go, `encodeAuthority`).
//! That is no authority in the sense of RFC 3986, and the HTTP/2 library used here resets such a
//! request. Nothing depends on the value, so it is replaced between the socket and the HTTP/2 library.
//!
//! This needs only the length of a header field, and not its Huffman coding. The field is found by
//! its index in HPACK's static table, which every encoder uses for it. The dynamic tables of the two
//! sides stay compatible: the new entry is never longer than the one that was sent, so that no entry
//! leaves this side's table too early.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::{Connected, UdsConnectInfo};

/// The length of what a client sends before its first frame (RFC 9113, 3.4).
const PREFACE_BYTES: usize = 24;
const FRAME_HEADER_BYTES: usize = 9;
/// The frame type with a request's header, and the flags that put something around the block.
const HEADERS: u8 = 0x1;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
const PRIORITY_BYTES: usize = 5;
/// The largest frame that this side accepts, by the protocol's default.
const LARGEST_FRAME: usize = 16 * 1024;
/// `:authority` in the static table (RFC 7541, appendix A).
const AUTHORITY_INDEX: usize = 1;
/// The new value: a string without Huffman coding, after its length.
const LOCALHOST: &[u8] = b"\x09localhost";
const READ_BYTES: usize = 4 * 1024;

/// A connection that replaces the authority of every request.
pub(super) struct AnyAuthority {
    stream: UnixStream,
    rewriter: Rewriter,
    /// The rewritten bytes that have not been read yet.
    ready: Vec<u8>,
}

impl AnyAuthority {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            rewriter: Rewriter::default(),
            ready: Vec::new(),
        }
    }
}

impl AsyncRead for AnyAuthority {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.ready.is_empty() {
            let mut bytes = [0; READ_BYTES];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                // The end of the connection; an incomplete frame is dropped.
                return Poll::Ready(Ok(()));
            }
            this.rewriter.push(read.filled(), &mut this.ready);
        }
        let count = this.ready.len().min(to.remaining());
        to.put_slice(&this.ready[..count]);
        this.ready.drain(..count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for AnyAuthority {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

impl Connected for AnyAuthority {
    type ConnectInfo = UdsConnectInfo;

    fn connect_info(&self) -> UdsConnectInfo {
        self.stream.connect_info()
    }
}

/// Rewrites the bytes of a client, in pieces of any size.
struct Rewriter {
    /// The beginning of a frame whose rest has not arrived.
    pending: Vec<u8>,
    /// The number of the next bytes that are passed on unchanged.
    pass: usize,
}

impl Default for Rewriter {
    fn default() -> Self {
        Self {
            pending: Vec::new(),
            pass: PREFACE_BYTES,
        }
    }
}

impl Rewriter {
    fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        self.pending.extend_from_slice(bytes);
        let mut rest = self.pending.as_slice();
        loop {
            let passed = self.pass.min(rest.len());
            out.extend_from_slice(&rest[..passed]);
            rest = &rest[passed..];
            self.pass -= passed;
            let Some((header, payload)) = rest.split_at_checked(FRAME_HEADER_BYTES) else {
                break;
            };
            let length =
                usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
            // The HTTP/2 library refuses a frame that is too large.
            if header[3] != HEADERS || length > LARGEST_FRAME {
                self.pass = FRAME_HEADER_BYTES + length;
                continue;
            }
            let Some((payload, after)) = payload.split_at_checked(length) else {
                break;
            };
            rewrite_frame(header, payload, out);
            rest = after;
        }
        self.pending = rest.to_vec();
    }
}

/// Writes a HEADERS frame with another authority; as it is if it makes no sense.
fn rewrite_frame(header: &[u8], payload: &[u8], out: &mut Vec<u8>) {
    let Some(value) = authority(header[4], payload) else {
        out.extend_from_slice(header);
        out.extend_from_slice(payload);
        return;
    };
    let length = payload.len() - value.len() + LOCALHOST.len();
    // It became no longer, so its length fits into the three bytes that it came in.
    out.extend(
        length
            .to_be_bytes()
            .into_iter()
            .skip(size_of::<usize>() - 3),
    );
    out.extend_from_slice(&header[3..]);
    out.extend_from_slice(&payload[..value.start]);
    out.extend_from_slice(LOCALHOST);
    out.extend_from_slice(&payload[value.end..]);
}

/// Returns where in a HEADERS frame's payload the authority's value is, if it is as long as ours or
/// longer. A shorter one cannot be a path that matters.
fn authority(flags: u8, payload: &[u8]) -> Option<Range<usize>> {
    let mut at = 0;
    let mut end = payload.len();
    if flags & PADDED != 0 {
        end = end.checked_sub(usize::from(*payload.first()?))?;
        at += 1;
    }
    if flags & PRIORITY != 0 {
        at += PRIORITY_BYTES;
    }
    let block = payload.get(..end)?;
    while at < block.len() {
        let first = block[at];
        // RFC 7541, 6: an indexed field, one that enters the table, a new size of the table, and
        // two kinds that do not enter it.
        let (prefix, is_literal) = match first {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let index;
        (index, at) = integer(block, at, prefix)?;
        if !is_literal {
            continue;
        }
        if index == 0 {
            at = string(block, at)?.end;
        }
        let value = string(block, at)?;
        if index == AUTHORITY_INDEX {
            return (value.len() >= LOCALHOST.len()).then_some(value);
        }
        at = value.end;
    }
    None
}

/// Returns where a string is that has its length in front (RFC 7541, 5.2).
fn string(block: &[u8], at: usize) -> Option<Range<usize>> {
    let (length, start) = integer(block, at, 7)?;
    let end = start.checked_add(length)?;
    (end <= block.len()).then_some(at..end)
}

/// Returns an integer in the low bits of a byte and those after it, and where it ends (RFC 7541, 5.1).
fn integer(block: &[u8], at: usize, prefix: u32) -> Option<(usize, usize)> {
    let mask = (1_usize << prefix) - 1;
    let mut value = usize::from(*block.get(at)?) & mask;
    let mut at = at + 1;
    if value < mask {
        return Some((value, at));
    }
    // Three more bytes say more than a frame can hold.
    for shift in [0, 7, 14] {
        let byte = usize::from(*block.get(at)?);
        at += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((value, at));
        }
    }
    None
}

/// Rewrites bytes as those of a client, at once and in pieces.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let mut whole = Vec::new();
    Rewriter::default().push(bytes, &mut whole);
    assert!(whole.len() <= bytes.len());
    for size in [1, 7, 100] {
        let mut pieces = Vec::new();
        let mut rewriter = Rewriter::default();
        for piece in bytes.chunks(size) {
            rewriter.push(piece, &mut pieces);
            assert!(rewriter.pending.len() <= FRAME_HEADER_BYTES + LARGEST_FRAME);
        }
        assert_eq!(pieces, whole);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0, 0, u8::try_from(payload.len()).unwrap(), kind, flags];
        frame.extend([0, 0, 0, 1]);
        frame.extend(payload);
        frame
    }

    /// `:method POST`, a literal `:path`, and the authority in one of its forms.
    fn block(authority: &[u8]) -> Vec<u8> {
        [&[0x83, 0x44, 0x02, b'/', b'x'][..], authority, &[0x86]].concat()
    }

    fn through(chunk: usize, bytes: &[u8]) -> Vec<u8> {
        let (mut rewriter, mut out) = (Rewriter::default(), Vec::new());
        for part in bytes.chunks(chunk) {
            rewriter.push(part, &mut out);
        }
        out
    }

    #[rstest]
    #[case::enters_the_table(&[0x41])]
    #[case::does_not(&[0x01])]
    #[case::never(&[0x11])]
    fn a_path_becomes_localhost_however_the_bytes_arrive(#[case] form: &[u8]) {
        let path = b"%2Fvar%2Flib%2Freg.sock";
        let sent = [form, &[u8::try_from(path.len()).unwrap()], path].concat();
        let wanted = [form, LOCALHOST].concat();
        let ping = frame(6, 0, &[0; 8]);
        let before = [PREFACE, &ping, &frame(HEADERS, 4, &block(&sent)), &ping].concat();
        let after = [PREFACE, &ping, &frame(HEADERS, 4, &block(&wanted)), &ping].concat();
        for chunk in [1, 7, before.len()] {
            assert_eq!(through(chunk, &before), after, "{chunk} bytes at a time");
        }
    }

    #[test]
    fn padding_and_priority_stay_where_they_are() {
        let around = |authority: &[u8]| {
            let payload = [&[2, 0, 0, 0, 0, 16][..], &block(authority), &[0, 0]].concat();
            [PREFACE, &frame(HEADERS, PADDED | PRIORITY, &payload)].concat()
        };
        let sent = around(b"\x41\x11%2Frun%2Freg.sock");
        assert_eq!(through(1000, &sent), around(&[&[0x41], LOCALHOST].concat()));
    }

    #[rstest]
    #[case::acceptable(&block(&[0x41, 0x04, b'h', b'o', b's', b't']))]
    #[case::from_the_table(&block(&[0xbe]))]
    #[case::cut_off(&[0x83, 0x41, 0x7f])]
    #[case::endless_integer(&[0x41, 0xff, 0xff, 0xff, 0xff, 0xff])]
    #[case::empty(&[])]
    fn anything_else_stays_as_it_is(#[case] block: &[u8]) {
        let bytes = [PREFACE, &frame(HEADERS, 4, block)].concat();
        assert_eq!(through(3, &bytes), bytes);
    }
}
