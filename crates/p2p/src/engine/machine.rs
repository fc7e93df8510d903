//! What threads and sockets ask of the protocol's state machines, and what connections are made with.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::address::PeerAddress;
use super::dial::fresh_nonce;
use super::options::PeerOptions;
use crate::error::Result;
use crate::proto::{ConnectionId, Hello, Identity, Link, LinkConfig, Message, Role, Side};

/// Longest handshake of a peer that connects here.
const STRANGER_MAX: Duration = Duration::from_secs(10);

/// What is done with the messages. Called with the lock held: nothing here waits.
pub(super) trait Machine: Send + 'static {
    /// A connection can be used.
    fn connected(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        link: &Link,
        address: Option<&PeerAddress>,
    );
    /// A message arrived. An error ends the connection.
    fn receive(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        message: Message,
    ) -> Result<(), &'static str>;
    /// A connection is no more, or could not be made.
    fn closed(&mut self, now: Instant, connection: ConnectionId);
    /// All connections end now, and nothing is heard or ticks any more.
    fn close(&mut self, now: Instant);
    /// A peer opened a data connection; `early` came behind the handshake.
    fn data_connection(&mut self, stream: TcpStream, early: Vec<u8>, link: &Link);
    /// Something came over a data connection of the machine's own that is watched for a connection.
    fn data_readable(&mut self, connection: ConnectionId);
    /// When `tick` must be called, at the latest.
    fn next_deadline(&self) -> Option<Instant>;
    /// Notices what is late.
    fn tick(&mut self, now: Instant);
    /// Does what there is to do, except for messages, which it gives back.
    fn next_message(&mut self) -> Option<(ConnectionId, Message)>;
}

/// What all connections of a value are made with.
#[derive(Clone, Debug)]
pub(super) struct NetConfig {
    pub(super) options: PeerOptions,
    pub(super) identity: Arc<Identity>,
    /// The role on connections that this side makes.
    pub(super) dial_role: Role,
    pub(super) dial_hello: Hello,
    /// What peers are told that connect here.
    pub(super) accept_hello: Hello,
}

impl NetConfig {
    pub(super) fn link(&self, side: Side, now: Instant) -> io::Result<Link> {
        let (role, hello, handshake_timeout) = match side {
            Side::Dialling => (self.dial_role, &self.dial_hello, self.options.connect_timeout),
            // A stranger that says nothing gets no more, however patient this side is with its peers.
            Side::Accepting => (
                Role::Holder,
                &self.accept_hello,
                self.options.connect_timeout.min(STRANGER_MAX),
            ),
        };
        let config = LinkConfig {
            identity: Arc::clone(&self.identity),
            role,
            hello: hello.clone(),
            handshake_timeout,
            heartbeat: self.options.heartbeat,
            peer_timeout: self.options.peer_timeout,
        };
        Ok(Link::new(side, config, fresh_nonce()?, now))
    }
}
