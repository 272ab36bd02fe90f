//! Every failure of a call and the one table that turns it into a gRPC status.

use a3s_box_image::{ErrorKind as ImageErrorKind, ImageError};
use a3s_box_runtime::{ErrorKind as RuntimeErrorKind, RuntimeError};
use a3s_box_streaming::TokenError;
use thiserror::Error;
use tonic::{Code, Status};

use crate::convert::InvalidRequest;

/// Statuses travel in HTTP/2 headers, which clients bound. A guest's last words can be long.
const MAX_MESSAGE: usize = 8 * 1024;

/// Why a call failed.
#[derive(Debug, Error)]
pub enum CriError {
    /// The request cannot be served as it is.
    #[error("invalid request: {0}")]
    Invalid(#[from] InvalidRequest),
    /// The runtime failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The image store failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image of a volume is of no use.
    #[error("{field}: {source}")]
    VolumeImage {
        /// Which of the request's fields names it.
        field: String,
        /// Why not.
        #[source]
        source: ImageError,
    },
    /// The space used by a folder could not be measured.
    #[error("measuring {path} failed: {source}; check that the folder exists and is readable")]
    Measure {
        /// The folder.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The object is not in a state in which clients can be connected to it.
    #[error("{object} cannot be streamed to or from: {reason}")]
    NotRunning {
        /// `container ID` or `pod sandbox ID`.
        object: String,
        /// A clause that follows "because".
        reason: &'static str,
    },
    /// No URL for a streaming client.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A call of the interface that this version does not have.
    #[error("{rpc} is not implemented by this version of a3s-box")]
    Unimplemented {
        /// The name of the call.
        rpc: &'static str,
    },
}

impl CriError {
    /// The table. Kubelet acts on NOT_FOUND (gone is gone) and DEADLINE_EXCEEDED (a probe timed out);
    /// the rest is for people.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::Runtime(error) => runtime_code(error.kind),
            Self::Image(error) | Self::VolumeImage { source: error, .. } => image_code(error.kind()),
            Self::Measure { .. } => Code::Internal,
            Self::NotRunning { .. } => Code::FailedPrecondition,
            Self::Token(TokenError::TooMany) => Code::ResourceExhausted,
            Self::Token(TokenError::NoRandom) => Code::Internal,
            Self::Unimplemented { .. } => Code::Unimplemented,
        }
    }
}

fn runtime_code(kind: RuntimeErrorKind) -> Code {
    match kind {
        RuntimeErrorKind::NotFound => Code::NotFound,
        RuntimeErrorKind::AlreadyExists => Code::AlreadyExists,
        RuntimeErrorKind::InvalidArgument => Code::InvalidArgument,
        RuntimeErrorKind::FailedPrecondition => Code::FailedPrecondition,
        RuntimeErrorKind::ResourceExhausted => Code::ResourceExhausted,
        RuntimeErrorKind::DeadlineExceeded => Code::DeadlineExceeded,
        RuntimeErrorKind::Unavailable => Code::Unavailable,
        RuntimeErrorKind::Internal => Code::Internal,
    }
}

fn image_code(kind: ImageErrorKind) -> Code {
    match kind {
        ImageErrorKind::NotFound => Code::NotFound,
        ImageErrorKind::Unauthorized => Code::Unauthenticated,
        ImageErrorKind::InvalidReference => Code::InvalidArgument,
        ImageErrorKind::Corrupt => Code::DataLoss,
        ImageErrorKind::NoSpace => Code::ResourceExhausted,
        ImageErrorKind::Unavailable => Code::Unavailable,
        ImageErrorKind::Timeout => Code::DeadlineExceeded,
        ImageErrorKind::Unsupported => Code::FailedPrecondition,
        ImageErrorKind::Internal => Code::Internal,
    }
}

impl From<CriError> for Status {
    fn from(error: CriError) -> Self {
        Status::new(error.code(), bounded(error.to_string()))
    }
}

/// Keeps both ends: the beginning names the object, the end has the remedy or the guest's last words.
fn bounded(message: String) -> String {
    if message.len() <= MAX_MESSAGE {
        return message;
    }
    let head = message.floor_char_boundary(MAX_MESSAGE / 2);
    let tail = message.ceil_char_boundary(message.len() - MAX_MESSAGE / 2);
    format!("{} […] {}", &message[..head], &message[tail..])
}

