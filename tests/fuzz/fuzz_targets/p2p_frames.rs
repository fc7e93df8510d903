//! Whoever reaches the port of a prefill server, or is reached by decode, sends these bytes: none may panic the decoder or
//! a state machine, make them keep more than their bounds, or be read as another message than they are written as.
//!
//! The state machines have a hold and a pull that hostile messages can be about; numbers are small, so that they often are.

#![no_main]

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_p2p::proto::{
    Channel, ConnectionId, Frames, Hello, Holder, HolderLimits, Identity, Link, LinkConfig, Message, Offer,
    Progress, PullRequest, Puller, PullerAction, PullerLimits, Role, Side, encode,
};
use kvlane_p2p::{Prompt, TransferKey};
use libfuzzer_sys::fuzz_target;

const PEER: ConnectionId = ConnectionId(1);
const LAYERS: u32 = 4;
const BLOCKS: u32 = 64;

fuzz_target!(|data: &[u8]| {
    let Some((&cut, bytes)) = data.split_first() else {
        return;
    };
    let mut frames = Frames::new();
    frames.push(&Frames::preamble());
    let now = Instant::now();
    let (mut holder, mut puller, mut link) = (holder(now), puller(now), link(now));
    for part in bytes.chunks(usize::from(cut) + 1) {
        frames.push(part);
        while let Ok(Some(message)) = frames.next_message() {
            check_round_trip(&message);
            let _ = link.receive(now, message.clone());
            let _ = holder.receive(now, PEER, true, message.clone());
            while holder.next_action().is_some() {}
            let _ = puller.receive(PEER, message);
            check_actions(&mut puller);
            let (holds, _, questions, transfers) = holder.load();
            assert!(
                holds <= 2 && questions <= 8 && transfers <= 8,
                "beyond the bounds"
            );
        }
    }
});

fn check_round_trip(message: &Message) {
    let mut bytes = Frames::preamble().to_vec();
    encode(message, &mut bytes);
    let mut frames = Frames::new();
    frames.push(&bytes);
    assert_eq!(frames.next_message(), Ok(Some(message.clone())));
}

/// Whatever a holder says, copies stay inside both caches.
fn check_actions(puller: &mut Puller) {
    while let Some(action) = puller.next_action() {
        if let PullerAction::Copy { span, .. } = action {
            assert!(span.layers.start < span.layers.end && span.layers.end <= LAYERS);
            assert_eq!(span.remote.len(), span.local.len());
            assert!(span.remote.iter().all(|&block| block < BLOCKS));
            assert!(span.local.iter().all(|block| [7, 8, 9].contains(block)));
        }
    }
}

fn key() -> TransferKey {
    TransferKey::new("k").expect("a key")
}

fn prompt() -> Prompt {
    Prompt {
        tokens: 12,
        digest: [0; 32],
    }
}

fn holder(now: Instant) -> Holder {
    let mut holder = Holder::new(HolderLimits {
        block_tokens: 4,
        slots: 2,
        lease: Duration::from_secs(1),
        reading: Duration::from_secs(2),
        readers: 2,
        unclaimed_blocks: 8,
        questions: 8,
        question_wait: Duration::from_secs(1),
        want_wait: Duration::from_secs(2),
        transfers_per_connection: 8,
        posted_blocks: 8,
    });
    holder.offer(
        now,
        Offer {
            hold: Arc::from("request"),
            key: key(),
            prompt: prompt(),
            blocks: vec![1, 2, 3],
        },
    );
    holder.progress(
        "request",
        Progress {
            done_blocks: 1,
            wave_blocks: 3,
            wave_layers: 1,
        },
    );
    holder
}

fn puller(now: Instant) -> Puller {
    let mut puller = Puller::new(PullerLimits {
        pulls: 4,
        layers: LAYERS,
        block_tokens: 4,
        block_count_max: BLOCKS,
        parts: 2,
        part_pieces_min: 1,
    });
    puller.pull(
        PEER,
        PullRequest {
            job: 1,
            key: key(),
            prompt: prompt(),
            first_block: 0,
            targets: vec![7, 8, 9],
            readers: 1,
            deadline: now + Duration::from_secs(1),
        },
        None,
    );
    while puller.next_action().is_some() {}
    puller
}

fn link(now: Instant) -> Link {
    let config = LinkConfig {
        identity: Arc::new(Identity {
            engine_id: "fuzzed".to_owned(),
            start_id: [1; 16],
            rank: 0,
            secret: None,
        }),
        role: Role::Holder,
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
        handshake_timeout: Duration::from_secs(1),
        heartbeat: Duration::from_secs(1),
        peer_timeout: Duration::from_secs(1),
    };
    Link::new(Side::Accepting, config, [2; 32], now)
}
