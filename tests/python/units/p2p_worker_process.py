"""A P2P worker over a small cache, and a prefill worker in a process of its own that obeys lines on its input.

python p2p_worker_process.py        prints its port, then an answer to each line:
                                    offer KEY BLOCK... | begin KEY BLOCK... | revoke KEY | released -
"""

import ctypes
import subprocess
import sys

from kvlane import _native

BLOCKS, BLOCK_TOKENS, LAYERS, PIECE_BYTES = 16, 4, 2, 4096
OPTIONS = {
    "host": "127.0.0.1",
    "port": 0,
    "rank": 0,
    "engine_id": "test",
    "secret": None,
    "allowed_peers": [],
    "lease_ms": 60_000,
    "transfer_timeout_ms": 60_000,
    "peer_timeout_ms": 60_000,
    "connections": 1,
    "max_leased_blocks": BLOCKS,
    "readers": 1,
    "facts": [],
}


class WorkerOfCache:
    """A worker and its cache: in layer l, block b is the bytes from (b * PIECE_BYTES) on of `layers[l]`."""

    def __init__(self, can_offer, lane="auto"):
        self.layers = [ctypes.create_string_buffer(BLOCKS * PIECE_BYTES) for _ in range(LAYERS)]
        strides = [PIECE_BYTES, 1]
        described = [
            (f"layer.{number}", ctypes.addressof(layer), "cpu", 1, [BLOCKS, PIECE_BYTES], strides)
            for number, layer in enumerate(self.layers)
        ]
        options = OPTIONS | {"can_offer": can_offer, "can_pull": not can_offer, "lane": lane}
        namespace = _native.namespace_id([("test", "small cache")])
        layout = _native.Layout(described, BLOCKS, 0)
        self.worker = _native.P2pWorker(layout, self.layers, namespace, BLOCK_TOKENS, options)

    def block(self, block):
        """Its bytes, one text per layer."""
        at = block * PIECE_BYTES
        return [layer.raw[at : at + PIECE_BYTES] for layer in self.layers]

    def fill(self, block):
        for number, layer in enumerate(self.layers):
            content = content_of(block)[number]
            ctypes.memmove(ctypes.addressof(layer) + block * PIECE_BYTES, content, PIECE_BYTES)


def content_of(block):
    """What prefill's block holds, one text per layer."""
    return [bytes([1 + 16 * layer + block]) * PIECE_BYTES for layer in range(LAYERS)]


class PrefillProcess:
    """The process of this file's main part. Use as a context manager."""

    def __enter__(self):
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def tell(self, *words):
        print(*words, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()


def main():
    prefill = WorkerOfCache(can_offer=True)
    print(prefill.worker.port, flush=True)
    for line in sys.stdin:
        word, key, *blocks = line.split()
        answer = "ok"
        if word == "released":
            answer = " ".join(prefill.worker.released())
        elif word == "revoke":
            prefill.worker.revoke(key)
        else:
            blocks = [int(block) for block in blocks]
            for block in blocks:
                prefill.fill(block)
            prefill.worker.offer(key, len(blocks) * BLOCK_TOKENS, bytes(32), blocks)
            if word == "offer":
                prefill.worker.progress([(key, len(blocks), len(blocks), LAYERS)])
                prefill.worker.finish(key)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
