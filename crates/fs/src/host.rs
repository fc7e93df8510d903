//! Which machine this is, and which run of its kernel. Where the locks of other machines may be invisible, a segment without
//! a lock may still be written to, unless it was made here: then its writer is seen if it lives, and is dead after a reboot.

use std::path::Path;

use crate::format::SegmentHeader;

/// What the machine calls itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Host {
    /// Another one after each start of the kernel.
    pub(crate) boot_id: [u8; 16],
    /// The same one for good; zero where the machine, or the container, does not tell what is surely its own.
    pub(crate) machine_id: [u8; 16],
}

const UNNAMED: [u8; 16] = [0; 16];
const BOOT_ID: &str = "proc/sys/kernel/random/boot_id";
/// An image may bring the first one along to several machines; where the second can be read, it tells them apart.
const MACHINE_IDS: [&str; 2] = ["etc/machine-id", "sys/class/dmi/id/product_uuid"];

impl Host {
    /// This machine.
    pub(crate) fn this() -> Self {
        Self::below(Path::new("/"))
    }

    /// As where nothing can be read.
    #[cfg(test)]
    pub(crate) fn unnamed_for_test() -> Self {
        Self::below(Path::new("/nonexistent"))
    }

    fn below(root: &Path) -> Self {
        let read = |name: &str| {
            let text = std::fs::read_to_string(root.join(name)).unwrap_or_default();
            // What systemd writes before the first start.
            let text = text.trim();
            if text == "uninitialized" {
                String::new()
            } else {
                text.to_owned()
            }
        };
        let names = MACHINE_IDS.map(read);
        // The first one alone may be another machine's too: two that share a folder would take each other's segments.
        let machine_id = if names[1].is_empty() {
            UNNAMED
        } else {
            id(&names.join("\n"))
        };
        // Else all machines without one, and all their boots, would be the same.
        let boot_id = match read(BOOT_ID).as_str() {
            "" => UNNAMED,
            text => id(text),
        };
        Host { boot_id, machine_id }
    }

    /// Whether `boot_id`, as the kernel writes it, is the one of the kernel that runs.
    pub(crate) fn runs_since(&self, boot_id: &str) -> bool {
        !boot_id.is_empty() && id(boot_id) == self.boot_id
    }

    /// Whether a segment was made in this run of this machine's kernel.
    pub(crate) fn made_since_boot(&self, header: &SegmentHeader) -> bool {
        self.boot_id != UNNAMED && header.boot_id == self.boot_id
    }

    /// Whether a segment was made on this machine, in this run of its kernel or before it.
    pub(crate) fn has_made(&self, header: &SegmentHeader) -> bool {
        self.made_since_boot(header) || (self.machine_id != UNNAMED && header.machine_id == self.machine_id)
    }
}

fn id(text: &str) -> [u8; 16] {
    let mut id = UNNAMED;
    id.copy_from_slice(&blake3::hash(text.as_bytes()).as_bytes()[..16]);
    id
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::geometry;

    /// A machine with these files.
    fn machine(files: &[(&str, &str)]) -> Host {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Host::below(root.path())
    }

    fn has_made(host: Host, maker: Host) -> bool {
        host.has_made(&geometry().header(1, u64::MAX, maker).unwrap())
    }

    #[test]
    fn a_machine_knows_its_segments_after_a_reboot_and_those_of_no_other() {
        let [name, uuid] = MACHINE_IDS;
        let before = machine(&[(BOOT_ID, "1\n"), (name, "a\n"), (uuid, "u\n")]);
        let after = machine(&[(BOOT_ID, "2\n"), (name, "a\n"), (uuid, "u\n")]);
        assert!(has_made(before, before) && has_made(after, before));
        assert!(!has_made(
            machine(&[(BOOT_ID, "3"), (name, "b"), (uuid, "u")]),
            before
        ));
        // Two machines with the same image.
        let [one, other] = ["x", "y"].map(|text| machine(&[(BOOT_ID, text), (name, "a"), (uuid, text)]));
        assert!(has_made(one, one) && !has_made(one, other));
        // An image may have brought the name along, and the uuid cannot be read.
        let [one, other] = ["x", "y"].map(|boot| machine(&[(BOOT_ID, boot), (name, "a")]));
        assert!(has_made(one, one) && !has_made(one, other));
    }

    #[test]
    fn without_a_name_only_the_running_kernel_counts() {
        for text in ["", "\n", "uninitialized\n"] {
            let [before, after] = ["1", "2"].map(|boot| machine(&[(BOOT_ID, boot), (MACHINE_IDS[0], text)]));
            assert!(has_made(before, before) && !has_made(after, before));
        }
        assert_eq!(machine(&[(BOOT_ID, "1")]).machine_id, UNNAMED);
        assert!(
            !has_made(machine(&[]), machine(&[])),
            "all machines that tell nothing are not one"
        );
    }
}
