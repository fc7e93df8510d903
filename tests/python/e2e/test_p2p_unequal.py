"""Risk: servers whose blocks have different sizes give each other tokens in the wrong places, too few or too many."""

import pytest

from conftest import ask
from p2p_pair import expected_whole
from settings import BLOCK_TOKENS, CACHE_BLOCKS, LENGTHS_TOKENS


def blocks_of(factor):
    return {"block_size": factor * BLOCK_TOKENS, "num_gpu_blocks_override": CACHE_BLOCKS // factor}


# Blocks of prefill and of decode, in units of 32 tokens; 3 and 2 have none of the other's borders but each sixth.
@pytest.mark.parametrize(
    ("prefill", "decode", "lane", "at_once"),
    [(2, 1, "shm", True), (1, 2, "tcp", True), (3, 2, "shm", False), (4, 1, "tcp", False)],
)
def test_servers_with_other_block_sizes_give_the_single_engines_answer(
    p2p_pair, prompts, prefill, decode, lane, at_once
):
    pair = p2p_pair
    pair.open(
        lane,
        prefill={"chunked": True, **blocks_of(prefill)},
        decode={"chunked": True, "prefix_caching": True, **blocks_of(decode)},
    )
    requests = [ask(name, prompts.tokens(count)) for name, count in LENGTHS_TOKENS.items()]
    answers, external_tokens = pair.hand_over(requests, at_once)
    assert external_tokens == expected_whole(requests)
    pair.assert_like_single(requests, answers)

    # A prefix that decode has, which ends inside a block of prefill, and a new tail.
    grown = [ask(f"{request['id']}, grown", [*request["prompt"], *prompts.tokens(77)]) for request in requests]
    answers, external_tokens = pair.hand_over(grown, at_once)
    own_tokens = decode * BLOCK_TOKENS
    cached = sum(len(request["prompt"]) // own_tokens * own_tokens for request in requests)
    assert external_tokens == expected_whole(grown) - cached
    pair.assert_like_single(grown, answers)
    pair.assert_nothing_is_held()
