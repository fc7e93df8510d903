//! One worker stores the KV of a prompt, another one finds and loads it: `cargo run -p kvlane-examples --example roundtrip`.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_core::reference::{MemoryBackend, MemoryStore};
use kvlane_core::{
    BlockMap, Chain, ChainRoot, Device, KvTransfer, LoadOrder, LoadRequest, NamespaceId, NamespaceParts,
    Outcome, OwnedCache, StoreRequest, TensorView,
};

const LAYERS: u64 = 4;
const BLOCKS: u32 = 64;
const BLOCK_TOKENS: u32 = 16;
const PROMPT_TOKENS: u32 = 100;

fn main() -> Result<(), Box<dyn Error>> {
    // What both workers must agree on, the tokens aside.
    let layout = layout()?;
    let fingerprint: String = layout
        .fingerprint()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let namespace = NamespaceParts::new()
        .with("weights", "example-model, sha256 of its index")?
        .with("layout", fingerprint)?
        .with("rank", "tp 0/1, pp 0/1")?
        .id();

    // The place that both workers reach. Another backend changes this line and `open`.
    let place = MemoryStore::new(64 << 20);
    let open = |namespace: NamespaceId, cache: &Arc<OwnedCache>| -> Box<dyn KvTransfer> {
        Box::new(MemoryBackend::new(
            Arc::clone(&place),
            namespace,
            Arc::<OwnedCache>::clone(cache),
        ))
    };

    // The prompt's full blocks have names that any process computes alike.
    let mut chain = Chain::new(&ChainRoot::new(BLOCK_TOKENS)?);
    chain.extend((0..PROMPT_TOKENS).map(|position| position * 7 % 32_000));
    let keys = chain.keys().to_vec();

    // The producer has computed the KV of block i into cache block 2 + i, and stores it.
    let produced = Arc::new(OwnedCache::new(layout.clone()));
    let produced_blocks: Vec<u32> = (2..).take(keys.len()).collect();
    for &block in &produced_blocks {
        let kv: Vec<u8> = (0..layout.block_bytes())
            .map(|byte| (byte as u32 * 31 + block) as u8)
            .collect();
        produced.set_payload(block, &kv);
    }
    let producer = open(namespace, &produced);
    let deadline = Instant::now() + Duration::from_secs(5);
    producer.reserve(&keys, 0, deadline)?;
    let store = producer.begin_store(StoreRequest {
        keys: keys.to_vec(),
        blocks: produced_blocks.clone(),
        first_depth: 0,
        deadline,
    })?;
    for layer in 0..layout.layer_count() {
        producer.layer_ready(store, layer)?;
    }
    producer.finish_store(store)?;
    let stored = producer
        .wait(store, deadline)?
        .ok_or("the store did not end in time")?;
    println!(
        "stored {} blocks of {} bytes: {:?}",
        keys.len(),
        layout.block_bytes(),
        stored.outcome
    );

    // The consumer sees the same prompt, finds its blocks and loads them into blocks of its own.
    let consumed = Arc::new(OwnedCache::new(layout.clone()));
    let consumer = open(namespace, &consumed);
    let found = consumer.lookup(&keys);
    println!("found {} of {} blocks", found.ready_blocks, keys.len());
    let consumed_blocks: Vec<u32> = (0..found.ready_blocks as u32).map(|i| BLOCKS - 1 - i).collect();
    let load = consumer.load(LoadRequest {
        keys: keys[..found.ready_blocks].to_vec(),
        blocks: consumed_blocks.clone(),
        deadline,
        order: LoadOrder::BlockMajor,
    })?;
    let loaded = consumer
        .wait(load, deadline)?
        .ok_or("the load did not end in time")?;
    println!("loaded: {:?}", loaded.outcome);

    if loaded.outcome != Outcome::Done || found.ready_blocks != keys.len() {
        return Err("the prompt's blocks were not all found".into());
    }
    for (source, target) in produced_blocks.iter().zip(&consumed_blocks) {
        if produced.payload(*source) != consumed.payload(*target) {
            return Err(format!("block {target} differs from block {source}").into());
        }
    }
    println!("every byte is equal");
    Ok(())
}

/// Four layers of an attention cache, shaped as vLLM's CPU workers have them since 0.26: blocks, heads, tokens, K and V.
fn layout() -> kvlane_core::Result<BlockMap> {
    let (heads, tokens, kv_dim, element_bytes) = (2, u64::from(BLOCK_TOKENS), 128, 2);
    let block = heads * tokens * kv_dim;
    let views = (0..LAYERS).map(|layer| TensorView {
        name: format!("model.layers.{layer}.self_attn.attn"),
        address: 0x1000_0000 + layer * u64::from(BLOCKS) * block * u64::from(element_bytes),
        device: Device::Host,
        element_bytes,
        shape: vec![u64::from(BLOCKS), heads, tokens, kv_dim],
        strides: [block, tokens * kv_dim, kv_dim, 1].map(u64::cast_signed).to_vec(),
    });
    BlockMap::from_tensors(views, BLOCKS, None)
}
