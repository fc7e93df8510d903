"""Risk: an option that is mistyped or misspelt is ignored, and a server runs for weeks with another setting."""

import dataclasses

import pytest

from kvlane import ConfigError
from kvlane.vllm.options import Options, parse_bytes, parse_options


def test_no_options_give_the_defaults():
    assert parse_options(None) == parse_options({}) == Options()
    assert Options().shared_storage_path == "/tmp"
    assert Options().root == "/tmp/kvlane"


def test_every_field_is_an_option_and_takes_its_own_value():
    values = {
        "shared_storage_path": "/mnt/kv",
        "capacity_bytes": 7_000_000,
        "load_timeout_ms": 1,
        "prefill_grace_ms": 0,
        "store_timeout_ms": 3,
        "verify": False,
        "io_threads": 4,
        "sync_load": True,
        "layerwise_load": True,
        "medium": "disk",
        "segment_bytes": 1 << 20,
        "load_failure_policy": "keep",
        "model_identity": "llama-3 build 7",
        "block_outermost_layout": True,
    }
    assert set(values) == {field.name for field in dataclasses.fields(Options)}
    assert dataclasses.asdict(parse_options(values)) == values


def test_an_unknown_option_is_refused_with_its_value_and_the_allowed_names():
    with pytest.raises(ConfigError, match=r"'shared_path' = '/x'.*allowed:.*shared_storage_path"):
        parse_options({"shared_path": "/x"})


def test_keys_that_a_shim_moved_away_are_tolerated():
    assert parse_options({"legacy": {"kv_rank": 0}, "verify": False}) == Options(verify=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shared_storage_path", ""),
        ("shared_storage_path", 7),
        ("capacity_bytes", "lots"),
        ("capacity_bytes", 0),
        ("capacity_bytes", -1),
        ("capacity_bytes", True),
        ("capacity_bytes", "0GiB"),
        ("load_timeout_ms", 0),
        ("load_timeout_ms", "5000"),
        ("load_timeout_ms", True),
        ("load_timeout_ms", 1.5),
        ("verify", "false"),
        ("verify", 1),
        ("io_threads", 0),
        ("io_threads", 65),
        ("medium", "tape"),
        ("load_failure_policy", "fail"),
        ("model_identity", ""),
    ],
)
def test_a_value_of_a_wrong_kind_is_refused_by_name(name, value):
    with pytest.raises(ConfigError) as refusal:
        parse_options({name: value})
    assert f"'{name}' is {value!r}, allowed: " in str(refusal.value)


@pytest.mark.parametrize(
    "value", ["100000PiB", 10**30, "9" * 400, pytest.param(10**5000, id="long"), 1 << 63, 1, "64KB"]
)
@pytest.mark.parametrize("name", ["capacity_bytes", "segment_bytes"])
def test_a_number_of_bytes_out_of_range_is_refused_with_the_range_and_in_few_words(name, value):
    with pytest.raises(ConfigError) as refusal:
        parse_options({name: value})
    text = str(refusal.value)
    assert text.startswith(f"option '{name}' is ")
    low, high = {"capacity_bytes": (1 << 20, (1 << 63) - 1), "segment_bytes": (1 << 16, 1 << 40)}[name]
    assert f", allowed: {low} to {high} bytes" in text
    assert len(text) < 500


def test_the_largest_and_smallest_numbers_of_bytes_are_exact():
    assert parse_options({"capacity_bytes": str((1 << 63) - 1)}).capacity_bytes == (1 << 63) - 1
    assert parse_options({"capacity_bytes": "1MiB"}).capacity_bytes == 1 << 20
    assert parse_options({"segment_bytes": "1TiB"}).segment_bytes == 1 << 40
    assert parse_options({"segment_bytes": "64KiB"}).segment_bytes == 1 << 16


def test_layerwise_loading_needs_synchronous_loading():
    with pytest.raises(ConfigError, match="layerwise_load"):
        parse_options({"layerwise_load": True})


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        (1, 1),
        ("12345", 12345),
        ("12345B", 12345),
        ("500MB", 500_000_000),
        ("500M", 500_000_000),
        ("64GiB", 64 << 30),
        ("64Gi", 64 << 30),
        ("1.5 KiB", 1536),
        ("2kB", 2000),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(text, size_bytes):
    assert parse_bytes("capacity_bytes", text) == size_bytes


def test_only_given_options_reach_the_backend():
    assert parse_options({}).native() == {"verify": True, "medium": "auto"}
    assert parse_options({"capacity_bytes": "1MiB"}).native()["capacity_bytes"] == 1 << 20
