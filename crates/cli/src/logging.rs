//! Logs: to standard error, so that standard output stays the command's result.

use std::io::{self, IsTerminal};

use clap::{Args, ValueEnum};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

/// Options of every subcommand.
#[derive(Args, Debug)]
pub(crate) struct LoggingArguments {
    /// What to log: error, warn, info, debug, trace, or per module as in "info,kvlane_proxy=debug".
    #[arg(
        long,
        global = true,
        env = "KVLANE_LOG",
        default_value = "info",
        value_name = "LEVEL",
        help_heading = "Logging"
    )]
    log_level: Targets,
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

/// Sends log events to standard error. Does nothing if the process logs already.
pub(crate) fn init(arguments: &LoggingArguments) {
    let lines = fmt::layer().with_writer(io::stderr);
    let lines = match arguments.log_format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let logged = tracing_subscriber::registry()
        .with(lines)
        .with(arguments.log_level.clone())
        .try_init();
    if logged.is_err() {
        tracing::debug!("the process logs already, --log-level and --log-format have no effect");
    }
}
