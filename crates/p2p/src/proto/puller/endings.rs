//! How pulls end: right, failed or refused, and never while a copy runs.

use super::{NO_LEASE, PullResult, Puller, PullerAction, Scale};
use crate::proto::message::Message;

impl Puller {
    /// Ends a pull whose blocks are all there, once it is sure that they were right.
    pub(super) fn check_if_complete(&mut self, transfer: u64) {
        let Some(pull) = self.pulls.get_mut(&transfer) else {
            return;
        };
        let scale = Scale::of(&self.limits, self.units.get(&pull.connection), pull);
        if pull.running > 0 || pull.copied_blocks < scale.count || pull.is_checking || pull.end.is_some() {
            return;
        }
        match pull.lease {
            Some((_, epoch)) if pull.unchecked => {
                pull.is_checking = true;
                let check = Message::Check { transfer, epoch };
                self.actions.push_back(PullerAction::Send(pull.connection, check));
            }
            _ => self.finish(transfer),
        }
    }

    pub(super) fn finish(&mut self, transfer: u64) {
        let Some(pull) = self.pulls.get_mut(&transfer) else {
            return;
        };
        pull.end = Some(PullResult::Done);
        let done = if pull.is_asked {
            Message::Done { transfer }
        } else {
            pull.taken()
        };
        self.actions.push_back(PullerAction::Send(pull.connection, done));
        self.end_if_quiet(transfer);
    }

    pub(super) fn fail(&mut self, transfer: u64, result: PullResult) {
        let Some(pull) = self.pulls.get_mut(&transfer) else {
            return;
        };
        if pull.end.is_some() {
            return;
        }
        pull.end = Some(result);
        let is_over = matches!(
            result,
            PullResult::Denied(_) | PullResult::Unreachable | PullResult::Misbehaved
        );
        if result == PullResult::Lapsed {
            // The request may come again, as after a preemption. This rank has it computed by then.
            let (connection, key, prompt, readers) =
                (pull.connection, pull.key.clone(), pull.prompt, pull.readers);
            self.release(connection, key, prompt, readers);
        } else if !is_over {
            self.give_back(transfer);
        }
        let Some(pull) = self.pulls.get(&transfer) else {
            return;
        };
        if pull.running > 0 {
            self.actions.push_back(PullerAction::StopCopies { transfer });
        }
        self.end_if_quiet(transfer);
    }

    /// The holder need not keep the blocks for this rank any longer.
    pub(super) fn give_back(&mut self, transfer: u64) {
        let Some(pull) = self.pulls.get(&transfer) else {
            return;
        };
        let message = if pull.is_asked {
            Message::Cancel { transfer }
        } else if pull.posted_lease == NO_LEASE {
            // A take, of which is not known yet what it found.
            let (connection, key, prompt, readers) =
                (pull.connection, pull.key.clone(), pull.prompt, pull.readers);
            return self.release(connection, key, prompt, readers);
        } else {
            pull.taken()
        };
        self.actions
            .push_back(PullerAction::Send(pull.connection, message));
    }

    pub(super) fn end_if_quiet(&mut self, transfer: u64) {
        let Some(pull) = self.pulls.get(&transfer) else {
            return;
        };
        let (Some(result), 0) = (pull.end, pull.running) else {
            return;
        };
        let job = pull.job;
        self.pulls.remove(&transfer);
        self.by_job.remove(&job);
        self.actions.push_back(PullerAction::Ended {
            job,
            transfer,
            result,
        });
    }
}
