//! How long a thread waits for a connection, and what makes it stop earlier.

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::LaneError;
use crate::raw::{Interest, wait};

pub(super) struct Patience<'a> {
    /// `None`: until stopped.
    pub(super) deadline: Option<Instant>,
    pub(super) stop: &'a AtomicBool,
    /// A flag wakes nobody, so it is looked at this often.
    pub(super) look_every: Duration,
}

impl Patience<'_> {
    /// An error if it is time to stop; `done_bytes` is for its text.
    pub(super) fn check(&self, done_bytes: u64) -> Result<(), LaneError> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(LaneError::Cancelled { done_bytes });
        }
        match self.deadline {
            Some(deadline) if Instant::now() >= deadline => Err(LaneError::TimedOut { done_bytes }),
            _ => Ok(()),
        }
    }

    /// Does something on a device that ends as early as this.
    pub(super) fn on_device<T>(
        &self,
        done_bytes: u64,
        work: impl FnOnce(&kvlane_cuda::Patience<'_>) -> kvlane_cuda::Result<T>,
    ) -> Result<T, LaneError> {
        let patience = kvlane_cuda::Patience {
            // Without a deadline it still ends, and the caller asks again.
            deadline: self.deadline.unwrap_or_else(|| Instant::now() + self.look_every),
            cancelled: &|| self.stop.load(Ordering::Relaxed),
        };
        work(&patience).map_err(|error| LaneError::of_device(error, done_bytes))
    }

    /// Waits for a connection for a while. The caller tries again and calls [`check`](Self::check).
    pub(super) fn wait(&self, socket: &TcpStream, interest: Interest) -> Result<(), LaneError> {
        let left = self
            .deadline
            .map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let most = left.map_or(self.look_every, |left| left.min(self.look_every));
        wait(socket, interest, most).map_err(|source| LaneError::System { call: "poll", source })
    }
}
