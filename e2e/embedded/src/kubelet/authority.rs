//! A connection whose requests carry a socket's path as their authority.
//!
//! kubelet connects to a registration socket by its path, and its gRPC library then sends that
//! path, percent-encoded, as the `:authority` of each request (gRPC for Go, `encodeAuthority`).
//! That is no authority in the sense of RFC 3986, and servers that insist on one refuse it. The
//! HTTP/2 library used here would not send it, so the value is put in on the wire.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

/// The bytes that a client sends before its first frame (RFC 9113, 3.4).
const PREFACE_BYTES: usize = 24;
const FRAME_HEADER_BYTES: usize = 9;
/// The frame type with a request's header.
const HEADERS: u8 = 0x1;
/// The field `:authority: localhost` as the HTTP/2 library writes it the first time: name 1 of
/// the static table, to be entered into the dynamic one, six bytes in Huffman's code (RFC 7541,
/// 6.2.1 and appendix B). Later requests refer to that entry.
const LOCALHOST: [u8; 8] = [0x41, 0x86, 0xa0, 0xe4, 0x1d, 0x13, 0x9d, 0x09];

/// A connection that replaces the authority in what a client writes.
pub(super) struct OtherAuthority {
    stream: UnixStream,
    /// The field that replaces [`LOCALHOST`].
    field: Vec<u8>,
    after_preface: bool,
    /// The beginning of a frame whose end has not been written yet.
    held: Vec<u8>,
    /// The bytes that the socket has not taken yet.
    out: Vec<u8>,
}

impl OtherAuthority {
    pub(super) fn new(stream: UnixStream, authority: &[u8]) -> Self {
        let mut field = vec![LOCALHOST[0]];
        put_length(&mut field, authority.len());
        field.extend(authority);
        Self {
            stream,
            field,
            after_preface: false,
            held: Vec::new(),
            out: Vec::new(),
        }
    }

    /// Moves whole frames from the held bytes to the outgoing ones.
    fn pass_frames(&mut self) {
        if !self.after_preface && self.held.len() >= PREFACE_BYTES {
            self.out.extend(self.held.drain(..PREFACE_BYTES));
            self.after_preface = true;
        }
        while self.after_preface && self.held.len() >= FRAME_HEADER_BYTES {
            let length = usize::from(self.held[0]) << 16
                | usize::from(self.held[1]) << 8
                | usize::from(self.held[2]);
            if self.held.len() < FRAME_HEADER_BYTES + length {
                return;
            }
            let frame: Vec<u8> = self.held.drain(..FRAME_HEADER_BYTES + length).collect();
            let (header, payload) = frame.split_at(FRAME_HEADER_BYTES);
            let found = payload
                .windows(LOCALHOST.len())
                .position(|w| w == LOCALHOST);
            match found {
                Some(at) if header[3] == HEADERS => {
                    let length = payload.len() - LOCALHOST.len() + self.field.len();
                    // Three bytes, of which a request's header fills two at most.
                    self.out
                        .extend(&length.to_be_bytes()[size_of::<usize>() - 3..]);
                    self.out.extend(&header[3..]);
                    self.out.extend(&payload[..at]);
                    self.out.extend(&self.field);
                    self.out.extend(&payload[at + LOCALHOST.len()..]);
                }
                _ => self.out.extend(frame),
            }
        }
    }

    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.out))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.out.drain(..written);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for OtherAuthority {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, to)
    }
}

impl AsyncWrite for OtherAuthority {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_out(cx))?;
        self.held.extend(bytes);
        self.pass_frames();
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_out(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_out(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Encodes a path as an authority: characters that are neither unreserved, sub-delimiters nor one of
/// `:[]@` become `%XX`.
pub(super) fn of_path(path: &Path) -> Vec<u8> {
    let mut encoded = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~!$&'()*+,;=:[]@".contains(&byte) {
            encoded.push(byte);
        } else {
            encoded.extend(format!("%{byte:02X}").bytes());
        }
    }
    encoded
}

/// Encodes the length of a string that is not Huffman-coded (RFC 7541, 5.1 and 5.2).
fn put_length(to: &mut Vec<u8>, mut length: usize) {
    const LARGEST: u8 = 0x7f;
    if let Some(small) = u8::try_from(length).ok().filter(|small| *small < LARGEST) {
        to.push(small);
        return;
    }
    to.push(LARGEST);
    length -= usize::from(LARGEST);
    loop {
        // Masked to seven bits.
        let low = u8::try_from(length & 0x7f).unwrap_or_default();
        length >>= 7;
        if length == 0 {
            to.push(low);
            return;
        }
        to.push(low | 0x80);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proto::registration::InfoRequest;
    use proto::registration::registration_client::RegistrationClient;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixListener;

    use super::super::csi;
    use super::*;

    /// A path that is so long that its length takes more than one byte.
    #[tokio::test]
    async fn a_request_carries_the_sockets_path() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("a-reg.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let known_as = Path::new("/var/lib/kubelet/plugins_registry").join("a".repeat(200));
        let named = known_as.clone();
        let limit = Duration::from_secs(10);
        let channel = csi::connect_through(&socket, limit, move |stream| {
            OtherAuthority::new(stream, &of_path(&named))
        });
        let channel = channel.await.unwrap();
        let call = tokio::spawn(async move {
            let mut client = RegistrationClient::new(channel);
            client.get_info(InfoRequest {}).await
        });
        let (mut stream, _) = listener.accept().await.unwrap();
        let value = format!(
            "%2Fvar%2Flib%2Fkubelet%2Fplugins_registry%2F{}",
            "a".repeat(200)
        );
        // 244 is 127 and 117.
        let field = [&[0x41, 0x7f, 117][..], value.as_bytes()].concat();
        assert_eq!(value.len(), 244);
        let mut seen = Vec::new();
        while !seen.windows(field.len()).any(|window| window == field) {
            let read = tokio::time::timeout(limit, stream.read_buf(&mut seen)).await;
            assert_ne!(read.unwrap().unwrap(), 0, "{seen:?}");
        }
        call.abort();
    }
}
