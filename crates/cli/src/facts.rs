//! What only the Python side of the wheel knows.

use serde_json::{Map, Value};

/// Facts from a Python caller (its version, vLLM's version, the plugin's state), for `kvlane doctor` to report.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PythonFacts {
    facts: Option<Map<String, Value>>,
}

/// The caller's facts are no JSON object.
#[derive(Debug, thiserror::Error)]
#[error("the facts are not a JSON object: {0}")]
pub struct FactsError(#[from] serde_json::Error);

impl PythonFacts {
    /// There is no Python: the cargo binary.
    pub fn absent() -> Self {
        Self::default()
    }

    /// Reads a JSON object.
    pub fn from_json(text: &str) -> Result<Self, FactsError> {
        Ok(Self {
            facts: Some(serde_json::from_str(text)?),
        })
    }

    /// The facts, unless there is no Python.
    pub fn get(&self) -> Option<&Map<String, Value>> {
        self.facts.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_an_object_or_absent() {
        let facts = PythonFacts::from_json(r#"{"vllm":"0.32.0","plugin":{"enabled":true}}"#).unwrap();
        assert_eq!(facts.get().unwrap()["vllm"], "0.32.0");
        assert!(PythonFacts::absent().get().is_none());
        assert!(PythonFacts::from_json("[]").is_err());
        assert!(PythonFacts::from_json("").is_err());
    }
}
