use super::*;

const READER: ConnectionId = ConnectionId(1);
const LEASE: Duration = Duration::from_secs(10);

fn limits() -> HolderLimits {
    HolderLimits {
        block_tokens: 4,
        slots: 3,
        lease: LEASE,
        reading: Duration::ZERO,
        readers: 1,
        unclaimed_blocks: 6,
        questions: 2,
        question_wait: Duration::from_secs(5),
        want_wait: Duration::from_secs(2),
        transfers_per_connection: 2,
        posted_blocks: 0,
    }
}

fn key(text: &str) -> TransferKey {
    TransferKey::new(text).unwrap()
}

fn prompt(blocks: u32) -> Prompt {
    Prompt {
        tokens: 4 * blocks,
        digest: [blocks as u8; 32],
    }
}

fn offer(hold: &str, text: &str, blocks: &[u32]) -> Offer {
    Offer {
        hold: hold.into(),
        key: key(text),
        prompt: prompt(blocks.len() as u32),
        blocks: blocks.to_vec(),
    }
}

fn done(blocks: u32) -> Progress {
    Progress {
        done_blocks: blocks,
        wave_blocks: blocks,
        wave_layers: 0,
    }
}

fn actions(holder: &mut Holder) -> Vec<HolderAction> {
    std::iter::from_fn(|| holder.next_action()).collect()
}

/// Messages to the reader, in order.
fn told(holder: &mut Holder) -> Vec<Message> {
    let sent = |action| match action {
        HolderAction::Send(READER, message) => Some(message),
        _ => None,
    };
    actions(holder).into_iter().filter_map(sent).collect()
}

fn want_message(transfer: u64, text: &str, blocks: u32) -> Message {
    Message::Want {
        transfer,
        key: key(text),
        prompt: prompt(blocks),
        first_block: 0,
        block_count: blocks,
        block_tokens: 4,
        readers: 1,
    }
}

fn want(holder: &mut Holder, now: Instant, transfer: u64, text: &str, blocks: u32) {
    let message = want_message(transfer, text, blocks);
    holder.receive(now, READER, true, message).unwrap();
}

fn ask(holder: &mut Holder, now: Instant, question: u64, text: &str, blocks: u32) {
    let message = Message::Ask {
        question,
        key: key(text),
        prompt: prompt(blocks),
        patience_ms: 60_000,
    };
    holder.receive(now, READER, true, message).unwrap();
}

fn held(holder: &mut Holder, now: Instant, hold: &str, text: &str, blocks: &[u32]) {
    assert!(holder.offer(now, offer(hold, text, blocks)));
    holder.progress(hold, done(blocks.len() as u32));
    holder.finish(now, &hold.into());
}

#[test]
fn the_table_changes_before_anybody_hears_that_blocks_are_free() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    held(&mut holder, now, "r", "a", &[1, 2]);
    want(&mut holder, now, 7, "a", 2);
    let Some(Message::Grant { slot, epoch, .. }) = told(&mut holder).first().cloned() else {
        panic!("not granted");
    };
    assert!(holder.is_held(slot, epoch));
    holder.tick(now + LEASE);
    let ended = actions(&mut holder);
    assert!(matches!(ended[0], HolderAction::SetEpoch { .. }), "{ended:?}");
    assert!(matches!(
        ended.last(),
        Some(HolderAction::Ended {
            reason: EndReason::Expired,
            ..
        })
    ));
    assert!(!holder.is_held(slot, epoch));
    assert_eq!(holder.load(), (0, 0, 0, 0));
}

