"""Risk: servers whose blocks have different sizes give each other tokens in the wrong places.

vLLM's attention for CPUs packs the tokens of a block together, so its blocks can only be moved whole: here such servers
must refuse each other. Where blocks can be cut is tested without vLLM (crates/p2p/tests/unequal.rs, tests/gpu).
"""

import pytest

from conftest import ask
from p2p_pair import LANES, expected_whole
from settings import BLOCK_TOKENS, CACHE_BLOCKS, LENGTHS_TOKENS


def blocks_of(factor):
    return {"block_size": factor * BLOCK_TOKENS, "num_gpu_blocks_override": CACHE_BLOCKS // factor}


@pytest.mark.parametrize(("prefill", "decode", "lane"), [(2, 1, LANES[0]), (1, 2, LANES[1])])
def test_servers_with_other_block_sizes_refuse_each_other_where_tokens_are_packed(
    p2p_pair, prompts, prefill, decode, lane
):
    pair = p2p_pair
    pair.open(lane, prefill=blocks_of(prefill), decode=blocks_of(decode))
    requests = [ask(name, prompts.tokens(count)) for name, count in LENGTHS_TOKENS.items()]
    answers, external_tokens = pair.hand_over(requests)
    # vLLM counts what it was promised; what did not come was computed again.
    assert external_tokens in (0, expected_whole(requests))
    pair.assert_like_single(requests, answers)
    pair.assert_nothing_is_held()
