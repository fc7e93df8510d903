//! `kvlane` without Python: the same command, for users of cargo.

use std::process::ExitCode;

use kvlane_cli::PythonFacts;

fn main() -> ExitCode {
    let status = kvlane_cli::run(std::env::args_os(), PythonFacts::absent());
    ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX))
}
