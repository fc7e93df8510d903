//! The decode server: asks, pulls, copies, and looks at what it got.

use std::time::Duration;

use kvlane_p2p::Prompt;
use kvlane_p2p::TransferKey;
use kvlane_p2p::proto::{ConnectionId, Copied, PostedBlocks, PullRequest, PullResult, Span, State, Verdict};
use rand::Rng;

use super::{Copy, Event, LAYERS, Request, World, tokens_of};

impl World {
    pub(super) fn arrive(&mut self, number: u64) {
        let blocks = self.random.random_range(1..6);
        let tokens = blocks * self.prefill_tokens - self.random.random_range(0..self.prefill_tokens);
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
            is_posted: false,
            copied_pieces: 0,
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

    pub(super) fn look(&mut self, number: u64) {
        let Some(request) = self.requests.get(&number) else {
            return;
        };
        if request.is_over || request.job.is_some() {
            return;
        }
        let (key, prompt) = (request.key.clone(), request.prompt);
        let blocks = prompt.block_count(self.decode_tokens);
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
                    self.target[tokens_of(block, self.decode_tokens)].fill([None; LAYERS as usize]);
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
                    readers: 1,
                    deadline: self.instant() + timeout,
                };
                if let Some(request) = self.requests.get_mut(&number) {
                    (request.job, request.targets) = (Some(job), targets);
                }
                if self.may_take() {
                    self.totals.taken += 1;
                    return self.puller.take(ConnectionId(connection), pull);
                }
                let posted = self.posted(&pull);
                if let Some(request) = self.requests.get_mut(&number) {
                    request.is_posted = posted.is_some();
                }
                self.puller.pull(ConnectionId(connection), pull, posted);
            }
            _ => {
                self.totals.unanswered += 1;
                self.end_request(number);
            }
        }
    }

    /// What a reader of prefill's memory finds of a pull's blocks. It may be of a lease that has ended.
    pub(super) fn posted(&mut self, pull: &PullRequest) -> Option<PostedBlocks> {
        // Without a HELLO nobody knows where the memory is.
        let is_known = |id| {
            self.connections
                .get(&id)
                .is_some_and(|known| known.decode.link.is_ready())
        };
        if !self.pulling.is_some_and(is_known) || !self.hits(self.faults.looks) {
            return None;
        }
        let (_, posted) = self
            .board
            .get(&pull.key)
            .filter(|(prompt, _)| *prompt == pull.prompt)?;
        let end_token =
            ((pull.first_block + pull.targets.len() as u32) * self.decode_tokens).min(pull.prompt.tokens);
        let wanted = (pull.first_block * self.decode_tokens / self.prefill_tokens) as usize
            ..end_token.div_ceil(self.prefill_tokens) as usize;
        Some(PostedBlocks {
            blocks: posted.blocks.get(wanted)?.to_vec(),
            ..*posted
        })
    }

    /// Only from a peer that is known, and whose blocks are like ours.
    fn may_take(&mut self) -> bool {
        let is_ready = |id| {
            self.connections
                .get(&id)
                .is_some_and(|known| known.decode.link.is_ready())
        };
        self.pulling.is_some_and(is_ready)
            && self.prefill_tokens == self.decode_tokens
            && self.hits(self.faults.looks / 2)
    }

    /// Prefill looks for what is to be taken, and begins to send it.
    pub(super) fn take_arrives(&mut self, transfer: u64) {
        let Some(take) = self.takes.remove(&transfer) else {
            return; // it was stopped
        };
        let wanted = take.first_block as usize..take.first_block as usize + take.targets.len();
        let found = self
            .board
            .get(&take.key)
            .filter(|(prompt, posted)| {
                *prompt == take.prompt && self.table.get(posted.slot as usize) == Some(&posted.epoch)
            })
            .and_then(|(_, posted)| Some((posted.slot, posted.epoch, posted.blocks.get(wanted)?.to_vec())));
        let Some((slot, epoch, remote)) = found else {
            return self.puller.took(transfer, None);
        };
        let span = Span {
            layers: 0..LAYERS,
            remote,
            local: take.targets,
        };
        self.start_copy_of(transfer, slot, epoch, span, true);
    }

    pub(super) fn end_request(&mut self, number: u64) {
        if let Some(request) = self.requests.get_mut(&number) {
            request.is_over = true;
            let key = request.key.clone();
            self.asker.forget(&key);
        }
    }

    pub(super) fn pull_ended(&mut self, job: u64, result: PullResult) {
        let number = self.jobs[&job];
        let Some(request) = self.requests.get(&number) else {
            return;
        };
        let tokens = request.prompt.tokens;
        let first = request.prompt.block_count(self.decode_tokens) - request.targets.len() as u32;
        let first_token = first * self.decode_tokens;
        let targets = request.targets.clone();
        assert!(
            !self.copies.values().any(|copy| copy.job == job),
            "a pull ended while a copy of it ran"
        );
        match result {
            PullResult::Done => {
                let found = targets
                    .iter()
                    .flat_map(|&block| &self.target[tokens_of(block, self.decode_tokens)]);
                for (token, found) in (first_token..tokens).zip(found) {
                    let expected = Some((number, token));
                    assert_eq!(
                        *found, [expected; LAYERS as usize],
                        "token {token} of request {number}"
                    );
                }
                self.totals.pulled += 1;
                // Otherwise they were copied again, by a grant.
                let units = (tokens - first_token).div_ceil(self.unit_tokens);
                let is_as_posted = request.is_posted && request.copied_pieces == (units * LAYERS) as usize;
                self.totals.pulled_as_posted += u64::from(is_as_posted);
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

    pub(super) fn start_copy(&mut self, transfer: u64, slot: u32, epoch: u64, span: Span) {
        self.start_copy_of(transfer, slot, epoch, span, false);
    }

    fn start_copy_of(&mut self, transfer: u64, slot: u32, epoch: u64, span: Span, is_take: bool) {
        let number = span
            .local
            .first()
            .and_then(|&unit| self.target_owner[(unit * self.unit_tokens / self.decode_tokens) as usize]);
        let job = number.expect("a copy goes into blocks of its own") + 1;
        if let Some(request) = self.requests.get_mut(&(job - 1)) {
            request.copied_pieces += span.layers.len() * span.local.len();
        }
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
            is_take,
        };
        self.copies.insert(self.last_copy, copy);
        let id = self.last_copy;
        self.soon(5, Event::CopyPiece { copy: id });
    }

    pub(super) fn copy_piece(&mut self, id: u64) {
        let Some(copy) = self.copies.get_mut(&id) else {
            return;
        };
        let blocks = copy.span.local.len();
        let layers = (copy.span.layers.end - copy.span.layers.start) as usize;
        let is_done = copy.next == blocks * layers;
        if copy.is_stopped || is_done {
            let (transfer, slot, epoch, stopped) = (copy.transfer, copy.slot, copy.epoch, copy.is_stopped);
            let held = self.table.get(slot as usize) == Some(&epoch) || self.faults.blind_to_lapses;
            let is_take = copy.is_take;
            self.copies.remove(&id);
            if is_take {
                let lease = (held && !stopped).then_some((slot, epoch));
                return self.puller.took(transfer, lease);
            }
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
        let (from, to) = (copy.span.remote[place], copy.span.local[place]);
        let (job, is_slow) = (copy.job, copy.is_slow);
        copy.next += 1;
        assert_eq!(
            self.target_owner[(to * self.unit_tokens / self.decode_tokens) as usize],
            Some(job - 1),
            "a copy wrote into somebody else's block"
        );
        let (from, to) = (tokens_of(from, self.unit_tokens), tokens_of(to, self.unit_tokens));
        for (from, to) in from.zip(to) {
            self.target[to][layer] = self.source[from][layer];
        }
        self.soon(if is_slow { 400 } else { 3 }, Event::CopyPiece { copy: id });
    }
}
