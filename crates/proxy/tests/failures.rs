//! Guards: a wrong status, a lost request when decode could have served it, memory or waits without a bound.

#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]

mod support;

use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use kvlane_proxy::request_id::TransferAddresses;
use kvlane_proxy::{ConfigError, KvBackend, Proxy, ProxyConfig};
use support::{Fed, Mock, Running, StreamingMock, config, dead_address, error_of, json, post, text};

async fn fixed(status: u16, body: &'static str) -> Mock {
    Mock::start(move |_call| async move {
        let mut response = json(StatusCode::from_u16(status).unwrap(), body);
        response.headers_mut().insert("retry-after", "7".parse().unwrap());
        response
    })
    .await
}

/// One request whose prefill fails must be served by decode, and say so.
async fn falls_back(settings: ProxyConfig, decode: &Mock, reason: &str) {
    let proxy = Running::start(settings).await;
    let response = proxy.complete(r#"{"prompt":"x"}"#).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["x-kvlane-prefill"], reason);
    assert_eq!(text(response).await, r#"{"choices":[{"text":"x"}]}"#);
    let call = decode.only_call();
    assert_eq!(call.body, r#"{"prompt":"x"}"#);
    assert_eq!(
        TransferAddresses::parse(call.header("x-request-id")),
        None,
        "decode must not wait for KV"
    );
    let series = format!(r#"kvlane_proxy_fallbacks_total{{reason="{reason}"}}"#);
    proxy.metric_reaches(&series, 1.0).await;
}

#[tokio::test]
async fn a_prefill_that_cannot_be_reached_costs_no_request() {
    let decode = Mock::completing().await;
    let settings = ProxyConfig::new(vec![dead_address()], vec![decode.url()], KvBackend::Fs);
    falls_back(settings, &decode, "unreachable").await;
}

#[tokio::test]
async fn a_prefill_that_answers_5xx_costs_no_request() {
    let (prefill, decode) = (fixed(503, "{}").await, Mock::completing().await);
    falls_back(config(&prefill, &decode), &decode, "failed").await;
}

#[tokio::test]
async fn a_prefill_that_is_too_busy_costs_no_request() {
    for status in [408, 429] {
        let (prefill, decode) = (fixed(status, "{}").await, Mock::completing().await);
        falls_back(config(&prefill, &decode), &decode, "failed").await;
    }
}

#[tokio::test]
async fn another_prefill_takes_over_from_one_that_fails_and_gets_the_next_requests_too() {
    for status in [429, 500, 503] {
        let (failing, prefill, decode) = (
            fixed(status, "{}").await,
            Mock::completing().await,
            Mock::completing().await,
        );
        let mut settings = config(&failing, &decode);
        settings.prefill.push(prefill.url());
        settings.cooldown = Duration::from_secs(600);
        let proxy = Running::start(settings).await;
        for _ in 0..6 {
            assert_eq!(proxy.complete("{}").await.headers()["x-kvlane-prefill"], "done");
        }
        assert_eq!((failing.calls().len(), prefill.calls().len()), (1, 6), "{status}");
        for (first, second) in prefill.calls().iter().zip(&decode.calls()) {
            assert_eq!(first.header("x-request-id"), second.header("x-request-id"));
        }
    }
}

#[tokio::test]
async fn a_request_that_fails_everywhere_reaches_two_prefills_and_no_more() {
    let failing = [
        fixed(500, "{}").await,
        fixed(500, "{}").await,
        fixed(500, "{}").await,
    ];
    let decode = Mock::completing().await;
    let mut settings = config(&failing[0], &decode);
    settings.prefill = failing.iter().map(Mock::url).collect();
    falls_back(settings, &decode, "failed").await;
    let calls: usize = failing.iter().map(|prefill| prefill.calls().len()).sum();
    assert_eq!(calls, 2);
}

#[tokio::test]
async fn the_next_requests_go_past_a_decode_that_fails() {
    for status in [429, 500, 503] {
        let (prefill, failing, decode) = (
            Mock::completing().await,
            fixed(status, "{}").await,
            Mock::completing().await,
        );
        let mut settings = config(&prefill, &failing);
        settings.decode.push(decode.url());
        settings.cooldown = Duration::from_secs(600);
        let proxy = Running::start(settings).await;
        for number in 0..8 {
            if number % 2 == 0 {
                text(proxy.complete("{}").await).await;
            } else {
                text(proxy.get("/v1/models").await).await;
            }
        }
        assert_eq!((failing.calls().len(), decode.calls().len()), (1, 7), "{status}");
    }
}

#[tokio::test]
async fn a_prefill_that_never_answers_costs_no_request() {
    let (prefill, decode) = (
        Mock::start(async |_call| std::future::pending().await).await,
        Mock::completing().await,
    );
    let mut settings = config(&prefill, &decode);
    settings.prefill_timeout = Duration::from_millis(50);
    falls_back(settings, &decode, "timeout").await;
}

#[tokio::test]
async fn a_prefill_whose_answer_stalls_half_way_costs_no_request() {
    let (prefill, decode) = (StreamingMock::start().await, Mock::completing().await);
    let (feed, _gone) = prefill.next_body();
    feed.send(Ok(Bytes::from_static(b"{"))).unwrap();
    let mut settings = config(&prefill.mock, &decode);
    settings.prefill_timeout = Duration::from_millis(50);
    falls_back(settings, &decode, "timeout").await;
}

#[tokio::test]
async fn a_prefill_that_breaks_off_costs_no_request() {
    let (prefill, decode) = (StreamingMock::start().await, Mock::completing().await);
    let (feed, _gone) = prefill.next_body();
    feed.send(Ok(Bytes::from_static(b"{"))).unwrap();
    feed.send(Err("the engine died")).unwrap();
    falls_back(config(&prefill.mock, &decode), &decode, "broken").await;
}

#[tokio::test]
async fn another_prefill_takes_over_from_one_that_cannot_be_reached() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let mut settings = config(&prefill, &decode);
    settings.prefill = vec![dead_address(), prefill.url(), dead_address()];
    let proxy = Running::start(settings).await;
    for _ in 0..6 {
        assert_eq!(proxy.complete("{}").await.headers()["x-kvlane-prefill"], "done");
    }
    for (first, second) in prefill.calls().iter().zip(&decode.calls()) {
        assert_eq!(first.header("x-request-id"), second.header("x-request-id"));
        let addresses = TransferAddresses::parse(first.header("x-request-id")).unwrap();
        assert_eq!(
            addresses.prefill.1,
            prefill.address.port(),
            "the id names the server that computed"
        );
    }
}

#[tokio::test]
async fn another_decode_takes_over_from_one_that_cannot_be_reached() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let mut settings = config(&prefill, &decode);
    settings.decode.push(dead_address());
    let proxy = Running::start(settings).await;
    for _ in 0..6 {
        assert_eq!(proxy.complete("{}").await.status(), StatusCode::OK);
    }
}

#[tokio::test]
async fn another_decode_takes_over_what_passes_through_with_the_whole_body() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let mut settings = config(&prefill, &decode);
    settings.decode.push(dead_address());
    // None is passed over, so that the dead one is tried in every second of these.
    settings.cooldown = Duration::ZERO;
    let proxy = Running::start(settings).await;
    for _ in 0..6 {
        assert_eq!(proxy.get("/v1/models").await.status(), StatusCode::OK);
        let response = proxy.send(post("/v1/embeddings", "{\"input\":\"x\"}")).await;
        assert_eq!(response.status(), StatusCode::OK);
        let (feed, body) = Fed::new();
        for piece in ["one ", "two"] {
            feed.send(Ok(Bytes::from(piece))).unwrap();
        }
        drop(feed);
        let request = Request::post("/tokenize").body(Body::new(body)).unwrap();
        assert_eq!(proxy.send(request).await.status(), StatusCode::OK);
    }
    for call in decode.calls() {
        let expected = match call.uri.path() {
            "/v1/models" => "",
            "/tokenize" => "one two",
            _ => "{\"input\":\"x\"}",
        };
        assert_eq!(call.body, expected, "{}", call.uri);
    }
}

#[tokio::test]
async fn a_request_that_prefill_refuses_is_refused_with_prefills_words() {
    for status in [400, 401, 404, 422] {
        let (prefill, decode) = (
            fixed(status, r#"{"error":{"message":"no"}}"#).await,
            Mock::completing().await,
        );
        let proxy = Running::between(&prefill, &decode).await;
        let response = proxy.complete("{}").await;
        assert_eq!(response.status(), status);
        assert_eq!(response.headers()["retry-after"], "7");
        assert_eq!(response.headers()["x-kvlane-prefill"], "refused");
        assert_eq!(text(response).await, r#"{"error":{"message":"no"}}"#);
        assert!(decode.calls().is_empty());
    }
}

#[tokio::test]
async fn decodes_status_body_and_headers_are_the_answer() {
    for status in [400, 404, 429, 500, 503] {
        let (prefill, decode) = (
            Mock::completing().await,
            fixed(status, r#"{"error":{"message":"no"}}"#).await,
        );
        let proxy = Running::between(&prefill, &decode).await;
        let response = proxy.complete("{}").await;
        assert_eq!(response.status(), status);
        assert_eq!(response.headers()["retry-after"], "7");
        assert_eq!(text(response).await, r#"{"error":{"message":"no"}}"#);
    }
}

#[tokio::test]
async fn a_decode_that_cannot_be_reached_is_a_502() {
    let prefill = Mock::completing().await;
    let settings = ProxyConfig::new(vec![prefill.url()], vec![dead_address()], KvBackend::Fs);
    let proxy = Running::start(settings).await;
    for path in ["/v1/completions", "/v1/embeddings"] {
        let response = proxy.send(post(path, "{}")).await;
        assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
        let error = error_of(response).await;
        assert_eq!((&error["code"], &error["stage"]), (&502.into(), &"decode".into()));
        assert!(
            error["message"].as_str().unwrap().contains("cannot be reached"),
            "{error}"
        );
        assert!(error["type"].is_string() && error.get("param").is_some_and(|param| param.is_null()));
    }
}

#[tokio::test]
async fn a_decode_that_dies_before_its_head_is_a_502() {
    // Takes connections and closes them with the request unanswered.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = support::url(listener.local_addr().unwrap());
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.readable().await.unwrap();
        }
    });
    let prefill = Mock::completing().await;
    let proxy = Running::start(ProxyConfig::new(
        vec![prefill.url()],
        vec![address],
        KvBackend::Fs,
    ))
    .await;
    let response = proxy.complete("{}").await;
    assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(error_of(response).await["stage"], "decode");
    task.abort();
}

#[tokio::test]
async fn a_decode_that_does_not_answer_in_time_is_a_504() {
    let (prefill, decode) = (
        Mock::completing().await,
        Mock::start(async |_call| std::future::pending().await).await,
    );
    let mut settings = config(&prefill, &decode);
    settings.first_byte_timeout = Duration::from_millis(50);
    let proxy = Running::start(settings).await;
    let response = proxy.complete("{}").await;
    assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(error_of(response).await["code"], 504);
}

#[tokio::test]
async fn a_body_that_is_no_json_object_is_a_400_and_goes_nowhere() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let proxy = Running::between(&prefill, &decode).await;
    for body in ["", "{", "[1]", "\"text\"", "{\"prompt\":}"] {
        let response = proxy.complete(body).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(error_of(response).await["type"], "invalid_request_error");
    }
    assert!(prefill.calls().is_empty() && decode.calls().is_empty());
}

#[tokio::test]
async fn a_body_over_the_limit_is_a_413_whether_or_not_its_length_was_told() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let mut settings = config(&prefill, &decode);
    settings.body_limit_bytes = 1000;
    let proxy = Running::start(settings).await;
    let exact = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(1000 - 13));
    assert_eq!(exact.len(), 1000);
    assert_eq!(proxy.complete(&exact).await.status(), StatusCode::OK);
    for path in ["/v1/completions", "/v1/embeddings"] {
        let response = proxy.send(post(path, &format!("{exact} "))).await;
        assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
        assert_eq!(error_of(response).await["code"], 413);
        let (feed, body) = Fed::new();
        for _ in 0..3 {
            feed.send(Ok(Bytes::from(vec![b' '; 400]))).unwrap();
        }
        drop(feed);
        let response = proxy
            .send(Request::post(path).body(Body::new(body)).unwrap())
            .await;
        assert_eq!(
            response.status(),
            StatusCode::PAYLOAD_TOO_LARGE,
            "{path}, chunked"
        );
    }
    assert_eq!((prefill.calls().len(), decode.calls().len()), (1, 1));
}

