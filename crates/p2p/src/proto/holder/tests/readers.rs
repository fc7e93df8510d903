//! Readers of an engine with several ranks, and with blocks of another size.

use super::*;

fn want_of(transfer: u64, count: u32, block_tokens: u32, readers: u32) -> Message {
    Message::Want {
        transfer,
        key: key("a"),
        prompt: prompt(6),
        first_block: if count == 0 { 0 } else { 1 },
        block_count: count,
        block_tokens,
        readers,
    }
}

#[test]
fn as_many_ranks_must_release_a_hold_as_one_of_them_has_said() {
    let released = HolderAction::Ended {
        hold: "r".into(),
        reason: EndReason::Released,
    };
    let blocks = [1, 2, 3, 4, 5, 6];
    let (done, cancel) = (Message::Done { transfer: 1 }, Message::Cancel { transfer: 1 });
    let other = ConnectionId(2);
    // However the first one ends: done, cancelled, gone, or without a wish.
    for first in [Some(done), Some(cancel), None] {
        let now = Instant::now();
        let mut holder = Holder::new(limits());
        held(&mut holder, now, "r", "a", &blocks);
        holder.receive(now, READER, true, want_of(1, 5, 4, 2)).unwrap();
        match first {
            Some(end) => holder.receive(now, READER, true, end).unwrap(),
            None => holder.closed(now, READER),
        }
        assert!(
            !actions(&mut holder).contains(&released),
            "the other rank has not come yet"
        );
        holder.receive(now, other, true, want_of(1, 0, 4, 2)).unwrap();
        assert!(actions(&mut holder).contains(&released));
        assert_eq!(holder.load(), (0, 0, 0, 0));
    }
    // What was said before the request was here counts too, and outlasts a preemption.
    let now = Instant::now();
    let mut holder = Holder::new(limits());
    holder.receive(now, READER, true, want_of(1, 0, 4, 2)).unwrap();
    for _ in 0..2 {
        assert!(holder.offer(now, offer("r", "a", &blocks)));
        actions(&mut holder);
        assert!(holder.revoke(now, "r"));
    }
    held(&mut holder, now, "r", "a", &blocks);
    assert!(!actions(&mut holder).contains(&released));
    holder.receive(now, other, true, want_of(1, 0, 4, 2)).unwrap();
    assert!(actions(&mut holder).contains(&released));
}

#[test]
fn wants_of_no_ranks_of_too_many_or_of_blocks_without_tokens_break_the_protocol() {
    let now = Instant::now();
    for (block_tokens, readers) in [(0, 1), (4, 0), (4, READERS_MAX + 1), (4, u32::MAX)] {
        let mut holder = Holder::new(limits());
        let refused = holder.receive(now, READER, true, want_of(1, 1, block_tokens, readers));
        assert!(refused.is_err(), "{block_tokens} tokens, {readers} readers");
        let taken = Message::Taken {
            key: key("a"),
            slot: 0,
            epoch: 1,
            readers,
        };
        assert_eq!(
            holder.receive(now, READER, true, taken).is_err(),
            block_tokens > 0,
            "{readers}"
        );
    }
}

#[test]
fn a_reader_with_blocks_of_another_size_is_told_of_the_blocks_that_its_own_lie_in() {
    let now = Instant::now();
    // Six blocks of four tokens: of eight, the reader wants the second and third.
    for (block_tokens, count, expected) in [
        (8, 2, &[3, 4, 5, 6][..]),
        (3, 2, &[1, 2, 3]),
        (24, 1, &[]),
        (8, 3, &[]),
    ] {
        let mut holder = Holder::new(limits());
        held(&mut holder, now, "r", "a", &[1, 2, 3, 4, 5, 6]);
        actions(&mut holder);
        holder
            .receive(now, READER, true, want_of(1, count, block_tokens, 1))
            .unwrap();
        let named: Vec<u32> = told(&mut holder)
            .into_iter()
            .flat_map(|message| match message {
                Message::Ready { blocks, .. } => blocks,
                Message::Deny { reason, .. } => {
                    assert_eq!(reason, DenyReason::Range);
                    Vec::new()
                }
                _ => Vec::new(),
            })
            .collect();
        assert_eq!(named, expected, "{count} blocks of {block_tokens} tokens");
    }
}
