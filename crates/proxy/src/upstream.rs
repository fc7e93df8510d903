//! The servers of one stage: which one gets the next request, and which are passed over for a while.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use http::Uri;
use http::uri::{Authority, PathAndQuery, Scheme};

use crate::config::{ConfigError, ProxyConfig, UpstreamAddress};

/// The servers of one stage.
pub(crate) struct Fleet {
    servers: Vec<Arc<Server>>,
    /// Where the next search starts, so that equally loaded servers take turns.
    turn: AtomicUsize,
}

/// One server.
pub(crate) struct Server {
    authority: Authority,
    /// `HOST:PORT` as request ids name it.
    pub(crate) transfer_address: String,
    in_flight: AtomicUsize,
    started: Instant,
    /// Milliseconds since `started` until which this server is passed over.
    cooling_until_ms: AtomicU64,
    /// Milliseconds since `started` until which others come first.
    failing_until_ms: AtomicU64,
    cooldown: Duration,
}

/// A server while a request is with it; counts as in flight until dropped.
pub(crate) struct Lease {
    server: Arc<Server>,
}

impl Fleet {
    pub(crate) fn new(addresses: &[UpstreamAddress], config: &ProxyConfig) -> Result<Self, ConfigError> {
        let servers = addresses
            .iter()
            .map(|address| Server::new(address, config).map(Arc::new))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            servers,
            turn: AtomicUsize::new(0),
        })
    }

    pub(crate) fn servers(&self) -> &[Arc<Server>] {
        &self.servers
    }

    /// The server with the fewest requests in flight among those not in `tried`. One that fails comes behind all that do
    /// not: it is rid of its requests at once and would always be the least loaded. One that cools down comes last, and
    /// only if `cooling_too`.
    pub(crate) fn pick(&self, tried: &[Lease], cooling_too: bool) -> Option<Lease> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let count = self.servers.len();
        (0..count)
            .map(|offset| &self.servers[(turn.wrapping_add(offset)) % count])
            .filter(|server| !tried.iter().any(|lease| Arc::ptr_eq(&lease.server, server)))
            .map(|server| {
                let rank = (
                    server.is_before(&server.cooling_until_ms),
                    server.is_before(&server.failing_until_ms),
                    server.in_flight.load(Ordering::Relaxed),
                );
                (rank, server)
            })
            .filter(|((cooling, ..), _)| cooling_too || !cooling)
            // The first of equal ones wins, and the turn decides who is first.
            .min_by_key(|(rank, _)| *rank)
            .map(|(_, server)| {
                server.in_flight.fetch_add(1, Ordering::Relaxed);
                Lease {
                    server: Arc::clone(server),
                }
            })
    }
}

impl Server {
    fn new(address: &UpstreamAddress, config: &ProxyConfig) -> Result<Self, ConfigError> {
        let authority = address
            .authority()
            .parse()
            .map_err(|_error| ConfigError::Address {
                found: address.authority(),
                reason: "it is not an authority",
            })?;
        Ok(Self {
            authority,
            transfer_address: config.transfer_address(address),
            in_flight: AtomicUsize::new(0),
            started: Instant::now(),
            cooling_until_ms: AtomicU64::new(0),
            failing_until_ms: AtomicU64::new(0),
            cooldown: config.cooldown,
        })
    }

    /// `HOST:PORT` of its HTTP side.
    pub(crate) fn address(&self) -> &str {
        self.authority.as_str()
    }

    /// The URL of a path on this server.
    pub(crate) fn uri(&self, path: PathAndQuery) -> Uri {
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(path);
        #[allow(
            clippy::expect_used,
            reason = "from_parts fails only when one of the three parts is missing"
        )]
        Uri::from_parts(parts).expect("scheme, authority and path are set")
    }

    /// Passes this server over for the cooldown: it refused a connection or did not answer in time.
    pub(crate) fn cool_down(&self) {
        self.mark(&self.cooling_until_ms);
    }

    /// Lets others come first for the cooldown: it answered, but not with what was asked. It may be one request's fault,
    /// so where there is no other server it goes on to be asked.
    pub(crate) fn failed(&self) {
        self.mark(&self.failing_until_ms);
    }

    fn mark(&self, until_ms: &AtomicU64) {
        let until = self.started.elapsed() + self.cooldown;
        until_ms.fetch_max(millis(until), Ordering::Relaxed);
    }

    fn is_before(&self, until_ms: &AtomicU64) -> bool {
        let until = until_ms.load(Ordering::Relaxed);
        until != 0 && millis(self.started.elapsed()) < until
    }
}

impl std::ops::Deref for Lease {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.server.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::KvBackend;

    fn fleet(count: u16) -> Fleet {
        let addresses: Vec<_> = (1..=count)
            .map(|port| UpstreamAddress::parse(&format!("http://h:{port}")).unwrap())
            .collect();
        let config = ProxyConfig::new(addresses.clone(), addresses.clone(), KvBackend::Fs);
        Fleet::new(&addresses, &config).unwrap()
    }

    fn pick(fleet: &Fleet) -> Lease {
        fleet.pick(&[], true).unwrap()
    }

    #[test]
    fn equally_loaded_servers_take_turns() {
        let fleet = fleet(3);
        let mut seen: Vec<String> = (0..3).map(|_| pick(&fleet).address().to_owned()).collect();
        seen.sort();
        assert_eq!(seen, ["h:1", "h:2", "h:3"]);
    }

    #[test]
    fn the_least_loaded_server_is_picked() {
        let fleet = fleet(2);
        let (first, second) = (pick(&fleet), pick(&fleet));
        assert_ne!(first.address(), second.address());
        let freed = first.address().to_owned();
        drop(first);
        for _ in 0..4 {
            assert_eq!(pick(&fleet).address(), freed);
        }
    }

    #[test]
    fn a_server_that_cools_down_is_the_last_resort() {
        let fleet = fleet(2);
        let cold = pick(&fleet);
        let name = cold.address().to_owned();
        cold.cool_down();
        drop(cold);
        let other = pick(&fleet);
        assert_ne!(other.address(), name);
        let tried = [other];
        assert!(fleet.pick(&tried, false).is_none());
        assert_eq!(fleet.pick(&tried, true).unwrap().address(), name);
    }

    #[test]
    fn a_server_that_fails_comes_behind_busy_ones_and_before_none() {
        let fleet = fleet(2);
        let failing = pick(&fleet);
        let name = failing.address().to_owned();
        failing.failed();
        drop(failing);
        let busy: Vec<Lease> = (0..3).map(|_| pick(&fleet)).collect();
        assert!(busy.iter().all(|lease| lease.address() != name));
        assert_eq!(fleet.pick(&busy[..1], false).unwrap().address(), name);
    }
}
