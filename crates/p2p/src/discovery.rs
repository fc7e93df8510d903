//! The ping by which xPyD proxies and vllm-project/router find an instance: one msgpack map every three seconds, sent by
//! a ZMQ DEALER whose identity is the instance's KV address, to a ROUTER that never answers.
//!
//! A thread of its own sends it, so no lock of the interpreter and no long step can delay it past the five seconds after
//! which receivers drop an instance. The connection is made again for ever. Without settings there is no thread.

mod dealer;
mod zmtp;

use std::fmt;
use std::io::{self, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dealer::{Dealer, Failure, pause};
use rmp::encode::{self, ByteBuf};

/// How often the old connector sends; receivers drop an instance after five seconds.
pub const PING_INTERVAL: Duration = Duration::from_secs(3);

/// Between two tries to connect: at first as long as libzmq waits, at most as long as between two pings.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = PING_INTERVAL;

/// Longest wait for a connection, for the handshake on it, and for room to send a ping.
const PATIENCE: Duration = Duration::from_secs(3);

/// Addresses of one host name that are tried in turn.
const ADDRESSES_MAX: usize = 8;

/// How long a stop waits for the thread. Only a name server that does not answer holds it up; it then ends by itself.
const STOP_PATIENCE: Duration = Duration::from_millis(200);

/// ZMQ's limit for an identity.
const IDENTITY_BYTES_MAX: usize = 255;
const PING_BYTES_MAX: usize = 4096;

/// What an instance tells of itself, and whom.
#[derive(Clone, Debug)]
pub struct DiscoverySettings {
    /// Host name or address of the proxy's ZMQ socket, without brackets: `proxy_ip`.
    pub proxy_host: String,
    /// `proxy_port`.
    pub proxy_port: u16,
    /// Which of the two servers this is.
    pub role: PingRole,
    /// Where it answers HTTP: `HOST:http_port`.
    pub http_address: String,
    /// Where its connector listens: `HOST:kv_port`. Also the identity of the ZMQ socket.
    pub zmq_address: String,
    /// Further fields. They stand behind the three that old receivers know, and these ignore them.
    pub extra: Vec<(String, PingValue)>,
    /// Time between two pings; [`PING_INTERVAL`] unless a test is in a hurry.
    pub interval: Duration,
}

/// The `type` of a ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PingRole {
    /// `P`: offers KV. An instance that does both is announced as this one, as the old connector did.
    Prefill,
    /// `D`: takes KV.
    Decode,
}

/// The value of a further field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PingValue {
    /// A text.
    Text(String),
    /// A whole number.
    Number(u64),
}

/// Settings that no ping can be made of, or no thread for it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiscoveryError {
    /// A setting is out of its range.
    #[error("{argument} is {found}, allowed: {allowed}")]
    InvalidArgument {
        /// Its name.
        argument: &'static str,
        /// What was given.
        found: String,
        /// What would have been accepted.
        allowed: String,
    },
    /// The system gave no thread or no descriptors.
    #[error("the ping cannot be started: {0}")]
    Start(#[from] io::Error),
}

/// How the pings go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiscoveryCounts {
    /// Pings that were handed to the system.
    pub pings: u64,
    /// Connections that could not be made, or broke.
    pub failures: u64,
    /// Whether the proxy is connected now.
    pub connected: bool,
}

/// The running ping; it ends when this is dropped.
pub struct Discovery {
    wake: UnixStream,
    /// Ends when the thread does.
    ended: Receiver<()>,
    thread: Option<JoinHandle<()>>,
    counters: Arc<Counters>,
    /// A forked process has a copy of this value, and not the thread.
    process: u32,
}

#[derive(Default)]
struct Counters {
    pings: AtomicU64,
    failures: AtomicU64,
    connected: AtomicBool,
}

struct Plan {
    host: String,
    port: u16,
    identity: Vec<u8>,
    ping: Vec<u8>,
    interval: Duration,
}

impl Discovery {
    /// Checks the settings and starts the thread. Returns at once: that the proxy is not there is no error.
    pub fn start(settings: &DiscoverySettings) -> Result<Self, DiscoveryError> {
        let plan = Plan::new(settings)?;
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let (alive, ended) = mpsc::channel();
        let counters = Arc::new(Counters::default());
        let shared = Arc::clone(&counters);
        let thread = std::thread::Builder::new()
            .name("kvlane-ping".to_owned())
            .spawn(move || {
                let _alive: mpsc::Sender<()> = alive;
                run(&plan, &woken, &shared);
            })?;
        Ok(Self {
            wake,
            ended,
            thread: Some(thread),
            counters,
            process: std::process::id(),
        })
    }

