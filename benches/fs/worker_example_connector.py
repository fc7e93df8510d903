"""vLLM's own ExampleConnector class, driven without an engine.

It writes one safetensors file per layer into a folder per prompt, and copies through torch with one thread:
more threads made it slower on two cores. Its store goes into a new folder each time, which is faster than
over existing files. The class is taken from its module: kvlane's plugin takes over only the registered name.
"""

import logging
import os
import types

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1 import example_connector

from files import drop, empty, settle
from turns import serve
from workload import (
    BLOCK_TOKENS,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    POOL_BLOCKS,
    TOKENS,
    Floor,
    PagedCache,
    scattered,
    touch,
)

example_connector.logger.setLevel(logging.ERROR)

LAYER_NAMES = [f"model.layers.{number}.self_attn.attn" for number in range(LAYERS)]


class Connector(example_connector.ExampleConnector):
    """The real class without the engine that normally constructs it."""

    def __init__(self, folder: str) -> None:
        self._block_size, self._storage_path, self._requests_need_load = BLOCK_TOKENS, folder, {}

    def _get_connector_metadata(self):
        return self.metadata

    def prepare(self, blocks: list[int], is_store: bool) -> None:
        # One token more than the blocks hold: the connector never moves the last token of a prompt.
        spare = next(block for block in range(POOL_BLOCKS) if block not in blocks)
        self.metadata = example_connector.ExampleConnectorMetadata()
        self.metadata.add_request(list(range(TOKENS + 1)), [*blocks, spare], BLOCK_TOKENS, is_store, [])


def tensors_of(cache: PagedCache) -> list[torch.Tensor]:
    """The layers as 0.32 hands them to connectors: [block][head][token][K and V of a head]."""
    numbers = torch.from_numpy(cache.layers).view(torch.bfloat16)
    return [layer.view(POOL_BLOCKS, BLOCK_TOKENS, KV_HEADS, 2 * HEAD_DIM).permute(0, 2, 1, 3) for layer in numbers]


class System:
    def __init__(self, cores: list[int], folders: dict[str, str]) -> None:
        os.sched_setaffinity(0, cores[:1])
        torch.set_num_threads(1)
        self._floor, self._folders = Floor(), folders
        self._source, self._target = PagedCache(), PagedCache()
        touch([*self._floor.buffers, *self._source.buffers, *self._target.buffers])
        self._source.fill_with_noise()
        self._source_layers = tensors_of(self._source)
        self._attention = {name: object() for name in LAYER_NAMES}
        layers = zip(LAYER_NAMES, tensors_of(self._target), strict=True)
        self._forward_context = types.SimpleNamespace(
            attn_metadata=self._attention,
            no_compile_layers={name: types.SimpleNamespace(kv_cache=layer) for name, layer in layers},
        )

    def cases(self) -> list[tuple[str, str, int]]:
        both = [(case, medium, 1) for medium in self._folders for case in ("store", "load")]
        return [*both, ("load-cold", "disk", 1)]

    def versions(self) -> dict[str, str]:
        return {"vllm": vllm.__version__, "torch": torch.__version__}

    def turn(self, case: str, medium: str, threads: int, round_number: int):
        folder = self._folders[medium]
        source_blocks, target_blocks = scattered("source", round_number), scattered("target", round_number)
        saver, loader = Connector(folder), Connector(folder)
        saver.prepare(source_blocks, True)
        loader.prepare(target_blocks, False)

        def save():
            for name, layer in zip(LAYER_NAMES, self._source_layers, strict=True):
                saver.save_kv_layer(name, layer, self._attention[name])
            saver.wait_for_save()

        def load():
            loader.start_load_kv(self._forward_context)

        empty(folder)
        if case == "store":
            sample = self._floor.around(save)
            load()
        else:
            save()
            drop(folder) if case == "load-cold" else settle(folder)
            sample = self._floor.around(load)
        self._target.check_request(target_blocks, self._source, source_blocks)
        self._target.clear(target_blocks)
        settle(folder)
        return sample


if __name__ == "__main__":
    serve(System)
