//! Guards: the wrong body, id or header on one of the two calls, which makes decode wait for, or use, the wrong KV.

mod support;

use axum::body::Body;
use http::{Request, StatusCode};
use kvlane_proxy::request_id::TransferAddresses;
use kvlane_proxy::{KvBackend, ProxyConfig, UpstreamAddress};
use serde_json::json;
use support::{Mock, Running, config, json, post, text};

const BODY: &str = r#"{ "model":"m", "prompt":["a","b\u00e9"], "n":2, "max_tokens":64, "min_tokens":8,
  "stream":true, "stream_options":{"include_usage":true}, "temperature":0.10, "seed":7 }"#;

#[tokio::test]
async fn prefill_gets_one_token_of_the_same_prompts_and_decode_the_exact_bytes() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let proxy = Running::between(&prefill, &decode).await;
    let response = proxy.complete(BODY).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(text(response).await, r#"{"choices":[{"text":"x"}]}"#);
    assert_eq!(
        prefill.only_call().json(),
        json!({"model":"m","prompt":["a","bé"],"n":2,"max_tokens":1,"stream":false,"temperature":0.1,"seed":7})
    );
    assert_eq!(decode.only_call().body, BODY.as_bytes());
}

#[tokio::test]
async fn chat_limits_both_names_of_the_token_limit_for_prefill() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let proxy = Running::between(&prefill, &decode).await;
    let body = r#"{"messages":[{"role":"user","content":"hi"}],"max_completion_tokens":50,"n":3}"#;
    let response = proxy.send(post("/v1/chat/completions?trace=1", body)).await;
    assert_eq!(response.status(), StatusCode::OK);
    let call = prefill.only_call();
    assert_eq!(call.uri, "/v1/chat/completions?trace=1");
    assert_eq!(call.json()["max_completion_tokens"], 1);
    assert_eq!(call.json()["max_tokens"], 1);
    assert_eq!(call.json()["n"], 3);
    assert_eq!(decode.only_call().uri, "/v1/chat/completions?trace=1");
    assert_eq!(decode.only_call().body, body.as_bytes());
}

#[tokio::test]
async fn both_servers_get_one_id_with_their_addresses_and_the_clients_own_id_is_kept() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let proxy = Running::between(&prefill, &decode).await;
    let request = Request::post("/v1/completions")
        .header("x-request-id", "client-7")
        .header("authorization", "Bearer secret")
        .header(
            "traceparent",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        )
        .header("connection", "keep-alive, x-hop")
        .header("x-hop", "1")
        .body(Body::from("{}"))
        .unwrap();
    let response = proxy.send(request).await;
    let (first, second) = (prefill.only_call(), decode.only_call());
    let id = first.header("x-request-id").to_owned();
    assert_eq!(second.header("x-request-id"), id);
    let addresses = TransferAddresses::parse(&id).unwrap();
    assert_eq!(addresses.prefill, ("127.0.0.1", prefill.address.port()));
    assert_eq!(addresses.decode, ("127.0.0.1", decode.address.port()));
    assert_eq!(addresses.unique.len(), 32);
    for call in [first, second] {
        assert_eq!(call.header("x-client-request-id"), "client-7");
        assert_eq!(call.header("authorization"), "Bearer secret");
        assert!(call.header("traceparent").ends_with("-01"));
        assert_eq!(
            call.header("x-hop"),
            "",
            "named by Connection, so not for the server"
        );
        assert_eq!(call.headers.get_all("x-request-id").iter().count(), 1);
    }
    assert_eq!(response.headers()["x-request-id"], "client-7");
    assert_eq!(response.headers()["x-kvlane-request-id"], id.as_str());
    assert_eq!(response.headers()["x-kvlane-prefill"], "done");
}

