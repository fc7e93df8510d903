//! What a proxy is told at start: servers, backend, bounds and waits.

use std::time::Duration;

use http::Uri;

/// Port on which the p2p backend listens unless told otherwise; the one of the deployments that kvlane fits into.
pub const DEFAULT_KV_PORT: u16 = 14579;

/// A proxy's settings. [`ProxyConfig::new`] fills in defaults that suit servers on one machine or in one cluster.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ProxyConfig {
    /// Prefill servers, at least one.
    pub prefill: Vec<UpstreamAddress>,
    /// Decode servers, at least one.
    pub decode: Vec<UpstreamAddress>,
    /// How KV moves from prefill to decode; decides which addresses the request id names.
    pub backend: KvBackend,
    /// Whether decode is called after prefill or together with it.
    pub dispatch: Dispatch,
    /// Port of the p2p backend on servers whose address does not name one.
    pub kv_port: u16,
    /// Longest wait for a TCP connection to a server.
    pub connect_timeout: Duration,
    /// Longest wait for a whole prefill answer; after it decode works alone.
    pub prefill_timeout: Duration,
    /// Longest wait for decode's status line. Without streaming that is the whole generation, hence the long default.
    pub first_byte_timeout: Duration,
    /// Longest silence between two pieces of decode's answer.
    pub idle_timeout: Duration,
    /// Longest wait for a client's request head, which is also how long an idle client connection is kept.
    pub client_head_timeout: Duration,
    /// Longest wait for a client's request body; where it is sent on while it arrives, for the next piece of it.
    pub client_body_timeout: Duration,
    /// Longest wait for a client to take the next piece of its answer, or to answer at all while there is none; after it
    /// the connection is closed.
    pub client_stall_timeout: Duration,
    /// Longest wait for requests in flight after a shutdown was asked for.
    pub drain_timeout: Duration,
    /// How long a server that refused a connection or timed out is passed over, and how long others come before one that
    /// answered that it cannot serve.
    pub cooldown: Duration,
    /// How long an unused connection to a server is kept. Below uvicorn's five seconds, so that a server rarely closes a
    /// connection at the moment a request is written to it.
    pub pool_idle_timeout: Duration,
    /// Largest request body, in bytes; larger ones get 413.
    pub body_limit_bytes: usize,
    /// Most requests in flight; further ones get 503 with Retry-After.
    pub in_flight_limit: usize,
}

/// How KV moves from prefill to decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvBackend {
    /// Through a shared folder: the request id names the servers' HTTP addresses.
    Fs,
    /// From server to server: the request id names the addresses at which their connectors listen.
    P2p,
}

/// When decode is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dispatch {
    /// When prefill has answered. A prefill that fails costs decode no wait, and another server can take its place.
    Sequential,
    /// Together with prefill, so that layers move while others are computed. Only for [`KvBackend::P2p`], whose decode
    /// side asks prefill and waits; a prefill that fails costs what that question takes.
    Concurrent,
}

/// One vLLM server: where it answers HTTP, and where its p2p connector listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamAddress {
    host: String,
    port: u16,
    kv_address: Option<String>,
}

/// Settings with which a proxy cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A server address that cannot be used.
    #[error(
        "server address '{found}' cannot be used: {reason}; expected http://HOST:PORT or http://HOST:PORT=KV_PORT"
    )]
    Address {
        /// The text that was given.
        found: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No server was named for a stage.
    #[error("no {0} server was given")]
    NoServer(&'static str),
    /// Two prefill servers at one KV address: decode could reach only one of them.
    #[error(
        "the prefill servers {first} and {second} have the same KV address {address}; name the port of each: \
         http://HOST:PORT=KV_PORT"
    )]
    SharedKvAddress {
        /// One of the servers.
        first: String,
        /// The other.
        second: String,
        /// What both have.
        address: String,
    },
    /// Both calls at once need a decode side that waits for prefill.
    #[error(
        "concurrent dispatch needs the p2p backend: through a folder, decode does not wait for what is not there yet"
    )]
    ConcurrentFolder,
    /// A bound of zero would refuse every request.
    #[error("{0} is 0, at least 1 is needed")]
    Zero(&'static str),
}

