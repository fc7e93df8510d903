//! What the environment says.

use std::collections::HashMap;
use std::time::Duration;

/// How the stand-in behaves.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) version: u32,
    pub(crate) delay_most: Duration,
    pub(crate) seed: u64,
    /// What fails: how often it works before, and the code.
    pub(crate) failing: HashMap<String, (u64, u32)>,
}

impl Settings {
    pub(crate) fn from_environment() -> Self {
        Self::from(|name| std::env::var(format!("KVLANE_NCCL_STAND_IN_{name}")).ok())
    }

    /// A value that cannot be read ends the process: a test with another setting than it names proves nothing.
    fn from(variable: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name: &str, default: u64| {
            variable(name).map_or(default, |text| {
                text.parse()
                    .unwrap_or_else(|_| panic!("KVLANE_NCCL_STAND_IN_{name} is '{text}', allowed: a number"))
            })
        };
        let failure = |part: &str| {
            let fields: Vec<&str> = part.split(':').collect();
            let parsed = match fields[..] {
                [what, after, code] => after.parse().ok().zip(code.parse().ok()).map(|told| (what, told)),
                _ => None,
            };
            let (what, told) = parsed.unwrap_or_else(|| {
                panic!("KVLANE_NCCL_STAND_IN_FAIL has '{part}', allowed: what:after:code")
            });
            (what.to_owned(), told)
        };
        let failing = variable("FAIL").unwrap_or_default();
        Self {
            version: number("VERSION", 22_907) as u32,
            delay_most: Duration::from_micros(number("DELAY_US", 200)),
            seed: number("SEED", 1),
            failing: failing
                .split(',')
                .filter(|part| !part.is_empty())
                .map(failure)
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_read_and_nothing_is_the_default() {
        let settings = Settings::from(|_| None);
        assert_eq!((settings.version, settings.seed), (22_907, 1));
        assert!(settings.failing.is_empty());
        let settings = Settings::from(|name| match name {
            "FAIL" => Some("group:2:6,ncclSend:0:1".to_owned()),
            "VERSION" => Some("22708".to_owned()),
            _ => None,
        });
        assert_eq!(settings.version, 22_708);
        assert_eq!(settings.failing["group"], (2, 6));
        assert_eq!(settings.failing["ncclSend"], (0, 1));
    }

    #[test]
    #[should_panic(expected = "allowed: what:after:code")]
    fn a_failure_that_cannot_be_read_is_no_setting() {
        Settings::from(|name| (name == "FAIL").then(|| "group:many:6".to_owned()));
    }
}
