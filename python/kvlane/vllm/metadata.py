"""What the scheduler half tells the worker half in a step. Plain values: they are pickled in every step."""

import dataclasses

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata


@dataclasses.dataclass(frozen=True)
class Reservation:
    """Blocks that this server is about to compute."""

    keys: bytes
    first_depth: int
    timeout_ms: int


@dataclasses.dataclass(frozen=True)
class StoreJob:
    """Prompt blocks that are complete at the end of this step."""

    request_id: str
    keys: bytes
    block_ids: list[int]
    first_depth: int


@dataclasses.dataclass(frozen=True)
class LoadJob:
    """Blocks to fill from the folder."""

    request_id: str
    keys: bytes
    block_ids: list[int]
    #: What is left of `load_timeout_ms` after the wait for the prefill. None: all of it.
    timeout_ms: int | None = None


@dataclasses.dataclass(frozen=True)
class StepMetadata(KVConnectorMetadata):
    """One step's work. An idle step carries `IDLE`; a value is never changed once it was handed out."""

    reservations: list[Reservation] = dataclasses.field(default_factory=list)
    withdrawals: list[bytes] = dataclasses.field(default_factory=list)
    stores: list[StoreJob] = dataclasses.field(default_factory=list)
    loads: list[LoadJob] = dataclasses.field(default_factory=list)
    #: Requests that ended while their load was running.
    aborted_loads: list[str] = dataclasses.field(default_factory=list)
    #: The folder's epoch for which the stores were planned, None if it is not known. After a reset they are void.
    epoch: int | None = None

    @property
    def is_idle(self) -> bool:
        return not (self.reservations or self.withdrawals or self.stores or self.loads or self.aborted_loads)


IDLE = StepMetadata()


@dataclasses.dataclass(frozen=True)
class WorkerHandshake(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler half before the first request."""

    namespace: bytes
    pp_rank: int
    tp_rank: int