impl ProxyConfig {
    /// Settings with defaults for everything but the servers.
    pub fn new(prefill: Vec<UpstreamAddress>, decode: Vec<UpstreamAddress>, backend: KvBackend) -> Self {
        Self {
            prefill,
            decode,
            backend,
            dispatch: Dispatch::Sequential,
            kv_port: DEFAULT_KV_PORT,
            connect_timeout: Duration::from_secs(2),
            prefill_timeout: Duration::from_secs(120),
            first_byte_timeout: Duration::from_secs(3600),
            idle_timeout: Duration::from_secs(300),
            client_head_timeout: Duration::from_secs(75),
            client_body_timeout: Duration::from_secs(60),
            client_stall_timeout: Duration::from_secs(300),
            drain_timeout: Duration::from_secs(30),
            cooldown: Duration::from_secs(2),
            pool_idle_timeout: Duration::from_secs(4),
            body_limit_bytes: 32 << 20,
            in_flight_limit: 4096,
        }
    }

    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        for (servers, stage) in [(&self.prefill, "prefill"), (&self.decode, "decode")] {
            if servers.is_empty() {
                return Err(ConfigError::NoServer(stage));
            }
        }
        for (value, name) in [
            (self.body_limit_bytes, "body_limit_bytes"),
            (self.in_flight_limit, "in_flight_limit"),
        ] {
            if value == 0 {
                return Err(ConfigError::Zero(name));
            }
        }
        match self.backend {
            KvBackend::P2p => self.check_kv_addresses(),
            KvBackend::Fs if self.dispatch == Dispatch::Concurrent => Err(ConfigError::ConcurrentFolder),
            KvBackend::Fs => Ok(()),
        }
    }

    /// Of decode's addresses two may be equal: a server that only takes KV listens nowhere.
    fn check_kv_addresses(&self) -> Result<(), ConfigError> {
        for (at, second) in self.prefill.iter().enumerate() {
            let address = self.transfer_address(second);
            let same = |first: &&UpstreamAddress| {
                first.authority() != second.authority() && self.transfer_address(first) == address
            };
            if let Some(first) = self.prefill[..at].iter().find(same) {
                return Err(ConfigError::SharedKvAddress {
                    first: first.authority(),
                    second: second.authority(),
                    address,
                });
            }
        }
        Ok(())
    }

    /// The address of a server that goes into request ids.
    pub(crate) fn transfer_address(&self, server: &UpstreamAddress) -> String {
        match (self.backend, &server.kv_address) {
            (KvBackend::Fs, _) => server.authority(),
            (KvBackend::P2p, Some(address)) => address.clone(),
            (KvBackend::P2p, None) => format!("{}:{}", server.host, self.kv_port),
        }
    }
}

impl UpstreamAddress {
    /// Reads `http://HOST:PORT`, optionally followed by `=KV_PORT` or `=KV_HOST:KV_PORT` for the p2p backend.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let refuse = |reason| ConfigError::Address {
            found: text.to_owned(),
            reason,
        };
        let (url, kv) = match text.split_once('=') {
            Some((url, kv)) => (url, Some(kv)),
            None => (text, None),
        };
        let uri: Uri = url.parse().map_err(|_error| refuse("it is not a URL"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err(refuse(
                    "TLS to a server is not supported, use a sidecar that terminates it",
                ));
            }
            _ => return Err(refuse("the scheme is missing or is not http")),
        }
        let authority = uri.authority().ok_or_else(|| refuse("the host is missing"))?;
        if authority.as_str().contains('@') {
            return Err(refuse("it carries user information"));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(refuse("a path or query is not allowed, give the server's root"));
        }
        let host = authority.host();
        if host.is_empty() || host.contains("___") {
            return Err(refuse(
                "the host is empty or contains '___', which request ids use as a separator",
            ));
        }
        let kv_address = match kv {
            None => None,
            Some(kv) => {
                Some(kv_address(host, kv).ok_or_else(|| refuse("what follows '=' is not a KV port"))?)
            }
        };
        Ok(Self {
            host: host.to_owned(),
            port: authority.port_u16().unwrap_or(80),
            kv_address,
        })
    }

    /// `HOST:PORT`, as it stands in a URL.
    pub fn authority(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

fn kv_address(host: &str, text: &str) -> Option<String> {
    let (host, port) = text.rsplit_once(':').unwrap_or((host, text));
    let port: u16 = port.parse().ok()?;
    (port != 0 && !host.is_empty() && !host.contains("___")).then(|| format!("{host}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn p2p(text: &str) -> String {
        let server = UpstreamAddress::parse(text).unwrap();
        ProxyConfig::new(vec![server.clone()], vec![server.clone()], KvBackend::P2p).transfer_address(&server)
    }

    #[test]
    fn addresses_for_http_and_kv_are_read_from_one_argument() {
        let server = UpstreamAddress::parse("http://10.0.0.1:8000/").unwrap();
        assert_eq!(server.authority(), "10.0.0.1:8000");
        assert_eq!(
            UpstreamAddress::parse("http://vllm-prefill-fs")
                .unwrap()
                .authority(),
            "vllm-prefill-fs:80"
        );
        assert_eq!(
            UpstreamAddress::parse("http://[::1]:8000").unwrap().authority(),
            "[::1]:8000"
        );
        assert_eq!(p2p("http://10.0.0.1:8000"), "10.0.0.1:14579");
        assert_eq!(p2p("http://10.0.0.1:8000=20001"), "10.0.0.1:20001");
        assert_eq!(p2p("http://front:8000=10.0.0.1:20001"), "10.0.0.1:20001");
        assert_eq!(p2p("http://[::1]:8000=20001"), "[::1]:20001");
    }

    #[test]
    fn unusable_addresses_are_refused_with_their_reason() {
        for (text, reason) in [
            ("10.0.0.1:8000", "scheme"),
            ("https://a:1", "TLS"),
            ("http://user@a:1", "user"),
            ("http://a:1/v1", "root"),
            ("http://a:1?x", "root"),
            ("http://a:1=kv", "KV port"),
            ("http://a:1=0", "KV port"),
            ("http://a___decode_addr_b:1", "'___'"),
            ("http://", "URL"),
        ] {
            let message = UpstreamAddress::parse(text).unwrap_err().to_string();
            assert!(message.contains(reason), "{text}: {message}");
        }
    }
}
