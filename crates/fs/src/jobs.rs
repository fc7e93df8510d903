//! Jobs in flight and completions not delivered yet.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvlane_core::{Completion, JobId, MissReason, Outcome};

use crate::load::LoadJob;
use crate::store::StoreJob;

/// Locks even if a thread died while it had the lock: everything behind our mutexes is valid between statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Clone)]
pub(crate) enum Job {
    Load(Arc<LoadJob>),
    Store(Arc<StoreJob>),
}

impl Job {
    fn deadline(&self) -> Instant {
        match self {
            Job::Load(job) => job.deadline(),
            Job::Store(job) => job.deadline(),
        }
    }

    fn close(&self, reason: MissReason) {
        match self {
            Job::Load(job) => job.close(reason),
            Job::Store(job) => job.close(reason),
        }
    }
}

/// All jobs of one transfer.
#[derive(Debug)]
pub(crate) struct Jobs {
    started: Instant,
    next: AtomicU64,
    live: Mutex<HashMap<JobId, Job>>,
    live_count: AtomicUsize,
    /// Nanoseconds after `started` before which no live job's deadline can pass.
    earliest_nanos: AtomicU64,
    done: Mutex<Vec<Completion>>,
    done_count: AtomicUsize,
    arrived: Condvar,
    limit: usize,
    closed: AtomicBool,
}

impl Jobs {
    pub(crate) fn new(limit: usize) -> Self {
        Jobs {
            started: Instant::now(),
            next: AtomicU64::new(1),
            live: Mutex::default(),
            live_count: AtomicUsize::new(0),
            earliest_nanos: AtomicU64::new(u64::MAX),
            done: Mutex::default(),
            done_count: AtomicUsize::new(0),
            arrived: Condvar::new(),
            limit,
            closed: AtomicBool::new(false),
        }
    }

    pub(crate) fn next_id(&self) -> JobId {
        JobId(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// `false`: too much is in flight; the job must be finished at once as dropped.
    pub(crate) fn admit(&self, id: JobId, job: Job) -> bool {
        let nanos = self.nanos(job.deadline());
        let mut live = lock(&self.live);
        if self.closed.load(Ordering::Relaxed) || live.len() >= self.limit {
            return false;
        }
        live.insert(id, job);
        // Under the lock: `expire` must not overwrite this with what it saw before the job was there.
        self.live_count.store(live.len(), Ordering::Relaxed);
        self.earliest_nanos.fetch_min(nanos, Ordering::Relaxed);
        true
    }

    pub(crate) fn get(&self, id: JobId) -> Option<Job> {
        lock(&self.live).get(&id).cloned()
    }

    /// Delivers a completion. Called once for each job.
    pub(crate) fn finish(&self, job: JobId, outcome: Outcome) {
        let mut done = lock(&self.done);
        // Both under the lock of `done`: whoever finds the job no longer live, finds its completion.
        {
            let mut live = lock(&self.live);
            live.remove(&job);
            self.live_count.store(live.len(), Ordering::Relaxed);
        }
        done.push(Completion { job, outcome });
        self.done_count.store(done.len(), Ordering::Release);
        drop(done);
        self.arrived.notify_all();
    }

    /// Ends the jobs whose deadline has passed. Every caller that looks for completions is also the clock: a thread
    /// that hangs in a file system cannot keep a job open.
    pub(crate) fn expire(&self) {
        if self.live_count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let now = Instant::now();
        if self.nanos(now) < self.earliest_nanos.load(Ordering::Relaxed) {
            return;
        }
        let mut late = Vec::new();
        let mut earliest = u64::MAX;
        {
            let live = lock(&self.live);
            for job in live.values() {
                if job.deadline() <= now {
                    late.push(job.clone());
                } else {
                    earliest = earliest.min(self.nanos(job.deadline()));
                }
            }
            self.earliest_nanos.store(earliest, Ordering::Relaxed);
        }
        for job in late {
            job.close(MissReason::TimedOut);
        }
    }

    pub(crate) fn poll(&self, into: &mut Vec<Completion>) {
        self.expire();
        if self.done_count.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut done = lock(&self.done);
        into.append(&mut done);
        self.done_count.store(0, Ordering::Release);
    }

    /// The completion of `job`, waiting for it until `deadline`. `Err`: there is no such job.
    pub(crate) fn wait(&self, job: JobId, deadline: Instant) -> Result<Option<Completion>, ()> {
        loop {
            let now = Instant::now();
            self.expire();
            let own_deadline = self.get(job).map(|live| live.deadline());
            let mut done = lock(&self.done);
            if let Some(at) = done.iter().position(|completion| completion.job == job) {
                let completion = done.remove(at);
                self.done_count.store(done.len(), Ordering::Release);
                return Ok(Some(completion));
            }
            if now >= deadline {
                return if own_deadline.is_some() { Ok(None) } else { Err(()) };
            }
            if own_deadline.is_none() {
                // It ended and somebody else took the completion, or it never was.
                return Err(());
            }
            let mut until = deadline;
            // Once it has passed, the job is closed, and only a thread that is still copying can end it.
            if let Some(own) = own_deadline.filter(|own| *own > now) {
                until = until.min(own);
            }
            // A little longer than the deadline, so that the next round sees it as passed.
            let pause = until.saturating_duration_since(now) + Duration::from_micros(50);
            drop(self.arrived.wait_timeout(done, pause));
        }
    }

    /// Whether `job` runs, or has ended and its completion was not delivered yet.
    pub(crate) fn is_known(&self, job: JobId) -> bool {
        let live = lock(&self.live).contains_key(&job);
        // Not in one expression: the locks are taken the other way round in `finish`.
        live || lock(&self.done).iter().any(|completion| completion.job == job)
    }

    /// Whether `job` has ended with everything done and its completion was not delivered yet.
    pub(crate) fn ended_well(&self, job: JobId) -> bool {
        lock(&self.done)
            .iter()
            .any(|completion| completion.job == job && completion.outcome == Outcome::Done)
    }

    /// Refuses new jobs and ends the live ones.
    pub(crate) fn close(&self) {
        let live: Vec<Job> = {
            let live = lock(&self.live);
            self.closed.store(true, Ordering::Relaxed);
            live.values().cloned().collect()
        };
        for job in live {
            job.close(MissReason::Cancelled);
        }
    }

    /// As if another thread had all the locks when the process was forked.
    #[cfg(test)]
    pub(crate) fn lock_all_for_test(&self) -> impl Sized + '_ {
        (lock(&self.done), lock(&self.live))
    }

    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.started).as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests;
