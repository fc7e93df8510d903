//! A prefill and a decode server, the connections between them, and their caches, all made of numbers.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_p2p::proto::{
    Asker, AskerAction, AskerLimits, Channel, ConnectionId, Copied, EndReason, Frames, Hello, Holder,
    HolderAction, HolderLimits, Identity, Link, LinkConfig, Message, Offer, Progress, PullRequest,
    PullResult, Puller, PullerAction, PullerLimits, Role, Side, Span, State, Verdict, encode,
};
use kvlane_p2p::{Prompt, TransferKey};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const BLOCK_TOKENS: u32 = 4;
const LAYERS: u32 = 3;
const BLOCKS: u32 = 40;
const LEASE: Duration = Duration::from_millis(400);
/// No schedule needs longer: everything has a deadline far below.
const END: Duration = Duration::from_secs(60);

/// What goes wrong in a schedule, each as so many of a thousand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Faults {
    pub(crate) breaks: u32,
    pub(crate) restarts: u32,
    pub(crate) preemptions: u32,
    pub(crate) aborts: u32,
    pub(crate) lies: u32,
    pub(crate) duplicates: u32,
    pub(crate) slow_copies: u32,
    pub(crate) slow_messages: u32,
    pub(crate) never_prefilled: u32,
    /// How long a lease outlasts its time while it is read.
    pub(crate) reading: Duration,
    /// For the test of the test.
    pub(crate) blind_to_lapses: bool,
}

impl Faults {
    pub(crate) fn none() -> Self {
        Self {
            breaks: 0,
            restarts: 0,
            preemptions: 0,
            aborts: 0,
            lies: 0,
            duplicates: 0,
            slow_copies: 0,
            slow_messages: 0,
            never_prefilled: 0,
            reading: 2 * LEASE,
            blind_to_lapses: false,
        }
    }

    /// Each kind absent, rare or frequent.
    pub(crate) fn all(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed ^ 0xfa17);
        let mut some = |most: u32| match random.random_range(0..3) {
            0 => 0,
            1 => most / 5,
            _ => most,
        };
        Self {
            breaks: some(8),
            restarts: some(4),
            preemptions: some(60),
            aborts: some(150),
            lies: some(15),
            duplicates: some(10),
            slow_copies: some(200),
            slow_messages: some(60),
            never_prefilled: some(150),
            reading: some(2) * LEASE,
            blind_to_lapses: false,
        }
    }
}

/// What happened.
#[derive(Clone, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) requests: u64,
    pub(crate) pulled: u64,
    pub(crate) lapsed: u64,
    pub(crate) denied: u64,
    pub(crate) timed_out: u64,
    pub(crate) cancelled: u64,
    pub(crate) unreachable: u64,
    pub(crate) unanswered: u64,
    pub(crate) broken: u64,
    pub(crate) restarts: u64,
    pub(crate) lies: u64,
    pub(crate) expired: u64,
}

impl Totals {
    pub(crate) fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.pulled += other.pulled;
        self.lapsed += other.lapsed;
        self.denied += other.denied;
        self.timed_out += other.timed_out;
        self.cancelled += other.cancelled;
        self.unreachable += other.unreachable;
        self.unanswered += other.unanswered;
        self.broken += other.broken;
        self.restarts += other.restarts;
        self.lies += other.lies;
        self.expired += other.expired;
    }
}

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
    /// The next deadline of a machine.
    Tick,
}

/// One block's content in a layer: what it is of, or nothing.
type Content = Option<(u64, u32)>;

