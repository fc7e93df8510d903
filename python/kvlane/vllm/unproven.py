"""Blocks of synchronous loads whose outcome is not known yet.

vLLM puts such blocks into its prefix cache before they are filled, and evicts those that turn out bad only for requests
that are running when it hears of them. A request that was aborted or preempted in between leaves bad blocks, and blocks
computed from them, where the next request with that prefix finds them. So they are remembered here and evicted.
"""

import collections
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

logger = logging.getLogger("vllm.kvlane")

#: Attributes of vLLM's requests with which outputs in flight are dropped: all of them (0.27 and newer), or the next one
#: (a flag at first, later a number).
STALE_TOKENS = "num_stale_output_tokens"
NEXT_OUTPUT = ("discard_latest_async_tokens", "async_tokens_to_discard")


class BlockPool(Protocol):
    """What is needed of vLLM's block pool."""

    blocks: Sequence[Any]

    def evict_blocks(self, block_ids: set[int]) -> None: ...


class UnprovenBlocks:
    """The blocks, and what became of the requests that held them. Every outcome is known `lasts_steps` later."""

    def __init__(self, lasts_steps: int) -> None:
        self.block_pool: Callable[[], BlockPool | None] = lambda: None
        self._lasts_steps = lasts_steps
        self._step = 0
        #: Blocks of each load, and of each request that ended (in their order), with the last step in which they count.
        self._loads: collections.deque[tuple[int, set[int]]] = collections.deque()
        self._freed: collections.deque[tuple[int, list[int]]] = collections.deque()
        self._preempted_until_step = -1

    def add(self, block_ids: set[int]) -> None:
        """The next step loads these blocks. The set is emptied when the outcome is known: from then on the blocks may
        be another request's."""
        self._loads.append((self._step + self._lasts_steps, block_ids))

    def next_step(self) -> None:
        """A step is being planned."""
        self._step += 1
        while self._loads and self._loads[0][0] < self._step:
            self._loads.popleft()[1].clear()
        while self._freed and self._freed[0][0] < self._step:
            self._freed.popleft()

    def freed(self, block_ids: Sequence[int]) -> None:
        """A request with these blocks ended."""
        if any(not load.isdisjoint(block_ids) for _, load in self._loads):
            self._freed.append((self._step + self._lasts_steps, list(block_ids)))

    def preempted(self, request: Any) -> None:
        """A request (vLLM's record, None if it is not known) lost its blocks and will come back."""
        if self._loads:
            self._preempted_until_step = self._step + self._lasts_steps
            if request is not None:
                _drop_output_in_flight(request)

    def evict(self, bad_blocks: set[int]) -> None:
        """These blocks hold no valid KV: nobody may find them, or what was computed from them, any more."""
        somebody_was_preempted = self._step <= self._preempted_until_step
        if not (self._freed or somebody_was_preempted):
            return
        pool = self.block_pool()
        if pool is None:
            logger.error("kvlane: a bad block of a synchronous load may be in the prefix cache: there is no block pool")
        elif somebody_was_preempted:
            # Its blocks are not known. This is rare, and an empty cache costs recomputes only.
            pool.evict_blocks(set(range(len(pool.blocks))))
        else:
            for _, blocks in self._freed:
                first_bad = next((index for index, block in enumerate(blocks) if block in bad_blocks), len(blocks))
                pool.evict_blocks(set(blocks[first_bad:]))


def _drop_output_in_flight(request: Any) -> None:
    """Makes vLLM drop what steps in flight sample for a preempted request, as it does itself when it resets its prefix
    cache: it would hand a token that came from bad blocks to the client. A dropped token is sampled again."""
    if getattr(request, STALE_TOKENS, 0):
        request.drop_stale_output = True
        return
    for mark in NEXT_OUTPUT:
        if hasattr(request, mark) and request.num_output_placeholders > 0:
            request.num_output_placeholders = 0
            # True or 1: without pipeline stages no more than one output is in flight (the start refuses others).
            setattr(request, mark, type(getattr(request, mark))(1))
