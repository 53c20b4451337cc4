//! Bounds the HTTP/2 frames of a provider that carry no answer (RFC 9113 §4.1).
//!
//! Each of them is cheap to send and takes the driver's only network thread a moment, so that an endless
//! sequence, even of a few calls at once, would keep all others waiting. A call has a connection of its
//! own, and needs few: settings, the window for a small request, pings, a head and a trailer.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The most frames other than DATA on a connection. A trailer of 4 MiB takes 256, and a ping for each
/// piece of an answer that a provider sends far fewer.
const MOST: u32 = 2_000;

/// The length of a frame's head, and the type of a frame with a part of an answer.
const HEAD: usize = 9;
const DATA: u8 = 0;

/// A connection on which a provider may send only so many frames without a part of an answer.
pub(super) struct Bounded<S> {
    stream: S,
    frames: Frames,
}

/// What has been read of a connection.
#[derive(Debug, Default)]
struct Frames {
    /// The part of a head that has come.
    head: [u8; HEAD],
    has: usize,
    /// The bytes that are left of the payload behind it.
    payload: usize,
    others: u32,
}

impl<S> Bounded<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            frames: Frames::default(),
        }
    }
}

impl Frames {
    /// Counts the frames that begin in these bytes.
    ///
    /// # Errors
    /// When there are too many that are no part of an answer.
    fn see(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let skipped = self.payload.min(bytes.len());
            self.payload -= skipped;
            bytes = bytes.get(skipped..).unwrap_or_default();
            for byte in bytes.iter().take(HEAD - self.has) {
                if let Some(place) = self.head.get_mut(self.has) {
                    *place = *byte;
                }
                self.has += 1;
                bytes = bytes.get(1..).unwrap_or_default();
            }
            if self.has < HEAD {
                return Ok(());
            }
            let [a, b, c, kind, ..] = self.head;
            self.payload = u32::from_be_bytes([0, a, b, c]) as usize;
            self.has = 0;
            self.others += u32::from(kind != DATA);
            if self.others > MOST {
                return Err(io::Error::other(format!(
                    "it sent more than {MOST} HTTP/2 frames without a part of its answer"
                )));
            }
        }
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let came = buffer.filled().get(before..).unwrap_or_default();
        Poll::Ready(self.frames.see(came))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).unwrap().to_be_bytes();
        let mut frame = length[1..].to_vec();
        frame.extend([kind, 0, 0, 0, 0, 1]);
        frame.resize(HEAD + payload, kind);
        frame
    }

    proptest! {
        #[test]
        fn frames_are_counted_however_they_are_cut(
            sent in proptest::collection::vec((0_u8..10, 0_usize..300), 0..40),
            cuts in proptest::collection::vec(1_usize..200, 1..40),
        ) {
            let bytes: Vec<u8> = sent.iter().flat_map(|(kind, payload)| frame(*kind, *payload)).collect();
            let (mut frames, mut rest) = (Frames::default(), bytes.as_slice());
            for cut in cuts.iter().cycle() {
                let (piece, behind) = rest.split_at((*cut).min(rest.len()));
                frames.see(piece).unwrap();
                rest = behind;
                if rest.is_empty() {
                    break;
                }
            }
            let others = sent.iter().filter(|(kind, _)| *kind != DATA).count();
            prop_assert_eq!(frames.others as usize, others);
            prop_assert_eq!((frames.has, frames.payload), (0, 0));
        }
    }

    #[test]
    fn only_frames_without_a_part_of_an_answer_are_bounded() {
        let mut frames = Frames::default();
        frames.see(&frame(DATA, 3).repeat(10_000)).unwrap();
        frames.see(&frame(6, 8).repeat(MOST as usize)).unwrap();
        frames.see(&frame(DATA, 3)).unwrap();
        let error = frames.see(&frame(1, 0)).unwrap_err();
        assert!(error.to_string().contains("2000 HTTP/2 frames"), "{error}");
    }
}
