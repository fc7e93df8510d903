"""Risk: vLLM's requests do not carry the hashes that prompts are recognised by, so that every prompt is hashed whole;
or its hashes are equal where the KV is not."""

import inspect

import pytest

from kvlane._native import RecentChains
from kvlane.vllm import identity

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.utils import hashing
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

BLOCK = 16
HEAD = list(range(1000, 1100))


@pytest.fixture(autouse=True)
def recent(monkeypatch):
    init_none_hash(hashing.sha256)  # as an engine does when it starts
    monkeypatch.setattr(identity, "_RECENT_CHAINS", RecentChains())


def vllm_request(tokens, cache_salt=None, block_tokens=BLOCK, function=hashing.sha256):
    arguments = {
        "request_id": "r", "prompt_token_ids": list(tokens), "sampling_params": SamplingParams(max_tokens=1),
        "pooling_params": None, "cache_salt": cache_salt,
        "block_hasher": get_request_block_hasher(block_tokens, function),
    }  # fmt: skip
    if "eos_token_id" in inspect.signature(Request.__init__).parameters:
        arguments["eos_token_id"] = None
    return Request(**arguments)


def keys(request):
    chain = identity.request_chain(request, BLOCK, identity.AdapterIdentities(), True)
    return chain.keys(0, chain.block_count)


def without_known_tokens(request):
    """The same request with tokens in the blocks of HEAD that would be refused if they were read."""
    count = len(HEAD) // BLOCK * BLOCK
    request.prompt_token_ids = ["not read"] * count + list(request.prompt_token_ids[count:])
    return request


@pytest.mark.parametrize("function", [hashing.sha256, hashing.sha256_cbor])
def test_a_grown_prompt_of_vllm_is_recognised_and_has_the_keys_of_a_new_one(function, monkeypatch):
    tokens = HEAD + list(range(40))
    new = keys(vllm_request(tokens, function=function))
    monkeypatch.setattr(identity, "_RECENT_CHAINS", RecentChains())
    keys(vllm_request(HEAD, function=function))
    assert keys(without_known_tokens(vllm_request(tokens, function=function))) == new


def short_hash(value):
    return hashing.sha256(value)[:16]


@pytest.mark.parametrize("changes", [{"block_tokens": 8}, {"block_tokens": 32}, {"function": short_hash}])
def test_hashes_of_other_blocks_and_short_ones_are_not_used(changes):
    keys(vllm_request(HEAD, **changes))
    with pytest.raises(TypeError, match="item 0 is a str"):
        keys(without_known_tokens(vllm_request(HEAD, **changes)))


def test_salts_are_kept_apart():
    assert len({keys(vllm_request(HEAD, salt)) for salt in (None, "a", "b", None)}) == 3
