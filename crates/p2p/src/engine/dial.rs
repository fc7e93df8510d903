//! Sockets outside of the control thread: the listener, and data connections while they are being made.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::address::PeerAddress;
use super::machine::NetConfig;
use crate::proto::{Channel, Frames, Side, encode};

/// How often a handshake that waits looks whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Random bytes that no other connection has.
pub(super) fn fresh_nonce() -> io::Result<[u8; 32]> {
    random_bytes()
}

/// Random bytes of the system.
pub(super) fn random_bytes<const LEN: usize>() -> io::Result<[u8; LEN]> {
    let mut bytes = [0; LEN];
    let mut done = 0;
    while done < LEN {
        done += rustix::rand::getrandom(&mut bytes[done..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(bytes)
}

/// Listens on an address; on the IPv6 wildcard for IPv4 too, and for IPv4 alone where there is no IPv6.
pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address).or_else(|error| {
        if address.is_ipv6() && address.ip().is_unspecified() && error.kind() != io::ErrorKind::AddrInUse {
            TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], address.port())))
        } else {
            Err(error)
        }
    })?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Makes a data connection: connects and goes through the handshake. Waits, at most until `deadline`; for the handshake not
/// much longer than until `is_stopped`.
///
/// `start_id` is that of the control connection's peer: behind an address that changed hands is somebody else.
pub(super) fn data_connection(
    config: &NetConfig,
    address: &PeerAddress,
    start_id: [u8; 16],
    deadline: Instant,
    is_stopped: &AtomicBool,
) -> io::Result<TcpStream> {
    let mut config = config.clone();
    config.dial_hello.channel = Channel::Data;
    let mut stream = address.connect(deadline)?;
    let mut link = config.link(Side::Dialling, Instant::now())?;
    let mut frames = Frames::new();
    let mut unsent = Frames::preamble().to_vec();
    let mut bytes = [0; 4096];
    loop {
        for message in link.take_outgoing(Instant::now()) {
            encode(&message, &mut unsent);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || is_stopped.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // A few hundred bytes: they fit into the socket's buffer.
        stream.set_write_timeout(Some(left))?;
        stream.write_all(&unsent)?;
        unsent.clear();
        if link.is_ready() {
            break;
        }
        stream.set_read_timeout(Some(left.min(LOOK_EVERY)))?;
        let count = match stream.read(&mut bytes) {
            Ok(count) => count,
            Err(error) if is_interruption(&error) => continue,
            Err(error) => return Err(error),
        };
        if count == 0 {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        frames.push(&bytes[..count]);
        while let Some(message) = frames.next_message().map_err(io::Error::other)? {
            link.receive(Instant::now(), message).map_err(io::Error::other)?;
        }
    }
    let is_same = link.peer().is_some_and(|peer| peer.start_id == start_id);
    if !is_same || !frames.into_rest().is_empty() {
        return Err(io::Error::other(
            "another server answered than on the control connection",
        ));
    }
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok(stream)
}

fn is_interruption(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}
