//! A process with one worker of the filesystem backend, told line by line what to do and answering each line with one:
//! what hostile tests kill, stop, starve and freeze.
//!
//! usage: kvlane-test-peer FOLDER "medium=Memory capacity=4194304 ..."

use std::io::{BufRead, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use kvlane_core::Outcome;
use kvlane_tests::worker::{Setup, Worker};

/// Enough for whatever does not hang.
const PATIENCE_MS: u64 = 10_000;

fn main() -> ExitCode {
    let (mut words, level) = (std::env::args().skip(1), tracing::Level::INFO);
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_max_level(level)
        .init();
    let (Some(folder), Some(setup)) = (words.next(), words.next()) else {
        eprintln!("usage: kvlane-test-peer FOLDER SETUP");
        return ExitCode::from(2);
    };
    let setup: Setup = match setup.parse() {
        Ok(setup) => setup,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let worker = match Worker::open(Path::new(&folder), &setup) {
        Ok(worker) => worker,
        Err(error) => {
            say(&format!("refused {error}"));
            return ExitCode::SUCCESS;
        }
    };
    say("open");
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words == ["quit"] {
            break;
        }
        say(&obey(&worker, &words));
    }
    ExitCode::SUCCESS
}

fn obey(worker: &Worker, words: &[&str]) -> String {
    let number = |at: usize, default: u64| {
        words
            .get(at)
            .and_then(|word| word.parse().ok())
            .unwrap_or(default)
    };
    let salt = words.get(1).copied().unwrap_or_default();
    let count = number(2, 1) as usize;
    let patience = Duration::from_millis(number(3, PATIENCE_MS));
    match words.first().copied().unwrap_or_default() {
        "store" => outcome(&worker.store(salt, count, patience)),
        "begin" => {
            worker.begin_store(salt, count, 0, patience);
            "begun".to_owned()
        }
        "load" => {
            let loaded = worker.load(salt, count, patience);
            match loaded.reason {
                None => "done".to_owned(),
                Some(reason) => format!("missed {reason:?} {}", loaded.missed.len()),
            }
        }
        "reserve" => {
            worker.reserve(salt, count, patience);
            "reserved".to_owned()
        }
        "ready" => {
            let found = worker.lookup(salt, count);
            format!("ready {} {}", found.ready_blocks, found.pending_blocks)
        }
        // stream SALT LENGTH CHAINS PAUSE_US: stores chains and says which are done; endless without a number.
        "stream" => {
            let (chains, pause) = (number(3, u64::MAX), Duration::from_micros(number(4, 0)));
            for chain in 0..chains {
                let salt = format!("{salt}-{chain}");
                match chain % 4 {
                    0 => worker.reserve(&salt, count, Duration::from_secs(30)),
                    1 => {
                        worker.reserve(&salt, count, Duration::from_millis(1));
                        worker.withdraw(&salt, count);
                    }
                    _ => {}
                }
                let stored = worker.store(&salt, count, Duration::from_millis(PATIENCE_MS));
                say(&format!("{} {salt}", outcome(&stored)));
                std::thread::sleep(pause);
            }
            "streamed".to_owned()
        }
        // burst SALT LENGTH CHAINS: as `stream`, but all content is there before it says that it begins.
        "burst" => {
            let chains: Vec<(String, u32)> = (0..number(3, 1) as u32)
                .map(|chain| (format!("{salt}-{chain}"), chain * count as u32))
                .collect();
            for (salt, first) in &chains {
                worker.prepare(salt, count, *first);
            }
            say("begins");
            for (salt, first) in &chains {
                let stored = worker.store_prepared(salt, count, *first, Duration::from_millis(PATIENCE_MS));
                say(&format!("{} {salt}", outcome(&stored)));
            }
            "streamed".to_owned()
        }
        "reset" => match worker.reset() {
            Ok(()) => "reset".to_owned(),
            Err(error) => format!("refused {error}"),
        },
        "close" => {
            worker.close();
            "closed".to_owned()
        }
        "slowest" => format!("{}", worker.slowest().as_millis()),
        "stats" => {
            let stats = worker.stats();
            format!(
                "evicted {} adopted {} returned {} corrupt {}",
                stats.evicted_blocks, stats.adopted_segments, stats.returned_segments, stats.corrupt_blocks
            )
        }
        other => format!("unknown command {other}"),
    }
}

fn outcome(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Done => "done".to_owned(),
        Outcome::Miss { positions, reason } => format!("missed {reason:?} {}", positions.len()),
    }
}

/// Whoever gave the orders may be gone: then there is nothing left to do.
fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    if writeln!(output, "{line}").and_then(|()| output.flush()).is_err() {
        std::process::exit(1);
    }
}
