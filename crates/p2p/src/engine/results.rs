//! Pulls and holds that have ended, until the engine asks for them.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::worker::Ended;
use crate::error::{Error, Result};
use crate::proto::{EndReason, PullResult};

/// Pulls and holds that have ended, until somebody asks.
#[derive(Default)]
pub(super) struct Results {
    /// Entries of both lists.
    waiting: AtomicUsize,
    lists: Mutex<Lists>,
    changed: Condvar,
}

#[derive(Default)]
struct Lists {
    pulls: VecDeque<Ended>,
    /// Jobs given out whose end was not delivered.
    open: HashSet<u64>,
    holds: Vec<(Arc<str>, EndReason)>,
}

impl Results {
    /// A new job whose end will be delivered.
    pub(super) fn open(&self, job: u64) {
        self.lock().open.insert(job);
    }

    /// Finished requests whose blocks are the engine's own again; each once.
    pub(super) fn take_holds(&self) -> Vec<(Arc<str>, EndReason)> {
        if self.is_empty() {
            return Vec::new();
        }
        let mut lists = self.lock();
        let holds = std::mem::take(&mut lists.holds);
        self.waiting.fetch_sub(holds.len(), Ordering::Release);
        holds
    }

    /// The engine has taken the blocks of this hold back by itself: an end that it has not asked for is old news, and its
    /// name may be given to another request.
    pub(super) fn forget_hold(&self, hold: &str) {
        let mut lists = self.lock();
        let before = lists.holds.len();
        lists.holds.retain(|(ended, _)| &**ended != hold);
        let forgotten = before - lists.holds.len();
        self.waiting.fetch_sub(forgotten, Ordering::Release);
    }

    /// Pulls that have ended, each once. One atomic load when there are none.
    pub(super) fn take_pulls(&self) -> Vec<Ended> {
        if self.is_empty() {
            return Vec::new();
        }
        let mut lists = self.lock();
        let ended: Vec<Ended> = lists.pulls.drain(..).collect();
        for pull in &ended {
            lists.open.remove(&pull.job);
        }
        self.waiting.fetch_sub(ended.len(), Ordering::Release);
        ended
    }

    /// Waits for the end of one pull, at most until `deadline`.
    pub(super) fn wait(&self, job: u64, deadline: Instant) -> Result<Option<PullResult>> {
        let mut lists = self.lock();
        loop {
            if let Some(place) = lists.pulls.iter().position(|ended| ended.job == job) {
                let ended = lists.pulls.remove(place);
                lists.open.remove(&job);
                self.waiting.fetch_sub(1, Ordering::Release);
                return Ok(ended.map(|ended| ended.result));
            }
            if !lists.open.contains(&job) {
                return Err(Error::UnknownJob(job));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let waited = self.changed.wait_timeout(lists, left);
            lists = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::Acquire) == 0
    }

    fn lock(&self) -> MutexGuard<'_, Lists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, ended: Ended) {
        self.lock().pulls.push_back(ended);
        self.waiting.fetch_add(1, Ordering::Release);
        self.changed.notify_all();
    }

    pub(super) fn add_hold(&self, hold: Arc<str>, reason: EndReason) {
        self.lock().holds.push((hold, reason));
        self.waiting.fetch_add(1, Ordering::Release);
    }
}
