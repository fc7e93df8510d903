//! Questions that wait for their prompt.

use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

use super::ConnectionId;
use crate::key::{Prompt, TransferKey};

/// A question of a connection.
pub(super) type QuestionId = (ConnectionId, u64);

/// Questions by key, by connection and by deadline.
#[derive(Debug, Default)]
pub(super) struct WaitingQuestions {
    questions: HashMap<QuestionId, Question>,
    by_key: HashMap<TransferKey, Vec<QuestionId>>,
    deadlines: BTreeSet<(Instant, QuestionId)>,
}

#[derive(Debug)]
struct Question {
    key: TransferKey,
    prompt: Prompt,
    deadline: Instant,
}

impl WaitingQuestions {
    /// Number of questions.
    pub(super) fn len(&self) -> usize {
        self.questions.len()
    }

    /// Whether this one waits.
    pub(super) fn contains(&self, id: QuestionId) -> bool {
        self.questions.contains_key(&id)
    }

    /// Adds one that does not wait yet.
    pub(super) fn add(&mut self, id: QuestionId, key: TransferKey, prompt: Prompt, deadline: Instant) {
        self.by_key.entry(key.clone()).or_default().push(id);
        self.deadlines.insert((deadline, id));
        let question = Question {
            key,
            prompt,
            deadline,
        };
        self.questions.insert(id, question);
    }

    /// Takes all that wait for a key, with the prompts that they are about.
    pub(super) fn take(&mut self, key: &TransferKey) -> Vec<(QuestionId, Prompt)> {
        let ids = self.by_key.remove(key).unwrap_or_default();
        let taken = ids.into_iter().filter_map(|id| {
            let question = self.questions.remove(&id)?;
            self.deadlines.remove(&(question.deadline, id));
            Some((id, question.prompt))
        });
        taken.collect()
    }

    /// Takes all whose time is over.
    pub(super) fn take_late(&mut self, now: Instant) -> Vec<QuestionId> {
        let late: Vec<QuestionId> = self
            .deadlines
            .iter()
            .take_while(|(deadline, _)| *deadline <= now)
            .map(|(_, id)| *id)
            .collect();
        late.iter().for_each(|id| self.remove(*id));
        late
    }

    /// Forgets one; an unknown one is ignored.
    pub(super) fn remove(&mut self, id: QuestionId) {
        let Some(question) = self.questions.remove(&id) else {
            return;
        };
        self.deadlines.remove(&(question.deadline, id));
        if let Some(waiting) = self.by_key.get_mut(&question.key) {
            waiting.retain(|other| *other != id);
            if waiting.is_empty() {
                self.by_key.remove(&question.key);
            }
        }
    }

    /// Forgets those of a connection.
    pub(super) fn remove_of(&mut self, connection: ConnectionId) {
        let ids = self.questions.keys().filter(|(asker, _)| *asker == connection);
        let ids: Vec<QuestionId> = ids.copied().collect();
        ids.into_iter().for_each(|id| self.remove(id));
    }

    /// When the first one's time is over.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }
}
