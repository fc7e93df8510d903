//! The client's request body: how much of it is taken, how long it is waited for, and handing it on unread.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::header::{self, HeaderMap};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::time::Sleep;

use crate::client::chain;
use crate::config::ProxyConfig;

/// How much of a refused body is read and dropped, as a multiple of the limit, so that a client that writes before it
/// reads gets its 413 instead of a reset connection.
const DISCARD_FACTOR: usize = 4;
const DISCARD_TIME: Duration = Duration::from_secs(5);

/// What is wrong with a client's body. Reads as the end of "the request body ...".
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum BodyFault {
    #[error("is larger than {0} bytes")]
    TooLarge(usize),
    #[error("did not arrive within {0} ms")]
    Late(u128),
    #[error("stopped arriving: nothing came for {0} ms")]
    Stalled(u128),
    #[error("could not be read: {0}")]
    Unreadable(String),
}

/// A client's body that is sent on while it arrives. Until a server takes the first of it, it can be offered to another.
#[derive(Clone)]
pub(crate) struct PassedBody {
    source: Arc<Mutex<Source>>,
}

struct Source {
    body: Body,
    /// Of the limit, what has not arrived yet.
    left_bytes: usize,
    limit_bytes: usize,
    timeout: Duration,
    /// Armed only while the client is silent.
    silence: Option<Pin<Box<Sleep>>>,
}

impl PassedBody {
    pub(crate) fn new(body: Body, config: &ProxyConfig) -> Self {
        Self {
            source: Arc::new(Mutex::new(Source {
                body,
                left_bytes: config.body_limit_bytes,
                limit_bytes: config.body_limit_bytes,
                timeout: config.client_body_timeout,
                silence: None,
            })),
        }
    }

    fn source(&self) -> MutexGuard<'_, Source> {
        self.source.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HttpBody for PassedBody {
    type Data = Bytes;
    type Error = BodyFault;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyFault>>> {
        self.source().poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.source().body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.source().body.size_hint()
    }
}

impl Source {
    fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyFault>>> {
        let Poll::Ready(next) = Pin::new(&mut self.body).poll_frame(context) else {
            let timeout = self.timeout;
            let silence = self
                .silence
                .get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
            return silence
                .as_mut()
                .poll(context)
                .map(|()| Some(Err(BodyFault::Stalled(timeout.as_millis()))));
        };
        self.silence = None;
        Poll::Ready(match next {
            None => None,
            Some(Err(error)) => Some(Err(BodyFault::Unreadable(error.to_string()))),
            Some(Ok(frame)) => {
                let arrived = frame.data_ref().map_or(0, Bytes::len);
                match self.left_bytes.checked_sub(arrived) {
                    Some(left) => {
                        self.left_bytes = left;
                        Some(Ok(frame))
                    }
                    None => Some(Err(BodyFault::TooLarge(self.limit_bytes))),
                }
            }
        })
    }
}

/// Reads a whole body.
pub(crate) async fn read_body(
    mut body: Body,
    headers: &HeaderMap,
    config: &ProxyConfig,
) -> Result<Bytes, BodyFault> {
    refuse_declared(&mut body, headers, config).await?;
    let limit = config.body_limit_bytes;
    let whole = Limited::new(&mut body, limit).collect();
    match tokio::time::timeout(config.client_body_timeout, whole).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if chain(error.as_ref()).any(|cause| cause.is::<LengthLimitError>()) => {
            discard(&mut body, headers, limit).await;
            Err(BodyFault::TooLarge(limit))
        }
        Ok(Err(error)) => Err(BodyFault::Unreadable(error.to_string())),
        Err(_elapsed) => Err(BodyFault::Late(config.client_body_timeout.as_millis())),
    }
}

/// Refuses a body that says of itself that it is over the limit.
pub(crate) async fn refuse_declared(
    body: &mut Body,
    headers: &HeaderMap,
    config: &ProxyConfig,
) -> Result<(), BodyFault> {
    let limit = config.body_limit_bytes;
    if body.size_hint().lower() <= limit as u64 {
        return Ok(());
    }
    discard(body, headers, limit).await;
    Err(BodyFault::TooLarge(limit))
}

/// Reads on for a while and keeps nothing. A client that asked before sending (Expect) is not made to send.
async fn discard(body: &mut Body, headers: &HeaderMap, limit: usize) {
    if headers.contains_key(header::EXPECT) {
        return;
    }
    let rest = async {
        let mut left = limit.saturating_mul(DISCARD_FACTOR);
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                break;
            }
        }
    };
    // Either way the client gets its 413; what differs is only how surely it sees it.
    let _in_time = tokio::time::timeout(DISCARD_TIME, rest).await;
}
