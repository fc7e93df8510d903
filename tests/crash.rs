//! Writers that die or are stopped in the middle of anything, with readers watching. The risks: bytes of a torn or foreign
//! block reach a cache, a reader stops with the writer, a dead writer's space or blocks are lost.
//!
//! The moments are random from a seed that is printed; `KVLANE_SEED` repeats a run. `KVLANE_SOAK=1` runs 300 rounds
//! instead of 30 and writes `tests/results/soak-crash.json`.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvlane_core::Outcome;
use kvlane_fs::Medium;
use kvlane_fs::raw::OfdLock;
use kvlane_tests::fixture::eventually;
use kvlane_tests::process::{PeerProcess, not_run};
use kvlane_tests::soak::{self, Counts, Record};
use kvlane_tests::worker::{Setup, Worker};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

const PEER: &str = env!("CARGO_BIN_EXE_kvlane-test-peer");
/// Blocks of a chain: more than one thread copies them.
const LENGTH: usize = 4;
const PATIENCE: Duration = Duration::from_secs(10);
/// Everything in the folder that is no segment: the control file, and the folder itself on a disk.
const OVERHEAD_BYTES: u64 = 64 << 10;
const ROUNDS_PER_FOLDER: usize = 10;
/// Where writers are stopped: a segment, and the blocks that fit into it.
const STOPPED_SEGMENT_BYTES: u64 = 3 << 20;
const STOPPED_SLOTS: u64 = 15;

/// What writers have committed, by their own account, and what may be on its way.
#[derive(Default)]
struct Journal {
    committed: Mutex<Vec<String>>,
    current: Mutex<String>,
}

/// One folder with readers that never rest, until they are told to.
struct Watched {
    folder: tempfile::TempDir,
    setup: Setup,
    journal: Arc<Journal>,
    stop: Arc<AtomicBool>,
    loads: Vec<Arc<AtomicU64>>,
    hits: Arc<AtomicU64>,
    readers: Vec<std::thread::JoinHandle<()>>,
}

