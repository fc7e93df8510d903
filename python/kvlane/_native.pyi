"""Types of the native module. Lengths are in the unit that the name ends with; keys are 32-byte chain hashes."""

from collections.abc import Sequence
from typing import Any, final

__version__: str

class KvlaneError(Exception):
    """Base of kvlane's exceptions."""

class ConfigError(KvlaneError, ValueError):
    """The call was refused: an argument or option cannot work. Nothing was changed."""

class StoreError(KvlaneError, OSError):
    """The shared folder cannot be used; carries errno where there is one."""

@final
class Chain:
    """Chain hashes of one request's blocks. Feed tokens in order; only full blocks get a key."""

    def __new__(cls, block_tokens: int, *, cache_salt: str | None = None, lora: bytes | None = None) -> Chain: ...
    def extend(self, token_ids: Sequence[int], start: int = 0) -> int:
        """Appends ``token_ids[start:]`` and returns the number of full blocks so far. A list is not copied."""
    def prefix(self, block_count: int) -> Chain:
        """A chain of its own with the first ``block_count`` blocks of this one, which stays as it is. Refused for a
        chain with multimodal items."""
    def add_image(self, start_token: int, length_tokens: int, identifier: str) -> None:
        """Declares a multimodal item; must precede the ``extend`` that covers its first token."""
    @property
    def block_count(self) -> int: ...
    @property
    def token_count(self) -> int: ...
    def keys(self, first_block: int, block_count: int) -> bytes:
        """The keys of a span of blocks, 32 bytes each, concatenated."""
    def digest(self) -> bytes:
        """32 bytes that name the whole prompt, its last partial block included."""

@final
class RecentChains:
    """Chains of the last prompts, by the engine's own hashes of their blocks: a chat that grew costs the hashing of
    what is new. Good within one process, because engines seed their hashes."""

    def __new__(cls, limit_chains: int = 64, limit_blocks: int = 524288) -> RecentChains:
        """Remembers at most so many chains, with so many blocks together (32 bytes each)."""
    def chain(
        self,
        token_ids: Sequence[int],
        block_hashes: Sequence[bytes] | None,
        num_tokens: int,
        block_tokens: int,
        *,
        cache_salt: str | None = None,
        lora: bytes | None = None,
    ) -> Chain:
        """The chain of a whole prompt, hashed from where it continues a remembered one. It is remembered itself, and
        must not be continued afterwards.

        ``block_hashes`` are used if there is one for each full block of ``num_tokens`` (the prompt's tokens and those
        behind it) and they are digests of 32 bytes, such as SHA-256's, vLLM's default: shorter ones do not stand for
        the tokens as surely as kvlane's keys do.
        """

@final
class Layout:
    """Block map of one worker's KV tensors, from strides alone."""

    def __new__(
        cls,
        tensors: Sequence[tuple[str, int, str, int, Sequence[int], Sequence[int]]],
        block_count: int,
        block_dim: int | None = None,
    ) -> Layout:
        """``tensors``: (layer name, data_ptr, device such as "cpu" or "cuda:0", element bytes, shape, strides in
        elements), in any order; repeats of one tensor (KV sharing) are merged. ``block_dim`` settles the ambiguous case
        of two or fewer blocks."""
    @property
    def layer_names(self) -> list[str]: ...
    def layer_index(self, name: str) -> int | None: ...
    @property
    def layer_count(self) -> int: ...
    @property
    def block_bytes(self) -> int:
        """Payload bytes of one block over all layers."""
    @property
    def fingerprint(self) -> bytes:
        """32 bytes that are equal exactly when two caches order a block's bytes in the same way."""

def namespace_id(parts: Sequence[tuple[str, str]]) -> bytes:
    """32-byte id of a namespace from named facts. Their order does not matter, a repeated name is refused."""

@final
class FsReader:
    """The scheduler's view of a shared folder: which blocks are there. Never writes payload."""

    def __new__(cls, path: str, namespaces: Sequence[bytes], options: dict[str, Any]) -> FsReader:
        """``namespaces``: one per TP x PP rank; a block counts only if every one of them has it."""
    def lookup(self, chain: Chain, limit_blocks: int) -> tuple[int, int]:
        """(ready, pending) leading blocks, each at most ``limit_blocks`` together."""
    def reset(self) -> bool: ...
    def epoch(self) -> int | None:
        """The number that a reset makes larger; None while the folder is not there."""
    def stats(self) -> dict[str, int]:
        """Gauges: used_bytes, limit_bytes. Lists the folder: not for every step."""
    def close(self) -> None: ...

