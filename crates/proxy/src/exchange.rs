//! One client request from its head to the last byte of its answer: what is counted and logged about it, and the body
//! that carries the server's answer to the client.

use std::error::Error as StdError;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::StatusCode;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Sleep;

use crate::beside::PrefillCall;
use crate::metrics::{Metrics, Stage};
use crate::upstream::Lease;

/// Follows one request. Dropping it before [`Exchange::finish`] means that the client left.
pub(crate) struct Exchange {
    metrics: Arc<Metrics>,
    route: &'static str,
    started: Instant,
    stage: Stage,
    stage_started: Instant,
    status: Option<StatusCode>,
    /// Time to the first byte of a streamed answer.
    first_token: Option<Duration>,
    end: Option<End>,
    /// What became of prefill, for the log and the answer's header.
    pub(crate) prefill: Option<&'static str>,
    /// Prefill's call, if it goes on beside decode's. It ends with the exchange.
    pub(crate) prefill_call: Option<PrefillCall>,
    /// The id both servers got.
    pub(crate) transfer_id: Option<String>,
    /// The server that answers; counts as busy until the answer ended.
    pub(crate) lease: Option<Lease>,
    /// The request's share of the bound on requests in flight.
    pub(crate) permit: Option<Arc<OwnedSemaphorePermit>>,
}

/// How an exchange ended, unless the client left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// All was sent that was to be sent.
    Complete,
    /// The server's answer broke off after its head.
    Broken,
}

/// A server's answer on its way to the client, with the exchange it belongs to.
pub(crate) struct Answer {
    body: Incoming,
    exchange: Exchange,
    streamed: bool,
    idle_timeout: Duration,
    /// Armed only while the server is silent: most frames then cost no timer work.
    idle: Option<Pin<Box<Sleep>>>,
}

/// The server fell silent in the middle of its answer.
#[derive(Debug, thiserror::Error)]
#[error("the server sent nothing for {0} ms")]
struct Silent(u128);

impl Exchange {
    pub(crate) fn new(metrics: &Arc<Metrics>, route: &'static str) -> Self {
        metrics.in_flight.inc();
        let now = Instant::now();
        Self {
            metrics: Arc::clone(metrics),
            route,
            started: now,
            stage: Stage::Receive,
            stage_started: now,
            status: None,
            first_token: None,
            end: None,
            prefill: None,
            prefill_call: None,
            transfer_id: None,
            lease: None,
            permit: None,
        }
    }

    /// The previous stage is done, the next begins.
    pub(crate) fn enter(&mut self, stage: Stage) {
        let now = Instant::now();
        self.metrics.stage_done(self.stage, now - self.stage_started);
        self.stage = stage;
        self.stage_started = now;
    }

    /// The status that the client gets.
    pub(crate) fn answered(&mut self, status: StatusCode) {
        self.status = Some(status);
    }

    /// What is known of prefill by now.
    pub(crate) fn prefill_outcome(&self) -> Option<&'static str> {
        self.prefill
            .or_else(|| self.prefill_call.as_ref().map(PrefillCall::outcome))
    }

    pub(crate) fn finish(&mut self, end: End) {
        if self.end.is_none() {
            self.end = Some(end);
            if end == End::Complete
                && self.status.is_some_and(|status| status.is_success())
                && let Some(call) = &mut self.prefill_call
            {
                call.decode_is_done();
            }
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.metrics.in_flight.dec();
        self.metrics.answered(self.route, self.status);
        match self.end {
            Some(End::Complete) => self.metrics.stage_done(self.stage, self.stage_started.elapsed()),
            Some(End::Broken) => self.metrics.broke_off(),
            None => self.metrics.cancelled(self.stage),
        }
        tracing::info!(
            route = self.route,
            status = self.status.map(|status| status.as_u16()),
            end = match self.end {
                Some(End::Complete) => "complete",
                Some(End::Broken) => "broken",
                None => "client left",
            },
            stage = ?self.stage,
            prefill = self.prefill_outcome(),
            request_id = self.transfer_id,
            server = self.lease.as_ref().map(|lease| lease.address()),
            first_token_ms = self.first_token.map(millis),
            total_ms = millis(self.started.elapsed()),
            "request"
        );
    }
}

impl Answer {
    /// `streamed`: the answer is a stream of events, so its first byte is the first token.
    pub(crate) fn new(body: Incoming, exchange: Exchange, streamed: bool, idle_timeout: Duration) -> Self {
        Self {
            body,
            exchange,
            streamed,
            idle_timeout,
            idle: None,
        }
    }

    fn poll_silence(&mut self, context: &mut Context<'_>) -> Poll<Silent> {
        let timeout = self.idle_timeout;
        let idle = self
            .idle
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        idle.as_mut().poll(context).map(|()| Silent(timeout.as_millis()))
    }

    fn note_first_byte(&mut self) {
        if self.streamed && self.exchange.first_token.is_none() {
            let spent = self.exchange.started.elapsed();
            self.exchange.first_token = Some(spent);
            self.exchange.metrics.first_token(spent);
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Box<dyn StdError + Send + Sync>;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                this.idle = None;
                this.note_first_byte();
                Poll::Ready(Some(Ok(frame)))
            }
            // An error here makes the server part close the connection without a proper end, so that a client cannot
            // take what it got for the whole answer.
            Poll::Ready(Some(Err(error))) => {
                this.exchange.finish(End::Broken);
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                this.exchange.finish(End::Complete);
                Poll::Ready(None)
            }
            Poll::Pending => this.poll_silence(context).map(|silent| {
                this.exchange.finish(End::Broken);
                Some(Err(silent.into()))
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // A body of known length is not polled again after its last byte, an empty one never.
        if self.body.is_end_stream() {
            self.exchange.finish(End::Complete);
        }
    }
}

fn millis(duration: Duration) -> f64 {
    // Microseconds are enough for a log line.
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
