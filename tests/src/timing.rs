//! Claims about time on a machine whose threads stand still for seconds now and then.

use std::time::Duration;

const ATTEMPTS: usize = 5;

/// An attempt that takes longer is no matter of load.
const HANG: Duration = Duration::from_secs(10);

/// Runs `attempt` until it succeeds once, or has said each time why it did not: load spoils some attempts, a defect all.
#[track_caller]
pub fn attempts(attempt: impl FnMut() -> Result<(), String>) {
    let mut reasons = Vec::new();
    for result in std::iter::repeat_with(attempt).take(ATTEMPTS) {
        match result {
            Ok(()) => return,
            Err(reason) => reasons.push(reason),
        }
    }
    panic!("no attempt succeeded:\n{}", reasons.join("\n"));
}

/// Runs `attempt`, which returns how long something took, until that was less than `limit` once.
#[track_caller]
pub fn within(limit: Duration, mut attempt: impl FnMut() -> Duration) {
    attempts(|| in_time(attempt(), limit));
}

/// What an attempt comes to that took so long. Panics where that is no matter of load.
#[track_caller]
pub fn in_time(took: Duration, limit: Duration) -> Result<(), String> {
    assert!(took < HANG, "it took {took:?}, allowed: {limit:?}");
    if took < limit {
        Ok(())
    } else {
        Err(format!("it took {took:?}, allowed: {limit:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(100);

    #[test]
    fn one_attempt_below_the_limit_is_enough() {
        let mut times = [3 * LIMIT, LIMIT, LIMIT / 2, LIMIT].into_iter();
        within(LIMIT, || times.next().expect("no attempt after that"));
        assert_eq!(times.len(), 1);
    }

    #[test]
    #[should_panic(expected = "no attempt succeeded")]
    fn what_is_always_too_slow_fails() {
        within(LIMIT, || LIMIT);
    }

    #[test]
    #[should_panic(expected = "it took 10s")]
    fn a_hang_fails_at_once() {
        let mut times = [HANG].into_iter();
        within(LIMIT, || times.next().expect("one attempt"));
    }
}
