//! One call to a provider, on a connection of its own.
//!
//! Whatever a provider sends on a connection (an endless header, a frame that makes no sense)
//! ends the call on that connection and no other, and a provider that was replaced is found by
//! the next call. A connection on a unix socket costs a fraction of a millisecond.
//!
//! The answer is counted before it is decoded: a message of a few bytes can describe a thousand
//! files, each of which takes memory whether it has content or not.

use std::{
    fmt, mem,
    path::Path,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use base64::{
    Engine as _,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::{HeaderMap, Uri, uri::PathAndQuery};
use hyper::body::{Body, Frame};
use prost::{
    Message as _,
    bytes::{Buf as _, Bytes, BytesMut},
    encoding::decode_varint,
};
use proto::provider::{MountRequest, MountResponse};
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::{Channel, Endpoint},
};
use tower::util::MapResponse;

use super::{
    line::Owner,
    memory::{Held, Memory},
};
use crate::error::{Error, Result};

/// A unix socket either accepts at once or has a full backlog.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The largest header and trailer that is read, decoded. A provider's message is in the trailer
/// up to three times as long as it is, and may be there twice.
pub(super) const LONGEST_HEADERS: u32 = 4 * 1024 * 1024;

/// How much of an answer arrives before there is memory for it.
const WINDOW: u32 = 128 * 1024;

/// How many files, and how many object versions, an answer may have.
pub(super) const MOST_FILES: usize = 4096;
pub(super) const MOST_VERSIONS: usize = 4096;

/// How many bytes the ids and versions of an answer's objects may have together: no more fits into
/// the record of a volume.
pub(super) const MOST_VERSION_BYTES: usize = 1 << 20;

/// How often ids and versions are in memory besides the answer, at the most: for the record and the
/// pod status, each as a value and as JSON.
const VERSION_COPIES: usize = 4;

/// What a file takes besides its path and content, and a version besides its strings: the decoded
/// structures, their growth, and those that they become.
const FILE_BYTES: usize = 512;
const VERSION_BYTES: usize = 256;

/// The bytes in front of a gRPC message: a flag and the length.
const PREFIX: usize = 5;

/// The trailer with a status's details, in base64.
const DETAILS: &str = "grpc-status-details-bin";

const MOUNT: &str = "/v1alpha1.CSIDriverProvider/Mount";

/// Who asks, and what the answer may take.
pub(super) struct Asking<'a> {
    pub(super) owner: &'a Owner,
    pub(super) memory: &'a Arc<Memory>,
    pub(super) max_message_bytes: usize,
    /// Whether an answer has begun to arrive and waits for memory.
    pub(super) waits_for_memory: &'a Arc<AtomicBool>,
}

/// A lazy channel to a socket, for one call.
///
/// # Errors
/// When the path cannot be an address.
pub(super) fn channel(socket: &Path) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()));
    let endpoint = endpoint.map_err(|error| {
        Error::internal(format!(
            "the provider socket {} is no address: {error}",
            socket.display()
        ))
    })?;
    Ok(endpoint
        // Upstream's client sends this authority (`WithAuthority` in its
        // `pkg/secrets-store/provider_client.go`), and providers may refuse any other: its own test
        // provider does.
        .origin(Uri::from_static("http://localhost"))
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_max_header_list_size(LONGEST_HEADERS)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .connect_lazy())
}

/// Calls `Mount`. The answer comes with the memory that it takes.
///
/// # Errors
/// The provider's status, or one that was made here: see [`Refused`] for answers that are too
/// large, and the status's source for connections that broke.
pub(super) async fn mount(
    channel: Channel,
    request: Request<MountRequest>,
    asking: Asking<'_>,
) -> Result<(MountResponse, Held), Status> {
    let meter = Arc::new(Meter {
        owner: asking.owner.clone(),
        memory: Arc::clone(asking.memory),
        max_message_bytes: asking.max_message_bytes,
        waits: Arc::clone(asking.waits_for_memory),
        held: Mutex::default(),
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
    let held = meter
        .take_held()
        .ok_or_else(|| Status::internal("an answer that was not counted"))?;
    held.shrink_to(takes);
    Ok((answer, held))
}

/// Why an answer was refused here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It has more files.
    Files(usize),
    /// It has more object versions.
    Versions(usize),
    /// Its object versions have more bytes.
    VersionBytes(usize),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Files(files) => write!(f, "{files} files; a volume may have {MOST_FILES}"),
            Self::Versions(versions) => {
                write!(
                    f,
                    "{versions} object versions; an answer may have {MOST_VERSIONS}"
                )
            }
            Self::VersionBytes(bytes) => {
                write!(
                    f,
                    "{bytes} bytes of object ids and versions; an answer may have {MOST_VERSION_BYTES}"
                )
            }
        }
    }
}

impl std::error::Error for Refused {}

