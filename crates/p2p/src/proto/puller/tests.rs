use std::time::Duration;

use super::*;

const PEER: ConnectionId = ConnectionId(1);

fn puller() -> Puller {
    puller_of_parts(1, 1)
}

fn puller_of_parts(parts: u32, part_pieces_min: u32) -> Puller {
    Puller::new(PullerLimits {
        pulls: 2,
        layers: 4,
        block_tokens: 20,
        block_count_max: 100,
        parts,
        part_pieces_min,
    })
}

fn request(job: u64, first_block: u32, targets: &[u32], now: Instant) -> PullRequest {
    PullRequest {
        job,
        key: TransferKey::new("a").unwrap(),
        prompt: Prompt {
            tokens: 100,
            digest: [1; 32],
        },
        first_block,
        targets: targets.to_vec(),
        readers: 1,
        deadline: now + Duration::from_secs(5),
    }
}

fn actions(puller: &mut Puller) -> Vec<PullerAction> {
    std::iter::from_fn(|| puller.next_action()).collect()
}

/// (layers, the holder's blocks, own blocks) of each copy.
fn copies(puller: &mut Puller) -> Vec<(Range<u32>, Vec<u32>, Vec<u32>)> {
    let copy = |action| match action {
        PullerAction::Copy { span, .. } => Some((span.layers, span.remote, span.local)),
        _ => None,
    };
    actions(puller).into_iter().filter_map(copy).collect()
}

fn ready(blocks: &[u32], done_blocks: u32, wave_blocks: u32, wave_layers: u32) -> Message {
    Message::Ready {
        transfer: 1,
        blocks: blocks.to_vec(),
        progress: Progress {
            done_blocks,
            wave_blocks,
            wave_layers,
        },
    }
}

fn grant() -> Message {
    Message::Grant {
        transfer: 1,
        slot: 3,
        epoch: 9,
    }
}

/// A pull of blocks 2, 3 and 4 of a prompt, granted.
fn granted(now: Instant) -> Puller {
    granted_to(puller(), now)
}

fn granted_to(mut puller: Puller, now: Instant) -> Puller {
    puller.pull(PEER, request(7, 2, &[10, 11, 12], now), None);
    puller.receive(PEER, grant()).unwrap();
    actions(&mut puller);
    puller
}

#[test]
fn a_span_is_copied_in_parts_of_whole_layers_that_are_large_enough() {
    // Three blocks in four layers: twelve pieces.
    for (parts, part_pieces_min, expected) in [
        (1, 1, &[(0, 4)][..]),
        (2, 6, &[(0, 2), (2, 4)]),
        (2, 7, &[(0, 4)]),
        (3, 1, &[(0, 1), (1, 2), (2, 4)]),
        (9, 1, &[(0, 1), (1, 2), (2, 3), (3, 4)]),
        (0, 0, &[(0, 4)]),
    ] {
        let now = Instant::now();
        let mut puller = granted_to(puller_of_parts(parts, part_pieces_min), now);
        puller.receive(PEER, ready(&[20, 21, 22], 5, 5, 0)).unwrap();
        let copies = copies(&mut puller);
        let layers: Vec<_> = copies
            .iter()
            .map(|(layers, ..)| (layers.start, layers.end))
            .collect();
        assert_eq!(
            layers, expected,
            "{parts} parts of at least {part_pieces_min} pieces"
        );
        for (_, remote, local) in &copies {
            assert_eq!((&remote[..], &local[..]), (&[20, 21, 22][..], &[10, 11, 12][..]));
        }
    }
}