/// A missing object is what an idempotent stop or remove wants.
pub(crate) fn gone_is_success<T: Default>(result: Result<T, CriError>) -> Result<T, CriError> {
    match result {
        Err(CriError::Runtime(error)) if error.kind == RuntimeErrorKind::NotFound => Ok(T::default()),
        Err(CriError::Image(error)) if error.kind() == ImageErrorKind::NotFound => Ok(T::default()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use a3s_box_runtime::FailedStage;

    use super::*;

    fn runtime(kind: RuntimeErrorKind) -> CriError {
        RuntimeError::new(kind, FailedStage::Boot, "pod sandbox 0123", "the guest was silent; try again")
            .into()
    }

    #[test]
    fn every_kind_of_runtime_error_has_its_code() {
        for (kind, code) in [
            (RuntimeErrorKind::NotFound, Code::NotFound),
            (RuntimeErrorKind::AlreadyExists, Code::AlreadyExists),
            (RuntimeErrorKind::InvalidArgument, Code::InvalidArgument),
            (RuntimeErrorKind::FailedPrecondition, Code::FailedPrecondition),
            (RuntimeErrorKind::ResourceExhausted, Code::ResourceExhausted),
            (RuntimeErrorKind::DeadlineExceeded, Code::DeadlineExceeded),
            (RuntimeErrorKind::Unavailable, Code::Unavailable),
            (RuntimeErrorKind::Internal, Code::Internal),
        ] {
            let status = Status::from(runtime(kind));
            assert_eq!(status.code(), code);
            assert_eq!(status.message(), "boot of pod sandbox 0123 failed: the guest was silent; try again");
        }
    }

    #[test]
    fn every_kind_of_image_error_has_its_code() {
        for (kind, code) in [
            (ImageErrorKind::NotFound, Code::NotFound),
            (ImageErrorKind::Unauthorized, Code::Unauthenticated),
            (ImageErrorKind::InvalidReference, Code::InvalidArgument),
            (ImageErrorKind::Corrupt, Code::DataLoss),
            (ImageErrorKind::NoSpace, Code::ResourceExhausted),
            (ImageErrorKind::Unavailable, Code::Unavailable),
            (ImageErrorKind::Timeout, Code::DeadlineExceeded),
            (ImageErrorKind::Unsupported, Code::FailedPrecondition),
            (ImageErrorKind::Internal, Code::Internal),
        ] {
            assert_eq!(image_code(kind), code, "{kind:?}");
        }
        let missing = CriError::from(ImageError::NoSuchImage { name: "x".to_owned() });
        assert_eq!(missing.code(), Code::NotFound);
        let field = "config.mounts[3].image".to_owned();
        let source = ImageError::NoSuchImage { name: "model:1".to_owned() };
        let volume = Status::from(CriError::VolumeImage { field, source });
        assert_eq!(volume.code(), Code::NotFound);
        assert!(volume.message().contains("mounts[3].image") && volume.message().contains("model:1"));
    }

    #[test]
    fn our_own_errors_have_their_codes_and_name_the_object() {
        let invalid = Status::from(CriError::from(InvalidRequest::missing("config.metadata")));
        assert_eq!(invalid.code(), Code::InvalidArgument);
        assert_eq!(invalid.message(), "invalid request: config.metadata: is required");
        let unimplemented = Status::from(CriError::Unimplemented { rpc: "Attach" });
        assert_eq!(unimplemented.code(), Code::Unimplemented);
        assert!(unimplemented.message().contains("Attach"));
        let source = std::io::Error::from_raw_os_error(2);
        let measure = Status::from(CriError::Measure { path: "/x".to_owned(), source });
        assert_eq!(measure.code(), Code::Internal);
        assert!(measure.message().contains("/x"));
    }

    #[test]
    fn only_a_missing_object_counts_as_success() {
        assert!(gone_is_success::<()>(Err(runtime(RuntimeErrorKind::NotFound))).is_ok());
        assert!(gone_is_success::<()>(Err(ImageError::NoSuchImage { name: "x".to_owned() }.into())).is_ok());
        assert!(gone_is_success::<()>(Err(runtime(RuntimeErrorKind::Internal))).is_err());
        assert!(gone_is_success::<()>(Err(InvalidRequest::missing("id").into())).is_err());
    }

    #[test]
    fn a_long_message_keeps_its_beginning_and_its_end() {
        let message = bounded(format!("begin{}end", "ü".repeat(MAX_MESSAGE)));
        assert!(message.starts_with("begin") && message.ends_with("end"));
        assert!(message.len() < MAX_MESSAGE + 16);
    }
}
