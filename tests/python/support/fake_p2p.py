"""A stand-in for the native P2P backend: servers in one process, whose blocks are torch tensors.

It keeps the contract of `kvlane._native.P2pWorker` and `P2pAsker` and complains where the connector breaks it. Nothing
runs on its own: bytes move when the decode side polls.
"""

import dataclasses
import hashlib

from kvlane import _native
from kvlane.vllm import p2p_scheduler


@dataclasses.dataclass
class Lease:
    tokens: int
    digest: bytes
    block_ids: list
    done_blocks: int = 0
    is_finished: bool = False
    #: Steps of its server since its request ended.
    age_steps: int = 0
    #: Released by its reader or expired. A lapsed one was revoked: its blocks are others'.
    has_ended: bool = False
    has_lapsed: bool = False


@dataclasses.dataclass
class Job:
    key: str
    port: int
    tokens: int
    digest: bytes
    first_block: int
    block_ids: list
    lease: Lease | None = None
    copied: int = 0
    is_cancelled: bool = False


class Hub:
    """The network between the servers of a test."""

    def __init__(self):
        self.workers = {}
        #: While set, pulls stand still inside a copy: nothing ends, not even what was cancelled.
        self.is_frozen = False
        #: A lease expires so many steps after its request ended. None: never.
        self.lease_steps = None
        #: Blocks that a pull copies in one poll.
        self.blocks_per_poll = 1 << 20
        #: The job numbers of pulls that fail at the next poll, with the reason.
        self.failing = {}
        #: What askers say in place of the truth, by key.
        self.answers = {}
        self.asked, self.forgotten = [], []

    def install(self, monkeypatch):
        """Puts the stand-ins where the connector looks for the native classes."""
        monkeypatch.setattr(_native, "P2pWorker", lambda *arguments: FakeWorker(self, *arguments), raising=False)
        monkeypatch.setattr(_native, "P2pAsker", lambda options: FakeAsker(self, options), raising=False)
        if not hasattr(_native.Chain, "digest"):  # a native module that was built without the backend
            monkeypatch.setattr(p2p_scheduler, "prompt_digest", _digest)

    def leases(self):
        """Leases of all servers that have not ended."""
        return [lease for worker in self.workers.values() for lease in worker.leases.values() if not lease.has_ended]

    def jobs(self):
        """Pulls that have not ended."""
        return [job for worker in self.workers.values() for job in worker.jobs.values()]