#[test]
fn a_pull_has_ended_when_all_parts_of_its_span_have() {
    let ended = |puller: &mut Puller| {
        actions(puller).into_iter().find_map(|action| match action {
            PullerAction::Ended { result, .. } => Some(result),
            _ => None,
        })
    };
    for (second, result) in [
        (Copied::Held, PullResult::Done),
        (Copied::Lapsed, PullResult::Lapsed),
        (Copied::Failed, PullResult::Failed),
    ] {
        let now = Instant::now();
        let mut puller = granted_to(puller_of_parts(2, 1), now);
        puller.receive(PEER, ready(&[20, 21, 22], 5, 5, 0)).unwrap();
        assert_eq!(copies(&mut puller).len(), 2);
        puller.copied(1, Copied::Held);
        assert_eq!(ended(&mut puller), None);
        puller.copied(1, second);
        assert_eq!(ended(&mut puller), Some(result));
        // The other way round the pull fails at once, and ends only when nothing writes its blocks any more.
        let mut puller = granted_to(puller_of_parts(2, 1), now);
        puller.receive(PEER, ready(&[20, 21, 22], 5, 5, 0)).unwrap();
        puller.copied(1, second);
        assert_eq!(ended(&mut puller), None);
        puller.copied(1, Copied::Held);
        assert_eq!(ended(&mut puller), Some(result));
    }
}

#[test]
fn layers_are_copied_as_they_become_ready_and_each_once() {
    let mut puller = granted(Instant::now());
    puller.receive(PEER, ready(&[50, 51, 52], 2, 4, 1)).unwrap();
    assert_eq!(copies(&mut puller), [(0..1, vec![50, 51], vec![10, 11])]);
    puller.receive(PEER, ready(&[], 2, 4, 3)).unwrap();
    assert_eq!(copies(&mut puller), [(1..3, vec![50, 51], vec![10, 11])]);
    puller.receive(PEER, ready(&[], 5, 5, 0)).unwrap();
    assert_eq!(
        copies(&mut puller),
        [(3..4, vec![50, 51], vec![10, 11]), (0..4, vec![52], vec![12])]
    );
    (0..4).for_each(|_| puller.copied(1, Copied::Held));
    let last = actions(&mut puller);
    let ended = PullerAction::Ended {
        job: 7,
        transfer: 1,
        result: PullResult::Done,
    };
    assert_eq!(
        last,
        [PullerAction::Send(PEER, Message::Done { transfer: 1 }), ended]
    );
    assert_eq!(puller.pull_count(), 0);
}

#[test]
fn what_a_narrower_wave_leaves_out_is_copied_whole() {
    let mut puller = granted(Instant::now());
    puller.receive(PEER, ready(&[50, 51, 52], 2, 5, 1)).unwrap();
    puller.receive(PEER, ready(&[], 2, 3, 2)).unwrap();
    copies(&mut puller);
    puller.receive(PEER, ready(&[], 5, 5, 0)).unwrap();
    assert_eq!(
        copies(&mut puller),
        [(2..4, vec![50], vec![10]), (0..4, vec![51, 52], vec![11, 12])]
    );
}

#[test]
fn a_failed_pull_ends_only_when_its_copies_have() {
    let now = Instant::now();
    for (trouble, expected) in [
        (0, PullResult::TimedOut),
        (1, PullResult::Lapsed),
        (2, PullResult::Unreachable),
    ] {
        let mut puller = granted(now);
        puller.receive(PEER, ready(&[50, 51], 4, 4, 0)).unwrap();
        actions(&mut puller);
        match trouble {
            0 => puller.tick(now + Duration::from_secs(5)),
            1 => puller.receive(PEER, Message::Revoked { transfer: 1 }).unwrap(),
            _ => puller.closed(PEER),
        }
        let before = actions(&mut puller);
        assert!(
            before.contains(&PullerAction::StopCopies { transfer: 1 }),
            "{before:?}"
        );
        assert!(
            !before
                .iter()
                .any(|action| matches!(action, PullerAction::Ended { .. }))
        );
        // Whatever became of the copy, it does not count any more.
        puller.copied(1, Copied::Held);
        let ended = PullerAction::Ended {
            job: 7,
            transfer: 1,
            result: expected,
        };
        assert_eq!(actions(&mut puller), [ended]);
    }
}

#[test]
fn a_lane_that_cannot_see_the_lease_has_it_checked() {
    for held in [true, false] {
        let mut puller = granted(Instant::now());
        puller.receive(PEER, ready(&[50, 51, 52], 5, 5, 0)).unwrap();
        actions(&mut puller);
        puller.copied(1, Copied::Unchecked);
        let check = Message::Check {
            transfer: 1,
            epoch: 9,
        };
        assert_eq!(actions(&mut puller), [PullerAction::Send(PEER, check)]);
        puller
            .receive(PEER, Message::Checked { transfer: 1, held })
            .unwrap();
        let expected = if held {
            PullResult::Done
        } else {
            PullResult::Lapsed
        };
        let last = actions(&mut puller).pop();
        assert!(
            matches!(last, Some(PullerAction::Ended { result, .. }) if result == expected),
            "{last:?}"
        );
    }
}

