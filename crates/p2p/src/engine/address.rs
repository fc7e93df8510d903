//! Where a peer listens.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Instant;

use crate::error::{Error, Result};

/// Longest host name, in bytes; DNS has 253.
const HOST_BYTES_MAX: usize = 255;

/// Host (name, IPv4 or IPv6 address) and port of a prefill worker.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerAddress {
    host: Arc<str>,
    port: u16,
}

impl PeerAddress {
    /// Refuses hosts that cannot be one. Brackets around an IPv6 address are taken off; an address is kept in its usual
    /// form and a name in small letters, so that one peer is not taken for several.
    pub fn new(host: &str, port: u16) -> Result<Self> {
        let bare = host
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .unwrap_or(host);
        let is_host = !bare.is_empty()
            && bare.len() <= HOST_BYTES_MAX
            && bare.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
        if !is_host || port == 0 {
            return Err(Error::InvalidArgument {
                argument: "peer address",
                found: format!("'{}:{port}'", host.chars().take(300).collect::<String>()),
                allowed: "HOST:PORT with a name, IPv4 or IPv6 address and a port from 1 on".to_owned(),
            });
        }
        let host = match bare.parse::<IpAddr>() {
            Ok(address) => address.to_string(),
            Err(_) => bare.to_ascii_lowercase(),
        };
        Ok(Self {
            host: host.into(),
            port,
        })
    }

    /// The host, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Connects, one address of the host after the other. May wait for a name server, hence only on a thread of its own.
    pub(super) fn connect(&self, deadline: Instant) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
        for address in (&*self.host, self.port).to_socket_addrs()? {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match TcpStream::connect_timeout(&address, left) {
                Ok(stream) if is_self_connection(&stream) => {
                    last = io::Error::new(io::ErrorKind::ConnectionRefused, "nobody listens there");
                }
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(formatter, "[{}]:{}", self.host, self.port)
        } else {
            write!(formatter, "{}:{}", self.host, self.port)
        }
    }
}

/// A connection to a local port that nobody listens on may meet itself, if the system chose that port for this end.
fn is_self_connection(stream: &TcpStream) -> bool {
    let ends: io::Result<(SocketAddr, SocketAddr)> =
        stream.local_addr().and_then(|own| Ok((own, stream.peer_addr()?)));
    ends.is_ok_and(|(own, peer)| own == peer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_names_and_addresses_of_both_kinds() {
        for (host, shown) in [
            ("prefill-0.svc", "prefill-0.svc:14579"),
            ("10.0.0.1", "10.0.0.1:14579"),
            ("fd00::1", "[fd00::1]:14579"),
            ("[fd00::1]", "[fd00::1]:14579"),
        ] {
            assert_eq!(PeerAddress::new(host, 14579).unwrap().to_string(), shown);
        }
    }

    #[test]
    fn what_is_no_host_is_refused_by_name() {
        for host in ["", "a b", "a/b", "h\u{f6}st", &"x".repeat(256)] {
            let error = PeerAddress::new(host, 1).unwrap_err().to_string();
            assert!(error.contains("HOST:PORT"), "{error}");
        }
        assert!(PeerAddress::new("a", 0).is_err());
    }
}
