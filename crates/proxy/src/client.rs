//! The pooled HTTP client, and its failures sorted by what may be done about them.

use std::error::Error as StdError;
use std::time::Duration;

use axum::body::Body;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::client::legacy::{self, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioTimer};

use crate::client_body::BodyFault;
use crate::config::ProxyConfig;

/// Keeps connections to the servers and sends requests over them.
#[derive(Clone)]
pub(crate) struct Client {
    pool: legacy::Client<HttpConnector, Body>,
}

/// Why a server gave no answer. Reads as the end of "the server X ...".
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// Nothing was sent, so another server may be tried.
    #[error("cannot be reached: {0}")]
    Unreachable(String),
    /// The request may have been sent.
    #[error("broke off before it answered: {0}")]
    Broken(String),
    #[error("did not answer within {0} ms")]
    TimedOut(u128),
    /// The client's body stopped it, which says nothing of the server.
    #[error("was not sent a whole body: it {0}")]
    Body(BodyFault),
}

impl Client {
    pub(crate) fn new(config: &ProxyConfig) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(config.connect_timeout));
        // Finds a peer that vanished without a word while a long answer is awaited.
        connector.set_keepalive(Some(Duration::from_secs(30)));
        let pool = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(config.pool_idle_timeout)
            .build(connector);
        Self { pool }
    }

    /// Sends a request and waits for the head of its answer. Dropping the future, or later the answer's body, closes the
    /// connection, from which vLLM knows that it should abort.
    pub(crate) async fn send(
        &self,
        request: Request<Body>,
        timeout: Duration,
    ) -> Result<Response<Incoming>, SendError> {
        match tokio::time::timeout(timeout, self.pool.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) if error.is_connect() => Err(SendError::Unreachable(innermost(&error))),
            Ok(Err(error)) => Err(match body_fault(&error) {
                Some(fault) => SendError::Body(fault),
                None => SendError::Broken(innermost(&error)),
            }),
            Err(_elapsed) => Err(SendError::TimedOut(timeout.as_millis())),
        }
    }
}

/// An error and everything that caused it, outermost first.
pub(crate) fn chain<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn StdError + 'static)| {
        (*error).source()
    })
}

fn body_fault(error: &(dyn StdError + 'static)) -> Option<BodyFault> {
    chain(error).find_map(|cause| cause.downcast_ref().cloned())
}

fn innermost(error: &(dyn StdError + 'static)) -> String {
    chain(error).last().map_or_else(String::new, ToString::to_string)
}
