//! What the environment says.

use std::collections::HashMap;
use std::time::Duration;

/// How the stand-in behaves.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) device_count: u32,
    pub(crate) delay_most: Duration,
    pub(crate) seed: u64,
    /// Calls that fail: how often they work before, and the code.
    pub(crate) failing: HashMap<String, (u64, u32)>,
}

impl Settings {
    pub(crate) fn from_environment() -> Self {
        Self::from(|name| std::env::var(format!("KVLANE_CUDA_STAND_IN_{name}")).ok())
    }

    /// A value that cannot be read ends the process: a test with another setting than it names proves nothing.
    fn from(variable: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name: &str, default: u64| {
            variable(name).map_or(default, |text| {
                text.parse()
                    .unwrap_or_else(|_| panic!("KVLANE_CUDA_STAND_IN_{name} is '{text}', allowed: a number"))
            })
        };
        let list = |name: &str| -> Vec<String> {
            let text = variable(name).unwrap_or_default();
            text.split(',')
                .filter(|part| !part.is_empty())
                .map(str::to_owned)
                .collect()
        };
        let failure = |part: String| {
            let mut fields = part.split(':');
            let mut field = || fields.next().map(str::to_owned);
            let (call, after, code) = (field(), field(), field());
            let parsed = call.zip(after.and_then(|text| text.parse().ok()));
            parsed
                .zip(code.and_then(|text| text.parse().ok()))
                .map(|((call, after), code)| (call, (after, code)))
                .unwrap_or_else(|| panic!("KVLANE_CUDA_STAND_IN_FAIL has '{part}', allowed: call:after:code"))
        };
        Self {
            device_count: number("DEVICES", 1) as u32,
            delay_most: Duration::from_micros(number("DELAY_US", 200)),
            seed: number("SEED", 1),
            failing: list("FAIL").into_iter().map(failure).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_read_and_nothing_is_the_default() {
        let settings = Settings::from(|_| None);
        assert_eq!((settings.device_count, settings.seed), (1, 1));
        assert!(settings.failing.is_empty());
        let settings = Settings::from(|name| match name {
            "FAIL" => Some("cuA:2:700,cuB:0:1".to_owned()),
            _ => None,
        });
        assert_eq!(settings.failing["cuA"], (2, 700));
        assert_eq!(settings.failing["cuB"], (0, 1));
    }

    #[test]
    #[should_panic(expected = "allowed: call:after:code")]
    fn a_failure_that_cannot_be_read_is_no_setting() {
        Settings::from(|name| (name == "FAIL").then(|| "cuA:many".to_owned()));
    }
}
