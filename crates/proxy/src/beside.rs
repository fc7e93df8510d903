//! Prefill's call while decode is called already: what carries it on, and what ends it.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::body::Body;
use http::Request;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::metrics::Stage;
use crate::routes::Shared;
use crate::split::{ask_prefill, note_failure};
use crate::upstream::Lease;

/// How long prefill may still take when decode's answer is complete. A short answer can overtake prefill's, and cutting
/// that one off would cost a connection; work that takes longer is of no use to anybody.
const AFTER_DECODE: Duration = Duration::from_secs(1);

/// Prefill's call, carried on by a task of its own. It is given up when this is dropped.
pub(crate) struct PrefillCall {
    outcome: Arc<OnceLock<&'static str>>,
    /// A word through it lets the call end by itself, its end without a word gives it up.
    ending: Option<oneshot::Sender<()>>,
}

impl PrefillCall {
    /// Sends `request` to `server`, reads the answer to its end and drops it. `permit` is held until then, so that calls
    /// that outlast their requests are bounded with these.
    pub(crate) fn start(
        shared: &Arc<Shared>,
        permit: Option<Arc<OwnedSemaphorePermit>>,
        server: Lease,
        request: Request<Body>,
    ) -> Self {
        let (ending, ended) = oneshot::channel();
        let outcome = Arc::new(OnceLock::new());
        let (told, shared) = (Arc::clone(&outcome), Arc::clone(shared));
        tokio::spawn(async move {
            let _permit = permit;
            let mut call = std::pin::pin!(call(&shared, &server, request));
            let result = tokio::select! {
                result = &mut call => Some(result),
                word = ended => match word {
                    Ok(()) => tokio::time::timeout(AFTER_DECODE, call).await.ok(),
                    Err(_given_up) => None,
                },
            };
            if let Some(result) = result {
                // The only place that sets it.
                let _set = told.set(result);
            }
        });
        Self {
            outcome,
            ending: Some(ending),
        }
    }

    /// What became of it by now.
    pub(crate) fn outcome(&self) -> &'static str {
        self.outcome.get().copied().unwrap_or("pending")
    }

    /// Decode has what it needed.
    pub(crate) fn decode_is_done(&mut self) {
        if let Some(ending) = self.ending.take() {
            // Fails when the call has ended already.
            let _ended = ending.send(());
        }
    }

    /// Closes the connection, from which vLLM knows that it should abort.
    pub(crate) fn give_up(&mut self) {
        self.ending = None;
    }
}

async fn call(shared: &Shared, server: &Lease, request: Request<Body>) -> &'static str {
    let started = Instant::now();
    match ask_prefill(shared, request, started + shared.config.prefill_timeout).await {
        Ok(None) => {
            shared.metrics.stage_done(Stage::Prefill, started.elapsed());
            "done"
        }
        // Decode gets the same request and has its own words for it.
        Ok(Some(_refusal)) => "refused",
        Err((failure, cause)) => {
            note_failure(server, failure, &cause);
            shared.metrics.fell_back(failure);
            failure.name()
        }
    }
}
