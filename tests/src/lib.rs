//! The conformance suite that every kvlane backend passes, and what tests across crates share.
