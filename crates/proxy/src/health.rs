//! `GET /health`: whether requests can be served, asked of the servers themselves.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, HeaderValue};
use http::uri::PathAndQuery;
use http::{Request, StatusCode};
use tokio::task::JoinSet;

use crate::routes::Shared;
use crate::upstream::{Fleet, Server};

/// vLLM answers /health from its API process at once unless that process or its engine is in trouble.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// 200 when a decode server answers, which is enough to serve; the body says how the prefill servers are.
pub(crate) async fn health(State(shared): State<Arc<Shared>>) -> Response {
    let (prefill, decode) = tokio::join!(
        probe_all(&shared, &shared.prefill),
        probe_all(&shared, &shared.decode)
    );
    let any = |states: &[ServerState]| states.iter().any(|state| state.healthy);
    let (status, word) = match (any(&decode), any(&prefill)) {
        (true, true) => (StatusCode::OK, "ok"),
        (true, false) => (StatusCode::OK, "degraded"),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "down"),
    };
    let page = serde_json::json!({ "status": word, "prefill": prefill, "decode": decode });
    let kind = [(CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    (status, kind, page.to_string()).into_response()
}

#[derive(serde::Serialize)]
struct ServerState {
    address: String,
    healthy: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

async fn probe_all(shared: &Arc<Shared>, fleet: &Fleet) -> Vec<ServerState> {
    // The tasks end with this future: dropping the set when the client leaves aborts them.
    let mut probes = JoinSet::new();
    for server in fleet.servers() {
        let (shared, server) = (Arc::clone(shared), Arc::clone(server));
        probes.spawn(async move { probe(&shared, &server).await });
    }
    let mut states = probes.join_all().await;
    states.sort_by(|left, right| left.address.cmp(&right.address));
    states
}

async fn probe(shared: &Shared, server: &Server) -> ServerState {
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = server.uri(PathAndQuery::from_static("/health"));
    let problem = match shared.client.send(request, PROBE_TIMEOUT).await {
        Ok(response) if response.status().is_success() => None,
        Ok(response) => Some(format!("answered {}", response.status().as_u16())),
        Err(error) => Some(error.to_string()),
    };
    ServerState {
        address: server.address().to_owned(),
        healthy: problem.is_none(),
        problem,
    }
}
