"""Risk: the two sides of a hand-over name it differently, or a plain request is taken for one."""

import time

import pytest

from kvlane.vllm.p2p_key import KEY_BYTES_MAX, Address, handover_of, ids_are_random

UID = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"
H = f"___prefill_addr_10.0.0.1:14579___decode_addr_10.0.0.2:14580_{UID}"


def key_of(request_id, parameters=None, random_ids=True):
    found = handover_of(request_id, parameters, random_ids=random_ids)
    return None if found is None else found.key


def test_each_form_of_a_request_id_gives_its_name_prompt_and_child():
    assert key_of(f"cmpl-{H}-0-0a1b2c3d") == f"{H} 0 0"
    assert key_of(f"cmpl-{H}-12-0a1b2c3d") == f"{H} 12 0"
    assert key_of(f"3_cmpl-{H}-1-0a1b2c3d") == f"{H} 1 3"
    assert key_of(f"chatcmpl-{H}-0a1b2c3d") == f"{H} 0 0"
    assert key_of(f"2_chatcmpl-{H}-0a1b2c3d") == f"{H} 0 2"
    assert key_of(f"generate-tokens-{H}-0a1b2c3d") == f"{H} 0 0"


def test_both_sides_make_the_same_key_whatever_their_random_part():
    for suffix in ("0a1b2c3d", "12345678", "deadbeef"):
        assert key_of(f"cmpl-{H}-0-{suffix}") == f"{H} 0 0"


@pytest.mark.parametrize(
    "uid",
    [
        "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0",  # dashed
        "0f1e2d3c-4b5a-6978-8796-12345678",  # ends like a random part
        "1234",
        "7-3",  # ends like a prompt index
    ],
)
@pytest.mark.parametrize("random_ids", [True, False])
def test_a_name_may_end_like_what_vllm_appends(uid, random_ids):
    name = f"___prefill_addr_p:1___decode_addr_d:2_{uid}"
    suffix = "-87654321" if random_ids else ""
    assert key_of(f"cmpl-{name}-5{suffix}", random_ids=random_ids) == f"{name} 5 0"
    assert key_of(f"chatcmpl-{name}{suffix}", random_ids=random_ids) == f"{name} 0 0"


@pytest.mark.parametrize(
    ("host", "read"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("vllm-prefill.llm-d.svc.cluster.local", "vllm-prefill.llm-d.svc.cluster.local"),
        ("host_with_underscores", "host_with_underscores"),
        ("[fd00::1:2]", "fd00::1:2"),
        ("fd00::1:2", "fd00::1:2"),
        ("fe80::1%eth0", "fe80::1%eth0"),
    ],
)
def test_hosts_of_every_kind_are_read(host, read):
    found = handover_of(
        f"cmpl-___prefill_addr_{host}:14579___decode_addr_{host}:999_{UID}-0-0a1b2c3d", None, random_ids=True
    )
    assert found.prefill == Address(read, 14579)
    assert found.decode == Address(read, 999)


@pytest.mark.parametrize(
    "request_id",
    [
        "cmpl-0123456789abcdef-0-0a1b2c3d",
        "chatcmpl-0123456789abcdef-0a1b2c3d",
        "12-0a1b2c3d",
        "resp_0123456789abcdef_0-0a1b2c3d",
        f"resp_{H}-0a1b2c3d",
        f"cmpl-{H}-0",  # no random part although there should be one
        f"cmpl-{H}-0a1b2c3d",  # no prompt index
        "cmpl-___prefill_addr_vllm-prefill___decode_addr_vllm-decode_0f-0-0a1b2c3d",  # the folder's proxy, no ports
        "cmpl-___prefill_addr_10.0.0.1:0___decode_addr_10.0.0.2:1_0f-0-0a1b2c3d",
        "cmpl-___prefill_addr_10.0.0.1:70000___decode_addr_10.0.0.2:1_0f-0-0a1b2c3d",
        "cmpl-___prefill_addr_a b:1___decode_addr_10.0.0.2:1_0f-0-0a1b2c3d",
        f"cmpl-___prefill_addr_{'x' * 300}:1___decode_addr_10.0.0.2:1_0f-0-0a1b2c3d",
        "",
        "-",
    ],
)
def test_other_ids_are_served_locally(request_id):
    assert key_of(request_id) is None


