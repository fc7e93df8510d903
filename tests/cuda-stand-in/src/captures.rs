//! Graphs that a program captures: what other threads may call meanwhile.

use std::cell::Cell;

use crate::world::{World, lock};

/// How a capture, or a thread, deals with calls that cannot be part of a graph.
pub(crate) const GLOBAL: u32 = 0;
const RELAXED: u32 = 2;

thread_local! {
    static MODE: Cell<u32> = const { Cell::new(GLOBAL) };
}

/// Gives this thread another mode; returns the one it had. `None`: there is no such mode.
pub(crate) fn exchange_mode(mode: u32) -> Option<u32> {
    (mode <= RELAXED).then(|| MODE.replace(mode))
}

/// Whether a call of this thread that cannot be part of a graph fails now. It then spoils all graphs on their way.
pub(crate) fn forbid(world: &World) -> bool {
    let mut captures = lock(&world.captures);
    let forbids = !captures.is_empty() && MODE.get() != RELAXED;
    if forbids {
        captures.values_mut().for_each(|is_whole| *is_whole = false);
    }
    forbids
}

/// Begins to capture what goes to a stream. Only the bookkeeping: there is no graph afterwards.
pub(crate) fn begin(world: &World, stream: usize) {
    lock(&world.captures).insert(stream, true);
}

/// Ends it; whether the graph would be whole. `None`: none was captured.
pub(crate) fn end(world: &World, stream: usize) -> Option<bool> {
    lock(&world.captures).remove(&stream)
}