#[test]
fn blocks_of_later_chunks_are_named_when_they_are_there() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    let whole = Offer {
        blocks: vec![5],
        ..offer("r", "a", &[5, 6, 7])
    };
    holder.offer(now, whole);
    want(&mut holder, now, 1, "a", 3);
    holder.extend("r", &[6, 7]);
    holder.progress("r", done(2));
    let named: Vec<(Vec<u32>, u32)> = told(&mut holder)
        .into_iter()
        .filter_map(|message| match message {
            Message::Ready { blocks, progress, .. } => Some((blocks, progress.done_blocks)),
            _ => None,
        })
        .collect();
    assert_eq!(named, [(vec![5], 0), (vec![6, 7], 2)]);
}

#[test]
fn progress_never_goes_back_nor_beyond_the_known_blocks() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    holder.offer(now, offer("r", "a", &[1, 2]));
    want(&mut holder, now, 1, "a", 2);
    holder.progress("r", done(9));
    holder.progress("r", done(1));
    let last = told(&mut holder).pop();
    assert!(
        matches!(last, Some(Message::Ready { progress, .. }) if progress.done_blocks == 2),
        "{last:?}"
    );
}

#[test]
fn unclaimed_holds_make_room_oldest_first_and_claimed_ones_stay() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    held(&mut holder, now, "r1", "a", &[1, 2, 3]);
    want(&mut holder, now, 1, "a", 3);
    held(&mut holder, now + LEASE / 10, "r2", "b", &[4, 5, 6]);
    actions(&mut holder);
    held(&mut holder, now + LEASE / 5, "r3", "c", &[7, 8, 9, 10]);
    let ended: Vec<HolderAction> = actions(&mut holder)
        .into_iter()
        .filter(|action| matches!(action, HolderAction::Ended { .. }))
        .collect();
    let dropped = HolderAction::Ended {
        hold: "r2".into(),
        reason: EndReason::Dropped,
    };
    assert_eq!(ended, [dropped]);
    assert_eq!(holder.load(), (2, 4, 0, 1));
}

#[test]
fn without_a_free_slot_a_request_is_not_held_and_its_questions_are_answered() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    ask(&mut holder, now, 1, "d", 1);
    for (place, text) in ["a", "b", "c"].into_iter().enumerate() {
        assert!(holder.offer(now, offer(text, text, &[place as u32])));
    }
    assert!(!holder.offer(now, offer("d", "d", &[9])));
    let answer = Message::Answer {
        question: 1,
        verdict: Verdict::None,
    };
    assert_eq!(told(&mut holder), [answer]);
    // The engine hears at once that nothing is held.
    holder.finish(now, &"d".into());
    assert!(matches!(actions(&mut holder)[..], [HolderAction::Ended { .. }]));
}

#[test]
fn questions_wait_within_their_bounds() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    (1..=3).for_each(|question| ask(&mut holder, now, question, "a", 1));
    let busy = Message::Answer {
        question: 3,
        verdict: Verdict::Busy,
    };
    assert_eq!(told(&mut holder), [busy]);
    assert_eq!(
        holder.next_deadline(),
        Some(now + Duration::from_secs(5)),
        "patience is bounded here"
    );
    holder
        .receive(now, READER, true, Message::Forget { question: 1 })
        .unwrap();
    holder.tick(now + Duration::from_secs(5));
    let none = Message::Answer {
        question: 2,
        verdict: Verdict::None,
    };
    assert_eq!(told(&mut holder), [none]);
    assert_eq!(holder.load(), (0, 0, 0, 0));
}

#[test]
fn a_question_behind_the_end_of_a_hold_is_answered_at_once() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    held(&mut holder, now, "r", "a", &[1]);
    holder.tick(now + LEASE);
    actions(&mut holder);
    ask(&mut holder, now + LEASE, 1, "a", 1);
    assert!(matches!(
        told(&mut holder)[..],
        [Message::Answer {
            verdict: Verdict::None,
            ..
        }]
    ));
    // Preempted: it comes back, so the question waits.
    holder.offer(now, offer("s", "b", &[1]));
    holder.revoke(now, "s");
    actions(&mut holder);
    ask(&mut holder, now, 2, "b", 1);
    assert_eq!(told(&mut holder), []);
}

