//! Guards, with both servers called at once: an answer that is not decode's, a failed prefill that costs the request, work
//! that goes on at either server for nobody.

#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]

mod support;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::{Response, StatusCode};
use kvlane_proxy::request_id::TransferAddresses;
use kvlane_proxy::{ConfigError, Dispatch, KvBackend, Proxy, ProxyConfig, UpstreamAddress};
use support::{
    Fed, Gone, Mock, Running, StreamingMock, dead_address, error_of, json, next_chunk, soon, text,
};
use tokio::sync::{Barrier, Notify};

const STREAM: &str = r#"{"prompt":"x","stream":true}"#;
const ANSWER: &str = r#"{"choices":[{"text":"x"}]}"#;

fn concurrent(prefill: Vec<UpstreamAddress>, decode: Vec<UpstreamAddress>) -> ProxyConfig {
    let mut settings = ProxyConfig::new(prefill, decode, KvBackend::P2p);
    settings.dispatch = Dispatch::Concurrent;
    settings
}

fn between(prefill: &Mock, decode: &Mock) -> ProxyConfig {
    concurrent(vec![prefill.url()], vec![decode.url()])
}

/// A server that works until it is given up, and tells then; and when it has begun.
async fn endless() -> (Mock, Arc<Notify>, Arc<Notify>) {
    let (begun, gone) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (tell_begun, tell_gone) = (begun.clone(), gone.clone());
    let mock = Mock::start(move |_call| {
        let guard = Gone(tell_gone.clone());
        tell_begun.notify_one();
        async move {
            let _guard = guard;
            std::future::pending().await
        }
    })
    .await;
    (mock, begun, gone)
}

async fn fixed(status: u16) -> Mock {
    Mock::start(move |_call| async move {
        json(
            StatusCode::from_u16(status).unwrap(),
            r#"{"error":{"message":"no"}}"#,
        )
    })
    .await
}

/// Answers with `status` once the other server was called too.
async fn fixed_after(begun: &Arc<Notify>, status: u16) -> Mock {
    let begun = Arc::clone(begun);
    Mock::start(move |_call| {
        let begun = Arc::clone(&begun);
        async move {
            soon(&begun).await;
            json(StatusCode::from_u16(status).unwrap(), "{}")
        }
    })
    .await
}

