"""Chains of recent prompts, so that a chat that grew costs the hashing of what is new."""

import collections
from collections.abc import Hashable, Sequence
from typing import Any

from kvlane._native import Chain

#: Prompts that are remembered, and the blocks of all their chains together (32 bytes each).
LIMIT_CHAINS = 64
LIMIT_BLOCKS = 1 << 19

_SHA256_BYTES = 32


def prompt_hashes(request: Any, block_tokens: int) -> Sequence[bytes] | None:
    """vLLM's own block hashes, those of the prompt's full blocks first; None where they cannot stand for the tokens.

    vLLM has hashed every prompt before it asks a connector. Its hash of a block covers the whole prefix; with SHA-256,
    its default, equal hashes mean equal tokens as surely as equal keys of kvlane do. Its faster functions do not
    promise that, and have shorter digests.
    """
    hashes, tokens = getattr(request, "block_hashes", None), len(request.prompt_token_ids)
    # Another number of hashes would mean blocks of another size.
    if not hashes or len(hashes) != getattr(request, "num_tokens", tokens) // block_tokens:
        return None
    return hashes if isinstance(hashes[0], bytes) and len(hashes[0]) == _SHA256_BYTES else None


class RecentChains:
    """Remembers the last chains by what vLLM calls their last block. Good within one process: vLLM seeds its hashes."""

    def __init__(self, limit_chains: int = LIMIT_CHAINS, limit_blocks: int = LIMIT_BLOCKS) -> None:
        self._limit_chains = limit_chains
        self._limit_blocks = limit_blocks
        self._blocks = 0
        #: By root (whatever decides a chain beside its tokens) and last hash; the oldest first.
        self._chains: collections.OrderedDict[tuple[Hashable, bytes], tuple[int, Chain]] = collections.OrderedDict()
        #: How many of them have so many blocks: what has to be looked for, however many chains there are.
        self._lengths: collections.Counter[int] = collections.Counter()

    def longest(self, root: Hashable, hashes: Sequence[bytes], prompt_blocks: int) -> Chain | None:
        """A copy of the longest chain that the prompt with these hashes begins with, to be continued."""
        for blocks in sorted(self._lengths, reverse=True):
            if blocks > prompt_blocks:
                continue
            place = (root, hashes[blocks - 1])
            known = self._chains.get(place)
            if known is not None:
                self._chains.move_to_end(place)
                return known[1].prefix(blocks)
        return None

    def remember(self, root: Hashable, hashes: Sequence[bytes], chain: Chain) -> None:
        """Takes the chain of a whole prompt. It must not be continued afterwards."""
        blocks = chain.block_count
        if not 0 < blocks <= min(self._limit_blocks, len(hashes)):
            return
        place = (root, hashes[blocks - 1])
        self._forget(place)
        self._chains[place] = (blocks, chain)
        self._lengths[blocks] += 1
        self._blocks += blocks
        while len(self._chains) > self._limit_chains or self._blocks > self._limit_blocks:
            self._forget(next(iter(self._chains)))

    def _forget(self, place: tuple[Hashable, bytes]) -> None:
        known = self._chains.pop(place, None)
        if known is None:
            return
        blocks = known[0]
        self._blocks -= blocks
        self._lengths[blocks] -= 1
        if not self._lengths[blocks]:
            del self._lengths[blocks]