class FakeWorker:
    """`P2pWorker` of one rank."""

    def __init__(self, hub, layout, owner, namespace, block_tokens, options):
        self.hub, self.tensors, self.namespace, self.options = hub, owner, namespace, options
        self.block_tokens = block_tokens
        self.port = options["port"] if options["can_offer"] else 0
        self.leases, self.jobs, self.gone, self.answered = {}, {}, set(), []
        self.waves = []
        self._ended, self._next_job = [], 1
        hub.workers[self.port or f"client {id(self)}"] = self

    # ---- prefill

    def offer(self, key, tokens, digest, block_ids):
        current = self.leases.get(key)
        assert current is None or current.has_ended, f"{key} is offered twice"
        assert len(digest) == 32
        self.gone.discard(key)
        self.leases[key] = Lease(tokens, digest, list(block_ids))

    def extend(self, key, block_ids):
        lease = self.leases[key]
        lease.block_ids += block_ids
        assert len(lease.block_ids) <= self.blocks(lease.tokens)

    def progress(self, progressed):
        for key, done_blocks, wave_blocks, wave_layers in progressed:
            lease = self.leases.get(key)
            if lease is None:
                continue
            assert lease.done_blocks <= done_blocks <= wave_blocks <= len(lease.block_ids)
            lease.done_blocks = done_blocks
            self.waves.append((key, done_blocks, wave_blocks, wave_layers))

    def finish(self, key):
        lease = self.leases.get(key)
        if lease is None or lease.has_ended:
            self._ended.append(key)
            self.leases.pop(key, None)
            return
        lease.is_finished = True

    def revoke(self, key):
        self._ended = [ended for ended in self._ended if ended != key]
        lease = self.leases.pop(key, None)
        if lease is None:
            self.gone.add(key)  # who asks need not wait; a held one may come again, as after a preemption
        else:
            lease.has_lapsed = lease.has_ended = True

    def end(self, key):
        """The lease ends: its reader has all, or it expired."""
        lease = self.leases[key]
        lease.has_ended = True
        self.gone.add(key)
        if lease.is_finished:
            self._ended.append(key)
            del self.leases[key]

    def released(self):
        for key, lease in list(self.leases.items()):
            lease.age_steps += lease.is_finished
            if self.hub.lease_steps is not None and lease.age_steps > self.hub.lease_steps:
                self.end(key)
        ended, self._ended = self._ended, []
        return ended

    # ---- decode

    def pull(self, key, host, port, tokens, digest, first_block, block_ids, timeout_ms, readers=1):
        assert first_block + len(block_ids) == self.blocks(tokens), "a pull ends with the prompt"
        number, self._next_job = self._next_job, self._next_job + 1
        self.jobs[number] = Job(key, port, tokens, digest, first_block, list(block_ids))
        return number

    def release(self, key, host, port, digest, readers=1):
        peer = self.hub.workers.get(port)
        if peer is not None and key in peer.leases and peer.leases[key].digest == digest:
            peer.end(key)

    def cancel(self, job):
        if job in self.jobs:
            self.jobs[job].is_cancelled = True

    def poll(self):
        ended = []
        for number in list(self.jobs):
            outcome = self._run(number)
            if outcome is not None:
                ended.append((number, *outcome))
        return ended

    def wait(self, job, timeout_ms):
        return self._run(job)

    def _run(self, number):
        job = self.jobs[number]
        outcome = None if self.hub.is_frozen else self._outcome(number, job)
        if outcome is not None:
            del self.jobs[number]
        return outcome

    def _outcome(self, number, job):
        everything = list(range(len(job.block_ids)))
        if number in self.hub.failing:
            return self.hub.failing.pop(number)
        peer = self.hub.workers.get(job.port)
        if peer is None:
            return everything, "unreachable"
        if job.lease is None:
            job.lease = peer.leases.get(job.key)
        lease = job.lease
        if lease is None:
            return everything, "none"
        if lease.digest != job.digest or lease.tokens != job.tokens:
            return everything, "mismatch"
        if peer.namespace != self.namespace:
            return everything, "refused"
        if lease.has_ended:
            return everything, "lapsed"
        ready = lease.done_blocks - job.first_block
        until = min(ready, job.copied + self.hub.blocks_per_poll)
        while job.copied < until:
            _copy(peer.tensors, lease.block_ids[job.first_block + job.copied], self.tensors, job.block_ids[job.copied])
            job.copied += 1
        if job.is_cancelled:
            peer.end(job.key)
            return everything, "cancelled"
        if job.copied < len(job.block_ids):
            return None
        peer.end(job.key)
        return [], "done"

    # ---- both

    def stats(self):
        return {}

    def close(self):
        for name, worker in list(self.hub.workers.items()):
            if worker is self:
                del self.hub.workers[name]

    def blocks(self, tokens):
        return -(-tokens // self.block_tokens)


class FakeAsker:
    """`P2pAsker`, which answers at once."""

    def __init__(self, hub, options):
        self.hub, self.options = hub, options

    def ask(self, key, host, port, tokens, digest, timeout_ms):
        self.hub.asked.append(key)
        if key in self.hub.answers:
            return self.hub.answers[key]
        peer = self.hub.workers.get(port)
        if peer is None:
            return "unreachable"
        lease = peer.leases.get(key)
        if lease is None:
            return "none" if key in peer.gone else "pending"
        if lease.has_ended:
            return "none"
        if (lease.tokens, lease.digest) != (tokens, digest):
            return "mismatch"
        return "ready" if lease.done_blocks == peer.blocks(tokens) else "started"

    def tensor_ranks(self, host, port):
        return None

    def forget(self, key):
        self.hub.forgotten.append(key)

    def stats(self):
        return {}

    def close(self):
        pass


def _copy(source, source_block, target, target_block):
    for from_layer, to_layer in zip(source, target, strict=True):
        if from_layer.dim() == 5:  # keys and values outermost
            to_layer[:, target_block] = from_layer[:, source_block]
        else:
            to_layer[target_block] = from_layer[source_block]


def _digest(chain):
    keys = chain.keys(0, chain.block_count)
    return hashlib.sha256(keys + str(chain.token_count).encode()).digest()
