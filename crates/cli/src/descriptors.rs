//! What servers say about their namespaces: the small files that every worker leaves in the folder.
//!
//! A namespace is a hash. These files tell which model and rank stand behind it; without one it stays a number. What
//! they say is shown, never trusted with more than that.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use kvlane_core::NamespaceId;
use kvlane_fs::inspect;
use serde::{Deserialize, Serialize};

/// Resets that are followed back: blocks of older epochs keep a number for a name.
const EPOCHS_BACK_MAX: u64 = 256;

/// A namespace, named as far as its descriptor goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct NamespaceName {
    /// The operator's name for the weights, else the model's name, else its architecture.
    pub(crate) model: String,
    /// As in "0 of 2".
    pub(crate) pipeline_rank: String,
    /// As in "0 of 2".
    pub(crate) tensor_rank: String,
    pub(crate) block_tokens: u32,
    /// False after a reset of the cache: nothing of it is found any more.
    pub(crate) is_current: bool,
}

impl NamespaceName {
    /// One line without the number.
    pub(crate) fn line(&self) -> String {
        let reset = if self.is_current { "" } else { ", before a reset" };
        format!("{}, {}{reset}", self.model, self.rank())
    }

    /// Which part of the model it is.
    pub(crate) fn rank(&self) -> String {
        format!(
            "tensor rank {}, pipeline rank {}",
            self.tensor_rank, self.pipeline_rank
        )
    }
}

/// The named namespaces of a folder, by the 64 hex digits that its records carry.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    names: BTreeMap<String, NamespaceName>,
    servers: BTreeSet<BTreeSet<String>>,
}

impl Names {
    /// Reads the descriptors below the store `folder`, whose present epoch is `epoch`. What cannot be read is left out.
    pub(crate) fn read(folder: &Path, epoch: u64) -> Self {
        let mut names = BTreeMap::new();
        let mut engines: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for descriptor in descriptors(folder) {
            let current = descriptor.namespace.with_epoch(epoch).to_string();
            engines.entry(descriptor.engine_id).or_default().insert(current);
            for past in (epoch.saturating_sub(EPOCHS_BACK_MAX)..=epoch).rev() {
                let name = NamespaceName {
                    is_current: past == epoch,
                    ..descriptor.name.clone()
                };
                names.insert(descriptor.namespace.with_epoch(past).to_string(), name);
            }
        }
        Self {
            names,
            servers: engines.into_values().collect(),
        }
    }

    /// The name behind 64 hex digits.
    pub(crate) fn get(&self, namespace: &str) -> Option<&NamespaceName> {
        self.names.get(namespace)
    }

    /// Those under which servers store and look up now.
    pub(crate) fn current(&self) -> impl Iterator<Item = (&String, &NamespaceName)> {
        self.names.iter().filter(|(_, name)| name.is_current)
    }

    /// For each kind of server the namespaces of its ranks, all of which it needs a block from. Servers that share all of
    /// them, as a prefill and a decode server do, count once.
    pub(crate) fn servers(&self) -> impl Iterator<Item = &BTreeSet<String>> {
        self.servers.iter()
    }

    /// Where descriptors lie.
    pub(crate) fn folder(store: &Path) -> PathBuf {
        store.join("descriptors")
    }
}

struct Descriptor {
    engine_id: String,
    namespace: NamespaceId,
    name: NamespaceName,
}

/// The file as the Python package writes it; see `kvlane/vllm/descriptors.py`.
#[derive(Deserialize)]
struct Content {
    namespace: String,
    pp_rank: u32,
    tp_rank: u32,
    engine_id: String,
    block_tokens: u32,
    #[serde(default)]
    facts: BTreeMap<String, String>,
}

fn descriptors(folder: &Path) -> Vec<Descriptor> {
    let mut found = Vec::new();
    let read = inspect::descriptors(folder, |path, text| {
        let descriptor = text
            .map_err(|error| error.to_string())
            .and_then(|text| parse(&text));
        match descriptor {
            Ok(descriptor) => found.push(descriptor),
            Err(problem) => {
                tracing::warn!(path = %path.display(), problem, "a descriptor is left out");
            }
        }
    });
    if let Err(error) = read {
        tracing::warn!(%error, "no descriptors are read");
    }
    found
}

