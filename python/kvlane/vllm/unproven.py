"""Blocks of synchronous loads whose outcome is not known yet.

vLLM puts such blocks into its prefix cache before they are filled, and evicts those that turn out bad only for requests
that are running when it hears of them. A request that was aborted or preempted in between leaves bad blocks, and blocks
computed from them, where the next request with that prefix finds them. So they are remembered here and evicted.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

logger = logging.getLogger("vllm.kvlane")


class BlockPool(Protocol):
    """What is needed of vLLM's block pool."""

    blocks: Sequence[Any]

    def evict_blocks(self, block_ids: set[int]) -> None: ...


class UnprovenBlocks:
    """The blocks, and what became of the requests that held them."""

    def __init__(self) -> None:
        self.block_pool: Callable[[], BlockPool | None] = lambda: None
        self._blocks: set[int] = set()
        #: The blocks of requests that ended, in their order.
        self._freed: list[list[int]] = []
        self._somebody_was_preempted = False

    def add(self, block_ids: Iterable[int]) -> None:
        """A step is about to load these blocks."""
        self._blocks.update(block_ids)

    def freed(self, block_ids: Sequence[int]) -> None:
        """A request with these blocks ended."""
        if self._blocks and not self._blocks.isdisjoint(block_ids):
            self._freed.append(list(block_ids))

    def preempted(self, request: Any) -> None:
        """A request (vLLM's record, None if it is not known) lost its blocks and will come back."""
        self._somebody_was_preempted = True
        if request is not None:
            _drop_output_in_flight(request)

    def evict(self, bad_blocks: set[int]) -> None:
        """These blocks hold no valid KV: nobody may find them, or what was computed from them, any more."""
        if self._blocks.isdisjoint(bad_blocks) or not (self._freed or self._somebody_was_preempted):
            return
        pool = self.block_pool()
        if pool is None:
            logger.error(
                "kvlane: a bad block of a synchronous load may be in the prefix cache: no block pool was found"
            )
        elif self._somebody_was_preempted:
            # Its blocks are not known. This is rare, and an empty cache costs recomputes only.
            pool.evict_blocks(set(range(len(pool.blocks))))
        else:
            for blocks in self._freed:
                first_bad = next((index for index, block in enumerate(blocks) if block in bad_blocks), len(blocks))
                pool.evict_blocks(set(blocks[first_bad:]))

    def clear(self) -> None:
        """The outcome of every load is known."""
        self._blocks.clear()
        self._freed.clear()
        self._somebody_was_preempted = False


def _drop_output_in_flight(request: Any) -> None:
    """Makes vLLM drop what steps in flight sample for a preempted request, as it does itself when it resets its prefix
    cache: it would hand a token that came from bad blocks to the client. A dropped token is sampled again."""
    if getattr(request, "num_stale_output_tokens", 0):
        request.drop_stale_output = True
    elif hasattr(request, "discard_latest_async_tokens") and request.num_output_placeholders > 0:
        request.num_output_placeholders = 0
        request.discard_latest_async_tokens = True
