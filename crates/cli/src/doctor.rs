//! `kvlane doctor`: what keeps kvlane from working, or from working well, on this machine.
//!
//! Facts are collected first; each check then adds the problems it sees, every one a sentence that says what to do.

mod environment;
mod folder;
mod gpu;
mod python;

use std::path::PathBuf;

use clap::Args;
use indicatif::HumanBytes;
use serde::Serialize;

use crate::exit::Exit;
use crate::facts::PythonFacts;
use crate::output::{Report, show};

/// Find out what keeps kvlane from working, or working well, on this machine; status 1 if something does.
#[derive(Args, Debug)]
pub(crate) struct DoctorArguments {
    /// The servers' shared_storage_path, or its subfolder kvlane; without it no folder is checked.
    path: Option<PathBuf>,
    /// Print one JSON document; errors stay text on standard error.
    #[arg(long)]
    json: bool,
}

/// Runs all checks.
pub(crate) fn run(arguments: &DoctorArguments, facts: &PythonFacts) -> Exit {
    let mut problems = Vec::new();
    let headroom_bytes = kvlane_fs::headroom_bytes();
    let diagnosis = Diagnosis {
        kvlane_version: env!("CARGO_PKG_VERSION"),
        python: python::check(facts, &mut problems),
        folder: arguments
            .path
            .as_deref()
            .map(|path| folder::check(path, headroom_bytes, &mut problems)),
        memory: Memory { headroom_bytes },
        gpu: gpu::check(facts, &mut problems),
        environment: environment::check(std::env::vars_os(), &mut problems),
        problems,
    };
    let shown = show(&diagnosis, arguments.json);
    if diagnosis.problems.is_empty() {
        shown
    } else {
        Exit::Problem
    }
}

#[derive(Serialize)]
struct Diagnosis {
    kvlane_version: &'static str,
    /// Null where the command was not started by Python.
    python: Option<python::PythonState>,
    /// Null where no folder was named.
    folder: Option<folder::FolderState>,
    memory: Memory,
    gpu: gpu::GpuState,
    environment: environment::Variables,
    problems: Vec<String>,
}

#[derive(Serialize)]
struct Memory {
    /// What this container may still take; null without a limit.
    headroom_bytes: Option<u64>,
}

impl Report for Diagnosis {
    fn text(&self) -> String {
        let mut lines = vec![("kvlane", self.kvlane_version.to_owned())];
        match &self.python {
            Some(python) => lines.extend(python.lines()),
            None => lines.push((
                "python",
                "unknown: run the `kvlane` that the wheel installed".to_owned(),
            )),
        }
        match &self.folder {
            Some(folder) => lines.extend(folder.lines()),
            None => lines.push(("folder", "not checked: give the shared_storage_path".to_owned())),
        }
        lines.push((
            "memory",
            match self.memory.headroom_bytes {
                Some(bytes) => format!("{} left below the container's limit", HumanBytes(bytes)),
                None => "no container limit".to_owned(),
            },
        ));
        lines.extend(self.gpu.lines());
        lines.push(("variables", self.environment.line()));
        let mut text = String::new();
        for (what, value) in lines {
            text += &format!("{what:<10}{value}\n");
        }
        text += "\n";
        if self.problems.is_empty() {
            text += "No problem found.\n";
        }
        for problem in &self.problems {
            text += &format!("PROBLEM: {problem}\n");
        }
        text
    }
}