/// The memory that an answer of so many bytes may take while it is read and decoded.
fn needed(bytes: usize) -> usize {
    // The least that a file or a version takes of the message is its tag and its length.
    let items = bytes / 2;
    2 * bytes
        + items.min(MOST_FILES) * FILE_BYTES
        + items.min(MOST_VERSIONS) * VERSION_BYTES
        + bytes.min(MOST_VERSION_BYTES) * VERSION_COPIES
}

struct Meter {
    owner: Owner,
    memory: Arc<Memory>,
    max_message_bytes: usize,
    waits: Arc<AtomicBool>,
    held: Mutex<Option<Held>>,
}

impl Meter {
    fn take_held(&self) -> Option<Held> {
        self.held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

/// A response's body that waits, once the length of the message is known, until there is memory.
struct Metered<B> {
    body: B,
    meter: Arc<Meter>,
    stage: Stage,
}

enum Stage {
    /// What has come of the message, less than its length.
    Length(BytesMut),
    /// What has come, and who waits for memory.
    Memory(Bytes, Pin<Box<dyn Future<Output = Held> + Send>>),
    Open,
}

impl<B> Metered<B> {
    fn new(body: B, meter: Arc<Meter>) -> Self {
        Self {
            body,
            meter,
            stage: Stage::Length(BytesMut::new()),
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
            match &mut this.stage {
                Stage::Open => {
                    let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
                    return Poll::Ready(frame.map(|frame| frame.map(readable)));
                }
                Stage::Memory(came, waiting) => {
                    let held = ready!(waiting.as_mut().poll(cx));
                    this.meter.waits.store(false, Ordering::Relaxed);
                    let came = mem::take(came);
                    let mut place = this
                        .meter
                        .held
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner);
                    *place = Some(held);
                    drop(place);
                    this.stage = Stage::Open;
                    return Poll::Ready(Some(Ok(Frame::data(came))));
                }
                Stage::Length(came) => {
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
                    // One that is too large is refused by who reads on, and takes nothing.
                    let bytes = needed(length.min(this.meter.max_message_bytes));
                    let came = mem::take(came).freeze();
                    this.meter.waits.store(true, Ordering::Relaxed);
                    let meter = Arc::clone(&this.meter);
                    let waiting = async move { meter.memory.take(&meter.owner, bytes).await };
                    this.stage = Stage::Memory(came, Box::pin(waiting));
                }
            }
        }
    }
}

/// A frame that tonic can read.
fn readable(mut frame: Frame<Bytes>) -> Frame<Bytes> {
    if let Some(trailers) = frame.trailers_mut() {
        drop_garbled_details(trailers);
    }
    frame
}

/// Takes a status's details away if they are no base64: tonic panics at them.
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

/// Protobuf, with the answer counted before it is decoded.
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
            return Err(Status::internal("it answered one call twice"));
        }
        let message = from.copy_to_bytes(from.remaining());
        let garbled = || Status::internal("its answer is not a MountResponse");
        let takes = count(&message).ok_or_else(garbled)?.bytes()?;
        let answer = MountResponse::decode(message).map_err(|_| garbled())?;
        Ok(Some((answer, takes)))
    }
}

/// What a message describes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counted {
    files: usize,
    versions: usize,
    /// The length of the versions in the message.
    version_bytes: usize,
    /// The length of both together in the message, which is no less than that of their contents.
    content: usize,
}

impl Counted {
    /// The memory that the decoded message takes.
    fn bytes(&self) -> Result<usize, Status> {
        let refused = if self.files > MOST_FILES {
            Refused::Files(self.files)
        } else if self.versions > MOST_VERSIONS {
            Refused::Versions(self.versions)
        } else if self.version_bytes > MOST_VERSION_BYTES {
            Refused::VersionBytes(self.version_bytes)
        } else {
            return Ok(self.content
                + self.files * FILE_BYTES
                + self.versions * VERSION_BYTES
                + self.version_bytes * VERSION_COPIES);
        };
        let mut status = Status::new(Code::ResourceExhausted, refused.to_string());
        status.set_source(Arc::new(refused));
        Err(status)
    }
}

