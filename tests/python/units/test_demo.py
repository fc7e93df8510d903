"""Risk: the demo ends well although an answer is wrong or nothing was handed over, and a newcomer believes it."""

import contextlib
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.client import Completion
from support.tiny_model import token_bytes

PROGRAM = Path(__file__).resolve().parents[3] / "examples/demo.py"
DEMO = SimpleNamespace(**runpy.run_path(str(PROGRAM), run_name="demo"))
PROMPT = list(range(4 * DEMO.BLOCK_TOKENS + 5))
WHOLE_BLOCKS_TOKENS = 4 * DEMO.BLOCK_TOKENS
WHOLE_PROMPT_TOKENS = len(PROMPT)
PROMPT_BYTES = len(PROMPT) * token_bytes()


def completion(text="a b", tokens=("token_id:1", "token_id:2"), logprobs=(-0.25, -1.5), ttft_s=0.1):
    return Completion(
        ttft_s=ttft_s, tokens=[list(tokens)], logprobs=[list(logprobs)], texts=[text], finish_reasons=["length"]
    )


def answer(handed_over=None, external_tokens=WHOLE_BLOCKS_TOKENS, single=None):
    """What the demo keeps of one prompt: through the proxy, then of decode alone, then of the single server."""
    pair = DEMO.Pair(handed_over or completion(), external_tokens, completion(ttft_s=0.02))
    return PROMPT, pair, single or completion(ttft_s=0.3)


def lane_answer(handed_over=None, external_tokens=WHOLE_PROMPT_TOKENS, pulled_bytes=PROMPT_BYTES, single=None):
    """The same of a prompt that went from server to server."""
    _, pair, alone = answer(handed_over, external_tokens, single)
    return PROMPT, pair._replace(pulled_bytes=pulled_bytes), alone


def row_of(*answers):
    return DEMO.make_row(answers)


def public(row):
    return {name: value for name, value in row.items() if not name.startswith("_")}


def test_equal_answers_pass_and_fill_every_field_of_the_row():
    row = row_of(answer(completion(ttft_s=0.1)), answer(completion(ttft_s=0.5)), answer(completion(ttft_s=0.2)))
    assert public(row) == {
        "prompt_tokens": len(PROMPT),
        "external_tokens": WHOLE_BLOCKS_TOKENS,
        "ttft_ms": 200.0,
        "single_ttft_ms": 300.0,
        "text_equal": True,
        "max_logprob_diff": 0.0,
    }
    assert DEMO.verdict([row, row]) == 0


def test_a_prompt_shorter_than_a_block_passes_with_nothing_from_the_folder():
    short = (PROMPT[:20], *answer(external_tokens=0)[1:])
    assert DEMO.verdict([row_of(short)]) == 0


def test_over_a_lane_a_prompt_shorter_than_a_block_has_to_come_too(capsys):
    short = (PROMPT[:20], *lane_answer(external_tokens=20)[1:])
    assert DEMO.verdict([DEMO.make_row([short], "shm")]) == 0
    missing = (PROMPT[:20], *lane_answer(external_tokens=0, pulled_bytes=0)[1:])
    assert DEMO.verdict([DEMO.make_row([missing], "shm")]) == 1
    assert "20 tokens over shm: KV of 0 tokens came over the lane, 20 expected" in capsys.readouterr().out


