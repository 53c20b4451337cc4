//! The one error type.
//!
//! An [`Error`] carries three things and each has one reader: a sentence for the person who
//! reads `kubectl describe pod`, a gRPC code for kubelet, and an `error_type` label for the
//! dashboard. Errors never embed their input, so none can carry a secret.
//!
//! kubelet takes CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE, RESOURCE_EXHAUSTED and ABORTED for
//! "perhaps mounted": it keeps the directory and calls again, or unpublishes when the pod goes.
//! Every other code is final for that attempt: kubelet removes what it made and starts afresh
//! (`isFinalError` in kubelet's `csi_client.go`). Either way kubelet tries again with a backoff.

use std::{fmt, sync::Arc, time::Duration};

use tonic::Code;

/// Why a call failed. Cheap to clone.
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
    /// Whatever has no value of its own.
    FailedToMount,
    /// The SecretProviderClass could not be read.
    SecretProviderClassNotFound,
    /// The target path could not be examined or made.
    FailedToEnsureMountPoint,
    /// The call to the provider failed.
    GrpcProviderError,
    /// The provider's files could not be written.
    FileWriteError,
    /// No socket of that provider, or a name that cannot be one.
    FailedToLookupProviderGrpcClient,
    /// The provider's own error code.
    Provider(String),
}

impl Reason {
    /// The label's value.
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
    /// An error with the label `FailedToMount`; see [`Error::with_reason`].
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            reason: Reason::FailedToMount,
            message: message.into().into(),
            retry_after: None,
        }
    }

    /// The request itself is wrong; repeating it cannot help.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// The system is not in the state that the call needs; somebody has to change something.
    pub fn precondition(message: impl Into<String>) -> Self {
        Self::new(Code::FailedPrecondition, message)
    }

    /// Something that should work did not: a file, a mount.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }

    /// Somebody we depend on is away; trying again helps.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Code::Unavailable, message)
    }

    /// The same volume is being worked on.
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

    /// Puts words before the message: the step, the pod.
    #[must_use]
    pub fn context(mut self, words: impl fmt::Display) -> Self {
        self.message = format!("{words}: {}", self.message).into();
        self
    }

    /// Makes a code that kubelet takes as final into one that it does not, for a volume whose
    /// content is in use and must not be cleaned away.
    #[must_use]
    pub fn not_final(mut self) -> Self {
        if self.is_final() {
            self.code = Code::Unavailable;
        }
        self
    }

    /// Whether kubelet takes the attempt for over and removes the volume's directory.
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

    /// The gRPC code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// Returns the wait that the peer asked for before the next attempt, if it did.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// The metric label.
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
