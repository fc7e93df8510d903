//! Guards: a ping that real receivers cannot read, one that does not come back after an outage, one that holds an engine's
//! end up.

#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use kvlane_p2p::discovery::{Discovery, DiscoverySettings, PING_INTERVAL, PingRole, PingValue};
use kvlane_tests::timing::{attempts, within};

const PATIENCE: Duration = Duration::from_secs(20);
/// Below what any wait of the ping takes, that for its thread included.
const AT_ONCE: Duration = Duration::from_millis(150);

const IDENTITY: &str = "10.0.0.1:14579";

fn settings(port: u16) -> DiscoverySettings {
    DiscoverySettings {
        proxy_host: "127.0.0.1".to_owned(),
        proxy_port: port,
        role: PingRole::Decode,
        http_address: "10.0.0.1:8000".to_owned(),
        zmq_address: IDENTITY.to_owned(),
        extra: vec![("tp_size".to_owned(), PingValue::Number(2))],
        interval: Duration::from_millis(20),
    }
}

/// Waits for what the thread does soon.
fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Ends it and says how long that took.
fn end(discovery: Discovery) -> Duration {
    let started = Instant::now();
    drop(discovery);
    started.elapsed()
}

/// As much of a ROUTER as a DEALER needs to see.
struct Router(TcpListener);

impl Router {
    fn bind(address: &str) -> Self {
        Self(TcpListener::bind(address).unwrap())
    }

    fn port(&self) -> u16 {
        self.0.local_addr().unwrap().port()
    }

    /// The next connection after its handshake, in which it must name itself.
    fn accept(&self) -> TcpStream {
        let (mut stream, _) = self.0.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut greeting = [0; 64];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!((greeting[0], greeting[9], greeting[10]), (0xff, 0x7f, 3));
        assert_eq!(&greeting[12..17], b"NULL\0");
        stream.write_all(&greeting).unwrap();
        let ready = read_frame(&mut stream, 4);
        assert!(ready.starts_with(b"\x05READY"));
        assert!(ready.ends_with(IDENTITY.as_bytes()));
        stream
            .write_all(b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER")
            .unwrap();
        stream
    }
}

fn read_frame(stream: &mut TcpStream, flags: u8) -> Vec<u8> {
    let mut header = [0; 2];
    stream.read_exact(&mut header).unwrap();
    assert_eq!(header[0], flags);
    let mut body = vec![0; usize::from(header[1])];
    stream.read_exact(&mut body).unwrap();
    body
}

#[test]
fn pings_go_on_and_come_back_after_every_restart_of_the_proxy() {
    within(AT_ONCE, || {
        let router = Router::bind("127.0.0.1:0");
        let port = router.port();
        let discovery = Discovery::start(&settings(port)).unwrap();
        let first = {
            let mut stream = router.accept();
            let first = read_frame(&mut stream, 0);
            for _ in 0..3 {
                assert_eq!(read_frame(&mut stream, 0), first);
            }
            until("it is counted", || {
                discovery.counts().connected && discovery.counts().pings >= 4
            });
            first
        };
        // Connections that end are made again, whether the proxy is gone for a moment or takes a while.
        let mut stream = router.accept();
        assert_eq!(read_frame(&mut stream, 0), first);
        drop((router, stream));
        until("the end is seen", || {
            discovery.counts().failures > 1 && !discovery.counts().connected
        });
        let router = Router::bind(&format!("127.0.0.1:{port}"));
        assert_eq!(read_frame(&mut router.accept(), 0), first);
        end(discovery)
    });
}

#[test]
fn a_heartbeat_is_answered_with_its_context() {
    within(AT_ONCE, || {
        let router = Router::bind("127.0.0.1:0");
        let slow = DiscoverySettings {
            interval: Duration::from_secs(600),
            ..settings(router.port())
        };
        let discovery = Discovery::start(&slow).unwrap();
        let mut stream = router.accept();
        read_frame(&mut stream, 0);
        stream.write_all(b"\x04\x0a\x04PING\x00\x0aabc").unwrap();
        assert_eq!(read_frame(&mut stream, 4), b"\x04PONGabc");
        end(discovery)
    });
}

#[test]
fn a_proxy_at_an_ipv6_address_gets_pings() {
    if TcpListener::bind("[::1]:0").is_err() {
        println!("NOT RUN: ping over IPv6: no address ::1");
        return;
    }
    let router = Router::bind("[::1]:0");
    let over_ipv6 = DiscoverySettings {
        proxy_host: "::1".to_owned(),
        ..settings(router.port())
    };
    let _discovery = Discovery::start(&over_ipv6).unwrap();
    assert_eq!(read_frame(&mut router.accept(), 0)[0], 0x84);
}

#[test]
fn the_end_waits_for_nothing() {
    // Nothing listens.
    within(AT_ONCE, || {
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = nobody.local_addr().unwrap().port();
        drop(nobody);
        let discovery = Discovery::start(&settings(port)).unwrap();
        until("it is tried again", || discovery.counts().failures >= 2);
        end(discovery)
    });
    // A listener that never answers: the handshake hangs.
    within(AT_ONCE, || {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let discovery = Discovery::start(&settings(silent.local_addr().unwrap().port())).unwrap();
        let (_stream, _) = silent.accept().unwrap();
        end(discovery)
    });
    // A network that swallows everything: the connection hangs.
    within(AT_ONCE, || {
        let swallowed = DiscoverySettings {
            proxy_host: "192.0.2.1".to_owned(),
            ..settings(9)
        };
        end(Discovery::start(&swallowed).unwrap())
    });
    // Between two pings.
    within(AT_ONCE, || {
        let router = Router::bind("127.0.0.1:0");
        let slow = DiscoverySettings {
            interval: PING_INTERVAL,
            ..settings(router.port())
        };
        let discovery = Discovery::start(&slow).unwrap();
        let mut stream = router.accept();
        read_frame(&mut stream, 0);
        let took = end(discovery);
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the connection is closed");
        took
    });
}

#[test]
fn garbage_and_other_protocols_are_given_up_and_tried_again() {
    within(AT_ONCE, || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let discovery = Discovery::start(&settings(listener.local_addr().unwrap().port())).unwrap();
        for (failures, answer) in (1..).zip([
            &b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"[..],
            &[0xff; 200],
        ]) {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(answer).unwrap();
            // Kept open: it is not the end of the connection that ends it.
            until("it is given up", || discovery.counts().failures >= failures);
        }
        assert_eq!(discovery.counts().pings, 0);
        end(discovery)
    });
}