#[test]
fn a_holder_that_names_what_does_not_exist_is_cut_off_and_nothing_is_copied() {
    for lie in [
        ready(&[50, 51, 52, 53], 2, 2, 0),
        ready(&[100], 2, 2, 0),
        ready(&[50], 6, 6, 0),
        ready(&[50], 3, 2, 0),
        ready(&[50], 2, 3, 5),
    ] {
        let mut puller = granted(Instant::now());
        assert!(puller.receive(PEER, lie.clone()).is_err(), "{lie:?}");
        let last = actions(&mut puller);
        let ended = PullerAction::Ended {
            job: 7,
            transfer: 1,
            result: PullResult::Misbehaved,
        };
        assert_eq!(last, [ended], "{lie:?}");
    }
    let mut puller = puller();
    puller.pull(PEER, request(7, 2, &[10], Instant::now()), None);
    assert!(
        puller.receive(PEER, ready(&[50], 3, 3, 0)).is_err(),
        "a notice before the grant"
    );
}

#[test]
fn messages_about_others_transfers_do_no_harm() {
    let mut puller = granted(Instant::now());
    assert!(
        puller
            .receive(ConnectionId(2), Message::Revoked { transfer: 1 })
            .is_err()
    );
    puller.receive(PEER, Message::Revoked { transfer: 99 }).unwrap();
    assert!(puller.receive(PEER, grant()).is_err(), "a second grant");
    assert_eq!(puller.pull_count(), 1);
}

#[test]
fn too_many_pulls_are_refused_and_a_cancelled_one_makes_room() {
    let now = Instant::now();
    let mut puller = puller();
    for job in 1..=3 {
        puller.pull(PEER, request(job, 0, &[job as u32], now), None);
    }
    let last = actions(&mut puller).pop();
    assert!(
        matches!(
            last,
            Some(PullerAction::Ended {
                job: 3,
                result: PullResult::Busy,
                ..
            })
        ),
        "{last:?}"
    );
    puller.cancel(1);
    let cancelled = actions(&mut puller);
    assert!(
        cancelled.contains(&PullerAction::Send(PEER, Message::Cancel { transfer: 1 })),
        "{cancelled:?}"
    );
    puller.pull(PEER, request(4, 0, &[4], now), None);
    assert!(matches!(actions(&mut puller)[..], [PullerAction::Send(..)]));
}

fn posted(blocks: &[u32]) -> Option<PostedBlocks> {
    Some(PostedBlocks {
        slot: 3,
        epoch: 9,
        blocks: blocks.to_vec(),
    })
}

fn want() -> PullerAction {
    want_of(1, 2, 3)
}

fn want_of(transfer: u64, first_block: u32, block_count: u32) -> PullerAction {
    let want = Message::Want {
        transfer,
        key: TransferKey::new("a").unwrap(),
        prompt: request(7, 2, &[], Instant::now()).prompt,
        first_block,
        block_count,
        block_tokens: 20,
        readers: 1,
    };
    PullerAction::Send(PEER, want)
}

fn taken() -> PullerAction {
    let taken = Message::Taken {
        key: TransferKey::new("a").unwrap(),
        slot: 3,
        epoch: 9,
        readers: 1,
    };
    PullerAction::Send(PEER, taken)
}

/// A pull of three blocks that the holder has posted; its copy has begun and the holder was asked.
fn pulled_as_posted(now: Instant) -> Puller {
    let mut puller = puller();
    puller.pull(PEER, request(7, 2, &[10, 11, 12], now), posted(&[50, 51, 52]));
    let begun = actions(&mut puller);
    assert!(
        matches!(&begun[..], [PullerAction::Copy { slot: 3, epoch: 9, span, .. }, asked]
            if span.layers == (0..4) && span.remote == [50, 51, 52] && span.local == [10, 11, 12] && *asked == want()),
        "{begun:?}"
    );
    puller
}

