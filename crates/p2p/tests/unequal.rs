//! Workers whose blocks have different sizes and whose ranks have different heads. The risk: a byte that is put where another
//! token's or head's belongs, which no checksum would notice.
//!
//! Every element says which layer, token and head it is of. `KVLANE_PAIRS` sets the number of pairs of servers, `KVLANE_SEED`
//! the first seed.

use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_core::{BlockMap, Device, NamespaceId, PagedMemory, TensorView};
use kvlane_fs::HostCache;
use kvlane_p2p::proto::{DenyReason, Offer, Progress, PullResult};
use kvlane_p2p::shape::{Axes, CacheShape};
use kvlane_p2p::{LaneChoice, P2pWorker, PeerAddress, Prompt, PullOrder, TransferKey, WorkerOptions};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

const LAYERS: usize = 2;
const WIDTH: u64 = 3;
const ELEMENT_BYTES: usize = 2;
const PATIENCE: Duration = Duration::from_secs(20);

/// How vLLM's backends lay out a layer: shapes in their order, and the order in memory where it is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// `(2, blocks, tokens, heads, width)`
    KvOutermost,
    /// `(2, blocks, heads, tokens, width)`
    KvOutermostHeadsFirst,
    /// `(blocks, 2, tokens, heads, width)`
    KvInside,
    /// `(blocks, heads, tokens, 2 * width)`
    Packed,
    /// The same, with tokens in front of heads in memory.
    PackedTokensFirst,
    /// The same as `Packed`, with all layers of a block behind each other.
    BlockOutermost,
    /// `(blocks, tokens, width)`: no heads.
    Latent,
}

const FORMS: [Form; 7] = [
    Form::KvOutermost,
    Form::KvOutermostHeadsFirst,
    Form::KvInside,
    Form::Packed,
    Form::PackedTokensFirst,
    Form::BlockOutermost,
    Form::Latent,
];

impl Form {
    fn axes(self) -> Axes {
        let (tokens, heads) = match self {
            Form::KvOutermost | Form::KvInside => (2, Some(3)),
            Form::KvOutermostHeadsFirst => (3, Some(2)),
            Form::Packed | Form::PackedTokensFirst | Form::BlockOutermost => (2, Some(1)),
            Form::Latent => (1, None),
        };
        Axes {
            tokens,
            are_tokens_packed: false,
            heads,
        }
    }

    /// The shape, and the dimensions from the outermost to the innermost in memory.
    fn shape(self, blocks: u64, tokens: u64, heads: u64) -> (Vec<u64>, Vec<usize>) {
        match self {
            Form::KvOutermost => (vec![2, blocks, tokens, heads, WIDTH], vec![0, 1, 2, 3, 4]),
            Form::KvOutermostHeadsFirst => (vec![2, blocks, heads, tokens, WIDTH], vec![0, 1, 2, 3, 4]),
            Form::KvInside => (vec![blocks, 2, tokens, heads, WIDTH], vec![0, 1, 2, 3, 4]),
            Form::Packed | Form::BlockOutermost => (vec![blocks, heads, tokens, 2 * WIDTH], vec![0, 1, 2, 3]),
            Form::PackedTokensFirst => (vec![blocks, heads, tokens, 2 * WIDTH], vec![0, 2, 1, 3]),
            Form::Latent => (vec![blocks, tokens, WIDTH], vec![0, 1, 2]),
        }
    }
}

/// One worker's cache.
struct Side {
    form: Form,
    block_tokens: u32,
    /// Kernel blocks of a block.
    split: u32,
    blocks: u32,
    heads: Range<u32>,
    cache: Arc<HostCache>,
}

impl Side {
    fn new(form: Form, block_tokens: u32, split: u32, blocks: u32, heads: Range<u32>) -> Self {
        let (shape, order) = form.shape(
            u64::from(blocks * split),
            u64::from(block_tokens / split),
            heads.len() as u64,
        );
        let elements: u64 = shape.iter().product();
        let mut strides = vec![0; shape.len()];
        let mut step = 1;
        for &dim in order.iter().rev() {
            strides[dim] = step;
            step *= shape[dim] as i64;
        }
        let is_packed = form == Form::BlockOutermost;
        let layer_elements = strides[0]; // of a kernel block, where it is the outermost dimension
        if is_packed {
            strides[0] *= LAYERS as i64;
        }
        let layer_bytes = elements as usize * ELEMENT_BYTES;
        let sizes = if is_packed {
            vec![layer_bytes * LAYERS]
        } else {
            vec![layer_bytes; LAYERS]
        };
        let cache = HostCache::allocate(&sizes, |addresses| {
            let views = (0..LAYERS).map(|layer| TensorView {
                name: format!("layer.{layer}"),
                address: if is_packed {
                    addresses[0] + layer as u64 * layer_elements as u64 * ELEMENT_BYTES as u64
                } else {
                    addresses[layer]
                },
                device: Device::Host,
                element_bytes: ELEMENT_BYTES as u32,
                shape: shape.clone(),
                strides: strides.clone(),
            });
            BlockMap::from_tensors(views, blocks, None).expect("accepted")
        });
        Self {
            form,
            block_tokens,
            split,
            blocks,
            heads,
            cache: Arc::new(cache),
        }
    }

