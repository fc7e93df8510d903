//! How a request is served: prefill, then decode, or decode alone; and how other requests pass through.

use std::time::{Duration, Instant};

use axum::body::Body;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, Request, Response};
use http_body::Body as _;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;

use crate::client::{SendError, chain};
use crate::config::ProxyConfig;
use crate::error::ProxyError;
use crate::exchange::Exchange;
use crate::headers;
use crate::metrics::{Fallback, Stage};
use crate::request_id;
use crate::rewrite::prefill_body;
use crate::routes::Shared;
use crate::upstream::{Lease, Server};

/// How much of a refused body is read and dropped, as a multiple of the limit, so that a client that writes before it
/// reads gets its 413 instead of a reset connection.
const DISCARD_FACTOR: usize = 4;
const DISCARD_TIME: Duration = Duration::from_secs(5);

/// Serves a completion: the prompt to prefill, then the client's body to decode. The answer is decode's, or prefill's
/// refusal when the request itself is at fault.
pub(crate) async fn split(
    shared: &Shared,
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

    let decode = pick_decode(shared)?;
    exchange.enter(Stage::Prefill);
    let id = match prefill(shared, exchange, &call, &decode, prompt_only).await {
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

/// Hands any other request to a decode server as it is, without holding its body in memory.
pub(crate) async fn pass_through(
    shared: &Shared,
    exchange: &mut Exchange,
    request: Request<Body>,
) -> Result<Response<Incoming>, ProxyError> {
    let limit = shared.config.body_limit_bytes;
    let (head, mut body) = request.into_parts();
    if declared_too_large(&body, limit) {
        discard(&mut body, &head.headers, limit).await;
        return Err(ProxyError::BodyTooLarge(limit));
    }
    exchange.enter(Stage::Decode);
    let call = Call {
        path: path_of(&head.uri),
        headers: headers::to_upstream(&head.headers),
    };
    // A body that was begun cannot be sent again, hence one server.
    let server = pick_decode(shared)?;
    let request = call.request(&server, head.method, Body::new(Limited::new(body, limit)));
    let result = shared
        .client
        .send(request, shared.config.first_byte_timeout)
        .await;
    let response = result.map_err(|cause| decode_error(&server, cause, limit))?;
    exchange.lease = Some(server);
    Ok(response)
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
    while let Some(server) = shared.prefill.pick(&tried, false) {
        let id = request_id::transfer_id(&server.transfer_address, &decode.transfer_address);
        let request = call.with_id(&id).post(&server, body.clone());
        let left = deadline.saturating_duration_since(Instant::now());
        let response = match shared.client.send(request, left).await {
            Ok(response) => response,
            Err(SendError::Unreachable(cause)) => {
                tracing::warn!(
                    server = server.address(),
                    cause,
                    "prefill server cannot be reached"
                );
                server.cool_down();
                tried.push(server);
                continue;
            }
            Err(SendError::TimedOut(_)) => {
                server.cool_down();
                return Prefill::Failed(Fallback::TimedOut);
            }
            Err(SendError::Broken(_) | SendError::BodyTooLarge) => return Prefill::Failed(Fallback::Broken),
        };
        let status = response.status();
        if status.is_client_error() {
            exchange.transfer_id = Some(id);
            exchange.lease = Some(server);
            return Prefill::Refused(response);
        }
        if !status.is_success() {
            return Prefill::Failed(Fallback::Failed);
        }
        // Reading the answer to its end proves that it was whole, and gives the connection back to the pool.
        let left = deadline.saturating_duration_since(Instant::now());
        return match tokio::time::timeout(left, drain(response.into_body())).await {
            Ok(Ok(())) => Prefill::Done(id),
            Ok(Err(_broken)) => Prefill::Failed(Fallback::Broken),
            Err(_elapsed) => Prefill::Failed(Fallback::TimedOut),
        };
    }
    Prefill::Failed(Fallback::Unreachable)
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
            Ok(response) => {
                exchange.lease = Some(server);
                return Ok(response);
            }
            Err(cause @ SendError::Unreachable(_)) => {
                tracing::warn!(server = server.address(), %cause, "decode server cannot be reached");
                server.cool_down();
                let error = decode_error(&server, cause, shared.config.body_limit_bytes);
                tried.push(server);
                server = match shared.decode.pick(&tried, true) {
                    Some(next) => next,
                    None => return Err(error),
                };
            }
            Err(cause) => return Err(decode_error(&server, cause, shared.config.body_limit_bytes)),
        }
    }
}

fn pick_decode(shared: &Shared) -> Result<Lease, ProxyError> {
    shared.decode.pick(&[], true).ok_or(ProxyError::NoDecodeServer)
}

fn decode_error(server: &Server, cause: SendError, limit: usize) -> ProxyError {
    match cause {
        SendError::BodyTooLarge => ProxyError::BodyTooLarge(limit),
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

async fn read_body(mut body: Body, headers: &HeaderMap, config: &ProxyConfig) -> Result<Bytes, ProxyError> {
    let limit = config.body_limit_bytes;
    if declared_too_large(&body, limit) {
        discard(&mut body, headers, limit).await;
        return Err(ProxyError::BodyTooLarge(limit));
    }
    let whole = Limited::new(&mut body, limit).collect();
    match tokio::time::timeout(config.client_body_timeout, whole).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if chain(error.as_ref()).any(|cause| cause.is::<LengthLimitError>()) => {
            discard(&mut body, headers, limit).await;
            Err(ProxyError::BodyTooLarge(limit))
        }
        Ok(Err(error)) => Err(ProxyError::UnreadableBody(axum::Error::new(error))),
        Err(_elapsed) => Err(ProxyError::SlowBody(config.client_body_timeout.as_millis())),
    }
}

fn declared_too_large(body: &Body, limit: usize) -> bool {
    body.size_hint().lower() > limit as u64
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
