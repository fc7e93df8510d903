//! Python, vLLM and the plugin.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::facts::PythonFacts;

/// The oldest vLLM that kvlane's connectors run under.
const OLDEST_VLLM: (u32, u32) = (0, 15);

/// What the Python side of the wheel knows.
#[derive(Debug, Serialize)]
pub(super) struct PythonState {
    version: Option<String>,
    executable: Option<String>,
    torch_version: Option<String>,
    vllm_version: Option<String>,
    vllm_path: Option<String>,
    plugin: Plugin,
}

#[derive(Debug, Serialize)]
struct Plugin {
    /// vLLM finds it among the installed packages.
    installed: bool,
    /// `KVLANE_PLUGIN` leaves it on.
    enabled: bool,
    /// `VLLM_PLUGINS`, if set, names it.
    allowed: bool,
    /// Names that it answers to.
    connector_names: Vec<String>,
}

/// Reads the facts of a Python caller; `None` without one.
pub(super) fn check(facts: &PythonFacts, problems: &mut Vec<String>) -> Option<PythonState> {
    let facts = facts.get()?;
    let state = PythonState {
        version: text(facts, "python_version"),
        executable: text(facts, "python_executable"),
        torch_version: text(facts, "torch_version"),
        vllm_version: text(facts, "vllm_version"),
        vllm_path: text(facts, "vllm_path"),
        plugin: Plugin {
            installed: flag(facts, "plugin_installed"),
            enabled: flag(facts, "plugin_enabled"),
            allowed: flag(facts, "plugin_allowed"),
            connector_names: names(facts, "connector_names"),
        },
    };
    if state.has_vllm() {
        problems.extend(state.problems());
    }
    Some(state)
}

/// A text among the facts.
pub(super) fn text(facts: &Map<String, Value>, name: &str) -> Option<String> {
    facts.get(name)?.as_str().map(str::to_owned)
}

fn flag(facts: &Map<String, Value>, name: &str) -> bool {
    facts.get(name).and_then(Value::as_bool).unwrap_or(false)
}

fn names(facts: &Map<String, Value>, name: &str) -> Vec<String> {
    let list = facts.get(name).and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

impl PythonState {
    /// For people: (what, value).
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let known = |value: &Option<String>| value.clone().unwrap_or_else(|| "unknown".to_owned());
        let vllm = match (&self.vllm_version, &self.vllm_path) {
            (None, None) => "not installed in this Python".to_owned(),
            (version, path) => format!("{} ({})", known(version), known(path)),
        };
        vec![
            (
                "python",
                format!("{} ({})", known(&self.version), known(&self.executable)),
            ),
            ("vllm", vllm),
            ("plugin", self.plugin.line()),
        ]
    }

    fn has_vllm(&self) -> bool {
        self.vllm_version.is_some() || self.vllm_path.is_some()
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Some(version) = &self.vllm_version
            && release(version).is_some_and(|release| release < OLDEST_VLLM)
        {
            let (major, minor) = OLDEST_VLLM;
            problems.push(format!(
                "vLLM {version} is older than {major}.{minor}.0, the oldest that kvlane supports: install a newer vLLM."
            ));
        }
        if !self.plugin.installed {
            problems.push(
                "vLLM does not see kvlane's plugin, so a manifest's connector stays vLLM's own: install kvlane's wheel \
                 with pip into the Python that runs vLLM."
                    .to_owned(),
            );
        } else if !self.plugin.allowed {
            problems.push(
                "VLLM_PLUGINS is set and does not name kvlane, so vLLM skips its plugin: add kvlane to the list or \
                 unset it."
                    .to_owned(),
            );
        }
        problems
    }
}

impl Plugin {
    fn line(&self) -> String {
        if !self.installed {
            "not installed as a plugin".to_owned()
        } else if !self.enabled {
            "off by KVLANE_PLUGIN: vLLM's own connectors stay".to_owned()
        } else if !self.allowed {
            "skipped because of VLLM_PLUGINS".to_owned()
        } else {
            format!("on for {}", self.connector_names.join(", "))
        }
    }
}

/// Major and minor version; `None` for something that does not begin with them, as builds of a checkout may.
fn release(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(json: &str) -> (PythonState, Vec<String>) {
        let mut problems = Vec::new();
        let facts = PythonFacts::from_json(json).unwrap();
        (check(&facts, &mut problems).unwrap(), problems)
    }

    const FACTS: &str = r#"{"python_version":"3.12.3","python_executable":"/usr/bin/python3","vllm_version":"0.32.0",
        "vllm_path":"/lib/vllm","torch_version":"2.9.0","plugin_installed":true,"plugin_enabled":true,
        "plugin_allowed":true,"connector_names":["ExampleConnector","KvlaneFsConnector"]}"#;

    #[test]
    fn an_installation_in_order_has_no_problem() {
        let (state, problems) = checked(FACTS);
        assert_eq!(problems, Vec::<String>::new());
        let lines = state.lines();
        assert!(lines.contains(&("plugin", "on for ExampleConnector, KvlaneFsConnector".to_owned())));
        assert!(lines.contains(&("vllm", "0.32.0 (/lib/vllm)".to_owned())));
    }

    #[test]
    fn each_fault_is_one_problem() {
        for (from, to, word) in [
            ("0.32.0", "0.14.1", "0.14.1"),
            (r#"plugin_installed":true"#, r#"plugin_installed":false"#, "wheel"),
            (
                r#"plugin_allowed":true"#,
                r#"plugin_allowed":false"#,
                "VLLM_PLUGINS",
            ),
        ] {
            let (_, problems) = checked(&FACTS.replace(from, to));
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].contains(word), "{problems:?}");
        }
    }

    #[test]
    fn a_plugin_that_the_user_turned_off_is_no_problem() {
        let (state, problems) =
            checked(&FACTS.replace(r#"plugin_enabled":true"#, r#"plugin_enabled":false"#));
        assert!(problems.is_empty());
        assert!(state.plugin.line().starts_with("off"));
    }

    #[test]
    fn without_vllm_or_with_strange_facts_nothing_breaks() {
        for facts in [
            "{}",
            r#"{"vllm_version":null,"plugin_installed":7,"connector_names":{}}"#,
        ] {
            let (state, problems) = checked(facts);
            assert!(problems.is_empty());
            assert!(
                state
                    .lines()
                    .contains(&("vllm", "not installed in this Python".to_owned()))
            );
        }
        assert!(check(&PythonFacts::absent(), &mut Vec::new()).is_none());
    }

    #[test]
    fn versions_of_checkouts_are_not_judged() {
        assert_eq!(release("0.15.0rc1+cpu"), Some((0, 15)));
        assert_eq!(release("dev"), None);
        assert_eq!(release("1.0"), Some((1, 0)));
    }
}
