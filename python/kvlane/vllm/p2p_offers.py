"""The prefill side of the P2P scheduler half: which prompts are held for decode servers, and how far they are.

A prompt is offered when its first chunk is scheduled, and its blocks follow as vLLM hands them out. What is complete is
said by the workers, after the step that computed it. Whatever takes blocks away (preemption, abort, a computation that
begins again) revokes the offer in the step in which others may write them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from kvlane.vllm.p2p_steps import Extend, Finish, Offer, Order, Progress, Revoke
from kvlane.vllm.scheduler import NULL_BLOCK


@dataclasses.dataclass
class Prompt:
    """A prompt that this server computes for another one."""

    request_id: str
    key: str
    tokens: int
    digest: bytes
    #: vLLM's own record; its `status` changes.
    request: Any
    is_offered: bool = False
    #: Blocks of the prompt that vLLM has handed out. Only the first `told_blocks` are known to the workers.
    block_ids: list[int] = dataclasses.field(default_factory=list)
    told_blocks: int = 0
    #: Blocks that are complete once the steps planned so far have run, and tokens computed by then.
    done_blocks: int = 0
    computed_tokens: int = 0


class Offers:
    """All prompts of requests that are being computed for others, and what the workers have to be told of them."""

    def __init__(self, block_tokens: int, log_lost: Callable[[str], None]) -> None:
        self._block_tokens = block_tokens
        self._log_lost = log_lost
        self._prompts: dict[str, Prompt] = {}
        #: Who a key belongs to: the last request that was scheduled with it, until its lease ends or another comes.
        self._owners: dict[str, str] = {}
        #: Ended requests whose blocks vLLM keeps, with their keys.
        self._held: dict[str, str] = {}
        self.orders: list[Order] = []
        #: What the step being planned completes.
        self._progress: list[Progress] = []

    def add(self, prompt: Prompt) -> None:
        """A request that has not been scheduled yet."""
        self._prompts[prompt.request_id] = prompt

    def plan(self, output: Any, is_doubtful: bool) -> list[Progress]:
        """Takes up a step (vLLM's SchedulerOutput). Returns what it completes; of a doubtful step nothing is said, and
        what it computed counts once a later step was reliable."""
        progress: list[Progress] = []
        self._progress = progress
        for request_id in output.preempted_req_ids or ():
            prompt = self._prompts.get(request_id)
            if prompt is not None:
                self._lose_blocks(prompt)
        for prompt in self._prompts.values():
            # A reset of the prefix cache preempts running requests too, and vLLM 0.15 names nobody then.
            if prompt.is_offered and _status(prompt.request) == "PREEMPTED":
                self._lose_blocks(prompt)
        if not self._prompts:
            return progress
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            prompt = self._prompts.get(new.req_id)
            if prompt is not None:
                self._revoke(prompt)
                prompt.block_ids, prompt.computed_tokens = list(new.block_ids[0]), 0
                end = new.num_computed_tokens + scheduled[new.req_id]
                self._advance(prompt, end, is_doubtful, progress)
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            prompt = self._prompts.get(request_id)
            if prompt is None:
                continue
            new_ids, start = cached.new_block_ids[index], cached.num_computed_tokens[index]
            if request_id in cached.resumed_req_ids:
                self._revoke(prompt)
                prompt.block_ids, prompt.computed_tokens = list(new_ids[0]) if new_ids is not None else [], 0
            elif new_ids is not None and len(prompt.block_ids) < self._blocks(prompt.tokens):
                prompt.block_ids.extend(new_ids[0])
            if start < min(prompt.computed_tokens, prompt.tokens):
                self._revoke(prompt)  # vLLM computes again what turned out wrong
                prompt.computed_tokens = 0
            self._advance(prompt, start + scheduled[request_id], is_doubtful, progress)
        return progress

    def finished(self, request_id: str, was_served: bool) -> bool:
        """A request ended (`was_served`: with an answer). True: its blocks are held for a decode server."""
        prompt = self._prompts.pop(request_id, None)
        if prompt is None:
            return False
        if was_served and prompt.is_offered and prompt.done_blocks == self._blocks(prompt.tokens):
            self._held[request_id] = prompt.key
            self.orders.append(Finish(prompt.key, request_id))
            return True
        if was_served:
            self._log_lost(request_id)
        self._revoke(prompt)
        self.never_came(prompt.key)
        return False

    def sent(self, request_id: str) -> None:
        """The workers do not hold an ended request's blocks any more."""
        key = self._held.pop(request_id, None)
        if key is not None and self._owners.get(key) == request_id:
            del self._owners[key]

    def never_came(self, key: str) -> None:
        """A request with this key ended without being held. Somebody may be waiting for it: to revoke what is not
        offered says that nothing will come, while an offer that is revoked may be made again."""
        if key not in self._owners:
            self.orders.append(Revoke(key))

    def reset(self) -> None:
        """What was computed so far has become wrong for others, such as with new weights: it is handed over no more."""
        for prompt in list(self._prompts.values()):
            self._revoke(prompt)
            self.never_came(prompt.key)
        self._prompts.clear()
        for request_id, key in self._held.items():
            self.orders.append(Revoke(key))  # the workers name it as sent then
            if self._owners.get(key) == request_id:
                del self._owners[key]
                self.never_came(key)

    @property
    def count(self) -> int:
        """Requests that are known here, those with held blocks included."""
        return len(self._prompts) + len(self._held)

    def give_up(self) -> None:
        """Something went wrong in here: nothing that is not held is handed over any more."""
        for prompt in self._prompts.values():
            self._revoke(prompt)
        self._prompts.clear()

    def _advance(self, prompt: Prompt, end_tokens: int, is_doubtful: bool, progress: list[Progress]) -> None:
        total = self._blocks(prompt.tokens)
        prompt.computed_tokens = end_tokens
        del prompt.block_ids[total:]  # what comes behind the prompt is decode's own affair
        if NULL_BLOCK in prompt.block_ids:
            self._revoke(prompt)  # tokens that fell out of an attention window
            del self._prompts[prompt.request_id]
            return
        self._offer(prompt)
        if is_doubtful or prompt.done_blocks == total:
            return
        complete = total if end_tokens >= prompt.tokens else end_tokens // self._block_tokens
        complete = min(complete, len(prompt.block_ids))
        if complete > prompt.done_blocks:
            progress.append(Progress(prompt.key, prompt.done_blocks, complete))
            prompt.done_blocks = complete

    def _offer(self, prompt: Prompt) -> None:
        key = prompt.key
        if not prompt.is_offered:
            owner = self._owners.get(key)
            if owner is not None:
                self._take_key_from(owner)
            self._owners[key] = prompt.request_id
            self.orders.append(Offer(key, prompt.tokens, prompt.digest, list(prompt.block_ids)))
            prompt.is_offered = True
        elif len(prompt.block_ids) > prompt.told_blocks:
            self.orders.append(Extend(key, prompt.block_ids[prompt.told_blocks :]))
        prompt.told_blocks = len(prompt.block_ids)

    def _take_key_from(self, owner: str) -> None:
        """Another request has the same key, such as a client's second try: the last one counts."""
        earlier = self._prompts.get(owner)
        if earlier is not None:
            self._revoke(earlier)
            # For good: what decode has of this one is nothing to the next.
            self.orders.append(Revoke(earlier.key))
            del self._prompts[owner]
        elif owner in self._held:
            # The workers name it as sent then.
            self.orders += [Revoke(self._held[owner])] * 2

    def _lose_blocks(self, prompt: Prompt) -> None:
        self._revoke(prompt)
        prompt.block_ids, prompt.computed_tokens = [], 0

    def _revoke(self, prompt: Prompt) -> None:
        prompt.done_blocks = prompt.told_blocks = 0
        if not prompt.is_offered:
            return
        prompt.is_offered = False
        key = prompt.key
        self.orders.append(Revoke(key))
        # What this request completes in the step must not be said of another that takes the key in the same step.
        self._progress[:] = [progress for progress in self._progress if progress.key != key]
        if self._owners.get(key) == prompt.request_id:
            del self._owners[key]

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)


def _status(request: Any) -> str:
    status = getattr(request, "status", None)
    return getattr(status, "name", str(status))
