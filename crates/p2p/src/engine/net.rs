//! The control connections of one value, and the thread that reads them.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream as StdStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Registry, Token, Waker};

use super::address::PeerAddress;
use super::dial::{self, fresh_nonce};
use super::options::PeerOptions;
use crate::error::{Error, Result};
use crate::proto::{
    Channel, ConnectionId, Frames, Hello, Identity, Link, LinkConfig, LinkError, Message, Role, Side,
};

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
    /// A peer opened a data connection; `early` came behind the handshake.
    fn data_connection(&mut self, stream: StdStream, early: Vec<u8>, link: &Link);
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
        let (role, hello) = match side {
            Side::Dialling => (self.dial_role, &self.dial_hello),
            Side::Accepting => (Role::Holder, &self.accept_hello),
        };
        let config = LinkConfig {
            identity: Arc::clone(&self.identity),
            role,
            hello: hello.clone(),
            handshake_timeout: self.options.connect_timeout,
            heartbeat: self.options.heartbeat,
            peer_timeout: self.options.peer_timeout,
        };
        Ok(Link::new(side, config, fresh_nonce()?, now))
    }
}

const LISTENER: Token = Token(usize::MAX);
const WAKER: Token = Token(usize::MAX - 1);

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
/// Reads from one connection in a turn: a peer that always has more to say must not keep the lock.
const READS_PER_TURN: usize = 16;

/// Connections, their thread, and the machine behind them.
pub(super) struct Net<M: Machine> {
    shared: Arc<Shared<M>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    address: Option<SocketAddr>,
}

/// What the threads share.
pub(super) struct Shared<M: Machine> {
    core: Mutex<Core<M>>,
    waker: Waker,
}

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
    unread: Vec<ConnectionId>,
    /// When the thread wakes up by itself.
    sleeps_until: Option<Instant>,
    is_closing: bool,
}

struct Connection {
    /// None while it is being made.
    open: Option<Open>,
    address: Option<PeerAddress>,
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

impl<M: Machine> Net<M> {
    /// Starts the thread; with `listen`, peers can connect.
    pub(super) fn start(config: NetConfig, listen: Option<SocketAddr>, machine: M) -> Result<Self> {
        let io = |context| move |source| Error::Io { context, source };
        let poll = Poll::new().map_err(io("waiting for connections"))?;
        let registry = poll
            .registry()
            .try_clone()
            .map_err(io("waiting for connections"))?;
        let waker = Waker::new(&registry, WAKER).map_err(io("waiting for connections"))?;
        let mut listener = None;
        let mut address = None;
        if let Some(wanted) = listen {
            let failed = |source| Error::Listen {
                address: wanted,
                source,
            };
            let bound = dial::listen(wanted).map_err(failed)?;
            address = Some(bound.local_addr().map_err(failed)?);
            let mut bound = TcpListener::from_std(bound);
            registry
                .register(&mut bound, LISTENER, Interest::READABLE)
                .map_err(failed)?;
            listener = Some(bound);
        }
        let core = Core {
            machine,
            config: Arc::new(config),
            connections: HashMap::new(),
            by_address: HashMap::new(),
            failed: HashMap::new(),
            registry,
            last_id: 0,
            dials: 0,
            accepted: 0,
            unread: Vec::new(),
            sleeps_until: None,
            is_closing: false,
        };
        let shared = Arc::new(Shared {
            core: Mutex::new(core),
            waker,
        });
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("kvlane-p2p".to_owned())
            .spawn(move || run(&own, poll, listener))
            .map_err(io("starting a thread"))?;
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread)),
            address,
        })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// What other threads of the value hold on to.
    pub(super) fn shared(&self) -> &Arc<Shared<M>> {
        &self.shared
    }

    /// Ends the thread and all connections.
    pub(super) fn close(&self) {
        self.shared.with(|core, now| core.close(now));
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = self.shared.waker.wake();
            let _ = thread.join();
        }
    }
}

impl<M: Machine> Drop for Net<M> {
    fn drop(&mut self) {
        self.close();
    }
}

impl<M: Machine> Shared<M> {
    /// Works on the machine and the connections, then sends what there is to send.
    pub(super) fn with<T>(self: &Arc<Self>, work: impl FnOnce(&mut Core<M>, Instant) -> T) -> T {
        let mut core = self.lock();
        let result = core.work(work);
        let next = core.next_deadline();
        let is_sooner = match (next, core.sleeps_until) {
            (Some(next), Some(until)) => next < until,
            (Some(_), None) => true,
            (None, _) => false,
        };
        if is_sooner {
            let _ = self.waker.wake();
        }
        result
    }

