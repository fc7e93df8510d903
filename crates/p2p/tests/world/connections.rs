//! Connections: bytes in pieces that take their time, lies, and ends.

use std::sync::Arc;
use std::time::Duration;

use kvlane_p2p::proto::{
    Channel, ConnectionId, Frames, Hello, Identity, Link, LinkConfig, Message, Progress, Role, Side, Units,
    Verdict,
};
use rand::Rng;
use rand::rngs::StdRng;

use super::{BLOCKS, Connection, End, Event, World};

impl World {
    pub(super) fn connection(&mut self, is_puller: bool) -> u64 {
        let known = if is_puller { self.pulling } else { self.asking };
        if let Some(id) = known {
            return id;
        }
        self.last_connection += 1;
        let id = self.last_connection;
        let role = if is_puller { Role::Puller } else { Role::Asker };
        let now = self.instant();
        let nonce = |side: u8| [side ^ id as u8; 32];
        let end = |link| End {
            frames: Frames::new(),
            link,
        };
        let connection = Connection {
            prefill: end(Link::new(
                Side::Accepting,
                link_config(Role::Holder, self.starts),
                nonce(1),
                now,
            )),
            decode: end(Link::new(Side::Dialling, link_config(role, 0), nonce(2), now)),
            is_puller,
            to_prefill_at: self.now,
            to_decode_at: self.now,
            waiting: Vec::new(),
        };
        self.connections.insert(id, connection);
        *(if is_puller {
            &mut self.pulling
        } else {
            &mut self.asking
        }) = Some(id);
        let preamble = Frames::preamble();
        self.transmit(id, true, &preamble);
        self.transmit(id, false, &preamble);
        id
    }

    pub(super) fn send(&mut self, id: u64, to_prefill: bool, message: Message) {
        let lies = self.hits(self.faults.lies);
        let message = if lies { self.lie(message) } else { message };
        let copies = if self.hits(self.faults.duplicates) { 2 } else { 1 };
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let link = if to_prefill {
            &mut connection.decode.link
        } else {
            &mut connection.prefill.link
        };
        if link.is_ready() {
            (0..copies).for_each(|_| link.send(message.clone()));
        } else if to_prefill {
            connection.waiting.push(message);
        }
    }

    pub(super) fn lie(&mut self, message: Message) -> Message {
        self.totals.lies += 1;
        let number = |random: &mut StdRng| match random.random_range(0..3) {
            0 => u32::MAX,
            1 => random.random_range(0..BLOCKS),
            _ => random.random(),
        };
        let random = &mut self.random;
        match message {
            // A holder that names other blocks under a lease that holds would be believed: who holds is trusted with
            // what it holds. Lies about numbers and lengths must not do harm.
            Message::Ready {
                transfer,
                mut blocks,
                progress,
            } => {
                if random.random_bool(0.5) {
                    blocks.push(number(random) | 0x8000_0000);
                }
                let progress = Progress {
                    done_blocks: progress.done_blocks,
                    wave_blocks: number(random) | 0x8000_0000,
                    wave_layers: progress.wave_layers,
                };
                Message::Ready {
                    transfer,
                    blocks,
                    progress,
                }
            }
            Message::Want {
                transfer,
                key,
                prompt,
                ..
            } => Message::Want {
                transfer,
                key,
                prompt,
                first_block: number(random),
                block_count: number(random) | 0x8000_0000,
                block_tokens: number(random),
                readers: 1,
            },
            Message::Grant { transfer, slot, .. } => Message::Grant {
                transfer,
                slot: slot | 0x4000_0000,
                epoch: 0,
            },
            Message::Answer { .. } => Message::Answer {
                question: random.random(),
                verdict: Verdict::Ready,
            },
            Message::Done { .. } | Message::Cancel { .. } => Message::Check {
                transfer: random.random(),
                epoch: random.random(),
            },
            other => other,
        }
    }

