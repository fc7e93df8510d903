//! Two workers and an asker in one process, over real sockets and real memory. The risk: parts that are right alone and
//! wrong together.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvlane_core::{BlockMap, Device, NamespaceId, PagedMemory, TensorView};
use kvlane_fs::HostCache;
use kvlane_p2p::proto::{
    Channel, DenyReason, EndReason, Frames, Hello, Identity, Link, LinkConfig, Message, Offer, Progress,
    PullResult, Role, Side, encode,
};
use kvlane_p2p::{
    Asked, AskerOptions, LaneChoice, P2pAsker, P2pWorker, PeerAddress, Prompt, PullOrder, TransferKey,
    WorkerOptions,
};
use kvlane_tests::timing::attempts;

const BLOCK_TOKENS: u32 = 16;
const LAYERS: usize = 3;
const BLOCKS: u32 = 24;
const PATIENCE: Duration = Duration::from_secs(10);

/// K and V in front of the blocks, or behind them: the payloads agree, the runs do not.
fn cache(outer_halves: bool) -> Arc<HostCache> {
    let (half, blocks) = (3000_u64, u64::from(BLOCKS));
    let bytes = 2 * half * blocks;
    let cache = HostCache::allocate(&[bytes as usize; LAYERS], |addresses| {
        let view = |(layer, &address): (usize, &u64)| {
            let (shape, strides) = if outer_halves {
                (
                    vec![2, blocks, 1, 1, half],
                    vec![(blocks * half) as i64, half as i64, half as i64, half as i64, 1],
                )
            } else {
                (vec![blocks, 2, half], vec![2 * half as i64, half as i64, 1])
            };
            TensorView {
                name: format!("layer.{layer}"),
                address,
                device: Device::Host,
                element_bytes: 1,
                shape,
                strides,
            }
        };
        BlockMap::from_tensors(addresses.iter().enumerate().map(view), BLOCKS, None).expect("accepted")
    });
    Arc::new(cache)
}

fn content(seed: u32, layer: usize, block: u32, bytes: usize) -> Vec<u8> {
    let mut state = u64::from(seed) << 32 ^ (layer as u64) << 16 ^ u64::from(block) ^ 0x9e37_79b9;
    std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as u8
    })
    .take(bytes)
    .collect()
}

fn fill(cache: &HostCache, seed: u32, blocks: impl IntoIterator<Item = u32>) {
    for block in blocks {
        for layer in 0..LAYERS {
            let bytes = cache.layer_bytes(layer);
            cache.write_layer(layer, block, &content(seed, layer, block, bytes));
        }
    }
}

fn layer_of(cache: &HostCache, layer: usize, block: u32) -> Vec<u8> {
    let mut bytes = vec![0; cache.layer_bytes(layer)];
    cache.read_layer(layer, block, &mut bytes);
    bytes
}

struct Pair {
    prefill: P2pWorker,
    decode: P2pWorker,
    asker: P2pAsker,
    source: Arc<HostCache>,
    target: Arc<HostCache>,
    address: PeerAddress,
}

fn pair_with(lane: LaneChoice, change: impl FnOnce(&mut WorkerOptions, &mut WorkerOptions)) -> Pair {
    let (source, target) = (cache(true), cache(false));
    let mut prefill = WorkerOptions::new("prefill", BLOCK_TOKENS);
    prefill.host = IpAddr::from([127, 0, 0, 1]);
    prefill.can_pull = false;
    let mut decode = WorkerOptions::new("decode", BLOCK_TOKENS);
    decode.can_offer = false;
    decode.lane = lane;
    change(&mut prefill, &mut decode);
    let namespace = NamespaceId([7; 32]);
    let mut asker = AskerOptions::new("decode");
    asker.peer.secret = decode.peer.secret.clone();
    let prefill = P2pWorker::open(Arc::clone(&source), namespace, prefill).expect("accepted");
    let address = PeerAddress::new("127.0.0.1", prefill.port().expect("accepted")).expect("accepted");
    Pair {
        decode: P2pWorker::open(Arc::clone(&target), namespace, decode).expect("accepted"),
        asker: P2pAsker::open(asker).expect("accepted"),
        prefill,
        source,
        target,
        address,
    }
}

