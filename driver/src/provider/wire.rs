//! Sends one call to a provider, on a connection of its own.
//!
//! A provider that sends an endless header, or a frame that makes no sense, can only end the call on
//! that connection, and the next call finds a provider that was replaced. A connection to a unix
//! socket costs a fraction of a millisecond.

mod count;
mod frames;
mod metered;

use std::{
    fmt, io, mem,
    path::Path,
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::Duration,
};

use base64::{
    Engine as _,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::{HeaderMap, Uri, uri::PathAndQuery};
use hyper::body::Frame;
use hyper_util::rt::TokioIo;
use prost::{
    Message as _,
    bytes::{Buf as _, Bytes},
};
use proto::provider::{MountRequest, MountResponse};
use tonic::{
    Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::{Channel, Endpoint},
};
use tower::{service_fn, util::MapResponse};

use super::{
    line::ClassName,
    memory::{AnswerMemory, Reserved},
    peer::{self, Trusted},
};
use crate::error::{Error, Result};
pub(super) use count::TooLarge;
use count::count;
use frames::Bounded;
use metered::{Meter, Metered};

/// The time for a connection. A unix socket accepts at once, or has a full backlog.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The largest header and trailer that is read, in bytes after decoding. The trailer holds a
/// provider's message, encoded in up to three times its length, and possibly twice.
pub(super) const LONGEST_HEADERS: u32 = 4 * 1024 * 1024;

/// The number of bytes of an answer that arrive before there is memory for it.
const WINDOW: u32 = 128 * 1024;

/// The trailer with the details of a status, in base64.
const DETAILS: &str = "grpc-status-details-bin";

const MOUNT: &str = "/v1alpha1.CSIDriverProvider/Mount";

/// The class for which a provider is asked, and the limits of the answer.
pub(super) struct Asking<'a> {
    pub(super) class: &'a ClassName,
    pub(super) memory: &'a Arc<AnswerMemory>,
    pub(super) max_message_bytes: usize,
    /// Whether an answer has begun to arrive and waits for memory.
    pub(super) waits_for_memory: &'a Arc<AtomicBool>,
}

/// Returns a channel for one call, which connects to a socket when the call is sent, if a trusted user
/// listens there.
///
/// # Errors
/// Fails if the path cannot be an address.
pub(super) fn channel(socket: &Path, trusted: &Trusted) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()));
    let endpoint = endpoint.map_err(|error| {
        Error::internal(format!(
            "the provider socket {} is not a valid address: {error}",
            socket.display()
        ))
    })?;
    let (socket, trusted) = (socket.to_owned(), trusted.clone());
    let connector = service_fn(move |_: Uri| {
        let (socket, trusted) = (socket.clone(), trusted.clone());
        async move {
            let stream = peer::connect(&socket, &trusted).await?;
            Ok::<_, io::Error>(TokioIo::new(Bounded::new(stream)))
        }
    });
    Ok(endpoint
        // Upstream's client sends this authority (`WithAuthority` in
        // `pkg/secrets-store/provider_client.go`). Providers may refuse any other, as upstream's
        // test provider does.
        .origin(Uri::from_static("http://localhost"))
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_max_header_list_size(LONGEST_HEADERS)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .connect_with_connector_lazy(connector))
}

