"""Risk: two prompts share a key although their KV differs (a wrong answer), or equal prompts do not (no transfer)."""

import random

import pytest

from kvlane import ConfigError
from kvlane._native import Chain, namespace_id

TOKENS = list(range(100, 164))


def keys(tokens=TOKENS, block_tokens=16, images=(), **root):
    chain = Chain(block_tokens, **root)
    for image in images:
        chain.add_image(*image)
    count = chain.extend(tokens)
    packed = chain.keys(0, count)
    return [packed[i : i + 32] for i in range(0, len(packed), 32)]


def test_equal_content_has_equal_keys_however_it_is_fed():
    pieces = Chain(16)
    for start in range(0, len(TOKENS), 7):
        pieces.extend(TOKENS[: start + 7], start)
    assert pieces.block_count == 4
    assert pieces.token_count == 64
    assert pieces.keys(0, 4) == b"".join(keys())


def test_a_wrapped_list_is_read_like_a_list():
    class Wrapped:
        def __init__(self, items):
            self.items = items

        def __getitem__(self, index):
            return self.items[index]

        def __len__(self):
            return len(self.items)

    chain = Chain(16)
    assert chain.extend(Wrapped(TOKENS), 16) == 3
    assert chain.keys(0, 3) == b"".join(keys(TOKENS[16:]))


@pytest.mark.parametrize(
    "other",
    [
        {"cache_salt": "tenant"},
        {"cache_salt": ""},
        {"lora": b"adapter"},
        {"block_tokens": 32},
        {"images": [(3, 5, "image:abc")]},
        {"tokens": [99, *TOKENS[1:]]},
    ],
)
def test_whatever_decides_the_kv_decides_every_key(other):
    plain = set(keys())
    assert plain.isdisjoint(keys(**other))


def test_keys_differ_from_the_first_different_block_on():
    changed = [*TOKENS]
    changed[37] = 1
    same, other = keys(), keys(changed)
    assert same[:2] == other[:2]
    assert set(same[2:]).isdisjoint(other[2:])


def test_salt_and_adapter_are_not_mixed_up():
    assert keys(cache_salt="x") != keys(lora=b"x")


@pytest.mark.parametrize("other", [(3, 5, "image:abd"), (4, 5, "image:abc"), (3, 6, "image:abc")])
def test_an_image_counts_with_name_and_place(other):
    assert keys(images=[(3, 5, "image:abc")])[0] != keys(images=[other])[0]


def test_an_image_behind_a_block_leaves_its_key_alone():
    with_image = keys(images=[(40, 4, "image:abc")])
    assert with_image[:2] == keys()[:2]
    assert with_image[2] != keys()[2]


class Token(int):
    """An int of another type, as numpy-like libraries and enums have them."""


def test_ints_of_other_types_are_tokens_too():
    assert keys([Token(token) for token in TOKENS]) == keys()


@pytest.mark.parametrize("wrong", [-1, -(1 << 80), 1 << 32, 1 << 63, 1 << 80, Token(-1), Token(1 << 70)])
def test_a_number_that_is_no_token_is_named_by_its_place(wrong):
    with pytest.raises(OverflowError, match="item 3 is not in 0 to 4294967295"):
        keys([*TOKENS[:3], wrong, *TOKENS[4:]])


@pytest.mark.parametrize("wrong", ["7", 7.0, None])
def test_an_item_that_is_no_int_is_named_by_its_place_and_type(wrong):
    with pytest.raises(TypeError, match=f"item 3 is a {type(wrong).__name__}, allowed: int"):
        keys([*TOKENS[:3], wrong, *TOKENS[4:]])


def test_a_late_image_is_refused():
    chain = Chain(16)
    chain.extend(TOKENS)
    with pytest.raises(ConfigError, match="start_token"):
        chain.add_image(3, 5, "image:abc")


def test_a_prefix_continues_on_its_own():
    chain = Chain(16)
    chain.extend(TOKENS)
    other = chain.prefix(2)
    assert (other.block_count, other.token_count) == (2, 32)
    changed = [*TOKENS[:32], *range(16)]
    other.extend(changed, other.token_count)
    assert other.keys(0, 3) == b"".join(keys(changed))
    assert chain.keys(0, 4) == b"".join(keys())


@pytest.mark.parametrize("blocks", [0, 5])
def test_a_prefix_that_is_not_known_is_refused(blocks):
    chain = Chain(16)
    chain.extend(TOKENS)
    with pytest.raises(ConfigError, match=f"block_count is {blocks}"):
        chain.prefix(blocks)


def test_what_is_not_a_token_is_refused_and_changes_nothing():
    chain = Chain(2)
    for wrong, error in (([1, -1], OverflowError), ([1, 1 << 32], OverflowError), ([1, 1 << 80], OverflowError)):
        with pytest.raises(error, match="item 1"):
            chain.extend(wrong)
    with pytest.raises(TypeError, match="item 0 is a str"):
        chain.extend(["1"])
    with pytest.raises(TypeError):
        chain.extend(7)
    assert chain.token_count == 0


def test_keys_out_of_range_are_refused():
    chain = Chain(16)
    chain.extend(TOKENS)
    with pytest.raises(ConfigError, match="the chain has 4"):
        chain.keys(2, 3)


def test_a_namespace_does_not_depend_on_the_order_of_its_facts():
    facts = [(f"name {i}", str(i)) for i in range(20)]
    shuffled = random.Random(1).sample(facts, len(facts))
    assert namespace_id(facts) == namespace_id(shuffled)
    assert len(namespace_id(facts)) == 32
    assert namespace_id(facts) != namespace_id([*facts[:-1], ("name 19", "20")])


def test_a_repeated_fact_is_refused():
    with pytest.raises(ConfigError, match="'weights'"):
        namespace_id([("weights", "a"), ("weights", "b")])
