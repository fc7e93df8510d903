//! The examples lie beside this file: `cargo run -p kvlane-examples --example roundtrip`.
