//! Logs: to standard error, so that standard output stays the command's result.

use std::io::{self, IsTerminal};

use clap::{Args, ValueEnum};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

/// Options of every subcommand.
#[derive(Args, Debug)]
pub(crate) struct LoggingArguments {
    /// What to log: error, warn, info, debug, trace, or per module as in "info,kvlane_proxy=debug" [default: info for
    /// servers, warn for commands that answer and end].
    #[arg(
        long,
        global = true,
        env = "KVLANE_LOG",
        value_name = "LEVEL",
        help_heading = "Logging"
    )]
    log_level: Option<Targets>,
    /// How log lines look.
    #[arg(
        long,
        global = true,
        env = "KVLANE_LOG_FORMAT",
        default_value = "text",
        value_name = "FORMAT",
        help_heading = "Logging"
    )]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// One readable line per event.
    Text,
    /// One JSON object per line.
    Json,
}

/// Sends log events to standard error, those of `default_level` and above unless the user says otherwise. Does nothing
/// if the process logs already.
pub(crate) fn init(arguments: &LoggingArguments, default_level: LevelFilter) {
    let default_level = || Targets::new().with_default(default_level);
    let lines = fmt::layer().with_writer(io::stderr);
    let lines = match arguments.log_format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let logged = tracing_subscriber::registry()
        .with(lines)
        .with(arguments.log_level.clone().unwrap_or_else(default_level))
        .try_init();
    if logged.is_err() {
        tracing::debug!("the process logs already, --log-level and --log-format have no effect");
    }
}
