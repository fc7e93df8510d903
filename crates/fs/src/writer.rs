//! The writer thread: the only one that decides about slots. It takes commands, never waits for a copy, and never holds
//! anything that an engine's thread needs.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};
use kvlane_core::{BlockKey, JobId, NamespaceId};

use crate::control::WriterPlace;
use crate::counters::Counters;
use crate::directory::unix_ms;
use crate::format::{SlotRecord, SlotState};
use crate::growth::Generosity;
use crate::jobs::lock;
use crate::shared::{MARK_MS, Shared};
use crate::slots::{Slot, SlotRef, Slots};
use crate::store::{Place, Plan, StoreJob};

mod space;

/// How often the thread looks after things that nobody tells it about.
const TICK: Duration = Duration::from_millis(100);
/// How long a wish for space stands after space was last needed.
const WISH_LASTS: Duration = Duration::from_secs(10);
/// What the writer thread can be told.
#[derive(Debug)]
pub(crate) enum Command {
    /// Promise these keys until the deadline.
    Reserve {
        keys: Vec<BlockKey>,
        first_depth: u32,
        deadline: Instant,
    },
    /// Take the promises of these keys back.
    Withdraw { keys: Vec<BlockKey> },
    /// Decide where the job's blocks go.
    Begin(Arc<StoreJob>),
    /// This layer of the job may be copied.
    Layer(JobId, usize),
    /// All of the job may be copied.
    Finish(JobId),
    /// No thread copies for the job any more.
    Ended(JobId),
    /// End the thread.
    Stop,
}

/// What a storing thread can be told.
#[derive(Debug)]
pub(crate) enum StoreTask {
    /// Copy one layer of all blocks.
    Layer(Arc<StoreJob>, usize),
    /// Copy the rest; several threads get the same job.
    Rest(Arc<StoreJob>),
}

/// The thread's state.
pub(crate) struct Writer {
    shared: Arc<Shared>,
    place: WriterPlace,
    target_bytes: u64,
    slots: Slots,
    jobs: HashMap<JobId, Begun>,
    tasks: Sender<StoreTask>,
    threads: usize,
    grow_after: Instant,
    /// Until when blocks go where others have been before they go to new places: the file system is full.
    recycle_until: Instant,
    /// That this has been of no use: what is below needs new space for what is written again.
    recycled_in_vain: bool,
    /// When space was last needed.
    wished: Option<Instant>,
    generosity: Generosity,
    marks_written: Instant,
    complained: HashSet<&'static str>,
    /// How many had been marked bad when it was last looked for them; an adopted segment brings none along.
    bad_slots: u64,
}

struct Begun {
    job: Arc<StoreJob>,
    slots: Vec<Option<SlotRef>>,
}

impl Writer {
    pub(crate) fn new(
        shared: Arc<Shared>,
        place: WriterPlace,
        target_bytes: u64,
        tasks: Sender<StoreTask>,
        threads: usize,
    ) -> Self {
        let now = Instant::now();
        Writer {
            shared,
            place,
            target_bytes,
            slots: Slots::default(),
            jobs: HashMap::new(),
            tasks,
            threads,
            grow_after: now,
            recycle_until: now,
            recycled_in_vain: false,
            wished: None,
            generosity: Generosity::default(),
            marks_written: now,
            complained: HashSet::new(),
            bad_slots: 0,
        }
    }