#[tokio::test]
async fn a_body_that_does_not_arrive_is_a_408() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let mut settings = config(&prefill, &decode);
    settings.client_body_timeout = Duration::from_millis(50);
    let proxy = Running::start(settings).await;
    for path in ["/v1/completions", "/v1/embeddings"] {
        for begun in [false, true] {
            let (feed, body) = Fed::new();
            if begun {
                feed.send(Ok(Bytes::from_static(b"{"))).unwrap();
            }
            let response = proxy
                .send(Request::post(path).body(Body::new(body)).unwrap())
                .await;
            assert_eq!(
                response.status(),
                StatusCode::REQUEST_TIMEOUT,
                "{path}, begun: {begun}"
            );
            let error = error_of(response).await;
            assert_eq!(
                error["type"], "invalid_request_error",
                "not decode's fault: {error}"
            );
        }
    }
    proxy.metric_reaches("kvlane_proxy_in_flight", 0.0).await;
}

#[tokio::test]
async fn a_body_that_arrives_slowly_but_steadily_passes() {
    // On a busy machine the time between two pieces may be longer than it should, by seconds.
    for timeout_ms in [400, 400, 1000, 4000, 4000] {
        let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
        let mut settings = config(&prefill, &decode);
        settings.client_body_timeout = Duration::from_millis(timeout_ms);
        let proxy = Running::start(settings).await;
        let (feed, body) = Fed::new();
        let pieces = tokio::spawn(async move {
            for _ in 0..6 {
                tokio::time::sleep(Duration::from_millis(timeout_ms / 4)).await;
                if feed.send(Ok(Bytes::from_static(b"x"))).is_err() {
                    return;
                }
            }
        });
        let response = proxy
            .send(Request::post("/v1/embeddings").body(Body::new(body)).unwrap())
            .await;
        if response.status() == StatusCode::REQUEST_TIMEOUT {
            continue;
        }
        assert_eq!(response.status(), StatusCode::OK);
        pieces.await.unwrap();
        assert_eq!(decode.only_call().body, "xxxxxx");
        return;
    }
    panic!("it never passes");
}

