//! Leases: how long they last, and how they end.

use std::sync::Arc;
use std::time::Instant;

use super::{EndReason, Hold, Holder, HolderAction};
use crate::key::TransferKey;
use crate::proto::message::Message;

impl Holder {
    pub(super) fn hold_of(&self, key: &TransferKey) -> Option<&Hold> {
        self.holds.get(self.keys.get(key)?)
    }

    pub(super) fn renew(&mut self, now: Instant, id: &Arc<str>) {
        let Some(hold) = self.holds.get_mut(id) else {
            return;
        };
        let Some(lease) = &mut hold.lease else { return };
        if !hold.is_finished {
            return;
        }
        let expires = now + self.limits.lease;
        if let Some(earlier) = lease.expires.replace(expires) {
            self.expiries.remove(&(earlier, Arc::clone(id)));
        }
        self.expiries.insert((expires, Arc::clone(id)));
    }

    /// False: nobody reads it, or the time of its readers is over too.
    pub(super) fn renew_for_readers(&mut self, now: Instant, id: &Arc<str>) -> bool {
        let reading = self.limits.reading;
        let lease = self.holds.get(id).and_then(|hold| hold.lease.as_ref());
        let is_read = lease.is_some_and(|lease| {
            !lease.readers.is_empty() && lease.last_want.is_some_and(|want| now < want + reading)
        });
        if is_read {
            self.renew(now, id);
        }
        is_read
    }

    /// Drops the oldest finished holds that nobody has claimed, until the rest fits.
    pub(super) fn make_room(&mut self, now: Instant) {
        while self.unclaimed_blocks > self.limits.unclaimed_blocks {
            let is_unclaimed = |id: &Arc<str>| {
                let lease = self.holds.get(id).and_then(|hold| hold.lease.as_ref());
                lease.is_some_and(|lease| !lease.is_claimed)
            };
            let Some(oldest) = self
                .expiries
                .iter()
                .map(|(_, id)| id)
                .find(|id| is_unclaimed(id))
                .cloned()
            else {
                return;
            };
            self.end(now, &oldest, EndReason::Dropped);
        }
    }

    /// Ends a hold; the engine hears of it now or when it finishes the request.
    pub(super) fn end(&mut self, now: Instant, id: &Arc<str>, reason: EndReason) {
        self.close(id, reason);
        let Some(hold) = self.holds.get_mut(id) else {
            return;
        };
        if reason != EndReason::Replaced {
            self.gone.put(hold.key.clone(), now);
        }
        hold.end_reason = reason;
        if hold.is_finished {
            self.holds.remove(id);
            self.actions.push_back(HolderAction::Ended {
                hold: Arc::clone(id),
                reason,
            });
        }
    }

    /// From here on nothing that is read out of the hold's blocks counts.
    pub(super) fn close(&mut self, id: &Arc<str>, reason: EndReason) {
        let Some(hold) = self.holds.get_mut(id) else {
            return;
        };
        let Some(lease) = hold.lease.take() else {
            return;
        };
        let epoch = &mut self.epochs[lease.slot as usize];
        *epoch += 1;
        let action = HolderAction::SetEpoch {
            slot: lease.slot,
            epoch: *epoch,
        };
        self.actions.push_back(action);
        self.free_slots.push(lease.slot);
        if hold.is_finished && !lease.is_claimed {
            self.unclaimed_blocks -= hold.blocks.len();
        }
        if let Some(expires) = lease.expires {
            self.expiries.remove(&(expires, Arc::clone(id)));
        }
        if self.keys.get(&hold.key) == Some(id) {
            self.keys.remove(&hold.key);
        }
        for reader in lease.readers {
            self.readers.remove(&reader);
            if let Some(transfers) = self.transfers.get_mut(&reader.0) {
                transfers.remove(&reader.1);
                if transfers.is_empty() {
                    self.transfers.remove(&reader.0);
                }
            }
            debug_assert!(reason != EndReason::Released || lease.needed == 0 || lease.released > 0);
            let transfer = reader.1;
            self.send(reader.0, Message::Revoked { transfer });
        }
    }
}