    /// The connection to a peer, made if there is none. `None`: it cannot be reached, or was tried in vain just now.
    pub(super) fn connection(
        self: &Arc<Self>,
        core: &mut Core<M>,
        now: Instant,
        address: &PeerAddress,
    ) -> Option<ConnectionId> {
        if let Some(&id) = core.by_address.get(address) {
            return Some(id);
        }
        let backoff = core.config.options.peer_backoff;
        let is_backing_off = core
            .failed
            .get(address)
            .is_some_and(|failed| now < *failed + backoff);
        if core.is_closing || is_backing_off || core.dials >= DIALS_MAX {
            return None;
        }
        core.last_id += 1;
        let id = ConnectionId(core.last_id);
        let (shared, target) = (Arc::clone(self), address.clone());
        let deadline = now + core.config.options.connect_timeout;
        let dial = std::thread::Builder::new()
            .name("kvlane-p2p-dial".to_owned())
            .spawn(move || {
                let made = target.connect(deadline);
                shared.with(|core, now| core.dialled(now, id, made));
            });
        if let Err(error) = dial {
            tracing::warn!(peer = %address, %error, "no connection: a thread could not be started");
            return None;
        }
        core.dials += 1;
        core.by_address.insert(address.clone(), id);
        let connection = Connection {
            open: None,
            address: Some(address.clone()),
            waiting: Vec::new(),
        };
        core.connections.insert(id, connection);
        Some(id)
    }

    fn lock(&self) -> MutexGuard<'_, Core<M>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread: waits for sockets and deadlines.
fn run<M: Machine>(shared: &Arc<Shared<M>>, mut poll: Poll, listener: Option<TcpListener>) {
    let mut events = Events::with_capacity(256);
    loop {
        let (timeout, has_unread) = {
            let mut core = shared.lock();
            if core.is_closing {
                return;
            }
            core.sleeps_until = core.next_deadline();
            let now = Instant::now();
            let timeout = core
                .sleeps_until
                .map(|until| until.saturating_duration_since(now));
            (timeout, !core.unread.is_empty())
        };
        let timeout = match timeout {
            _ if has_unread => Some(Duration::ZERO),
            // The system rounds down to milliseconds: without the rest a loop would spin until the deadline.
            timeout => timeout.map(|timeout| timeout + Duration::from_millis(1)),
        };
        if let Err(error) = poll.poll(&mut events, timeout)
            && error.kind() != io::ErrorKind::Interrupted
        {
            tracing::error!(%error, "waiting for connections failed; peers are not heard any more");
            shared.lock().work(|core, now| core.close(now));
            return;
        }
        // Others wait for the lock too.
        std::thread::yield_now();
        // Not `with`: this thread need not wake itself.
        shared.lock().work(|core, now| {
            for id in std::mem::take(&mut core.unread) {
                core.progress(now, id);
            }
            for event in &events {
                match event.token() {
                    WAKER => {}
                    LISTENER => {
                        if let Some(listener) = &listener {
                            core.accept(now, listener);
                        }
                    }
                    Token(id) => core.progress(now, ConnectionId(id as u64)),
                }
            }
            core.tick(now);
        });
    }
}

impl<M: Machine> Core<M> {
    fn work<T>(&mut self, work: impl FnOnce(&mut Self, Instant) -> T) -> T {
        let now = Instant::now();
        let result = work(self, now);
        self.settle(now);
        result
    }

    fn next_deadline(&self) -> Option<Instant> {
        let links = self
            .connections
            .values()
            .filter_map(|connection| connection.open.as_ref());
        let links = links.map(|open| open.link.next_deadline());
        links.chain(self.machine.next_deadline()).min()
    }

    fn tick(&mut self, now: Instant) {
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
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            match &mut connection.open {
                Some(open) if open.was_ready => open.link.send(message),
                _ if connection.waiting.len() < WAITING_MAX => connection.waiting.push(message),
                _ => {
                    self.end(now, id, "too many messages wait for its handshake");
                    continue;
                }
            }
            self.flush(now, id);
        }
    }

    fn accept(&mut self, now: Instant, listener: &TcpListener) {
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
                waiting: Vec::new(),
            };
            self.connections.insert(id, connection);
            self.accepted += 1;
            self.begin(now, id, Side::Accepting, stream, peer.to_string());
        }
    }

    fn dialled(&mut self, now: Instant, id: ConnectionId, made: io::Result<StdStream>) {
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

    /// Reads what there is, and writes what waits.
    fn progress(&mut self, now: Instant, id: ConnectionId) {
        let mut bytes = [0; READ_BYTES];
        let mut reads = 0;
        loop {
            if reads == READS_PER_TURN {
                // The socket raises no event for what it has told of already.
                self.unread.push(id);
                break;
            }
            reads += 1;
            let Some(open) = self.open_of(id) else { return };
            match open.stream.read(&mut bytes) {
                Ok(0) => return self.end(now, id, "the peer closed the connection"),
                Ok(count) => {
                    open.was_heard = true;
                    open.frames.push(&bytes[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return self.end(now, id, &error.to_string()),
            }
            if !self.take_messages(now, id) {
                return;
            }
        }
        self.flush(now, id);
    }

    /// False: the connection is not this machine's any more.
    fn take_messages(&mut self, now: Instant, id: ConnectionId) -> bool {
        loop {
            let Some(open) = self.open_of(id) else {
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
            let taken = open.link.receive(now, message);
            if open.link.is_authenticated() {
                open.frames.trust();
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
        self.machine.closed(now, id);
        self.settle(now);
    }

    fn close(&mut self, now: Instant) {
        self.is_closing = true;
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
