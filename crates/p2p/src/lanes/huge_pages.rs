//! A cache in huge pages, which other processes read up to twice as fast.

use std::time::Instant;

use kvlane_core::{Device, PagedMemory};
use kvlane_fs::HostCache;

use crate::raw::{HUGE_PAGE_BYTES, join_pages};

/// Asks the system for huge pages under a holder's cache and returns the bytes of it that are in some now. No byte changes,
/// and whatever the system refuses stays as it was.
///
/// `process_vm_readv` finds and holds every page of the peer by itself, which takes about as long as copying its 4 KiB; in
/// huge pages nearly nothing is left of that. Pages that were given already are copied into huge ones, some hundred
/// megabytes a second, during which other threads may use them: for a thread of its own, as early as can be. Memory that nobody has touched stays without pages. Ends soon after `deadline`.
pub fn prefer_huge_pages(cache: &HostCache, deadline: Instant) -> usize {
    let on_host = cache
        .map()
        .regions()
        .iter()
        .filter(|region| region.device == Device::Host);
    let mut extents: Vec<(usize, usize)> = on_host
        .map(|region| {
            let start = region.address as usize;
            (start, start + region.extent_bytes)
        })
        .collect();
    extents.sort_unstable();
    let mut merged: Vec<(usize, usize)> = Vec::new();
    for (start, end) in extents {
        match merged.last_mut() {
            Some((_, last)) if start <= *last => *last = end.max(*last),
            _ => merged.push((start, end)),
        }
    }
    merged
        .into_iter()
        .map(|(start, end)| {
            let first = start.next_multiple_of(HUGE_PAGE_BYTES);
            let behind = end / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
            join_pages(first, behind.max(first), || Instant::now() < deadline)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::fixture::{Form, cache};
    use super::*;

    #[test]
    fn the_bytes_stay_and_whole_huge_pages_are_joined() {
        let cache = cache(Form::BlockMajor, 2, 8, 1 << 20);
        for block in 0..8 {
            cache.write_layer(1, block, &vec![block as u8 + 1; 1 << 20]);
        }
        let late = prefer_huge_pages(&cache, Instant::now());
        assert_eq!(late, 0, "after the deadline");
        let bytes = prefer_huge_pages(&cache, Instant::now() + Duration::from_secs(20));
        assert!(
            bytes.is_multiple_of(HUGE_PAGE_BYTES) && bytes <= 16 << 20,
            "{bytes}"
        );
        if bytes == 0 {
            eprintln!("NOT RUN: huge pages: this system gives none");
        }
        let mut back = vec![0; 1 << 20];
        for block in 0..8 {
            cache.read_layer(1, block, &mut back);
            assert!(back.iter().all(|&byte| byte == block as u8 + 1), "block {block}");
        }
    }
}
