//! Interprets the failure of a call to a provider: whether and when to try again, and what to tell
//! the owner of the pod.

use std::{path::Path, time::Duration};

use prost::Message as _;
use tonic::{Code, Status};
use tonic_types::pb::{self, RetryInfo};

use super::{
    Limits,
    peer::stranger,
    queue::Ending,
    wire::{LONGEST_HEADERS, TooLarge, Unusable},
};
use crate::error::{Error, Reason};

/// The longest wait that a provider can ask for. A longer one is shortened to this.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// The number of bytes of a provider's message that an error quotes. With the words around it, they
/// fit into an event, whose message may have 1024 bytes.
const LONGEST_MESSAGE: usize = 700;

/// The trailer that tells gRPC clients when to try again
/// ([gRFC A6](https://github.com/grpc/proposal/blob/master/A6-client-retries.md)).
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// The type of the status detail that tells the same (`google/rpc/error_details.proto`). The details are
/// in the trailer `grpc-status-details-bin`.
const RETRY_INFO: &str = "google.rpc.RetryInfo";

/// Returns the time after which the provider wants to be asked again, if it tells one.
pub(super) fn retry_after(status: &Status) -> Option<Duration> {
    let pushback = status
        .metadata()
        .get(PUSHBACK)
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .map(Duration::from_millis);
    let details = pb::Status::decode(status.details()).unwrap_or_default();
    let told = details
        .details
        .iter()
        .filter(|detail| detail.type_url.rsplit('/').next() == Some(RETRY_INFO))
        .find_map(|detail| RetryInfo::decode(detail.value.as_slice()).ok()?.retry_delay)
        .and_then(|delay| Duration::try_from(delay).ok());
    let longest = pushback.max(told)?;
    Some(longest.min(LONGEST_RETRY_AFTER))
}

/// Returns whether trying again at once may help: the provider is unavailable, or its connection
/// broke. A connection that breaks during a call shows as CANCELLED or UNKNOWN with a transport
/// error as its source.
pub(super) fn is_transient(status: &Status) -> bool {
    if stranger(status).is_some() {
        return false;
    }
    let is_broken = connection_failure(status).is_some_and(|why| !is_too_long(&why));
    status.code() == Code::Unavailable || is_broken
}

/// The thing that a call lacked at its deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TooLate {
    /// An answer.
    Answer,
    /// Memory for its answer.
    Memory,
}

impl std::fmt::Display for TooLate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Answer => "no answer",
            Self::Memory => "no memory for the answer",
        })
    }
}

impl std::error::Error for TooLate {}

/// Returns the status of a call that did not end before its deadline.
pub(super) fn too_late(lacked: TooLate) -> Status {
    let mut status = Status::deadline_exceeded(lacked.to_string());
    status.set_source(std::sync::Arc::new(lacked));
    status
}

/// Returns how a failed call ended, for the standing of its class.
pub(super) fn ending(status: &Status) -> Ending {
    if let Some(lacked) = found_here::<TooLate>(status) {
        match lacked {
            TooLate::Answer => Ending::Silent,
            TooLate::Memory => Ending::Answered,
        }
    } else if connection_failure(status).is_some_and(|why| !is_too_long(&why)) {
        Ending::Lost
    } else {
        Ending::Refused
    }
}

/// Returns whether a character changes how a terminal shows others: a control character, or one that
/// ends a line or changes the direction of a text.
fn is_control(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Returns a text on one line. Control characters become spaces, because it is shown in terminals.
pub(super) fn on_one_line(words: &str) -> String {
    words.replace(is_control, " ")
}

/// Returns the beginning of a provider's message, on one line, and its length if it was cut.
pub(super) fn clipped(words: &str) -> String {
    let words = on_one_line(words);
    match words
        .char_indices()
        .find(|(at, c)| at + c.len_utf8() > LONGEST_MESSAGE)
    {
        None => words,
        Some((end, _)) => format!("{}… ({} bytes in all)", &words[..end], words.len()),
    }
}

/// A call that failed.
pub(super) struct FailedCall<'a> {
    pub(super) provider: &'a str,
    pub(super) socket: &'a Path,
    pub(super) attempts: usize,
    pub(super) limits: Limits,
    /// Whether the call had service account tokens.
    pub(super) with_tokens: bool,
}