#[test]
fn all_ranks_of_decode_must_release_a_hold() {
    let now = Instant::now();
    let mut holder = Holder::new(HolderLimits {
        readers: 2,
        ..limits()
    });
    held(&mut holder, now, "r", "a", &[1]);
    want(&mut holder, now, 1, "a", 1);
    want(&mut holder, now, 2, "a", 1);
    actions(&mut holder);
    holder
        .receive(now, READER, true, Message::Done { transfer: 1 })
        .unwrap();
    assert_eq!(actions(&mut holder), []);
    holder.closed(now, READER);
    let ended = actions(&mut holder);
    assert!(
        matches!(
            ended.last(),
            Some(HolderAction::Ended {
                reason: EndReason::Released,
                ..
            })
        ),
        "{ended:?}"
    );
}

#[test]
fn a_second_request_with_the_key_takes_its_place_and_the_first_is_given_back() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    held(&mut holder, now, "first", "a", &[1]);
    actions(&mut holder);
    assert!(holder.offer(now, offer("second", "a", &[2])));
    let ended = actions(&mut holder);
    let replaced = HolderAction::Ended {
        hold: "first".into(),
        reason: EndReason::Replaced,
    };
    assert!(ended.contains(&replaced), "{ended:?}");
    want(&mut holder, now, 1, "a", 1);
    assert!(matches!(told(&mut holder)[0], Message::Grant { .. }));
}

#[test]
fn another_cache_another_prompt_and_too_many_transfers_are_denied() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    holder.offer(now, offer("r", "a", &[1, 2]));
    let message = |transfer, blocks, count| Message::Want {
        transfer,
        key: key("a"),
        prompt: prompt(blocks),
        first_block: 1,
        block_count: count,
        block_tokens: 4,
        readers: 1,
    };
    let mut reason = |is_compatible, message| {
        holder.receive(now, READER, is_compatible, message).unwrap();
        match told(&mut holder).as_slice() {
            [Message::Deny { reason, .. }] => Some(*reason),
            _ => None,
        }
    };
    assert_eq!(reason(false, message(1, 2, 1)), Some(DenyReason::Namespace));
    assert_eq!(reason(true, message(1, 3, 1)), Some(DenyReason::Mismatch));
    assert_eq!(reason(true, message(1, 2, 2)), Some(DenyReason::Range));
    assert_eq!(reason(true, message(1, 2, u32::MAX)), Some(DenyReason::Range));
    assert_eq!(reason(true, message(1, 2, 1)), None);
    assert_eq!(reason(true, message(2, 2, 1)), None);
    assert_eq!(reason(true, message(3, 2, 1)), Some(DenyReason::Busy));
}

#[test]
fn a_prompt_of_more_blocks_than_a_message_holds_is_named_in_several() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    let blocks: Vec<u32> = (0..2 * BLOCKS_PER_MESSAGE as u32 + 3).collect();
    holder.offer(now, offer("r", "a", &blocks));
    want(&mut holder, now, 1, "a", blocks.len() as u32);
    let named: Vec<Vec<u32>> = told(&mut holder)
        .into_iter()
        .filter_map(|message| match message {
            Message::Ready { blocks, .. } => Some(blocks),
            _ => None,
        })
        .collect();
    assert_eq!(named.len(), 3);
    assert_eq!(named.concat(), blocks);
    let mut frame = Vec::new();
    super::super::encode(
        &Message::Ready {
            transfer: u64::MAX,
            blocks: vec![u32::MAX; BLOCKS_PER_MESSAGE],
            progress: Progress::default(),
        },
        &mut frame,
    );
}

