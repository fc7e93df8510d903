"""A slow store under a connector's worker half: loads begin when the test says so, and write into the blocks then."""


class LateStore:
    """Holds every load back until `release`. Everything else goes straight to the store behind it.

    A cancelled load that was held still runs at its release: the worst that a device does which cannot be stopped.
    Its completion is reported then and not before, as the transfer contract demands.
    """

    def __init__(self, store):
        self._store = store
        self._held = {}
        self._running = {}
        self._next = 1 << 40
        self._released = False

    def load(self, keys, block_ids, timeout_ms, layer_major=False):
        if self._released:
            return self._store.load(keys, block_ids, timeout_ms, layer_major)
        self._next += 1
        self._held[self._next] = (keys, block_ids, timeout_ms, layer_major)
        return self._next

    @property
    def held(self):
        """How many loads wait for their release."""
        return len(self._held)

    def release(self):
        """Lets all held loads run, and later ones at once; a poll of the next steps reports them."""
        self._released = True
        for job, arguments in self._held.items():
            self._running[self._store.load(*arguments)] = job
        self._held.clear()

    def poll(self):
        ended = [(self._running.pop(job, job), *rest) for job, *rest in self._store.poll() or ()]
        return ended or None

    def wait(self, job, timeout_ms):
        if job in self._held:
            return None
        for inner, outer in self._running.items():
            if outer == job:
                ended = self._store.wait(inner, timeout_ms)
                if ended is not None:
                    del self._running[inner]
                return ended
        return self._store.wait(job, timeout_ms)

    def cancel(self, job):
        if job not in self._held and job not in self._running.values():
            self._store.cancel(job)

    def __getattr__(self, name):
        return getattr(self._store, name)


def make_loads_late(engine):
    """Puts a LateStore under the worker half of an engine and returns it."""
    half = engine.worker._worker
    half._store = LateStore(half._store)
    return half._store