impl Watched {
    /// With `strict`, nothing that was committed may ever be missed.
    fn new(setup: Setup, strict: bool) -> Self {
        let parent = match setup.medium {
            Medium::Memory => PathBuf::from("/dev/shm"),
            _ => Path::new(env!("CARGO_TARGET_TMPDIR")).to_path_buf(),
        };
        let folder = tempfile::Builder::new()
            .prefix("kvlane-crash-")
            .tempdir_in(parent)
            .expect("a folder");
        let (journal, stop) = (Arc::new(Journal::default()), Arc::new(AtomicBool::new(false)));
        let hits = Arc::new(AtomicU64::new(0));
        let loads: Vec<Arc<AtomicU64>> = (0..2).map(|_| Arc::default()).collect();
        let readers = loads.iter().enumerate().map(|(number, loads)| {
            let (folder, setup) = (folder.path().to_owned(), setup.reader());
            let (journal, stop) = (Arc::clone(&journal), Arc::clone(&stop));
            let (loads, hits) = (Arc::clone(loads), Arc::clone(&hits));
            std::thread::spawn(move || {
                let worker = Worker::open(&folder, &setup).expect("a reader can open the folder");
                let mut random = StdRng::seed_from_u64(number as u64);
                while !stop.load(Ordering::Relaxed) {
                    let (salt, committed) = journal.pick(&mut random);
                    let loaded = worker.load(&salt, LENGTH, PATIENCE);
                    assert!(
                        !(strict && committed) || loaded.missed.is_empty(),
                        "{salt} was committed and nothing is ever evicted here, but: {loaded:?}"
                    );
                    hits.fetch_add((LENGTH - loaded.missed.len()) as u64, Ordering::Relaxed);
                    loads.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_micros(300));
                }
                // Whoever meets a corrupt block first condemns it, and it is absent for everybody else.
                check_none_corrupt(&worker);
            })
        });
        let readers = readers.collect();
        Watched {
            folder,
            setup,
            journal,
            stop,
            loads,
            hits,
            readers,
        }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Whether each reader still moves.
    fn check_readers(&self) {
        for loads in &self.loads {
            let before = loads.load(Ordering::Relaxed);
            let end = Instant::now() + PATIENCE;
            while loads.load(Ordering::Relaxed) == before {
                assert!(Instant::now() < end, "a reader stands still");
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }

    fn check_space(&self) {
        let used = allocated_bytes(self.path());
        let allowed = self.setup.capacity_bytes.expect("these tests set it") + OVERHEAD_BYTES;
        assert!(used <= allowed, "{used} bytes are in use, {allowed} are allowed");
    }

    /// Compares all that was committed; answers how many chains that were, and of which ones how many blocks are missing.
    fn check_blocks(&self) -> (u64, Vec<(String, usize)>) {
        let reader = Worker::open(self.path(), &self.setup.reader()).expect("the folder can be opened");
        let committed = self
            .journal
            .committed
            .lock()
            .expect("no writer thread panicked")
            .clone();
        let missing = |salt: &String| match reader.load(salt, LENGTH, PATIENCE).missed.len() {
            0 => None,
            blocks => Some((salt.clone(), blocks)),
        };
        let missing = committed.iter().filter_map(missing).collect();
        check_none_corrupt(&reader);
        (committed.len() as u64, missing)
    }

    fn finish(mut self, counts: &mut Counts) {
        self.check_readers();
        self.stop.store(true, Ordering::Relaxed);
        for reader in self.readers.drain(..) {
            if let Err(panic) = reader.join() {
                std::panic::resume_unwind(panic);
            }
        }
        let loads: u64 = self.loads.iter().map(|loads| loads.load(Ordering::Relaxed)).sum();
        counts.add("loads", loads);
        let committed = self
            .journal
            .committed
            .lock()
            .expect("no writer thread panicked")
            .len();
        counts.add("chains_committed", committed as u64);
        counts.add("blocks_loaded_and_compared", self.hits.load(Ordering::Relaxed));
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Journal {
    /// A chain to look for, and whether it must be there.
    fn pick(&self, random: &mut StdRng) -> (String, bool) {
        let committed = self.committed.lock().expect("no writer thread panicked");
        if !committed.is_empty() && random.random_bool(0.5) {
            return (committed[random.random_range(0..committed.len())].clone(), true);
        }
        // Around the end: most likely being written right now.
        let current = self.current.lock().expect("no writer thread panicked").clone();
        let written = committed.iter().filter(|salt| salt.starts_with(&current)).count();
        (
            format!("{current}-{}", written + random.random_range(0..2)),
            false,
        )
    }

    /// Takes up what a writer says it has done.
    fn take(&self, lines: Vec<String>) {
        let done = lines.iter().filter_map(|line| line.strip_prefix("done "));
        let mut committed = self.committed.lock().expect("no writer thread panicked");
        committed.extend(done.map(str::to_owned));
    }
}

/// Whether all that this worker has found was whole.
fn check_none_corrupt(worker: &Worker) {
    let corrupt_blocks = worker.stats().corrupt_blocks;
    assert_eq!(corrupt_blocks, 0, "a block was visible before it was whole");
}

/// Bytes that the files of a folder take.
fn allocated_bytes(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = std::fs::read_dir(folder).expect("the folder is there").flatten();
    files
        .filter_map(|file| file.metadata().ok())
        .map(|meta| meta.blocks() * 512)
        .sum()
}

/// Kills writers one after the other in folders of `setup`; `strict` if nothing is evicted there.
fn kill_writers(rounds: usize, setup: &Setup, strict: bool, random: &mut StdRng, counts: &mut Counts) {
    let mut left = rounds;
    while left > 0 {
        let watched = Watched::new(setup.clone(), strict);
        for round in 0..left.min(ROUNDS_PER_FOLDER) {
            let salt = format!("round{round}");
            *watched.journal.current.lock().expect("no writer thread panicked") = salt.clone();
            // Where nothing may be evicted, each writer stores little: its last chain may leave its slots resting.
            let (chains, pause_us) = if strict { (2, 300) } else { (u64::MAX, 0) };
            let mut writer = PeerProcess::start(std::process::Command::new(PEER), watched.path(), setup);
            let early = random.random_bool(0.2);
            if !early {
                assert_eq!(writer.line(), "open", "a new writer can begin");
            }
            writer.tell(&format!("stream {salt} {LENGTH} {chains} {pause_us}"));
            let moment = Duration::from_micros(random.random_range(0..if strict { 12_000 } else { 40_000 }));
            let end = Instant::now() + moment;
            while let Some(rest) = end.checked_duration_since(Instant::now()) {
                let line = writer.line_within(rest);
                watched.journal.take(line.into_iter().collect());
            }
            writer.kill();
            watched.journal.take(writer.rest());
            counts.add("killed", 1);
            counts.add("killed_while_opening", u64::from(early));
            watched.check_readers();
            watched.check_space();
            let (compared, missing) = watched.check_blocks();
            assert!(
                !strict || missing.is_empty(),
                "nothing was evicted, but {missing:?} were committed"
            );
            counts.add("chains_looked_for", compared);
            counts.add("chains_evicted", missing.len() as u64);
        }
        left -= left.min(ROUNDS_PER_FOLDER);
        // What the dead have left can be used: by somebody who stores more than is free.
        let writer = Worker::open(watched.path(), setup).expect("a new writer can begin");
        let last = if strict { 1 } else { 12 };
        for chain in 0..last {
            let salt = format!("last-{chain}");
            assert_eq!(writer.store(&salt, LENGTH, PATIENCE), Outcome::Done);
            assert_eq!(writer.load(&salt, LENGTH, PATIENCE).missed, Vec::<usize>::new());
        }
        if strict {
            assert_eq!(writer.stats().evicted_blocks, 0);
            let (_, missing) = watched.check_blocks();
            assert!(
                missing.is_empty(),
                "nothing was evicted, but {missing:?} were committed"
            );
        }
        watched.check_space();
        watched.finish(counts);
    }
}

/// Takes the locks of a stopped process' segments away, as a network file system does with a client that does not answer.
fn take_locks_away(process: &PeerProcess, folder: &Path) -> rustix::io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let id = Pid::from_raw(process.id() as i32).expect("a process id is not zero");
    let handle = pidfd_open(id, PidfdFlags::empty())?;
    let is_segment = |name: &std::ffi::OsStr| name.to_string_lossy().ends_with(".kvlane");
    let segments: Vec<u64> = std::fs::read_dir(folder)
        .expect("the folder is there")
        .flatten()
        .filter(|file| is_segment(&file.file_name()))
        .filter_map(|file| Some(file.metadata().ok()?.ino()))
        .collect();
    let mut taken = 0;
    for entry in std::fs::read_dir(format!("/proc/{}/fd", process.id()))
        .expect("the process exists")
        .flatten()
    {
        let Ok(meta) = std::fs::metadata(entry.path()) else {
            continue;
        };
        let number = entry.file_name().to_string_lossy().parse::<i32>();
        if let (true, Ok(number)) = (segments.contains(&meta.ino()), number) {
            // A duplicate is the same open file, to which the lock belongs.
            let file = std::fs::File::from(pidfd_getfd(&handle, number, PidfdGetfdFlags::empty())?);
            taken += u64::from(OfdLock::byte(0).unlock(&file).is_ok());
        }
    }
    Ok(taken)
}

/// Whether somebody stands still in the middle of getting or giving back a segment.
fn has_budget_lock(folder: &Path) -> bool {
    let control = std::fs::File::open(folder.join("control")).expect("it is there");
    let held = || {
        OfdLock::byte(0)
            .is_held_by_other(&control)
            .expect("locks work here")
    };
    // A new writer has it for a moment too, which a busy machine makes seconds.
    (0..600).all(|_| {
        std::thread::sleep(Duration::from_millis(5));
        held()
    })
}

/// Room for four segments, and where it is to be `calm` for a spare one.
fn stopped(medium: Medium, calm: bool) -> Setup {
    Setup {
        block_bytes: 192 << 10,
        capacity_bytes: Some((4 + u64::from(calm)) * STOPPED_SEGMENT_BYTES),
        segment_bytes: Some(STOPPED_SEGMENT_BYTES),
        ..small(medium)
    }
}

/// Takes up the room of one segment with a file that is none, so that whoever needs one has to adopt it.
fn take_spare_room(folder: &Path) -> PathBuf {
    // No segment has the number zero.
    let spare = folder.join("seg-0000000000000000.kvlane");
    let file = std::fs::File::create(&spare).expect("the folder can be written");
    file.set_len(STOPPED_SEGMENT_BYTES).expect("it is sparse");
    spare
}

/// How many blocks a process says it has given up: those it evicted, and all of each segment that it gave back.
fn given_up(stats: &str) -> u64 {
    let words: Vec<&str> = stats.split(' ').collect();
    let number = |name| {
        let at = words.iter().position(|word| *word == name);
        let number = at.and_then(|at| words.get(at + 1)?.parse::<u64>().ok());
        number.unwrap_or_else(|| panic!("no {name} in '{stats}'"))
    };
    number("evicted") + STOPPED_SLOTS * number("returned")
}

/// Stops writers while they store, lets another one adopt their segments and store there, and lets them go on. With
/// `calm` there is room for everything, so that nothing may ever be missing; else both of them evict all the time, and no
/// more may be missing than they say.
fn stop_writers(
    rounds: usize,
    setup: &Setup,
    calm: bool,
    random: &mut StdRng,
    counts: &mut Counts,
) -> Result<(), String> {
    for _ in 0..rounds {
        let watched = Watched::new(setup.clone(), false);
        let spare = calm.then(|| take_spare_room(watched.path()));
        *watched.journal.current.lock().expect("no writer thread panicked") = "late".to_owned();
        let mut old = PeerProcess::start(std::process::Command::new(PEER), watched.path(), setup);
        assert_eq!(old.line(), "open");
        old.tell(&format!("stream full {LENGTH} 12 0"));
        loop {
            let line = old.line();
            if line == "streamed" {
                break;
            }
            assert!(line.starts_with("done "), "{line}");
            watched.journal.take(vec![line]);
        }
        let chains = if calm { 1 } else { 16 };
        assert_eq!(old.ask(&format!("burst late {LENGTH} {chains}")), "begins");
        std::thread::sleep(Duration::from_micros(random.random_range(0..chains * 300)));
        old.stop();
        let taken = take_locks_away(&old, watched.path()).map_err(|error| error.to_string())?;
        assert!(taken >= 4, "the writer has four segments, but {taken} locks");
        let new = Worker::open(watched.path(), setup).expect("a new writer can begin");
        if has_budget_lock(watched.path()) {
            // Nobody gets a segment as long as it stands there, but everybody goes on, and its death ends it.
            assert!(matches!(
                new.store("new-0", LENGTH, PATIENCE),
                Outcome::Miss { .. }
            ));
            watched.check_readers();
            old.kill();
            eventually("space comes back", || {
                new.store("new-0", LENGTH, PATIENCE) == Outcome::Done
            });
            // Killed, so it is none of those that continued.
            counts.add("stopped_with_the_budget_locked_and_killed", 1);
            check_none_corrupt(&new);
            drop(new);
            watched.finish(counts);
            continue;
        }
        for chain in 0..if calm { 1 } else { 14 } {
            let salt = format!("new-{chain}");
            assert_eq!(
                new.store(&salt, LENGTH, PATIENCE),
                Outcome::Done,
                "space comes back"
            );
            assert_eq!(new.load(&salt, LENGTH, PATIENCE).missed, Vec::<usize>::new());
            watched.journal.take(vec![format!("done {salt}")]);
        }
        counts.add("adopted", new.stats().adopted_segments);
        assert!(new.stats().adopted_segments > 0, "everything else is taken");
        assert!(
            !calm || new.stats().evicted_blocks == 0,
            "there is a free slot for each block"
        );
        watched.check_readers();
        if let Some(spare) = &spare {
            // The old one gets a segment of its own, or the new one would have to give one back, with all that is in it.
            std::fs::remove_file(spare).expect("it is still there");
        }
        old.resume();
        // The old one finds out at its next step; nothing that it does on the way may harm.
        std::thread::sleep(Duration::from_micros(random.random_range(0..20_000)));
        watched.check_blocks();
        let mut said = Vec::new();
        while said.last().is_none_or(|line| line != "streamed") {
            said.push(old.line());
        }
        let failed = said.iter().any(|line| line.starts_with("missed Io"));
        counts.add("stopped_in_a_store_that_then_failed", u64::from(failed));
        watched.journal.take(said);
        let (compared, missing) = watched.check_blocks();
        let stats = new.stats();
        let given_up =
            stats.evicted_blocks + STOPPED_SLOTS * stats.returned_segments + given_up(&old.ask("stats"));
        let allowed = if calm { 0 } else { given_up };
        let lost: usize = missing.iter().map(|(_, blocks)| blocks).sum();
        assert!(
            lost as u64 <= allowed,
            "{given_up} blocks were given up, {allowed} may be missing, but {lost} are: {missing:?}"
        );
        counts.add("chains_looked_for", compared);
        counts.add("chains_evicted", missing.len() as u64);
        counts.add("stopped_and_nothing_evicted", u64::from(given_up == 0));
        counts.add("stopped_calmly_and_continued", u64::from(calm));
        watched.check_readers();
        old.kill();
        watched.check_space();
        counts.add("stopped_and_continued", 1);
        check_none_corrupt(&new);
        drop(new);
        let last = Worker::open(watched.path(), setup).expect("a new writer can begin");
        assert_eq!(
            last.store("last", LENGTH, PATIENCE),
            Outcome::Done,
            "space comes back"
        );
        watched.finish(counts);
    }
    Ok(())
}

fn large(medium: Medium) -> Setup {
    // Six segments of 15 blocks: room for ten writers that store two chains each and a last one, but only if the later
    // ones adopt what the earlier ones have left.
    Setup {
        capacity_bytes: Some(6 << 20),
        segment_bytes: Some(1 << 20),
        ..small(medium)
    }
}

fn small(medium: Medium) -> Setup {
    Setup {
        medium,
        waits_for_listings: true,
        ..Setup::default()
    }
}

#[test]
fn no_wrong_byte_no_stopped_reader_and_no_lost_block_whenever_a_writer_dies_or_is_replaced() {
    let seed = std::env::var("KVLANE_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(rand::random);
    println!("KVLANE_SEED={seed}");
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
    let (rounds, results) = match soak::is_asked_for() {
        true => (50, Some(results.as_path())),
        false => (5, None),
    };
    let mut random = StdRng::seed_from_u64(seed);
    // Written by whatever ends this function.
    let mut record = Record::begin(results, "crash", seed);
    let counts = &mut record.counts;
    let mut refused = None;
    for medium in [Medium::Memory, Medium::Disk] {
        kill_writers(rounds, &large(medium), true, &mut random, counts);
        kill_writers(rounds, &small(medium), false, &mut random, counts);
        for (calm, rounds) in [(true, rounds.div_ceil(2)), (false, rounds / 2)] {
            let setup = stopped(medium, calm);
            if let Err(error) = stop_writers(rounds, &setup, calm, &mut random, counts) {
                refused = Some(error);
            }
        }
    }
    println!("{:?}", counts.all());
    if let Some(error) = &refused {
        not_run(
            "adopting the segments of a stopped writer",
            &format!("its locks cannot be taken away: {error}"),
        );
    }
    assert_eq!(counts.get("killed"), 4 * rounds as u64);
    let killed_with_the_lock = counts.get("stopped_with_the_budget_locked_and_killed");
    let stopped = counts.get("stopped_and_continued") + killed_with_the_lock;
    assert!(refused.is_some() || stopped == 2 * rounds as u64, "{stopped}");
    // Else what is left was compared with what was committed in no round at all.
    assert!(
        counts.get("stopped_calmly_and_continued") == 0 || counts.get("stopped_and_nothing_evicted") > 0,
        "room was made in every round, also where there was enough"
    );
    assert!(counts.get("chains_committed") > 0 && counts.get("blocks_loaded_and_compared") > 0);
    record.end(if refused.is_some() {
        "stopping not run"
    } else {
        "passed"
    });
}
