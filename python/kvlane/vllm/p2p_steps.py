"""What the scheduler half of the P2P connector tells the worker half in a step. Plain values, pickled in every step."""

import dataclasses
from typing import TypeAlias

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata


@dataclasses.dataclass(frozen=True)
class Offer:
    """Prefill: this prompt is being computed into these blocks, of which more may follow."""

    key: str
    tokens: int
    digest: bytes
    block_ids: list[int]


@dataclasses.dataclass(frozen=True)
class Extend:
    """Prefill: the next blocks of an offered prompt."""

    key: str
    block_ids: list[int]


@dataclasses.dataclass(frozen=True)
class Finish:
    """Prefill: the request has ended, and vLLM keeps its blocks until the worker names it as sent."""

    key: str
    request_id: str


@dataclasses.dataclass(frozen=True)
class Revoke:
    """Prefill: others may write the blocks from this step on."""

    key: str


@dataclasses.dataclass(frozen=True)
class Release:
    """Decode: this server needs nothing of what prefill holds."""

    key: str
    host: str
    port: int
    digest: bytes
    #: Workers that share out the KV heads of the server there, None if that is not known: as many as here, then.
    tensor_ranks: int | None = None


@dataclasses.dataclass(frozen=True)
class Abort:
    """Decode: the request ended while it was loading."""

    request_id: str


Order: TypeAlias = Offer | Extend | Finish | Revoke | Release | Abort


@dataclasses.dataclass(frozen=True)
class Progress:
    """Prefill: blocks `[0, done_blocks)` are complete, and this step completes those up to `wave_blocks`."""

    key: str
    done_blocks: int
    wave_blocks: int


@dataclasses.dataclass(frozen=True)
class Pull:
    """Decode: fill these blocks, the prompt's from `first_block` on."""

    request_id: str
    key: str
    host: str
    port: int
    tokens: int
    digest: bytes
    first_block: int
    block_ids: list[int]
    #: As in `Release`.
    tensor_ranks: int | None = None


@dataclasses.dataclass(frozen=True)
class P2pStep(KVConnectorMetadata):
    """One step's work. An idle step carries `IDLE`; a value is never changed once it was handed out."""

    #: To be carried out before the forward pass, in this order.
    orders: list[Order] = dataclasses.field(default_factory=list)
    progress: list[Progress] = dataclasses.field(default_factory=list)
    pulls: list[Pull] = dataclasses.field(default_factory=list)

    @property
    def is_idle(self) -> bool:
        return not (self.orders or self.progress or self.pulls)


IDLE = P2pStep()


@dataclasses.dataclass(frozen=True)
class P2pHandshake(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler half before the first request."""

    rank: int
    port: int
