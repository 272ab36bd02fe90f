//! The deadline of a call, as its client states it in `grpc-timeout`.
//!
//! The gRPC library ends a call at that moment, too, but with `CANCELLED`; the specification of gRPC's status
//! codes wants `DEADLINE_EXCEEDED`. This layer lies inside of the library's: its timer is set first and is polled
//! first, so its answer is the one that is sent.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, Request, Response};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

/// Ends calls at their client's deadline.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeadlineLayer;

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Deadline { inner }
    }
}

/// See [`DeadlineLayer`].
#[derive(Debug, Clone)]
pub(crate) struct Deadline<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for Deadline<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let limit = client_limit(request.headers());
        let call = self.inner.call(request);
        let Some(limit) = limit else { return Box::pin(call) };
        let call = tokio::time::timeout(limit, call);
        Box::pin(async move {
            call.await.unwrap_or_else(|_| {
                let message = format!("the client's limit of {limit:?} passed before the call had ended");
                Ok(Status::deadline_exceeded(message).into_http())
            })
        })
    }
}

/// `grpc-timeout`: up to 8 digits and a unit (PROTOCOL-HTTP2 of gRPC). One that cannot be read is none.
fn client_limit(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use tower::ServiceExt;

    use super::*;

    fn limit(text: &str) -> Option<Duration> {
        client_limit(&[("grpc-timeout".parse().unwrap(), text.parse().unwrap())].into_iter().collect())
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_was_given_too_little_time_ends_with_the_right_code() {
        let never = tower::service_fn(|_: Request<Body>| std::future::pending::<Result<_, Infallible>>());
        let request = |limit: &str| {
            Request::builder().header("grpc-timeout", limit).body(Body::empty()).expect("a request")
        };
        let response = DeadlineLayer.layer(never).oneshot(request("200m")).await.unwrap();
        let status = Status::from_header_map(response.headers()).expect("a status");
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
        assert!(status.message().contains("200ms"), "{status:?}");

        let quick =
            tower::service_fn(|_: Request<Body>| async { Ok::<_, Infallible>(Response::new(Body::empty())) });
        let response = DeadlineLayer.layer(quick).oneshot(request("200m")).await.unwrap();
        assert!(Status::from_header_map(response.headers()).is_none());
    }

    #[test]
    fn limits_are_read_as_grpc_writes_them() {
        assert_eq!(limit("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(limit("250m"), Some(Duration::from_millis(250)));
        assert_eq!(limit("7u"), Some(Duration::from_micros(7)));
        for text in ["", "m", "1", "1h", "123456789S", "-1S", "+1S"] {
            assert_eq!(limit(text), None, "{text:?}");
        }
    }
}
