//! The holder's end of the lane `nccl`: makes a communicator with the peer of a data connection, and sends blocks over it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvlane_cuda::{
    Communicator, CommunicatorId, CudaError, NcclInfo, NcclVersion, Patience as DevicePatience, Rank,
    RunPart, SendPlan,
};

use super::super::nccl::{GROUP_MAX, JOIN_MAX, STAGING_BYTES_MAX, other_version};
use super::super::pairing::{Walk, check_blocks, check_layers};
use super::super::patience::Patience;
use super::super::tcp::closed;
use super::super::watch::is_hung_up;
use super::super::wire::{Answer, REFUSAL_BYTES_MAX};
use super::super::{LaneError, Lease, LocalCache};
use super::{Leases, Server};

/// Why there is no communicator.
enum Failure {
    /// The peer is told.
    Refused(String),
    /// The connection ends.
    Ended(LaneError),
}

impl From<LaneError> for Failure {
    fn from(error: LaneError) -> Self {
        Self::Ended(error)
    }
}

impl From<CudaError> for Failure {
    fn from(error: CudaError) -> Self {
        Self::Refused(error.to_string())
    }
}

impl<L: Leases> Server<'_, L> {
    /// Makes the communicator of this connection, or says why not.
    pub(super) fn join(
        &mut self,
        version: NcclVersion,
        staging_bytes: u64,
        patience: &Patience<'_>,
    ) -> Result<(), LaneError> {
        if self.communicator.is_some() {
            return Err(LaneError::Protocol("a second join".to_owned()));
        }
        match self.try_join(version, staging_bytes, patience) {
            Ok(communicator) => {
                self.communicator = Some(communicator);
                self.send(&Answer::Joined.encode(), patience)
            }
            Err(Failure::Ended(error)) => Err(error),
            Err(Failure::Refused(mut reason)) => {
                tracing::warn!(reason, "lane nccl is refused to a decode server");
                while reason.len() > REFUSAL_BYTES_MAX {
                    reason.pop();
                }
                let head = Answer::Refused {
                    len_bytes: reason.len(),
                };
                self.send(&[head.encode().as_slice(), reason.as_bytes()].concat(), patience)?;
                // Decode has no more use for the connection, and whoever asks again must not fill the log.
                Err(LaneError::Request(reason))
            }
        }
    }

    fn try_join(
        &mut self,
        version: NcclVersion,
        staging_bytes: u64,
        patience: &Patience<'_>,
    ) -> Result<Communicator, Failure> {
        let LocalCache::Device(cache) = self.pairing.local() else {
            return Err(Failure::Refused(
                "the cache of this server is in host memory".to_owned(),
            ));
        };
        let cache = Arc::clone(cache);
        let own = NcclInfo::find()?.version;
        if own != version {
            return Err(Failure::Refused(other_version(own, version)));
        }
        let staging_bytes = match usize::try_from(staging_bytes) {
            Ok(bytes) if bytes > 0 && staging_bytes <= STAGING_BYTES_MAX => bytes,
            _ => {
                return Err(Failure::Refused(format!(
                    "{staging_bytes} bytes of staging, allowed: 1 to {STAGING_BYTES_MAX}"
                )));
            }
        };
        let place = cache.communicator_place()?;
        let id = CommunicatorId::new()?;
        self.send(
            &[Answer::Id.encode().as_slice(), id.as_bytes().as_slice()].concat(),
            patience,
        )?;
        let joined = self.watched(patience, JOIN_MAX, |patience| {
            cache.join(place, &id, Rank::Sender, staging_bytes, patience)
        });
        if joined.is_err() && is_hung_up(&self.socket, Duration::ZERO) {
            return Err(Failure::Ended(closed()));
        }
        Ok(joined?)
    }

    /// Sends the blocks of a request over the communicator.
    pub(super) fn transmit(
        &mut self,
        lease: Lease,
        layers: &Range<usize>,
        patience: &Patience<'_>,
    ) -> Result<(), LaneError> {
        let map = self.pairing.local().map();
        check_layers(layers, map.layer_count())?;
        check_blocks("this", &self.blocks, self.pairing.local_units())?;
        // Not in `self` meanwhile: an error on the way ends it.
        let Some(mut communicator) = self.communicator.take() else {
            return Err(LaneError::Protocol(
                "a transmit without a communicator".to_owned(),
            ));
        };
        let blocks = std::mem::take(&mut self.blocks);
        let sent = self.send_groups(&mut communicator, &blocks, lease, layers, patience);
        self.blocks = blocks;
        sent?;
        self.communicator = Some(communicator);
        Ok(())
    }

    fn send_groups(
        &mut self,
        communicator: &mut Communicator,
        blocks: &[u32],
        lease: Lease,
        layers: &Range<usize>,
        patience: &Patience<'_>,
    ) -> Result<(), LaneError> {
        let pairing = Arc::clone(&self.pairing);
        let mut walk = pairing.walk(layers, blocks, blocks);
        let mut done_bytes = 0;
        let mut parts = Vec::new();
        loop {
            // Also before the first byte, and after the last one was read.
            let is_held = self.leases.is_held(lease);
            if walk.is_done() {
                self.served.fetches += 1;
                self.served.bytes += done_bytes;
                return self.send(&Answer::of_lease(is_held).encode(), patience);
            }
            if !is_held {
                return self.send(&Answer::Lapsed.encode(), patience);
            }
            take_parts(&mut walk, communicator.staging_bytes(), &mut parts);
            let plan = communicator.plan(&parts);
            let lens = plan.lens();
            let mut told = Answer::Group { sends: lens.len() }.encode().to_vec();
            for &len in &lens {
                // At most as many bytes as the staging has, which are few enough.
                told.extend_from_slice(&u32::try_from(len).expect("fits the frame").to_le_bytes());
            }
            self.send(&told, patience)?;
            let sent = self.watched(patience, GROUP_MAX, |patience| communicator.send(plan, patience));
            if let Err(error) = sent {
                let is_gone = is_hung_up(&self.socket, Duration::ZERO);
                return Err(if is_gone {
                    closed()
                } else {
                    LaneError::of_device(error, done_bytes)
                });
            }
            done_bytes += lens.iter().sum::<usize>() as u64;
        }
    }

    /// Does something on the device that ends as early as `patience`, after `most`, and when the peer is gone.
    fn watched<T>(
        &self,
        patience: &Patience<'_>,
        most: Duration,
        work: impl FnOnce(&DevicePatience<'_>) -> kvlane_cuda::Result<T>,
    ) -> kvlane_cuda::Result<T> {
        let most = Instant::now() + most;
        work(&DevicePatience {
            deadline: patience.deadline.map_or(most, |deadline| deadline.min(most)),
            cancelled: &|| patience.stop.load(Ordering::Relaxed) || is_hung_up(&self.socket, Duration::ZERO),
        })
    }
}

fn take_parts(walk: &mut Walk<'_>, most_bytes: usize, parts: &mut Vec<RunPart>) {
    parts.clear();
    let mut len_bytes = 0;
    while parts.len() < SendPlan::PARTS_MAX
        && let Some(part) = walk.next(most_bytes - len_bytes)
    {
        len_bytes += part.len;
        parts.push(part.local());
    }
}
