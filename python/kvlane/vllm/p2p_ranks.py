"""From which ranks of prefill a rank of decode takes its KV heads, where the two have other tensor-parallel sizes.

vLLM gives each rank ``max(1, heads // size)`` KV heads, in order of rank. With more ranks than heads, neighbours have
the same head; with MLA all ranks have the same bytes. Every rank of prefill hears from at least one rank of decode:
what nobody reads would be held until its lease ends.
"""

import dataclasses
import functools


@dataclasses.dataclass(frozen=True)
class Source:
    """A rank of prefill that a rank of decode talks to."""

    #: In the tensor group.
    rank: int
    #: False: there is nothing to take from it, and it is told so.
    is_read: bool
    #: Ranks of decode that talk to it.
    readers: int


def heads_of_rank(heads: int | None, rank: int, size: int) -> range:
    """KV heads that a rank of a tensor group of `size` has. `heads` None: MLA, whose ranks all have the same."""
    if heads is None:
        return range(1)
    if heads % size == 0:
        count = heads // size
        return range(rank * count, (rank + 1) * count)
    if size % heads == 0:
        return range(rank * heads // size, rank * heads // size + 1)
    raise ValueError(f"{heads} KV heads cannot be shared out evenly over {size} ranks")


@functools.lru_cache(maxsize=64)
def sources(heads: int | None, rank: int, size: int, peer_size: int) -> tuple[Source, ...]:
    """What rank `rank` of `size` takes from a prefill server of `peer_size` ranks. Raises ValueError where heads do not
    split evenly."""
    if peer_size == size:
        return (Source(rank, True, 1),)
    read = [_read_by(heads, reader, size, peer_size) for reader in range(size)]
    unread = set(range(peer_size)).difference(*read)
    told = [peers | {peer for peer in unread if peer % size == reader} for reader, peers in enumerate(read)]
    return tuple(Source(peer, peer in read[rank], sum(peer in peers for peers in told)) for peer in sorted(told[rank]))


def _read_by(heads: int | None, rank: int, size: int, peer_size: int) -> set[int]:
    """Ranks of prefill whose heads together are those of a rank of decode, each head once."""
    own = heads_of_rank(heads, rank, size)
    by_heads: dict[range, list[int]] = {}
    for peer in range(peer_size):
        theirs = heads_of_rank(heads, peer, peer_size)
        if max(own.start, theirs.start) < min(own.stop, theirs.stop):
            by_heads.setdefault(theirs, []).append(peer)
    # Ranks with the same heads share the readers.
    return {peers[rank % len(peers)] for peers in by_heads.values()}
