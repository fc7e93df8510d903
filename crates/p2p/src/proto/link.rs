//! One connection from its first byte to its last: version, identity, authentication, heartbeat.
//!
//! ```text
//! dialling side                      accepting side
//!   Open(nonce) ──────────────────────>
//!   <────────────────────── Open(nonce), Proof
//!   Proof, Hello ─────────────────────>
//!   <──────────────────────────────── Hello
//! ```
//! The proof is a hash keyed with the shared secret over both sides' `Open` and the prover's side. Both nonces are in it,
//! so a recorded one is of no use, and a reflected one names the wrong side. The secret itself is never sent. Without a
//! secret the same hash shows that the other side has none either.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::message::{Channel, Hello, Message, Open, Role};

const SECRET_CONTEXT: &str = "kvlane 2026-11 p2p secret";

/// Who this process is, the same on all its connections.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Name of the engine, for logs.
    pub engine_id: String,
    /// Random number of this start.
    pub start_id: [u8; 16],
    /// Rank of the worker inside its engine.
    pub rank: u32,
    /// Shared with all peers; none: everybody who reaches the port is trusted.
    pub secret: Option<Vec<u8>>,
}

/// What a connection is made with.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// Who this process is.
    pub identity: Arc<Identity>,
    /// What it does on this connection.
    pub role: Role,
    /// What it tells the peer once that is authenticated.
    pub hello: Hello,
    /// Longest time for the handshake.
    pub handshake_timeout: Duration,
    /// Longest silence of this side.
    pub heartbeat: Duration,
    /// Longest silence of the peer; some heartbeats.
    pub peer_timeout: Duration,
}

/// Which side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Began it.
    Dialling,
    /// Accepted it.
    Accepting,
}

/// Why a connection ends. Whatever it was for is a miss.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The other side does not know the secret, or knows one that this side does not.
    #[error("{0}")]
    Refused(String),
    /// A message that does not belong there.
    #[error("the peer sent {0} in the wrong place")]
    Unexpected(&'static str),
    /// The other side said goodbye.
    #[error("the peer ended the connection: {0}")]
    Bye(String),
    /// The handshake took too long.
    #[error("the handshake was not done within {0:?}")]
    Handshake(Duration),
    /// The peer is silent.
    #[error("the peer was silent for {0:?}")]
    Silent(Duration),
}

/// The state machine of a connection.
#[derive(Debug)]
pub struct Link {
    side: Side,
    config: LinkConfig,
    own_open: Open,
    state: State,
    peer: Option<Open>,
    peer_hello: Option<Box<Hello>>,
    started: Instant,
    last_heard: Instant,
    last_sent: Instant,
    outgoing: Vec<Message>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    AwaitsOpen,
    AwaitsProof,
    AwaitsHello,
    Ready,
}

impl Link {
    /// A new connection. `nonce` is fresh and random. What is to be sent waits in [`take_outgoing`](Self::take_outgoing).
    pub fn new(side: Side, config: LinkConfig, nonce: [u8; 32], now: Instant) -> Self {
        let identity = &config.identity;
        let own_open = Open {
            engine_id: identity.engine_id.clone(),
            start_id: identity.start_id,
            rank: identity.rank,
            role: config.role,
            nonce,
            has_secret: identity.secret.is_some(),
        };
        let outgoing = match side {
            Side::Dialling => vec![Message::Open(own_open.clone())],
            Side::Accepting => Vec::new(),
        };
        Self {
            side,
            config,
            own_open,
            state: State::AwaitsOpen,
            peer: None,
            peer_hello: None,
            started: now,
            last_heard: now,
            last_sent: now,
            outgoing,
        }
    }