def test_each_lane_has_a_row_per_prompt_length_with_its_name():
    lengths = len(DEMO.PROMPT_TOKENS)
    requests = [PROMPT] * (lengths * DEMO.PROMPTS_PER_LENGTH)
    pairs = [lane_answer()[1]] * len(requests)
    single = [completion(ttft_s=0.3)] * len(requests)
    rows = DEMO.make_rows(requests, {"shm": pairs, "tcp": pairs}, single)
    assert [row["lane"] for row in rows] == ["shm"] * lengths + ["tcp"] * lengths
    assert set(public(rows[0])) == {*public(row_of(answer())), "lane"}
    assert DEMO.verdict(rows) == 0
    [folder] = DEMO.make_rows(requests[:3], {None: [answer()[1]] * 3}, single[:3])
    assert folder == row_of(answer(), answer(), answer())


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (answer(completion(text="a c")), "the text differs"),
        (answer(completion(tokens=("token_id:1", "token_id:3"))), "the text differs"),
        (answer(completion(tokens=("token_id:1",), logprobs=(-0.25,))), "the text differs"),
        (answer(completion(logprobs=(-0.25, -1.502))), "log-probabilities differ by 0.002"),
        (answer(external_tokens=0), f"KV of 0 tokens came over the folder, {WHOLE_BLOCKS_TOKENS} expected"),
        (answer(external_tokens=WHOLE_BLOCKS_TOKENS - DEMO.BLOCK_TOKENS), "tokens came over the folder"),
        (answer(external_tokens=WHOLE_BLOCKS_TOKENS + DEMO.BLOCK_TOKENS), "tokens came over the folder"),
    ],
    ids=["text", "token", "shorter", "logprob", "nothing external", "a block too few", "a block too many"],
)
def test_one_wrong_answer_among_good_ones_fails_and_is_named(capsys, wrong, complaint):
    good = answer()
    # Among good ones of its own length, and among good rows.
    assert DEMO.verdict([row_of(good, good, good), row_of(good, wrong, good)]) == 1
    assert complaint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (lane_answer(completion(text="a c")), "tokens over tcp: the text differs"),
        (lane_answer(completion(logprobs=(-0.25, -1.502))), "log-probabilities differ by 0.002"),
        (lane_answer(external_tokens=0), f"KV of 0 tokens came over the lane, {len(PROMPT)} expected"),
        (lane_answer(external_tokens=len(PROMPT) - 1), "tokens came over the lane"),
        (lane_answer(external_tokens=WHOLE_BLOCKS_TOKENS), "tokens came over the lane"),
        (lane_answer(pulled_bytes=0), f"0 bytes came over the lane, at least {PROMPT_BYTES} expected"),
        (lane_answer(pulled_bytes=PROMPT_BYTES - 1), "bytes came over the lane"),
    ],
    ids=["text", "logprob", "nothing external", "a token too few", "whole blocks only", "nothing loaded", "lost"],
)
def test_one_wrong_answer_over_one_lane_fails_and_is_named(capsys, wrong, complaint):
    good = lane_answer()
    rows = [DEMO.make_row([good, good, good], "shm"), DEMO.make_row([good, wrong, good], "tcp")]
    assert DEMO.verdict(rows) == 1
    assert complaint in capsys.readouterr().out
    assert DEMO.verdict(rows[:1]) == 0


@pytest.mark.parametrize("backend", ["fs", "p2p"])
def test_a_run_prints_a_table_and_leaves_its_rows(tmp_path, monkeypatch, capsys, backend):
    """The whole program but for the servers."""
    demo = stand_in(monkeypatch, tmp_path)
    arguments = ["--backend", "p2p"] if backend == "p2p" else []
    assert demo.main(arguments) == 0
    rows = json.loads((tmp_path / f"target/demo/{backend}.json").read_text())["rows"]
    lanes = ["shm", "tcp"] if backend == "p2p" else [None]
    assert [(row["prompt_tokens"], row.get("lane")) for row in rows] == [
        (count, lane) for lane in lanes for count in demo.PROMPT_TOKENS
    ]
    # Lane, prompt tokens, handed over, three times, text, difference.
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = [line for line in words if line[-2:] == ["yes", "0"]]
    wanted = [[lane] * bool(lane) + [str(count)] for lane in lanes for count in demo.PROMPT_TOKENS]
    assert [line[:-6] for line in table] == wanted


