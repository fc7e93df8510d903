//! Namespaces: what must agree, beyond a block's content, before its bytes may be used.
//!
//! A chain hash knows the tokens but not the model that turned them into KV, nor how a worker lays the values out. Those
//! facts are gathered by whoever knows them (the connector) and hashed into one id. Blocks are only ever found under
//! the id they were stored under, so a fact that changed is a miss.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::{Error, Result};

/// Version of the chain hash and of the block payload (layers in map order, runs ascending). Part of every chain root
/// and every namespace: raising it makes everything stored before a miss.
pub const FORMAT_VERSION: u32 = 1;

const PARTS_CONTEXT: &str = "kvlane 2026-11 namespace";
const EPOCH_CONTEXT: &str = "kvlane 2026-11 namespace epoch";

/// The hash of a namespace's facts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct NamespaceId(pub [u8; 32]);

impl NamespaceId {
    /// The bytes of the id.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The id of the same facts in epoch `epoch`. Any two epochs have different ids, and none has the plain id.
    #[must_use]
    pub fn with_epoch(&self, epoch: u64) -> NamespaceId {
        let mut hasher = blake3::Hasher::new_derive_key(EPOCH_CONTEXT);
        hasher.update(&self.0);
        hasher.update(&epoch.to_le_bytes());
        NamespaceId(*hasher.finalize().as_bytes())
    }
}

impl From<[u8; 32]> for NamespaceId {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

/// Short form: enough to find an id in a log.
impl fmt::Debug for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NamespaceId(")?;
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str(")")
    }
}

/// All 64 hexadecimal digits.
impl fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Named facts of a namespace. The order in which they are added does not matter.
///
/// ```
/// use kvlane_core::NamespaceParts;
///
/// let id = NamespaceParts::new().with("weights", "3f9c")?.with("rank", "tp 0/1 pp 0/1")?.id();
/// assert_ne!(id, NamespaceParts::new().with("weights", "3f9d")?.with("rank", "tp 0/1 pp 0/1")?.id());
/// # Ok::<(), kvlane_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespaceParts {
    facts: BTreeMap<String, String>,
}

impl NamespaceParts {
    /// No facts but the format version.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a fact. A name that is empty or already there is refused: the later value would silently win.
    pub fn add(&mut self, name: impl Into<String>, value: impl Into<String>) -> Result<()> {
        let name = name.into();
        if name.is_empty() || self.facts.contains_key(&name) {
            return Err(Error::InvalidArgument {
                argument: "name",
                found: format!("'{name}'"),
                allowed: "a name that is not empty and not used yet".to_owned(),
            });
        }
        self.facts.insert(name, value.into());
        Ok(())
    }

    /// [`add`](Self::add), for chains of calls.
    pub fn with(mut self, name: impl Into<String>, value: impl Into<String>) -> Result<Self> {
        self.add(name, value)?;
        Ok(self)
    }

    /// The facts, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.facts
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The id of these facts and of [`FORMAT_VERSION`].
    pub fn id(&self) -> NamespaceId {
        let mut hasher = blake3::Hasher::new_derive_key(PARTS_CONTEXT);
        hasher.update(&FORMAT_VERSION.to_le_bytes());
        for text in self.facts.iter().flat_map(|(name, value)| [name, value]) {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        NamespaceId(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parts(facts: &[(&str, &str)]) -> NamespaceParts {
        facts.iter().fold(NamespaceParts::new(), |parts, (name, value)| {
            parts.with(*name, *value).expect("a new name")
        })
    }

    #[test]
    fn a_repeated_or_empty_name_is_refused_and_changes_nothing() {
        let mut facts = parts(&[("weights", "a")]);
        let before = facts.id();
        assert!(facts.add("weights", "a").is_err());
        assert!(facts.add("weights", "b").is_err());
        assert!(facts.add("", "b").is_err());
        assert_eq!(facts.id(), before);
        assert_eq!(facts.iter().collect::<Vec<_>>(), [("weights", "a")]);
    }

    #[test]
    fn names_and_values_do_not_run_into_each_other() {
        let sets: [&[(&str, &str)]; 7] = [
            &[],
            &[("a", "bc")],
            &[("ab", "c")],
            &[("abc", "")],
            &[("a", "b"), ("c", "")],
            &[("a", ""), ("b", "c")],
            &[("a", "bc"), ("d", "")],
        ];
        for (i, a) in sets.iter().enumerate() {
            for (j, b) in sets.iter().enumerate() {
                assert_eq!(parts(a).id() == parts(b).id(), i == j, "{a:?} and {b:?}");
            }
        }
    }

    #[test]
    fn epochs_have_ids_of_their_own() {
        let id = parts(&[("weights", "a")]).id();
        let other = parts(&[("weights", "b")]).id();
        let mut ids = vec![id, other];
        for epoch in [0, 1, 2, 255, 256, u64::MAX] {
            ids.extend([id.with_epoch(epoch), other.with_epoch(epoch)]);
        }
        let count = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), count);
        assert_eq!(id.with_epoch(7), id.with_epoch(7));
    }

    #[test]
    fn ids_do_not_change_between_releases() {
        let id = parts(&[("weights", "a"), ("rank", "0")]).id();
        assert_eq!(
            id.to_string(),
            "d680bb14509b630a10d2d9f598eaedf99ad9d1fe6542a6aa31c64112cbfb3575"
        );
        assert_eq!(
            id.with_epoch(1).to_string(),
            "ec8b838e54bed111cd5343021f6a9cfdecc91c4deef317c12b3c01169071a1ec"
        );
        assert_eq!(FORMAT_VERSION, 1);
    }

    proptest! {
        #[test]
        fn the_order_of_facts_does_not_matter_but_every_value_does(
            facts in prop::collection::btree_map(".{1,6}", ".{0,6}", 1..8),
            shuffle in any::<u64>(),
            changed in any::<prop::sample::Index>(),
        ) {
            let mut list: Vec<(String, String)> = facts.into_iter().collect();
            let build = |list: &[(String, String)]| {
                list.iter().try_fold(NamespaceParts::new(), |parts, (name, value)| parts.with(name, value)).map(|p| p.id())
            };
            let id = build(&list).expect("names differ");
            let turn = shuffle as usize % list.len();
            list.rotate_left(turn);
            prop_assert_eq!(build(&list).expect("names differ"), id);
            let changed = changed.index(list.len());
            list[changed].1.push('x');
            prop_assert_ne!(build(&list).expect("names differ"), id);
        }
    }
}