fn parse(text: &str) -> Result<Descriptor, String> {
    let content: Content = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let namespace = namespace(&content.namespace).ok_or("its namespace is not 64 hex digits")?;
    let rank = |fact: &str, rank: u32| {
        content
            .facts
            .get(fact)
            .cloned()
            .unwrap_or_else(|| rank.to_string())
    };
    Ok(Descriptor {
        engine_id: content.engine_id,
        namespace,
        name: NamespaceName {
            model: model(&content.facts),
            pipeline_rank: rank("pipeline rank", content.pp_rank),
            tensor_rank: rank("tensor rank", content.tp_rank),
            block_tokens: content.block_tokens,
            is_current: true,
        },
    })
}

fn namespace(digits: &str) -> Option<NamespaceId> {
    let mut bytes = [0; 32];
    let is_hex = digits.len() == 64 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if !is_hex {
        return None;
    }
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(NamespaceId(bytes))
}

fn model(facts: &BTreeMap<String, String>) -> String {
    let named = ["weights identity", "weights name"]
        .iter()
        .find_map(|fact| facts.get(*fact).cloned());
    named
        .or_else(|| {
            let config: serde_json::Value = serde_json::from_str(facts.get("model config")?).ok()?;
            let architecture = config["architectures"][0].as_str();
            architecture.or(config["model_type"].as_str()).map(str::to_owned)
        })
        .unwrap_or_else(|| "a model without a name".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGITS: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

    fn folder_with(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(Names::folder(root.path())).unwrap();
        for (name, text) in files {
            std::fs::write(Names::folder(root.path()).join(name), text).unwrap();
        }
        root
    }

    fn descriptor(facts: &str) -> String {
        format!(
            r#"{{"namespace":"{DIGITS}","pp_rank":0,"tp_rank":1,"engine_id":"e","block_tokens":16,"facts":{facts}}}"#
        )
    }

    #[test]
    fn a_namespace_is_named_in_the_present_epoch_and_in_earlier_ones() {
        let facts = r#"{"weights name":"org/model","tensor rank":"1 of 2","pipeline rank":"0 of 1"}"#;
        let root = folder_with(&[("a.json", &descriptor(facts)), (".staged-1", "half")]);
        let names = Names::read(root.path(), 3);
        let plain = namespace(DIGITS).unwrap();
        let now = names.get(&plain.with_epoch(3).to_string()).unwrap();
        assert_eq!(now.line(), "org/model, tensor rank 1 of 2, pipeline rank 0 of 1");
        let before = names.get(&plain.with_epoch(2).to_string()).unwrap();
        assert!(!before.is_current && before.line().ends_with("before a reset"));
        assert_eq!(names.get(&plain.with_epoch(4).to_string()), None);
        assert_eq!(names.current().count(), 1);
    }

    #[test]
    fn without_a_name_the_architecture_stands_for_the_model() {
        let facts = r#"{"model config":"{\"architectures\":[\"LlamaForCausalLM\"]}"}"#;
        let root = folder_with(&[("a.json", &descriptor(facts))]);
        let names = Names::read(root.path(), 0);
        let (_, name) = names.current().next().unwrap();
        assert_eq!(
            (name.model.as_str(), name.tensor_rank.as_str()),
            ("LlamaForCausalLM", "1")
        );
    }

    #[test]
    fn rubbish_is_left_out() {
        let short = descriptor("{}").replace(DIGITS, "éé");
        let root = folder_with(&[
            ("a.json", "{"),
            ("b.json", &short),
            ("c.json", "[1]"),
            ("d.txt", &descriptor("{}")),
        ]);
        assert_eq!(Names::read(root.path(), 0).current().count(), 0);
        assert_eq!(Names::read(Path::new("/nonexistent"), 0).current().count(), 0);
    }
}
