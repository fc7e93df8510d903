//! Guards: a command that calls a broken store sound, that touches what a running server owns, or that explains a miss
//! wrongly.

#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]

mod support;

use std::time::Duration;

use kvlane_core::MissReason;
use support::{LAYER_BYTES, LAYERS, Store, json, kvlane, kvlane_with, text};

fn prompt(blocks: u32) -> Vec<u32> {
    (0..blocks * support::BLOCK_TOKENS + 5).collect()
}

fn words(tokens: &[u32]) -> String {
    tokens.iter().map(|token| format!("{token} ")).collect()
}

#[test]
fn ls_and_stat_count_what_was_stored() {
    let store = Store::new();
    store.store(&prompt(3), 0..3);
    store.describe(16);
    for path in [store.shared.path(), &store.folder()] {
        let listed = json(&kvlane(&["store", "ls"], Some(path), &["--json"]));
        assert_eq!(listed["path"], store.folder().to_str().unwrap());
        let segments = listed["segments"].as_array().unwrap();
        let sum = |field: &str| {
            segments
                .iter()
                .map(|segment| segment[field].as_u64().unwrap())
                .sum::<u64>()
        };
        assert_eq!(sum("committed"), 3);
        assert_eq!(sum("committed") + sum("free"), sum("slots"));
        assert!(
            segments.iter().all(|segment| segment["owner_lives"] == true),
            "{listed}"
        );
        assert_eq!(segments[0]["layers"], LAYERS);
        assert_eq!(segments[0]["block_bytes"], LAYERS * LAYER_BYTES);
    }
    let output = kvlane(&["store", "stat"], Some(store.shared.path()), &["--json"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let stat = json(&output);
    assert_eq!(stat["capacity_bytes"], 16 << 20);
    assert_eq!(stat["epoch"], 0);
    assert_eq!(stat["writers"].as_array().unwrap().len(), 1);
    assert_eq!(stat["writers"][0]["used_bytes"], stat["used_bytes"]);
    assert_eq!(stat["segments"]["orphaned"], 0);
    assert_eq!(stat["slots"]["committed"], 3);
    assert_eq!(stat["namespaces"].as_array().unwrap().len(), 1);
    assert_eq!(stat["namespaces"][0]["blocks"], 3);
    assert_eq!(stat["namespaces"][0]["payload_bytes"], 3 * LAYERS * LAYER_BYTES);
    assert_eq!(stat["namespaces"][0]["name"]["model"], "org/model");
    assert_eq!(stat["namespaces"][0]["name"]["tensor_rank"], "1 of 2");

    let shown = text(&kvlane(&["store", "stat"], Some(store.shared.path()), &[]).stdout);
    assert!(
        shown.contains("3 blocks") && shown.contains("org/model, tensor rank 1 of 2"),
        "{shown}"
    );
    let shown = text(&kvlane(&["store", "ls"], Some(store.shared.path()), &[]).stdout);
    assert!(shown.contains("seg-") && shown.contains("lives"), "{shown}");
}

#[test]
fn verify_finds_exactly_the_block_whose_byte_was_flipped() {
    let store = Store::new();
    let tokens = prompt(3);
    store.store(&tokens, 0..3);
    let sound = kvlane(&["store", "verify"], Some(store.shared.path()), &["--json"]);
    assert!(sound.status.success(), "{sound:?}");
    assert_eq!(json(&sound)["good_blocks"], 3);
    assert!(sound.stderr.is_empty(), "no progress bar without a terminal");

    let (segment, slot) = place_of(&store, &tokens, 1);
    let offset = store.header(&segment).slot_offset(slot) + LAYER_BYTES as u64 + 7;
    store.flip(&segment, offset);
    let broken = kvlane(&["store", "verify"], Some(store.shared.path()), &["--json"]);
    assert_eq!(broken.status.code(), Some(1));
    let report = json(&broken);
    assert_eq!(report["good_blocks"], 2);
    let bad = report["bad_blocks"].as_array().unwrap();
    assert_eq!(bad.len(), 1, "{report}");
    assert_eq!(bad[0]["key"], support::keys(&tokens)[1].to_string());
    assert_eq!((&bad[0]["slot"], &bad[0]["layer"]), (&slot.into(), &1.into()));
    let shown = text(&kvlane(&["store", "verify"], Some(store.shared.path()), &[]).stdout);
    assert!(shown.contains("1 are bad"), "{shown}");
}

#[test]
fn verify_finds_a_damaged_record_and_a_file_that_is_no_segment() {
    let store = Store::new();
    let tokens = prompt(2);
    store.store(&tokens, 0..2);
    let (segment, slot) = place_of(&store, &tokens, 0);
    store.flip(&segment, store.header(&segment).record_offset(slot) + 40);
    std::fs::write(store.folder().join("seg-00000000000000ff.kvlane"), vec![0; 9000]).unwrap();
    let output = kvlane(&["store", "verify"], Some(store.shared.path()), &["--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report = json(&output);
    assert_eq!(
        (&report["good_blocks"], &report["damaged_records"]),
        (&1.into(), &1.into())
    );
    assert_eq!(report["rejected_files"].as_array().unwrap().len(), 1);
    let listed = text(&kvlane(&["store", "ls"], Some(store.shared.path()), &[]).stdout);
    assert!(listed.contains("not usable"), "{listed}");
}

#[test]
fn gc_removes_what_nobody_owns_and_only_after_its_time() {
    let mut store = Store::new();
    store.store(&prompt(2), 0..2);
    let gc = |store: &Store, more: &[&str]| {
        let output = kvlane(&["store", "gc", "--json"], Some(store.shared.path()), more);
        assert!(output.status.success(), "{output:?}");
        json(&output)["removed_segments"].as_array().unwrap().len()
    };
    assert_eq!(
        gc(&store, &["--unused-for", "0s"]),
        0,
        "a living server's segments stay"
    );

    store.stop_writer();
    assert_eq!(gc(&store, &["--unused-for", "1h"]), 0, "used within the hour");
    let orphans = gc(&store, &["--unused-for", "0s", "--dry-run"]);
    assert!(orphans > 0);
    assert_eq!(
        gc(&store, &["--unused-for", "0s", "--dry-run"]),
        orphans,
        "a dry run removes nothing"
    );
    assert_eq!(gc(&store, &["--unused-for", "0s"]), orphans);
    let listed = json(&kvlane(&["store", "ls"], Some(store.shared.path()), &["--json"]));
    assert_eq!(listed["segments"].as_array().unwrap().len(), 0);

    store.start_writer();
    store.store(&prompt(1), 0..1);
    let wrong = kvlane(
        &["store", "gc"],
        Some(store.shared.path()),
        &["--unused-for", "soon"],
    );
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn gc_says_what_stays_and_why_and_leaves_foreign_files_alone() {
    let mut store = Store::new();
    store.store(&prompt(2), 0..2);
    let foreign = store.folder().join("notes.tmp");
    let old = std::time::SystemTime::now() - Duration::from_secs(86_400);
    let file = std::fs::File::create(&foreign).unwrap();
    file.set_modified(old).unwrap();
    let gc = |store: &Store, more: &[&str]| {
        let output = kvlane(&["store", "gc"], Some(store.shared.path()), more);
        assert!(output.status.success(), "{output:?}");
        text(&output.stdout)
    };
    for more in [&["--unused-for", "0s"][..], &["--unused-for", "0s", "--dry-run"]] {
        let shown = gc(&store, more);
        assert!(shown.contains("a running server owns it"), "{shown}");
    }
    store.stop_writer();
    let shown = gc(&store, &[]);
    assert!(
        shown.contains("kept") && shown.contains("used in the last 3600 s"),
        "{shown}"
    );
    let removed = gc(&store, &["--unused-for", "0s"]);
    assert!(!removed.contains("kept"), "{removed}");
    assert!(foreign.exists());
}

#[test]
fn explain_names_the_first_miss_and_its_reason() {
    let store = Store::new();
    let tokens = prompt(4);
    store.store(&tokens, [0, 1, 3]);
    store.describe(16);
    let explained = explain(&store, &tokens, &[]);
    assert_eq!(explained["tokens"], 69);
    let namespace = &explained["namespaces"][0];
    assert_eq!(namespace["name"]["model"], "org/model");
    assert_eq!(
        (&namespace["ready_blocks"], &namespace["present_blocks"]),
        (&2.into(), &3.into())
    );
    assert_eq!(namespace["rest_tokens"], 5);
    let states: Vec<&str> = namespace["blocks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|block| block["state"].as_str().unwrap())
        .collect();
    assert_eq!(states, ["ready", "ready", "absent", "ready"]);
    assert_eq!(
        namespace["first_miss"],
        "block 2 is not there: not stored yet, or evicted"
    );

    let salted = explain(&store, &tokens, &["--cache-salt", "pepper"]);
    assert_eq!(salted["namespaces"][0]["ready_blocks"], 0);
    assert!(
        salted["namespaces"][0]["first_miss"]
            .as_str()
            .unwrap()
            .contains("cache salt")
    );

    let shown = kvlane_with(
        &["store", "explain", "--tokens", "-"],
        Some(store.shared.path()),
        &[],
        &words(&tokens),
    );
    let shown = text(&shown.stdout);
    assert!(
        shown.contains("blocks 0 to 1: there\n  block 2: not there\n  block 3: there"),
        "{shown}"
    );
}

#[test]
fn a_block_that_a_load_found_bad_is_a_miss_for_explain_and_damaged_for_ls_and_stat() {
    let mut store = Store::new();
    let tokens = prompt(4);
    store.store(&tokens, 0..4);
    store.describe(16);
    let (segment, slot) = place_of(&store, &tokens, 1);
    store.flip(&segment, store.header(&segment).slot_offset(slot) + 7);
    // A living owner uses the slot again at once.
    store.stop_writer();
    assert_eq!(store.load(&tokens), Some((vec![1], MissReason::Corrupt)));

    let explained = explain(&store, &tokens, &[]);
    let namespace = &explained["namespaces"][0];
    assert_eq!(
        (&namespace["ready_blocks"], &namespace["present_blocks"]),
        (&1.into(), &3.into())
    );
    assert_eq!(namespace["blocks"][1]["state"], "bad");
    assert_eq!(
        namespace["first_miss"],
        "block 1 is damaged: its bytes did not match, it will be recomputed"
    );
    let path = Some(store.shared.path());
    let shown = text(&kvlane_with(&["store", "explain", "--tokens", "-"], path, &[], &words(&tokens)).stdout);
    assert!(shown.contains("  block 1: damaged\n"), "{shown}");
    let stat = json(&kvlane(&["store", "stat"], path, &["--json"]));
    assert_eq!(
        (&stat["slots"]["committed"], &stat["slots"]["damaged"]),
        (&3.into(), &1.into())
    );
    let listed = json(&kvlane(&["store", "ls"], path, &["--json"]));
    assert_eq!(listed["segments"][0]["damaged"], 1);
}

#[test]
fn explain_says_what_all_ranks_of_a_server_have_together() {
    let store = Store::new();
    let tokens = prompt(4);
    store.store(&tokens, 0..4);
    store.describe(16);
    let one = explain(&store, &tokens, &[]);
    assert_eq!(one["servers"][0]["ready_blocks"], 4);
    assert_eq!(one["servers"][0]["first_miss"], serde_json::Value::Null);

    store.store_as_other_rank(&tokens, [0, 1, 3]);
    let both = explain(&store, &tokens, &[]);
    assert_eq!(both["namespaces"].as_array().unwrap().len(), 2);
    let servers = both["servers"].as_array().unwrap();
    assert_eq!(servers.len(), 1, "{both}");
    assert_eq!(servers[0]["namespaces"].as_array().unwrap().len(), 2);
    assert_eq!(servers[0]["ready_blocks"], 2);
    assert_eq!(
        servers[0]["first_miss"],
        "tensor rank 0 of 2, pipeline rank 0 of 1: block 2 is not there: not stored yet, or evicted"
    );
    let shown = kvlane_with(
        &["store", "explain", "--tokens", "-"],
        Some(store.shared.path()),
        &[],
        &words(&tokens),
    );
    let shown = text(&shown.stdout);
    assert!(
        shown.contains("all 2 ranks of org/model together: 2 leading blocks"),
        "{shown}"
    );
}

#[test]
fn explain_tells_promises_and_resets_apart() {
    let mut store = Store::new();
    store.describe(16);
    let tokens = prompt(2);
    store.reserve(&tokens, Duration::from_secs(60));
    let reason = |store: &Store| {
        let explained = explain(store, &tokens, &[]);
        let of_now = explained["namespaces"].as_array().unwrap().clone();
        let of_now = of_now
            .iter()
            .find(|namespace| namespace["name"]["is_current"] == true)
            .unwrap();
        of_now["first_miss"].as_str().unwrap().to_owned()
    };
    assert_eq!(reason(&store), "block 0 is promised and not there yet");

    store.store(&tokens, 0..2);
    let explained = explain(&store, &tokens, &[]);
    assert_eq!(explained["namespaces"][0]["first_miss"], serde_json::Value::Null);
    store.reset();
    assert!(reason(&store).contains("not stored"), "{}", reason(&store));
    let explained = explain(&store, &tokens, &[]);
    let old = explained["namespaces"].as_array().unwrap().clone();
    let old = old
        .iter()
        .find(|namespace| namespace["name"]["is_current"] == false)
        .unwrap();
    assert_eq!(
        (&old["ready_blocks"], &old["present_blocks"]),
        (&0.into(), &2.into())
    );
    assert!(old["first_miss"].as_str().unwrap().contains("reset"));

    store.stop_writer();
    assert!(
        reason(&store).contains("not stored"),
        "an orderly end takes its promises back"
    );
}

#[test]
fn explain_of_an_idle_folder_that_was_reset_never_says_that_there_is_no_miss() {
    let mut store = Store::new();
    let tokens = prompt(2);
    store.store(&tokens, 0..2);
    // As servers leave it: one takes its descriptor away when it stops.
    store.stop_writer();
    let path = store.shared.path().to_owned();
    let shown = |tokens: &[u32]| {
        let arguments = ["store", "explain", "--tokens", "-", "--block-tokens", "16"];
        text(&kvlane_with(&arguments, Some(&path), &[], &words(tokens)).stdout)
    };
    assert!(shown(&tokens).contains("no miss"), "{}", shown(&tokens));

    store.start_writer();
    store.reset();
    store.stop_writer();
    let after = shown(&tokens);
    assert!(
        !after.contains("no miss")
            && after.contains("first miss: block 0 if all of this is of before a reset"),
        "{after}"
    );
    let explained = explain(&store, &tokens, &["--block-tokens", "16"]);
    let namespace = &explained["namespaces"][0];
    assert_eq!(namespace["ready_blocks"], serde_json::Value::Null);
    assert_eq!(namespace["present_blocks"], 2);
    // What is missing in any case is said without an if.
    let other: Vec<u32> = tokens.iter().map(|token| token + 1).collect();
    let other = explain(&store, &other, &["--block-tokens", "16"]);
    let namespace = &other["namespaces"][0];
    assert_eq!(namespace["ready_blocks"], 0);
    let reason = namespace["first_miss"].as_str().unwrap();
    assert!(reason.starts_with("block 0 is not there"), "{reason}");
}

#[test]
fn explain_mentions_files_of_which_it_knows_nothing() {
    let mut store = Store::new();
    let tokens = prompt(2);
    store.store(&tokens, 0..2);
    let (segment, _) = place_of(&store, &tokens, 0);
    store.stop_writer();
    let shown = || {
        let arguments = ["store", "explain", "--tokens", "-", "--block-tokens", "16"];
        text(&kvlane_with(&arguments, Some(store.shared.path()), &[], &words(&tokens)).stdout)
    };
    assert!(!shown().contains("not usable"), "{}", shown());
    store.set_version(&segment, 2);
    let after = shown();
    assert!(after.contains("1 file is not usable (see `store ls`)"), "{after}");
    assert!(
        after.contains("first miss: nothing usable is stored in this folder"),
        "{after}"
    );
    assert_eq!(
        explain(&store, &tokens, &["--block-tokens", "16"])["rejected_files"],
        1
    );
}

#[test]
fn what_else_lies_among_the_descriptors_is_left_out_and_not_waited_for() {
    let store = Store::new();
    let tokens = prompt(2);
    store.store(&tokens, 0..2);
    store.describe(16);
    let folder = store.folder().join("descriptors");
    let pipe = folder.join("pipe.json");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    std::os::unix::fs::symlink("e-pp0-tp1.json", folder.join("link.json")).unwrap();
    let stat = kvlane(&["store", "stat"], Some(store.shared.path()), &["--json"]);
    assert_eq!(json(&stat)["namespaces"][0]["name"]["model"], "org/model");
    let complaints = text(&stat.stderr);
    assert!(
        complaints.contains("pipe.json is not a regular file")
            && complaints.contains("link.json is a symbolic"),
        "{complaints}"
    );
    let explained = explain(&store, &tokens, &[]);
    assert_eq!(explained["namespaces"][0]["ready_blocks"], 2);
}

#[test]
fn explain_takes_the_block_size_from_the_servers_or_asks_for_it() {
    let store = Store::new();
    let tokens = prompt(2);
    store.store(&tokens, 0..2);
    let path = store.shared.path();
    let unknown = kvlane_with(&["store", "explain", "--tokens", "-"], Some(path), &[], "1 2");
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown.stderr).contains("--block-tokens"), "{unknown:?}");

    let given = explain(&store, &tokens, &["--block-tokens", "16"]);
    assert_eq!(given["namespaces"][0]["ready_blocks"], 2);
    assert_eq!(given["namespaces"][0]["name"], serde_json::Value::Null);

    // The descriptor's own size counts even where it finds less.
    store.describe(8);
    assert_eq!(explain(&store, &tokens, &[])["namespaces"][0]["block_tokens"], 8);
    store.describe(16);
    let other = kvlane_with(
        &["store", "explain", "--tokens", "-", "--block-tokens", "8"],
        Some(path),
        &[],
        &words(&tokens),
    );
    assert!(
        text(&other.stdout).contains("leave --block-tokens out"),
        "{other:?}"
    );

    for (input, more) in [("1 x", "word 2 is 'x'"), ("[1, -1]", "JSON")] {
        let wrong = kvlane_with(&["store", "explain", "--tokens", "-"], Some(path), &[], input);
        assert_eq!(wrong.status.code(), Some(1));
        assert!(text(&wrong.stderr).contains(more), "{wrong:?}");
    }
}

#[test]
fn without_a_store_every_subcommand_says_so_and_creates_nothing() {
    let empty = tempfile::tempdir().unwrap();
    let missing = empty.path().join("missing");
    for path in [empty.path(), &missing] {
        for arguments in [
            &["store", "ls"][..],
            &["store", "stat", "--json"],
            &["store", "verify"],
            &["store", "gc", "--unused-for", "0s"],
            &["store", "explain", "--tokens", "-"],
        ] {
            let output = kvlane(arguments, Some(path), &[]);
            assert_eq!(output.status.code(), Some(1), "{arguments:?}");
            assert!(output.stdout.is_empty());
            let complaint = text(&output.stderr);
            let expected = format!("kvlane: there is no KV store at {}", path.display());
            assert!(
                complaint.starts_with(&expected) && complaint.lines().count() == 1,
                "{complaint}"
            );
        }
    }
    assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0);
}

fn explain(store: &Store, tokens: &[u32], more: &[&str]) -> serde_json::Value {
    let list = serde_json::to_string(tokens).unwrap();
    let arguments = ["store", "explain", "--tokens", "-", "--json"];
    let output = kvlane_with(&arguments, Some(store.shared.path()), more, &list);
    assert!(output.status.success(), "{output:?}");
    json(&output)
}

/// Segment and slot of one block.
fn place_of(store: &Store, tokens: &[u32], position: usize) -> (String, u32) {
    let explained = explain(store, tokens, &["--block-tokens", "16"]);
    let block = &explained["namespaces"][0]["blocks"][position];
    let slot = block["slot"].as_u64().unwrap();
    (
        block["segment"].as_str().unwrap().to_owned(),
        slot.try_into().unwrap(),
    )
}
