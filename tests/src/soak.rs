//! What a soak leaves behind: `tests/results/soak-*.json` with seed, counts and outcome. `support/soak_results.py` does the
//! same for the Python tests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Whether the full counts of the long campaigns are asked for.
pub fn is_asked_for() -> bool {
    std::env::var_os("KVLANE_SOAK").is_some_and(|value| value == "1")
}

/// What a campaign did, by name.
#[derive(Default)]
pub struct Counts(BTreeMap<&'static str, u64>);

impl Counts {
    /// Adds to one of them.
    pub fn add(&mut self, what: &'static str, amount: u64) {
        *self.0.entry(what).or_default() += amount;
    }

    /// One of them.
    pub fn get(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }

    /// All of them.
    pub fn all(&self) -> &BTreeMap<&'static str, u64> {
        &self.0
    }
}

/// The record of a campaign. It says "failed" from its start until somebody says better, so that a campaign that panics,
/// dies or is killed leaves its seed and no word of success.
pub struct Record {
    path: Option<PathBuf>,
    campaign: &'static str,
    seed: u64,
    outcome: String,
    /// To be added to on the way; written when the record is dropped, also by a panic.
    pub counts: Counts,
}

impl Record {
    /// Begins the record `soak-CAMPAIGN.json` in `results`, or one that nobody writes down.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn begin(results: Option<&Path>, campaign: &'static str, seed: u64) -> Self {
        let record = Record {
            path: results.map(|results| results.join(format!("soak-{campaign}.json"))),
            campaign,
            seed,
            outcome: "failed".to_owned(),
            counts: Counts::default(),
        };
        record.write().expect("results can be written");
        record
    }

    /// Ends it with this outcome.
    pub fn end(mut self, outcome: &str) {
        self.outcome = outcome.to_owned();
    }

    fn write(&self) -> std::io::Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        let report = serde_json::json!({
            "campaign": self.campaign, "seed": self.seed, "counts": self.counts.0, "outcome": self.outcome,
        });
        if let Some(results) = path.parent() {
            std::fs::create_dir_all(results)?;
        }
        std::fs::write(path, format!("{report:#}\n"))
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        match self.write() {
            // A second panic would end the process, and hide the first.
            Err(error) if std::thread::panicking() => eprintln!("the results cannot be written: {error}"),
            written => written.expect("results can be written"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(results: &Path) -> serde_json::Value {
        let text = std::fs::read_to_string(results.join("soak-test.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_campaign_that_panics_leaves_its_seed_its_counts_and_the_outcome_failed() {
        let root = tempfile::tempdir().unwrap();
        let results = root.path().join("results");
        let campaign = || {
            let mut record = Record::begin(Some(&results), "test", 7);
            assert_eq!(written(&results)["outcome"], "failed", "as long as it runs");
            record.counts.add("killed", 2);
            record.counts.add("killed", 1);
            panic!("as an assertion does");
        };
        assert!(std::panic::catch_unwind(campaign).is_err());
        let expected = serde_json::json!({
            "campaign": "test", "seed": 7, "counts": {"killed": 3}, "outcome": "failed",
        });
        assert_eq!(written(&results), expected);
    }

    #[test]
    fn a_campaign_that_ends_says_how() {
        let root = tempfile::tempdir().unwrap();
        let mut record = Record::begin(Some(root.path()), "test", 7);
        record.counts.add("killed", 1);
        record.end("passed");
        assert_eq!(written(root.path())["outcome"], "passed");
        assert_eq!(written(root.path())["counts"]["killed"], 1);
        // Without a soak, nothing is written.
        Record::begin(None, "test", 7).end("passed");
    }
}
