//! How a request is served: prefill, then decode, or decode alone; and how other requests pass through.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use bytes::Bytes;
use http::header::{HeaderMap, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;

use crate::beside::PrefillCall;
use crate::client::SendError;
use crate::client_body::{PassedBody, read_body, refuse_declared};
use crate::config::Dispatch;
use crate::error::ProxyError;
use crate::exchange::Exchange;
use crate::headers;
use crate::metrics::{Fallback, Stage};
use crate::request_id;
use crate::rewrite::prefill_body;
use crate::routes::Shared;
use crate::upstream::{Lease, Server};

/// Prefill servers that may fail on one request before decode gets it. More would let a request that kills engines kill all
/// of them.
const PREFILL_FAILURES_MAX: usize = 2;

/// Serves a completion: the prompt to prefill, the client's body to decode, after it or at the same time.
pub(crate) async fn split(
    shared: &Arc<Shared>,
    exchange: &mut Exchange,
    request: Request<Body>,
) -> Result<Response<Incoming>, ProxyError> {
    let (head, body) = request.into_parts();
    let body = read_body(body, &head.headers, &shared.config).await?;
    let prompt_only = prefill_body(&body)?;
    let call = Call {
        path: path_of(&head.uri),
        headers: headers::to_upstream(&head.headers),
    };

    match shared.config.dispatch {
        Dispatch::Sequential => one_after_the_other(shared, exchange, &call, prompt_only, body).await,
        Dispatch::Concurrent => both_at_once(shared, exchange, &call, prompt_only, body).await,
    }
}

/// The answer is decode's, or prefill's refusal when the request itself is at fault.
async fn one_after_the_other(
    shared: &Shared,
    exchange: &mut Exchange,
    call: &Call,
    prompt_only: Bytes,
    body: Bytes,
) -> Result<Response<Incoming>, ProxyError> {
    let decode = pick_decode(shared)?;
    exchange.enter(Stage::Prefill);
    let id = match prefill(shared, exchange, call, &decode, prompt_only).await {
        Prefill::Done(id) => {
            exchange.prefill = Some("done");
            id
        }
        Prefill::Refused(response) => {
            exchange.prefill = Some("refused");
            return Ok(response);
        }
        Prefill::Failed(reason) => {
            exchange.prefill = Some(reason.name());
            shared.metrics.fell_back(reason);
            tracing::warn!(
                reason = reason.name(),
                "prefill failed, decode computes the prompt"
            );
            // An id that names a prefill server would make decode's connector wait for KV that does not come.
            request_id::unique_part()
        }
    };
    exchange.enter(Stage::Decode);
    exchange.transfer_id = Some(id.clone());
    let call = call.with_id(&id);
    send_to_decode(shared, exchange, decode, |server| call.post(server, body.clone())).await
}

/// The answer is decode's. Which prefill server computes is settled before either call, so no other can take its place;
/// when it fails, decode's connector learns that from it, or by its own deadline, and computes the prompt.
async fn both_at_once(
    shared: &Arc<Shared>,
    exchange: &mut Exchange,
    call: &Call,
    prompt_only: Bytes,
    body: Bytes,
) -> Result<Response<Incoming>, ProxyError> {
    let decode = pick_decode(shared)?;
    let id = match shared.prefill.pick(&[], false) {
        Some(prefill) => {
            let id = request_id::transfer_id(&prefill.transfer_address, &decode.transfer_address);
            let request = call.with_id(&id).post(&prefill, prompt_only);
            exchange.prefill_call = Some(PrefillCall::start(
                shared,
                exchange.permit.clone(),
                prefill,
                request,
            ));
            id
        }
        None => {
            exchange.prefill = Some(Fallback::Unreachable.name());
            shared.metrics.fell_back(Fallback::Unreachable);
            request_id::unique_part()
        }
    };
    exchange.enter(Stage::Decode);
    exchange.transfer_id = Some(id.clone());
    let call = call.with_id(&id);
    let result = send_to_decode(shared, exchange, decode, |server| call.post(server, body.clone())).await;
    if !result
        .as_ref()
        .is_ok_and(|response| response.status().is_success())
        && let Some(call) = &mut exchange.prefill_call
    {
        // Nobody will come for what it computes.
        call.give_up();
    }
    result
}

/// Hands any other request to a decode server as it is, without holding its body in memory.
pub(crate) async fn pass_through(
    shared: &Shared,
    exchange: &mut Exchange,
    request: Request<Body>,
) -> Result<Response<Incoming>, ProxyError> {
    let (head, mut body) = request.into_parts();
    refuse_declared(&mut body, &head.headers, &shared.config).await?;
    exchange.enter(Stage::Decode);
    let call = Call {
        path: path_of(&head.uri),
        headers: headers::to_upstream(&head.headers),
    };
    let server = pick_decode(shared)?;
    // A server that could not be reached has taken nothing of it, so the next gets it whole.
    let body = PassedBody::new(body, &shared.config);
    send_to_decode(shared, exchange, server, |server| {
        call.request(server, head.method.clone(), Body::new(body.clone()))
    })
    .await
}

enum Prefill {
    /// The prompt is computed; the id under which decode finds it.
    Done(String),
    /// The request is at fault and would fail on decode too.
    Refused(Response<Incoming>),
    Failed(Fallback),
}

async fn prefill(
    shared: &Shared,
    exchange: &mut Exchange,
    call: &Call,
    decode: &Lease,
    body: Bytes,
) -> Prefill {
    let deadline = Instant::now() + shared.config.prefill_timeout;
    let mut tried = Vec::new();
    let mut failures = 0;
    let mut reason = Fallback::Unreachable;
    while failures < PREFILL_FAILURES_MAX
        && let Some(server) = shared.prefill.pick(&tried, false)
    {
        let id = request_id::transfer_id(&server.transfer_address, &decode.transfer_address);
        let request = call.with_id(&id).post(&server, body.clone());
        match ask_prefill(shared, request, deadline).await {
            Ok(None) => return Prefill::Done(id),
            Ok(Some(refusal)) => {
                exchange.transfer_id = Some(id);
                exchange.lease = Some(server);
                return Prefill::Refused(refusal);
            }
            Err((Fallback::TimedOut, cause)) => {
                // The time for all of them is over.
                note_failure(&server, Fallback::TimedOut, &cause);
                return Prefill::Failed(Fallback::TimedOut);
            }
            Err((failure, cause)) => {
                note_failure(&server, failure, &cause);
                if failure != Fallback::Unreachable {
                    failures += 1;
                    reason = failure;
                }
                tried.push(server);
            }
        }
    }
    Prefill::Failed(reason)
}

/// Has the next requests go past a prefill server that failed.
pub(crate) fn note_failure(server: &Server, failure: Fallback, cause: &str) {
    tracing::warn!(
        server = server.address(),
        reason = failure.name(),
        cause,
        "a prefill server failed"
    );
    match failure {
        Fallback::Unreachable | Fallback::TimedOut => server.cool_down(),
        Fallback::Broken | Fallback::Failed => server.failed(),
    }
}

/// One prefill server's work on a prompt: done, or its refusal of the request, or why another may be asked.
pub(crate) async fn ask_prefill(
    shared: &Shared,
    request: Request<Body>,
    deadline: Instant,
) -> Result<Option<Response<Incoming>>, (Fallback, String)> {
    let left = || deadline.saturating_duration_since(Instant::now());
    let response = shared.client.send(request, left()).await.map_err(|error| {
        let reason = match error {
            SendError::Unreachable(_) => Fallback::Unreachable,
            SendError::TimedOut(_) => Fallback::TimedOut,
            SendError::Broken(_) | SendError::Body(_) => Fallback::Broken,
        };
        (reason, error.to_string())
    })?;
    let status = response.status();
    if is_servers_failure(status) || !(status.is_success() || status.is_client_error()) {
        return Err((Fallback::Failed, format!("answered {status}")));
    }
    if status.is_client_error() {
        return Ok(Some(response));
    }
    // Reading the answer to its end proves that it was whole, and gives the connection back to the pool.
    match tokio::time::timeout(left(), drain(response.into_body())).await {
        Ok(Ok(())) => Ok(None),
        Ok(Err(broken)) => Err((Fallback::Broken, broken.to_string())),
        Err(_elapsed) => Err((Fallback::TimedOut, "its answer stalled".to_owned())),
    }
}

/// Whether an answer says that this server cannot serve now, rather than that the request is at fault.
fn is_servers_failure(status: StatusCode) -> bool {
    status.is_server_error()
        || matches!(
            status,
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS
        )
}

/// Sends to decode, and to the next decode server as long as none could be reached.
async fn send_to_decode(
    shared: &Shared,
    exchange: &mut Exchange,
    mut server: Lease,
    request: impl Fn(&Server) -> Request<Body>,
) -> Result<Response<Incoming>, ProxyError> {
    let mut tried = Vec::new();
    loop {
        match shared
            .client
            .send(request(&server), shared.config.first_byte_timeout)
            .await
        {
            // Whatever it is, it is the answer: the work may have been done. The next request goes elsewhere.
            Ok(response) => {
                if is_servers_failure(response.status()) {
                    server.failed();
                }
                exchange.lease = Some(server);
                return Ok(response);
            }
            Err(cause @ SendError::Unreachable(_)) => {
                tracing::warn!(server = server.address(), %cause, "decode server cannot be reached");
                server.cool_down();
                let error = decode_error(&server, cause);
                tried.push(server);
                server = match shared.decode.pick(&tried, true) {
                    Some(next) => next,
                    None => return Err(error),
                };
            }
            Err(cause) => {
                if !matches!(cause, SendError::Body(_)) {
                    server.failed();
                }
                return Err(decode_error(&server, cause));
            }
        }
    }
}

fn pick_decode(shared: &Shared) -> Result<Lease, ProxyError> {
    shared.decode.pick(&[], true).ok_or(ProxyError::NoDecodeServer)
}

fn decode_error(server: &Server, cause: SendError) -> ProxyError {
    match cause {
        SendError::Body(fault) => fault.into(),
        cause => ProxyError::Decode {
            address: server.address().to_owned(),
            cause,
        },
    }
}

/// What the calls for one client request share.
#[derive(Clone)]
struct Call {
    path: PathAndQuery,
    headers: HeaderMap,
}

impl Call {
    fn with_id(&self, id: &str) -> Self {
        let mut call = self.clone();
        // Addresses were read as parts of a URL, so the id is always a valid header.
        if let Ok(id) = HeaderValue::from_str(id) {
            headers::set_transfer_id(&mut call.headers, id);
        }
        call
    }

    fn post(&self, server: &Server, body: Bytes) -> Request<Body> {
        self.request(server, Method::POST, Body::from(body))
    }

    fn request(&self, server: &Server, method: Method, body: Body) -> Request<Body> {
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = server.uri(self.path.clone());
        *request.headers_mut() = self.headers.clone();
        request
    }
}

fn path_of(uri: &http::Uri) -> PathAndQuery {
    uri.path_and_query()
        .cloned()
        .unwrap_or_else(|| PathAndQuery::from_static("/"))
}

async fn drain(mut body: Incoming) -> Result<(), hyper::Error> {
    while let Some(frame) = body.frame().await {
        frame?;
    }
    Ok(())
}
