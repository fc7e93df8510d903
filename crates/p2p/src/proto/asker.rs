//! Decode's scheduler half: questions to prefill, and what became of them.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::ConnectionId;
use super::message::{Message, Verdict};
use crate::key::{Prompt, TransferKey};

/// Bounds of an asker.
#[derive(Clone, Copy, Debug)]
pub struct AskerLimits {
    /// Most questions that are open or answered and not forgotten.
    pub questions: usize,
}

/// What is known about a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No answer yet.
    Pending,
    /// Prefill answered.
    Answered(Verdict),
    /// Prefill cannot be reached, or the connection broke.
    Unreachable,
    /// Prefill did not answer in time.
    TimedOut,
}

/// What whoever drives an asker has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AskerAction {
    /// Send this.
    Send(ConnectionId, Message),
}

/// The state machine. Time and connections come from outside.
#[derive(Debug)]
pub struct Asker {
    limits: AskerLimits,
    questions: HashMap<TransferKey, Question>,
    by_number: HashMap<u64, TransferKey>,
    last_number: u64,
    actions: VecDeque<AskerAction>,
}

#[derive(Debug)]
struct Question {
    number: u64,
    connection: ConnectionId,
    deadline: Instant,
    state: State,
}

impl Asker {
    /// Without questions.
    pub fn new(limits: AskerLimits) -> Self {
        Self {
            limits,
            questions: HashMap::new(),
            by_number: HashMap::new(),
            last_number: 0,
            actions: VecDeque::new(),
        }
    }

    /// What became of the question for `key`; `None` if there is none.
    pub fn state(&self, key: &TransferKey) -> Option<State> {
        self.questions.get(key).map(|question| question.state)
    }

    /// Sends a question over a connection that is ready, or will be: messages wait there. A key that is known already
    /// keeps its question. False: there are too many.
    pub fn ask(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        key: &TransferKey,
        prompt: Prompt,
        timeout: Duration,
    ) -> bool {
        if self.questions.contains_key(key) {
            return true;
        }
        if self.questions.len() >= self.limits.questions {
            return false;
        }
        self.last_number += 1;
        let number = self.last_number;
        self.questions.insert(
            key.clone(),
            Question {
                number,
                connection,
                deadline: now + timeout,
                state: State::Pending,
            },
        );
        self.by_number.insert(number, key.clone());
        let ask = Message::Ask {
            question: number,
            key: key.clone(),
            prompt,
            patience_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
        };
        self.actions.push_back(AskerAction::Send(connection, ask));
        true
    }

    /// Nobody wants to know any more.
    pub fn forget(&mut self, key: &TransferKey) {
        let Some(question) = self.questions.remove(key) else {
            return;
        };
        self.by_number.remove(&question.number);
        if question.state == State::Pending {
            let forget = Message::Forget {
                question: question.number,
            };
            self.actions
                .push_back(AskerAction::Send(question.connection, forget));
        }
    }

    /// Takes a message. False: it is none that an asker gets.
    pub fn receive(&mut self, connection: ConnectionId, message: &Message) -> bool {
        let Message::Answer { question, verdict } = message else {
            return false;
        };
        // One that was forgotten meanwhile, or somebody else's, is nobody's business.
        let known = self
            .by_number
            .get(question)
            .and_then(|key| self.questions.get_mut(key));
        if let Some(known) = known
            && known.connection == connection
            && known.state == State::Pending
        {
            known.state = State::Answered(*verdict);
        }
        true
    }

    /// A connection is no more.
    pub fn closed(&mut self, connection: ConnectionId) {
        self.questions
            .values_mut()
            .filter(|question| question.connection == connection && question.state == State::Pending)
            .for_each(|question| question.state = State::Unreachable);
    }