    /// Takes a message. Some: it is for whoever uses the connection.
    pub fn receive(&mut self, now: Instant, message: Message) -> Result<Option<Message>, LinkError> {
        self.last_heard = now;
        if let Message::Bye(reason) = message {
            return Err(LinkError::Bye(reason));
        }
        match (self.state, message) {
            (State::AwaitsOpen, Message::Open(open)) => {
                self.check_open(&open)?;
                self.peer = Some(open);
                if self.side == Side::Accepting {
                    self.outgoing.push(Message::Open(self.own_open.clone()));
                    self.outgoing.push(Message::Proof(self.proof(Side::Accepting)));
                }
                self.state = State::AwaitsProof;
                Ok(None)
            }
            (State::AwaitsProof, Message::Proof(proof)) => {
                let prover = match self.side {
                    Side::Dialling => Side::Accepting,
                    Side::Accepting => Side::Dialling,
                };
                // Compared in constant time by the hash's own type.
                if blake3::Hash::from_bytes(self.proof(prover)) != blake3::Hash::from_bytes(proof) {
                    return Err(LinkError::Refused(
                        "the peer does not know this server's secret (option secret_file)".to_owned(),
                    ));
                }
                if self.side == Side::Dialling {
                    self.outgoing.push(Message::Proof(self.proof(Side::Dialling)));
                    self.outgoing
                        .push(Message::Hello(Box::new(self.config.hello.clone())));
                }
                self.state = State::AwaitsHello;
                Ok(None)
            }
            (State::AwaitsHello, Message::Hello(hello)) => {
                if self.side == Side::Accepting {
                    let answer = Hello {
                        channel: hello.channel,
                        ..self.config.hello.clone()
                    };
                    self.outgoing.push(Message::Hello(Box::new(answer)));
                } else if hello.channel != self.config.hello.channel {
                    return Err(LinkError::Unexpected("a HELLO for another kind of connection"));
                }
                self.peer_hello = Some(hello);
                self.state = State::Ready;
                Ok(None)
            }
            (State::Ready, Message::Ping) => Ok(None),
            (State::Ready, Message::Open(_) | Message::Proof(_) | Message::Hello(_)) => {
                Err(LinkError::Unexpected("a second handshake"))
            }
            (State::Ready, message) => Ok(Some(message)),
            _ => Err(LinkError::Unexpected("a message before the end of the handshake")),
        }
    }

    /// Sends a message once the handshake is done.
    pub fn send(&mut self, message: Message) {
        debug_assert!(self.is_ready(), "nothing is said before the handshake");
        self.outgoing.push(message);
    }

    /// What must go out, in order.
    pub fn take_outgoing(&mut self, now: Instant) -> Vec<Message> {
        if !self.outgoing.is_empty() {
            self.last_sent = now;
        }
        std::mem::take(&mut self.outgoing)
    }

    /// This side did not run for `stall`: the peer's silence of that time says nothing. A machine that stands still stops both
    /// sides, and each would take the other for dead.
    pub fn forgive(&mut self, stall: Duration) {
        self.started += stall;
        self.last_heard += stall;
    }

    /// When [`tick`](Self::tick) must be called, at the latest.
    pub fn next_deadline(&self) -> Instant {
        if self.is_ready() {
            (self.last_sent + self.config.heartbeat).min(self.last_heard + self.config.peer_timeout)
        } else {
            self.started + self.config.handshake_timeout
        }
    }

    /// Notices silence, and breaks its own.
    pub fn tick(&mut self, now: Instant) -> Result<(), LinkError> {
        if !self.is_ready() {
            return match now.saturating_duration_since(self.started) {
                waited if waited >= self.config.handshake_timeout => {
                    Err(LinkError::Handshake(self.config.handshake_timeout))
                }
                _ => Ok(()),
            };
        }
        if now.saturating_duration_since(self.last_heard) >= self.config.peer_timeout {
            return Err(LinkError::Silent(self.config.peer_timeout));
        }
        if now.saturating_duration_since(self.last_sent) >= self.config.heartbeat {
            self.outgoing.push(Message::Ping);
        }
        Ok(())
    }

