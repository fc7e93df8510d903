//! The control connections of one value: their bytes, messages and ends. Everything here happens behind one lock.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Write};
use std::net::TcpStream as StdStream;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::net::{TcpListener, TcpStream};
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

use super::address::PeerAddress;
use super::machine::{Machine, NetConfig};
use crate::proto::{
    Channel, ConnectionId, FRAME_BYTES_MAX, Frames, Link, LinkError, Message, PULLER_BYTES_MAX, Side,
};

/// Set in the token of a data connection that is watched for the connection with the rest as its number.
pub(super) const DATA_TOKEN: usize = 1 << (usize::BITS - 2);
/// Most connections that peers may have open here at a time.
const ACCEPTED_MAX: usize = 1024;
/// Most connections that are being made at a time.
const DIALS_MAX: usize = 64;
/// Most messages that wait for a handshake.
const WAITING_MAX: usize = 8192;
/// A peer that does not read is given up when so many bytes wait for it.
const UNSENT_BYTES_MAX: usize = 16 << 20;
/// Bytes that one call reads.
const READ_BYTES: usize = 64 << 10;
/// Reads from one connection in a turn, and messages of one that are dealt with.
const READS_PER_TURN: usize = 16;
/// See [`READS_PER_TURN`].
const MESSAGES_PER_TURN: usize = 256;

/// Everything behind the lock.
pub(super) struct Core<M: Machine> {
    pub(super) machine: M,
    config: Arc<NetConfig>,
    connections: HashMap<ConnectionId, Connection>,
    by_address: HashMap<PeerAddress, ConnectionId>,
    failed: HashMap<PeerAddress, Instant>,
    registry: Registry,
    last_id: u64,
    dials: usize,
    accepted: usize,
    /// Connections that had more to read when their turn was over.
    unread: HashSet<ConnectionId>,
    /// Connections with messages that the thread sends when it runs: a write to a socket costs an engine's hook more than
    /// waking the thread.
    unflushed: HashSet<ConnectionId>,
    /// Whether messages that nobody waits for are left to the thread.
    pub(super) leaves_messages: bool,
    read_buffer: Vec<u8>,
    /// When the thread wakes up by itself.
    pub(super) sleeps_until: Option<Instant>,
    pub(super) is_closing: bool,
}

struct Connection {
    /// None while it is being made.
    open: Option<Open>,
    address: Option<PeerAddress>,
    last_used: Instant,
    /// Messages for behind the handshake.
    waiting: Vec<Message>,
}

struct Open {
    stream: TcpStream,
    peer: String,
    frames: Frames,
    link: Link,
    unsent: Vec<u8>,
    sent_bytes: usize,
    was_ready: bool,
    /// Whether the peer has said anything. Probes of a port do not.
    was_heard: bool,
}

impl<M: Machine> Core<M> {
    /// Without connections.
    pub(super) fn new(machine: M, config: NetConfig, registry: Registry) -> Self {
        Self {
            machine,
            config: Arc::new(config),
            connections: HashMap::new(),
            by_address: HashMap::new(),
            failed: HashMap::new(),
            registry,
            last_id: 0,
            dials: 0,
            accepted: 0,
            unread: HashSet::new(),
            unflushed: HashSet::new(),
            leaves_messages: false,
            read_buffer: Vec::new(),
            sleeps_until: None,
            is_closing: false,
        }
    }

    /// Watches a data connection that belongs to a connection, as long as it is open.
    pub(super) fn watch_data(&mut self, id: ConnectionId, socket: &StdStream) -> io::Result<()> {
        let token = Token(DATA_TOKEN | id.0 as usize);
        let mut source = SourceFd(&socket.as_raw_fd());
        self.registry.register(&mut source, token, Interest::READABLE)
    }

