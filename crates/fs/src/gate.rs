//! The gate in front of the paged cache: closed at the deadline, and closed means that nobody is inside.

use std::sync::atomic::{AtomicU64, Ordering};

const CLOSED: u64 = 1 << 63;

/// Counts the threads that touch a job's cache blocks and keeps new ones out once it is closed.
#[derive(Debug, Default)]
pub(crate) struct Gate(AtomicU64);

/// Leaving is dropping.
pub(crate) struct Inside<'a> {
    gate: &'a Gate,
    left: &'a dyn Fn(),
}

impl Gate {
    /// Lets the caller in until the result is dropped, or not at all. `left` is called by whoever leaves a closed gate
    /// last.
    pub(crate) fn enter<'a>(&'a self, left: &'a dyn Fn()) -> Option<Inside<'a>> {
        let before = self.0.fetch_add(1, Ordering::Acquire);
        let inside = Inside { gate: self, left };
        // Dropping `inside` undoes the count, and takes over the duty of the last one where it fell to us.
        (before & CLOSED == 0).then_some(inside)
    }

    /// Closes the gate. `true`: nobody is inside; otherwise the last one to leave calls `left`. Only the first close
    /// of a gate may answer `true`.
    pub(crate) fn close(&self) -> bool {
        let before = self.0.fetch_or(CLOSED, Ordering::AcqRel);
        before == 0
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire) & CLOSED != 0
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if self.gate.0.fetch_sub(1, Ordering::AcqRel) == CLOSED | 1 {
            (self.left)();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn closing_an_empty_gate_is_final_at_once_and_nobody_enters_later() {
        let gate = Gate::default();
        let calls = AtomicUsize::new(0);
        let left = || {
            calls.fetch_add(1, Ordering::Relaxed);
        };
        drop(gate.enter(&left));
        assert!(gate.close());
        assert!(gate.enter(&left).is_none());
        assert!(gate.is_closed());
    }

    #[test]
    fn the_last_one_to_leave_a_closed_gate_tells() {
        let gate = Gate::default();
        let calls = AtomicUsize::new(0);
        let left = || {
            calls.fetch_add(1, Ordering::Relaxed);
        };
        let first = gate.enter(&left);
        let second = gate.enter(&left);
        assert!(!gate.close());
        drop(first);
        assert_eq!(calls.load(Ordering::Relaxed), 0);
        drop(second);
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }
}
