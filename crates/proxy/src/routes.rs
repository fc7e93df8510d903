//! Which path is served how.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, StatusCode, Uri};
use hyper::body::Incoming;
use percent_encoding::percent_decode_str;
use tokio::sync::Semaphore;

use crate::client::Client;
use crate::config::{ConfigError, ProxyConfig};
use crate::error::ProxyError;
use crate::exchange::{Answer, End, Exchange};
use crate::headers::{self, PREFILL_OUTCOME, TRANSFER_ID};
use crate::health;
use crate::metrics::{self, Metrics};
use crate::split::{pass_through, split};
use crate::upstream::Fleet;

const COMPLETIONS: &str = "/v1/completions";
const CHAT_COMPLETIONS: &str = "/v1/chat/completions";
const OTHER: &str = "other";

/// vLLM's serving paths outside of `/v1/` that go to decode. Paths that change or stop a server are not among them.
const PASSED: [&str; 9] = [
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
    "/v2/rerank",
    "/version",
];

/// Paths under `/v1/` that change a server. Changing decode alone would split the pair: prefill would not know the
/// adapter, so each server has to be called itself.
const NOT_PASSED: [&str; 2] = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"];

/// A proxy with its connections and counters.
pub struct Proxy {
    shared: Arc<Shared>,
}

/// What all requests share.
pub(crate) struct Shared {
    pub(crate) config: ProxyConfig,
    pub(crate) client: Client,
    pub(crate) prefill: Fleet,
    pub(crate) decode: Fleet,
    pub(crate) metrics: Arc<Metrics>,
    slots: Arc<Semaphore>,
}

impl Proxy {
    /// A proxy for the configured servers. No connection is made yet: servers may start later.
    pub fn new(config: ProxyConfig) -> Result<Self, ConfigError> {
        config.check()?;
        let shared = Shared {
            client: Client::new(&config),
            prefill: Fleet::new(&config.prefill, &config)?,
            decode: Fleet::new(&config.decode, &config)?,
            metrics: Arc::new(Metrics::new()),
            slots: Arc::new(Semaphore::new(config.in_flight_limit.min(Semaphore::MAX_PERMITS))),
            config,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// All routes. Must run on a tokio runtime with timers and I/O.
    pub fn router(&self) -> Router {
        Router::new()
            .route(COMPLETIONS, post(completions))
            .route(CHAT_COMPLETIONS, post(chat_completions))
            .route("/health", get(health::health))
            .route("/metrics", get(own_metrics))
            .fallback(other)
            .method_not_allowed_fallback(async |method: Method, uri: Uri| ProxyError::MethodNotAllowed {
                path: uri.path().to_owned(),
                method,
            })
            .with_state(Arc::clone(&self.shared))
    }
}

async fn completions(State(shared): State<Arc<Shared>>, request: Request<Body>) -> Response {
    answer(&shared, COMPLETIONS, request, How::Split).await
}

async fn chat_completions(State(shared): State<Arc<Shared>>, request: Request<Body>) -> Response {
    answer(&shared, CHAT_COMPLETIONS, request, How::Split).await
}

async fn other(State(shared): State<Arc<Shared>>, request: Request<Body>) -> Response {
    let how = if is_passed(request.uri().path()) {
        How::Pass
    } else {
        How::Unknown
    };
    answer(&shared, OTHER, request, how).await
}

/// Whether a path goes to decode. It is compared as servers read it: without percent-encoding, and with nothing in it
/// that something before them might resolve to another path.
fn is_passed(path: &str) -> bool {
    let decoded = percent_decode_str(path).decode_utf8_lossy();
    let path = decoded.strip_suffix('/').unwrap_or(&decoded);
    let mut parts = path.split('/').skip(1);
    if parts.any(|part| matches!(part, "" | "." | "..")) {
        return false;
    }
    (path.starts_with("/v1/") && !NOT_PASSED.contains(&path)) || PASSED.contains(&path)
}

async fn own_metrics(State(shared): State<Arc<Shared>>) -> Response {
    match shared.metrics.text() {
        Ok(text) => (
            [(CONTENT_TYPE, HeaderValue::from_static(metrics::CONTENT_TYPE))],
            text,
        )
            .into_response(),
        Err(_format) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

enum How {
    Split,
    Pass,
    Unknown,
}

/// Everything that is the same for all requests: the bound, the counting, the headers of the answer.
async fn answer(shared: &Arc<Shared>, route: &'static str, request: Request<Body>, how: How) -> Response {
    let own_id = request.headers().get(headers::REQUEST_ID).cloned();
    let mut exchange = Exchange::new(&shared.metrics, route);
    let result = match Arc::clone(&shared.slots).try_acquire_owned() {
        Err(_full) => Err(ProxyError::Overloaded(shared.config.in_flight_limit)),
        Ok(permit) => {
            exchange.permit = Some(Arc::new(permit));
            match how {
                How::Split => split(shared, &mut exchange, request).await,
                How::Pass => pass_through(shared, &mut exchange, request).await,
                How::Unknown => Err(ProxyError::UnknownPath(request.uri().path().to_owned())),
            }
        }
    };
    let transfer_id = exchange
        .transfer_id
        .as_deref()
        .and_then(|id| HeaderValue::from_str(id).ok());
    let prefill = exchange.prefill_outcome().map(HeaderValue::from_static);
    let mut response = match result {
        Ok(response) => forward(shared, exchange, response),
        Err(error) => refuse(exchange, error),
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (headers::REQUEST_ID, own_id),
        (TRANSFER_ID, transfer_id),
        (PREFILL_OUTCOME, prefill),
    ] {
        if let Some(value) = value {
            headers.insert(name, value);
        }
    }
    response
}

fn forward(shared: &Shared, mut exchange: Exchange, response: Response<Incoming>) -> Response {
    let (mut head, body) = response.into_parts();
    headers::remove_hop_by_hop(&mut head.headers);
    head.extensions.clear();
    head.version = http::Version::default();
    exchange.answered(head.status);
    let streamed = head
        .headers
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    let body = Answer::new(body, exchange, streamed, shared.config.idle_timeout);
    Response::from_parts(head, Body::new(body))
}

fn refuse(mut exchange: Exchange, error: ProxyError) -> Response {
    tracing::debug!(%error, "refused");
    let response = error.into_response();
    exchange.answered(response.status());
    exchange.finish(End::Complete);
    response
}
