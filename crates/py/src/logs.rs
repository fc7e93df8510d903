//! Forwards the events of kvlane's crates to Python's logging, where vLLM's handlers are.
//!
//! Events come from copying threads too, so recording one never waits: no interpreter lock, no lock that a fork could
//! leave taken, a queue of bounded length whose overflow is counted. A thread of Python's (`kvlane.logs`) takes the
//! lines out: one of ours would be torn out of Python's code at the interpreter's exit, which ends the process badly.

use std::fmt::{Debug, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Once, RwLock};

use crossbeam::channel::{Receiver, Sender, bounded};
use pyo3::prelude::*;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::error::guard;

/// Lines that wait for Python. An engine that logs nothing for so long that more come up has other worries.
const QUEUE_LINES: usize = 256;

/// `logging.DEBUG`.
const PYTHON_DEBUG: u8 = 10;

/// Where lines go. Only ever tried, never waited for: a process forked at a bad moment may find it locked for ever.
static ROUTE: RwLock<Option<Route>> = RwLock::new(None);

/// Lines that found the queue full.
static DROPPED: AtomicU64 = AtomicU64::new(0);

struct Route {
    /// A forked process has the queue but not the thread that empties it.
    process: u32,
    /// None: the interpreter is about to exit.
    sender: Option<Sender<Line>>,
    receiver: Receiver<Line>,
}

struct Line {
    level: u8,
    file: &'static str,
    line: u32,
    text: String,
}

/// Sends the events of this process to Python from now on. Cheap when it was called before.
pub(crate) fn forward(py: Python<'_>) {
    if let Err(error) = try_forward(py) {
        // Logging is no reason to refuse work.
        error.write_unraisable(py, None);
    }
}

fn try_forward(py: Python<'_>) -> PyResult<()> {
    let process = std::process::id();
    let routed = |route: &Option<Route>| route.as_ref().is_some_and(|route| route.process == process);
    if ROUTE.try_read().is_ok_and(|route| routed(&route)) {
        return Ok(());
    }
    let (sender, receiver) = bounded(QUEUE_LINES);
    let inherited = match ROUTE.try_write() {
        Ok(mut route) => route.replace(Route {
            process,
            sender: Some(sender),
            receiver,
        }),
        Err(_) => return Ok(()),
    };
    // A thread that did not come through the fork may have held a lock of the queue, which dropping it would wait for.
    std::mem::forget(inherited);
    let debug: bool = py.import("kvlane.logs")?.call_method0("start")?.extract()?;
    subscribe(if debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::INFO
    });
    Ok(())
}

/// Installs the subscriber, once in a process. The command line tool brings its own and keeps it.
fn subscribe(level: LevelFilter) {
    static SUBSCRIBE: Once = Once::new();
    SUBSCRIBE.call_once(|| {
        let subscribed = tracing_subscriber::registry()
            .with(PythonLines)
            .with(Targets::new().with_target("kvlane", level))
            .try_init();
        if subscribed.is_err() {
            tracing::debug!("the process logs already, Python's logging gets no lines");
        }
    });
}

/// A line for Python: level, source file, line in it, text.
type PythonLine = (u8, &'static str, u32, String);

/// Waits for lines and returns those that are there; None once `end_logs` was called and all were taken.
#[pyfunction]
pub(crate) fn next_logs(py: Python<'_>) -> PyResult<Option<Vec<PythonLine>>> {
    guard(py, || {
        let receiver = match ROUTE.try_read().ok().as_deref() {
            Some(Some(route)) if route.process == std::process::id() => route.receiver.clone(),
            _ => return Ok(None),
        };
        let Ok(first) = py.detach(|| receiver.recv()) else {
            return Ok(None);
        };
        let dropped = DROPPED.swap(0, Ordering::Relaxed);
        let note = (dropped > 0).then(|| Line {
            level: 30,
            file: file!(),
            line: line!(),
            text: format!(
                "kvlane: {dropped} log lines were dropped, they came faster than they could be logged"
            ),
        });
        let lines = std::iter::once(first)
            .chain(receiver.try_iter().take(QUEUE_LINES))
            .chain(note)
            .map(|line| (line.level, line.file, line.line, line.text));
        Ok(Some(lines.collect()))
    })
}

/// No more lines are queued; for the interpreter's exit.
#[pyfunction]
pub(crate) fn end_logs() {
    for _ in 0..1000 {
        if let Ok(mut route) = ROUTE.try_write() {
            let own = route.as_mut().filter(|route| route.process == std::process::id());
            if let Some(route) = own {
                route.sender = None;
            }
            return;
        }
        // An event is being recorded, which takes microseconds.
        std::thread::yield_now();
    }
}

/// Queues events as lines.
struct PythonLines;

impl<S: Subscriber> Layer<S> for PythonLines {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let Ok(route) = ROUTE.try_read() else {
            DROPPED.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let Some(route) = route.as_ref().filter(|route| route.process == std::process::id()) else {
            return;
        };
        let Some(sender) = &route.sender else { return };
        if sender.try_send(line_of(event)).is_err() {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn line_of(event: &Event<'_>) -> Line {
    let meta: &Metadata<'static> = event.metadata();
    let mut words = Words::default();
    event.record(&mut words);
    let (open, close) = if words.fields.is_empty() {
        ("", "")
    } else {
        (" (", ")")
    };
    Line {
        level: match *meta.level() {
            Level::ERROR => 40,
            Level::WARN => 30,
            Level::INFO => 20,
            Level::DEBUG | Level::TRACE => PYTHON_DEBUG,
        },
        file: meta.file().unwrap_or("kvlane"),
        line: meta.line().unwrap_or_default(),
        text: format!("kvlane: {}{open}{}{close}", words.message, words.fields),
    }
}

/// An event's message, and its fields as "name: value, name: value".
#[derive(Default)]
struct Words {
    message: String,
    fields: String,
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let comma = if self.fields.is_empty() { "" } else { ", " };
        // Writing to a string fails only if a value's own formatting does; then the rest of the line is still worth it.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, "{comma}{name}: {value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        // What peers and file names say must not look like other lines.
        if value.contains(char::is_control) {
            self.record_debug(field, &value);
        } else {
            self.record_debug(field, &format_args!("{value}"));
        }
    }
}