fn ended(result: PullResult) -> PullerAction {
    PullerAction::Ended {
        job: 7,
        transfer: 1,
        result,
    }
}

#[test]
fn posted_blocks_that_are_there_at_once_are_never_asked_for() {
    let mut puller = puller();
    puller.pull(
        PEER,
        request(7, 2, &[10, 11, 12], Instant::now()),
        posted(&[50, 51, 52]),
    );
    assert!(matches!(puller.next_action(), Some(PullerAction::Copy { .. })));
    puller.copied(1, Copied::Held);
    assert_eq!(actions(&mut puller), [taken(), ended(PullResult::Done)]);
}

#[test]
fn a_copy_of_posted_blocks_that_ends_later_needs_no_grant() {
    let mut puller = pulled_as_posted(Instant::now());
    puller.receive(PEER, grant()).unwrap();
    puller.receive(PEER, ready(&[50, 51, 52], 5, 5, 0)).unwrap();
    assert_eq!(actions(&mut puller), [], "the blocks are being copied");
    puller.copied(1, Copied::Held);
    let done = PullerAction::Send(PEER, Message::Done { transfer: 1 });
    assert_eq!(actions(&mut puller), [done, ended(PullResult::Done)]);
}

#[test]
fn posted_blocks_whose_lease_ended_are_copied_again_as_granted() {
    for told_first in [true, false] {
        for failure in [Copied::Lapsed, Copied::Failed, Copied::Unchecked] {
            let mut puller = pulled_as_posted(Instant::now());
            if !told_first {
                puller.copied(1, failure);
                assert_eq!(actions(&mut puller), []);
            }
            puller.receive(PEER, grant()).unwrap();
            puller.receive(PEER, ready(&[60, 61, 62], 5, 5, 0)).unwrap();
            if told_first {
                assert_eq!(actions(&mut puller), [], "the first copy still writes the blocks");
                puller.copied(1, failure);
            }
            assert_eq!(
                copies(&mut puller),
                [(0..4, vec![60, 61, 62], vec![10, 11, 12])],
                "{failure:?}"
            );
            puller.copied(1, Copied::Held);
            assert!(actions(&mut puller).contains(&ended(PullResult::Done)));
        }
    }
}

#[test]
fn no_part_of_posted_blocks_is_copied_again_while_another_is_copied() {
    let now = Instant::now();
    let mut puller = puller_of_parts(2, 1);
    puller.pull(PEER, request(7, 2, &[10, 11, 12], now), posted(&[50, 51, 52]));
    assert_eq!(copies(&mut puller).len(), 2);
    puller.receive(PEER, grant()).unwrap();
    puller.receive(PEER, ready(&[60, 61, 62], 5, 5, 0)).unwrap();
    puller.copied(1, Copied::Lapsed);
    assert_eq!(actions(&mut puller), []);
    puller.copied(1, Copied::Held);
    assert_eq!(copies(&mut puller).len(), 2);
}

#[test]
fn a_pull_of_posted_blocks_ends_like_any_other_and_only_when_its_copy_has() {
    for (result, end) in [
        (PullResult::Cancelled, None),
        (
            PullResult::Denied(DenyReason::Gone),
            Some(Message::Deny {
                transfer: 1,
                reason: DenyReason::Gone,
            }),
        ),
        (PullResult::Lapsed, Some(Message::Revoked { transfer: 1 })),
    ] {
        let mut puller = pulled_as_posted(Instant::now());
        match end {
            None => puller.cancel(7),
            Some(message) => puller.receive(PEER, message).unwrap(),
        }
        let stopped = actions(&mut puller);
        assert!(
            stopped.contains(&PullerAction::StopCopies { transfer: 1 }),
            "{stopped:?}"
        );
        assert!(!stopped.contains(&ended(result)), "{stopped:?}");
        puller.copied(1, Copied::Held);
        assert_eq!(actions(&mut puller), [ended(result)]);
    }
}

#[test]
fn blocks_that_cannot_be_those_of_the_pull_are_asked_for() {
    for blocks in [&[50, 51][..], &[50, 51, 52, 53], &[50, 51, 100]] {
        let mut puller = puller();
        puller.pull(PEER, request(7, 2, &[10, 11, 12], Instant::now()), posted(blocks));
        assert_eq!(actions(&mut puller), [want()], "{blocks:?}");
    }
}

