//! Answers that come from the proxy itself, in OpenAI's error shape.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{Method, StatusCode};

use crate::client::SendError;
use crate::client_body::BodyFault;
use crate::rewrite::BodyError;

/// Why the proxy answers instead of a server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    #[error("{0}")]
    BadBody(#[from] BodyError),
    #[error("the request body {0}")]
    Body(#[from] BodyFault),
    #[error("{0} requests are in flight already")]
    Overloaded(usize),
    #[error(
        "the path {0} is not served here: OpenAI's paths under /v1/, /tokenize and other requests for an answer are; what \
         changes a server has to be sent to each server itself"
    )]
    UnknownPath(String),
    #[error("the path {path} does not take {method}; the header Allow names what it takes")]
    MethodNotAllowed { path: String, method: Method },
    #[error("no decode server is configured")]
    NoDecodeServer,
    #[error("the decode server {address} {cause}")]
    Decode { address: String, cause: SendError },
}

impl ProxyError {
    fn status(&self) -> StatusCode {
        match self {
            Self::BadBody(_) | Self::Body(BodyFault::Unreadable(_)) => StatusCode::BAD_REQUEST,
            Self::Body(BodyFault::Late(_) | BodyFault::Stalled(_)) => StatusCode::REQUEST_TIMEOUT,
            Self::Body(BodyFault::TooLarge(_)) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Overloaded(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::UnknownPath(_) => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Decode {
                cause: SendError::TimedOut(_),
                ..
            } => StatusCode::GATEWAY_TIMEOUT,
            Self::Decode { .. } | Self::NoDecodeServer => StatusCode::BAD_GATEWAY,
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Decode { .. } | Self::NoDecodeServer => "upstream_error",
            Self::Overloaded(_) => "overloaded_error",
            _ => "invalid_request_error",
        }
    }
}

impl IntoResponse for ProxyError {
    fn into_response(self) -> Response {
        let status = self.status();
        let stage = matches!(self, Self::Decode { .. }).then_some("decode");
        let mut error = serde_json::json!({
            "message": self.to_string(), "type": self.kind(), "param": null, "code": status.as_u16(),
        });
        if let Some(stage) = stage {
            error["stage"] = stage.into();
        }
        let mut response = Response::new(Body::from(serde_json::json!({ "error": error }).to_string()));
        *response.status_mut() = status;
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if matches!(self, Self::Overloaded(_)) {
            response
                .headers_mut()
                .insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