    /// The connection to a peer. If there is none, `dial` begins to make it, and [`dialled`](Self::dialled) takes what came
    /// of it. `None`: it cannot be reached, or was tried in vain just now.
    pub(super) fn connection(
        &mut self,
        now: Instant,
        address: &PeerAddress,
        dial: impl FnOnce(ConnectionId, Instant) -> io::Result<()>,
    ) -> Option<ConnectionId> {
        if let Some(&id) = self.by_address.get(address) {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.last_used = now;
            }
            return Some(id);
        }
        let backoff = self.config.options.peer_backoff;
        let is_backing_off = self
            .failed
            .get(address)
            .is_some_and(|failed| now < *failed + backoff);
        if self.is_closing || is_backing_off || self.dials >= DIALS_MAX || !self.make_room(now) {
            return None;
        }
        self.last_id += 1;
        let id = ConnectionId(self.last_id);
        let deadline = now + self.config.options.connect_timeout;
        if let Err(error) = dial(id, deadline) {
            tracing::warn!(peer = %address, %error, "no connection: a thread could not be started");
            return None;
        }
        self.dials += 1;
        self.by_address.insert(address.clone(), id);
        let connection = Connection {
            open: None,
            address: Some(address.clone()),
            last_used: now,
            waiting: Vec::new(),
        };
        self.connections.insert(id, connection);
        Some(id)
    }

    /// False: there are too many peers, all of them in use.
    fn make_room(&mut self, now: Instant) -> bool {
        let options = &self.config.options;
        if self.by_address.len() < options.peers {
            return true;
        }
        let dialled = self.by_address.values();
        let used = dialled.filter_map(|id| Some((self.connections.get(id)?.last_used, *id)));
        match used.min() {
            Some((last_used, id)) if now >= last_used + options.peer_unused => {
                self.end(now, id, "not used for long, and another peer needs its place");
                true
            }
            _ => {
                tracing::warn!(
                    peers = options.peers,
                    "no connection to another peer: as many as may be are in use"
                );
                false
            }
        }
    }

    /// Connections whose last turn was over before everything was read. They are due again.
    pub(super) fn take_unread(&mut self) -> HashSet<ConnectionId> {
        std::mem::take(&mut self.unread)
    }

    /// Whether there are messages for the thread to send.
    pub(super) fn has_unflushed(&self) -> bool {
        !self.unflushed.is_empty()
    }

    /// Sends the messages that were left to the thread.
    pub(super) fn flush_left(&mut self, now: Instant) {
        for id in std::mem::take(&mut self.unflushed) {
            self.flush(now, id);
        }
    }

    /// Whether a connection is among them.
    pub(super) fn is_unread(&self, id: ConnectionId) -> bool {
        self.unread.contains(&id)
    }

    /// Whether there are any.
    pub(super) fn has_unread(&self) -> bool {
        !self.unread.is_empty()
    }

    /// Works on the machine, then sends what there is to send.
    pub(super) fn work<T>(&mut self, work: impl FnOnce(&mut Self, Instant) -> T) -> T {
        let now = Instant::now();
        let result = work(self, now);
        self.settle(now);
        result
    }

    /// When [`tick`](Self::tick) must be called, at the latest.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let links = self
            .connections
            .values()
            .filter_map(|connection| connection.open.as_ref());
        let links = links.map(|open| open.link.next_deadline());
        links.chain(self.machine.next_deadline()).min()
    }

    /// The thread did not run for a while.
    pub(super) fn forgive(&mut self, stall: Duration) {
        for connection in self.connections.values_mut() {
            if let Some(open) = &mut connection.open {
                open.link.forgive(stall);
            }
        }
    }

    pub(super) fn tick(&mut self, now: Instant) {
        self.machine.tick(now);
        let ids: Vec<ConnectionId> = self.connections.keys().copied().collect();
        for id in ids {
            let Some(open) = self.open_of(id) else { continue };
            if let Err(error) = open.link.tick(now) {
                self.end(now, id, &error.to_string());
            } else {
                self.flush(now, id);
            }
        }
    }

    /// Hands the machine's messages to their connections, until it has none.
    fn settle(&mut self, now: Instant) {
        while let Some((id, message)) = self.machine.next_message() {
            if self.is_closing {
                continue; // peers hear from their connections that it is over
            }
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            let is_left = self.leaves_messages && !message.is_urgent();
            match &mut connection.open {
                Some(open) if open.was_ready => open.link.send(message),
                _ if connection.waiting.len() < WAITING_MAX => connection.waiting.push(message),
                _ => {
                    self.end(now, id, "too many messages wait for its handshake");
                    continue;
                }
            }
            if is_left {
                self.unflushed.insert(id);
            } else {
                self.flush(now, id);
            }
        }
    }

    pub(super) fn accept(&mut self, now: Instant, listener: &TcpListener) {
        loop {
            let (stream, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    tracing::warn!(%error, "a peer could not connect");
                    return;
                }
            };
            if self.accepted >= ACCEPTED_MAX {
                tracing::warn!(%peer, "a connection is refused: {ACCEPTED_MAX} are open");
                continue;
            }
            let _ = stream.set_nodelay(true);
            self.last_id += 1;
            let id = ConnectionId(self.last_id);
            let connection = Connection {
                open: None,
                address: None,
                last_used: now,
                waiting: Vec::new(),
            };
            self.connections.insert(id, connection);
            self.accepted += 1;
            self.begin(now, id, Side::Accepting, stream, peer.to_string());
        }
    }

    pub(super) fn dialled(&mut self, now: Instant, id: ConnectionId, made: io::Result<StdStream>) {
        self.dials -= 1;
        let Some(address) = self.connections.get(&id).and_then(|known| known.address.clone()) else {
            return;
        };
        let stream = made.and_then(|stream| {
            stream.set_nonblocking(true)?;
            Ok(TcpStream::from_std(stream))
        });
        match stream {
            Ok(stream) => self.begin(now, id, Side::Dialling, stream, address.to_string()),
            Err(error) => self.end(now, id, &format!("cannot connect: {error}")),
        }
    }

    fn begin(&mut self, now: Instant, id: ConnectionId, side: Side, mut stream: TcpStream, peer: String) {
        let interest = Interest::READABLE | Interest::WRITABLE;
        let made = self
            .registry
            .register(&mut stream, Token(id.0 as usize), interest)
            .and_then(|()| self.config.link(side, now));
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        match made {
            Ok(link) => {
                connection.open = Some(Open {
                    stream,
                    peer,
                    frames: Frames::of_stranger(),
                    link,
                    unsent: Frames::preamble().to_vec(),
                    sent_bytes: 0,
                    was_ready: false,
                    was_heard: false,
                });
                // What arrived before the registration raises no event.
                self.progress(now, id);
            }
            Err(error) => self.end(now, id, &error.to_string()),
        }
    }

    /// Reads what there is, and writes what waits. A turn has a bound: a peer that always has more to say must not keep the
    /// lock.
    pub(super) fn progress(&mut self, now: Instant, id: ConnectionId) {
        let mut bytes = std::mem::take(&mut self.read_buffer);
        bytes.resize(READ_BYTES, 0);
        self.read_turn(now, id, &mut bytes);
        self.read_buffer = bytes;
    }

    fn read_turn(&mut self, now: Instant, id: ConnectionId, bytes: &mut [u8]) {
        let mut messages_left = MESSAGES_PER_TURN;
        for _ in 0..READS_PER_TURN {
            if !self.take_messages(now, id, &mut messages_left) {
                return;
            }
            if messages_left == 0 {
                break;
            }
            let Some(open) = self.open_of(id) else { return };
            match open.stream.read(bytes) {
                Ok(0) => return self.end(now, id, "the peer closed the connection"),
                Ok(count) => {
                    open.was_heard = true;
                    open.frames.push(&bytes[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return self.flush(now, id),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.end(now, id, &error.to_string()),
            }
        }
        // The socket raises no event for what it has told of already.
        self.unread.insert(id);
        self.flush(now, id);
    }

    /// False: the connection is not this machine's any more.
    fn take_messages(&mut self, now: Instant, id: ConnectionId, left: &mut usize) -> bool {
        loop {
            if *left == 0 {
                return true;
            }
            let Some(connection) = self.connections.get_mut(&id) else {
                return false;
            };
            let frame_bytes_max = match connection.address {
                Some(_) => FRAME_BYTES_MAX,
                None => PULLER_BYTES_MAX,
            };
            let Some(open) = &mut connection.open else {
                return false;
            };
            let message = match open.frames.next_message() {
                Ok(Some(message)) => message,
                Ok(None) => return true,
                Err(error) => {
                    self.refuse(now, id, &error.to_string());
                    return false;
                }
            };
            *left -= 1;
            let taken = open.link.receive(now, message);
            if open.link.is_authenticated() {
                open.frames.trust(frame_bytes_max);
            }
            let has_become_ready = !open.was_ready && open.link.is_ready();
            match taken {
                Err(LinkError::Bye(reason)) => {
                    self.end(now, id, &format!("the peer ended it: {reason}"));
                    return false;
                }
                Err(error) => {
                    self.refuse(now, id, &error.to_string());
                    return false;
                }
                Ok(Some(message)) => {
                    connection.last_used = now;
                    if let Err(reason) = self.machine.receive(now, id, message) {
                        self.refuse(now, id, reason);
                        return false;
                    }
                    self.settle(now);
                }
                Ok(None) if has_become_ready => {
                    if !self.become_ready(now, id) {
                        return false;
                    }
                }
                Ok(None) => {}
            }
        }
    }

    fn become_ready(&mut self, now: Instant, id: ConnectionId) -> bool {
        let is_data = self
            .open_of(id)
            .is_some_and(|open| open.link.channel() == Some(Channel::Data));
        if is_data {
            self.detach(now, id);
            return false;
        }
        let Some(connection) = self.connections.get_mut(&id) else {
            return false;
        };
        let Some(open) = &mut connection.open else {
            return false;
        };
        open.was_ready = true;
        for message in std::mem::take(&mut connection.waiting) {
            open.link.send(message);
        }
        if let Some(address) = &connection.address {
            self.failed.remove(address);
        }
        self.machine
            .connected(now, id, &open.link, connection.address.as_ref());
        self.settle(now);
        self.flush(now, id);
        true
    }

    /// Gives a data connection to whoever serves it.
    fn detach(&mut self, now: Instant, id: ConnectionId) {
        self.flush(now, id);
        let Some(Connection {
            open: Some(mut open), ..
        }) = self.connections.remove(&id)
        else {
            return;
        };
        self.accepted = self.accepted.saturating_sub(1);
        let is_sent = open.sent_bytes == open.unsent.len();
        if self.registry.deregister(&mut open.stream).is_err() || !is_sent {
            return;
        }
        let stream = StdStream::from(open.stream);
        if stream.set_nonblocking(false).is_ok() {
            self.machine
                .data_connection(stream, open.frames.into_rest(), &open.link);
        }
    }

    fn flush(&mut self, now: Instant, id: ConnectionId) {
        let Some(open) = self.open_of(id) else { return };
        for message in open.link.take_outgoing(now) {
            crate::proto::encode(&message, &mut open.unsent);
        }
        while open.sent_bytes < open.unsent.len() {
            match open.stream.write(&open.unsent[open.sent_bytes..]) {
                Ok(count) => open.sent_bytes += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return self.end(now, id, &error.to_string()),
            }
        }
        if open.sent_bytes == open.unsent.len() {
            open.unsent.clear();
            open.sent_bytes = 0;
        } else if open.unsent.len() - open.sent_bytes > UNSENT_BYTES_MAX {
            self.end(now, id, "the peer does not read");
        }
    }

    /// Tells the peer why before the connection ends.
    fn refuse(&mut self, now: Instant, id: ConnectionId, reason: &str) {
        if let Some(open) = self.open_of(id) {
            let mut bytes = Vec::new();
            crate::proto::encode(&Message::Bye(reason.to_owned()), &mut bytes);
            open.unsent.extend_from_slice(&bytes);
            self.flush(now, id);
        }
        self.end(now, id, reason);
    }

    fn end(&mut self, now: Instant, id: ConnectionId, reason: &str) {
        let Some(connection) = self.connections.remove(&id) else {
            return;
        };
        match &connection.address {
            Some(address) => {
                self.by_address.remove(address);
                let was_ready = connection.open.as_ref().is_some_and(|open| open.was_ready);
                if !was_ready {
                    self.failed
                        .retain(|_, failed| now < *failed + self.config.options.peer_backoff);
                    self.failed.insert(address.clone(), now);
                }
                if !self.is_closing {
                    tracing::warn!(peer = %address, reason, "the connection to a prefill server ended");
                }
            }
            None => {
                self.accepted = self.accepted.saturating_sub(1);
                match &connection.open {
                    _ if self.is_closing => {}
                    Some(open) if open.was_ready => {
                        tracing::info!(peer = open.peer, reason, "a connection of a decode server ended");
                    }
                    Some(open) if open.was_heard => {
                        tracing::warn!(peer = open.peer, reason, "a connection was refused");
                    }
                    // A health check that only connects must not fill the log.
                    _ => tracing::debug!(reason, "a connection ended on which nothing was said"),
                }
            }
        }
        if let Some(mut open) = connection.open {
            let _ = self.registry.deregister(&mut open.stream);
        }
        self.unread.remove(&id);
        self.unflushed.remove(&id);
        self.machine.closed(now, id);
        self.settle(now);
    }

    pub(super) fn close(&mut self, now: Instant) {
        if std::mem::replace(&mut self.is_closing, true) {
            return;
        }
        self.machine.close(now);
        let ids: Vec<ConnectionId> = self.connections.keys().copied().collect();
        for id in ids {
            if self.open_of(id).is_some_and(|open| open.was_ready) {
                self.refuse(now, id, "this server ends");
            } else {
                self.end(now, id, "this server ends");
            }
        }
    }

    fn open_of(&mut self, id: ConnectionId) -> Option<&mut Open> {
        self.connections.get_mut(&id)?.open.as_mut()
    }
}