#[test]
fn what_a_refused_holder_was_asked_for_is_given_back() {
    let mut puller = puller();
    puller.pull(PEER, request(7, 2, &[10, 11, 12], Instant::now()), None);
    puller.refuse(PEER);
    let cancel = PullerAction::Send(PEER, Message::Cancel { transfer: 1 });
    let refused = ended(PullResult::Denied(DenyReason::Namespace));
    assert_eq!(actions(&mut puller), [want(), cancel, refused]);
}

#[test]
fn a_request_whose_lease_ended_is_released_should_it_come_again() {
    let mut puller = granted(Instant::now());
    puller.receive(PEER, Message::Revoked { transfer: 1 }).unwrap();
    let release = Message::Want {
        transfer: 2,
        key: TransferKey::new("a").unwrap(),
        prompt: request(7, 2, &[], Instant::now()).prompt,
        first_block: 0,
        block_count: 0,
        block_tokens: 20,
        readers: 1,
    };
    let last = actions(&mut puller);
    assert_eq!(
        last,
        [PullerAction::Send(PEER, release), ended(PullResult::Lapsed)]
    );
}

#[test]
fn a_copy_that_meets_the_deadline_first_ends_the_pull_as_timed_out() {
    let mut puller = granted(Instant::now());
    puller.receive(PEER, ready(&[50, 51, 52], 5, 5, 0)).unwrap();
    assert_eq!(copies(&mut puller).len(), 1);
    puller.copied(1, Copied::Late);
    assert!(actions(&mut puller).contains(&ended(PullResult::TimedOut)));
}

/// A pull of three blocks that is being taken.
fn being_taken(now: Instant) -> Puller {
    let mut puller = puller();
    puller.take(PEER, request(7, 2, &[10, 11, 12], now));
    assert!(matches!(
        actions(&mut puller)[..],
        [PullerAction::Take {
            transfer: 1,
            first_block: 2,
            ..
        }]
    ));
    puller
}

#[test]
fn what_was_taken_is_said_once_with_its_lease_and_nothing_is_asked_for() {
    let mut puller = being_taken(Instant::now());
    puller.took(1, Some((3, 9)));
    assert_eq!(actions(&mut puller), [taken(), ended(PullResult::Done)]);
    assert_eq!(puller.pull_count(), 0);
}

#[test]
fn what_could_not_be_taken_is_asked_for_and_pulled() {
    let mut puller = being_taken(Instant::now());
    puller.took(1, None);
    assert_eq!(actions(&mut puller), [want()]);
    puller.receive(PEER, grant()).unwrap();
    puller.receive(PEER, ready(&[20, 21, 22], 5, 5, 0)).unwrap();
    assert_eq!(copies(&mut puller), [(0..4, vec![20, 21, 22], vec![10, 11, 12])]);
    puller.copied(1, Copied::Held);
    let done = PullerAction::Send(PEER, Message::Done { transfer: 1 });
    assert_eq!(actions(&mut puller), [done, ended(PullResult::Done)]);
}

#[test]
fn a_take_that_is_not_wanted_any_more_ends_the_pull_only_when_it_has_ended_itself() {
    let now = Instant::now();
    for result in [PullResult::Cancelled, PullResult::TimedOut] {
        let mut puller = being_taken(now);
        match result {
            PullResult::Cancelled => puller.cancel(7),
            _ => puller.tick(now + Duration::from_secs(5)),
        }
        let stop = PullerAction::StopCopies { transfer: 1 };
        // Which lease it is is not known, and it need not be held for this rank.
        assert_eq!(actions(&mut puller), [want_of(2, 0, 0), stop]);
        puller.took(1, None);
        assert_eq!(actions(&mut puller), [ended(result)]);
    }
    let mut puller = being_taken(now);
    puller.closed(PEER);
    assert_eq!(actions(&mut puller), [PullerAction::StopCopies { transfer: 1 }]);
    puller.took(1, None);
    assert_eq!(actions(&mut puller), [ended(PullResult::Unreachable)]);
}
