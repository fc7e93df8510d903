//! A prefill and a decode server, the connections between them, and their caches, all made of numbers.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_p2p::proto::{
    Asker, AskerAction, AskerLimits, ConnectionId, Frames, Holder, HolderLimits, Link, Message, PostedBlocks,
    Puller, PullerAction, PullerLimits, Span, encode,
};
use kvlane_p2p::{Prompt, TransferKey};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

mod connections;
mod decode;
mod faults;
mod prefill;

pub(crate) use faults::{Faults, Totals};

/// Tokens of a block of prefill, and of decode. Half of the schedules have the first pair.
const BLOCK_SIZES: [(u32, u32); 5] = [(4, 4), (8, 4), (2, 4), (6, 4), (3, 1)];
const LAYERS: u32 = 3;
const BLOCKS: u32 = 40;
const LEASE: Duration = Duration::from_millis(400);
/// No schedule needs longer: everything has a deadline far below.
const END: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// Decode's scheduler half has a new request.
    Arrive(u64),
    /// It looks what became of its question.
    Look(u64),
    /// Prefill's engine makes a step with a request.
    Compute(u64),
    /// Bytes arrive at one end.
    Deliver {
        connection: u64,
        to_prefill: bool,
        bytes: Vec<u8>,
    },
    /// A piece of a span is copied.
    CopyPiece { copy: u64 },
    /// Prefill's serving end sees that blocks are to be taken.
    TakeArrives { transfer: u64 },
    /// The next deadline of a machine.
    Tick,
}

/// One token's content in a layer: the request and the position in its prompt, or nothing.
type Content = Option<(u64, u32)>;

struct Request {
    key: TransferKey,
    prompt: Prompt,
    /// Of prefill.
    blocks: u32,
    /// Prefill's part.
    hold: Option<Arc<str>>,
    source: Vec<u32>,
    computed: u32,
    computed_layers: u32,
    /// Blocks that the holder knows.
    allocated: u32,
    is_computing: bool,
    /// Decode's part.
    targets: Vec<u32>,
    job: Option<u64>,
    is_posted: bool,
    /// Pieces of units whose copying has begun.
    copied_pieces: usize,
    is_over: bool,
    aborts: bool,
}

struct Copy {
    transfer: u64,
    slot: u32,
    epoch: u64,
    span: Span,
    next: usize,
    is_stopped: bool,
    job: u64,
    is_slow: bool,
    /// Of a take, and not of a span that was asked for.
    is_take: bool,
}

/// A take on its way to prefill.
struct Take {
    key: TransferKey,
    prompt: Prompt,
    first_block: u32,
    targets: Vec<u32>,
}

struct End {
    frames: Frames,
    link: Link,
}

struct Connection {
    prefill: End,
    decode: End,
    is_puller: bool,
    /// Bytes go in order: nothing arrives before what was sent before.
    to_prefill_at: Duration,
    to_decode_at: Duration,
    waiting: Vec<Message>,
}

pub(crate) struct World {
    random: StdRng,
    faults: Faults,
    start: Instant,
    now: Duration,
    events: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    sequence: u64,
    requests: HashMap<u64, Request>,
    /// Tokens of a block of prefill, of decode, and of what both have in common.
    prefill_tokens: u32,
    decode_tokens: u32,
    unit_tokens: u32,
    // prefill
    holder: Holder,
    table: Vec<u64>,
    /// What was posted last under each key: a reader of the process' memory finds it there.
    board: HashMap<TransferKey, (Prompt, PostedBlocks)>,
    source: Vec<[Content; LAYERS as usize]>,
    source_free: Vec<u32>,
    waiting_holds: HashMap<Arc<str>, Vec<u32>>,
    starts: u64,
    // decode
    asker: Asker,
    puller: Puller,
    target: Vec<[Content; LAYERS as usize]>,
    target_free: Vec<u32>,
    target_owner: Vec<Option<u64>>,
    copies: HashMap<u64, Copy>,
    takes: HashMap<u64, Take>,
    jobs: HashMap<u64, u64>,
    // both
    connections: HashMap<u64, Connection>,
    asking: Option<u64>,
    pulling: Option<u64>,
    last_connection: u64,
    last_copy: u64,
    totals: Totals,
}

