//! The `kvlane` command as a library, so that the wheel and the cargo binary run the same code.
//!
//! One module per subcommand. Each gives back an [`Exit`]; only [`run`] turns it into a process status. What a person
//! reads goes to standard output as text, or as one JSON document with `--json`; logs and errors go to standard error.

#![forbid(unsafe_code)]

mod descriptors;
mod doctor;
mod exit;
mod facts;
mod logging;
mod output;
mod proxy;
mod store;

use std::ffi::OsString;

use clap::{Parser, Subcommand};
use tracing_subscriber::filter::LevelFilter;

pub use exit::Exit;
pub use facts::PythonFacts;
pub use output::{Report, Table};

/// Moves KV cache between vLLM servers at memory speed.
#[derive(Debug, Parser)]
#[command(
    name = "kvlane",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    after_help = "Exit status: 0 all is well, 1 it did not work or a check found problems, 2 wrong usage"
)]
struct Arguments {
    #[command(flatten)]
    logging: logging::LoggingArguments,
    #[command(subcommand)]
    command: Command,
}

// What each says of itself stands with its arguments: a line here would replace it.
#[derive(Debug, Subcommand)]
enum Command {
    Proxy(proxy::ProxyArguments),
    Store(store::StoreArguments),
    Doctor(doctor::DoctorArguments),
}

/// Runs the command. `arguments` begins with the program's name; `facts` is what only a Python caller knows.
///
/// Returns the process status: 0 all is well, 1 it did not work or a check found problems, 2 wrong usage.
pub fn run<I, T>(arguments: I, facts: PythonFacts) -> i32
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    let exit = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => dispatch(arguments, &facts),
        // Help and version are "errors" of clap's, printed to standard output with status 0.
        Err(error) => {
            let exit = if error.use_stderr() { Exit::Usage } else { Exit::Ok };
            // Nowhere left to complain when even that cannot be written (a closed pipe).
            let _written = error.print();
            exit
        }
    };
    exit.status()
}

fn dispatch(arguments: Arguments, facts: &PythonFacts) -> Exit {
    let default_level = match &arguments.command {
        Command::Proxy(_) => LevelFilter::INFO,
        Command::Store(_) | Command::Doctor(_) => LevelFilter::WARN,
    };
    logging::init(&arguments.logging, default_level);
    match arguments.command {
        Command::Proxy(arguments) => proxy::run(arguments),
        Command::Store(arguments) => store::run(arguments),
        Command::Doctor(arguments) => doctor::run(&arguments, facts),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_status_tells_usage_errors_from_success() {
        let run = |arguments: &[&str]| run(arguments.iter().copied(), PythonFacts::absent());
        assert_eq!(run(&["kvlane", "--version"]), 0);
        assert_eq!(run(&["kvlane", "proxy", "--help"]), 0);
        assert_eq!(run(&["kvlane"]), 2);
        assert_eq!(run(&["kvlane", "nonsense"]), 2);
    }

    #[test]
    fn help_tells_what_the_arguments_alone_do_not() {
        let help = |path: &[&str]| {
            let mut command = Arguments::command();
            for name in path {
                command = command.find_subcommand(name).unwrap().clone();
            }
            (
                command.get_about().unwrap().to_string(),
                command.render_long_help().to_string(),
            )
        };
        for (path, about, more) in [
            (&["proxy"][..], "Serve", "http://HOST:PORT=KV_PORT"),
            (&["store", "explain"], "Say", "LoRA adapter"),
            (&["store", "gc"], "Remove", "status 1"),
            (&["doctor"], "Find", "status 1"),
            (&[], "Moves", "Exit status: 0"),
        ] {
            let (line, text) = help(path);
            assert!(line.starts_with(about) && !line.contains('\n'), "{line}");
            assert!(text.contains(more), "{path:?}: {text}");
        }
    }

    #[test]
    fn a_proxy_without_what_it_needs_is_refused_by_name() {
        let complete = [
            "kvlane",
            "proxy",
            "--prefill=http://a:1",
            "--decode=http://b:1",
            "--kv-backend=fs",
        ];
        let parse =
            |arguments: &[&str]| Arguments::try_parse_from(arguments).map_err(|error| error.to_string());
        assert!(parse(&complete).is_ok());
        for (missing, name) in [(2, "--prefill <URL>"), (3, "--decode <URL>"), (4, "--kv-backend")] {
            let mut arguments = complete.to_vec();
            arguments.remove(missing);
            let message = parse(&arguments).unwrap_err();
            let (_, named) = message.split_once("not provided:").unwrap();
            let (named, _) = named.split_once("Usage").unwrap();
            assert!(
                named.contains(name) && named.trim().lines().count() == 1,
                "{message}"
            );
            assert_eq!(run(arguments, PythonFacts::absent()), 2);
        }
        let mut encrypted = complete;
        encrypted[2] = "--prefill=https://a:1";
        let message = parse(&encrypted).unwrap_err();
        assert!(
            message.contains("--prefill") && message.contains("TLS"),
            "{message}"
        );
        assert_eq!(run(encrypted, PythonFacts::absent()), 2);
    }
}