    /// When [`tick`](Self::tick) must be called, at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        let pending = self
            .questions
            .values()
            .filter(|question| question.state == State::Pending);
        pending.map(|question| question.deadline).min()
    }

    /// Notices questions that were not answered in time.
    pub fn tick(&mut self, now: Instant) {
        for question in self.questions.values_mut() {
            if question.state == State::Pending && question.deadline <= now {
                question.state = State::TimedOut;
                let forget = Message::Forget {
                    question: question.number,
                };
                self.actions
                    .push_back(AskerAction::Send(question.connection, forget));
            }
        }
    }

    /// The next thing to do.
    pub fn next_action(&mut self) -> Option<AskerAction> {
        self.actions.pop_front()
    }

    /// Number of questions that are not forgotten.
    pub fn question_count(&self) -> usize {
        self.questions.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: ConnectionId = ConnectionId(1);
    const TIMEOUT: Duration = Duration::from_secs(3);

    fn key(text: &str) -> TransferKey {
        TransferKey::new(text).unwrap()
    }

    fn prompt() -> Prompt {
        Prompt {
            tokens: 20,
            digest: [5; 32],
        }
    }

    fn asked(now: Instant) -> (Asker, u64) {
        let mut asker = Asker::new(AskerLimits { questions: 2 });
        assert!(asker.ask(now, PEER, &key("a"), prompt(), TIMEOUT));
        let Some(AskerAction::Send(PEER, Message::Ask { question, .. })) = asker.next_action() else {
            panic!("no question");
        };
        (asker, question)
    }

    #[test]
    fn asking_again_sends_nothing_and_the_answer_stays() {
        let now = Instant::now();
        let (mut asker, question) = asked(now);
        assert!(asker.ask(now, PEER, &key("a"), prompt(), TIMEOUT));
        assert_eq!(asker.next_action(), None);
        assert_eq!(asker.state(&key("a")), Some(State::Pending));
        let verdict = Verdict::Ready;
        asker.receive(PEER, &Message::Answer { question, verdict });
        let late = Message::Answer {
            question,
            verdict: Verdict::None,
        };
        asker.receive(PEER, &late);
        asker.closed(PEER);
        asker.tick(now + 2 * TIMEOUT);
        assert_eq!(asker.state(&key("a")), Some(State::Answered(verdict)));
    }

    #[test]
    fn an_answer_over_another_connection_does_not_count() {
        let (mut asker, question) = asked(Instant::now());
        let answer = Message::Answer {
            question,
            verdict: Verdict::Ready,
        };
        assert!(asker.receive(ConnectionId(2), &answer));
        assert_eq!(asker.state(&key("a")), Some(State::Pending));
    }

    #[test]
    fn silence_and_a_broken_connection_end_a_question() {
        let now = Instant::now();
        let (mut asker, question) = asked(now);
        assert_eq!(asker.next_deadline(), Some(now + TIMEOUT));
        asker.tick(now + TIMEOUT);
        assert_eq!(asker.state(&key("a")), Some(State::TimedOut));
        assert_eq!(
            asker.next_action(),
            Some(AskerAction::Send(PEER, Message::Forget { question }))
        );
        assert_eq!(asker.next_deadline(), None);
        let (mut asker, _) = asked(now);
        asker.closed(PEER);
        assert_eq!(asker.state(&key("a")), Some(State::Unreachable));
    }

    #[test]
    fn questions_are_bounded_and_forgetting_makes_room() {
        let now = Instant::now();
        let (mut asker, question) = asked(now);
        assert!(asker.ask(now, PEER, &key("b"), prompt(), TIMEOUT));
        assert!(!asker.ask(now, PEER, &key("c"), prompt(), TIMEOUT));
        assert_eq!(asker.state(&key("c")), None);
        asker.next_action();
        asker.forget(&key("a"));
        assert_eq!(
            asker.next_action(),
            Some(AskerAction::Send(PEER, Message::Forget { question }))
        );
        assert!(asker.ask(now, PEER, &key("c"), prompt(), TIMEOUT));
        assert_eq!(asker.question_count(), 2);
    }
}