@final
class FsWorker:
    """One worker's access to a shared folder: stores from and loads into its KV tensors."""

    def __new__(
        cls, path: str, namespace: bytes, layout: Layout, owner: object, options: dict[str, Any], can_store: bool = True
    ) -> FsWorker:
        """``owner`` is kept alive as long as the worker can touch the tensors (pass the tensors themselves). Tensors on
        a CUDA device must all be on one; without a usable driver that is a ConfigError."""
    def reserve(self, keys: bytes, first_depth: int, timeout_ms: int) -> None: ...
    def withdraw(self, keys: bytes) -> None: ...
    def begin_store(
        self, keys: bytes, block_ids: Sequence[int], first_depth: int, timeout_ms: int, epoch: int | None = None
    ) -> int:
        """``epoch``: what ``FsReader.epoch`` said when the store was planned; after a reset in between nothing is
        stored."""
    def layer_ready(self, job: int, layer: int, stream: int | None = None) -> None:
        """``stream``: the compute stream that writes the layer, ``torch.cuda.current_stream().cuda_stream``; must be
        given for tensors on a CUDA device and is ignored for others."""
    def finish_store(self, job: int, stream: int | None = None) -> None:
        """``stream`` as for ``layer_ready``."""
    def load(
        self,
        keys: bytes,
        block_ids: Sequence[int],
        timeout_ms: int,
        layer_major: bool = False,
        stream: int | None = None,
    ) -> int:
        """``stream`` as for ``layer_ready``: its steps may still write the blocks, so the load comes behind them."""
    def wait_layer(self, job: int, layer: int, timeout_ms: int) -> bool: ...
    def wait(self, job: int, timeout_ms: int) -> tuple[list[int], str] | None:
        """None: still running. ([], "done"), or the bad positions and the reason of the first."""
    def poll(self) -> list[tuple[int, list[int], str]] | None:
        """Completions not delivered yet: (job, bad positions, reason). None, in well under a microsecond, if none."""
    def cancel(self, job: int) -> None: ...
    def reset(self) -> bool: ...
    def stats(self) -> dict[str, float] | None:
        """Counters since the last call; None when nothing happened."""
    def close(self) -> None: ...

@final
class P2pAsker:
    """The scheduler's part of the P2P backend: asks prefill servers. Listens nowhere."""

    def __new__(cls, options: dict[str, Any]) -> P2pAsker: ...
    def ask(self, key: str, host: str, port: int, tokens: int, digest: bytes, timeout_ms: int) -> str:
        """'pending', 'started', 'ready', or a reason: 'none', 'mismatch', 'unreachable', 'refused', 'timeout', 'busy'.
        The first call sends the question, later ones (every step) read the answer: one lock, no system call."""
    def tensor_ranks(self, host: str, port: int) -> int | None:
        """How many workers of a prefill server share out its KV heads; None if it was never reached or does not say."""
    def forget(self, key: str) -> None: ...
    def stats(self) -> dict[str, float]: ...
    def close(self) -> None: ...

@final
class P2pWorker:
    """One worker's part of the P2P backend: holds its blocks for others, and fills them from others."""

    def __new__(
        cls, layout: Layout, owner: object, namespace: bytes, block_tokens: int, options: dict[str, Any]
    ) -> P2pWorker:
        """``owner`` is kept alive as long as the worker can touch the tensors (pass the tensors themselves). Option
        ``shape``: what the blocks hold, as ``kvlane.vllm.p2p_shape.Shape`` says; None: not known."""
    @property
    def port(self) -> int:
        """The bound port, 0 if it does not listen."""
    def offer(self, key: str, tokens: int, digest: bytes, block_ids: list[int]) -> None: ...
    def extend(self, key: str, block_ids: list[int]) -> None: ...
    def progress(self, progressed: list[tuple[str, int, int, int]], stream: int | None = None) -> None:
        """For each ``(key, done_blocks, wave_blocks, wave_layers)``: blocks ``[0, done_blocks)`` are complete in all
        layers, and blocks ``[done_blocks, wave_blocks)`` in layers ``[0, wave_layers)``. ``stream``: the compute stream
        that writes them, for tensors on a CUDA device."""
    def finish(self, key: str) -> None:
        """The request has ended and vLLM keeps its blocks until ``released`` names the key."""
    def revoke(self, key: str) -> None:
        """The blocks may be written by others as soon as this returns. The key is not named by ``released``. For a key
        that is not held: nothing will come under it."""
    def released(self) -> list[str]:
        """Keys finished before whose lease has ended since; each once."""
    def pull(
        self,
        key: str,
        host: str,
        port: int,
        tokens: int,
        digest: bytes,
        first_block: int,
        block_ids: list[int],
        timeout_ms: int,
        stream: int | None = None,
        *,
        readers: int = 1,
    ) -> int:
        """``stream``: the compute stream whose steps may still write the blocks, for tensors on a CUDA device.
        ``readers``: ranks of this engine that pull from that rank, or release what it holds."""
    def release(self, key: str, host: str, port: int, digest: bytes, *, readers: int = 1) -> None:
        """Tells prefill that this rank needs nothing (a full local hit). ``readers`` as for ``pull``."""
    def cancel(self, job: int) -> None: ...
    def poll(self) -> list[tuple[int, list[int], str]]:
        """Completions not delivered yet: (job, bad positions, reason). One atomic load when idle."""
    def wait(self, job: int, timeout_ms: int) -> tuple[list[int], str] | None: ...
    def stats(self) -> dict[str, float]: ...
    def close(self) -> None: ...

@final
class P2pPing:
    """Tells a proxy every three seconds that this instance is there, on a thread of its own."""

    def __new__(
        cls,
        proxy_host: str,
        proxy_port: int,
        is_prefill: bool,
        http_address: str,
        zmq_address: str,
        texts: list[tuple[str, str]],
        numbers: list[tuple[str, int]],
    ) -> P2pPing:
        """``texts`` and ``numbers``: further fields behind the three that old proxies know."""
    def close(self) -> None: ...

def run_cli(arguments: Sequence[str], facts: str) -> int:
    """Runs the ``kvlane`` command and returns its exit status. ``facts``: JSON that only Python knows (for doctor)."""

def next_logs() -> list[tuple[int, str, int, str]] | None:
    """Waits for log lines and returns those that are there: level, source file, line in it, text. None once `end_logs`
    was called and all were taken."""

def end_logs() -> None:
    """No more lines are queued; for the interpreter's exit."""
