//! What several benchmarks share; the benchmarks lie beside this file, each a target of its own.

pub mod tiny_store;