#[tokio::test]
async fn requests_beyond_the_bound_are_told_to_come_back() {
    let (prefill, decode) = (Mock::completing().await, StreamingMock::start().await);
    let mut settings = config(&prefill, &decode.mock);
    settings.in_flight_limit = 1;
    let proxy = Running::start(settings).await;
    let (feed, _gone) = decode.next_body();
    let held = proxy.complete("{}").await;
    let response = proxy.complete("{}").await;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(error_of(response).await["code"], 503);
    drop(feed);
    text(held).await;
    proxy.metric_reaches("kvlane_proxy_in_flight", 0.0).await;
    decode.next_body();
    assert_eq!(
        proxy.complete("{}").await.status(),
        StatusCode::OK,
        "the slot came back"
    );
}

#[tokio::test]
async fn paths_and_methods_that_are_not_served_say_so() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let proxy = Running::between(&prefill, &decode).await;
    for path in [
        "/",
        "/sleep",
        "/reset_prefix_cache",
        "/collective_rpc",
        "/v1/load_lora_adapter",
        "/v1/load_lora_adapter/",
        "/v1/load%5Flora_adapter",
        "/v1/%6coad_lora_adapter?x=1",
        "/v1%2Fload_lora_adapter",
        "/%76%31/unload_lora_adapter",
        "/v1/../sleep",
        "/v1/%2e%2E/sleep",
        "/v1/./load_lora_adapter",
        "/v1//load_lora_adapter",
    ] {
        let response = proxy.send(post(path, "{}")).await;
        assert_eq!(response.status(), StatusCode::NOT_FOUND, "{path}");
        let error = error_of(response).await;
        assert_eq!(error["code"], 404);
        let named = format!("the path {} is not", path.trim_end_matches("?x=1"));
        assert!(error["message"].as_str().unwrap().contains(&named), "{error}");
    }
    let response = proxy.get("/v1/completions").await;
    assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(response.headers()["allow"], "POST");
    let error = error_of(response).await;
    assert_eq!(error["code"], 405);
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("/v1/completions does not take GET"),
        "{error}"
    );
    assert!(prefill.calls().is_empty() && decode.calls().is_empty());
    for path in ["/v1/responses/resp_1", "/tokeni%7Ae", "/v1/embeddings/"] {
        let response = proxy.send(post(path, "{}")).await;
        assert_eq!(response.status(), StatusCode::OK, "{path}");
    }
    assert_eq!(decode.calls()[1].uri, "/tokeni%7Ae", "sent on as it came");
}

