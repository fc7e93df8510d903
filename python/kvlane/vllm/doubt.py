"""Steps whose KV may turn out wrong, because somebody loads synchronously in them.

Such a load may fail, which is known only after the step has computed on it, and steps planned in between build on it
too. Newer vLLM says which steps these are. Where it does not, a sibling below MultiConnector is recognised by requests
that start with more computed tokens than vLLM had and this connector brought.
"""

import dataclasses
import logging
from typing import Any

logger = logging.getLogger("vllm.kvlane")


@dataclasses.dataclass
class _Asked:
    """What is known of the computed blocks of a request that has not started."""

    local_blocks: int
    step: int
    own_blocks: int = 0


class DoubtfulSteps:
    """Says of each step whether what it computes may be relied on."""

    def __init__(self, block_tokens: int, batches_in_flight: int, siblings_are_silent: bool) -> None:
        #: Steps, with the one being planned, until the result of the first of them is known for sure.
        self.until_known = batches_in_flight + 1
        self._block_tokens = block_tokens
        self._siblings_are_silent = siblings_are_silent
        self._asked: dict[str, _Asked] = {}
        self._step = 0
        self._remaining = 0
        self._is_logged = False

    def asked(self, request_id: str, local_tokens: int) -> None:
        """vLLM asks what else there is of a request of which it has `local_tokens` itself."""
        if self._siblings_are_silent:
            self._asked[request_id] = _Asked(local_tokens // self._block_tokens, self._step + 1)

    def loads(self, request_id: str, tokens: int) -> None:
        """This connector brings so many tokens of a request."""
        asked = self._asked.get(request_id)
        if asked is not None:
            asked.own_blocks = tokens // self._block_tokens

    def begin(self) -> None:
        """From the next step on, which loads synchronously, or after something went wrong."""
        self._remaining = self.until_known

    def gone(self, request_id: str) -> None:
        """The request has ended."""
        self._asked.pop(request_id, None)

    def next_step(self, output: Any) -> bool:
        """Whether the step that `output` (vLLM's SchedulerOutput) describes is doubtful."""
        self._step += 1
        if getattr(output, "has_sync_kv_loads", False) or self._a_sibling_loaded(output):
            self.begin()
        if self._remaining == 0:
            return False
        self._remaining -= 1
        return True

    def _a_sibling_loaded(self, output: Any) -> bool:
        """A request that asked in an earlier step has waited for an asynchronous load: it starts with what did load."""
        if not self._siblings_are_silent:
            return False
        started = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
        cached = output.scheduled_cached_reqs
        started += [
            (request_id, computed)
            for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True)
            if request_id in cached.resumed_req_ids
        ]
        found = False
        for request_id, computed_tokens in started:
            asked = self._asked.pop(request_id, None)
            known = 0 if asked is None else asked.local_blocks + asked.own_blocks
            waited = asked is not None and asked.step < self._step
            found = found or (computed_tokens // self._block_tokens > known and not waited)
        if found and not self._is_logged:
            self._is_logged = True
            logger.info(
                "kvlane: another connector loads inside steps, so what steps compute may turn out wrong: nothing is "
                "passed on for %d steps from each",
                self.until_known,
            )
        return found
