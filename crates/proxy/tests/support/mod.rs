//! A mock vLLM server that records what it gets, and a proxy started in front of two of them.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses a part of this module"
)]
#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::serve::ListenerExt;
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body::Frame;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use kvlane_proxy::{KvBackend, ProxyConfig, ServeError, UpstreamAddress, serve};
use serde_json::Value;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;

/// Longer than anything here takes; a test that waits this long has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A request as a mock got it.
#[derive(Clone, Debug)]
pub struct Call {
    pub method: Method,
    pub uri: Uri,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Call {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

type Answer = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// A server on a port of its own. It answers with what its function returns.
pub struct Mock {
    pub address: SocketAddr,
    calls: Arc<Mutex<Vec<Call>>>,
    connections: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Mock {
    pub async fn start<F>(answer: impl Fn(Call) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (calls, connections) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        let (log, counter) = (Arc::clone(&calls), Arc::clone(&connections));
        let answer: Arc<dyn Fn(Call) -> Answer + Send + Sync> = Arc::new(move |call| Box::pin(answer(call)));
        let router = axum::Router::new().fallback(move |request: Request<Body>| {
            let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
            async move {
                let (head, body) = request.into_parts();
                let body = body.collect().await.unwrap().to_bytes();
                let call = Call {
                    method: head.method,
                    uri: head.uri,
                    headers: head.headers,
                    body,
                };
                log.lock().unwrap().push(call.clone());
                answer(call).await
            }
        });
        let listener = listener.tap_io(move |_stream| {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            address,
            calls,
            connections,
            task,
        }
    }

    /// Answers every call with one completion.
    pub async fn completing() -> Self {
        Self::start(async |_call| json(StatusCode::OK, r#"{"choices":[{"text":"x"}]}"#)).await
    }

    pub fn url(&self) -> UpstreamAddress {
        url(self.address)
    }

    /// All calls so far, in order.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    /// The one call that was made.
    pub fn only_call(&self) -> Call {
        let calls = self.calls();
        assert_eq!(calls.len(), 1, "{calls:?}");
        calls[0].clone()
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub fn url(address: SocketAddr) -> UpstreamAddress {
    UpstreamAddress::parse(&format!("http://{address}")).unwrap()
}

/// An address on which nothing listens. Its port stays taken while the tests run: given back, it could become another
/// test's server.
pub fn dead_address() -> UpstreamAddress {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = url(socket.local_addr().unwrap());
    std::mem::forget(socket);
    address
}

/// A running proxy.
pub struct Running {
    pub address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ServeError>>,
    client: Client<HttpConnector, Body>,
}

impl Running {
    pub async fn start(config: ProxyConfig) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(serve(listener, config, async move {
            // Dropping the sender stops it too.
            let _asked = stopped.await;
        }));
        let client = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
        Self {
            address,
            stop: Some(stop),
            task,
            client,
        }
    }

    pub async fn between(prefill: &Mock, decode: &Mock) -> Self {
        Self::start(config(prefill, decode)).await
    }

    pub async fn send(&self, request: Request<Body>) -> Response<Incoming> {
        self.try_send(request).await.unwrap()
    }

    pub async fn try_send(
        &self,
        mut request: Request<Body>,
    ) -> Result<Response<Incoming>, hyper_util::client::legacy::Error> {
        let path = request.uri().path_and_query().unwrap().as_str().to_owned();
        *request.uri_mut() = format!("http://{}{path}", self.address).parse().unwrap();
        tokio::time::timeout(PATIENCE, self.client.request(request))
            .await
            .expect("the proxy answers in time")
    }

    pub async fn complete(&self, body: &str) -> Response<Incoming> {
        self.send(post("/v1/completions", body)).await
    }

    pub async fn get(&self, path: &str) -> Response<Incoming> {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    /// The value of a series on the metrics page; 0 when it is not there.
    pub async fn metric(&self, series: &str) -> f64 {
        let page = text(self.get("/metrics").await).await;
        page.lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))
            .map_or(0.0, |value| value.parse().unwrap())
    }

    /// Waits until a series has a value: counters follow the last byte of an answer by a moment.
    pub async fn metric_reaches(&self, series: &str, value: f64) {
        let reached = async {
            while (self.metric(series).await - value).abs() > 1e-9 {
                tokio::task::yield_now().await;
            }
        };
        if tokio::time::timeout(PATIENCE, reached).await.is_err() {
            panic!("{series} is {}, not {value}", self.metric(series).await);
        }
    }

    pub fn ask_to_stop(&mut self) {
        drop(self.stop.take());
    }

    pub async fn stopped(self) -> Result<(), ServeError> {
        // Idle client connections must not be what ends the wait.
        let (client, task) = (self.client, self.task);
        let result = tokio::time::timeout(PATIENCE, task)
            .await
            .expect("the proxy stops in time")
            .unwrap();
        drop(client);
        result
    }
}

pub fn config(prefill: &Mock, decode: &Mock) -> ProxyConfig {
    ProxyConfig::new(vec![prefill.url()], vec![decode.url()], KvBackend::Fs)
}

pub fn post(path: &str, body: &str) -> Request<Body> {
    Request::post(path)
        .header("content-type", "application/json")
        .body(Body::from(body.to_owned()))
        .unwrap()
}

pub fn json(status: StatusCode, body: &str) -> Response<Body> {
    Response::builder()
        .status(status)
        .header("content-type", "application/json")
        .body(Body::from(body.to_owned()))
        .unwrap()
}

pub async fn text(response: Response<Incoming>) -> String {
    let body = tokio::time::timeout(PATIENCE, response.into_body().collect())
        .await
        .expect("the answer ends in time");
    String::from_utf8(body.expect("the answer is whole").to_bytes().to_vec()).unwrap()
}

pub async fn error_of(response: Response<Incoming>) -> Value {
    assert_eq!(response.headers()["content-type"], "application/json");
    let mut body: Value = serde_json::from_str(&text(response).await).unwrap();
    body["error"].take()
}

/// The next piece of an answer; `None` at its end.
pub async fn next_chunk(body: &mut Incoming) -> Option<Result<Bytes, hyper::Error>> {
    let frame = tokio::time::timeout(PATIENCE, body.frame())
        .await
        .expect("the next piece comes in time")?;
    Some(frame.map(|frame| frame.into_data().unwrap()))
}

/// A body that a test feeds piece by piece.
pub struct Fed {
    pieces: mpsc::UnboundedReceiver<Result<Bytes, &'static str>>,
    _gone: Option<Gone>,
}

/// Tells, when dropped, that a mock's work was given up or is over.
pub struct Gone(pub Arc<Notify>);

impl Fed {
    pub fn new() -> (mpsc::UnboundedSender<Result<Bytes, &'static str>>, Self) {
        let (feed, pieces) = mpsc::unbounded_channel();
        (feed, Self { pieces, _gone: None })
    }

    pub fn telling(mut self, gone: Gone) -> Self {
        self._gone = Some(gone);
        self
    }
}

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl http_body::Body for Fed {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.pieces
            .poll_recv(context)
            .map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }
}

/// A mock that streams what the test feeds: each call takes the next body.
pub struct StreamingMock {
    pub mock: Mock,
    bodies: mpsc::UnboundedSender<Fed>,
}

impl StreamingMock {
    pub async fn start() -> Self {
        let (bodies, waiting) = mpsc::unbounded_channel::<Fed>();
        let waiting = Arc::new(tokio::sync::Mutex::new(waiting));
        let mock = Mock::start(move |_call| {
            let waiting = Arc::clone(&waiting);
            async move {
                let body = waiting.lock().await.recv().await.expect("the test gives a body");
                Response::builder()
                    .header("content-type", "text/event-stream")
                    .body(Body::new(body))
                    .unwrap()
            }
        })
        .await;
        Self { mock, bodies }
    }

    /// The next answer's body; feed it through what is returned.
    pub fn next_body(&self) -> (mpsc::UnboundedSender<Result<Bytes, &'static str>>, Arc<Notify>) {
        let gone = Arc::new(Notify::new());
        let (feed, body) = Fed::new();
        self.bodies.send(body.telling(Gone(Arc::clone(&gone)))).unwrap();
        (feed, gone)
    }
}

/// Waits for what a test expects to happen soon.
pub async fn soon(event: &Notify) {
    tokio::time::timeout(PATIENCE, event.notified())
        .await
        .expect("it happens in time");
}