    fn shape(&self, tensor_ranks: u32) -> CacheShape {
        let axes = [self.form.axes(); LAYERS];
        CacheShape::of(
            self.cache.map(),
            self.block_tokens,
            self.heads.clone(),
            tensor_ranks,
            &axes,
        )
        .expect("it fits")
    }

    /// For each element of a block in a layer: the token in the block, the head of the model, and the rest.
    fn places(&self, layer: usize) -> Vec<(u32, u32, u64)> {
        let region = &self.cache.map().regions()[layer];
        let (axes, tokens) = (self.form.axes(), self.block_tokens / self.split);
        let count = region.layer_bytes() / ELEMENT_BYTES;
        let place = |mut element: usize| {
            let (mut token, mut head, mut rest) = (0, self.heads.start, 0);
            for digit in region.digits.iter().rev() {
                let value = (element % digit.size) as u32;
                element /= digit.size;
                match digit.dim {
                    None => token += value * tokens,
                    Some(dim) if dim == axes.tokens => token += value,
                    Some(dim) if Some(dim) == axes.heads => head += value,
                    Some(dim) => rest += u64::from(value) << (8 * dim),
                }
            }
            (token, head, rest)
        };
        (0..count).map(place).collect()
    }

    fn write(&self, layer: usize, block: u32, element: impl Fn((u32, u32, u64)) -> u16) {
        let bytes: Vec<u8> = self
            .places(layer)
            .into_iter()
            .flat_map(|place| element(place).to_le_bytes())
            .collect();
        self.cache.write_layer(layer, block, &bytes);
    }

    fn read(&self, layer: usize, block: u32) -> Vec<u16> {
        let mut bytes = vec![0; self.cache.layer_bytes(layer)];
        self.cache.read_layer(layer, block, &mut bytes);
        bytes
            .chunks_exact(2)
            .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
            .collect()
    }
}

/// What an element holds.
fn element(layer: usize, token: u32, head: u32, rest: u64) -> u16 {
    let mixed = (layer as u64) << 50 ^ u64::from(token) << 34 ^ u64::from(head) << 26 ^ rest;
    (mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 44) as u16 | 1
}

struct Rank {
    side: Side,
    worker: P2pWorker,
}

fn ranks(
    form: Form,
    (block_tokens, split, blocks): (u32, u32, u32),
    (heads, size): (u32, u32),
    mut change: impl FnMut(&mut WorkerOptions),
) -> Vec<Rank> {
    let rank = |number| {
        let own = heads_of_rank(form, heads, number, size);
        let side = Side::new(form, block_tokens, split, blocks, own);
        let mut options = WorkerOptions::new(format!("rank {number}"), block_tokens);
        options.host = IpAddr::from([127, 0, 0, 1]);
        options.shape = Some(side.shape(size));
        change(&mut options);
        let worker =
            P2pWorker::open(Arc::clone(&side.cache), NamespaceId([7; 32]), options).expect("accepted");
        Rank { side, worker }
    };
    (0..size).map(rank).collect()
}

/// As vLLM shares out heads: with more ranks than heads, neighbours have the same one.
fn heads_of_rank(form: Form, heads: u32, rank: u32, size: u32) -> Range<u32> {
    match heads / size {
        _ if form == Form::Latent => 0..1,
        0 => rank * heads / size..rank * heads / size + 1,
        count => rank * count..(rank + 1) * count,
    }
}

