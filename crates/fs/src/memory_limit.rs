//! How much memory the container has left.
//!
//! Pages of a tmpfs file are charged to the container that touches them first. `fallocate` beyond the container's limit
//! is not an `ENOSPC` but an out-of-memory kill, so the limit is read before every segment is made.

use std::fs;
use std::path::{Path, PathBuf};

/// Memory that must stay free besides what we take: engines allocate too.
const MARGIN_BYTES: u64 = 64 << 20;

/// Bytes that can still be taken before the tightest limit of this process' cgroups, or `None` without any limit.
pub fn headroom_bytes() -> Option<u64> {
    headroom_below(Path::new("/"))
}

/// As [`headroom_bytes`], with all paths below `root`.
fn headroom_below(root: &Path) -> Option<u64> {
    let memberships = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
    let mut tightest = None;
    for line in memberships.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let version_two = controllers.is_empty();
        if !version_two && !controllers.split(',').any(|name| name == "memory") {
            continue;
        }
        for (mount_root, mount_point) in memory_mounts(&mounts, version_two) {
            // In a cgroup namespace the membership may lie outside of what is mounted; then the mount itself is ours.
            let inside = path.strip_prefix(mount_root.trim_end_matches('/')).unwrap_or("/");
            let base = root.join(mount_point.trim_start_matches('/'));
            let mut folder = base.join(inside.trim_start_matches('/'));
            while folder.starts_with(&base) {
                if let Some(left) = left_in(&folder, version_two) {
                    tightest = Some(tightest.map_or(left, |other: u64| other.min(left)));
                }
                if !folder.pop() {
                    break;
                }
            }
        }
    }
    tightest.map(|left: u64| left.saturating_sub(MARGIN_BYTES))
}

/// (root inside the hierarchy, mount point) of each mounted cgroup hierarchy that controls memory.
fn memory_mounts(mounts: &str, version_two: bool) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let fields: Vec<&str> = left.split(' ').collect();
        let mut kind = right.split(' ');
        let (file_system, options) = (kind.next().unwrap_or(""), kind.nth(1).unwrap_or(""));
        let wanted = match (version_two, file_system) {
            (true, "cgroup2") => true,
            (false, "cgroup") => options.split(',').any(|option| option == "memory"),
            _ => false,
        };
        if wanted && fields.len() > 4 {
            found.push((fields[3].to_owned(), fields[4].to_owned()));
        }
    }
    found
}

fn left_in(folder: &Path, version_two: bool) -> Option<u64> {
    let (limit_name, usage_name, inactive) = if version_two {
        ("memory.max", "memory.current", "inactive_file")
    } else {
        (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        )
    };
    let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    // "max", or version one's huge number, is no limit.
    let limit = number(folder.join(limit_name)).filter(|limit| *limit < 1 << 60)?;
    let usage = number(folder.join(usage_name))?;
    // File pages that nobody used lately give way before anything is killed.
    let reclaimable = fs::read_to_string(folder.join("memory.stat"))
        .ok()
        .and_then(|text| {
            text.lines()
                .find_map(|line| line.strip_prefix(inactive)?.trim().parse::<u64>().ok())
        })
        .unwrap_or(0);
    Some(limit.saturating_sub(usage.saturating_sub(reclaimable)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn the_tightest_ancestor_decides_in_version_two() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        write(root, "proc/self/cgroup", "0::/pod/box\n");
        write(
            root,
            "proc/self/mountinfo",
            "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        );
        write(root, "sys/fs/cgroup/pod/memory.max", "1073741824\n");
        write(root, "sys/fs/cgroup/pod/memory.current", "536870912\n");
        write(
            root,
            "sys/fs/cgroup/pod/memory.stat",
            "anon 1\ninactive_file 104857600\n",
        );
        write(root, "sys/fs/cgroup/pod/box/memory.max", "max\n");
        write(root, "sys/fs/cgroup/pod/box/memory.current", "1\n");
        assert_eq!(
            headroom_below(root),
            Some((512 << 20) + 104_857_600 - MARGIN_BYTES)
        );
    }

    #[test]
    fn version_one_limits_are_read_and_its_huge_number_is_no_limit() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        write(root, "proc/self/cgroup", "4:memory:/box\n1:cpu:/\n0::/\n");
        write(
            root,
            "proc/self/mountinfo",
            "31 24 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        );
        write(
            root,
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "9223372036854771712\n",
        );
        write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n");
        assert_eq!(headroom_below(root), None);
        write(
            root,
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes",
            "209715200\n",
        );
        write(
            root,
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes",
            "104857600\n",
        );
        assert_eq!(headroom_below(root), Some(104_857_600 - MARGIN_BYTES));
    }
}