    /// Whether the peer has shown that it knows the secret, or that there is none.
    pub fn is_authenticated(&self) -> bool {
        matches!(self.state, State::AwaitsHello | State::Ready)
    }

    /// Whether the handshake is done.
    pub fn is_ready(&self) -> bool {
        self.state == State::Ready
    }

    /// Who the peer says it is.
    pub fn peer(&self) -> Option<&Open> {
        self.peer.as_ref()
    }

    /// What the peer told after the authentication.
    pub fn peer_hello(&self) -> Option<&Hello> {
        self.peer_hello.as_deref()
    }

    /// What the connection is for, once it is known.
    pub fn channel(&self) -> Option<Channel> {
        self.peer_hello.as_ref().map(|hello| hello.channel)
    }

    fn check_open(&self, open: &Open) -> Result<(), LinkError> {
        let refused = |sentence: &str| Err(LinkError::Refused(sentence.to_owned()));
        match (self.own_open.has_secret, open.has_secret) {
            (true, false) => {
                return refused("the peer has no secret and this server has one (option secret_file)");
            }
            (false, true) => {
                return refused("the peer has a secret and this server has none (option secret_file)");
            }
            _ => {}
        }
        let fits = match self.side {
            Side::Dialling => open.role == Role::Holder,
            Side::Accepting => open.role != Role::Holder,
        };
        if !fits {
            return refused("the peer does not hold blocks: its kv_role is not kv_producer or kv_both");
        }
        if open.start_id == self.own_open.start_id && open.nonce == self.own_open.nonce {
            return refused("the peer repeats what this server said");
        }
        Ok(())
    }

