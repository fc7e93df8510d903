//! Completions: each job's end is told exactly once. vLLM kills the engine over an end that is told twice.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvlane_core::{Error, JobId, LoadOrder, Outcome};

use crate::fixture::{Factory, PATIENCE, eventually, far, keys, namespace, plan};

/// What `wait` has taken, neither `wait` nor `poll` gives again.
pub fn wait_delivers_a_completion_once(factory: &dyn Factory) {
    let place = factory.place();
    let peer = place.peer(namespace(), &plan());
    let keys = keys("once", 2);
    let store = peer.begin(&keys);
    peer.backend.finish_store(store).expect("the store is open");
    assert_eq!(peer.outcome(store), Outcome::Done);
    let load = peer.begin_load(&keys, &[5, 6], LoadOrder::BlockMajor);
    assert_eq!(peer.outcome(load), Outcome::Done);
    for job in [store, load] {
        assert!(matches!(peer.backend.wait(job, far()), Err(Error::UnknownJob(_))));
    }
    let mut done = Vec::new();
    peer.backend.poll(&mut done);
    assert_eq!(done, []);
}

/// And what `poll` has taken, `wait` refuses.
pub fn poll_delivers_each_completion_once(factory: &dyn Factory) {
    let place = factory.place();
    let peer = place.peer(namespace(), &plan());
    let keys = keys("polled", 12);
    assert_eq!(peer.store(&keys), Outcome::Done);
    let jobs: HashSet<JobId> = (0..12)
        .map(|i| peer.begin_load(&keys[i..=i], &[i as u32], LoadOrder::BlockMajor))
        .collect();
    assert_eq!(jobs.len(), 12, "two jobs have the same number");
    let mut done = Vec::new();
    eventually("all completions", || {
        peer.backend.poll(&mut done);
        done.len() >= 12
    });
    std::thread::sleep(Duration::from_millis(10));
    peer.backend.poll(&mut done);
    assert_eq!(done.len(), 12);
    assert_eq!(
        done.iter()
            .map(|completion| completion.job)
            .collect::<HashSet<_>>(),
        jobs
    );
    assert!(done.iter().all(|completion| completion.outcome == Outcome::Done));
    assert!(
        jobs.iter()
            .all(|&job| matches!(peer.backend.wait(job, far()), Err(Error::UnknownJob(_))))
    );
}

/// One thread waits for its own jobs while another one polls: every end goes to one of them.
pub fn polling_and_waiting_threads_never_share_a_completion(factory: &dyn Factory) {
    const LOADS: usize = 200;
    let place = factory.place();
    let peer = place.peer(namespace(), &plan());
    let keys = keys("raced", 6);
    assert_eq!(peer.store(&keys), Outcome::Done);
    let (polled, waited) = (Mutex::new(Vec::new()), AtomicUsize::new(0));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let mut done = Vec::new();
                peer.backend.poll(&mut done);
                polled
                    .lock()
                    .expect("no panic")
                    .extend(done.into_iter().map(|completion| completion.job));
                std::thread::yield_now();
            }
        });
        for _ in 0..LOADS {
            let job = peer.begin_load(&keys, &[0, 1, 2, 3, 4, 5], LoadOrder::BlockMajor);
            match peer.backend.wait(job, far()) {
                Ok(Some(completion)) => {
                    assert_eq!((completion.job, completion.outcome), (job, Outcome::Done));
                    waited.fetch_add(1, Ordering::Relaxed);
                }
                Ok(None) => panic!("a load never ended"),
                Err(error) => {
                    assert!(matches!(error, Error::UnknownJob(_)), "{error}");
                    eventually("the poller has it", || {
                        polled.lock().expect("no panic").contains(&job)
                    });
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let polled = polled.into_inner().expect("no panic");
    assert_eq!(
        polled.iter().collect::<HashSet<_>>().len(),
        polled.len(),
        "an end was told twice"
    );
    assert_eq!(polled.len() + waited.into_inner(), LOADS);
}

/// The engine's step does not wait longer than it said.
pub fn wait_honours_its_deadline(factory: &dyn Factory) {
    let place = factory.place();
    let peer = place.peer(namespace(), &plan());
    let keys = keys("open", 2);
    let job = peer.begin(&keys);
    let asked = Instant::now();
    let pause = Duration::from_millis(60);
    assert_eq!(
        peer.backend.wait(job, asked + pause).expect("the store is open"),
        None
    );
    assert!(asked.elapsed() >= pause, "gave up after {:?}", asked.elapsed());
    assert!(
        asked.elapsed() < PATIENCE / 2,
        "came back after {:?}",
        asked.elapsed()
    );
    // The wait that gave up has not taken anything.
    peer.backend.finish_store(job).expect("the store is open");
    assert_eq!(peer.outcome(job), Outcome::Done);
}

/// Misuse has an answer.
pub fn unknown_jobs_are_refused_and_cancelling_them_is_ignored(factory: &dyn Factory) {
    let place = factory.place();
    let peer = place.peer(namespace(), &plan());
    let job = JobId(u64::MAX);
    assert!(matches!(
        peer.backend.layer_ready(job, 0),
        Err(Error::UnknownJob(_))
    ));
    assert!(matches!(
        peer.backend.finish_store(job),
        Err(Error::UnknownJob(_))
    ));
    assert!(matches!(
        peer.backend.wait_layer(job, 0, far()),
        Err(Error::UnknownJob(_))
    ));
    assert!(matches!(peer.backend.wait(job, far()), Err(Error::UnknownJob(_))));
    peer.backend.cancel(job);

    let keys = keys("ended", 1);
    let ended = peer.begin(&keys);
    peer.backend.finish_store(ended).expect("the store is open");
    assert_eq!(peer.outcome(ended), Outcome::Done);
    peer.backend.cancel(ended);
    assert_eq!(peer.ready(&keys), 1, "cancelling an ended job took a block away");
    let mut done = Vec::new();
    peer.backend.poll(&mut done);
    assert_eq!(done, []);
}