#[tokio::test]
async fn p2p_ids_name_the_ports_of_the_connectors() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let with_port = UpstreamAddress::parse(&format!("http://{}=20001", prefill.address)).unwrap();
    let proxy = Running::start(ProxyConfig::new(
        vec![with_port],
        vec![decode.url()],
        KvBackend::P2p,
    ))
    .await;
    proxy.complete("{}").await;
    let call = decode.only_call();
    let addresses = TransferAddresses::parse(call.header("x-request-id")).unwrap();
    assert_eq!(addresses.prefill, ("127.0.0.1", 20001));
    assert_eq!(addresses.decode, ("127.0.0.1", 14579));
}

#[tokio::test]
async fn prefill_is_over_before_decode_begins() {
    let order = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let (first, second) = (order.clone(), order.clone());
    let prefill = Mock::start(move |_call| {
        let order = first.clone();
        async move {
            tokio::task::yield_now().await;
            order.lock().unwrap().push("prefill");
            json(StatusCode::OK, "{}")
        }
    })
    .await;
    let decode = Mock::start(move |_call| {
        second.lock().unwrap().push("decode");
        async { json(StatusCode::OK, "{}") }
    })
    .await;
    let proxy = Running::between(&prefill, &decode).await;
    proxy.complete("{}").await;
    assert_eq!(*order.lock().unwrap(), ["prefill", "decode"]);
}

#[tokio::test]
async fn twenty_requests_at_once_each_get_their_own_answer() {
    let prefill = Mock::completing().await;
    let decode = Mock::start(async |call| {
        let prompt = call.json()["prompt"].as_str().unwrap().to_owned();
        json(
            StatusCode::OK,
            &json!({"echo": prompt, "id": call.header("x-request-id")}).to_string(),
        )
    })
    .await;
    let proxy = std::sync::Arc::new(Running::between(&prefill, &decode).await);
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..20 {
        let proxy = proxy.clone();
        tasks.spawn(async move {
            let response = proxy
                .complete(&json!({"prompt": format!("p{number}")}).to_string())
                .await;
            let answer: serde_json::Value = serde_json::from_str(&text(response).await).unwrap();
            assert_eq!(answer["echo"], format!("p{number}"));
            answer["id"].as_str().unwrap().to_owned()
        });
    }
    let ids: std::collections::HashSet<String> = tasks.join_all().await.into_iter().collect();
    assert_eq!(ids.len(), 20, "every request has an id of its own");
    assert_eq!((prefill.calls().len(), decode.calls().len()), (20, 20));
    proxy.metric_reaches("kvlane_proxy_in_flight", 0.0).await;
    proxy
        .metric_reaches(
            r#"kvlane_proxy_requests_total{route="/v1/completions",code="200"}"#,
            20.0,
        )
        .await;
}

#[tokio::test]
async fn connections_to_the_servers_are_kept() {
    let (prefill, decode) = (Mock::completing().await, Mock::completing().await);
    let proxy = Running::between(&prefill, &decode).await;
    for _ in 0..30 {
        text(proxy.complete("{}").await).await;
    }
    assert_eq!((prefill.calls().len(), decode.calls().len()), (30, 30));
    assert_eq!((prefill.connections(), decode.connections()), (1, 1));
}

#[tokio::test]
async fn requests_are_spread_over_the_servers_of_a_stage() {
    let prefills = [Mock::completing().await, Mock::completing().await];
    let decodes = [Mock::completing().await, Mock::completing().await];
    let mut settings = config(&prefills[0], &decodes[0]);
    settings.prefill.push(prefills[1].url());
    settings.decode.push(decodes[1].url());
    let proxy = Running::start(settings).await;
    for _ in 0..10 {
        text(proxy.complete("{}").await).await;
    }
    for mock in prefills.iter().chain(&decodes) {
        assert!(
            (4..=6).contains(&mock.calls().len()),
            "{} of 10",
            mock.calls().len()
        );
    }
    for decode in &decodes {
        for call in decode.calls() {
            let id = TransferAddresses::parse(call.header("x-request-id")).unwrap();
            assert_eq!(
                id.decode.1,
                decode.address.port(),
                "the id names the server that got the call"
            );
        }
    }
}
