//! The environment variables that kvlane reads.

use std::collections::BTreeMap;
use std::ffi::OsString;

use serde::Serialize;

/// All of them; see the command's help and the README.
const KNOWN: [&str; 9] = [
    "KVLANE_DECODE",
    "KVLANE_DISPATCH",
    "KVLANE_HOST",
    "KVLANE_KV_BACKEND",
    "KVLANE_LOG",
    "KVLANE_LOG_FORMAT",
    "KVLANE_PLUGIN",
    "KVLANE_PORT",
    "KVLANE_PREFILL",
];

/// Variables whose names begin with `KVLANE_`, secrets hidden.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(super) struct Variables(BTreeMap<String, String>);

/// Collects them from `all`.
pub(super) fn check(
    all: impl Iterator<Item = (OsString, OsString)>,
    problems: &mut Vec<String>,
) -> Variables {
    let mut found = BTreeMap::new();
    for (name, value) in all {
        let (name, value) = (name.to_string_lossy(), value.to_string_lossy());
        if !name.starts_with("KVLANE_") {
            continue;
        }
        problems.extend(problem(&name, &value));
        let is_secret = ["SECRET", "TOKEN", "KEY", "PASSWORD"]
            .iter()
            .any(|word| name.contains(word));
        let value = if is_secret { "(hidden)".into() } else { value };
        found.insert(name.into_owned(), value.into_owned());
    }
    Variables(found)
}

fn problem(name: &str, value: &str) -> Option<String> {
    // Kubernetes describes a Service named `kvlane` to every pod of its namespace by variables that begin the same way.
    if name == "KVLANE_PORT" && value.starts_with("tcp://") {
        return Some(
            "KVLANE_PORT is Kubernetes' description of a Service named kvlane, so the proxy cannot start: set \
             enableServiceLinks: false in the pod, or give the Service another name."
                .to_owned(),
        );
    }
    let from_kubernetes = name.starts_with("KVLANE_SERVICE_") || name.starts_with("KVLANE_PORT_");
    (!from_kubernetes && !KNOWN.contains(&name)).then(|| {
        format!(
            "{name} is set but kvlane reads no such variable: unset it, or correct it to one of {}.",
            KNOWN.join(", ")
        )
    })
}

impl Variables {
    /// For people.
    pub(super) fn line(&self) -> String {
        if self.0.is_empty() {
            return "no KVLANE_* is set".to_owned();
        }
        let pairs: Vec<String> = self
            .0
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        pairs.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(pairs: &[(&str, &str)]) -> (Variables, Vec<String>) {
        let mut problems = Vec::new();
        let all = pairs.iter().map(|(name, value)| (name.into(), value.into()));
        (check(all, &mut problems), problems)
    }

    #[test]
    fn known_variables_are_shown_and_others_of_the_system_are_not() {
        let (variables, problems) =
            checked(&[("KVLANE_LOG", "debug"), ("PATH", "/bin"), ("KVLANE_PLUGIN", "0")]);
        assert_eq!(variables.line(), "KVLANE_LOG=debug KVLANE_PLUGIN=0");
        assert!(problems.is_empty());
        assert_eq!(checked(&[]).0.line(), "no KVLANE_* is set");
    }

    #[test]
    fn every_variable_that_an_option_reads_is_known() {
        use clap::CommandFactory;
        let command = crate::Arguments::command();
        let all = command
            .get_arguments()
            .chain(command.get_subcommands().flat_map(clap::Command::get_arguments));
        let read: Vec<_> = all.filter_map(|argument| argument.get_env()?.to_str()).collect();
        assert!(read.contains(&"KVLANE_PREFILL"));
        assert!(read.iter().all(|name| KNOWN.contains(name)), "{read:?}");
    }

    #[test]
    fn a_misspelt_variable_is_a_problem() {
        let (_, problems) = checked(&[("KVLANE_PLUGINS", "0")]);
        assert!(
            problems.len() == 1 && problems[0].starts_with("KVLANE_PLUGINS is set"),
            "{problems:?}"
        );
    }

    #[test]
    fn only_the_harmful_variable_of_a_kubernetes_service_is_a_problem() {
        let (_, problems) = checked(&[
            ("KVLANE_PORT", "tcp://10.0.0.1:8080"),
            ("KVLANE_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
            ("KVLANE_SERVICE_HOST", "10.0.0.1"),
        ]);
        assert!(
            problems.len() == 1 && problems[0].contains("enableServiceLinks"),
            "{problems:?}"
        );
        assert!(checked(&[("KVLANE_PORT", "8080")]).1.is_empty());
    }

    #[test]
    fn secrets_are_hidden() {
        let (variables, _) = checked(&[("KVLANE_SHARED_SECRET", "hunter2")]);
        assert_eq!(variables.line(), "KVLANE_SHARED_SECRET=(hidden)");
    }
}
