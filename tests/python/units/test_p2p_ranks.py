"""Risk: a rank of decode gets another's heads or a head twice, or a rank of prefill waits for nobody."""

import itertools

import pytest

from kvlane.vllm.p2p_ranks import Source, heads_of_rank, sources

SIZES = (1, 2, 3, 4, 6, 8, 16)


def fits(heads, size):
    return heads is None or heads % size == 0 or size % heads == 0


CASES = [
    (heads, size, peer_size)
    for heads, size, peer_size in itertools.product((None, 1, 2, 4, 6, 8), SIZES, SIZES)
    if fits(heads, size) and fits(heads, peer_size)
]


@pytest.mark.parametrize(("heads", "size", "peer_size"), CASES)
def test_every_head_comes_once_and_every_rank_of_prefill_hears_from_as_many_as_it_was_told(heads, size, peer_size):
    heard = dict.fromkeys(range(peer_size), 0)
    told = {}
    for rank in range(size):
        found = sources(heads, rank, size, peer_size)
        wanted = heads_of_rank(heads, rank, size)
        got = []
        for source in found:
            heard[source.rank] += 1
            assert told.setdefault(source.rank, source.readers) == source.readers
            if source.is_read:
                theirs = heads_of_rank(heads, source.rank, peer_size)
                got += [head for head in theirs if head in wanted]
        assert sorted(got) == list(wanted)
        assert any(source.is_read for source in found)
    assert heard == told
    assert all(heard.values()), "a rank of prefill hears from nobody"


@pytest.mark.parametrize("size", SIZES)
def test_ranks_of_equal_groups_talk_to_their_own_number(size):
    for heads, rank in itertools.product((None, 1, 4, 8), range(size)):
        assert sources(heads, rank, size, size) == (Source(rank, True, 1),)


def test_heads_are_shared_out_as_vllm_does_it():
    assert [heads_of_rank(8, rank, 4) for rank in (0, 3)] == [range(2), range(6, 8)]
    assert [heads_of_rank(2, rank, 4) for rank in range(4)] == [range(1), range(1), range(1, 2), range(1, 2)]
    assert heads_of_rank(None, 5, 8) == range(1)


def test_heads_that_do_not_split_evenly_are_refused_by_number():
    with pytest.raises(ValueError, match="6 KV heads cannot be shared out evenly over 4 ranks"):
        sources(6, 0, 2, 4)


def test_readers_of_the_same_heads_are_spread_over_the_ranks_that_have_them():
    assert [sources(None, rank, 4, 2)[0].rank for rank in range(4)] == [0, 1, 0, 1]
