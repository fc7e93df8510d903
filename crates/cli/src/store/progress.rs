//! How far a command is that may take long.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use kvlane_fs::inspect::Progress;

/// A bar for less than this would only flicker.
const SHOWN_AFTER: Duration = Duration::from_millis(300);

/// Does work under a bar on standard error: none where that is not a terminal, nor for a script that wants JSON.
pub(super) fn with_bar<T>(json: bool, work: impl FnOnce(Progress<'_>) -> T) -> T {
    let bar = if json {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(0)
    };
    bar.set_style(
        ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let begun = Instant::now();
    let result = work(&mut |done_bytes, total_bytes| {
        if begun.elapsed() >= SHOWN_AFTER {
            bar.set_length(total_bytes);
            bar.set_position(done_bytes);
        }
    });
    bar.finish_and_clear();
    result
}