/// The ranks of prefill that each rank of decode reads, so that every head comes once.
fn read_by_each(prefill: &[Rank], decode: &[Rank]) -> Vec<Vec<usize>> {
    let of = |(number, rank): (usize, &Rank)| {
        let mut ranges: Vec<(Range<u32>, Vec<usize>)> = Vec::new();
        for (peer, source) in prefill.iter().enumerate() {
            if !overlap(&rank.side.heads, &source.side.heads) {
                continue;
            }
            match ranges.iter_mut().find(|(heads, _)| *heads == source.side.heads) {
                Some((_, peers)) => peers.push(peer),
                None => ranges.push((source.side.heads.clone(), vec![peer])),
            }
        }
        ranges
            .into_iter()
            .map(|(_, peers)| peers[number % peers.len()])
            .collect()
    };
    decode.iter().enumerate().map(of).collect()
}

fn shuffled(random: &mut StdRng, blocks: u32, count: u32) -> Vec<u32> {
    let mut all: Vec<u32> = (0..blocks).collect();
    all.shuffle(random);
    all.truncate(count as usize);
    all
}

fn overlap(a: &Range<u32>, b: &Range<u32>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

/// One prompt from a prefill server to a decode server.
fn transfer(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let form = FORMS[random.random_range(0..FORMS.len())];
    let sizes = |random: &mut StdRng| {
        let split = [1, 1, 2, 3][random.random_range(0..4)];
        (split * [2, 4, 6, 8][random.random_range(0..4)], split)
    };
    let (prefill_size, decode_size) = (sizes(&mut random), sizes(&mut random));
    let heads = [1, 2, 4][random.random_range(0..3)];
    let size = |random: &mut StdRng| {
        // More ranks than heads too.
        [1, 2, 4][random.random_range(0..3)]
    };
    let (prefill_ranks, decode_ranks) = (size(&mut random), size(&mut random));
    let lane = if random.random_bool(0.5) {
        LaneChoice::Shm
    } else {
        LaneChoice::Tcp
    };
    let case = format!(
        "seed {seed}: {form:?} over {lane:?}, {heads} heads, prefill {prefill_size:?} x {prefill_ranks}, decode \
         {decode_size:?} x {decode_ranks}"
    );
    let prefill = ranks(
        form,
        (prefill_size.0, prefill_size.1, 40),
        (heads, prefill_ranks),
        |options| {
            options.can_pull = false;
        },
    );
    let decode = ranks(
        form,
        (decode_size.0, decode_size.1, 40),
        (heads, decode_ranks),
        |options| {
            options.can_offer = false;
            options.lane = lane;
            options.copy_threads = 2;
        },
    );
    let most = 20 * prefill_size.0.min(decode_size.0);
    let prompt = Prompt {
        tokens: random.random_range(2..=most),
        digest: [3; 32],
    };
    let key = TransferKey::new("key").expect("accepted");
    let count = prompt.block_count(prefill_size.0);
    let sources = shuffled(&mut random, 40, count);
    for rank in &prefill {
        for (index, &block) in (0..).zip(&sources) {
            for layer in 0..LAYERS {
                let first = index * prefill_size.0;
                rank.side.write(layer, block, |(token, head, rest)| {
                    element(layer, first + token, head, rest)
                });
            }
        }
        let offer = Offer {
            hold: "hold".into(),
            key: key.clone(),
            prompt,
            blocks: sources.clone(),
        };
        assert!(rank.worker.offer(offer).expect("accepted"), "{case}");
    }
    let progress = |done_blocks: u32, wave_blocks, wave_layers| {
        let progress = Progress {
            done_blocks,
            wave_blocks,
            wave_layers,
        };
        for rank in &prefill {
            rank.worker.progress(&[("hold", progress)]).expect("accepted");
        }
    };
    // Some of it before the pull, some layers of the rest, and then all: or all before.
    let done = random.random_range(0..=count);
    progress(done, done, 0);
    let decode_count = prompt.block_count(decode_size.0);
    let first_block = random.random_range(0..decode_count);
    let targets = shuffled(&mut random, 40, decode_count - first_block);
    let mut jobs = Vec::new();
    let read = read_by_each(&prefill, &decode);
    let address = |rank: &Rank| {
        PeerAddress::new("127.0.0.1", rank.worker.port().expect("it listens")).expect("accepted")
    };
    for (peer, source) in prefill.iter().enumerate() {
        if read.iter().all(|peers| !peers.contains(&peer)) {
            // It has what others have too.
            decode[0].worker.release(&address(source), key.clone(), prompt, 1);
        }
    }
    for (rank, peers) in decode.iter().zip(&read) {
        for &peer in peers {
            let source = &prefill[peer];
            let readers = read.iter().filter(|peers| peers.contains(&peer));
            let order = PullOrder {
                address: address(source),
                key: key.clone(),
                prompt,
                first_block,
                targets: targets.clone(),
                readers: readers.count() as u32,
                timeout: PATIENCE,
            };
            jobs.push((&rank.worker, rank.worker.pull(order).expect("accepted")));
        }
    }
    if random.random_bool(0.5) {
        std::thread::sleep(Duration::from_millis(20)); // connections are there by now, as a rule
    }
    progress(done, count, 1);
    progress(count, count, 0);
    for rank in &prefill {
        rank.worker.finish(&"hold".into()).expect("accepted");
    }
    for (worker, job) in jobs {
        let result = worker.wait(job, Instant::now() + 2 * PATIENCE).expect("accepted");
        assert_eq!(result, Some(PullResult::Done), "{case}");
    }
    for rank in &decode {
        for block in 0..rank.side.blocks {
            let index = targets.iter().position(|&target| target == block);
            for layer in 0..LAYERS {
                let found = rank.side.read(layer, block);
                for (&(token, head, rest), &found) in rank.side.places(layer).iter().zip(&found) {
                    let token = index.map(|index| (first_block + index as u32) * decode_size.0 + token);
                    match token {
                        None => assert_eq!(found, 0, "{case}: block {block} is not of the pull"),
                        Some(token) if token < prompt.tokens => {
                            let expected = element(layer, token, head, rest);
                            assert_eq!(
                                found, expected,
                                "{case}: layer {layer}, token {token}, head {head}"
                            );
                        }
                        Some(_) => {} // behind the prompt
                    }
                }
            }
        }
    }
    // All ranks have said that they have theirs, so nobody waits for the lease's end.
    let end = Instant::now() + PATIENCE;
    for rank in &prefill {
        while rank.worker.ended_holds().is_empty() {
            assert!(Instant::now() < end, "{case}: it is still held");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn every_token_and_head_arrives_where_it_belongs_whatever_the_sizes_of_blocks_and_ranks() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let first = number("KVLANE_SEED").unwrap_or(1);
    let seeds = first..first + number("KVLANE_PAIRS").unwrap_or(150);
    println!("seeds {seeds:?}");
    seeds.for_each(transfer);
}

/// Pulls one block between two single workers.
fn pull_between(source: &Rank, decode: &Rank) -> PullResult {
    let order = PullOrder {
        address: PeerAddress::new("127.0.0.1", source.worker.port().expect("it listens")).expect("accepted"),
        key: TransferKey::new("key").expect("accepted"),
        prompt: Prompt {
            tokens: 4,
            digest: [3; 32],
        },
        first_block: 0,
        targets: vec![1],
        readers: 1,
        timeout: PATIENCE,
    };
    let job = decode.worker.pull(order).expect("accepted");
    let ended = decode
        .worker
        .wait(job, Instant::now() + 2 * PATIENCE)
        .expect("accepted");
    ended.expect("the pull ends")
}

#[test]
fn caches_with_another_order_of_bytes_and_ranks_with_other_heads_are_refused() {
    let one = |form, sizes, heads| ranks(form, sizes, heads, |_| {});
    let decode = one(Form::Packed, (4, 1, 4), (2, 1));
    let refused = PullResult::Denied(DenyReason::Namespace);
    for form in [Form::PackedTokensFirst, Form::KvInside, Form::Latent] {
        let prefill = one(form, (8, 1, 4), (2, 1));
        assert_eq!(pull_between(&prefill[0], &decode[0]), refused, "{form:?}");
    }
    // As many bytes in a block, but of the other heads.
    let (left, right) = (
        one(Form::Packed, (4, 1, 4), (2, 2)),
        one(Form::Packed, (4, 1, 4), (2, 2)),
    );
    assert_eq!(pull_between(&left[0], &right[1]), refused);
    // Nothing is held, but the two fit.
    assert_eq!(
        pull_between(&left[0], &right[0]),
        PullResult::Denied(DenyReason::Gone)
    );
}

#[test]
fn servers_that_do_not_say_what_their_blocks_hold_meet_only_their_like() {
    let silent = |sizes| ranks(Form::Packed, sizes, (1, 1), |options| options.shape = None);
    let decode = silent((4, 1, 4));
    assert_eq!(
        pull_between(&silent((8, 1, 4))[0], &decode[0]),
        PullResult::Denied(DenyReason::Namespace)
    );
    assert_eq!(
        pull_between(&silent((4, 1, 4))[0], &decode[0]),
        PullResult::Denied(DenyReason::Gone)
    );
}