struct Request {
    key: TransferKey,
    prompt: Prompt,
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
    // prefill
    holder: Holder,
    table: Vec<u64>,
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
        Self {
            random: StdRng::seed_from_u64(seed),
            faults,
            start: Instant::now(),
            now: Duration::ZERO,
            events: BinaryHeap::new(),
            sequence: 0,
            requests: HashMap::new(),
            holder: Holder::new(holder_limits(faults)),
            table: vec![1; 8],
            source: vec![[None; LAYERS as usize]; BLOCKS as usize],
            source_free: (0..BLOCKS).collect(),
            waiting_holds: HashMap::new(),
            starts: 0,
            asker: Asker::new(AskerLimits { questions: 8 }),
            puller: Puller::new(PullerLimits {
                pulls: 8,
                layers: LAYERS,
                block_count_max: BLOCKS,
                // Small spans stay whole.
                parts: 2,
                part_pieces_min: 2,
            }),
            target: vec![[None; LAYERS as usize]; BLOCKS as usize],
            target_free: (0..BLOCKS).collect(),
            target_owner: vec![None; BLOCKS as usize],
            copies: HashMap::new(),
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

    // ---- decode's scheduler half

    fn arrive(&mut self, number: u64) {
        let blocks = self.random.random_range(1..6);
        let tokens = blocks * BLOCK_TOKENS - self.random.random_range(0..BLOCK_TOKENS);
        let mut digest = [0; 32];
        digest[..8].copy_from_slice(&number.to_le_bytes());
        let request = Request {
            key: TransferKey::new(format!("request {number}")).expect("accepted"),
            prompt: Prompt { tokens, digest },
            blocks,
            hold: None,
            source: Vec::new(),
            computed: 0,
            computed_layers: 0,
            allocated: 0,
            is_computing: true,
            targets: Vec::new(),
            job: None,
            is_over: false,
            aborts: self.hits(self.faults.aborts),
        };
        self.requests.insert(number, request);
        // Both orders: the question before the computation, and behind it.
        if !self.hits(self.faults.never_prefilled) {
            self.soon(60, Event::Compute(number));
        }
        self.soon(60, Event::Look(number));
    }

    fn look(&mut self, number: u64) {
        let Some(request) = self.requests.get(&number) else {
            return;
        };
        if request.is_over || request.job.is_some() {
            return;
        }
        let (key, prompt, blocks) = (request.key.clone(), request.prompt, request.blocks);
        if request.aborts && self.random.random_bool(0.1) {
            self.totals.cancelled += 1;
            return self.end_request(number);
        }
        let state = match self.asker.state(&key) {
            Some(state) => state,
            None => {
                let connection = self.connection(false);
                let timeout = Duration::from_millis(self.random.random_range(300..2000));
                if !self
                    .asker
                    .ask(self.instant(), ConnectionId(connection), &key, prompt, timeout)
                {
                    self.totals.unanswered += 1;
                    return self.end_request(number);
                }
                State::Pending
            }
        };
        match state {
            State::Pending => self.soon(20, Event::Look(number)),
            State::Answered(Verdict::Started | Verdict::Ready) => {
                let first = self.random.random_range(0..blocks);
                let count = (blocks - first) as usize;
                if self.target_free.len() < count {
                    return self.soon(20, Event::Look(number));
                }
                let targets: Vec<u32> = self.target_free.drain(..count).collect();
                for &block in &targets {
                    self.target_owner[block as usize] = Some(number);
                    self.target[block as usize] = [None; LAYERS as usize];
                }
                let job = number + 1;
                self.jobs.insert(job, number);
                let connection = self.connection(true);
                let timeout = Duration::from_millis(self.random.random_range(200..1500));
                let pull = PullRequest {
                    job,
                    key,
                    prompt,
                    first_block: first,
                    targets: targets.clone(),
                    deadline: self.instant() + timeout,
                };
                if let Some(request) = self.requests.get_mut(&number) {
                    (request.job, request.targets) = (Some(job), targets);
                }
                self.puller.pull(ConnectionId(connection), pull);
            }
            _ => {
                self.totals.unanswered += 1;
                self.end_request(number);
            }
        }
    }

    fn end_request(&mut self, number: u64) {
        if let Some(request) = self.requests.get_mut(&number) {
            request.is_over = true;
            let key = request.key.clone();
            self.asker.forget(&key);
        }
    }

    fn pull_ended(&mut self, job: u64, result: PullResult) {
        let number = self.jobs[&job];
        let Some(request) = self.requests.get(&number) else {
            return;
        };
        let first = request.blocks - request.targets.len() as u32;
        let targets = request.targets.clone();
        assert!(
            !self.copies.values().any(|copy| copy.job == job),
            "a pull ended while a copy of it ran"
        );
        match result {
            PullResult::Done => {
                for (place, &block) in targets.iter().enumerate() {
                    let expected = Some((number, first + place as u32));
                    let found = self.target[block as usize];
                    assert_eq!(
                        found, [expected; LAYERS as usize],
                        "block {place} of request {number}"
                    );
                }
                self.totals.pulled += 1;
            }
            PullResult::Lapsed => self.totals.lapsed += 1,
            PullResult::Denied(_) => self.totals.denied += 1,
            PullResult::TimedOut => self.totals.timed_out += 1,
            PullResult::Cancelled => self.totals.cancelled += 1,
            _ => self.totals.unreachable += 1,
        }
        for block in targets {
            self.target_owner[block as usize] = None;
            self.target_free.push(block);
        }
        self.end_request(number);
    }

    fn start_copy(&mut self, transfer: u64, slot: u32, epoch: u64, span: Span) {
        let number = span
            .local
            .first()
            .and_then(|&block| self.target_owner[block as usize]);
        let job = number.expect("a copy goes into blocks of its own") + 1;
        self.last_copy += 1;
        let is_slow = self.hits(self.faults.slow_copies);
        let copy = Copy {
            transfer,
            slot,
            epoch,
            span,
            next: 0,
            is_stopped: false,
            job,
            is_slow,
        };
        self.copies.insert(self.last_copy, copy);
        let id = self.last_copy;
        self.soon(5, Event::CopyPiece { copy: id });
    }

    fn copy_piece(&mut self, id: u64) {
        let Some(copy) = self.copies.get_mut(&id) else {
            return;
        };
        let blocks = copy.span.local.len();
        let layers = (copy.span.layers.end - copy.span.layers.start) as usize;
        let is_done = copy.next == blocks * layers;
        if copy.is_stopped || is_done {
            let (transfer, slot, epoch, stopped) = (copy.transfer, copy.slot, copy.epoch, copy.is_stopped);
            let held = self.table.get(slot as usize) == Some(&epoch) || self.faults.blind_to_lapses;
            self.copies.remove(&id);
            let copied = match (stopped, held) {
                (true, _) => Copied::Failed,
                (_, true) if self.random.random_bool(0.5) && !self.faults.blind_to_lapses => {
                    Copied::Unchecked
                }
                (_, true) => Copied::Held,
                (_, false) => Copied::Lapsed,
            };
            return self.puller.copied(transfer, copied);
        }
        let (place, layer) = (
            copy.next / layers,
            copy.span.layers.start as usize + copy.next % layers,
        );
        let (from, to) = (copy.span.remote[place] as usize, copy.span.local[place] as usize);
        let (job, is_slow) = (copy.job, copy.is_slow);
        copy.next += 1;
        assert_eq!(
            self.target_owner[to],
            Some(job - 1),
            "a copy wrote into somebody else's block"
        );
        self.target[to][layer] = self.source[from][layer];
        self.soon(if is_slow { 400 } else { 3 }, Event::CopyPiece { copy: id });
    }

    // ---- prefill's engine

    fn compute(&mut self, number: u64) {
        let now = self.instant();
        let Some(request) = self.requests.get(&number) else {
            return;
        };
        if !request.is_computing {
            return;
        }
        let (key, prompt, blocks) = (request.key.clone(), request.prompt, request.blocks);
        let Some(hold) = request.hold.clone() else {
            // Scheduled for the first time, or again: gets blocks.
            let count = if self.random.random_bool(0.5) { 1 } else { blocks };
            if self.source_free.len() < blocks as usize {
                return self.soon(30, Event::Compute(number));
            }
            let own: Vec<u32> = self.source_free.drain(..blocks as usize).collect();
            let hold: Arc<str> = format!("{number} at {}", self.now.as_micros()).into();
            let offer = Offer {
                hold: Arc::clone(&hold),
                key,
                prompt,
                blocks: own[..count as usize].to_vec(),
            };
            self.holder.offer(now, offer);
            for &block in &own {
                self.source[block as usize] = [None; LAYERS as usize];
            }
            if let Some(request) = self.requests.get_mut(&number) {
                (request.hold, request.source) = (Some(hold), own);
                (request.computed, request.computed_layers) = (0, 0);
                request.allocated = count;
            }
            return self.soon(10, Event::Compute(number));
        };
        if self.hits(self.faults.preemptions) {
            // Its blocks go to somebody else at once.
            self.holder.revoke(&hold);
            self.apply_holder();
            let Some(request) = self.requests.get_mut(&number) else {
                return;
            };
            request.hold = None;
            let freed = std::mem::take(&mut request.source);
            for &block in &freed {
                self.source[block as usize] = [Some((u64::MAX, block)); LAYERS as usize];
            }
            self.source_free.extend(freed);
            return self.soon(100, Event::Compute(number));
        }
        let chunk = self.random.random_range(1..=3);
        let Some(request) = self.requests.get_mut(&number) else {
            return;
        };
        let wave = (request.computed + chunk).min(blocks);
        // Blocks are allocated chunk by chunk.
        if wave > request.allocated {
            let late = &request.source[request.allocated as usize..wave as usize];
            self.holder.extend(&hold, late);
            request.allocated = wave;
        }
        let layer = request.computed_layers as usize;
        for index in request.computed..wave {
            self.source[request.source[index as usize] as usize][layer] = Some((number, index));
        }
        // All blocks of a wave have the same layers: it is as wide as it was at its first layer.
        if request.computed_layers > 0 {
            for index in request.computed..wave {
                for earlier in 0..layer {
                    self.source[request.source[index as usize] as usize][earlier] = Some((number, index));
                }
            }
        }
        request.computed_layers += 1;
        let mut progress = Progress {
            done_blocks: request.computed,
            wave_blocks: wave,
            wave_layers: request.computed_layers,
        };
        if request.computed_layers == LAYERS {
            // The whole wave has been filled in the last layer only as far as it went just now.
            (request.computed, request.computed_layers) = (wave, 0);
            progress = Progress {
                done_blocks: wave,
                wave_blocks: wave,
                wave_layers: 0,
            };
        }
        let is_done = request.computed == blocks;
        self.holder.progress(&hold, progress);
        if !is_done {
            return self.soon(10, Event::Compute(number));
        }
        if let Some(request) = self.requests.get_mut(&number) {
            request.is_computing = false;
            let own = std::mem::take(&mut request.source);
            self.waiting_holds.insert(Arc::clone(&hold), own);
        }
        self.holder.finish(now, &hold);
    }

    fn apply_holder(&mut self) {
        while let Some(action) = self.holder.next_action() {
            match action {
                HolderAction::SetEpoch { slot, epoch } => {
                    assert!(epoch > self.table[slot as usize], "an epoch goes back");
                    self.table[slot as usize] = epoch;
                }
                HolderAction::Send(ConnectionId(connection), message) => {
                    self.send(connection, false, message)
                }
                HolderAction::Ended { hold, reason } => {
                    if reason == EndReason::Expired {
                        self.totals.expired += 1;
                    }
                    let freed = self
                        .waiting_holds
                        .remove(&hold)
                        .expect("an end is told once, of a finished request");
                    // Somebody else writes there from now on.
                    for &block in &freed {
                        self.source[block as usize] = [Some((u64::MAX, block)); LAYERS as usize];
                    }
                    self.source_free.extend(freed);
                }
            }
        }
    }

    /// A new process at the same address: nothing of the old one is known, and its blocks hold other things.
    fn restart_prefill(&mut self) {
        self.totals.restarts += 1;
        self.starts += 1;
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        ids.into_iter().for_each(|id| self.break_connection(id));
        while self.holder.next_action().is_some() {}
        self.holder = Holder::new(holder_limits(self.faults));
        // What a reader of the old process' memory would find.
        self.table = vec![0; 8];
        self.source = vec![[Some((u64::MAX, 0)); LAYERS as usize]; BLOCKS as usize];
        self.source_free = (0..BLOCKS).collect();
        self.waiting_holds.clear();
        for request in self.requests.values_mut() {
            (request.hold, request.is_computing) = (None, false);
            request.source.clear();
        }
        self.stop_all_copies();
        self.table = vec![1; 8];
    }

    /// Whoever reads a process that has ended gets an error.
    fn stop_all_copies(&mut self) {
        self.copies.values_mut().for_each(|copy| copy.is_stopped = true);
    }

    // ---- connections

    fn connection(&mut self, is_puller: bool) -> u64 {
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

    fn send(&mut self, id: u64, to_prefill: bool, message: Message) {
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

    fn lie(&mut self, message: Message) -> Message {
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
    fn transmit(&mut self, id: u64, to_prefill: bool, bytes: &[u8]) {
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

    fn deliver(&mut self, id: u64, to_prefill: bool, bytes: &[u8]) {
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

    fn break_connection(&mut self, id: u64) {
        if self.connections.remove(&id).is_none() {
            return;
        }
        self.totals.broken += 1;
        if self.asking == Some(id) {
            self.asking = None;
        }
        if self.pulling == Some(id) {
            self.pulling = None;
        }
        let now = self.instant();
        self.holder.closed(now, ConnectionId(id));
        self.asker.closed(ConnectionId(id));
        self.puller.closed(ConnectionId(id));
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

fn holder_limits(faults: Faults) -> HolderLimits {
    HolderLimits {
        block_tokens: BLOCK_TOKENS,
        slots: 8,
        lease: LEASE,
        reading: faults.reading,
        readers: 1,
        unclaimed_blocks: 25,
        questions: 8,
        question_wait: Duration::from_secs(1),
        transfers_per_connection: 8,
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
            block_tokens: BLOCK_TOKENS,
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