#[test]
fn a_key_under_which_nothing_will_come_is_answered_at_once() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    ask(&mut holder, now, 1, "a", 1);
    holder.give_up(now, &key("a"));
    ask(&mut holder, now, 2, "a", 1);
    let none = |question| Message::Answer {
        question,
        verdict: Verdict::None,
    };
    assert_eq!(told(&mut holder), [none(1), none(2)]);
    // A request that is there is not given up by a late word about an older one.
    holder.offer(now, offer("r", "b", &[1]));
    holder.give_up(now, &key("b"));
    ask(&mut holder, now, 3, "b", 1);
    assert!(matches!(
        told(&mut holder)[..],
        [Message::Answer {
            verdict: Verdict::Started,
            ..
        }]
    ));
}

#[test]
fn a_rank_that_needs_nothing_may_say_so_before_the_request_is_there() {
    for (about, reason) in [(2, EndReason::Released), (1, EndReason::Expired)] {
        let now = Instant::now();
        let mut holder = Holder::new(limits());
        let release = Message::Want {
            transfer: 1,
            key: key("a"),
            prompt: prompt(about),
            first_block: 0,
            block_count: 0,
            block_tokens: 4,
            readers: 1,
        };
        holder.receive(now, READER, true, release).unwrap();
        held(&mut holder, now, "r", "a", &[1, 2]);
        holder.tick(now + LEASE);
        let last = actions(&mut holder).pop();
        assert!(
            matches!(last, Some(HolderAction::Ended { reason: found, .. }) if found == reason),
            "{last:?}"
        );
    }
}

#[test]
fn a_want_behind_the_blocks_that_are_allocated_so_far_waits_for_them() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    let whole = Offer {
        blocks: vec![5],
        ..offer("r", "a", &[5, 6, 7])
    };
    holder.offer(now, whole);
    let late = Message::Want {
        transfer: 1,
        key: key("a"),
        prompt: prompt(3),
        first_block: 2,
        block_count: 1,
        block_tokens: 4,
        readers: 1,
    };
    holder.receive(now, READER, true, late).unwrap();
    holder.progress("r", done(1));
    holder.extend("r", &[6, 7]);
    holder.progress("r", done(3));
    let last = told(&mut holder).pop();
    let Some(Message::Ready { blocks, progress, .. }) = last else {
        panic!("{last:?}");
    };
    assert_eq!((blocks, progress.done_blocks), (vec![7], 3));
}

#[test]
fn a_lease_does_not_end_under_a_reader_that_has_time() {
    let now = Instant::now();
    let mut holder = Holder::new(HolderLimits {
        reading: 3 * LEASE,
        ..limits()
    });
    held(&mut holder, now, "r", "a", &[1]);
    want(&mut holder, now, 1, "a", 1);
    actions(&mut holder);
    for leases in [1, 2] {
        holder.tick(now + leases * LEASE);
        assert_eq!(actions(&mut holder), [], "{leases}");
    }
    // Its time is over, and at the latest the next renewal's.
    holder.tick(now + 3 * LEASE);
    let ended = actions(&mut holder);
    assert!(
        matches!(
            ended.last(),
            Some(HolderAction::Ended {
                reason: EndReason::Expired,
                ..
            })
        ),
        "{ended:?}"
    );
}

#[test]
fn a_holder_that_closes_takes_every_lease_away_and_tells_of_finished_requests() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    assert!(holder.offer(now, offer("finished", "a", &[1])));
    assert!(holder.offer(now, offer("running", "b", &[2])));
    holder.finish(now, &"finished".into());
    want(&mut holder, now, 1, "b", 1);
    actions(&mut holder);
    holder.close_all(now);
    let done = actions(&mut holder);
    let bumped = |action: &&HolderAction| matches!(action, HolderAction::SetEpoch { epoch: 2, .. });
    assert_eq!(done.iter().filter(bumped).count(), 2);
    let reason = EndReason::Closed;
    let hold: Arc<str> = "finished".into();
    assert!(done.contains(&HolderAction::Ended { hold, reason }));
    holder.revoke(now, "running");
    assert_eq!(holder.load(), (0, 0, 0, 0));
    assert!(!holder.offer(now, offer("late", "c", &[3])));
    assert_eq!(holder.next_deadline(), None);
}

