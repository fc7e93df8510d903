//! Reading the small files by which workers say what stands behind a namespace. `kvlane/vllm/descriptors.py` writes them and
//! trusts the same ones.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Dir, Mode, OFlags};
use rustix::io::Errno;

use crate::control::open_trusted;
use crate::error::{FsError, Result};

pub(super) const FOLDER: &str = "descriptors";
/// A descriptor holds a model configuration; more than this is none.
pub(super) const DESCRIPTOR_BYTES_MAX: u64 = 4 << 20;

/// Shows each descriptor of the store at `path` to `look`, in the order of their names: the file, and its text or why it is
/// not read. No link is followed, nothing is waited for, and what another user made is refused. No store, or no folder of
/// descriptors in it, is none.
///
/// # Errors
/// The folder of the descriptors is a link or no folder, or it cannot be listed.
pub fn descriptors(path: &Path, mut look: impl FnMut(&Path, Result<String>)) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let store = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(store) => File::from(store),
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(FsError::io("open the folder", path)(errno.into())),
    };
    let path = path.join(FOLDER);
    let Some(folder) = open_folder(&store, &path)? else {
        return Ok(());
    };
    for name in names(&folder, &path)? {
        if !name.ends_with(".json") {
            continue;
        }
        let file_path = path.join(&name);
        // Removed since, by its worker.
        if let Some(text) = text(&folder, &name, &file_path).transpose() {
            look(&file_path, text);
        }
    }
    Ok(())
}

/// The folder at `path` with the descriptors of the store that is open as `store`; `None`: no server with vLLM ever ran there.
pub(super) fn open_folder(store: &File, path: &Path) -> Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let untrusted = |problem: String| FsError::Untrusted {
        path: path.into(),
        problem,
    };
    let folder = match rustix::fs::openat(store, FOLDER, flags, Mode::empty()) {
        Ok(folder) => File::from(folder),
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP | Errno::NOTDIR) => {
            return Err(untrusted("is a symbolic link or no folder".into()));
        }
        Err(errno) => return Err(FsError::io("open the folder", path)(errno.into())),
    };
    let owner = folder.metadata().map_err(FsError::io("inspect", path))?.uid();
    let own = rustix::process::geteuid().as_raw();
    if owner != own {
        return Err(untrusted(format!(
            "belongs to user {owner} and this process is user {own}"
        )));
    }
    Ok(Some(folder))
}

/// The names in it, in order.
pub(super) fn names(folder: &File, path: &Path) -> Result<Vec<String>> {
    let failed = |errno: Errno| FsError::io("list", path)(errno.into());
    let mut names = Vec::new();
    for entry in Dir::read_from(folder).map_err(failed)? {
        if let Ok(name) = entry.map_err(failed)?.file_name().to_str() {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn text(folder: &File, name: &str, path: &Path) -> Result<Option<String>> {
    let Some(file) = open_trusted(folder, name, path, false)? else {
        return Ok(None);
    };
    let mut text = String::new();
    let read = file.take(DESCRIPTOR_BYTES_MAX + 1).read_to_string(&mut text);
    match read.map_err(FsError::io("read", path))? as u64 {
        0..=DESCRIPTOR_BYTES_MAX => Ok(Some(text)),
        _ => Err(FsError::io("read", path)(std::io::ErrorKind::FileTooLarge.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use rustix::fs::{CWD, FileType, mknodat};

    use super::*;

    /// Name and text of each, or what is wrong with it.
    fn read(store: &Path) -> Result<Vec<(String, Result<String, String>)>> {
        let (sender, receiver) = channel();
        let store = store.to_owned();
        std::thread::spawn(move || {
            let mut found = Vec::new();
            let outcome = descriptors(&store, |path, text| {
                let name = path.file_name().unwrap().to_str().unwrap();
                found.push((name.to_owned(), text.map_err(|error| error.to_string())));
            });
            let _ = sender.send(outcome.map(|()| found));
        });
        receiver
            .recv_timeout(Duration::from_secs(20))
            .expect("it waits for nothing")
    }

    #[test]
    fn only_regular_files_of_this_user_are_read_and_nothing_is_waited_for() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(read(&root.path().join("missing")).unwrap(), []);
        assert_eq!(read(root.path()).unwrap(), []);
        let folder = root.path().join(FOLDER);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("a.json"), "text").unwrap();
        mknodat(
            CWD,
            folder.join("b.json"),
            FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        symlink("a.json", folder.join("c.json")).unwrap();
        std::fs::create_dir(folder.join("d.json")).unwrap();
        let large = File::create(folder.join("e.json")).unwrap();
        large.set_len(DESCRIPTOR_BYTES_MAX + 1).unwrap();
        std::fs::write(folder.join(".staged-1"), "half").unwrap();
        if rustix::process::geteuid().is_root() {
            std::fs::write(folder.join("f.json"), "theirs").unwrap();
            std::os::unix::fs::chown(folder.join("f.json"), Some(54_321), None).unwrap();
        }
        let mut found = read(root.path()).unwrap().into_iter();
        assert_eq!(
            found.next().unwrap(),
            ("a.json".to_owned(), Ok("text".to_owned()))
        );
        let refusals = [
            "is not a regular file",
            "is a symbolic link",
            "is not a regular file",
            "file too large",
            "belongs to user 54321",
        ];
        for ((name, text), refusal) in found.zip(refusals) {
            assert!(
                text.as_ref().is_err_and(|text| text.contains(refusal)),
                "{name}: {text:?}"
            );
        }
    }

    #[test]
    fn a_link_to_a_folder_of_descriptors_is_refused() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("elsewhere")).unwrap();
        std::fs::write(root.path().join("elsewhere/a.json"), "text").unwrap();
        symlink("elsewhere", root.path().join(FOLDER)).unwrap();
        let refused = read(root.path()).unwrap_err().to_string();
        assert!(refused.contains("is a symbolic link"), "{refused}");
    }
}
