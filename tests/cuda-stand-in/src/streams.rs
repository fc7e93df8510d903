//! Streams: queues of work, each with a thread that is late.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::raw;
use crate::world::{World, lock};

/// Bytes from one place to another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) len: usize,
    /// Whether the ends are pinned memory of the host; else of a device.
    pub(crate) from_pinned: bool,
    pub(crate) to_pinned: bool,
}

/// What a launch reads: numbers that must stay as they are until it has run.
pub(crate) struct List {
    pub(crate) address: usize,
    pub(crate) words: Vec<u64>,
}

impl List {
    fn has_changed(&self) -> bool {
        raw::words(self.address, self.words.len()) != self.words
    }
}

pub(crate) enum Work {
    Copy(Part),
    /// The host twin of kvlane's kernel: copies without an order among them.
    Twin(List, Vec<Part>),
    /// Takes a while and then writes.
    Kernel {
        address: usize,
        bytes: Vec<u8>,
        duration: Duration,
    },
    /// What another library does on the stream.
    Foreign(Foreign),
    Record(Arc<Event>, u64),
    Wait(Arc<Event>, u64),
}

/// Work of another library: the stand-in for NCCL.
pub(crate) struct Foreign {
    /// Ranges that it reads, and that it writes.
    pub(crate) reads: Vec<(usize, usize)>,
    pub(crate) writes: Vec<(usize, usize)>,
    pub(crate) run: Box<dyn FnOnce() + Send>,
}

/// A point in a stream.
#[derive(Debug, Default)]
pub(crate) struct Event {
    /// How often it was recorded.
    recorded: AtomicU64,
    /// The latest recording that a stream has come to.
    reached: Mutex<u64>,
    changed: Condvar,
}

impl Event {
    /// One that was never recorded is over.
    pub(crate) fn is_over(&self) -> bool {
        let reached = *lock(&self.reached);
        reached >= self.recorded.load(Ordering::SeqCst)
    }
}

pub(crate) struct Stream {
    number: usize,
    work: Mutex<Sender<(u64, Work)>>,
}

impl Stream {
    /// The thread ends when the stream is dropped and its work is done.
    pub(crate) fn start(number: usize) -> Arc<Self> {
        let (sender, work) = channel::<(u64, Work)>();
        let mut random = Random(World::get().settings.seed ^ (number as u64) << 32 | 1);
        std::thread::Builder::new()
            .name(format!("stand-in-stream-{number:#x}"))
            .spawn(move || {
                for (order, work) in work {
                    carry_out(number, order, work, &mut random);
                }
            })
            .expect("a thread can be started");
        Arc::new(Self {
            number,
            work: Mutex::new(sender),
        })
    }

    /// Puts work behind what is there.
    pub(crate) fn push(&self, work: Work) {
        let queue = lock(&self.work);
        let order = lock(&World::get().pending).begin(self.number, &work);
        // Fails only where the thread has panicked, which ends the test anyway.
        let _ = queue.send((order, work));
    }

    pub(crate) fn record(&self, event: &Arc<Event>) {
        let count = event.recorded.fetch_add(1, Ordering::SeqCst) + 1;
        self.push(Work::Record(Arc::clone(event), count));
    }

    pub(crate) fn wait_for(&self, event: &Arc<Event>) {
        let count = event.recorded.load(Ordering::SeqCst);
        self.push(Work::Wait(Arc::clone(event), count));
    }
}