impl FailedCall<'_> {
    /// Turns a provider's status into an error. The error quotes the provider's own message: the
    /// owner of the pod needs it, and providers know what they may tell.
    pub(super) fn explain(&self, status: &Status) -> Error {
        let at = format!("provider {:?} at {}", self.provider, self.socket.display());
        let times = if self.attempts > 1 {
            format!(" after {} attempts", self.attempts)
        } else {
            String::new()
        };
        let (code, what) = if let Some(too_large) = found_here::<TooLarge>(status) {
            let what = format!("answered with {too_large}; split the SecretProviderClass");
            (Code::ResourceExhausted, what)
        } else if let Some(unusable) = found_here::<Unusable>(status) {
            let what = format!("sent an answer that cannot be used: {unusable}");
            (Code::Internal, what)
        } else if found_here(status) == Some(&TooLate::Memory) {
            let what = format!(
                "began to answer, but until the deadline there was no memory for the answer: other answers of this provider held it ({} bytes, of which one namespace may hold half). If this happens often, raise the driver's memory limit, of which answers get at most a sixth, or --provider-max-bytes (chart value providerMaxBytes)",
                self.limits.max_bytes
            );
            (Code::ResourceExhausted, what)
        } else if is_over_the_limit(status) {
            let what = format!(
                "answered with more than {} bytes; raise --max-call-recv-msg-size of the driver (chart value maxCallRecvMsgSize), or split the SecretProviderClass",
                self.limits.max_message_bytes
            );
            (Code::ResourceExhausted, what)
        } else if let Some(stranger) = stranger(status) {
            (Code::FailedPrecondition, stranger.to_string())
        } else if let Some(why) = connection_failure(status) {
            if is_too_long(&why) {
                let what = format!(
                    "answered with an error that is larger than {LONGEST_HEADERS} bytes, so its text is lost; see the provider's log"
                );
                (Code::ResourceExhausted, what)
            } else if is_perhaps_too_long(&why) {
                let what = format!(
                    "sent an answer that cannot be read{times} ({why}); an error that is larger than {LONGEST_HEADERS} bytes has this effect. See the provider's log"
                );
                (Code::Unavailable, what)
            } else {
                let what = format!(
                    "does not answer{times} ({why}); is the provider running on this node?"
                );
                (Code::Unavailable, what)
            }
        } else if status.code() == Code::DeadlineExceeded {
            let what = format!("did not answer in time{times}; is its store slow or unreachable?");
            (Code::DeadlineExceeded, what)
        } else {
            let what = format!(
                "answered {}{times}: {}{}",
                code_name(status.code()),
                clipped(status.message()),
                token_hint(status.message(), self.with_tokens),
            );
            (status.code(), what)
        };
        let error = Error::new(code, format!("{at} {what}")).with_reason(Reason::GrpcProviderError);
        match retry_after(status) {
            Some(wait) => error.with_retry_after(wait),
            None => error,
        }
    }
}

/// Returns what to add to a provider's message if it seems to miss a service account token and none
/// was sent.
pub(super) fn token_hint(words: &str, with_tokens: bool) -> &'static str {
    let words = words.to_ascii_lowercase();
    let about_tokens = ["token", "audience"]
        .iter()
        .any(|word| words.contains(word));
    if with_tokens || !about_tokens {
        return "";
    }
    ". No service account token was sent, because the CSIDriver asks for none; if this provider needs one, name its audience in spec.tokenRequests of the CSIDriver (chart value tokenRequests)"
}

/// Returns a status for a log line.
pub(super) fn in_short(status: &Status) -> String {
    if let Some(stranger) = stranger(status) {
        return stranger.to_string();
    }
    connection_failure(status).unwrap_or_else(|| {
        format!(
            "{}: {}",
            code_name(status.code()),
            clipped(status.message())
        )
    })
}

/// Returns the cause of a status that tonic made of a broken connection, or `None` for a status
/// that a provider sent.
fn connection_failure(status: &Status) -> Option<String> {
    if found_here::<TooLarge>(status).is_some()
        || found_here::<Unusable>(status).is_some()
        || found_here::<TooLate>(status).is_some()
    {
        return None;
    }
    let mut source = std::error::Error::source(status)?;
    while let Some(deeper) = source.source() {
        source = deeper;
    }
    Some(source.to_string())
}

/// Returns whether the client closed the connection because the provider's headers or trailers,
/// which hold an error, were too large.
fn is_too_long(why: &str) -> bool {
    ["too_many_continuations", "header_list_way_too_large"]
        .iter()
        .any(|reason| why.contains(reason))
}

/// Returns whether the client reset the stream for what may be the same reason: h2 leaves out
/// headers that are too large, and an answer without them is invalid.
fn is_perhaps_too_long(why: &str) -> bool {
    why.contains("stream error detected: unspecific protocol error")
}

