//! What goes wrong in a schedule, and what happened.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::LEASE;

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
    /// Pulls that look at the board of the prefill server first.
    pub(crate) looks: u32,
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
            looks: 500,
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
            looks: some(1000),
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
    /// Of those, without a grant.
    pub(crate) pulled_as_posted: u64,
    /// Begun as takes.
    pub(crate) taken: u64,
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
        self.pulled_as_posted += other.pulled_as_posted;
        self.taken += other.taken;
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