fn carry_out(stream: usize, order: u64, work: Work, random: &mut Random) {
    let world = World::get();
    // Not every operation is late, and never by the same time: streams get out of step.
    let delay_most_us = world.delay_most_us.load(Ordering::Relaxed);
    let is_late = random.below(4) == 0;
    if is_late && delay_most_us > 0 && !matches!(work, Work::Wait(..)) {
        std::thread::sleep(Duration::from_micros(random.below(delay_most_us) + 1));
    }
    if let Work::Kernel { duration, .. } = &work {
        std::thread::sleep(*duration);
    }
    let conflict = lock(&world.pending).conflict(stream, order);
    if let Some(what) = conflict {
        world.lose(&what);
    }
    match work {
        Work::Copy(part) => copy(&part),
        Work::Twin(list, parts) => {
            parts.iter().for_each(copy);
            if list.has_changed() {
                world.lose("the list of a kernel was changed before it had run");
            }
        }
        Work::Kernel { address, bytes, .. } => {
            let memory = world.memory();
            match memory.check(address, bytes.len(), false) {
                Ok(()) => raw::copy(bytes.as_ptr().expose_provenance(), address, bytes.len()),
                Err(what) => world.lose(&format!("a kernel wrote to {what}")),
            }
        }
        // Looks at memory by itself, for as long as it takes.
        Work::Foreign(foreign) => (foreign.run)(),
        Work::Record(event, count) => {
            // Before the event is over, so that who sees that finds nothing pending.
            lock(&world.pending).end(stream, order);
            let mut reached = lock(&event.reached);
            *reached = (*reached).max(count);
            event.changed.notify_all();
            return;
        }
        Work::Wait(event, count) => {
            let mut reached = lock(&event.reached);
            while *reached < count {
                reached = event
                    .changed
                    .wait(reached)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
    lock(&world.pending).end(stream, order);
}

fn copy(part: &Part) {
    let world = World::get();
    // Held meanwhile, so that nothing is freed under the copy.
    let memory = world.memory();
    match memory.check_part(part) {
        Ok(()) => raw::copy(part.from, part.to, part.len),
        Err(what) => world.lose(&format!("a copy came to {what}")),
    }
}

/// What unfinished operations read and write, by stream, in order.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    last: u64,
    streams: HashMap<usize, VecDeque<(u64, Vec<Access>)>>,
}

#[derive(Clone, Copy, Debug)]
struct Access {
    start: usize,
    len: usize,
    writes: bool,
}

impl Access {
    fn meets(&self, other: &Self) -> bool {
        (self.writes || other.writes)
            && self.start < other.start + other.len
            && other.start < self.start + self.len
    }
}

impl Pending {
    fn begin(&mut self, stream: usize, work: &Work) -> u64 {
        self.last += 1;
        let access = |start, len, writes| Access { start, len, writes };
        let ends = |part: &Part| {
            [
                access(part.from, part.len, false),
                access(part.to, part.len, true),
            ]
        };
        let accesses = match work {
            Work::Copy(part) => ends(part).to_vec(),
            Work::Twin(list, parts) => {
                let list = access(list.address, list.words.len() * size_of::<u64>(), false);
                parts.iter().flat_map(ends).chain([list]).collect()
            }
            Work::Kernel { address, bytes, .. } => vec![access(*address, bytes.len(), true)],
            Work::Foreign(foreign) => {
                let reads = foreign
                    .reads
                    .iter()
                    .map(|&(start, len)| access(start, len, false));
                let writes = foreign
                    .writes
                    .iter()
                    .map(|&(start, len)| access(start, len, true));
                reads.chain(writes).collect()
            }
            Work::Record(..) | Work::Wait(..) => Vec::new(),
        };
        self.streams
            .entry(stream)
            .or_default()
            .push_back((self.last, accesses));
        self.last
    }

    fn end(&mut self, stream: usize, order: u64) {
        if let Some(queue) = self.streams.get_mut(&stream) {
            // A stream works in order.
            if queue.front().is_some_and(|(other, _)| *other == order) {
                queue.pop_front();
            }
            if queue.is_empty() {
                self.streams.remove(&stream);
            }
        }
    }

    /// An operation of another stream that was asked for before this one, has not ended, and touches the same bytes, one of
    /// the two writing: nothing orders them.
    fn conflict(&self, stream: usize, order: u64) -> Option<String> {
        let own = self.streams.get(&stream)?;
        let (_, mine) = own.iter().find(|(other, _)| *other == order)?;
        for (&other_stream, queue) in self.streams.iter().filter(|(other, _)| **other != stream) {
            for (_, theirs) in queue.iter().take_while(|(other, _)| *other < order) {
                let met = mine
                    .iter()
                    .find_map(|access| theirs.iter().find(|other| access.meets(other)).map(|_| access));
                if let Some(access) = met {
                    return Some(format!(
                        "stream {stream:#x} {} {} bytes at {:#x} while stream {other_stream:#x} has an \
                         unfinished operation on them",
                        if access.writes { "writes" } else { "reads" },
                        access.len,
                        access.start,
                    ));
                }
            }
        }
        None
    }

    /// Whether an unfinished operation touches a range.
    pub(crate) fn touches(&self, start: usize, len: usize) -> bool {
        let range = Access {
            start,
            len,
            writes: true,
        };
        self.streams
            .values()
            .flatten()
            .any(|(_, accesses)| accesses.iter().any(|access| access.meets(&range)))
    }
}

/// A small generator: the same seed gives the same delays.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(from: usize, to: usize) -> Work {
        Work::Copy(Part {
            from,
            to,
            len: 10,
            from_pinned: false,
            to_pinned: false,
        })
    }

    #[test]
    fn reading_what_an_earlier_operation_of_another_stream_writes_is_a_conflict_until_that_has_ended() {
        let mut pending = Pending::default();
        let write = pending.begin(1, &copy(0, 100));
        let read = pending.begin(2, &copy(109, 200));
        assert_eq!(pending.conflict(1, write), None);
        let told = pending.conflict(2, read).unwrap();
        assert!(told.contains("reads 10 bytes at 0x6d"), "{told}");
        pending.end(1, write);
        assert_eq!(pending.conflict(2, read), None);
    }

    #[test]
    fn readers_of_the_same_bytes_and_one_stream_alone_are_in_order() {
        let mut pending = Pending::default();
        pending.begin(1, &copy(0, 100));
        let same = pending.begin(1, &copy(100, 200));
        let reader = pending.begin(2, &copy(0, 300));
        assert_eq!(pending.conflict(1, same), None);
        assert_eq!(pending.conflict(2, reader), None);
        let writer = pending.begin(3, &copy(400, 5));
        assert!(
            pending
                .conflict(3, writer)
                .unwrap()
                .contains("writes 10 bytes at 0x5")
        );
        assert!(pending.touches(305, 1) && !pending.touches(310, 90));
    }
}