def test_a_long_name_becomes_a_short_key_of_its_own():
    names = [f"{H}{'x' * 600}{end}" for end in "ab"]
    keys = [key_of(f"cmpl-{name}-0-0a1b2c3d") for name in names]
    assert len(set(keys)) == 2
    assert all(len(key.encode()) <= KEY_BYTES_MAX for key in keys)


def test_a_name_that_was_made_to_be_slow_to_search_is_not_searched():
    name = "___prefill_addr_" * 100_000
    started = time.monotonic()
    assert key_of(f"cmpl-{name}-0-0a1b2c3d") is None
    assert time.monotonic() - started < 60, "a scheduler that searches this stands still for hours"


def test_a_name_that_utf8_cannot_hold_gets_a_key_that_it_can():
    key = key_of(f"cmpl-{H}\udcff-0-0a1b2c3d")
    assert key.encode().startswith(b"sha256:")


# ---- parameters


def test_parameters_name_the_side_and_share_the_requests_name():
    prefill = handover_of("cmpl-abc-0-0a1b2c3d", {"do_remote_decode": True}, random_ids=True)
    assert (prefill.side, prefill.name, prefill.prefill) == ("prefill", "abc", None)
    assert prefill.answers_parameters
    given = {"do_remote_prefill": True, "transfer_id": "abc", "remote_host": "p-0", "remote_port": "14579"}
    decode = handover_of("chatcmpl-xyz-99999999", given, random_ids=True)
    assert (decode.side, decode.prefill, decode.key) == ("decode", Address("p-0", 14579), prefill.key)


def test_parameters_tell_prompts_and_children_apart_like_ids_do():
    given = {"do_remote_decode": True, "transfer_id": "t"}
    assert key_of("1_cmpl-abc-4-0a1b2c3d", given) == "t 4 1"
    assert key_of("resp_0123456789abcdef_0-0a1b2c3d", given) == "t 0 0"
    assert key_of("7_whatever", given) == "t 0 7"


def test_a_decode_request_takes_from_the_header_what_its_parameters_lack():
    found = handover_of(f"cmpl-{H}-0-0a1b2c3d", {"do_remote_prefill": True}, random_ids=True)
    assert (found.key, found.prefill) == (f"{H} 0 0", Address("10.0.0.1", 14579))


@pytest.mark.parametrize("parameters", [None, {}, [], "x", {"do_remote_decode": False}, {"do_remote_prefill": None}])
def test_parameters_that_ask_for_nothing_leave_it_to_the_header(parameters):
    assert key_of("cmpl-abc-0-0a1b2c3d", parameters) is None
    assert key_of(f"cmpl-{H}-0-0a1b2c3d", parameters) == f"{H} 0 0"


def test_decode_without_any_address_is_served_locally():
    assert key_of("cmpl-abc-0-0a1b2c3d", {"do_remote_prefill": True, "transfer_id": "t"}) is None


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"do_remote_decode": 1}, "do_remote_decode is 1, allowed: true or false"),
        ({"do_remote_decode": True, "do_remote_prefill": True}, "both true"),
        ({"do_remote_decode": True, "transfer_id": 7}, "transfer_id is 7"),
        ({"do_remote_decode": True, "transfer_id": ""}, "transfer_id is ''"),
        ({"do_remote_prefill": True, "remote_host": "p", "remote_port": 0}, "remote_port 0, allowed"),
        ({"do_remote_prefill": True, "remote_host": ["p"], "remote_port": 1}, "remote_host is"),
        ({"do_remote_prefill": True, "remote_host": "p", "remote_port": True}, "remote_port True"),
    ],
)
def test_parameters_that_make_no_sense_are_named(parameters, text):
    with pytest.raises(ValueError, match=text):
        handover_of("cmpl-abc-0-0a1b2c3d", parameters, random_ids=True)


def test_the_switch_of_vllm_that_turns_random_parts_off(monkeypatch):
    envs = pytest.importorskip("vllm.envs")
    switch = "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"
    monkeypatch.delenv(switch, raising=False)
    assert ids_are_random()
    monkeypatch.setenv(switch, "1")
    assert ids_are_random() == (switch not in envs.environment_variables)
