//! Prompts that are taken back, as behind a preemption, and offered again: what ranks had of them, and when that is heard.

use super::*;

#[test]
fn who_took_what_was_posted_releases_that_lease_and_no_later_one_of_its_key() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    let taken = |epoch| Message::Taken {
        key: key("a"),
        slot: 0,
        epoch,
        readers: 1,
    };
    held(&mut holder, now, "r", "a", &[1]);
    assert_eq!(holder.load().1, 1);
    // The same prompt again, under the same key: the old lease is over.
    assert!(holder.offer(now, offer("s", "a", &[2])));
    actions(&mut holder);
    holder.receive(now, READER, true, taken(1)).unwrap();
    holder.progress("s", done(1));
    holder.finish(now, &"s".into());
    assert_eq!(actions(&mut holder), [], "nobody has taken it");
    assert_eq!(holder.load(), (1, 1, 0, 0));
    holder.receive(now, READER, true, taken(2)).unwrap();
    assert_released(&mut holder);
    holder.receive(now, READER, true, taken(2)).unwrap();
    assert_eq!(actions(&mut holder), []);
}

#[test]
fn a_request_that_was_taken_and_is_preempted_is_not_held_when_it_comes_again() {
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    for hold in ["r", "s"] {
        assert!(holder.offer(now, offer(hold, "a", &[1])));
        holder.progress(hold, done(1));
        if hold == "r" {
            want(&mut holder, now, 1, "a", 1);
            let done = Message::Done { transfer: 1 };
            holder.receive(now, READER, true, done).unwrap();
            assert!(holder.revoke(now, "r"));
        }
    }
    actions(&mut holder);
    holder.finish(now, &"s".into());
    assert_released(&mut holder);
}

#[test]
fn who_was_done_when_its_blocks_were_taken_back_is_not_waited_for_when_they_come_again() {
    let now = Instant::now();
    let ends = [Message::Done { transfer: 1 }, Message::Cancel { transfer: 1 }];
    for (end, is_heard_early) in ends
        .into_iter()
        .flat_map(|end| [(end.clone(), true), (end, false)])
    {
        let mut holder = Holder::new(limits());
        assert!(holder.offer(now, offer("r", "a", &[1])));
        holder.progress("r", done(1));
        want(&mut holder, now, 1, "a", 1);
        assert!(holder.revoke(now, "r"));
        if is_heard_early {
            holder.receive(now, READER, true, end.clone()).unwrap();
        }
        held(&mut holder, now, "r", "a", &[2]);
        if !is_heard_early {
            holder.receive(now, READER, true, end.clone()).unwrap();
        }
        assert_released(&mut holder);
        // Said twice it counts once.
        held(&mut holder, now, "r", "a", &[3]);
        holder.receive(now, READER, true, end).unwrap();
        assert_eq!(holder.load(), (1, 1, 0, 0));
    }
}

#[test]
fn what_every_rank_took_before_it_was_taken_back_is_not_held_when_it_comes_again() {
    let now = Instant::now();
    let taken = Message::Taken {
        key: key("a"),
        slot: 0,
        epoch: 1,
        readers: 2,
    };
    for heard_early in 0..=2 {
        let mut holder = Holder::new(HolderLimits {
            posted_blocks: 1,
            ..limits()
        });
        assert!(holder.offer(now, offer("r", "a", &[1])));
        holder.progress("r", done(1));
        assert!(holder.revoke(now, "r"));
        for number in 0..2 {
            if number == heard_early {
                held(&mut holder, now, "r", "a", &[2]);
            }
            holder.receive(now, READER, true, taken.clone()).unwrap();
        }
        if heard_early == 2 {
            held(&mut holder, now, "r", "a", &[2]);
        }
        assert_released(&mut holder);
    }
}

#[test]
fn what_a_rank_had_of_a_request_that_will_not_come_again_is_nothing_to_the_next_with_its_key() {
    let now = Instant::now();
    let mut holder = Holder::new(HolderLimits {
        posted_blocks: 1,
        ..limits()
    });
    assert!(holder.offer(now, offer("a", "a", &[1])));
    holder.progress("a", done(1));
    want(&mut holder, now, 1, "a", 1);
    assert!(holder.revoke(now, "a"));
    holder.give_up(now, &key("a"));
    held(&mut holder, now, "a", "a", &[2]);
    let taken = Message::Taken {
        key: key("a"),
        slot: 0,
        epoch: 1,
        readers: 1,
    };
    for late in [taken, Message::Done { transfer: 1 }] {
        holder.receive(now, READER, true, late).unwrap();
    }
    assert_eq!(holder.load(), (1, 1, 0, 0));
}

#[test]
fn a_rank_that_comes_behind_an_early_release_of_another_ends_the_hold_with_it() {
    let now = Instant::now();
    let mut holder = Holder::new(HolderLimits {
        readers: 2,
        ..limits()
    });
    let mut nothing = want_message(1, "a", 1);
    if let Message::Want { block_count, .. } = &mut nothing {
        *block_count = 0;
    }
    holder.receive(now, READER, true, nothing).unwrap();
    held(&mut holder, now, "r", "a", &[1]);
    want(&mut holder, now, 2, "a", 1);
    holder
        .receive(now, READER, true, Message::Done { transfer: 2 })
        .unwrap();
    assert_released(&mut holder);
}

fn assert_released(holder: &mut Holder) {
    let last = actions(holder).pop();
    let released = EndReason::Released;
    assert!(
        matches!(last, Some(HolderAction::Ended { reason, .. }) if reason == released),
        "{last:?}"
    );
    assert_eq!(holder.load(), (0, 0, 0, 0));
}