#[tokio::test]
async fn health_is_that_of_the_servers() {
    let up = Mock::start(async |_call| Response::new(Body::empty())).await;
    let sick = fixed(500, "{}").await;
    let dead = dead_address();
    for (prefill, decode, status, word) in [
        (vec![up.url()], vec![up.url()], 200, "ok"),
        (vec![dead.clone()], vec![up.url()], 200, "degraded"),
        (vec![sick.url()], vec![dead.clone(), up.url()], 200, "degraded"),
        (vec![up.url()], vec![sick.url()], 503, "down"),
        (vec![up.url()], vec![dead.clone()], 503, "down"),
    ] {
        let proxy = Running::start(ProxyConfig::new(prefill.clone(), decode.clone(), KvBackend::Fs)).await;
        let response = proxy.get("/health").await;
        assert_eq!(response.status(), status, "{prefill:?} {decode:?}");
        let page: serde_json::Value = serde_json::from_str(&text(response).await).unwrap();
        assert_eq!(page["status"], word);
        assert_eq!(page["decode"].as_array().unwrap().len(), decode.len());
        assert_eq!(page["prefill"][0]["healthy"], prefill[0] == up.url());
    }
    assert!(up.calls().iter().all(|call| call.uri == "/health"));
}

#[tokio::test]
async fn a_proxy_that_could_serve_nothing_does_not_start() {
    let server = dead_address();
    let refused = |settings| Proxy::new(settings).err();
    let no_decode = ProxyConfig::new(vec![server.clone()], vec![], KvBackend::Fs);
    assert!(matches!(
        refused(no_decode),
        Some(ConfigError::NoServer("decode"))
    ));
    let mut no_room = ProxyConfig::new(vec![server.clone()], vec![server], KvBackend::Fs);
    no_room.in_flight_limit = 0;
    assert!(matches!(
        refused(no_room),
        Some(ConfigError::Zero("in_flight_limit"))
    ));
}