    /// How the pings go.
    pub fn counts(&self) -> DiscoveryCounts {
        DiscoveryCounts {
            pings: self.counters.pings.load(Ordering::Relaxed),
            failures: self.counters.failures.load(Ordering::Relaxed),
            connected: self.counters.connected.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            return;
        }
        // Fails only when the thread has ended.
        let _woken = self.wake.write(&[1]);
        let Err(mpsc::RecvTimeoutError::Disconnected) = self.ended.recv_timeout(STOP_PATIENCE) else {
            return;
        };
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the ping had ended by a panic");
        }
    }
}

impl fmt::Debug for Discovery {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Discovery")
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}

impl Plan {
    fn new(settings: &DiscoverySettings) -> Result<Self, DiscoveryError> {
        let refuse = |argument, found: &dyn fmt::Debug, allowed: String| DiscoveryError::InvalidArgument {
            argument,
            found: format!("{found:?}"),
            allowed,
        };
        if settings.proxy_host.is_empty() || settings.proxy_host.contains([':', '/']) && !is_ipv6(settings) {
            return Err(refuse(
                "proxy_ip",
                &settings.proxy_host,
                "a host name or an address, without a port".to_owned(),
            ));
        }
        if settings.proxy_port == 0 {
            return Err(refuse("proxy_port", &0, "1 to 65535".to_owned()));
        }
        for (argument, address) in [
            ("http_address", &settings.http_address),
            ("zmq_address", &settings.zmq_address),
        ] {
            if !(1..=IDENTITY_BYTES_MAX).contains(&address.len()) {
                return Err(refuse(
                    argument,
                    address,
                    format!("HOST:PORT of at most {IDENTITY_BYTES_MAX} bytes"),
                ));
            }
        }
        if let Some((key, _)) = settings
            .extra
            .iter()
            .find(|(key, _)| KEYS.contains(&key.as_str()))
        {
            return Err(refuse("a further field", key, "other names".to_owned()));
        }
        let ping = ping(settings);
        if ping.len() > PING_BYTES_MAX {
            return Err(refuse(
                "the ping's length",
                &ping.len(),
                format!("at most {PING_BYTES_MAX}"),
            ));
        }
        Ok(Self {
            host: settings.proxy_host.clone(),
            port: settings.proxy_port,
            identity: settings.zmq_address.clone().into_bytes(),
            ping: zmtp::message(&ping),
            interval: settings.interval,
        })
    }
}

/// The fields that old receivers know, in their old order.
const KEYS: [&str; 3] = ["type", "http_address", "zmq_address"];

fn is_ipv6(settings: &DiscoverySettings) -> bool {
    settings.proxy_host.parse::<std::net::Ipv6Addr>().is_ok()
}

/// The map, as Python's msgpack writes it.
fn ping(settings: &DiscoverySettings) -> Vec<u8> {
    let role = match settings.role {
        PingRole::Prefill => "P",
        PingRole::Decode => "D",
    };
    let mut map = ByteBuf::new();
    let count = KEYS.len() + settings.extra.len();
    // Writing into memory cannot fail, and its error type says so.
    let Ok(_) = encode::write_map_len(&mut map, u32::try_from(count).unwrap_or(u32::MAX));
    for (key, value) in KEYS
        .into_iter()
        .zip([role, &settings.http_address, &settings.zmq_address])
    {
        let Ok(()) = encode::write_str(&mut map, key);
        let Ok(()) = encode::write_str(&mut map, value);
    }
    for (key, value) in &settings.extra {
        let Ok(()) = encode::write_str(&mut map, key);
        match value {
            PingValue::Text(text) => {
                let Ok(()) = encode::write_str(&mut map, text);
            }
            PingValue::Number(number) => {
                let Ok(_) = encode::write_uint(&mut map, *number);
            }
        }
    }
    map.into_vec()
}

/// Until told to stop: connects, pings, and begins again when that ends.
fn run(plan: &Plan, stop: &UnixStream, counters: &Counters) {
    let mut wait = PAUSE_MIN;
    let mut told = false;
    loop {
        let before = counters.pings.load(Ordering::Relaxed);
        let failure = connect_and_ping(plan, stop, counters);
        counters.connected.store(false, Ordering::Relaxed);
        if matches!(failure, Failure::Stopped) {
            return;
        }
        counters.failures.fetch_add(1, Ordering::Relaxed);
        if counters.pings.load(Ordering::Relaxed) != before {
            (wait, told) = (PAUSE_MIN, false);
        }
        // Once per outage: a proxy may start much later than its servers, or never.
        if told {
            tracing::debug!(proxy = plan.host, port = plan.port, %failure, "no ping to the proxy");
        } else {
            tracing::warn!(
                proxy = plan.host,
                port = plan.port,
                %failure,
                "no ping to the proxy; it is tried again for ever, and nothing else waits for it"
            );
            told = true;
        }
        if pause(stop, Instant::now() + wait).is_err() {
            return;
        }
        wait = (wait * 2).min(PAUSE_MAX);
    }
}