    /// The proof of one side. Both `Open` are known when it is asked for.
    fn proof(&self, prover: Side) -> [u8; 32] {
        let secret = self.config.identity.secret.as_deref().unwrap_or_default();
        let key = blake3::derive_key(SECRET_CONTEXT, secret);
        let mut hasher = blake3::Hasher::new_keyed(&key);
        hasher.update(match prover {
            Side::Dialling => b"dialling ",
            Side::Accepting => b"accepting",
        });
        let peer = self.peer.as_ref().unwrap_or(&self.own_open);
        let (dialling, accepting) = match self.side {
            Side::Dialling => (&self.own_open, peer),
            Side::Accepting => (peer, &self.own_open),
        };
        for open in [dialling, accepting] {
            let bytes = postcard::to_allocvec(open).unwrap_or_default();
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(&bytes);
        }
        *hasher.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(role: Role, secret: Option<&str>) -> LinkConfig {
        LinkConfig {
            identity: Arc::new(Identity {
                engine_id: format!("{role:?}"),
                start_id: [role as u8; 16],
                rank: 3,
                secret: secret.map(|secret| secret.as_bytes().to_vec()),
            }),
            role,
            hello: Hello {
                channel: Channel::Control,
                namespace: [1; 32],
                facts: Vec::new(),
                block_tokens: 16,
                cache: None,
                probe: None,
                device: None,
                nccl: None,
            },
            handshake_timeout: Duration::from_secs(2),
            heartbeat: Duration::from_secs(1),
            peer_timeout: Duration::from_secs(5),
        }
    }

    fn pair(dialling: Option<&str>, accepting: Option<&str>, now: Instant) -> (Link, Link) {
        (
            Link::new(Side::Dialling, config(Role::Puller, dialling), [1; 32], now),
            Link::new(Side::Accepting, config(Role::Holder, accepting), [2; 32], now),
        )
    }

    /// Exchanges messages until nobody has one; gives everything that the dialling side sent.
    fn talk(left: &mut Link, right: &mut Link, now: Instant) -> Result<Vec<Message>, LinkError> {
        let mut sent = Vec::new();
        loop {
            let (there, back) = (left.take_outgoing(now), right.take_outgoing(now));
            if there.is_empty() && back.is_empty() {
                return Ok(sent);
            }
            sent.extend(there.iter().cloned());
            for message in there {
                right.receive(now, message)?;
            }
            for message in back {
                left.receive(now, message)?;
            }
        }
    }

    #[test]
    fn two_sides_with_one_secret_or_none_know_each_other_after_the_handshake() {
        for secret in [None, Some("a secret")] {
            let now = Instant::now();
            let (mut left, mut right) = pair(secret, secret, now);
            talk(&mut left, &mut right, now).unwrap();
            assert!(left.is_ready() && right.is_ready());
            assert_eq!(left.peer().unwrap().engine_id, "Holder");
            assert_eq!(right.peer().unwrap().role, Role::Puller);
            assert_eq!(right.channel(), Some(Channel::Control));
        }
    }

    #[test]
    fn another_secret_is_refused_before_anything_is_told() {
        let now = Instant::now();
        for (own, other) in [(Some("a"), Some("b")), (Some("a"), None), (None, Some("a"))] {
            let (mut left, mut right) = pair(own, other, now);
            let error = talk(&mut left, &mut right, now).unwrap_err();
            assert!(matches!(error, LinkError::Refused(_)), "{error:?}");
            assert!(left.peer_hello().is_none() && right.peer_hello().is_none());
        }
    }

    #[test]
    fn a_recorded_handshake_is_refused_by_a_fresh_connection() {
        let now = Instant::now();
        let (mut left, mut right) = pair(Some("a"), Some("a"), now);
        let recorded = talk(&mut left, &mut right, now).unwrap();
        let mut fresh = Link::new(Side::Accepting, config(Role::Holder, Some("a")), [9; 32], now);
        let error = recorded
            .into_iter()
            .find_map(|message| fresh.receive(now, message).err());
        assert!(matches!(error, Some(LinkError::Refused(_))), "{error:?}");
    }

    #[test]
    fn a_proof_sent_back_to_its_maker_is_refused() {
        let now = Instant::now();
        let (mut left, mut right) = pair(Some("a"), Some("a"), now);
        right.receive(now, left.take_outgoing(now).remove(0)).unwrap();
        let answers = right.take_outgoing(now);
        let error = right.receive(now, answers[1].clone()).unwrap_err();
        assert!(matches!(error, LinkError::Refused(_)), "{error:?}");
    }

    #[test]
    fn silence_is_broken_by_a_heartbeat_and_ends_the_connection_if_it_lasts() {
        let start = Instant::now();
        let (mut left, mut right) = pair(None, None, start);
        talk(&mut left, &mut right, start).unwrap();
        let later = left.next_deadline();
        assert_eq!(later, start + Duration::from_secs(1));
        left.tick(later).unwrap();
        assert_eq!(left.take_outgoing(later), [Message::Ping]);
        let end = start + Duration::from_secs(5);
        assert_eq!(left.tick(end), Err(LinkError::Silent(Duration::from_secs(5))));
    }

    #[test]
    fn a_handshake_that_stops_half_way_ends() {
        let start = Instant::now();
        let (mut left, _) = pair(None, None, start);
        assert_eq!(left.next_deadline(), start + Duration::from_secs(2));
        left.tick(start + Duration::from_millis(1999)).unwrap();
        let error = left.tick(start + Duration::from_secs(2)).unwrap_err();
        assert!(matches!(error, LinkError::Handshake(_)));
    }

    #[test]
    fn messages_out_of_place_are_refused() {
        let now = Instant::now();
        let (mut left, mut right) = pair(None, None, now);
        let early = Message::Done { transfer: 1 };
        assert!(matches!(
            right.receive(now, early.clone()),
            Err(LinkError::Unexpected(_))
        ));
        let (mut left2, mut right2) = pair(None, None, now);
        talk(&mut left2, &mut right2, now).unwrap();
        assert_eq!(right2.receive(now, early.clone()), Ok(Some(early)));
        let open = left.take_outgoing(now).remove(0);
        assert!(matches!(right2.receive(now, open), Err(LinkError::Unexpected(_))));
    }
}
