"""Risk: the scheduler's process binds the port, or an old manifest's engine is set up otherwise than it says."""

import types

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

import kvlane.compat  # noqa: F401  (the manifest's keys, as the plugin makes vLLM accept them)
from kvlane.vllm import p2p_connector
from paper_engine import PaperEngine
from paper_model import expected_tokens
from support.fake_p2p import Hub

MANIFEST = {
    "kv_connector": "P2pNcclConnector", "kv_rank": 0, "kv_parallel_size": 2, "kv_ip": "0.0.0.0", "kv_port": 14579,
    "engine_id": "p2p-nccl-same-node",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    made.install(monkeypatch)
    return made


@pytest.fixture
def lines(monkeypatch):
    """What the connector logs; vLLM sets its own logger up anew while an engine starts."""
    said = []
    log = types.SimpleNamespace(**dict.fromkeys(("info", "warning"), lambda text, *parts: said.append(text % parts)))
    monkeypatch.setattr(p2p_connector, "logger", log)
    return said


@pytest.mark.parametrize("role", ["producer", "consumer", "both"])
def test_the_old_manifest_starts_an_engine_whose_worker_listens(hub, role, lines, prompts):
    with PaperEngine(role, None, transfer={**MANIFEST, "kv_role": f"kv_{role}"}) as engine:
        options = [worker.options for worker in hub.workers.values()]
        assert [(given["can_offer"], given["can_pull"], given["port"]) for given in options] == [
            (role != "consumer", role != "producer", 14579)
        ]
        obsolete = [line for line in lines if "obsolete and without effect" in line]
        assert len(obsolete) == 1
        assert all(name in obsolete[0] for name in ("kv_rank", "kv_parallel_size", "kv_ip"))
        # Only who listens can be read by strangers.
        assert any("there is no secret_file" in line for line in lines) == (role != "consumer")
        prompt = prompts(50)
        assert engine.answer("plain", prompt) == expected_tokens(prompt, 8)
        assert engine.scheduler.recompute_kv_load_failures
    assert hub.workers == {}


def test_the_name_leads_to_kvlane_on_this_vllm():
    config = KVTransferConfig(**MANIFEST, kv_role="kv_producer")
    assert KVConnectorFactory.get_connector_class(config).__module__ == "kvlane.vllm.p2p_connector"


def test_options_reach_the_native_module(hub, tmp_path):
    (tmp_path / "secret").write_bytes(b"0123456789abcdef\n")
    extra = {
        "lane": "tcp", "lease_ms": 5000, "transfer_timeout_ms": 7000, "secret_file": str(tmp_path / "secret"),
        "peer_timeout_ms": 9000,
        "allowed_peers": ["10.0.0.0/8"], "connections": 3, "host": "127.0.0.1", "leased_percent": 25,
    }  # fmt: skip
    transfer = {**MANIFEST, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    with PaperEngine("both", None, transfer=transfer, blocks=64):
        (worker,) = hub.workers.values()
    facts = dict(worker.options.pop("facts"))
    assert worker.options == {
        "can_offer": True, "can_pull": True, "host": "127.0.0.1", "port": 14579, "rank": 0,
        "engine_id": "p2p-nccl-same-node", "secret": b"0123456789abcdef", "allowed_peers": ["10.0.0.0/8"],
        "lane": "tcp", "lease_ms": 5000, "transfer_timeout_ms": 7000, "connections": 3, "max_leased_blocks": 16,
        "peer_timeout_ms": 9000,
        "readers": 1,
        "shape": None,  # no layer has a backend that is known
    }  # fmt: skip
    # What a peer of another namespace is told: short enough to read.
    assert facts["model dtype"] == "torch.float32"
    assert "tensors" in facts
    assert all(len(value) <= 400 for value in facts.values())


def test_where_it_is_known_what_blocks_hold_the_namespace_leaves_their_size_and_the_rank_to_the_two_servers(
    hub, monkeypatch
):
    facts, namespaces = {}, {}
    for shape in (None, (0, 2, 1, {"layer.0": (2, 1, False)})):
        monkeypatch.setattr(p2p_connector, "shape_of", lambda *_, shape=shape: shape)
        with PaperEngine("producer", None, transfer={**MANIFEST, "kv_role": "kv_producer"}):
            (worker,) = hub.workers.values()
        assert worker.options["shape"] == shape
        facts[shape is None], namespaces[shape is None] = dict(worker.options["facts"]), worker.namespace
    of_shape = {"block tokens", "tensor rank", "layout"}
    assert of_shape <= facts[True].keys()
    assert facts[False].keys() == facts[True].keys() - of_shape
    assert namespaces[False] != namespaces[True]


def test_servers_of_another_model_have_another_namespace(hub):
    namespaces = []
    for identity in ("a", "b", "a"):
        transfer = {**MANIFEST, "kv_role": "kv_producer", "kv_connector_extra_config": {"model_identity": identity}}
        with PaperEngine("producer", None, transfer=transfer):
            (worker,) = hub.workers.values()
            namespaces.append(worker.namespace)
    assert namespaces[0] == namespaces[2] != namespaces[1]


def test_a_wrong_option_stops_the_start(hub):
    transfer = {**MANIFEST, "kv_role": "kv_producer", "kv_connector_extra_config": {"lanes": "tcp"}}
    with pytest.raises(ValueError, match="unknown option 'lanes'"):
        PaperEngine("producer", None, transfer=transfer)