#[test]
fn a_second_try_is_not_ended_by_what_was_said_of_the_first() {
    let now = Instant::now();
    let release = |holder: &mut Holder| {
        let message = Message::Want {
            transfer: 1,
            key: key("a"),
            prompt: prompt(2),
            first_block: 0,
            block_count: 0,
            block_tokens: 4,
            readers: 1,
        };
        holder.receive(now, READER, true, message).unwrap();
    };
    for is_given_up in [true, false] {
        let mut holder = Holder::new(limits());
        // The client left before prefill had begun, and comes again with the same id.
        release(&mut holder);
        if is_given_up {
            holder.give_up(now, &key("a"));
        }
        assert!(holder.offer(now, offer("again", "a", &[1, 2])));
        want(&mut holder, now, 2, "a", 2);
        actions(&mut holder);
        holder.finish(now, &"again".into());
        assert_eq!(actions(&mut holder), [], "it is being read");
        holder
            .receive(now, READER, true, Message::Done { transfer: 2 })
            .unwrap();
        let ended = |action: &HolderAction| {
            matches!(
                action,
                HolderAction::Ended {
                    reason: EndReason::Released,
                    ..
                }
            )
        };
        assert!(actions(&mut holder).iter().any(ended));
        assert_eq!(holder.load(), (0, 0, 0, 0));
    }
}

#[test]
fn a_question_behind_an_offer_without_a_slot_is_answered_at_once() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    for number in 0..3 {
        assert!(holder.offer(
            now,
            offer(&format!("r{number}"), &format!("k{number}"), &[number])
        ));
    }
    assert!(!holder.offer(now, offer("late", "late", &[9])));
    let ask = Message::Ask {
        question: 5,
        key: key("late"),
        prompt: prompt(1),
        patience_ms: 1000,
    };
    actions(&mut holder);
    holder.receive(now, READER, true, ask).unwrap();
    let verdict = Verdict::None;
    assert_eq!(told(&mut holder), [Message::Answer { question: 5, verdict }]);
}

#[test]
fn a_prompt_is_posted_once_when_it_is_whole_unless_it_has_too_many_blocks() {
    let now = Instant::now();
    let mut holder = Holder::new(HolderLimits {
        posted_blocks: 2,
        ..limits()
    });
    assert!(holder.offer(now, offer("r", "a", &[7, 8])));
    holder.progress("r", done(1));
    assert_eq!(actions(&mut holder), []);
    holder.extend("r", &[9]);
    holder.progress("r", done(2));
    let posted = HolderAction::Post {
        key: key("a"),
        prompt: prompt(2),
        slot: 0,
        epoch: 1,
        blocks: vec![7, 8],
    };
    assert_eq!(actions(&mut holder), [posted]);
    holder.progress("r", done(2));
    assert_eq!(actions(&mut holder), []);
    holder.offer(now, offer("s", "b", &[1, 2, 3]));
    holder.progress("s", done(3));
    assert_eq!(actions(&mut holder), []);
}

#[test]
fn the_epoch_of_a_posted_prompt_is_over_before_its_blocks_are_given_back() {
    let now = Instant::now();
    let mut holder = Holder::new(HolderLimits {
        posted_blocks: 9,
        ..limits()
    });
    held(&mut holder, now, "r", "a", &[1]);
    let posted = actions(&mut holder);
    assert!(
        matches!(
            &posted[..],
            [HolderAction::Post {
                slot: 0,
                epoch: 1,
                ..
            }]
        ),
        "{posted:?}"
    );
    holder.tick(now + LEASE);
    let over = actions(&mut holder);
    assert!(
        matches!(
            &over[..],
            [
                HolderAction::SetEpoch { slot: 0, epoch: 2 },
                HolderAction::Ended { .. }
            ]
        ),
        "{over:?}"
    );
    assert!(holder.offer(now, offer("s", "b", &[1])));
    holder.progress("s", done(1));
    let next = actions(&mut holder);
    assert!(
        matches!(&next[..], [HolderAction::Post { epoch: 2, .. }]),
        "{next:?}"
    );
}