#[tokio::test]
async fn both_servers_work_at_the_same_time_under_one_id_that_names_their_kv_addresses() {
    // Neither answers before both were called.
    let both = Arc::new(Barrier::new(2));
    let meeting = |both: &Arc<Barrier>| {
        let both = Arc::clone(both);
        Mock::start(move |_call| {
            let both = Arc::clone(&both);
            async move {
                both.wait().await;
                json(StatusCode::OK, ANSWER)
            }
        })
    };
    let (prefill, decode) = (meeting(&both).await, meeting(&both).await);
    let with_port = UpstreamAddress::parse(&format!("http://{}=20001", prefill.address)).unwrap();
    let proxy = Running::start(concurrent(vec![with_port], vec![decode.url()])).await;
    let body = r#"{"prompt":"x","max_tokens":64,"stream":true}"#;
    let response = proxy.complete(body).await;
    assert_eq!(text(response).await, ANSWER);
    proxy
        .metric_reaches(r#"kvlane_proxy_stage_seconds_count{stage="prefill"}"#, 1.0)
        .await;
    let (first, second) = (prefill.only_call(), decode.only_call());
    let id = first.header("x-request-id").to_owned();
    assert_eq!(second.header("x-request-id"), id);
    let addresses = TransferAddresses::parse(&id).unwrap();
    assert_eq!(addresses.prefill, ("127.0.0.1", 20001));
    assert_eq!(addresses.decode, ("127.0.0.1", 14579));
    assert_eq!(
        first.json(),
        serde_json::json!({"prompt":"x","max_tokens":1,"stream":false})
    );
    assert_eq!(second.body, body);
}

#[tokio::test]
async fn decodes_stream_is_passed_on_while_prefill_works() {
    let (prefill, decode) = (StreamingMock::start().await, StreamingMock::start().await);
    let proxy = Running::start(between(&prefill.mock, &decode.mock)).await;
    let (computed, _gone) = prefill.next_body();
    let (feed, _gone) = decode.next_body();
    feed.send(Ok(Bytes::from_static(b"data: 0\n\n"))).unwrap();
    let response = proxy.complete(STREAM).await;
    assert_eq!(response.headers()["x-kvlane-prefill"], "pending");
    let mut body = response.into_body();
    assert_eq!(next_chunk(&mut body).await.unwrap().unwrap(), "data: 0\n\n");
    computed
        .send(Ok(Bytes::from_static(b"{\"choices\":[]}")))
        .unwrap();
    drop(computed);
    proxy
        .metric_reaches(r#"kvlane_proxy_stage_seconds_count{stage="prefill"}"#, 1.0)
        .await;
    feed.send(Ok(Bytes::from_static(b"data: 1\n\n"))).unwrap();
    assert_eq!(next_chunk(&mut body).await.unwrap().unwrap(), "data: 1\n\n");
    drop(feed);
    assert!(
        next_chunk(&mut body).await.is_none(),
        "nothing of prefill's answer"
    );
}

#[tokio::test]
async fn prefills_answers_are_read_to_their_end_so_that_connections_are_kept() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let proxy = Running::start(between(&prefill, &decode)).await;
    for done in 1..=20 {
        assert_eq!(text(proxy.complete("{}").await).await, ANSWER);
        proxy
            .metric_reaches(
                r#"kvlane_proxy_stage_seconds_count{stage="prefill"}"#,
                f64::from(done),
            )
            .await;
    }
    assert_eq!((prefill.calls().len(), decode.calls().len()), (20, 20));
    assert_eq!((prefill.connections(), decode.connections()), (1, 1));
}

/// One request whose prefill fails while decode works must get decode's answer.
async fn decode_goes_on(mut settings: ProxyConfig, reason: &str) {
    let decode = StreamingMock::start().await;
    settings.decode = vec![decode.mock.url()];
    let proxy = Running::start(settings).await;
    let (feed, _gone) = decode.next_body();
    let mut body = proxy.complete(STREAM).await.into_body();
    let series = format!(r#"kvlane_proxy_fallbacks_total{{reason="{reason}"}}"#);
    proxy.metric_reaches(&series, 1.0).await;
    feed.send(Ok(Bytes::from_static(b"data: 0\n\n"))).unwrap();
    assert_eq!(next_chunk(&mut body).await.unwrap().unwrap(), "data: 0\n\n");
    drop(feed);
    assert!(next_chunk(&mut body).await.is_none());
    assert_eq!(decode.mock.only_call().body, STREAM, "called once");
}

#[tokio::test]
async fn a_prefill_that_cannot_be_reached_leaves_decode_alone() {
    decode_goes_on(concurrent(vec![dead_address()], vec![]), "unreachable").await;
}

#[tokio::test]
async fn a_prefill_that_answers_that_it_cannot_serve_leaves_decode_alone() {
    for status in [408, 429, 500, 503] {
        let prefill = fixed(status).await;
        decode_goes_on(concurrent(vec![prefill.url()], vec![]), "failed").await;
    }
}

#[tokio::test]
async fn a_prefill_that_breaks_off_leaves_decode_alone() {
    let prefill = StreamingMock::start().await;
    let (feed, _gone) = prefill.next_body();
    feed.send(Ok(Bytes::from_static(b"{"))).unwrap();
    feed.send(Err("the engine died")).unwrap();
    decode_goes_on(concurrent(vec![prefill.mock.url()], vec![]), "broken").await;
}

#[tokio::test]
async fn a_prefill_that_never_answers_is_given_up_and_leaves_decode_alone() {
    let (prefill, _begun, gone) = endless().await;
    let mut settings = concurrent(vec![prefill.url()], vec![]);
    settings.prefill_timeout = Duration::from_millis(50);
    decode_goes_on(settings, "timeout").await;
    soon(&gone).await;
}

#[tokio::test]
async fn what_prefill_refuses_is_decodes_to_answer() {
    let (prefill, decode) = (fixed(400).await, StreamingMock::start().await);
    let proxy = Running::start(between(&prefill, &decode.mock)).await;
    let (feed, _gone) = decode.next_body();
    let response = proxy.complete(STREAM).await;
    assert_eq!(response.status(), StatusCode::OK);
    feed.send(Ok(Bytes::from_static(b"data: 0\n\n"))).unwrap();
    drop(feed);
    assert_eq!(text(response).await, "data: 0\n\n");
}

#[tokio::test]
async fn the_next_requests_go_past_a_prefill_that_fails_and_decode_does_not_ask_it() {
    let (failing, prefill, decode) = (
        fixed(503).await,
        Mock::completing().await,
        Mock::completing().await,
    );
    let mut settings = concurrent(vec![], vec![decode.url()]);
    settings.cooldown = Duration::from_secs(600);
    let with_port =
        |mock: &Mock, port: u16| UpstreamAddress::parse(&format!("http://{}={port}", mock.address)).unwrap();
    settings.prefill = vec![with_port(&failing, 1), with_port(&prefill, 2)];
    let proxy = Running::start(settings).await;
    let failures = r#"kvlane_proxy_fallbacks_total{reason="failed"}"#;
    text(proxy.complete("{}").await).await;
    proxy.metric_reaches(failures, 1.0).await;
    for _ in 0..5 {
        text(proxy.complete("{}").await).await;
    }
    proxy
        .metric_reaches(r#"kvlane_proxy_stage_seconds_count{stage="prefill"}"#, 5.0)
        .await;
    assert_eq!((failing.calls().len(), prefill.calls().len()), (1, 5));
    let asked: Vec<u16> = decode
        .calls()
        .iter()
        .map(|call| {
            TransferAddresses::parse(call.header("x-request-id"))
                .unwrap()
                .prefill
                .1
        })
        .collect();
    assert_eq!(asked, [1, 2, 2, 2, 2, 2]);
}

#[tokio::test]
async fn without_a_prefill_to_call_the_id_names_none() {
    let decode = Mock::completing().await;
    let mut settings = concurrent(vec![dead_address()], vec![decode.url()]);
    settings.cooldown = Duration::from_secs(600);
    let proxy = Running::start(settings).await;
    let series = r#"kvlane_proxy_fallbacks_total{reason="unreachable"}"#;
    text(proxy.complete("{}").await).await;
    proxy.metric_reaches(series, 1.0).await;
    let response = proxy.complete("{}").await;
    assert_eq!(response.headers()["x-kvlane-prefill"], "unreachable");
    text(response).await;
    proxy.metric_reaches(series, 2.0).await;
    let id = |at: usize| decode.calls()[at].header("x-request-id").to_owned();
    assert!(TransferAddresses::parse(&id(0)).is_some());
    assert_eq!(
        TransferAddresses::parse(&id(1)),
        None,
        "decode must not ask in vain"
    );
}

#[tokio::test]
async fn a_decode_that_refuses_or_fails_is_the_answer_and_ends_prefill_with_its_head() {
    for status in [400, 404, 429, 500, 503] {
        let (prefill, begun, gone) = endless().await;
        let (feed, body) = Fed::new();
        let body = Arc::new(Mutex::new(Some(body)));
        let decode = Mock::start(move |_call| {
            let (begun, body) = (begun.clone(), body.clone());
            async move {
                soon(&begun).await;
                let body = Body::new(body.lock().unwrap().take().unwrap());
                Response::builder().status(status).body(body).unwrap()
            }
        })
        .await;
        let proxy = Running::start(between(&prefill, &decode)).await;
        let response = proxy.complete("{}").await;
        assert_eq!(response.status(), status);
        // The rest of decode's answer may take its time.
        soon(&gone).await;
        feed.send(Ok(Bytes::from_static(b"no"))).unwrap();
        drop(feed);
        assert_eq!(text(response).await, "no");
    }
}

#[tokio::test]
async fn a_decode_that_does_not_answer_in_time_is_a_504_and_ends_prefill() {
    let (prefill, _begun, prefill_gone) = endless().await;
    let (decode, _begun, decode_gone) = endless().await;
    let mut settings = between(&prefill, &decode);
    settings.first_byte_timeout = Duration::from_millis(200);
    let proxy = Running::start(settings).await;
    let response = proxy.complete("{}").await;
    assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(error_of(response).await["stage"], "decode");
    soon(&prefill_gone).await;
    soon(&decode_gone).await;
    proxy.metric_reaches("kvlane_proxy_in_flight", 0.0).await;
}

#[tokio::test]
async fn a_decode_that_cannot_be_reached_is_a_502_and_leaves_no_work_at_prefill() {
    let (prefill, _begun, _gone) = endless().await;
    let mut settings = concurrent(vec![prefill.url()], vec![dead_address()]);
    settings.in_flight_limit = 1;
    let proxy = Running::start(settings).await;
    let response = proxy.complete("{}").await;
    assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
    error_of(response).await;
    // The slot is free only when prefill's call, if it was sent at all, has ended.
    let free = async {
        while proxy.complete("{}").await.status() != StatusCode::BAD_GATEWAY {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), free)
        .await
        .expect("prefill's call ends");
}

#[tokio::test]
async fn another_decode_takes_over_under_the_id_that_prefill_has() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let mut settings = concurrent(vec![prefill.url()], vec![dead_address(), decode.url()]);
    // None is passed over, so that the dead one is tried in every second of these.
    settings.cooldown = Duration::ZERO;
    let proxy = Running::start(settings).await;
    for _ in 0..6 {
        assert_eq!(text(proxy.complete("{}").await).await, ANSWER);
    }
    proxy
        .metric_reaches(r#"kvlane_proxy_stage_seconds_count{stage="prefill"}"#, 6.0)
        .await;
    let ids = |mock: &Mock| -> HashSet<String> {
        let calls = mock.calls();
        calls
            .iter()
            .map(|call| call.header("x-request-id").to_owned())
            .collect()
    };
    assert_eq!(ids(&prefill).len(), 6);
    assert_eq!(ids(&prefill), ids(&decode));
}

#[tokio::test]
async fn a_decode_that_breaks_off_does_not_look_whole_and_ends_prefill() {
    let (prefill, begun, gone) = endless().await;
    let decode = StreamingMock::start().await;
    let proxy = Running::start(between(&prefill, &decode.mock)).await;
    let (feed, _gone) = decode.next_body();
    feed.send(Ok(Bytes::from_static(b"data: 0\n\n"))).unwrap();
    let mut body = proxy.complete(STREAM).await.into_body();
    assert_eq!(next_chunk(&mut body).await.unwrap().unwrap(), "data: 0\n\n");
    soon(&begun).await;
    feed.send(Err("the engine died")).unwrap();
    next_chunk(&mut body).await.expect("no clean end").unwrap_err();
    soon(&gone).await;
    proxy.metric_reaches("kvlane_proxy_broken_total", 1.0).await;
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_ends_both_calls() {
    let (prefill, prefill_begun, prefill_gone) = endless().await;
    let (decode, decode_begun, decode_gone) = endless().await;
    let proxy = Running::start(between(&prefill, &decode)).await;
    tokio::select! {
        _response = proxy.complete(STREAM) => panic!("neither answers"),
        () = async { soon(&prefill_begun).await; soon(&decode_begun).await } => {}
    }
    soon(&prefill_gone).await;
    soon(&decode_gone).await;
    proxy
        .metric_reaches(r#"kvlane_proxy_cancelled_total{stage="decode"}"#, 1.0)
        .await;
    proxy.metric_reaches("kvlane_proxy_in_flight", 0.0).await;
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_the_answer_ends_both_calls() {
    let (prefill, begun, prefill_gone) = endless().await;
    let decode = StreamingMock::start().await;
    let proxy = Running::start(between(&prefill, &decode.mock)).await;
    let (feed, decode_gone) = decode.next_body();
    feed.send(Ok(Bytes::from_static(b"data: 0\n\n"))).unwrap();
    let mut body = proxy.complete(STREAM).await.into_body();
    next_chunk(&mut body).await.unwrap().unwrap();
    soon(&begun).await;
    drop(body);
    soon(&prefill_gone).await;
    soon(&decode_gone).await;
    proxy.metric_reaches("kvlane_proxy_in_flight", 0.0).await;
}

#[tokio::test]
async fn a_prefill_that_outlasts_decodes_answer_is_given_up_and_counts_as_in_flight_until_then() {
    let (prefill, begun, gone) = endless().await;
    let decode = fixed_after(&begun, 200).await;
    let mut settings = between(&prefill, &decode);
    settings.in_flight_limit = 1;
    let proxy = Running::start(settings).await;
    assert_eq!(text(proxy.complete("{}").await).await, "{}");
    proxy.metric_reaches("kvlane_proxy_in_flight", 0.0).await;
    let refused = proxy.complete("{}").await;
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    soon(&gone).await;
    let served = async {
        while proxy.complete("{}").await.status() != StatusCode::OK {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), served)
        .await
        .expect("the slot came back");
}

#[tokio::test]
async fn a_request_that_cannot_be_sent_on_reaches_neither() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let mut settings = between(&prefill, &decode);
    settings.body_limit_bytes = 10;
    let proxy = Running::start(settings).await;
    assert_eq!(proxy.complete("[1]").await.status(), StatusCode::BAD_REQUEST);
    let large = proxy.complete(r#"{"prompt":"long"}"#).await;
    assert_eq!(large.status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert!(prefill.calls().is_empty() && decode.calls().is_empty());
}

#[test]
fn servers_of_which_decode_could_reach_only_one_and_folders_at_once_are_refused() {
    let server = |text: &str| UpstreamAddress::parse(text).unwrap();
    let decode = || vec![server("http://a:3")];
    let refused = |settings| Proxy::new(settings).err().map(|error| error.to_string());
    let same = refused(concurrent(
        vec![server("http://a:1"), server("http://b:2"), server("http://a:2")],
        decode(),
    ))
    .unwrap();
    assert!(
        same.contains("a:1 and a:2 have the same KV address a:14579"),
        "{same}"
    );
    for fine in [
        vec![server("http://a:1=1"), server("http://a:2=2")],
        vec![server("http://a:1"), server("http://a:1")],
    ] {
        assert_eq!(refused(concurrent(fine, decode())), None);
    }
    let mut folder = concurrent(decode(), decode());
    folder.backend = KvBackend::Fs;
    assert!(matches!(
        Proxy::new(folder).err(),
        Some(ConfigError::ConcurrentFolder)
    ));
}
