//! The claims, one function each. They know a backend only through [`Factory`](crate::fixture::Factory).

pub mod completions;
pub mod loads;
pub mod pressure;
pub mod promises;
pub mod refusals;
pub mod stores;
pub mod visibility;

/// Fails if a claim exists that the list lacks: public functions are never unused, so no compiler would notice.
pub fn check_list(listed: &[&str]) {
    let sources = [
        include_str!("claims/completions.rs"),
        include_str!("claims/loads.rs"),
        include_str!("claims/pressure.rs"),
        include_str!("claims/promises.rs"),
        include_str!("claims/refusals.rs"),
        include_str!("claims/stores.rs"),
        include_str!("claims/visibility.rs"),
    ];
    let claims = sources
        .iter()
        .flat_map(|source| source.lines())
        .filter_map(|line| {
            let (name, rest) = line.strip_prefix("pub fn ")?.split_once('(')?;
            rest.starts_with("factory").then_some(name)
        });
    let forgotten: Vec<&str> = claims.filter(|claim| !listed.contains(claim)).collect();
    assert!(forgotten.is_empty(), "claims that no test runs: {forgotten:?}");
}
