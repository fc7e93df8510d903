//! Guards: a stream that is held back, an answer that breaks off and looks whole, a client that leaves and is still served,
//! a shutdown that cuts answers.

mod support;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::{Request, StatusCode};
use kvlane_proxy::ServeError;
use support::{Gone, Mock, PATIENCE, Running, StreamingMock, config, json, next_chunk, post, soon, text};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;

const STREAM: &str = r#"{"prompt":"x","stream":true}"#;

fn piece(text: &'static str) -> Result<Bytes, &'static str> {
    Ok(Bytes::from_static(text.as_bytes()))
}

#[tokio::test]
async fn every_chunk_reaches_the_client_before_the_server_sends_the_next() {
    let (prefill, decode) = (Mock::completing().await, StreamingMock::start().await);
    let proxy = Running::between(&prefill, &decode.mock).await;
    let (feed, _gone) = decode.next_body();
    feed.send(piece("data: 0\n\n")).unwrap();
    let response = proxy.complete(STREAM).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    assert_eq!(response.headers()["x-kvlane-prefill"], "done");
    let mut body = response.into_body();
    assert_eq!(next_chunk(&mut body).await.unwrap().unwrap(), "data: 0\n\n");
    for chunk in ["data: 1\n\n", "data: [DONE]\n\n"] {
        feed.send(piece(chunk)).unwrap();
        assert_eq!(next_chunk(&mut body).await.unwrap().unwrap(), chunk);
    }
    drop(feed);
    assert!(next_chunk(&mut body).await.is_none());
    proxy
        .metric_reaches("kvlane_proxy_time_to_first_token_seconds_count", 1.0)
        .await;
    proxy
        .metric_reaches(r#"kvlane_proxy_stage_seconds_count{stage="decode"}"#, 1.0)
        .await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_does_not_look_whole() {
    let (prefill, decode) = (Mock::completing().await, StreamingMock::start().await);
    let proxy = Running::between(&prefill, &decode.mock).await;
    let (feed, _gone) = decode.next_body();
    feed.send(piece("data: 0\n\n")).unwrap();
    let mut body = proxy.complete(STREAM).await.into_body();
    assert_eq!(next_chunk(&mut body).await.unwrap().unwrap(), "data: 0\n\n");
    feed.send(Err("the engine died")).unwrap();
    next_chunk(&mut body).await.expect("no clean end").unwrap_err();
    proxy.metric_reaches("kvlane_proxy_broken_total", 1.0).await;
    proxy.metric_reaches("kvlane_proxy_in_flight", 0.0).await;
}

#[tokio::test]
async fn a_server_that_falls_silent_is_given_up() {
    let (prefill, decode) = (Mock::completing().await, StreamingMock::start().await);
    let mut settings = config(&prefill, &decode.mock);
    settings.idle_timeout = Duration::from_millis(50);
    let proxy = Running::start(settings).await;
    let (feed, gone) = decode.next_body();
    feed.send(piece("data: 0\n\n")).unwrap();
    let mut body = proxy.complete(STREAM).await.into_body();
    assert_eq!(next_chunk(&mut body).await.unwrap().unwrap(), "data: 0\n\n");
    next_chunk(&mut body).await.expect("no clean end").unwrap_err();
    soon(&gone).await;
}

#[tokio::test]
async fn a_client_that_leaves_during_decode_ends_decode() {
    let (prefill, decode) = (Mock::completing().await, StreamingMock::start().await);
    let proxy = Running::between(&prefill, &decode.mock).await;
    let (feed, gone) = decode.next_body();
    feed.send(piece("data: 0\n\n")).unwrap();
    let mut body = proxy.complete(STREAM).await.into_body();
    next_chunk(&mut body).await.unwrap().unwrap();
    drop(body);
    soon(&gone).await;
    proxy
        .metric_reaches(r#"kvlane_proxy_cancelled_total{stage="decode"}"#, 1.0)
        .await;
    proxy.metric_reaches("kvlane_proxy_in_flight", 0.0).await;
}

#[tokio::test]
async fn a_client_that_takes_nothing_of_its_answer_is_given_up() {
    let (prefill, decode) = (Mock::completing().await, StreamingMock::start().await);
    let mut settings = config(&prefill, &decode.mock);
    settings.client_stall_timeout = Duration::from_millis(200);
    let proxy = Running::start(settings).await;
    let (feed, gone) = decode.next_body();
    let mut client = TcpStream::connect(proxy.address).await.unwrap();
    client
        .write_all(b"POST /v1/completions HTTP/1.1\r\nhost: p\r\ncontent-length: 2\r\n\r\n{}")
        .await
        .unwrap();
    // More than the buffers of all sockets between the two hold.
    for _ in 0..64 {
        feed.send(Ok(Bytes::from(vec![b'x'; 1 << 20]))).unwrap();
    }
    soon(&gone).await;
    proxy.metric_reaches("kvlane_proxy_in_flight", 0.0).await;
    drop(client);
}

#[tokio::test]
async fn a_client_that_leaves_during_prefill_ends_prefill_and_decode_is_never_called() {
    let (begun, gone) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (tell_begun, tell_gone) = (begun.clone(), gone.clone());
    let prefill = Mock::start(move |_call| {
        let guard = Gone(tell_gone.clone());
        tell_begun.notify_one();
        async move {
            let _guard = guard;
            std::future::pending().await
        }
    })
    .await;
    let decode = Mock::completing().await;
    let proxy = Running::between(&prefill, &decode).await;
    tokio::select! {
        _response = proxy.complete(STREAM) => panic!("prefill never answers"),
        () = soon(&begun) => {}
    }
    soon(&gone).await;
    proxy
        .metric_reaches(r#"kvlane_proxy_cancelled_total{stage="prefill"}"#, 1.0)
        .await;
    proxy.metric_reaches("kvlane_proxy_in_flight", 0.0).await;
    assert!(decode.calls().is_empty());
    let left = r#"kvlane_proxy_requests_total{route="/v1/completions",code="499"}"#;
    assert!((proxy.metric(left).await - 1.0).abs() < 1e-9);
}

#[tokio::test]
async fn a_stop_finishes_the_answers_that_were_begun() {
    let (prefill, decode) = (Mock::completing().await, StreamingMock::start().await);
    let mut proxy = Running::between(&prefill, &decode.mock).await;
    let (feed, _gone) = decode.next_body();
    feed.send(piece("data: 0\n\n")).unwrap();
    let mut body = proxy.complete(STREAM).await.into_body();
    next_chunk(&mut body).await.unwrap().unwrap();
    proxy.ask_to_stop();
    let refused = tokio::time::timeout(PATIENCE, async {
        while TcpStream::connect(proxy.address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    });
    refused.await.expect("no further connection is taken");
    feed.send(piece("data: [DONE]\n\n")).unwrap();
    drop(feed);
    assert_eq!(next_chunk(&mut body).await.unwrap().unwrap(), "data: [DONE]\n\n");
    assert!(next_chunk(&mut body).await.is_none());
    proxy.stopped().await.unwrap();
}

#[tokio::test]
async fn a_stop_serves_a_request_whose_body_is_still_arriving() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let mut proxy = Running::between(&prefill, &decode).await;
    let mut client = TcpStream::connect(proxy.address).await.unwrap();
    client
        .write_all(b"POST /v1/completions HTTP/1.1\r\nhost: p\r\ncontent-length: 14\r\n\r\n{\"prompt\"")
        .await
        .unwrap();
    proxy.metric_reaches("kvlane_proxy_in_flight", 1.0).await;
    proxy.ask_to_stop();
    client.write_all(b":\"x\"}").await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, client.read_to_string(&mut answer))
        .await
        .expect("it is answered")
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.to_lowercase().contains("connection: close"), "{answer}");
    proxy.stopped().await.unwrap();
    assert_eq!(decode.only_call().body, "{\"prompt\":\"x\"}");
}

#[tokio::test]
async fn a_stop_waits_no_longer_than_the_drain_time() {
    let (prefill, decode) = (Mock::completing().await, StreamingMock::start().await);
    let mut settings = config(&prefill, &decode.mock);
    settings.drain_timeout = Duration::from_millis(50);
    let mut proxy = Running::start(settings).await;
    let (feed, gone) = decode.next_body();
    feed.send(piece("data: 0\n\n")).unwrap();
    let mut body = proxy.complete(STREAM).await.into_body();
    next_chunk(&mut body).await.unwrap().unwrap();
    proxy.ask_to_stop();
    assert!(matches!(
        proxy.stopped().await,
        Err(ServeError::CutOff {
            connections: 1,
            waited_ms: 50
        })
    ));
    next_chunk(&mut body).await.expect("no clean end").unwrap_err();
    soon(&gone).await;
}

#[tokio::test]
async fn other_routes_pass_through_to_decode_in_both_directions() {
    let prefill = Mock::completing().await;
    let decode = Mock::start(async |call| {
        assert_eq!(call.header("x-request-id"), "client-7");
        let mut response = json(StatusCode::CREATED, &format!("{} {}", call.method, call.uri));
        response.headers_mut().insert("x-special", "1".parse().unwrap());
        response
            .headers_mut()
            .insert("keep-alive", "timeout=5".parse().unwrap());
        response
    })
    .await;
    let proxy = Running::between(&prefill, &decode).await;
    let get = Request::get("/v1/models?x=1")
        .header("x-request-id", "client-7")
        .body(Body::empty())
        .unwrap();
    let response = proxy.send(get).await;
    assert_eq!(response.status(), StatusCode::CREATED);
    assert_eq!(response.headers()["x-special"], "1");
    assert_eq!(response.headers()["x-request-id"], "client-7");
    assert!(!response.headers().contains_key("keep-alive"));
    assert_eq!(text(response).await, "GET /v1/models?x=1");
    let mut tokenize = post("/tokenize", "raw \u{0} bytes");
    tokenize
        .headers_mut()
        .insert("x-request-id", "client-7".parse().unwrap());
    assert_eq!(text(proxy.send(tokenize).await).await, "POST /tokenize");
    assert_eq!(decode.calls()[1].body, "raw \u{0} bytes");
    assert!(prefill.calls().is_empty());
}
