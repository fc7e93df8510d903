//! Which headers cross the proxy, and the ones it adds.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

/// Carries the client's own `X-Request-Id` to the servers, where `X-Request-Id` itself is the transfer id.
pub const CLIENT_REQUEST_ID: HeaderName = HeaderName::from_static("x-client-request-id");
/// On answers: the id under which both servers know the request.
pub const TRANSFER_ID: HeaderName = HeaderName::from_static("x-kvlane-request-id");
/// On answers: `done` when prefill computed the prompt, `pending` when it was called together with decode and has not
/// answered yet, else why decode worked alone.
pub const PREFILL_OUTCOME: HeaderName = HeaderName::from_static("x-kvlane-prefill");

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Headers that belong to one connection (RFC 9110 section 7.6.1), not to the message.
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// The request's headers as a server should get them, apart from `X-Request-Id`. The HTTP client writes Host and
/// Content-Length itself; Expect was answered by this proxy.
pub(crate) fn to_upstream(client: &HeaderMap) -> HeaderMap {
    let mut headers = client.clone();
    remove_hop_by_hop(&mut headers);
    for name in [header::HOST, header::CONTENT_LENGTH, header::EXPECT] {
        headers.remove(name);
    }
    headers
}

/// Puts the transfer id in place of the client's own, which moves to [`CLIENT_REQUEST_ID`].
pub(crate) fn set_transfer_id(headers: &mut HeaderMap, id: HeaderValue) {
    if let Some(own) = headers.insert(REQUEST_ID, id) {
        headers.insert(CLIENT_REQUEST_ID, own);
    }
}

/// Removes what belongs to one connection, including what the Connection header names.
pub(crate) fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn end_to_end_headers_cross_and_connection_headers_do_not() {
        let client = map(&[
            ("host", "proxy:8080"),
            ("content-length", "3"),
            ("connection", "keep-alive, X-Hop"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("expect", "100-continue"),
            ("authorization", "Bearer k"),
            ("traceparent", "00-a-b-01"),
            ("content-type", "application/json"),
        ]);
        let expected = map(&[
            ("authorization", "Bearer k"),
            ("traceparent", "00-a-b-01"),
            ("content-type", "application/json"),
        ]);
        assert_eq!(to_upstream(&client), expected);
    }

    #[test]
    fn the_clients_own_id_moves_aside() {
        let mut headers = map(&[("x-request-id", "mine")]);
        set_transfer_id(&mut headers, HeaderValue::from_static("ours"));
        set_transfer_id(&mut HeaderMap::new(), HeaderValue::from_static("ours"));
        assert_eq!(
            headers,
            map(&[("x-request-id", "ours"), ("x-client-request-id", "mine")])
        );
    }
}
