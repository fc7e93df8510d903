//! What waits for the compute stream of a device: progress that may be told once a layer is computed, pulls that may begin
//! once nothing that was started before writes their blocks.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use kvlane_cuda::{CudaError, Mark};

use super::worker::PullOrder;
use crate::error::{Error, Result};
use crate::proto::Progress;

/// Most deeds that wait to be taken by the thread.
const WAITING_MAX: usize = 1 << 16;
/// How often it looks at the device while something waits for it.
const LOOK_EVERY: Duration = Duration::from_micros(200);

/// What is done once the compute stream has come to a mark.
pub(super) enum Deed {
    /// Tell how far a hold's computation is.
    Progress {
        hold: Arc<str>,
        /// Which offer of it.
        offer: u64,
        progress: Progress,
    },
    /// Begin a pull.
    Pull {
        job: u64,
        order: PullOrder,
        deadline: Instant,
    },
}

/// How the waiting of a deed ended.
pub(super) enum Waited {
    /// The stream has come to the mark.
    Reached,
    /// The pull's deadline came first.
    TimedOut,
    /// The device is lost.
    Lost(CudaError),
}

/// The way to the thread that waits; it ends when this is dropped.
pub(super) struct Marks {
    deeds: Sender<(Mark, Deed)>,
}

impl Marks {
    /// Starts the thread. `carry_out` takes each deed, once.
    pub(super) fn start(carry_out: impl FnMut(Deed, Waited) + Send + 'static) -> Result<Self> {
        let (sender, receiver) = bounded(WAITING_MAX);
        std::thread::Builder::new()
            .name("kvlane-p2p-event".to_owned())
            .spawn(move || run(&receiver, carry_out))
            .map_err(|source| Error::Io {
                context: "starting a thread",
                source,
            })?;
        Ok(Self { deeds: sender })
    }

    /// False: too many wait.
    pub(super) fn push(&self, mark: Mark, deed: Deed) -> bool {
        self.deeds.try_send((mark, deed)).is_ok()
    }
}

fn run(deeds: &Receiver<(Mark, Deed)>, mut carry_out: impl FnMut(Deed, Waited)) {
    // Progress stays in its order. A pull is looked at by itself, since it has a deadline.
    let mut progress: VecDeque<(Mark, Deed)> = VecDeque::new();
    let mut pulls: Vec<(Mark, Deed)> = Vec::new();
    loop {
        let first = if progress.is_empty() && pulls.is_empty() {
            deeds.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else if progress.len() + pulls.len() >= WAITING_MAX {
            // The queue fills up behind, and its callers are told.
            std::thread::sleep(LOOK_EVERY);
            Err(RecvTimeoutError::Timeout)
        } else {
            deeds.recv_timeout(LOOK_EVERY)
        };
        let first = match first {
            Ok(first) => Some(first),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let room = WAITING_MAX.saturating_sub(progress.len() + pulls.len());
        for (mark, deed) in first.into_iter().chain(deeds.try_iter().take(room)) {
            match deed {
                Deed::Progress { .. } => progress.push_back((mark, deed)),
                Deed::Pull { .. } => pulls.push((mark, deed)),
            }
        }
        while let Some(waited) = progress.front().and_then(|(mark, deed)| look(mark, deed)) {
            if let Some((_, deed)) = progress.pop_front() {
                carry_out(deed, waited);
            }
        }
        let mut place = 0;
        while let Some((mark, deed)) = pulls.get(place) {
            match look(mark, deed) {
                None => place += 1,
                Some(waited) => carry_out(pulls.swap_remove(place).1, waited),
            }
        }
    }
}

/// How the waiting ended, if it did.
fn look(mark: &Mark, deed: &Deed) -> Option<Waited> {
    match mark.is_over() {
        Ok(true) => return Some(Waited::Reached),
        Err(error) => return Some(Waited::Lost(error)),
        Ok(false) => {}
    }
    match deed {
        Deed::Pull { deadline, .. } if Instant::now() >= *deadline => Some(Waited::TimedOut),
        _ => None,
    }
}
