//! The asker: what decode's scheduler half talks to.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;

use super::address::PeerAddress;
use super::dial::random_bytes;
use super::machine::{Machine, NetConfig};
use super::net::Net;
use super::options::AskerOptions;
use crate::error::{Error, Result};
use crate::key::{Prompt, TransferKey};
use crate::proto::{
    Asker, AskerAction, AskerLimits, Channel, ConnectionId, Hello, Identity, Link, Message, Role, State,
    Verdict,
};
use crate::shape::TENSOR_RANKS_MAX;

/// What is known about a prompt's KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Asked {
    /// Prefill has not answered yet.
    Pending,
    /// Prefill is computing it.
    Started,
    /// Prefill has all of it.
    Ready,
    /// Prefill does not have it, and it did not turn up in time.
    None,
    /// Prefill has another prompt under that key.
    Mismatch,
    /// Prefill cannot be reached.
    Unreachable,
    /// The address is not among the allowed ones.
    Refused,
    /// Prefill did not answer in time.
    TimedOut,
    /// Too many questions, here or there.
    Busy,
}

/// Prefill servers of which is known how many workers they have.
const KNOWN_MAX: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Asks prefill servers for prompts.
pub struct P2pAsker {
    net: Net<Questions>,
    options: AskerOptions,
}

struct Questions {
    asker: Asker,
    /// Of each prefill server that answered, how many workers share out its heads.
    tensor_ranks: LruCache<PeerAddress, u32>,
}

impl P2pAsker {
    /// Starts its thread. Nothing is connected yet.
    pub fn open(options: AskerOptions) -> Result<Self> {
        options.check()?;
        let hello = Hello {
            channel: Channel::Control,
            namespace: [0; 32],
            facts: Vec::new(),
            block_tokens: 0,
            cache: None,
            probe: None,
            device: None,
            nccl: None,
        };
        let config = NetConfig {
            options: options.peer.clone(),
            identity: Arc::new(identity(&options.peer)?),
            dial_role: Role::Asker,
            dial_hello: hello.clone(),
            accept_hello: hello,
        };
        let asker = Asker::new(AskerLimits {
            questions: options.questions,
        });
        Ok(Self {
            net: Net::start(
                config,
                None,
                Questions {
                    asker,
                    tensor_ranks: LruCache::new(KNOWN_MAX),
                },
            )?,
            options,
        })
    }

    /// What is known about the KV of `prompt` under `key`. The first call sends the question; further ones only look.
    pub fn ask(&self, key: &TransferKey, address: &PeerAddress, prompt: Prompt, timeout: Duration) -> Asked {
        if !self.options.peer.allows(address.host()) {
            return Asked::Refused;
        }
        let shared = self.net.shared();
        shared.with(|core, now| {
            if let Some(state) = core.machine.asker.state(key) {
                return asked(state);
            }
            let Some(connection) = shared.connection(core, now, address) else {
                return Asked::Unreachable;
            };
            if core.machine.asker.ask(now, connection, key, prompt, timeout) {
                Asked::Pending
            } else {
                Asked::Busy
            }
        })
    }

    /// Nobody wants to know any more. An unknown key is ignored.
    pub fn forget(&self, key: &TransferKey) {
        self.net.shared().with(|core, _| core.machine.asker.forget(key));
    }

    /// How many workers of a prefill server share out its KV heads. None: it was never reached, or does not say.
    pub fn tensor_ranks(&self, address: &PeerAddress) -> Option<u32> {
        let shared = self.net.shared();
        shared.with(|core, _| core.machine.tensor_ranks.get(address).copied())
    }

    /// Number of questions that are not forgotten.
    pub fn question_count(&self) -> usize {
        self.net
            .shared()
            .with(|core, _| core.machine.asker.question_count())
    }

    /// Ends its thread and its connections.
    pub fn close(&self) {
        self.net.close();
    }
}

pub(super) fn identity(options: &super::PeerOptions) -> Result<Identity> {
    let start_id = random_bytes().map_err(|source| Error::Io {
        context: "asking the system for random bytes",
        source,
    })?;
    Ok(Identity {
        engine_id: options.engine_id.clone(),
        start_id,
        rank: options.rank,
        secret: options.secret.clone(),
    })
}

fn asked(state: State) -> Asked {
    match state {
        State::Pending => Asked::Pending,
        State::Answered(Verdict::Started) => Asked::Started,
        State::Answered(Verdict::Ready) => Asked::Ready,
        State::Answered(Verdict::None) => Asked::None,
        State::Answered(Verdict::Mismatch) => Asked::Mismatch,
        State::Answered(Verdict::Busy) => Asked::Busy,
        State::Unreachable => Asked::Unreachable,
        State::TimedOut => Asked::TimedOut,
    }
}

impl Machine for Questions {
    fn connected(&mut self, _: Instant, _: ConnectionId, link: &Link, address: Option<&PeerAddress>) {
        let cache = link.peer_hello().and_then(|hello| hello.cache.as_ref());
        let shape = cache.and_then(|cache| cache.shape.as_ref());
        // What is kept decides how many ports of that host the workers connect to.
        let shape = shape.filter(|shape| (1..=TENSOR_RANKS_MAX).contains(&shape.tensor_ranks));
        if let (Some(address), Some(shape)) = (address, shape) {
            self.tensor_ranks.put(address.clone(), shape.tensor_ranks);
        }
    }

    fn receive(
        &mut self,
        _: Instant,
        connection: ConnectionId,
        message: Message,
    ) -> Result<(), &'static str> {
        if self.asker.receive(connection, &message) {
            Ok(())
        } else {
            Err("a message that is no answer")
        }
    }

    fn closed(&mut self, _: Instant, connection: ConnectionId) {
        self.asker.closed(connection);
    }

    fn close(&mut self, _: Instant) {}

    fn data_connection(&mut self, _: std::net::TcpStream, _: Vec<u8>, _: &Link) {}

    fn data_readable(&mut self, _: ConnectionId) {}

    fn next_deadline(&self) -> Option<Instant> {
        self.asker.next_deadline()
    }

    fn tick(&mut self, now: Instant) {
        self.asker.tick(now);
    }

    fn next_message(&mut self) -> Option<(ConnectionId, Message)> {
        let AskerAction::Send(connection, message) = self.asker.next_action()?;
        Some((connection, message))
    }
}
