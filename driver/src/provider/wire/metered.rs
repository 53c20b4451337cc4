//! The body of an answer, which is read on once there is memory for it.

use std::{
    mem,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use hyper::body::{Body, Frame};
use prost::bytes::{Bytes, BytesMut};

use super::{count::needed, readable};
use crate::provider::{
    line::ClassName,
    memory::{AnswerMemory, Reserved},
};

/// The bytes in front of a gRPC message: a flag and the length.
const PREFIX: usize = 5;

/// The memory for one answer.
pub(super) struct Meter {
    pub(super) class: ClassName,
    pub(super) memory: Arc<AnswerMemory>,
    pub(super) max_message_bytes: usize,
    /// Whether the answer waits for memory.
    pub(super) waits: Arc<AtomicBool>,
    pub(super) reserved: Mutex<Option<Reserved>>,
}

impl Meter {
    /// Takes the memory that was reserved, if the answer began to arrive.
    pub(super) fn take_reserved(&self) -> Option<Reserved> {
        self.reserved().take()
    }

    fn reserved(&self) -> MutexGuard<'_, Option<Reserved>> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The body of a response that waits for memory once the length of the message is known.
pub(super) struct Metered<B> {
    body: B,
    meter: Arc<Meter>,
    progress: Phase,
}

enum Phase {
    /// Reads the length of the message. Holds the bytes that have come.
    Length(BytesMut),
    /// Waits for memory. Holds the bytes that have come.
    Memory(Bytes, Pin<Box<dyn Future<Output = Reserved> + Send>>),
    /// Passes the rest on.
    Open,
}

impl<B> Metered<B> {
    pub(super) fn new(body: B, meter: Arc<Meter>) -> Self {
        Self {
            body,
            meter,
            progress: Phase::Length(BytesMut::new()),
        }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Metered<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.get_mut();
        loop {
            match &mut this.progress {
                Phase::Open => {
                    let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
                    return Poll::Ready(frame.map(|frame| frame.map(readable)));
                }
                Phase::Memory(came, waiting) => {
                    let reserved = ready!(waiting.as_mut().poll(cx));
                    this.meter.waits.store(false, Ordering::Relaxed);
                    let came = mem::take(came);
                    *this.meter.reserved() = Some(reserved);
                    this.progress = Phase::Open;
                    return Poll::Ready(Some(Ok(Frame::data(came))));
                }
                Phase::Length(came) => {
                    let frame = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                        Some(Ok(frame)) => frame,
                        end => return Poll::Ready(end),
                    };
                    let data = match frame.into_data() {
                        Ok(data) => data,
                        Err(trailers) => return Poll::Ready(Some(Ok(readable(trailers)))),
                    };
                    came.extend_from_slice(&data);
                    let Some([_, length @ ..]) = came.first_chunk::<PREFIX>() else {
                        continue;
                    };
                    let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
                    // tonic refuses a message that is too large before it reads it.
                    let bytes = needed(length.min(this.meter.max_message_bytes));
                    let came = mem::take(came).freeze();
                    this.meter.waits.store(true, Ordering::Relaxed);
                    let meter = Arc::clone(&this.meter);
                    let waiting = async move { meter.memory.reserve(&meter.class, bytes).await };
                    this.progress = Phase::Memory(came, Box::pin(waiting));
                }
            }
        }
    }
}
