//! Questions: is a prompt's KV there, or being computed?

use std::time::{Duration, Instant};

use super::Holder;
use crate::key::{Prompt, TransferKey};
use crate::proto::ConnectionId;
use crate::proto::message::{Message, Verdict};

impl Holder {
    pub(super) fn asked(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        question: u64,
        key: TransferKey,
        prompt: Prompt,
        patience_ms: u32,
    ) -> Result<(), &'static str> {
        if self.waiting.contains((connection, question)) {
            return Err("a question with the number of an open one");
        }
        let verdict = match self.hold_of(&key) {
            Some(hold) if hold.prompt != prompt => Some(Verdict::Mismatch),
            Some(hold) if hold.progress.done_blocks >= hold.block_count => Some(Verdict::Ready),
            Some(_) => Some(Verdict::Started),
            None if self.is_gone(now, &key) => Some(Verdict::None),
            None if self.waiting.len() >= self.limits.questions => Some(Verdict::Busy),
            None => None,
        };
        if let Some(verdict) = verdict {
            self.send(connection, Message::Answer { question, verdict });
            return Ok(());
        }
        let patience = Duration::from_millis(u64::from(patience_ms)).min(self.limits.question_wait);
        self.waiting
            .add((connection, question), key, prompt, now + patience);
        Ok(())
    }

    pub(super) fn answer_waiting(&mut self, key: &TransferKey, verdict: impl Fn(Prompt) -> Verdict) {
        for ((connection, question), asked) in self.waiting.take(key) {
            let verdict = verdict(asked);
            self.send(connection, Message::Answer { question, verdict });
        }
    }

    pub(super) fn is_gone(&self, now: Instant, key: &TransferKey) -> bool {
        // A client that tries again with the same key finds the new request, once prefill has it.
        self.gone
            .peek(key)
            .is_some_and(|ended| now < *ended + self.limits.lease)
    }
}