/// Returns the source of a status that the driver made itself.
fn found_here<E: std::error::Error + 'static>(status: &Status) -> Option<&E> {
    std::error::Error::source(status)?.downcast_ref()
}

/// Returns whether tonic refused a message because of its length, which it does with OUT_OF_RANGE
/// before it decodes the message.
fn is_over_the_limit(status: &Status) -> bool {
    status.code() == Code::OutOfRange
        && status
            .message()
            .contains("decoded message length too large")
}

/// Returns a code as the gRPC specification spells it.
pub(super) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use tonic::metadata::MetadataMap;

    fn throttled(details: &pb::Status, pushback: Option<&str>) -> Status {
        let mut metadata = MetadataMap::new();
        if let Some(pushback) = pushback {
            metadata.insert(PUSHBACK, pushback.parse().unwrap());
        }
        Status::with_details_and_metadata(
            Code::ResourceExhausted,
            "throttled",
            details.encode_to_vec().into(),
            metadata,
        )
    }

    fn told(type_url: &str, seconds: i64, nanos: i32) -> pb::Status {
        let retry_delay = Some(prost_types::Duration { seconds, nanos });
        pb::Status {
            details: vec![prost_types::Any {
                type_url: type_url.to_owned(),
                value: RetryInfo { retry_delay }.encode_to_vec(),
            }],
            ..pb::Status::default()
        }
    }

    const TYPE: &str = "type.googleapis.com/google.rpc.RetryInfo";

    #[rstest]
    #[case::nothing(pb::Status::default(), None, None)]
    #[case::retry_info(told(TYPE, 7, 500_000_000), None, Some(7500))]
    #[case::another_detail(told("type.googleapis.com/google.rpc.ErrorInfo", 7, 0), None, None)]
    #[case::pushback(pb::Status::default(), Some("1500"), Some(1500))]
    #[case::do_not_retry(pb::Status::default(), Some("-1"), None)]
    #[case::the_longer_one(told(TYPE, 2, 0), Some("1500"), Some(2000))]
    #[case::in_the_past(told(TYPE, -2, 0), None, None)]
    #[case::for_ever(told(TYPE, i64::MAX, 0), None, Some(3_600_000))]
    fn a_provider_says_when_to_ask_again(
        #[case] details: pb::Status,
        #[case] pushback: Option<&str>,
        #[case] milliseconds: Option<u64>,
    ) {
        let status = throttled(&details, pushback);
        let expected = milliseconds.map(Duration::from_millis);
        assert_eq!(retry_after(&status), expected);
        let failed = FailedCall {
            provider: "vault",
            socket: Path::new("/p/vault.sock"),
            attempts: 1,
            limits: Limits {
                max_calls: 1,
                max_bytes: 1,
                max_message_bytes: 1,
            },
            with_tokens: false,
        };
        let error = failed.explain(&status);
        assert_eq!(error.retry_after(), expected);
        assert_eq!(error.code(), Code::ResourceExhausted);
    }

    proptest::proptest! {
        #[test]
        fn words_are_told_on_one_line_and_cut(words in "\\PC{0,900}|[\\x00-\\x7f]{0,900}|(a\n|\x1b\\[31m|é|\u{202e}|\u{2028}){0,300}") {
            let told = clipped(&words);
            proptest::prop_assert!(!told.contains(is_control), "{told:?}");
            proptest::prop_assert!(told.len() <= LONGEST_MESSAGE + 40, "{}", told.len());
            let shared = words.chars().zip(told.chars()).take(LONGEST_MESSAGE / 4);
            for (word, told) in shared {
                proptest::prop_assert!(word == told || is_control(word) && told == ' ');
            }
        }
    }

    #[test]
    fn details_that_are_no_protobuf_say_nothing() {
        let garbage = vec![0xff; 9].into();
        let status = Status::with_details(Code::ResourceExhausted, "throttled", garbage);
        assert_eq!(retry_after(&status), None);
    }

    #[rstest]
    #[case("csi.storage.k8s.io/serviceAccount.tokens is not set", false, true)]
    #[case("No token for audience vault", false, true)]
    #[case("no token for audience vault", true, false)]
    #[case("no such secret", false, false)]
    fn a_missing_token_is_explained(
        #[case] words: &str,
        #[case] with_tokens: bool,
        #[case] hinted: bool,
    ) {
        let hint = token_hint(words, with_tokens);
        assert_eq!(hint.contains("spec.tokenRequests"), hinted, "{hint}");
    }
}
