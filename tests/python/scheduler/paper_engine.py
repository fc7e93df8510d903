"""An engine core around vLLM's Scheduler or AsyncScheduler, with kvlane's connector in both roles and the paper model.

The async form keeps one step in flight, as vLLM does on GPUs: a step is scheduled and runs before the result of the one
before it reaches the scheduler. The CPU platform switches that off, so the class is made here directly.
"""

import collections
import dataclasses
import inspect
import time

import torch
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from paper_model import HEAD_DIM, HEADS, LAYER_NAMES, LAYERS, PaperCache
from paper_runner import PaperRunner
from support.connector import transfer_config
from support.tiny_model import tiny_model

BLOCK_TOKENS = 16
MODEL_LEN_TOKENS = 512
# A load is a few KiB here; a request that is not done by then waits for something that never comes.
RUN_LIMIT_S = 20

_ONE_STORAGE = "layers" in {field.name for field in dataclasses.fields(KVCacheTensor)}
#: Whether an abort holds the blocks until the load has ended (0.16 and newer).
ABORT_HOLDS_BLOCKS = "delay_free_blocks" in inspect.signature(Scheduler._free_request).parameters


class PaperEngine:
    """One engine; `role` is producer, consumer, both, or None for no connector at all. `transfer` is a
    kv-transfer-config of another connector than the one through a folder.

    Kept per request: `answers` (its tokens), `ended` (why), `loads` and `loaded_tokens` (what vLLM agreed to load),
    `preemptions`, `seconds` (from its arrival to its last token).
    """

    def __init__(
        self,
        role,
        store,
        *,
        asynchronous=False,
        blocks=64,
        prefix_caching=True,
        step_tokens=MODEL_LEN_TOKENS,
        requests_at_once=8,
        transfer=None,
        **options,
    ):
        # A store that is given up because the machine stood still for a moment looks like one that was forgotten.
        patient = {"store_timeout_ms": 60_000} | options
        transfer = transfer or (role and transfer_config(role, store, **patient))
        config = _vllm_config(transfer, prefix_caching, step_tokens, requests_at_once)
        config.cache_config.num_gpu_blocks = blocks
        config.scheduler_config.async_scheduling = asynchronous
        cache_config = _kv_cache_config(blocks)
        cache = PaperCache(blocks, BLOCK_TOKENS, keys_outermost=not _ONE_STORAGE)
        # vLLM's order: the worker first, then its tensors, then the scheduler, then the handshake.
        self.worker = None
        if role is not None:
            self.worker = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, cache_config)
            self.worker.register_kv_caches(cache.tensors)
        self.scheduler = (AsyncScheduler if asynchronous else Scheduler)(
            vllm_config=config,
            kv_cache_config=cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
            log_stats=True,
        )
        self.connector = self.scheduler.connector
        if role is not None:
            self._shake_hands()
        self.runner = PaperRunner(config, self.worker, cache)
        self.cache = cache
        init_none_hash(sha256)
        self._block_hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        self._asynchronous = asynchronous
        self._in_flight = collections.deque()
        self.answers, self.ended, self.seconds, self.parameters = {}, {}, {}, {}
        self._arrived_s = {}
        self._watch_connector()
        self.steps = 0
        self.free_blocks_at_start = self.free_blocks()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.worker is not None:
            self.worker.shutdown()
            self.connector.shutdown()

    def add(self, request_id, prompt, max_tokens=8, parameters=None):
        """Hands a greedy request to the scheduler. `parameters`: its kv_transfer_params."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        if parameters is not None:
            sampling.extra_args = {"kv_transfer_params": parameters}
        arguments = {
            "request_id": request_id,
            "prompt_token_ids": list(prompt),
            "sampling_params": sampling,
            "pooling_params": None,
            "block_hasher": self._block_hasher,
        }
        if "eos_token_id" in inspect.signature(Request.__init__).parameters:
            arguments["eos_token_id"] = None
        self.answers[request_id] = []
        self._arrived_s[request_id] = time.monotonic()
        self.scheduler.add_request(Request(**arguments))

    def abort(self, request_id):
        """What a client's hang-up does; a request that ended already is left alone."""
        if request_id not in self.ended:
            self.ended[request_id] = "aborted"
            self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self):
        """Schedules and runs one step; delivers its result, or the one before it when a step stays in flight."""
        self.steps += 1
        scheduled = self.scheduler.schedule()
        self._in_flight.append((scheduled, self.runner.execute(scheduled)))
        if not (self._asynchronous and len(self._in_flight) == 1 and scheduled.total_num_scheduled_tokens):
            self._deliver()
        return scheduled

    def run(self, limit_s=RUN_LIMIT_S):
        """Steps until every request has ended and every result is delivered."""
        deadline = time.monotonic() + limit_s
        while self.scheduler.has_unfinished_requests() or self._in_flight:
            if not self.scheduler.has_unfinished_requests():
                self._deliver()
                continue
            self.step()
            if time.monotonic() > deadline:
                states = {name: request.status.name for name, request in self.scheduler.requests.items()}
                raise TimeoutError(f"not done after {limit_s} s and {self.steps} steps: {states}")

    def answer(self, request_id, prompt, max_tokens=8):
        """The answer to one request, run to its end."""
        self.add(request_id, prompt, max_tokens)
        self.run()
        return self.answers[request_id]

    def settle(self, limit_s=RUN_LIMIT_S):
        """Steps without work until all blocks are free, as an engine does while it waits for aborted loads."""
        deadline = time.monotonic() + limit_s
        while self._in_flight:
            self._deliver()
        while self.free_blocks() != self.free_blocks_at_start and time.monotonic() < deadline:
            self.step()
            while self._in_flight:
                self._deliver()
            time.sleep(0.001)
        return self.free_blocks()

    def free_blocks(self):
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def request(self, request_id):
        """The scheduler's own record of a request, None once it is gone."""
        return self.scheduler.requests.get(request_id)

    def block_ids(self, request_id):
        """The blocks that a request holds now."""
        return list(self.scheduler.kv_cache_manager.get_block_ids(request_id)[0])

    def _deliver(self):
        scheduled, result = self._in_flight.popleft()
        for outputs in self.scheduler.update_from_output(scheduled, result).values():
            for output in outputs.outputs:
                self.answers[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    self.parameters[output.request_id] = output.kv_transfer_params
                    self.ended.setdefault(output.request_id, str(output.finish_reason))
                    self.seconds[output.request_id] = time.monotonic() - self._arrived_s[output.request_id]

    def _watch_connector(self):
        """Counts what vLLM and the connector agree on, and checks what vLLM itself only checks on some paths."""
        self.loads, self.loaded_tokens = collections.Counter(), collections.Counter()
        self.preemptions = collections.Counter()
        preempt = self.scheduler._preempt_request

        def counted_preempt(request, *arguments, **named):
            self.preemptions[request.request_id] += 1
            return preempt(request, *arguments, **named)

        self.scheduler._preempt_request = counted_preempt
        if self.connector is None:
            return
        allocated = self.connector.update_state_after_alloc

        def counted_alloc(request, blocks, external_tokens):
            if external_tokens:
                self.loads[request.request_id] += 1
                self.loaded_tokens[request.request_id] += external_tokens
            return allocated(request, blocks, external_tokens)

        self.connector.update_state_after_alloc = counted_alloc

    def _shake_hands(self):
        metadata = self.worker.get_handshake_metadata()
        if metadata is None:
            return
        if hasattr(self.connector, "set_xfer_handshake_metadata_pp_aware"):
            self.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): metadata})
        else:
            self.connector.set_xfer_handshake_metadata({0: metadata})


def _vllm_config(transfer, prefix_caching, step_tokens, requests_at_once):
    return EngineArgs(
        model=str(tiny_model("float32")),
        # Nobody loads its weights: paper has its own. Named by their files they would be shared with nobody when this
        # process just built them.
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK_TOKENS,
        max_model_len=MODEL_LEN_TOKENS,
        max_num_batched_tokens=step_tokens,
        max_num_seqs=requests_at_once,
        enable_chunked_prefill=True,
        enable_prefix_caching=prefix_caching,
        kv_transfer_config=transfer and KVTransferConfig(**transfer),
    ).create_engine_config()


def _kv_cache_config(blocks):
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=HEADS, head_size=HEAD_DIM, dtype=torch.float32)
    page_bytes = spec.page_size_bytes
    if _ONE_STORAGE:
        size = LAYERS * blocks * page_bytes
        tensors = [
            KVCacheTensor(size=size, layers=LAYER_NAMES, layer_stride=blocks * page_bytes, block_stride=page_bytes)
        ]
    else:
        tensors = [KVCacheTensor(size=blocks * page_bytes, shared_by=[name]) for name in LAYER_NAMES]
    return KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=tensors, kv_cache_groups=[KVCacheGroupSpec(LAYER_NAMES, spec)]
    )
