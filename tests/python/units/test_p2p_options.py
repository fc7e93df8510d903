"""Risk: an old manifest does not start any more, or a mistake in an option goes unnoticed."""

import logging
import types

import pytest

from kvlane import ConfigError
from kvlane.vllm.p2p_options import P2pOptions, obsolete_options, parse_p2p_options

OLD = {
    "proxy_ip": "10.0.0.9", "proxy_port": "30001", "http_port": "20001", "send_type": "PUT_ASYNC",
    "mem_pool_size_gb": "32", "nccl_num_channels": "16",
}  # fmt: skip


def transfer(extra=None, **fields):
    return types.SimpleNamespace(kv_connector_extra_config=extra or {}, **fields)


def test_every_option_of_the_old_connector_is_taken_with_numbers_as_text_too():
    options = parse_p2p_options(OLD)
    assert (options.proxy_ip, options.proxy_port, options.http_port) == ("10.0.0.9", 30001, 20001)
    assert parse_p2p_options({**OLD, "proxy_port": 30001, "mem_pool_size_gb": 32}).proxy_port == 30001
    assert parse_p2p_options({"proxy_ip": "", "proxy_port": ""}).proxy_ip is None
    assert parse_p2p_options(None) == parse_p2p_options({"legacy": {"kv_rank": 0}}) == P2pOptions()


@pytest.mark.parametrize("half", [{"proxy_ip": "10.0.0.9", "http_port": 1}, {"proxy_port": "30001"}])
def test_half_an_address_of_a_proxy_announces_nothing_and_is_said(half, caplog):
    """The old connector started with it."""
    with caplog.at_level(logging.WARNING, logger="vllm.kvlane"):
        options = parse_p2p_options(half)
    assert (options.proxy_ip, options.proxy_port) == (None, None)
    assert "announces itself nowhere" in caplog.text


@pytest.mark.parametrize("name", ["send_type", "mem_pool_size_gb", "nccl_num_channels"])
@pytest.mark.parametrize("value", ["1e2", 1.5, "auto", "PUSH", None, 0])
def test_what_has_no_effect_any_more_may_be_anything(name, value):
    assert getattr(parse_p2p_options({name: value}), name) == value


def test_new_options_are_read():
    options = parse_p2p_options(
        {"lane": "shm", "lease_ms": 5000, "allowed_peers": ["10.0.0.0/8", " prefill-0 "], "host": "[::1]"}
    )
    assert (options.lane, options.lease_ms, options.host) == ("shm", 5000, "::1")
    assert options.allowed_peers == ("10.0.0.0/8", "prefill-0")
    assert parse_p2p_options({"lane": "nccl"}).lane == "nccl"
    assert parse_p2p_options({"allowed_peers": "10.0.0.1, 10.0.0.2"}).allowed_peers == ("10.0.0.1", "10.0.0.2")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"lanes": "shm"}, r"unknown option 'lanes' = 'shm', allowed: .*lane, .*secret_file"),
        ({"lane": "rdma"}, "'lane' is 'rdma', allowed: auto, shm, tcp"),
        ({"lease_ms": 0}, "'lease_ms' is 0, allowed: a whole number from 100"),
        ({"lease_ms": "5000"}, "'lease_ms' is '5000'"),
        ({"transfer_timeout_ms": True}, "'transfer_timeout_ms' is True"),
        ({"proxy_ip": "a", "proxy_port": "x", "http_port": 1}, "'proxy_port' is 'x'"),
        ({"proxy_ip": "a", "proxy_port": 70000, "http_port": 1}, "'proxy_port' is 70000"),
        ({"proxy_ip": "a", "proxy_port": 1}, "proxy_ip is given without http_port"),
        ({"allowed_peers": 7}, "'allowed_peers' is 7"),
        ({"allowed_peers": ["a b"]}, "'allowed_peers'"),
        ({"allowed_peers": ["a"] * 2000}, "at most 1024"),
        ({"connections": 0}, "'connections' is 0"),
        ({"parked_percent": 100}, "'parked_percent' is 100"),
        ({"secret_file": ""}, "'secret_file' is ''"),
        ({"load_failure_policy": "fail"}, "allowed: recompute, keep"),
    ],
)
def test_a_wrong_option_stops_the_start_and_is_named(given, text):
    with pytest.raises(ConfigError, match=text):
        parse_p2p_options(given)


def test_what_is_obsolete_is_named_wherever_it_was_given():
    old_vllm = transfer(dict(OLD), kv_rank=0, kv_parallel_size=2, kv_ip="0.0.0.0", kv_buffer_size=1e9)
    assert obsolete_options(old_vllm) == [
        "kv_rank", "kv_parallel_size", "kv_ip", "send_type", "mem_pool_size_gb", "nccl_num_channels",
    ]  # fmt: skip
    shimmed = transfer({"legacy": {"kv_rank": 0, "kv_ip": "0.0.0.0"}, "send_type": "GET"})
    assert obsolete_options(shimmed) == ["kv_ip", "kv_rank", "send_type"]
    untouched = transfer(kv_rank=None, kv_parallel_size=1, kv_ip="127.0.0.1", kv_buffer_size=1e9)
    assert obsolete_options(untouched) == obsolete_options(transfer({"lane": "tcp"})) == []


def secret(path):
    return parse_p2p_options({"secret_file": str(path)}).secret()


def test_a_secret_is_a_files_content_without_its_line_end(tmp_path):
    file = tmp_path / "secret"
    file.write_bytes(b"0123456789abcdef\n")
    assert secret(file) == b"0123456789abcdef"
    assert P2pOptions().secret() is None


@pytest.mark.parametrize("content", [b"", b"short\n", b"x" * 5000])
def test_a_secret_that_is_none_stops_the_start(tmp_path, content):
    file = tmp_path / "secret"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"secret_file '.*' has \d+ bytes, allowed: 16 to 4096"):
        secret(file)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        secret(tmp_path / "absent")


def test_a_secret_that_everybody_can_read_is_warned_about(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    file = tmp_path / "secret"
    file.write_bytes(b"0123456789abcdef")
    file.chmod(0o600)
    secret(file)
    assert "every user" not in caplog.text
    file.chmod(0o644)
    secret(file)
    assert "every user of this machine can read secret_file" in caplog.text
