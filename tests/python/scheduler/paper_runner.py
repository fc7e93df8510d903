"""vLLM's model runner with the paper model in place of the real one: block tables, chunks, connector hooks.

The order of the connector's hooks is vLLM's own, since vLLM's mixin calls them.
"""

import contextlib
import inspect

from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.forward_context import set_forward_context
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from paper_model import LAYER_NAMES, PaperCache, compute

# Since 0.19 the hook gets the step's metadata and is called in every step; before, the ids, when there are some.
_PREEMPTIONS_BY_ID = "preempted_req_ids" in inspect.signature(KVConnectorBase_V1.handle_preemptions).parameters


class PaperRunner:
    """Executes what a scheduler decided, on a cache of its own."""

    def __init__(self, vllm_config, connector, cache: PaperCache):
        self._config = vllm_config
        self._connector = connector
        self.cache = cache
        self._tokens = {}
        self._prompt_tokens = {}
        self._blocks = {}

    def execute(self, step):
        """One step: returns what the worker process would send to the scheduler."""
        with self._as_worker():
            self._handle_preemptions(step)
            self._follow(step)
            if not step.total_num_scheduled_tokens:
                if self._connector is None:
                    return EMPTY_MODEL_RUNNER_OUTPUT
                return KVConnectorModelRunnerMixin.kv_connector_no_forward(step, self._config)
            request_ids = list(step.num_scheduled_tokens)
            attention = {name: object() for name in LAYER_NAMES}
            with (
                set_forward_context(attention, self._config),
                KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(step) as connector_output,
            ):
                sampled = self._forward(step, request_ids)
            return ModelRunnerOutput(
                req_ids=request_ids,
                req_id_to_index={request_id: index for index, request_id in enumerate(request_ids)},
                sampled_token_ids=sampled,
                prompt_logprobs_dict={},
                kv_connector_output=connector_output,
            )

    @contextlib.contextmanager
    def _as_worker(self):
        kv_transfer_state._KV_CONNECTOR_AGENT = self._connector
        try:
            yield
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = None

    def _handle_preemptions(self, step):
        if self._connector is None:
            return
        if not _PREEMPTIONS_BY_ID:
            self._connector.handle_preemptions(step.kv_connector_metadata)
        elif step.preempted_req_ids:
            self._connector.handle_preemptions(step.preempted_req_ids)

    def _follow(self, step):
        for request_id in step.finished_req_ids:
            self._tokens.pop(request_id, None)
            self._blocks.pop(request_id, None)
        self._computed = {}
        for new in step.scheduled_new_reqs:
            self._tokens[new.req_id] = list(new.prompt_token_ids)
            self._prompt_tokens[new.req_id] = len(new.prompt_token_ids)
            self._blocks[new.req_id] = list(new.block_ids[0])
            self._computed[new.req_id] = new.num_computed_tokens
        cached = step.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            new_blocks = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                self._blocks[request_id] = list(new_blocks[0])
                # A token that was on its way when the request was preempted may have been dropped.
                known = self._prompt_tokens[request_id] + cached.num_output_tokens[index]
                self._tokens[request_id] = self._tokens[request_id][:known]
            elif new_blocks is not None:
                self._blocks[request_id] += new_blocks[0]
            self._computed[request_id] = cached.num_computed_tokens[index]

    def _forward(self, step, request_ids):
        hooks = LAYER_NAMES if self._connector is not None else ()
        for name in hooks:
            self._connector.wait_for_layer_load(name)
        sampled = []
        for request_id in request_ids:
            tokens, blocks = self._tokens[request_id], self._blocks[request_id]
            start = self._computed[request_id]
            end = start + step.num_scheduled_tokens[request_id]
            assert end <= len(tokens), f"{request_id}: {end} tokens are scheduled, {len(tokens)} exist"
            following = compute(self.cache, blocks, tokens, start, end)
            if end == len(tokens):
                tokens.append(following)
                sampled.append([following])
            else:
                sampled.append([])
        for name in hooks:
            self._connector.save_kv_layer(name, self.cache.tensors[name], object())
        return sampled
