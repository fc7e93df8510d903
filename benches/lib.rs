//! The benchmarks lie beside this file; each is a target of its own.
