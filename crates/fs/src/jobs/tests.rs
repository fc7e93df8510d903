use std::sync::Barrier;

use super::*;
use crate::fixture::{Folder, idle_load, shared};

#[test]
fn a_job_that_ends_while_somebody_waits_for_it_is_never_unknown() {
    let folder = Folder::new(1 << 20);
    let shared = shared(folder.open_again(), 1);
    let barrier = Barrier::new(2);
    let (sender, receiver) = std::sync::mpsc::sync_channel::<JobId>(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for id in receiver {
                barrier.wait();
                shared.jobs.finish(id, Outcome::Done);
            }
        });
        for round in 0..20_000 {
            let (id, job) = idle_load(&shared, Duration::from_secs(60));
            assert!(shared.jobs.admit(id, job));
            sender.send(id).unwrap();
            barrier.wait();
            assert!(shared.jobs.is_known(id), "round {round}");
            let completion = shared.jobs.wait(id, Instant::now() + Duration::from_secs(10));
            assert_eq!(
                completion,
                Ok(Some(Completion {
                    job: id,
                    outcome: Outcome::Done
                })),
                "round {round}"
            );
        }
        drop(sender);
    });
}

#[test]
fn a_deadline_is_kept_whatever_expires_while_its_job_is_admitted() {
    let folder = Folder::new(1 << 20);
    let shared = shared(folder.open_again(), 1);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let expiring = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                shared.jobs.expire();
            }
        });
        let mut missed = None;
        for round in 0..3_000 {
            // The first makes the other thread look through the jobs while the second is admitted.
            let (first, job) = idle_load(&shared, Duration::ZERO);
            assert!(shared.jobs.admit(first, job));
            let (second, job) = idle_load(&shared, Duration::from_micros(20));
            assert!(shared.jobs.admit(second, job));
            let end = Instant::now() + Duration::from_secs(5);
            let mut done = Vec::new();
            while done.len() < 2 && Instant::now() < end {
                shared.jobs.poll(&mut done);
            }
            if done.len() < 2 {
                missed = Some(round);
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        expiring.join().unwrap();
        assert_eq!(missed, None, "the round in which a deadline was forgotten");
    });
}

#[test]
fn a_job_ends_at_its_deadline_without_any_thread_of_the_backend() {
    let folder = Folder::new(1 << 20);
    let shared = shared(folder.open_again(), 1);
    let (id, job) = idle_load(&shared, Duration::from_millis(20));
    assert!(shared.jobs.admit(id, job));
    let started = Instant::now();
    let completion = shared
        .jobs
        .wait(id, started + Duration::from_secs(10))
        .unwrap()
        .unwrap();
    assert!(matches!(completion.outcome, Outcome::Miss { .. }));
    assert!((20..5000).contains(&started.elapsed().as_millis()));
}

/// How often this thread has slept.
fn sleeps() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.unwrap().trim().parse().unwrap()
}

#[test]
fn a_job_whose_copy_stands_still_past_its_deadline_is_waited_for_asleep() {
    let folder = Folder::new(1 << 20);
    let shared = shared(folder.open_again(), 1);
    let (id, job) = idle_load(&shared, Duration::from_millis(10));
    let Job::Load(load) = job.clone() else {
        panic!("{job:?}")
    };
    let left = || {};
    let inside = load.gate_for_test().enter(&left);
    assert!(inside.is_some() && shared.jobs.admit(id, job));
    let before = sleeps();
    let started = Instant::now();
    let waited = shared.jobs.wait(id, started + Duration::from_millis(500));
    assert_eq!(waited, Ok(None));
    assert!(started.elapsed().as_millis() >= 500);
    let slept = sleeps() - before;
    assert!(slept < 50, "it looked {slept} times");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            shared.jobs.finish(id, Outcome::Done);
        });
        let waited = shared.jobs.wait(id, Instant::now() + Duration::from_secs(60));
        assert!(matches!(waited, Ok(Some(_))));
    });
}

#[test]
fn no_more_jobs_are_admitted_than_the_limit_and_none_after_closing() {
    let folder = Folder::new(1 << 20);
    let shared = shared(folder.open_again(), 1);
    let jobs = Jobs::new(2);
    let load = || idle_load(&shared, Duration::from_secs(60));
    let (first, job) = load();
    assert!(jobs.admit(first, job));
    let (id, job) = load();
    assert!(jobs.admit(id, job));
    let (id, job) = load();
    assert!(!jobs.admit(id, job));
    jobs.finish(first, Outcome::Done);
    let (id, job) = load();
    assert!(jobs.admit(id, job), "a place is free again");
    let jobs = Jobs::new(2);
    jobs.close();
    let (id, job) = load();
    assert!(!jobs.admit(id, job));
}

#[test]
fn waiting_for_an_unknown_job_is_refused_at_once() {
    let jobs = Jobs::new(2);
    let started = Instant::now();
    assert_eq!(jobs.wait(JobId(99), started + Duration::from_secs(30)), Err(()));
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(!jobs.is_known(JobId(99)));
}