#[test]
fn a_want_that_comes_before_its_request_is_granted_when_the_request_does() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    want(&mut holder, now, 1, "a", 2);
    assert_eq!(told(&mut holder), []);
    assert_eq!(holder.load(), (0, 0, 1, 0));
    assert!(holder.offer(now, offer("r", "a", &[7, 8])));
    let told = told(&mut holder);
    assert!(
        matches!(
            &told[..],
            [Message::Grant { transfer: 1, .. }, Message::Ready { blocks, .. }] if *blocks == [7, 8]
        ),
        "{told:?}"
    );
    assert_eq!(holder.load(), (1, 0, 0, 1));
}

#[test]
fn a_want_whose_request_does_not_come_is_denied_by_its_time_or_as_soon_as_that_is_known() {
    let denied = |transfer| Message::Deny {
        transfer,
        reason: DenyReason::Gone,
    };
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    for transfer in [1, 2] {
        want(&mut holder, now, transfer, "a", 1);
    }
    assert_eq!(holder.next_deadline(), Some(now + limits().want_wait));
    // Two is as many as wait.
    want(&mut holder, now, 3, "a", 1);
    assert_eq!(told(&mut holder), [denied(3)]);
    // Another prompt comes under the key.
    holder
        .receive(now, READER, true, Message::Cancel { transfer: 2 })
        .unwrap();
    assert!(holder.offer(now, offer("r", "a", &[7, 8])));
    let mismatch = Message::Deny {
        transfer: 1,
        reason: DenyReason::Mismatch,
    };
    assert_eq!(told(&mut holder), [mismatch]);
    want(&mut holder, now, 4, "b", 1);
    holder.give_up(now, &key("b"));
    assert_eq!(told(&mut holder), [denied(4)]);
    want(&mut holder, now, 5, "b", 1);
    assert_eq!(
        told(&mut holder),
        [denied(5)],
        "it is known that nothing will come"
    );
    want(&mut holder, now, 6, "c", 1);
    holder.tick(now + limits().want_wait);
    assert_eq!(told(&mut holder), [denied(6)]);
    want(&mut holder, now, 7, "d", 1);
    holder.close_all(now);
    assert!(told(&mut holder).contains(&denied(7)));
    assert_eq!(holder.load().2, 0);
}

#[test]
fn a_connection_that_ends_takes_its_waiting_wants_along() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    want(&mut holder, now, 1, "a", 1);
    let again = holder.receive(now, READER, true, want_message(1, "a", 1));
    assert!(again.is_err(), "the number of one that waits");
    holder.closed(now, READER);
    assert_eq!(holder.load(), (0, 0, 0, 0));
    assert!(holder.offer(now, offer("r", "a", &[7])));
    assert_eq!(told(&mut holder), []);
}

#[test]
fn a_want_that_ends_before_its_request_comes_is_a_release_of_it() {
    for is_late in [false, true] {
        let now = Instant::now();
        let mut holder = Holder::new(limits());
        want(&mut holder, now, 1, "a", 1);
        if is_late {
            holder.tick(now + limits().want_wait);
        } else {
            let cancel = Message::Cancel { transfer: 1 };
            holder.receive(now, READER, true, cancel).unwrap();
        }
        actions(&mut holder);
        held(&mut holder, now, "r", "a", &[7]);
        let last = actions(&mut holder).pop();
        assert!(
            matches!(
                last,
                Some(HolderAction::Ended {
                    reason: EndReason::Released,
                    ..
                })
            ),
            "{last:?}"
        );
    }
}

mod readers;
mod revoked;