def test_each_server_and_each_lane_gets_its_port_and_both_calls_the_same_id(tmp_path, monkeypatch):
    demo = stand_in(monkeypatch, tmp_path)
    assert demo.main(["--backend", "p2p"]) == 0
    assert [(server.name, server.transfer and server.transfer["kv_role"]) for server in demo.started] == [
        ("prefill", "kv_producer"),
        ("decode-shm", "kv_consumer"),
        ("decode-tcp", "kv_consumer"),
        ("single", None),
    ]
    prefill, shm, tcp, _ = demo.started
    assert prefill.transfer["kv_connector"] == "P2pNcclConnector"
    assert prefill.transfer["kv_port"] != shm.transfer["kv_port"] == tcp.transfer["kv_port"]
    assert [server.transfer["kv_connector_extra_config"] for server in (prefill, shm, tcp)] == [
        {"host": "127.0.0.1"},
        {"host": "127.0.0.1", "lane": "shm"},
        {"host": "127.0.0.1", "lane": "tcp"},
    ]
    ports = (prefill.transfer["kv_port"], shm.transfer["kv_port"])
    own_calls = [call for call in demo.calls if call.request_id]
    assert len(own_calls) == 2 * 2 * len(demo.PROMPT_TOKENS) * demo.PROMPTS_PER_LENGTH
    for first, second in zip(own_calls[::2], own_calls[1::2], strict=True):
        assert first.request_id == second.request_id
        assert (first.url, first.max_tokens, second.max_tokens) == (prefill.url, 1, demo.OUTPUT_TOKENS)
        start = f"___prefill_addr_127.0.0.1:{ports[0]}___decode_addr_127.0.0.1:{ports[1]}_"
        assert first.request_id.startswith(start)


def test_a_lane_of_the_folder_is_refused(capsys):
    with pytest.raises(SystemExit) as refusal:
        DEMO.main(["--lane", "tcp"])
    assert refusal.value.code == 2
    assert "--lane belongs to --backend p2p" in capsys.readouterr().err


def stand_in(monkeypatch, folder):
    """The program with servers that answer at once and count as they should."""
    demo = SimpleNamespace(started=[], calls=[])
    tokens = {}

    @contextlib.contextmanager
    def server(name, *_, transfer=None, **__):
        url = f"http://{name}"
        demo.started.append(SimpleNamespace(name=name, url=url, transfer=transfer))
        tokens[url] = 0
        yield SimpleNamespace(name=name, url=url, log_path=folder, wait_until_ready=lambda *_: 1.0)

    @contextlib.contextmanager
    def proxy(_prefill_url, decode_url, kv_ports=None, **_):
        yield SimpleNamespace(url=f"{decode_url}/proxy", wait_until_ready=lambda *_: 1.0)

    def complete(url, prompt, max_tokens, request_id=None):
        demo.calls.append(SimpleNamespace(url=url, max_tokens=max_tokens, request_id=request_id))
        if url.endswith("/proxy"):
            count = len(prompt) if demo.backend == "p2p" else (len(prompt) - 1) // 32 * 32
            tokens[url.removesuffix("/proxy")] += count
        return completion()

    program = runpy.run_path(str(PROGRAM), run_name="demo")
    names = program["main"].__globals__
    (folder / "target").mkdir()
    for name, value in {
        # pytest keeps its own handlers.
        "signal": SimpleNamespace(SIGTERM=None, signal=lambda *_: None),
        "DISK_BYTES_WANTED": 0,
        "vllm_server": server,
        "kvlane_proxy": proxy,
        "complete": complete,
        "external_hits": lambda url: tokens[url],
        "pulled_bytes": lambda url, lane: (lane in url) * tokens[url] * token_bytes(),
        "tiny_model": lambda _dtype: folder,
        "vocabulary_size": lambda _model: 512,
        "make_store": lambda _name: folder,
        "remove_store": lambda _folder: None,
        "TARGET": folder / "target",
        "ROOT": folder,
    }.items():
        monkeypatch.setitem(names, name, value)

    def main(arguments):
        demo.backend = "p2p" if "p2p" in arguments else "fs"
        return program["main"](arguments)

    demo.main = main
    demo.PROMPT_TOKENS = program["PROMPT_TOKENS"]
    demo.PROMPTS_PER_LENGTH = program["PROMPTS_PER_LENGTH"]
    demo.OUTPUT_TOKENS = program["OUTPUT_TOKENS"]
    return demo