/// Calls `Mount`. Returns the answer with the memory that it takes.
///
/// # Errors
/// Returns the provider's status, or a status of the driver whose source says what happened: a
/// [`TooLarge`] for an answer that is too large, or the error of a broken connection.
pub(super) async fn mount(
    channel: Channel,
    request: Request<MountRequest>,
    asking: Asking<'_>,
) -> Result<(MountResponse, Reserved), Status> {
    let meter = Arc::new(Meter {
        class: asking.class.clone(),
        memory: Arc::clone(asking.memory),
        max_message_bytes: asking.max_message_bytes,
        waits: Arc::clone(asking.waits_for_memory),
        reserved: Mutex::default(),
    });
    let metered = {
        let meter = Arc::clone(&meter);
        MapResponse::new(channel, move |mut response: http::Response<_>| {
            drop_garbled_details(response.headers_mut());
            response.map(|body| Metered::new(body, meter))
        })
    };
    let mut client = Grpc::new(metered).max_decoding_message_size(asking.max_message_bytes);
    client.ready().await.map_err(|error| {
        let mut status = Status::unavailable("the connection is not ready");
        status.set_source(Arc::new(error));
        status
    })?;
    let path = PathAndQuery::from_static(MOUNT);
    let answer = client.unary(request, path, MountCodec::default()).await?;
    let (answer, takes) = answer.into_inner();
    let reserved = meter
        .take_reserved()
        .ok_or_else(|| unusable("its size was not counted"))?;
    reserved.shrink_to(takes);
    Ok((answer, reserved))
}

/// Makes a frame readable for tonic.
fn readable(mut frame: Frame<Bytes>) -> Frame<Bytes> {
    if let Some(trailers) = frame.trailers_mut() {
        drop_garbled_details(trailers);
    }
    frame
}

/// Removes the details of a status if they are not base64, because tonic panics on them.
fn drop_garbled_details(headers: &mut HeaderMap) {
    let lenient =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let engine = GeneralPurpose::new(&base64::alphabet::STANDARD, lenient);
    if headers
        .get(DETAILS)
        .is_some_and(|details| engine.decode(details).is_err())
    {
        headers.remove(DETAILS);
    }
}

/// The reason why the driver cannot use an answer.
#[derive(Debug)]
pub(super) struct Unusable(&'static str);

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Unusable {}

/// Returns a status whose source is an [`Unusable`].
fn unusable(why: &'static str) -> Status {
    let mut status = Status::internal(format!("its answer cannot be used: {why}"));
    status.set_source(Arc::new(Unusable(why)));
    status
}

/// Encodes requests and decodes answers, which are counted before they are decoded.
#[derive(Default)]
struct MountCodec {
    answered: bool,
}

impl Codec for MountCodec {
    type Encode = MountRequest;
    type Decode = (MountResponse, usize);
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self::default()
    }

    fn decoder(&mut self) -> Self {
        Self::default()
    }
}

impl Encoder for MountCodec {
    type Item = MountRequest;
    type Error = Status;

    fn encode(&mut self, request: MountRequest, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let encoded = request.encode(to);
        encoded.map_err(|error| Status::internal(format!("the request: {error}")))
    }
}

impl Decoder for MountCodec {
    type Item = (MountResponse, usize);
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Self::Item>, Status> {
        if mem::replace(&mut self.answered, true) {
            return Err(unusable("it is the second answer to one call"));
        }
        decoded(from.copy_to_bytes(from.remaining())).map(Some)
    }
}

/// Decodes an answer. Returns it with the memory that it takes.
fn decoded(message: Bytes) -> Result<(MountResponse, usize), Status> {
    let garbled = || unusable("it is not a MountResponse");
    let takes = count(&message).ok_or_else(garbled)?.bytes()?;
    let answer = MountResponse::decode(message).map_err(|_| garbled())?;
    Ok((answer, takes))
}

/// Decodes bytes as an answer.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz_answer(bytes: &[u8]) -> Result<MountResponse, Status> {
    let message = Bytes::copy_from_slice(bytes);
    let answer = decoded(message);
    if let Ok((_, takes)) = &answer {
        assert!(
            *takes <= count::needed(bytes.len()),
            "the answer takes {takes} bytes"
        );
    }
    answer.map(|(answer, _)| answer)
}

/// Reads the headers of an answer: lines of a name, a colon and a value.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz_status(bytes: &[u8]) -> Option<Status> {
    let mut headers = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = http::HeaderName::from_bytes(&line[..colon]).ok()?;
        let value = http::HeaderValue::from_bytes(&line[colon + 1..]).ok()?;
        headers.append(name, value);
    }
    drop_garbled_details(&mut headers);
    Status::from_header_map(&headers)
}
