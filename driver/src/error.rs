//! The error of a CSI call.
//!
//! An [`Error`] has a sentence for the person who reads `kubectl describe pod`, a gRPC code for
//! kubelet, and an `error_type` label for dashboards. Errors never contain the content of a secret, a
//! token or a Secret. They may quote names, paths, annotations and a provider's message, each of
//! bounded length.
//!
//! After CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE, RESOURCE_EXHAUSTED and ABORTED the volume may be
//! mounted: kubelet keeps the directory and calls again, or unpublishes when the pod goes. Every other
//! code is final for that attempt: kubelet removes the directory (`isFinalError` in kubelet's
//! `csi_client.go`). In both cases kubelet tries again with a backoff.

use std::{fmt, sync::Arc, time::Duration};

use tonic::Code;

/// The reason why a call failed. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Error {
    code: Code,
    reason: Reason,
    message: Arc<str>,
    retry_after: Option<Duration>,
}

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The `error_type` label of `node_publish_error_total`. The first five are upstream's values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// Any failure without a value of its own.
    FailedToMount,
    /// The SecretProviderClass could not be read.
    SecretProviderClassNotFound,
    /// The target path could not be examined or made.
    FailedToEnsureMountPoint,
    /// The call to the provider failed.
    GrpcProviderError,
    /// The provider's files could not be written.
    FileWriteError,
    /// The provider has no socket, or its name cannot be one.
    FailedToLookupProviderGrpcClient,
    /// The provider's own error code.
    Provider(String),
}

impl Reason {
    /// Returns the value of the label.
    pub fn label(&self) -> &str {
        match self {
            Self::FailedToMount => "FailedToMount",
            Self::SecretProviderClassNotFound => "SecretProviderClassNotFound",
            Self::FailedToEnsureMountPoint => "FailedToEnsureMountPoint",
            Self::GrpcProviderError => "GRPCProviderError",
            Self::FileWriteError => "FileWriteError",
            Self::FailedToLookupProviderGrpcClient => "FailedToLookupProviderGRPCClient",
            Self::Provider(code) => code,
        }
    }
}

impl Error {
    /// Creates an error with the label `FailedToMount`; see [`Error::with_reason`].
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            reason: Reason::FailedToMount,
            message: message.into().into(),
            retry_after: None,
        }
    }

    /// Creates an INVALID_ARGUMENT error: the request is wrong, and repeating it cannot help.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// Creates a FAILED_PRECONDITION error: the call needs a change of the system by a person.
    pub fn precondition(message: impl Into<String>) -> Self {
        Self::new(Code::FailedPrecondition, message)
    }

    /// Creates an INTERNAL error: something such as a file or a mount did not work.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }

    /// Creates an UNAVAILABLE error: a peer is away, and trying again helps.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Code::Unavailable, message)
    }

    /// Creates an ABORTED error: another call works on the volume.
    pub fn aborted(message: impl Into<String>) -> Self {
        Self::new(Code::Aborted, message)
    }

    /// Sets the metric label.
    #[must_use]
    pub fn with_reason(mut self, reason: Reason) -> Self {
        self.reason = reason;
        self
    }

    /// Sets the wait that the peer asked for before the next attempt.
    #[must_use]
    pub fn with_retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Puts words before the message, such as the step and the pod.
    #[must_use]
    pub fn context(mut self, words: impl fmt::Display) -> Self {
        self.message = format!("{words}: {}", self.message).into();
        self
    }

    /// Turns a final code into UNAVAILABLE, for a volume that kubelet must not forget.
    #[must_use]
    pub fn not_final(mut self) -> Self {
        if self.is_final() {
            self.code = Code::Unavailable;
        }
        self
    }

    /// Returns whether the code is final: kubelet ends the attempt and removes the volume's directory.
    pub fn is_final(&self) -> bool {
        !matches!(
            self.code,
            Code::Cancelled
                | Code::DeadlineExceeded
                | Code::Unavailable
                | Code::ResourceExhausted
                | Code::Aborted
        )
    }

    /// Returns the gRPC code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// Returns the wait that the peer asked for before the next attempt, if it did.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// Returns the metric label.
    pub fn reason(&self) -> &Reason {
        &self.reason
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn not_final_changes_only_codes_that_kubelet_takes_as_final() {
        for code in (0..=16).map(Code::from_i32) {
            let error = Error::new(code, "x");
            let kept = error.clone().not_final();
            assert!(!kept.is_final(), "{code:?}");
            if !error.is_final() {
                assert_eq!(kept.code(), code);
            }
        }
    }
}
