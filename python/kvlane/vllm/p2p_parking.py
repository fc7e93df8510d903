"""Bounds the blocks that wait for KV of others.

A request whose KV is still coming holds blocks that vLLM cannot take back. With all blocks held so, on a pair of
servers that wait for each other, nobody could compute. So such requests get a share of the cache; a request that is
larger than the share may wait if it is alone.
"""

import math
from typing import Any


class Parking:
    """Requests that hold blocks and have not started: loading ones, and loaded ones that wait for their turn."""

    def __init__(self, cache_blocks: int, parked_percent: int, block_tokens: int) -> None:
        self._limit_blocks = max(cache_blocks * parked_percent // 100, 1)
        self._block_tokens = block_tokens
        self._parked: dict[str, int] = {}

    @property
    def blocks(self) -> int:
        """Blocks that are held now."""
        return sum(self._parked.values())

    def has_room_for(self, tokens: int) -> bool:
        """Whether a request with so many tokens may wait beside those that do."""
        return not self._parked or self.blocks + self._blocks(tokens) <= self._limit_blocks

    def park(self, request_id: str, tokens: int) -> None:
        """The request got blocks to load into."""
        self._parked[request_id] = self._blocks(tokens)

    def scheduled(self, output: Any) -> None:
        """Takes up who starts in a step (vLLM's SchedulerOutput)."""
        if not self._parked:
            return
        for new in output.scheduled_new_reqs:
            self._parked.pop(new.req_id, None)
        for request_id in output.scheduled_cached_reqs.resumed_req_ids:
            self._parked.pop(request_id, None)

    def gone(self, request_id: str) -> None:
        """The request holds no blocks any more, or never did."""
        self._parked.pop(request_id, None)

    def _blocks(self, tokens: int) -> int:
        return math.ceil(tokens / self._block_tokens)
