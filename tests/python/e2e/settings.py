"""Engine settings of the end-to-end tests."""

BLOCK_TOKENS = 32
MODEL_LEN_TOKENS = 2304
# Memory for 12 of the longest prompts. A process opens many engines, and vLLM 0.15 keeps the cache of each closed one.
CACHE_BLOCKS = 768
# Small enough that a 2000-token prompt takes many steps.
CHUNK_TOKENS = 256

# Far above what the slowest machine needs for a store or a load: these tests are not about a copying thread that is
# held up for two seconds.
PATIENT_FS = {"store_timeout_ms": 60_000, "load_timeout_ms": 60_000}

# Around a block border, and long.
LENGTHS_TOKENS = {
    "under one block": BLOCK_TOKENS - 12,
    "exactly 4 blocks": 4 * BLOCK_TOKENS,
    "4 blocks + 1": 4 * BLOCK_TOKENS + 1,
    "4 blocks + 5": 4 * BLOCK_TOKENS + 5,
    "about 2000": 2003,
}

SERVER_ARGUMENTS = [
    *("--dtype", "float32", "--block-size", str(BLOCK_TOKENS), "--max-model-len", str(MODEL_LEN_TOKENS)),
    *("--max-num-seqs", "16", "--no-enable-prefix-caching"),
]
# A long prompt takes many steps there, so that a test can act in the middle of one. The requests with a seed fit into
# one step: one that prefills them in part ends vLLM 0.32 on a CPU ("CPU Generator does not use offset").
CHUNKED_SERVER_ARGUMENTS = [
    *SERVER_ARGUMENTS,
    "--enable-chunked-prefill",
    "--max-num-batched-tokens",
    str(CHUNK_TOKENS * 3 // 2),
]


def engine_settings(model, *, dtype="float32", chunked=False, prefix_caching=False, **more):
    """EngineArgs as a dict."""
    return {
        "model": str(model),
        "dtype": dtype,
        "enforce_eager": True,
        "block_size": BLOCK_TOKENS,
        "max_model_len": MODEL_LEN_TOKENS,
        "max_num_batched_tokens": CHUNK_TOKENS if chunked else MODEL_LEN_TOKENS,
        "enable_chunked_prefill": chunked,
        "enable_prefix_caching": prefix_caching,
        "max_num_seqs": 16,
        "num_gpu_blocks_override": CACHE_BLOCKS,
        "disable_log_stats": False,
        "seed": 0,
        **more,
    }
