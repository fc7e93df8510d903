"""Engine settings of the end-to-end tests."""

BLOCK_TOKENS = 32
MODEL_LEN_TOKENS = 2304
# Memory for 12 of the longest prompts. A process opens many engines, and vLLM 0.15 keeps the cache of each closed one.
CACHE_BLOCKS = 768
# Small enough that a 2000-token prompt takes many steps.
CHUNK_TOKENS = 256


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
