use super::*;
use crate::fixture::{Folder, NAMESPACE, commit, key};

fn eventually(mut answer: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(10);
    while !answer() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

fn ready(reader: &FsReader) -> usize {
    reader
        .lookup(&[key(1)], &mut LookupCursor::default())
        .ready_blocks
}

#[test]
fn a_reset_before_the_folder_is_there_hides_what_it_has_when_it_comes() {
    let folder = Folder::new(8 << 20);
    let segment = folder.segment(4, 1);
    commit(&segment, 0, key(1), 0, 1);
    let link = folder.path().join("later");
    let [reader, other] =
        [(); 2].map(|()| FsReader::open(&link, vec![NAMESPACE], &FsOptions::default()).unwrap());
    assert!(!reader.reset(), "nobody else can be told yet");
    assert_eq!(ready(&reader), 0);
    std::os::unix::fs::symlink(folder.path(), &link).unwrap();
    assert!(eventually(|| reader.usage_bytes().1 > 0 || ready(&reader) > 0));
    assert_eq!(ready(&reader), 0);
    assert!(eventually(|| other.usage_bytes().1 > 0 || ready(&other) > 0));
    assert_eq!(
        ready(&other),
        0,
        "the folder is writable, so the others were told"
    );
}

#[test]
fn a_folder_that_cannot_be_opened_is_complained_about_once() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("folder");
    let watch = Watch {
        path: path.clone(),
        options: FsOptions::default(),
        namespaces: vec![NAMESPACE],
        opened: OnceLock::new(),
        reset_wanted: Mutex::new(false),
        lister: Lister::default(),
    };
    let mut complaints = Complaints::default();
    std::fs::write(&path, "no folder").unwrap();
    assert_eq!(watch.open_again(&mut complaints).len(), 1);
    assert!(watch.open_again(&mut complaints).is_empty(), "it is the same");
    std::fs::remove_file(&path).unwrap();
    assert!(watch.open_again(&mut complaints).is_empty(), "not there yet");
    std::fs::write(&path, "no folder").unwrap();
    assert_eq!(watch.open_again(&mut complaints).len(), 1, "it is another one");
}