    /// Runs until told to stop, or until `abandoned` is set while nobody sends any more.
    pub(crate) fn run(mut self, commands: &Receiver<Command>, abandoned: &AtomicBool) {
        let process = std::process::id();
        self.prepare();
        let mut ticked = Instant::now();
        loop {
            match commands.recv_timeout(TICK) {
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(command) => self.obey(command),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if abandoned.load(Ordering::Relaxed) || std::process::id() != process {
                break;
            }
            // Not after every command: it asks the kernel about every other writer.
            if ticked.elapsed() >= TICK {
                self.tick();
                ticked = Instant::now();
            }
        }
        self.shared.write_marks();
        self.shared.directory.wait_until_writable();
        // Only promises: a slot that rests since its adoption must stay odd, so that the next owner lets it rest too.
        for at in self.slots.promises() {
            self.free(at);
        }
        self.shared.directory.control.bump_changes();
        self.shared.directory.control.forget_writer(self.place);
    }

    /// The first segment is made before the first prompt arrives.
    fn prepare(&mut self) {
        self.grow();
        self.shared.measure();
    }

    fn obey(&mut self, command: Command) {
        if !matches!(command, Command::Layer(..) | Command::Finish(_) | Command::Stop) {
            self.shared.directory.wait_until_writable();
        }
        match command {
            Command::Reserve {
                keys,
                first_depth,
                deadline,
            } => self.reserve(&keys, first_depth, deadline),
            Command::Withdraw { keys } => self.withdraw(&keys),
            Command::Begin(job) => self.begin(job),
            Command::Layer(id, layer) => {
                if let Some(begun) = self.jobs.get(&id) {
                    let _ = self.tasks.send(StoreTask::Layer(Arc::clone(&begun.job), layer));
                }
            }
            Command::Finish(id) => {
                if let Some(begun) = self.jobs.get(&id) {
                    for _ in 0..self.threads.min(begun.slots.len()) {
                        let _ = self.tasks.send(StoreTask::Rest(Arc::clone(&begun.job)));
                    }
                }
            }
            Command::Ended(id) => self.ended(id),
            Command::Stop => {}
        }
    }

    fn tick(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.marks_written) >= Duration::from_millis(MARK_MS) {
            self.shared.write_marks();
            self.shared.measure();
            self.marks_written = now;
        }
        self.shared.directory.give_back_payloads();
        self.let_go_of_lost();
        let overdue = self.slots.overdue(now);
        let bad_slots = self.shared.directory.control.bad_slots();
        let bad = if bad_slots == self.bad_slots {
            Vec::new()
        } else {
            self.slots.bad()
        };
        self.bad_slots = bad_slots;
        if !overdue.is_empty() || !bad.is_empty() {
            self.shared.directory.wait_until_writable();
        }
        for &at in &bad {
            self.free(at);
        }
        if !bad.is_empty() {
            tracing::info!(slots = bad.len(), "slots with bad blocks are used again");
            self.shared.directory.control.bump_changes();
        }
        for at in overdue {
            let rested = matches!(self.slots.state(at), Some(Slot::Quarantined { .. }));
            match self.slots.block_in(at) {
                Some((key, depth)) if rested => self.slots.set(at, Slot::Committed { key, depth }),
                _ => self.free(at),
            }
        }
        if self.slots.bytes() == 0 {
            // At least one segment, before anybody needs it.
            self.grow();
        }
        if self
            .wished
            .is_some_and(|wished| now.duration_since(wished) >= WISH_LASTS)
        {
            // Others would give back, or not take what is free, for somebody who does not need it any more.
            self.wished = None;
            self.shared.directory.control.set_wants(self.place, 0);
        }
        let (directory, bytes) = (&self.shared.directory, self.slots.bytes());
        if self
            .generosity
            .should_give_back(directory, self.place, bytes, now)
        {
            self.give_back();
        }
    }

    /// Forgets segments that another process has taken over: their slots are not ours to give out.
    fn let_go_of_lost(&mut self) {
        for number in self.slots.lost() {
            if let Some(segment) = self.slots.remove(number) {
                tracing::warn!(path = %segment.view.path.display(), "another process took a segment over");
                let bytes = self.slots.bytes();
                self.shared.directory.control.set_bytes_used(self.place, bytes);
            }
        }
    }

    /// The namespace in force, after a look at what others did.
    fn refreshed_namespace(&self) -> NamespaceId {
        self.shared.look().effective(0)
    }

    fn reserve(&mut self, keys: &[BlockKey], first_depth: u32, deadline: Instant) {
        self.let_go_of_lost();
        let namespace = self.refreshed_namespace();
        let spare = self.slots.own_chain(keys);
        let mut promised = false;
        for (position, key) in keys.iter().enumerate() {
            let own = self.slots.reserved(key);
            {
                let mut index = lock(&self.shared.index);
                if index.find(0, key).is_some() || (own.is_none() && index.knows(0, key)) {
                    continue;
                }
            }
            let mut until = deadline;
            let at = match own {
                Some(at) => {
                    if let Some(Slot::Reserved { until: before, .. }) = self.slots.state(at) {
                        until = until.max(before);
                    }
                    at
                }
                None => match self.allocate(&spare) {
                    Some(at) => at,
                    None => break,
                },
            };
            let Some(segment) = self.slots.segment(at).cloned() else {
                continue;
            };
            let wait_ms = until.saturating_duration_since(Instant::now()).as_millis() as u64;
            let Some(odd) = segment.invalidate(at.slot) else {
                continue;
            };
            let mut record = SlotRecord {
                sequence: 0,
                state: SlotState::Reserved,
                depth: first_depth + position as u32,
                key: *key,
                namespace,
                payload_bytes: self.shared.geometry.payload_bytes,
                deadline_unix_ms: unix_ms() + wait_ms,
                owner: 0,
                written_unix_ms: 0,
                layer_crcs: Vec::new(),
            };
            if !segment.publish(at.slot, odd, &mut record) {
                self.free(at);
                continue;
            }
            self.slots.set(at, Slot::Reserved { key: *key, until });
            promised = true;
        }
        if promised {
            self.shared.directory.control.bump_changes();
        }
    }

