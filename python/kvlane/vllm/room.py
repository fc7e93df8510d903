"""Keeps asynchronous loads from filling the cache so that nobody can compute.

A request that loads holds blocks that vLLM cannot take back: it preempts running requests only. Older versions hand
out blocks to loads without a thought for what the request needs afterwards. Then the queue's head finds too few free
blocks, and the loaded requests that hold the rest stand behind it: the engine steps for ever without computing.

Two rules exclude that. Loads are only started while all requests that hold blocks fit into the cache together. And
while a loaded request waits to start, nobody else is let in front of it: asked about another request, the connector
says "ask again", which makes vLLM skip that request instead of stopping at it.
"""

from collections.abc import Mapping
from typing import Any


class Room:
    """Which requests hold blocks: parked ones (loading, or loaded and not started) and running ones."""

    def __init__(self, cache_blocks: int, block_tokens: int) -> None:
        self._usable_blocks = cache_blocks - 1  # without vLLM's null block
        self._block_tokens = block_tokens
        self._parked: dict[str, Any] = {}
        self._loaded: set[str] = set()
        self._running: dict[str, Any] = {}

    def somebody_waits_to_start(self, request_id: str) -> bool:
        """Whether another request has its KV and waits for its turn."""
        if request_id in self._parked:
            self.gone(request_id)  # vLLM only asks about requests without blocks: its load failed
        return bool(self._loaded)

    def has_room_for(self, request: Any) -> bool:
        """Whether the request fits beside all that hold blocks. Alone it always does: vLLM saw to that at start."""
        if not self._parked and not self._running:
            return True
        held = sum(self._blocks(other) for group in (self._parked, self._running) for other in group.values())
        return held + self._blocks(request) <= self._usable_blocks

    def park(self, request: Any) -> None:
        """The request got blocks to load into."""
        self._parked[request.request_id] = request

    def loaded(self, request_id: str) -> None:
        """The request's load ended, well or not."""
        if request_id in self._parked:
            self._loaded.add(request_id)

    def scheduled(self, output: Any, requests: Mapping[str, Any]) -> None:
        """Takes up who starts and who is preempted in a step (vLLM's SchedulerOutput)."""
        for request_id in output.preempted_req_ids or ():
            self._running.pop(request_id, None)
        started = [new.req_id for new in output.scheduled_new_reqs]
        started += output.scheduled_cached_reqs.resumed_req_ids
        for request_id in started:
            self._parked.pop(request_id, None)
            self._loaded.discard(request_id)
            if request_id in requests:
                self._running[request_id] = requests[request_id].request

    def gone(self, request_id: str) -> None:
        """The request holds no blocks any more."""
        self._parked.pop(request_id, None)
        self._loaded.discard(request_id)
        self._running.pop(request_id, None)

    def _blocks(self, request: Any) -> int:
        # The tokens it has, the next one, and a block for what a speculative step may add.
        return request.num_tokens // self._block_tokens + 2
