//! `kvlane store`: what is in a folder, whether it is sound, and why something is not there.
//!
//! All of it works while servers use the folder, and only `gc` changes anything.

mod content;
mod explain;
mod gc;
mod progress;
mod tokens;
mod verify;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use indicatif::HumanDuration;
use kvlane_fs::FsError;

use crate::exit::Exit;
use crate::output::complain;

/// Look into a folder of KV cache, live or idle.
#[derive(Args, Debug)]
pub(crate) struct StoreArguments {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// List the segments, one per line.
    Ls(FolderArguments),
    /// Show totals: capacity, use, writers, and blocks by namespace.
    Stat(FolderArguments),
    /// Read every block and compare it with its checksums; status 1 if any is bad.
    Verify(FolderArguments),
    Gc(gc::GcArguments),
    Explain(explain::ExplainArguments),
}

#[derive(Args, Debug)]
struct FolderArguments {
    /// The servers' shared_storage_path, or its subfolder kvlane.
    path: PathBuf,
    /// Print one JSON document; errors stay text on standard error.
    #[arg(long)]
    json: bool,
}

/// Why a subcommand could not answer.
#[derive(Debug, thiserror::Error)]
enum StoreError {
    #[error(
        "there is no KV store at {0}: neither a file `control` nor a folder `kvlane` with one; give the \
         shared_storage_path of the servers, and note that the first server to start creates the store"
    )]
    Missing(PathBuf),
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("cannot read the tokens from {from}: {source}")]
    Tokens {
        from: String,
        #[source]
        source: tokens::TokensError,
    },
    #[error(
        "no descriptor in {0} says how many tokens a block has (a server takes its own away when it stops): give \
         --block-tokens (the servers' --block-size)"
    )]
    BlockTokensUnknown(PathBuf),
    #[error("the tokens cannot be cut into blocks: {0}")]
    Chain(#[from] kvlane_core::Error),
}

/// Runs one of the subcommands.
pub(crate) fn run(arguments: StoreArguments) -> Exit {
    let answered = match arguments.command {
        StoreCommand::Ls(arguments) => content::ls(&arguments),
        StoreCommand::Stat(arguments) => content::stat(&arguments),
        StoreCommand::Verify(arguments) => verify::run(&arguments),
        StoreCommand::Gc(arguments) => gc::run(&arguments),
        StoreCommand::Explain(arguments) => explain::run(&arguments),
    };
    answered.unwrap_or_else(|error| complain(&error))
}

/// The folder with the control file that `path` stands for, or would stand for once a server has started.
pub(crate) fn store_folder(path: &Path) -> PathBuf {
    let below = path.join("kvlane");
    // A server's own subfolder comes first: the control file of a cgroup or the like may lie beside it.
    if has_control(&below) || (!has_control(path) && path.file_name().is_none_or(|name| name != "kvlane")) {
        below
    } else {
        path.to_owned()
    }
}

/// Whether a store was made there, of whatever kind its control file is now: a link or a pipe is refused, not missing.
pub(crate) fn has_control(folder: &Path) -> bool {
    folder.join("control").symlink_metadata().is_ok()
}

/// As [`store_folder`], if there is a store.
fn existing_store(path: &Path) -> Result<PathBuf, StoreError> {
    let folder = store_folder(path);
    if has_control(&folder) {
        Ok(folder)
    } else {
        Err(StoreError::Missing(path.to_owned()))
    }
}

/// How long ago a time is that the store noted.
fn ago(unix_ms: u64) -> String {
    let at = UNIX_EPOCH + Duration::from_millis(unix_ms);
    match SystemTime::now().duration_since(at) {
        _ if unix_ms == 0 => "never".to_owned(),
        Ok(age) if age >= Duration::from_secs(1) => format!("{} ago", HumanDuration(age)),
        _ => "now".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_the_shared_path_and_its_subfolder_name_the_store() {
        let root = tempfile::tempdir().unwrap();
        let below = root.path().join("kvlane");
        assert!(existing_store(root.path()).is_err());
        assert_eq!(store_folder(root.path()), below, "where a server will create it");
        assert_eq!(store_folder(&below), below);

        std::fs::create_dir(&below).unwrap();
        assert!(existing_store(root.path()).is_err());
        std::fs::write(below.join("control"), b"").unwrap();
        assert_eq!(existing_store(root.path()).unwrap(), below);
        assert_eq!(existing_store(&below).unwrap(), below);
    }

    #[test]
    fn a_store_in_a_folder_of_any_name_is_found() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("control"), b"").unwrap();
        assert_eq!(existing_store(root.path()).unwrap(), root.path());
    }
}