    fn withdraw(&mut self, keys: &[BlockKey]) {
        for key in keys {
            self.withdraw_one(key);
        }
        self.shared.directory.control.bump_changes();
    }

    fn withdraw_one(&mut self, key: &BlockKey) {
        if let Some(at) = self.slots.reserved(key) {
            self.free(at);
        }
    }

    /// Makes a slot that holds nothing of worth free, for everybody to see.
    fn free(&mut self, at: SlotRef) {
        self.empty(at);
        self.slots.set(at, Slot::Free);
    }

    fn empty(&self, at: SlotRef) {
        if let Some(segment) = self.slots.segment(at) {
            segment.clear(at.slot);
        }
    }

    fn begin(&mut self, job: Arc<StoreJob>) {
        if job.is_closed() {
            // Nobody will keep these promises.
            self.withdraw(&job.request().keys);
            return;
        }
        self.let_go_of_lost();
        let in_force = self.refreshed_namespace();
        let keys = job.request().keys.clone();
        let spare = self.slots.own_chain(&keys);
        let mut places = Vec::with_capacity(keys.len());
        let mut plans = Vec::with_capacity(keys.len());
        let mut present = 0;
        let mut full = false;
        for key in &keys {
            let (place, plan) = self.plan(&job, in_force, key, &spare, &mut present, &mut full);
            places.push(place);
            plans.push(plan);
        }
        Counters::add(&self.shared.counters.present_blocks, present);
        self.shared.directory.control.bump_changes();
        self.jobs.insert(
            job.id(),
            Begun {
                job: Arc::clone(&job),
                slots: places,
            },
        );
        job.set_plans(plans);
    }

    fn plan(
        &mut self,
        job: &StoreJob,
        in_force: NamespaceId,
        key: &BlockKey,
        spare: &HashSet<BlockKey>,
        present: &mut u64,
        full: &mut bool,
    ) -> (Option<SlotRef>, Plan) {
        if in_force != job.namespace() {
            // A reset came in between: what was computed before it must not be found after it.
            self.withdraw_one(key);
            return (None, Plan::Dropped);
        }
        let found = lock(&self.shared.index).find(0, key);
        if let Some(found) = found {
            self.shared.touch(std::iter::once(found));
            *present += 1;
            // Somebody else was faster, and the slot is of use to others.
            self.withdraw_one(key);
            return (None, Plan::Present);
        }
        let mut at = self.slots.reserved(key);
        if at.is_none() && !*full {
            at = self.allocate(spare);
            // Looking again for each further block would go through all slots each time.
            *full = at.is_none();
        }
        let Some(at) = at else {
            return (None, Plan::Dropped);
        };
        let Some(segment) = self.slots.segment(at).cloned() else {
            return (None, Plan::Dropped);
        };
        let Some(odd) = segment.invalidate(at.slot) else {
            return (None, Plan::Dropped);
        };
        self.slots.set(at, Slot::Filling);
        (
            Some(at),
            Plan::Copy(Place {
                segment,
                slot: at.slot,
                odd,
            }),
        )
    }

    /// Sorts the slots of an ended job: committed ones hold their block, the others are free again.
    fn ended(&mut self, id: JobId) {
        let Some(begun) = self.jobs.remove(&id) else {
            return;
        };
        if let Some(error) = begun.job.failure() {
            let refused = begun.slots.iter().enumerate();
            let refused = refused.filter(|(position, _)| begun.job.was_refused(*position));
            let in_vain = refused
                .filter_map(|(_, at)| *at)
                .any(|at| self.slots.is_recycled(at));
            self.hear_of_failure(error, in_vain);
        }
        for (position, at) in begun.slots.into_iter().enumerate() {
            let Some(at) = at else { continue };
            if begun.job.was_refused(position) {
                self.empty(at);
                self.slots.set_refused(at, Instant::now());
            } else if begun.job.stored(position) {
                let key = begun.job.request().keys[position];
                let depth = begun.job.request().first_depth + position as u32;
                self.slots.set(at, Slot::Committed { key, depth });
            } else {
                self.free(at);
            }
        }
        self.shared.directory.control.bump_changes();
    }
}

#[cfg(test)]
mod tests;