fn connect_and_ping(plan: &Plan, stop: &UnixStream, counters: &Counters) -> Failure {
    match connect(plan, stop).and_then(|dealer| ping_for_ever(plan, dealer, stop, counters)) {
        Ok(never) => match never {},
        Err(failure) => failure,
    }
}

fn ping_for_ever(
    plan: &Plan,
    mut dealer: Dealer,
    stop: &UnixStream,
    counters: &Counters,
) -> Result<std::convert::Infallible, Failure> {
    tracing::info!(proxy = plan.host, port = plan.port, "the proxy gets pings");
    let mut next = Instant::now();
    loop {
        dealer.send(&plan.ping, stop, Instant::now() + PATIENCE)?;
        counters.pings.fetch_add(1, Ordering::Relaxed);
        counters.connected.store(true, Ordering::Relaxed);
        // After a machine's sleep, one ping and not all that were missed.
        next = (next + plan.interval).max(Instant::now());
        dealer.listen(stop, next)?;
    }
}

fn connect(plan: &Plan, stop: &UnixStream) -> Result<Dealer, Failure> {
    let addresses: Vec<SocketAddr> = (plan.host.as_str(), plan.port)
        .to_socket_addrs()?
        .take(ADDRESSES_MAX)
        .collect();
    let mut failure = Failure::Io(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    for address in addresses {
        match Dealer::connect(address, &plan.identity, stop, Instant::now() + PATIENCE) {
            Err(Failure::Stopped) => return Err(Failure::Stopped),
            Err(other) => failure = other,
            Ok(dealer) => return Ok(dealer),
        }
    }
    Err(failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> DiscoverySettings {
        DiscoverySettings {
            proxy_host: "127.0.0.1".to_owned(),
            proxy_port: 30001,
            role: PingRole::Prefill,
            http_address: "10.0.0.1:8000".to_owned(),
            zmq_address: "10.0.0.1:14579".to_owned(),
            extra: Vec::new(),
            interval: PING_INTERVAL,
        }
    }

    #[test]
    fn without_further_fields_the_ping_is_the_old_one_byte_for_byte() {
        // What Python's msgpack.dumps makes of the old connector's dict.
        let old = b"\x83\xa4type\xa1P\xachttp_address\xad10.0.0.1:8000\xabzmq_address\xae10.0.0.1:14579";
        assert_eq!(ping(&settings()), old);
        let decode = DiscoverySettings {
            role: PingRole::Decode,
            ..settings()
        };
        assert_eq!(ping(&decode)[..8], *b"\x83\xa4type\xa1D");
    }

    #[test]
    fn further_fields_stand_behind_the_old_ones() {
        let more = DiscoverySettings {
            extra: vec![
                ("version".to_owned(), PingValue::Text("0.1.0".to_owned())),
                ("tp_size".to_owned(), PingValue::Number(300)),
            ],
            ..settings()
        };
        let old = ping(&settings());
        let expected = [b"\x85", &old[1..], b"\xa7version\xa50.1.0\xa7tp_size\xcd\x01\x2c"].concat();
        assert_eq!(ping(&more), expected);
    }

    #[test]
    fn settings_of_which_no_ping_can_be_made_are_refused_by_name() {
        let with = |change: fn(&mut DiscoverySettings)| {
            let mut settings = settings();
            change(&mut settings);
            Discovery::start(&settings).unwrap_err().to_string()
        };
        for (change, named) in [
            (
                (|settings| settings.proxy_host.clear()) as fn(&mut DiscoverySettings),
                "proxy_ip is \"\"",
            ),
            (
                |settings| settings.proxy_host = "10.0.0.9:30001".to_owned(),
                "proxy_ip is \"10.0.0.9:30001\"",
            ),
            (|settings| settings.proxy_port = 0, "proxy_port is 0"),
            (|settings| settings.http_address.clear(), "http_address is"),
            (
                |settings| settings.zmq_address = "x".repeat(256),
                "zmq_address is",
            ),
            (
                |settings| settings.extra = vec![("type".to_owned(), PingValue::Number(1))],
                "a further field is \"type\"",
            ),
            (
                |settings| settings.extra = vec![("k".to_owned(), PingValue::Text("x".repeat(4096)))],
                "length is",
            ),
        ] {
            let message = with(change);
            assert!(
                message.contains(named) && message.contains("allowed"),
                "{message}"
            );
        }
    }
}