fn pair(lane: LaneChoice) -> Pair {
    pair_with(lane, |_, _| {})
}

fn key(text: &str) -> TransferKey {
    TransferKey::new(text).expect("accepted")
}

fn prompt(blocks: u32) -> Prompt {
    Prompt {
        tokens: blocks * BLOCK_TOKENS - 3,
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

impl Pair {
    fn order(&self, text: &str, count: u32, first_block: u32, targets: &[u32]) -> PullOrder {
        PullOrder {
            address: self.address.clone(),
            key: key(text),
            prompt: prompt(count),
            first_block,
            targets: targets.to_vec(),
            readers: 1,
            timeout: PATIENCE,
        }
    }

    fn wait(&self, job: u64) -> PullResult {
        let result = self
            .decode
            .wait(job, Instant::now() + 2 * PATIENCE)
            .expect("accepted");
        result.expect("the pull ends")
    }

    fn asked(&self, text: &str, count: u32) -> Asked {
        let answer = self.asked_for(text, count, PATIENCE);
        assert_ne!(answer, Asked::Pending, "no answer");
        answer
    }

    /// `Pending`: for so long there was no answer.
    fn asked_for(&self, text: &str, count: u32, patience: Duration) -> Asked {
        let end = Instant::now() + patience;
        loop {
            let answer = self.asker.ask(&key(text), &self.address, prompt(count), PATIENCE);
            if answer != Asked::Pending || Instant::now() >= end {
                return answer;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until a layer of prefill's block, filled with `seed`, is in decode's block.
    fn until_arrived(&self, seed: u32, layer: usize, block: u32, target: u32) {
        let end = Instant::now() + PATIENCE;
        let wanted = content(seed, layer, block, self.source.layer_bytes(layer));
        while layer_of(&self.target, layer, target) != wanted {
            assert!(Instant::now() < end, "layer {layer} does not arrive early");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn ended(&self) -> Vec<(Arc<str>, EndReason)> {
        let end = Instant::now() + PATIENCE;
        loop {
            let ended = self.prefill.ended_holds();
            if !ended.is_empty() {
                return ended;
            }
            assert!(Instant::now() < end, "the hold never ends");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

const LANES: [LaneChoice; 2] = [LaneChoice::Shm, LaneChoice::Tcp];

#[test]
fn a_computed_prompt_is_asked_for_pulled_and_released() {
    for lane in LANES {
        let pair = pair(lane);
        let (blocks, targets) = ([3, 9, 4, 20], [8, 2, 11, 5]);
        fill(&pair.source, 1, 0..BLOCKS);
        fill(&pair.target, 2, 0..BLOCKS);
        assert!(
            pair.prefill
                .offer(offer("request-1", "a", &blocks))
                .expect("accepted")
        );
        assert_eq!(pair.asked("a", 4), Asked::Started);
        pair.prefill
            .progress(&[("request-1", done(4))])
            .expect("accepted");
        pair.prefill.finish(&"request-1".into()).expect("accepted");
        let job = pair
            .decode
            .pull(pair.order("a", 4, 0, &targets))
            .expect("accepted");
        assert_eq!(pair.wait(job), PullResult::Done, "{lane:?}");
        for layer in 0..LAYERS {
            let bytes = pair.target.layer_bytes(layer);
            for block in 0..BLOCKS {
                let expected = match targets.iter().position(|&target| target == block) {
                    Some(place) => content(1, layer, blocks[place], bytes),
                    None => content(2, layer, block, bytes),
                };
                assert!(
                    layer_of(&pair.target, layer, block) == expected,
                    "{lane:?} {layer} {block}"
                );
            }
        }
        assert_eq!(pair.ended(), [("request-1".into(), EndReason::Released)]);
    }
}

#[test]
fn who_asks_over_and_over_sees_every_end_once_and_right_bytes() {
    for lane in LANES {
        let pair = pair(lane);
        fill(&pair.source, 1, 0..BLOCKS);
        for round in 0..50 {
            let mut jobs = Vec::new();
            for block in 0..4 {
                let name = format!("{round} {block}");
                assert!(
                    pair.prefill
                        .offer(offer(&name, &name, &[block]))
                        .expect("accepted")
                );
                pair.prefill.progress(&[(&name, done(1))]).expect("accepted");
                pair.prefill.finish(&name.as_str().into()).expect("accepted");
                let order = pair.order(&name, 1, 0, &[20 - block]);
                jobs.push(pair.decode.pull(order).expect("accepted"));
            }
            // Nobody has it: its end is of another kind.
            let order = pair.order("nothing", 1, 0, &[22]);
            jobs.push(pair.decode.pull(order).expect("accepted"));
            pair.decode.cancel(jobs[4]);
            let (mut ended, end) = (Vec::new(), Instant::now() + PATIENCE);
            while ended.len() < jobs.len() {
                assert!(Instant::now() < end, "{ended:?} of {jobs:?} over {lane:?}");
                ended.extend(pair.decode.poll());
            }
            ended.sort_by_key(|pull| pull.job);
            assert_eq!(ended.iter().map(|pull| pull.job).collect::<Vec<_>>(), jobs);
            assert!(
                ended[..4].iter().all(|pull| pull.result == PullResult::Done),
                "{ended:?}"
            );
            assert!(pair.decode.poll().is_empty());
            for block in 0..4 {
                for layer in 0..LAYERS {
                    let bytes = pair.target.layer_bytes(layer);
                    let expected = content(1, layer, block, bytes);
                    assert!(
                        layer_of(&pair.target, layer, 20 - block) == expected,
                        "{lane:?} {layer} {block}"
                    );
                }
                fill(&pair.target, 2, [20 - block]);
            }
        }
        if lane == LaneChoice::Shm {
            assert_eq!(pair.decode.stats().takes, 0);
        }
    }
}

#[test]
fn a_small_prompt_that_is_taken_is_released_at_once_and_one_that_was_taken_back_is_not_taken() {
    let pair = pair(LaneChoice::Tcp);
    fill(&pair.source, 1, 0..BLOCKS);
    let hold = |name: &str| {
        assert!(pair.prefill.offer(offer(name, name, &[3])).expect("accepted"));
        pair.prefill.progress(&[(name, done(1))]).expect("accepted");
        pair.prefill.finish(&name.into()).expect("accepted");
    };
    let pull = |name: &str| {
        let job = pair.decode.pull(pair.order(name, 1, 0, &[5])).expect("accepted");
        pair.wait(job)
    };
    let end = Instant::now() + PATIENCE;
    for number in 0.. {
        assert!(Instant::now() < end, "no data connection for takes");
        let name = format!("{number}");
        hold(&name);
        assert_eq!(pull(&name), PullResult::Done);
        assert_eq!(pair.ended(), [(name.as_str().into(), EndReason::Released)]);
        if pair.decode.stats().takes == 3 {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    hold("back");
    assert!(pair.prefill.revoke("back").expect("accepted"));
    fill(&pair.target, 2, [5]);
    pair.prefill.give_up(&key("back")).expect("accepted");
    assert_eq!(pull("back"), PullResult::Denied(DenyReason::Gone));
    let bytes = pair.target.layer_bytes(0);
    assert!(layer_of(&pair.target, 0, 5) == content(2, 0, 5, bytes));
    assert_eq!(pair.decode.stats().takes, 3);
}

#[test]
fn layers_arrive_while_later_ones_are_computed() {
    for lane in LANES {
        let pair = pair(lane);
        assert!(pair.prefill.offer(offer("r", "a", &[1, 2])).expect("accepted"));
        let job = pair
            .decode
            .pull(pair.order("a", 3, 0, &[4, 5, 6]))
            .expect("accepted");
        // Another prompt length: the offer has two blocks of 29 tokens, the order is for 45.
        assert_eq!(pair.wait(job), PullResult::Denied(DenyReason::Mismatch));

        let job = pair
            .decode
            .pull(pair.order("a", 2, 0, &[4, 5]))
            .expect("accepted");
        let mut progress = Progress {
            done_blocks: 0,
            wave_blocks: 2,
            wave_layers: 0,
        };
        for layer in 0..LAYERS {
            let bytes = pair.source.layer_bytes(layer);
            for block in [1, 2] {
                pair.source
                    .write_layer(layer, block, &content(5, layer, block, bytes));
            }
            progress.wave_layers += 1;
            pair.prefill.progress(&[("r", progress)]).expect("accepted");
            pair.until_arrived(5, layer, 2, 5);
        }
        assert!(pair.decode.poll().is_empty(), "not done before prefill says so");
        pair.prefill.progress(&[("r", done(2))]).expect("accepted");
        assert_eq!(pair.wait(job), PullResult::Done);
        pair.prefill.finish(&"r".into()).expect("accepted");
        assert_eq!(pair.ended(), [("r".into(), EndReason::Released)]);
    }
}

#[test]
fn a_question_waits_for_its_prompt_and_another_prompt_is_no_answer() {
    let pair = pair(LaneChoice::Auto);
    assert_eq!(
        pair.asker.ask(&key("a"), &pair.address, prompt(2), PATIENCE),
        Asked::Pending
    );
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(
        pair.asker.ask(&key("a"), &pair.address, prompt(2), PATIENCE),
        Asked::Pending
    );
    pair.prefill.offer(offer("r", "a", &[1, 2])).expect("accepted");
    assert_eq!(pair.asked("a", 2), Asked::Started);
    pair.prefill.offer(offer("s", "b", &[3])).expect("accepted");
    assert_eq!(pair.asked("b", 2), Asked::Mismatch);
}

#[test]
fn revoked_blocks_never_count_and_are_not_reported_as_released() {
    for lane in LANES {
        let pair = pair(lane);
        pair.prefill.offer(offer("r", "a", &[1, 2])).expect("accepted");
        let job = pair
            .decode
            .pull(pair.order("a", 2, 0, &[4, 5]))
            .expect("accepted");
        fill(&pair.source, 5, [1]);
        pair.prefill.progress(&[("r", done(1))]).expect("accepted");
        pair.until_arrived(5, 0, 1, 4);
        pair.prefill.revoke("r").expect("accepted");
        assert_eq!(pair.wait(job), PullResult::Lapsed, "{lane:?}");
        assert!(pair.prefill.ended_holds().is_empty());
        assert_eq!(pair.prefill.stats().holds.get(&EndReason::Revoked), Some(&1));
        pair.prefill.revoke("r").expect("accepted");
        assert_eq!(
            pair.prefill.stats().holds.get(&EndReason::Revoked),
            Some(&1),
            "it is known no more"
        );
        let job = pair
            .decode
            .pull(pair.order("a", 2, 0, &[4, 5]))
            .expect("accepted");
        assert_eq!(pair.wait(job), PullResult::Denied(DenyReason::Gone));
    }
}

#[test]
fn a_hold_that_nobody_wants_expires() {
    attempts(|| {
        let pair = pair_with(LaneChoice::Auto, |prefill, _| {
            prefill.lease = Duration::from_secs(1)
        });
        pair.prefill.offer(offer("r", "a", &[1, 2])).expect("accepted");
        pair.prefill.progress(&[("r", done(2))]).expect("accepted");
        let start = Instant::now();
        pair.prefill.finish(&"r".into()).expect("accepted");
        assert_eq!(pair.ended(), [("r".into(), EndReason::Expired)]);
        assert!(start.elapsed() >= Duration::from_secs(1));
        // For as long again nobody waits for it. Who asks later does.
        match pair.asked_for("a", 2, Duration::from_secs(2)) {
            Asked::None => Ok(()),
            Asked::Pending => Err("a question about it waits".to_owned()),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_full_local_hit_releases_the_hold() {
    let pair = pair(LaneChoice::Auto);
    pair.prefill.offer(offer("r", "a", &[1, 2])).expect("accepted");
    pair.prefill.progress(&[("r", done(2))]).expect("accepted");
    pair.prefill.finish(&"r".into()).expect("accepted");
    pair.decode.release(&pair.address, key("a"), prompt(2), 1);
    assert_eq!(pair.ended(), [("r".into(), EndReason::Released)]);
}

#[test]
fn a_prefill_server_that_ends_makes_pulls_and_questions_unreachable() {
    for lane in LANES {
        let pair = pair(lane);
        pair.prefill.offer(offer("r", "a", &[1, 2])).expect("accepted");
        let job = pair
            .decode
            .pull(pair.order("a", 2, 0, &[4, 5]))
            .expect("accepted");
        pair.asker.ask(&key("never"), &pair.address, prompt(2), PATIENCE);
        std::thread::sleep(Duration::from_millis(50));
        pair.prefill.close();
        assert_eq!(pair.wait(job), PullResult::Unreachable);
        assert_eq!(pair.asked("never", 2), Asked::Unreachable);
        let start = Instant::now();
        let job = pair
            .decode
            .pull(pair.order("a", 2, 0, &[4, 5]))
            .expect("accepted");
        assert_eq!(pair.wait(job), PullResult::Unreachable);
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn a_prefill_server_that_ends_gives_all_its_holds_back_and_takes_no_more() {
    let pair = pair(LaneChoice::Auto);
    pair.prefill.offer(offer("r", "a", &[1, 2])).expect("accepted");
    pair.prefill.offer(offer("s", "b", &[3])).expect("accepted");
    pair.prefill.finish(&"r".into()).expect("accepted");
    pair.prefill.close();
    assert_eq!(pair.prefill.ended_holds(), [("r".into(), EndReason::Closed)]);
    pair.prefill.finish(&"s".into()).expect("accepted");
    assert_eq!(pair.prefill.ended_holds(), [("s".into(), EndReason::Closed)]);
    assert!(!pair.prefill.offer(offer("t", "c", &[4])).expect("accepted"));
    pair.prefill.finish(&"t".into()).expect("accepted");
    assert_eq!(pair.prefill.ended_holds(), [("t".into(), EndReason::Dropped)]);
    assert_eq!(pair.prefill.stats().held_requests, 0);
}

#[test]
fn another_secret_or_namespace_pulls_nothing() {
    let secret = |text: &str| Some(text.as_bytes().to_vec());
    let pair = pair_with(LaneChoice::Auto, |prefill, decode| {
        prefill.peer.secret = secret("one");
        decode.peer.secret = secret("two");
    });
    pair.prefill.offer(offer("r", "a", &[1, 2])).expect("accepted");
    let job = pair
        .decode
        .pull(pair.order("a", 2, 0, &[4, 5]))
        .expect("accepted");
    assert_eq!(pair.wait(job), PullResult::Unreachable);
    assert_eq!(pair.asked("a", 2), Asked::Unreachable);

    let pair = pair_with(LaneChoice::Auto, |prefill, decode| {
        prefill.peer.secret = secret("one");
        decode.peer.secret = secret("one");
    });
    pair.prefill.offer(offer("r", "a", &[1, 2])).expect("accepted");
    pair.prefill.progress(&[("r", done(2))]).expect("accepted");
    let job = pair
        .decode
        .pull(pair.order("a", 2, 0, &[4, 5]))
        .expect("accepted");
    assert_eq!(pair.wait(job), PullResult::Done);
    let mut options = WorkerOptions::new("stranger", BLOCK_TOKENS);
    options.can_offer = false;
    options.peer.secret = secret("one");
    let stranger = P2pWorker::open(cache(false), NamespaceId([8; 32]), options).expect("accepted");
    let job = stranger.pull(pair.order("a", 2, 0, &[4, 5])).expect("accepted");
    let result = stranger.wait(job, Instant::now() + PATIENCE).expect("accepted");
    assert_eq!(result, Some(PullResult::Denied(DenyReason::Namespace)));
}

#[test]
fn a_cancelled_pull_ends_and_releases_the_hold() {
    for lane in LANES {
        let pair = pair(lane);
        pair.prefill.offer(offer("r", "a", &[1, 2])).expect("accepted");
        let job = pair
            .decode
            .pull(pair.order("a", 2, 0, &[4, 5]))
            .expect("accepted");
        std::thread::sleep(Duration::from_millis(30));
        pair.decode.cancel(job);
        assert_eq!(pair.wait(job), PullResult::Cancelled);
        pair.prefill.finish(&"r".into()).expect("accepted");
        assert_eq!(pair.ended(), [("r".into(), EndReason::Released)]);
    }
}

#[test]
fn misuse_is_refused_with_a_sentence() {
    let pair = pair(LaneChoice::Auto);
    let too_high = pair.decode.pull(pair.order("a", 2, 0, &[4, BLOCKS])).unwrap_err();
    assert!(too_high.to_string().contains("below 24"), "{too_high}");
    assert!(pair.decode.pull(pair.order("a", 2, 0, &[4, 4])).is_err());
    assert!(pair.decode.pull(pair.order("a", 2, 1, &[4, 5])).is_err());
    assert!(pair.prefill.pull(pair.order("a", 2, 0, &[4])).is_err());
    assert!(pair.decode.offer(offer("r", "a", &[1])).is_err());
    assert!(pair.decode.wait(77, Instant::now()).is_err());
}

#[test]
fn what_does_not_speak_the_protocol_is_cut_off_and_others_are_served() {
    use std::io::{Read, Write};

    let pair = pair_with(LaneChoice::Auto, |prefill, _| {
        prefill.peer.connect_timeout = Duration::from_millis(300);
    });
    let frame = |length: u32, body: &[u8]| {
        let mut bytes = kvlane_p2p::proto::Frames::preamble().to_vec();
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(body);
        bytes
    };
    let strangers: [(&str, Vec<u8>); 7] = [
        ("another protocol", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("another version", b"kvlane\xff\x00".to_vec()),
        ("a frame of 4 GiB", frame(u32::MAX, b"")),
        ("an empty frame", frame(0, b"")),
        ("no message", frame(3, &[0xff, 0xff, 0xff])),
        ("a message before the handshake", frame(1, &[4])),
        ("half a preamble and silence", b"kvl".to_vec()),
    ];
    for (what, bytes) in strangers {
        let mut stream =
            std::net::TcpStream::connect((pair.address.host(), pair.address.port())).expect("a port");
        stream.write_all(&bytes).expect("sent");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut answer = Vec::new();
        // What comes is a preamble and maybe a reason, then the end of the connection, by a reset or without.
        match stream.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{what}"),
        }
        assert!(answer.len() < 200, "{what}: {answer:?}");
    }
    pair.prefill.offer(offer("r", "a", &[1, 2])).expect("accepted");
    pair.prefill.progress(&[("r", done(2))]).expect("accepted");
    // Under load a handshake may take longer than this prefill server waits for one.
    let end = Instant::now() + PATIENCE;
    let result = loop {
        let order = pair.order("a", 2, 0, &[4, 5]);
        let began = Instant::now();
        let result = pair.wait(pair.decode.pull(order).expect("accepted"));
        // Cut off at once it was not waited for at all.
        let was_late = result == PullResult::Unreachable && began.elapsed() >= Duration::from_millis(300);
        if !was_late || Instant::now() >= end {
            break result;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(result, PullResult::Done);
}

/// A peer that has shaken hands, and what it says from then on.
fn shaken_hands(pair: &Pair) -> TcpStream {
    let identity = Identity {
        engine_id: "stranger".into(),
        start_id: [9; 16],
        rank: 0,
        secret: None,
    };
    let config = LinkConfig {
        identity: Arc::new(identity),
        role: Role::Puller,
        hello: Hello {
            channel: Channel::Control,
            namespace: [1; 32],
            facts: Vec::new(),
            block_tokens: BLOCK_TOKENS,
            cache: None,
            probe: None,
            device: None,
            nccl: None,
        },
        handshake_timeout: PATIENCE,
        heartbeat: PATIENCE,
        peer_timeout: PATIENCE,
    };
    let mut link = Link::new(Side::Dialling, config, [3; 32], Instant::now());
    let address = ("127.0.0.1", pair.prefill.port().expect("it listens"));
    let mut stream = TcpStream::connect(address).expect("it listens");
    let (mut frames, mut bytes) = (Frames::new(), Frames::preamble().to_vec());
    while !link.is_ready() {
        for message in link.take_outgoing(Instant::now()) {
            encode(&message, &mut bytes);
        }
        stream.write_all(&bytes).expect("it reads");
        bytes.clear();
        let mut received = [0; 4096];
        let count = stream.read(&mut received).expect("it answers");
        assert!(count > 0, "it refused the handshake");
        frames.push(&received[..count]);
        while let Some(message) = frames.next_message().expect("well formed") {
            link.receive(Instant::now(), message).expect("a right handshake");
        }
    }
    for message in link.take_outgoing(Instant::now()) {
        encode(&message, &mut bytes);
    }
    stream.write_all(&bytes).expect("it reads");
    stream
}

#[test]
fn a_peer_that_never_stops_talking_does_not_keep_the_engine_waiting() {
    attempts(|| {
        let pair = pair(LaneChoice::Auto);
        let mut stream = shaken_hands(&pair);
        let is_over = Arc::new(AtomicBool::new(false));
        let flood = std::thread::spawn({
            let is_over = Arc::clone(&is_over);
            move || {
                let mut pings = Vec::new();
                (0..10_000).for_each(|_| encode(&Message::Ping, &mut pings));
                let mut sent_bytes = 0;
                // An error: it was cut off, which is as good.
                while !is_over.load(Ordering::Relaxed) && stream.write_all(&pings).is_ok() {
                    sent_bytes += pings.len();
                }
                sent_bytes
            }
        });
        let end = Instant::now() + Duration::from_secs(2);
        let (mut calls, mut longest) = (0, Duration::ZERO);
        while Instant::now() < end {
            let start = Instant::now();
            pair.prefill.progress(&[("nothing", done(1))]).expect("accepted");
            longest = longest.max(start.elapsed());
            calls += 1;
            std::thread::sleep(Duration::from_millis(1));
        }
        is_over.store(true, Ordering::Relaxed);
        let sent_bytes = flood.join().expect("no panic");
        let told = format!("{calls} calls, the longest took {longest:?}, during {sent_bytes} bytes");
        println!("{told}");
        if sent_bytes > 1 << 20 && longest < Duration::from_millis(500) {
            Ok(())
        } else {
            Err(told)
        }
    });
}

#[test]
fn the_end_of_a_revoked_hold_is_never_told_of_the_next_one_with_its_name() {
    let pair = pair(LaneChoice::Auto);
    let hold: Arc<str> = "key".into();
    pair.prefill.offer(offer("key", "a", &[1, 2])).expect("accepted");
    pair.prefill.progress(&[("key", done(2))]).expect("accepted");
    pair.prefill.finish(&hold).expect("accepted");
    let job = pair
        .decode
        .pull(pair.order("a", 2, 0, &[4, 5]))
        .expect("accepted");
    assert_eq!(pair.wait(job), PullResult::Done);
    // The end of the first hold is known by now, and nobody has asked for it.
    let end = Instant::now() + PATIENCE;
    while pair.prefill.stats().held_requests > 0 {
        assert!(Instant::now() < end, "the hold never ends");
        std::thread::sleep(Duration::from_millis(1));
    }
    pair.prefill.revoke("key").expect("accepted");
    pair.prefill.offer(offer("key", "a", &[7, 8])).expect("accepted");
    pair.prefill.progress(&[("key", done(2))]).expect("accepted");
    pair.prefill.finish(&hold).expect("accepted");
    assert!(pair.prefill.ended_holds().is_empty(), "the second hold is alive");
}

#[test]
fn a_peer_that_is_not_used_makes_room_for_another_and_one_in_use_does_not() {
    for (unused, expected) in [
        (Duration::ZERO, PullResult::Done),
        (Duration::from_secs(3600), PullResult::Unreachable),
    ] {
        let pair = pair_with(LaneChoice::Auto, |_, decode| {
            decode.peer.peers = 1;
            decode.peer.peer_unused = unused;
        });
        let other = self::pair(LaneChoice::Auto);
        for prefill in [&pair.prefill, &other.prefill] {
            prefill.offer(offer("r", "a", &[1, 2])).expect("accepted");
            prefill.progress(&[("r", done(2))]).expect("accepted");
        }
        let job = pair
            .decode
            .pull(pair.order("a", 2, 0, &[4, 5]))
            .expect("accepted");
        assert_eq!(pair.wait(job), PullResult::Done);
        let job = pair
            .decode
            .pull(other.order("a", 2, 0, &[4, 5]))
            .expect("accepted");
        assert_eq!(pair.wait(job), expected, "{unused:?}");
        assert_eq!(pair.decode.stats().peers, 1);
    }
}