    /// Bytes go over a connection in pieces, each of which takes its time; or the connection breaks.
    pub(super) fn transmit(&mut self, id: u64, to_prefill: bool, bytes: &[u8]) {
        if self.hits(self.faults.breaks) {
            return self.break_connection(id);
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let cut = self.random.random_range(1..=rest.len());
            let (piece, behind) = rest.split_at(cut);
            rest = behind;
            let most_us = if self.hits(self.faults.slow_messages) {
                700_000
            } else {
                4000
            };
            let delay = Duration::from_micros(self.random.random_range(10..most_us));
            let Some(connection) = self.connections.get_mut(&id) else {
                return;
            };
            let at = if to_prefill {
                &mut connection.to_prefill_at
            } else {
                &mut connection.to_decode_at
            };
            *at = (*at).max(self.now) + delay;
            let at = *at;
            let bytes = piece.to_vec();
            self.push(
                at,
                Event::Deliver {
                    connection: id,
                    to_prefill,
                    bytes,
                },
            );
        }
    }

    pub(super) fn deliver(&mut self, id: u64, to_prefill: bool, bytes: &[u8]) {
        if self.hits(self.faults.restarts) {
            return self.restart_prefill();
        }
        let now = self.instant();
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let end = if to_prefill {
            &mut connection.prefill
        } else {
            &mut connection.decode
        };
        end.frames.push(bytes);
        loop {
            let Some(connection) = self.connections.get_mut(&id) else {
                return;
            };
            let is_puller = connection.is_puller;
            let end = if to_prefill {
                &mut connection.prefill
            } else {
                &mut connection.decode
            };
            let message = match end.frames.next_message() {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(_) => return self.break_connection(id),
            };
            let was_ready = end.link.is_ready();
            let Ok(taken) = end.link.receive(now, message) else {
                return self.break_connection(id);
            };
            if !was_ready && end.link.is_ready() && !to_prefill {
                if is_puller && self.prefill_tokens != self.decode_tokens {
                    let units = Units {
                        unit_tokens: self.unit_tokens,
                        holder_block_tokens: self.prefill_tokens,
                    };
                    self.puller.meet(ConnectionId(id), units);
                }
                for message in std::mem::take(&mut connection.waiting) {
                    connection.decode.link.send(message);
                }
            }
            let Some(message) = taken else { continue };
            let id = ConnectionId(id);
            let result = match (to_prefill, is_puller) {
                (true, _) => self.holder.receive(now, id, is_puller, message),
                (false, true) => self.puller.receive(id, message),
                (false, false) if self.asker.receive(id, &message) => Ok(()),
                (false, false) => Err("no answer"),
            };
            if result.is_err() {
                return self.break_connection(id.0);
            }
            self.apply();
        }
    }

    pub(super) fn break_connection(&mut self, id: u64) {
        if self.connections.remove(&id).is_none() {
            return;
        }
        self.totals.broken += 1;
        if self.asking == Some(id) {
            self.asking = None;
        }
        let was_pulling = self.pulling == Some(id);
        if was_pulling {
            self.pulling = None;
        }
        let now = self.instant();
        self.holder.closed(now, ConnectionId(id));
        self.asker.closed(ConnectionId(id));
        self.puller.closed(ConnectionId(id));
        if !was_pulling {
            return;
        }
        // Its data connection goes with it.
        for (transfer, _) in std::mem::take(&mut self.takes) {
            self.puller.took(transfer, None);
        }
        for copy in self.copies.values_mut().filter(|copy| copy.is_take) {
            copy.is_stopped = true;
        }
    }
}

fn link_config(role: Role, start: u64) -> LinkConfig {
    LinkConfig {
        identity: Arc::new(Identity {
            engine_id: format!("{role:?}"),
            start_id: [role as u8 ^ start as u8; 16],
            rank: 0,
            secret: Some(b"simulated".to_vec()),
        }),
        role,
        hello: Hello {
            channel: Channel::Control,
            namespace: [1; 32],
            facts: Vec::new(),
            block_tokens: 4,
            cache: None,
            probe: None,
            device: None,
            nccl: None,
        },
        handshake_timeout: Duration::from_millis(300),
        heartbeat: Duration::from_millis(100),
        peer_timeout: Duration::from_millis(500),
    }
}
