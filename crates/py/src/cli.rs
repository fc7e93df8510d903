//! `run_cli`: the `kvlane` command, started from Python.

use kvlane_cli::PythonFacts;
use pyo3::prelude::*;

use crate::error::{config_error, guard, with_sources};

/// Runs the ``kvlane`` command and returns its exit status. ``facts``: JSON that only Python knows (for doctor).
#[pyfunction]
pub(crate) fn run_cli(py: Python<'_>, arguments: Vec<String>, facts: &str) -> PyResult<i32> {
    guard(py, || {
        let facts = PythonFacts::from_json(facts).map_err(|error| config_error(py, with_sources(&error)))?;
        // The command expects its own name in front, as a process does.
        let arguments = std::iter::once("kvlane".to_owned()).chain(arguments);
        Ok(py.detach(|| kvlane_cli::run(arguments, facts)))
    })
}
