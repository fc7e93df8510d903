"""Both halves of kvlane's connector in one process, stepped as vLLM 0.32 steps an engine with nothing to move."""

import json
import os
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import ForwardContext
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import KVConnectorOutput

from kvlane import vllm as kvlane_vllm
from workload import BLOCK_TOKENS, HEAD_DIM, KV_HEADS, LAYERS, RUN_BYTES

CACHE_BLOCKS = 8
LAYER_NAMES = [f"model.layers.{number}.self_attn.attn" for number in range(LAYERS)]
CONNECTOR = "KvlaneFsConnector"


class IdleEngine:
    """Builds the connector as the engine does, and calls every hook that a step calls."""

    def __init__(self, folder: Path) -> None:
        config, cache_config = engine_config(folder), cache_config_of_model()
        connector = getattr(kvlane_vllm, CONNECTOR)
        self._worker = connector(config, KVConnectorRole.WORKER, cache_config)
        self._layers = {
            name: torch.zeros(CACHE_BLOCKS, KV_HEADS, BLOCK_TOKENS, 2 * HEAD_DIM, dtype=torch.bfloat16)
            for name in LAYER_NAMES
        }
        self._worker.register_kv_caches(self._layers)
        self._scheduler = connector(config, KVConnectorRole.SCHEDULER, cache_config)
        handshake = self._worker.get_handshake_metadata()
        if handshake is not None:
            self._scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): handshake})
        self._nothing_scheduled, self._no_output = SchedulerOutput.make_empty(), KVConnectorOutput()
        self._forward = ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping={}, all_moe_layers=None)
        self._attention = object()

    def step(self) -> None:
        """The hooks of one forward pass, in vLLM's order, layer hooks of all layers included."""
        scheduler, worker = self._scheduler, self._worker
        metadata = scheduler.build_connector_meta(self._nothing_scheduled)
        worker.handle_preemptions(metadata)
        worker.bind_connector_metadata(metadata)
        for name, layer in self._layers.items():
            worker.wait_for_layer_load(name)
            worker.save_kv_layer(name, layer, self._attention)
        worker.start_load_kv(self._forward)
        worker.wait_for_save()
        worker.get_transfer_results(self._nothing_scheduled.finished_req_ids)
        worker.get_block_ids_with_load_errors()
        worker.get_kv_connector_stats()
        worker.get_kv_connector_kv_cache_events()
        worker.build_connector_worker_meta()
        worker.clear_connector_metadata()
        scheduler.update_connector_output(self._no_output)
        scheduler.get_kv_connector_stats()
        scheduler.take_events()
        scheduler.has_pending_push_work()

    def close(self) -> None:
        self._scheduler.shutdown()
        self._worker.shutdown()


def engine_config(folder: Path) -> VllmConfig:
    """The configuration of an engine for a model of the benchmark's shape; its weights are never needed."""
    model, store = folder / "model", folder / "store"
    for path in (model, store):
        path.mkdir(parents=True, exist_ok=True)
    description = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_attention_heads": 2048 // HEAD_DIM,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": LAYERS,
        "vocab_size": 151_936,
        "max_position_embeddings": 131_072,
        "torch_dtype": "bfloat16",
    }
    (model / "config.json").write_text(json.dumps(description))
    (model / "model.safetensors").write_bytes(b"weights that nobody loads")
    return EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        block_size=BLOCK_TOKENS,
        kv_transfer_config=KVTransferConfig(
            kv_connector=CONNECTOR,
            kv_connector_module_path="kvlane.vllm",
            kv_role="kv_both",
            kv_connector_extra_config={"shared_storage_path": str(store), "capacity_bytes": "64MiB"},
        ),
    ).create_engine_config()


def cache_config_of_model() -> KVCacheConfig:
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=torch.bfloat16)
    layer_bytes = RUN_BYTES * CACHE_BLOCKS
    tensor = KVCacheTensor(layer_bytes * LAYERS, LAYER_NAMES, layer_bytes, RUN_BYTES)
    return KVCacheConfig(CACHE_BLOCKS, [tensor], [KVCacheGroupSpec(LAYER_NAMES, spec)])
