//! Counts what an answer describes, before it is decoded: a message of a few bytes can describe a
//! thousand files, each of which takes memory whether it has content or not.

use std::{fmt, sync::Arc};

use prost::{bytes::Buf as _, encoding::decode_varint};
use tonic::{Code, Status};

/// The most files, and the most object versions, that an answer may have.
const MOST_FILES: usize = 4096;
const MOST_VERSIONS: usize = 4096;

/// The most bytes that the ids and versions of an answer's objects may have together. More would
/// not fit into the record of a volume.
const MOST_VERSION_BYTES: usize = 1 << 20;

/// The number of copies of the ids and versions in memory besides the answer: for the record and
/// the pod status, each as a value and as JSON.
const VERSION_COPIES: usize = 4;

/// The bytes that a file takes besides its path and content, and a version besides its strings: the
/// decoded structures, their growth, and those that they become.
const FILE_BYTES: usize = 512;
const VERSION_BYTES: usize = 256;

/// The reason why the driver refuses an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::provider) enum TooLarge {
    /// It has this many files.
    Files(usize),
    /// It has this many object versions.
    Versions(usize),
    /// Its object ids and versions have this many bytes.
    VersionBytes(usize),
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Files(files) => {
                write!(f, "{files} files; a volume may have at most {MOST_FILES}")
            }
            Self::Versions(versions) => {
                write!(
                    f,
                    "{versions} object versions; an answer may have at most {MOST_VERSIONS}"
                )
            }
            Self::VersionBytes(bytes) => {
                write!(
                    f,
                    "{bytes} bytes of object ids and versions; an answer may have at most {MOST_VERSION_BYTES}"
                )
            }
        }
    }
}

impl std::error::Error for TooLarge {}

/// Returns the most memory that an answer of so many bytes takes while it is read and decoded.
pub(super) fn needed(bytes: usize) -> usize {
    // A file or a version takes at least two bytes of the message: its tag and its length.
    let items = bytes / 2;
    2 * bytes
        + items.min(MOST_FILES) * FILE_BYTES
        + items.min(MOST_VERSIONS) * VERSION_BYTES
        + bytes.min(MOST_VERSION_BYTES) * VERSION_COPIES
}

/// The number and the length of what an answer describes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    files: usize,
    versions: usize,
    /// The length of the object versions in the message.
    version_bytes: usize,
    /// The length of all fields in the message, which is no less than that of their contents.
    content: usize,
}

impl Counted {
    /// Returns the memory that the decoded answer takes.
    ///
    /// # Errors
    /// Returns a status whose source is a [`TooLarge`].
    pub(super) fn bytes(&self) -> Result<usize, Status> {
        let too_large = if self.files > MOST_FILES {
            TooLarge::Files(self.files)
        } else if self.versions > MOST_VERSIONS {
            TooLarge::Versions(self.versions)
        } else if self.version_bytes > MOST_VERSION_BYTES {
            TooLarge::VersionBytes(self.version_bytes)
        } else {
            return Ok(self.content
                + self.files * FILE_BYTES
                + self.versions * VERSION_BYTES
                + self.version_bytes * VERSION_COPIES);
        };
        let mut status = Status::new(Code::ResourceExhausted, too_large.to_string());
        status.set_source(Arc::new(too_large));
        Err(status)
    }
}

/// Counts the fields of a `MountResponse` without decoding them. Returns `None` if the bytes are no
/// protobuf message.
pub(super) fn count(message: &[u8]) -> Option<Counted> {
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
            // A group, which this message does not have.
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
    use prost::Message as _;
    use proto::provider::{Error, File, MountResponse, ObjectVersion};

    /// Returns the memory that a decoded answer holds in the allocator, where each piece takes at
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

        /// The count is no less than what an answer takes, and the memory that is reserved before it
        /// is read covers the count and the message itself.
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

        /// Bytes that are no message are never decoded into more than the count.
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
        assert_eq!(source.downcast_ref(), Some(&TooLarge::Files(most)));
        assert!(count(&[0x1a, 0].repeat(most - 1)).unwrap().bytes().is_ok());
        assert!(count(&[0x0a, 0].repeat(most)).unwrap().bytes().is_err());
        // The most memory that a largest answer can need.
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
                matches!(source, Some(TooLarge::VersionBytes(_))),
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
