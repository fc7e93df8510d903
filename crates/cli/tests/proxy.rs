//! Guards: a command that does not stop when it is told to, or whose status hides that it failed.

#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

const PATIENCE: Duration = Duration::from_secs(20);

/// A running `kvlane proxy`, killed at the end of a test that failed.
struct Proxy {
    child: Child,
    log: BufReader<ChildStderr>,
    address: String,
}

impl Proxy {
    fn start(prefill: &str, decode: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_kvlane"))
            .args([
                "proxy",
                "--kv-backend",
                "fs",
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--log-format",
                "json",
            ])
            .args(["--prefill", prefill, "--decode", decode])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        log.read_line(&mut line).unwrap();
        let event: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(event["message"], "listening", "{line}");
        Self {
            address: event["address"].as_str().unwrap().to_owned(),
            child,
            log,
        }
    }

    fn exchange(&self, request: &str) -> String {
        exchange(TcpStream::connect(&self.address).unwrap(), request)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The rest of the log, and the exit status.
    fn ended(mut self) -> (String, Option<i32>) {
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).unwrap();
        (rest, self.child.wait().unwrap().code())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Fails when it has ended, which is how it should be.
        let _ended = self.child.kill();
    }
}

fn exchange(mut stream: TcpStream, request: &str) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A server that answers one request with `body`, and gives back what it was asked.
fn server(body: &'static str) -> (String, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let task = std::thread::spawn(move || answer_one(&listener, body));
    (url, task)
}

fn answer_one(listener: &TcpListener, body: &str) -> String {
    let (mut stream, _) = listener.accept().unwrap();
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    // Requests here end with their body's closing brace.
    while !request.ends_with(b"}") {
        let count = stream.read(&mut buffer).unwrap();
        assert_ne!(count, 0, "the request ended early");
        request.extend_from_slice(&buffer[..count]);
    }
    write!(
        stream,
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    String::from_utf8(request).unwrap()
}

#[test]
fn a_request_goes_through_and_sigterm_ends_with_success() {
    let (prefill, first) = server("{}");
    let (decode, second) = server(r#"{"text":"answer"}"#);
    let proxy = Proxy::start(&prefill, &decode);
    let answer = proxy.exchange(
        "POST /v1/completions HTTP/1.1\r\nhost: p\r\nconnection: close\r\ncontent-length: 25\r\n\r\n{\"prompt\":\"secret words\"}",
    );
    assert!(answer.ends_with(r#"{"text":"answer"}"#), "{answer}");
    assert!(first.join().unwrap().contains("\"max_tokens\":1"));
    assert!(second.join().unwrap().ends_with("{\"prompt\":\"secret words\"}"));
    proxy.signal(Signal::TERM);
    let (log, status) = proxy.ended();
    assert_eq!(status, Some(0), "{log}");
    assert!(log.contains("\"route\":\"/v1/completions\""), "{log}");
    assert!(!log.contains("secret"), "prompts are not logged: {log}");
}

#[test]
fn sigint_ends_with_success_while_no_server_is_up() {
    let nobody = "http://127.0.0.1:1";
    let proxy = Proxy::start(nobody, nobody);
    let answer = proxy.exchange("GET /health HTTP/1.1\r\nhost: p\r\nconnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    proxy.signal(Signal::INT);
    assert_eq!(proxy.ended().1, Some(0));
}

#[test]
fn a_port_that_is_taken_is_a_failure_that_names_it() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_kvlane"))
        .args([
            "proxy",
            "--prefill",
            "http://a:1",
            "--decode",
            "http://b:1",
            "--kv-backend",
            "fs",
        ])
        .args(["--host", "127.0.0.1", "--port", &port])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains(&format!("cannot listen on 127.0.0.1:{port}"))
    );
}

#[test]
fn both_calls_at_once_through_a_folder_are_refused_with_a_reason() {
    let output = Command::new(env!("CARGO_BIN_EXE_kvlane"))
        .args(["proxy", "--prefill", "http://a:1", "--decode", "http://b:1"])
        .args(["--kv-backend", "fs", "--dispatch", "concurrent"])
        .args(["--host", "127.0.0.1", "--port", "0"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.contains("concurrent dispatch needs the p2p backend"), "{log}");
}