impl World {
    /// Runs one schedule to its end.
    pub(crate) fn run(seed: u64, faults: Faults) -> Totals {
        let mut world = Self::new(seed, faults);
        let requests = world.random.random_range(1..12);
        for number in 0..requests {
            let at = Duration::from_millis(world.random.random_range(0..800));
            world.push(at, Event::Arrive(number));
        }
        while let Some(Reverse((time, _, event))) = world.events.pop() {
            assert!(time < END, "seed {seed}: a wait without end, at {event:?}");
            world.now = world.now.max(time);
            world.handle(event);
            world.settle();
        }
        world.check_end(seed);
        world.totals.requests = requests;
        world.totals
    }

    fn new(seed: u64, faults: Faults) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let pair = if random.random_bool(0.5) {
            0
        } else {
            random.random_range(0..BLOCK_SIZES.len())
        };
        let (prefill_tokens, decode_tokens) = BLOCK_SIZES[pair];
        let unit_tokens = (1..=prefill_tokens)
            .rev()
            .find(|unit| prefill_tokens.is_multiple_of(*unit) && decode_tokens.is_multiple_of(*unit));
        let nothing = |block_tokens| vec![[None; LAYERS as usize]; (BLOCKS * block_tokens) as usize];
        Self {
            random,
            faults,
            start: Instant::now(),
            now: Duration::ZERO,
            events: BinaryHeap::new(),
            sequence: 0,
            requests: HashMap::new(),
            prefill_tokens,
            decode_tokens,
            unit_tokens: unit_tokens.expect("one token fits all"),
            holder: Holder::new(holder_limits(faults, prefill_tokens)),
            table: vec![1; 8],
            board: HashMap::new(),
            source: nothing(prefill_tokens),
            source_free: (0..BLOCKS).collect(),
            waiting_holds: HashMap::new(),
            starts: 0,
            asker: Asker::new(AskerLimits { questions: 8 }),
            puller: Puller::new(PullerLimits {
                pulls: 8,
                layers: LAYERS,
                block_tokens: decode_tokens,
                block_count_max: BLOCKS,
                // Small spans stay whole.
                parts: 2,
                part_pieces_min: 2,
            }),
            target: nothing(decode_tokens),
            target_free: (0..BLOCKS).collect(),
            target_owner: vec![None; BLOCKS as usize],
            copies: HashMap::new(),
            takes: HashMap::new(),
            jobs: HashMap::new(),
            connections: HashMap::new(),
            asking: None,
            pulling: None,
            last_connection: 0,
            last_copy: 0,
            totals: Totals::default(),
        }
    }

    fn instant(&self) -> Instant {
        self.start + self.now
    }

    fn push(&mut self, at: Duration, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((at, self.sequence, event)));
    }

    fn soon(&mut self, most_ms: u64, event: Event) {
        let delay = Duration::from_micros(self.random.random_range(1..=most_ms * 1000));
        self.push(self.now + delay, event);
    }

    fn hits(&mut self, of_thousand: u32) -> bool {
        of_thousand > 0 && self.random.random_range(0..1000) < of_thousand
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrive(number) => self.arrive(number),
            Event::Look(number) => self.look(number),
            Event::Compute(number) => self.compute(number),
            Event::Deliver {
                connection,
                to_prefill,
                bytes,
            } => self.deliver(connection, to_prefill, &bytes),
            Event::CopyPiece { copy } => self.copy_piece(copy),
            Event::TakeArrives { transfer } => self.take_arrives(transfer),
            Event::Tick => {}
        }
        let now = self.instant();
        self.holder.tick(now);
        self.asker.tick(now);
        self.puller.tick(now);
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        for id in ids {
            let is_broken = self.connections.get_mut(&id).is_some_and(|connection| {
                connection.prefill.link.tick(now).is_err() || connection.decode.link.tick(now).is_err()
            });
            if is_broken {
                self.break_connection(id);
            }
        }
    }

    // ---- what machines want done

    fn apply(&mut self) {
        self.apply_holder();
        while let Some(AskerAction::Send(ConnectionId(id), message)) = self.asker.next_action() {
            self.send(id, true, message);
        }
        while let Some(action) = self.puller.next_action() {
            match action {
                PullerAction::Send(ConnectionId(id), message) => self.send(id, true, message),
                PullerAction::Copy {
                    transfer,
                    slot,
                    epoch,
                    span,
                    ..
                } => self.start_copy(transfer, slot, epoch, span),
                PullerAction::StopCopies { transfer } => {
                    for copy in self.copies.values_mut().filter(|copy| copy.transfer == transfer) {
                        copy.is_stopped = true;
                    }
                    if self.takes.remove(&transfer).is_some() {
                        self.puller.took(transfer, None);
                    }
                }
                PullerAction::Take {
                    transfer,
                    key,
                    prompt,
                    first_block,
                    targets,
                    ..
                } => {
                    let take = Take {
                        key,
                        prompt,
                        first_block,
                        targets,
                    };
                    self.takes.insert(transfer, take);
                    self.soon(20, Event::TakeArrives { transfer });
                }
                PullerAction::Ended { job, result, .. } => self.pull_ended(job, result),
            }
        }
    }

    fn settle(&mut self) {
        self.apply();
        let now = self.instant();
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        for id in ids {
            for to_prefill in [true, false] {
                let Some(connection) = self.connections.get_mut(&id) else {
                    break;
                };
                let end = if to_prefill {
                    &mut connection.decode
                } else {
                    &mut connection.prefill
                };
                let mut bytes = Vec::new();
                for message in end.link.take_outgoing(now) {
                    encode(&message, &mut bytes);
                }
                if !bytes.is_empty() {
                    self.transmit(id, to_prefill, &bytes);
                }
            }
        }
        self.apply();
        // Heartbeats go on for ever; the world ends when nothing else is left to wait for.
        let deadlines = [
            self.holder.next_deadline(),
            self.asker.next_deadline(),
            self.puller.next_deadline(),
        ];
        let (holds, _, questions, transfers) = self.holder.load();
        let is_busy =
            holds + questions + transfers + self.puller.pull_count() + self.asker.question_count() > 0;
        let links = self.connections.values().flat_map(|connection| {
            [
                connection.prefill.link.next_deadline(),
                connection.decode.link.next_deadline(),
            ]
        });
        let next = deadlines
            .into_iter()
            .flatten()
            .chain(links.filter(|_| is_busy))
            .min();
        if let Some(next) = next {
            let at = next.saturating_duration_since(self.start);
            let is_planned = self.events.iter().any(|Reverse((time, ..))| *time <= at);
            if !is_planned {
                self.push(at, Event::Tick);
            }
        }
    }

    fn check_end(&mut self, seed: u64) {
        let open: Vec<u64> = self
            .jobs
            .keys()
            .copied()
            .filter(|job| !self.requests[&(job - 1)].is_over)
            .collect();
        assert!(open.is_empty(), "seed {seed}: pulls without an end: {open:?}");
        assert_eq!(self.puller.pull_count(), 0, "seed {seed}: pulls");
        assert_eq!(self.asker.question_count(), 0, "seed {seed}: questions");
        assert!(self.copies.is_empty(), "seed {seed}: copies");
        assert!(self.takes.is_empty(), "seed {seed}: takes");
        assert_eq!(
            self.holder.load(),
            (0, 0, 0, 0),
            "seed {seed}: holds, blocks, questions, transfers"
        );
        assert_eq!(
            self.target_free.len(),
            BLOCKS as usize,
            "seed {seed}: decode's blocks"
        );
        assert_eq!(
            self.source_free.len(),
            BLOCKS as usize,
            "seed {seed}: prefill's blocks"
        );
    }
}

/// The tokens of a block, in a list of all tokens of a cache.
fn tokens_of(block: u32, block_tokens: u32) -> Range<usize> {
    let start = (block * block_tokens) as usize;
    start..start + block_tokens as usize
}

fn holder_limits(faults: Faults, block_tokens: u32) -> HolderLimits {
    HolderLimits {
        block_tokens,
        slots: 8,
        lease: LEASE,
        reading: faults.reading,
        readers: 1,
        unclaimed_blocks: 25,
        questions: 8,
        question_wait: Duration::from_secs(1),
        want_wait: Duration::from_secs(2),
        transfers_per_connection: 8,
        // Some prompts have more.
        posted_blocks: 4,
    }
}