/// Counts the fields of a `MountResponse` without decoding them. None for what is no message.
fn count(message: &[u8]) -> Option<Counted> {
    let mut counted = Counted::default();
    let mut rest = message;
    while rest.has_remaining() {
        let key = decode_varint(&mut rest).ok()?;
        let skipped = match key & 0x7 {
            0 => {
                decode_varint(&mut rest).ok()?;
                0
            }
            1 => 8,
            2 => usize::try_from(decode_varint(&mut rest).ok()?).ok()?,
            5 => 4,
            // Groups, which this message has none of.
            _ => return None,
        };
        if skipped > rest.remaining() {
            return None;
        }
        rest.advance(skipped);
        match key >> 3 {
            1 => {
                counted.versions += 1;
                counted.version_bytes += skipped;
            }
            3 => counted.files += 1,
            _ => {}
        }
        counted.content += skipped;
    }
    Some(counted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proto::provider::{Error, File, ObjectVersion};

    /// The memory that a decoded answer holds, as the allocator sees it: each piece takes at
    /// least 32 bytes.
    fn held(answer: &MountResponse) -> usize {
        let piece = |bytes: usize| if bytes == 0 { 0 } else { bytes.max(16) + 16 };
        let files: usize = answer
            .files
            .iter()
            .map(|file| piece(file.path.capacity()) + piece(file.contents.capacity()))
            .sum();
        let versions: usize = answer
            .object_version
            .iter()
            .map(|object| piece(object.id.capacity()) + piece(object.version.capacity()))
            .sum();
        files
            + versions
            + piece(answer.files.capacity() * size_of::<File>())
            + piece(answer.object_version.capacity() * size_of::<ObjectVersion>())
    }

    fn answers() -> impl Strategy<Value = MountResponse> {
        let file = (
            ".{0,40}",
            any::<i32>(),
            proptest::collection::vec(any::<u8>(), 0..200),
        )
            .prop_map(|(path, mode, contents)| File {
                path,
                mode,
                contents,
            });
        let version =
            (".{0,40}", ".{0,40}").prop_map(|(id, version)| ObjectVersion { id, version });
        (
            proptest::collection::vec(file, 0..60),
            proptest::collection::vec(version, 0..60),
            0..2000_usize,
            0..2000_usize,
            proptest::option::of(".{0,20}"),
        )
            .prop_map(|(mut files, mut object_version, empty, unnamed, code)| {
                files.resize(files.len() + empty, File::default());
                object_version.resize(object_version.len() + unnamed, ObjectVersion::default());
                let error = code.map(|code| Error { code });
                MountResponse {
                    object_version,
                    error,
                    files,
                }
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever shape an answer has, what is counted is no less than what it takes, and what
        /// was asked for before it was read covers that and the message itself.
        #[test]
        fn what_is_counted_covers_what_an_answer_takes(answer in answers()) {
            let message = answer.encode_to_vec();
            let counted = count(&message).unwrap();
            prop_assert_eq!(counted.files, answer.files.len());
            prop_assert_eq!(counted.versions, answer.object_version.len());
            let takes = counted.bytes().unwrap();
            let decoded = MountResponse::decode(message.as_slice()).unwrap();
            let copied = |object: &ObjectVersion| 4 * (object.id.len() + object.version.len());
            let held = held(&decoded) + decoded.object_version.iter().map(copied).sum::<usize>();
            prop_assert!(takes >= held, "{takes} for {held}");
            prop_assert!(needed(message.len()) >= takes + message.len());
        }

        /// Bytes that are no message are never decoded into more than was counted.
        #[test]
        fn garbage_is_counted_or_refused(garbage in proptest::collection::vec(any::<u8>(), 0..300)) {
            let counted = count(&garbage);
            if let Ok(decoded) = MountResponse::decode(garbage.as_slice()) {
                prop_assert!(counted.unwrap().bytes().unwrap() >= held(&decoded));
            }
        }
    }

    #[test]
    fn too_many_are_refused_before_they_are_decoded() {
        let most = MOST_FILES + 1;
        let status = count(&[0x1a, 0].repeat(most)).unwrap().bytes().unwrap_err();
        let source = std::error::Error::source(&status).unwrap();
        assert_eq!(source.downcast_ref(), Some(&Refused::Files(most)));
        assert!(count(&[0x1a, 0].repeat(most - 1)).unwrap().bytes().is_ok());
        assert!(count(&[0x0a, 0].repeat(most)).unwrap().bytes().is_err());
        // All the memory that a largest answer can ask for, whatever is in it.
        assert!(needed(4 << 20) <= 16 << 20);
        for (bytes, id_bytes) in [
            (MOST_VERSION_BYTES, 0),
            (0, MOST_VERSION_BYTES),
            (1 << 19, 1 << 19),
        ] {
            let version = |more: usize| ObjectVersion {
                id: "i".repeat(id_bytes),
                version: "v".repeat(bytes + more),
            };
            let message = |object_version| MountResponse {
                object_version,
                ..MountResponse::default()
            };
            let status = count(&message(vec![version(1)]).encode_to_vec())
                .unwrap()
                .bytes();
            let status = status.unwrap_err();
            let source = std::error::Error::source(&status).unwrap().downcast_ref();
            assert!(
                matches!(source, Some(Refused::VersionBytes(_))),
                "{source:?}"
            );
            let half = ObjectVersion {
                id: "i".repeat(id_bytes / 3),
                version: "v".repeat(bytes / 3),
            };
            let fits = count(&message(vec![half.clone(), half]).encode_to_vec()).unwrap();
            assert!(fits.bytes().unwrap() > MOST_VERSION_BYTES * 10 / 3);
        }
    }
}