/// A ROUTER of libzmq in a process of its own, which reads the maps as receivers do.
struct RealRouter {
    child: Child,
    lines: BufReader<ChildStdout>,
    port: u16,
}

const REAL_ROUTER: &str = r#"
import sys
import msgspec, zmq
socket = zmq.Context().socket(zmq.ROUTER)
if "heartbeat" in sys.argv:
    socket.setsockopt(zmq.HEARTBEAT_IVL, 50)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 200)
socket.bind(f"tcp://127.0.0.1:{sys.argv[1]}")
print(socket.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1], flush=True)
while True:
    identity, payload = socket.recv_multipart()
    ping = msgspec.msgpack.decode(payload)
    same = msgspec.msgpack.encode(ping) == payload
    print(identity.decode(), list(ping.items()), same, flush=True)
"#;

impl RealRouter {
    fn python() -> Option<PathBuf> {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
        let named = std::env::var_os("PYO3_PYTHON").map(PathBuf::from);
        let python = named
            .into_iter()
            .chain([root.join(".venv/bin/python")])
            .find(|python| {
                Command::new(python)
                    .args(["-c", "import zmq, msgspec"])
                    .stderr(Stdio::null())
                    .status()
                    .is_ok_and(|status| status.success())
            });
        if python.is_none() {
            println!("NOT RUN: ping to libzmq: no Python with pyzmq and msgspec (make builds .venv)");
        }
        python
    }

    fn start(python: &PathBuf, port: u16, more: &[&str]) -> Self {
        let mut child = Command::new(python)
            .args(["-c", REAL_ROUTER, &port.to_string()])
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut port = String::new();
        lines.read_line(&mut port).unwrap();
        Self {
            port: port.trim().parse().unwrap(),
            child,
            lines,
        }
    }

    fn next_ping(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for RealRouter {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

const EXPECTED: &str = "10.0.0.1:14579 [('type', 'D'), ('http_address', '10.0.0.1:8000'), \
    ('zmq_address', '10.0.0.1:14579'), ('tp_size', 2)] True";

#[test]
fn libzmqs_router_gets_the_map_under_the_identity_and_again_after_its_restart() {
    let Some(python) = RealRouter::python() else {
        return;
    };
    within(AT_ONCE, || {
        let mut router = RealRouter::start(&python, 0, &[]);
        let port = router.port;
        let discovery = Discovery::start(&settings(port)).unwrap();
        for _ in 0..3 {
            assert_eq!(router.next_ping(), EXPECTED);
        }
        drop(router);
        until("the end is seen", || discovery.counts().failures > 0);
        let mut router = RealRouter::start(&python, port, &[]);
        assert_eq!(router.next_ping(), EXPECTED);
        end(discovery)
    });
}

#[test]
fn libzmqs_heartbeats_keep_the_connection_between_two_pings() {
    let Some(python) = RealRouter::python() else {
        return;
    };
    attempts(|| {
        let mut router = RealRouter::start(&python, 0, &["heartbeat"]);
        let slow = DiscoverySettings {
            // Many times what the router waits for an answer.
            interval: Duration::from_secs(1),
            ..settings(router.port)
        };
        let discovery = Discovery::start(&slow).unwrap();
        for _ in 0..2 {
            assert_eq!(router.next_ping(), EXPECTED);
        }
        match discovery.counts().failures {
            0 => Ok(()),
            failures => Err(format!("{failures} connections were lost")),
        }
    });
}
