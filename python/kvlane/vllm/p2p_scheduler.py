"""The P2P scheduler half: which prompts are held for others (`p2p_offers`), and which are pulled from others.

A request whose prompt is computed elsewhere asks the prefill server through an asker that never waits. vLLM is told to
come back until the answer is there, so the request holds no blocks before prefill has begun with it. Then it gets
blocks for the whole rest of its prompt, and the workers fill them. Whatever goes wrong ends by a deadline and costs a
recompute: a request is pulled at most once, and asks at most once.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from kvlane._native import Chain
from kvlane.vllm.doubt import DoubtfulSteps
from kvlane.vllm.identity import AdapterIdentities, request_chain
from kvlane.vllm.p2p_key import Address, Handover, handover_of
from kvlane.vllm.p2p_offers import Offers, Prompt
from kvlane.vllm.p2p_options import P2pOptions
from kvlane.vllm.p2p_parking import Parking
from kvlane.vllm.p2p_steps import IDLE, Abort, Order, P2pStep, Pull, Release
from kvlane.vllm.room import Room
from kvlane.vllm.scheduler import must_compute

logger = logging.getLogger("vllm.kvlane")

#: How the asker answers. Anything else is a reason why there is nothing to pull.
PENDING = "pending"
BEGUN = ("started", "ready")
#: With these there is nothing at the prefill server that a word could set free, or nobody to tell.
_NOTHING_TO_RELEASE = ("none", "mismatch", "unreachable", "refused")

#: Prompts are named by the hash of a chain of blocks of this size, whatever size those of the two servers have. Large
#: ones hash fastest.
DIGEST_BLOCK_TOKENS = 1024

#: vLLM's states of a request that ended without an answer.
_FAILED_STATES = ("FINISHED_ABORTED", "FINISHED_ERROR", "FINISHED_IGNORED")

_PREFILL, _DECODE = "prefill", "decode"


class Asker(Protocol):
    """What the scheduler half needs of `kvlane._native.P2pAsker`."""

    def ask(self, key: str, host: str, port: int, tokens: int, digest: bytes, timeout_ms: int) -> str: ...
    def tensor_ranks(self, host: str, port: int) -> int | None: ...
    def forget(self, key: str) -> None: ...
    def stats(self) -> dict[str, float]: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class P2pSettings:
    """Facts about the engine that the scheduler half depends on."""

    #: Tokens per block of vLLM's block manager, and blocks of the cache.
    block_tokens: int
    cache_blocks: int
    can_offer: bool
    can_pull: bool
    #: Port of rank 0, by which a server with both roles may know its own address in a request id.
    own_port: int = 0
    #: Address under which decode servers reach this server, for answers that carry parameters.
    own_host: str = ""
    engine_id: str = ""
    #: Whether request ids end in a random part (`p2p_key.ids_are_random`).
    random_ids: bool = True
    images_are_named: bool = True
    batches_in_flight: int = 1
    #: vLLM keeps the blocks of a request that is aborted while it loads (0.16 and newer).
    holds_aborted_loads: bool = True
    #: Other connectors may load synchronously (MultiConnector) without a word from vLLM about it.
    siblings_are_silent: bool = False
    #: vLLM itself sees to it that loads leave room for somebody to compute.
    leaves_room: bool = True


@dataclasses.dataclass
class _Request:
    """What is known of one request. Without a hand-over it is served locally."""

    #: vLLM's own record; its `num_tokens` grows.
    request: Any
    handover: Handover | None = None
    key: str = ""
    prompt_tokens: int = 0
    digest: bytes = b""
    #: For decode: where its KV is. None for prefill.
    place: Address | None = None
    asked_s: float | None = None
    asked: bool = False
    #: Why there is nothing to pull, once that is settled.
    miss_reason: str | None = None
    #: Tokens that vLLM had itself when it last asked.
    local_tokens: int = 0
    is_counted: bool = False
    is_pulled: bool = False
    is_released: bool = False
    load_failed: bool = False
    loading: set[int] = dataclasses.field(default_factory=set)


class P2pSchedulerHalf:
    """Plans offers and pulls, step by step."""

    def __init__(
        self,
        options: P2pOptions,
        settings: P2pSettings,
        asker: Asker | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._settings = settings
        self._asker = asker
        self._clock = clock
        self._own_port = settings.own_port
        self._adapters = AdapterIdentities()
        self._requests: dict[str, _Request] = {}
        self._offers = Offers(settings.block_tokens, lambda request_id: self._count("not_held_requests", 1))
        self._doubt = DoubtfulSteps(settings.block_tokens, settings.batches_in_flight, settings.siblings_are_silent)
        self._parking = Parking(settings.cache_blocks, options.parked_percent, settings.block_tokens)
        self._room = None if settings.leaves_room else Room(settings.cache_blocks, settings.block_tokens)
        #: Requests that wait for their pull.
        self._loading: dict[str, _Request] = {}
        self._pulls: list[Pull] = []
        self._orders: list[Order] = []
        self._counters: dict[str, float] = {}
        self._told_parked_blocks = 0
        self._planning_failed = False

    def listens_on(self, port: int) -> None:
        """Rank 0 is bound to this port (the configured one may be 0)."""
        self._own_port = port

    # ---- decode: what a request can get

    def matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens behind `computed_tokens` that are pulled from the prefill server, and that they load between steps.

        (None, False) asks vLLM to come back: the answer is not there, or there is no room. Repeated calls change
        nothing but the clock.
        """
        state = self._request(request)
        self._doubt.asked(request.request_id, computed_tokens)
        self._parking.gone(request.request_id)  # vLLM only asks about requests without blocks: its pull failed
        if self._room is not None and self._room.somebody_waits_to_start(request.request_id):
            return None, False
        asker, place = self._asker, state.place
        if asker is None or place is None or not self._may_pull(state):
            return 0, False
        state.local_tokens = computed_tokens
        # The last token is computed here in any case.
        if computed_tokens >= state.prompt_tokens - 1:
            return 0, False
        now_s = self._clock()
        if state.asked_s is None:
            state.asked_s = now_s
        waited_ms = (now_s - state.asked_s) * 1000
        state.asked = True
        answer = self._ask(asker, state, place)
        if answer == PENDING:
            # The asker has the same deadline. This one holds also if it fails to keep it.
            if waited_ms <= self._options.ask_timeout_ms * 2:
                return None, False
            answer = "timeout"
        if answer not in BEGUN:
            self._miss(state, answer)
            return 0, False
        if not self._has_room_for(state):
            # Others' pulls end by their deadlines, which makes room. Behind its lease prefill has nothing any more.
            patience_ms = self._options.ask_timeout_ms + self._options.transfer_timeout_ms
            if waited_ms <= min(patience_ms, self._options.lease_ms):
                return None, False
            self._miss(state, "no_room")
            return 0, False
        return state.prompt_tokens - computed_tokens, True

    def _ask(self, asker: Asker, state: _Request, place: Address) -> str:
        what = (state.key, place.host, place.port, state.prompt_tokens, state.digest)
        try:
            return asker.ask(*what, self._options.ask_timeout_ms)
        except Exception as error:
            logger.error("kvlane: the question for request %s failed: %s", state.request.request_id, error)
            return "error"

    def _may_pull(self, state: _Request) -> bool:
        if state.is_pulled or state.is_released or state.miss_reason is not None:
            return False
        # One that comes back after a preemption has tokens behind its prompt, or had its chance.
        return state.request.num_tokens == state.prompt_tokens

    def _has_room_for(self, state: _Request) -> bool:
        if not self._parking.has_room_for(state.prompt_tokens):
            return False
        return self._room is None or self._room.has_room_for(state.request)

    def _miss(self, state: _Request, reason: str) -> None:
        state.miss_reason = reason
        self._forget(state)
        logger.info(
            "kvlane: request %s computes its prompt: prefill server %s answered '%s'",
            state.request.request_id,
            _shown(state.place),
            reason,
        )

    def blocks_allocated(self, request: Any, block_ids: Callable[[], list[int]], external_tokens: int) -> None:
        """vLLM took up the last answer for `external_tokens` (0: not at all) and gave the request blocks."""
        state = self._request(request)
        self._doubt.loads(request.request_id, external_tokens)
        place, block_tokens = state.place, self._settings.block_tokens
        if place is None:
            return
        if external_tokens <= 0:
            if state.is_pulled and getattr(request, "num_external_computed_tokens", 0) < 0:
                # vLLM 0.15 takes a failed partial last block for a whole one, and then adds a negative number to a
                # counter, which ends the engine. It does so right after this call.
                request.num_external_computed_tokens = 0
            if not state.is_pulled:
                self._settle_without_pull(state, place)
            return
        first = state.local_tokens // block_tokens
        end = -(-(state.local_tokens + external_tokens) // block_tokens)
        # The blocks in front are shared with other requests: they are never written.
        targets = list(block_ids()[first:end])
        what = (state.key, place.host, place.port, state.prompt_tokens, state.digest)
        self._pulls.append(Pull(request.request_id, *what, first, targets, self._tensor_ranks(place)))
        state.is_pulled = True
        state.loading = set(targets)
        self._loading[request.request_id] = state
        self._parking.park(request.request_id, state.prompt_tokens)
        if self._room is not None:
            self._room.park(request)
        self._forget(state)
        self._count_outcome(state, "pulled")
        self._count("pulled_tokens", external_tokens)

    def _settle_without_pull(self, state: _Request, place: Address) -> None:
        """The request does with what is here. Prefill need not wait for it."""
        self._count_outcome(state, state.miss_reason or "local")
        if state.is_released or state.miss_reason in _NOTHING_TO_RELEASE:
            return
        state.is_released = True
        self._orders.append(Release(state.key, place.host, place.port, state.digest, self._tensor_ranks(place)))
        self._forget(state)

    def _tensor_ranks(self, place: Address) -> int | None:
        """How many ranks of a prefill server share out its KV heads, None if it was never reached."""
        try:
            return self._asker.tensor_ranks(place.host, place.port) if self._asker is not None else None
        except Exception as error:  # the pull that it is for must begin all the same: vLLM waits for its end
            logger.error("kvlane: the number of ranks of prefill server %s is not known: %s", _shown(place), error)
            return None

    def _forget(self, state: _Request) -> None:
        if state.asked and self._asker is not None:
            state.asked = False
            self._asker.forget(state.key)

    # ---- one step

    def step(self, output: Any) -> P2pStep:
        """What the workers have to do in the step that `output` (vLLM's SchedulerOutput) describes."""
        progress = []
        try:
            is_doubtful = self._doubt.next_step(output)
            self._parking.scheduled(output)
            if self._room is not None:
                self._room.scheduled(output, self._requests)
            if self._settings.can_offer:
                progress = self._offers.plan(output, is_doubtful)
        except Exception:
            # Pulls and ends go out in any case: vLLM waits for them. What was being offered is given up.
            if not self._planning_failed:
                self._planning_failed = True
                logger.exception("kvlane: internal error in planning a step; it costs recomputes and is logged once")
            self._offers.give_up()
            progress = []
        orders = self._orders + self._offers.orders
        if not (orders or progress or self._pulls):
            return IDLE
        step = P2pStep(orders, progress, self._pulls)
        self._pulls, self._orders, self._offers.orders = [], [], []
        return step

    # ---- outcomes

    def workers_answered(self, finished: Iterable[str], failed: Iterable[str], bad_blocks: set[int]) -> None:
        """Takes up what the workers reported: ended pulls, failed requests, blocks that hold no valid KV."""
        for request_id in failed:
            self._load_failed(self._requests.get(request_id))
        if bad_blocks:
            for state in self._loading.values():
                if not state.loading.isdisjoint(bad_blocks):
                    self._load_failed(state)
        for request_id in finished:
            ended = self._loading.pop(request_id, None)
            if ended is not None:
                ended.loading = set()
                if self._room is not None:
                    self._room.loaded(request_id)

    def workers_sent(self, sent: Iterable[str]) -> None:
        """Takes up whose held blocks the workers have let go."""
        for request_id in sent:
            self._offers.sent(request_id)

    def finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """A request ended. True: vLLM must keep its blocks until the workers report it as sent. The second value is
        what the answer tells the proxy."""
        request_id = request.request_id
        state = self._requests.pop(request_id, None)
        self._parking.gone(request_id)
        self._doubt.gone(request_id)
        if self._room is not None:
            self._room.gone(request_id)
        if state is None:
            state = self._request(request)
            del self._requests[request_id]
        if state.handover is not None and state.place is None:
            was_served = getattr(request.status, "name", str(request.status)) not in _FAILED_STATES
            is_held = self._offers.finished(request_id, was_served)
            return is_held, self._parameters_for_decode(state.handover) if is_held else None
        if self._loading.pop(request_id, None) is not None:
            self._orders.append(Abort(request_id))
            return not self._settings.holds_aborted_loads, None
        if state.place is not None and not state.is_pulled:
            self._settle_without_pull(state, state.place)
        return False, None

    def reset(self) -> bool:
        """KV that was computed before this call must not be used by requests that come behind it (weights have changed,
        say). The workers hear of it with the next step."""
        self._offers.reset()
        for state in self._requests.values():
            if state.place is not None and not state.is_pulled and state.miss_reason is None:
                state.miss_reason = "reset"
                self._forget(state)
        return True

    def _parameters_for_decode(self, handover: Handover) -> dict[str, Any] | None:
        if not handover.answers_parameters:
            return None
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": handover.name,
            "remote_engine_id": self._settings.engine_id,
            "remote_host": self._settings.own_host,
            "remote_port": self._own_port,
        }

    def take_counters(self) -> dict[str, float]:
        """Counts since the last call, empty if nothing happened."""
        parked = self._parking.blocks
        if not self._counters and parked == self._told_parked_blocks:
            return {}
        counters, self._counters = self._counters, {}
        counters["parked_blocks"] = self._told_parked_blocks = parked
        return counters

    def close(self) -> None:
        asker, self._asker = self._asker, None
        if asker is not None:
            asker.close()

    # ---- helpers

    def _request(self, request: Any) -> _Request:
        state = self._requests.get(request.request_id)
        if state is None:
            state = self._requests[request.request_id] = _Request(request)
            try:
                self._take_part(state)
            except ValueError as error:
                self._serve_locally(state, "parameters")
                logger.warning("kvlane: request %s is served locally: %s", request.request_id, error)
            except Exception:
                self._serve_locally(state, "unnamed")
                logger.exception("kvlane: request %s cannot be named, so it is not transferred", request.request_id)
        return state

    def _take_part(self, state: _Request) -> None:
        request = state.request
        parameters = getattr(request, "kv_transfer_params", None)
        handover = handover_of(request.request_id, parameters, random_ids=self._settings.random_ids)
        if handover is None:
            return
        role = self._role(handover, request)
        if role is None:
            return
        named = self._settings.images_are_named
        chain = request_chain(request, DIGEST_BLOCK_TOKENS, self._adapters, named, is_vllms_block=False)
        if chain is None or chain.token_count < 2:
            return  # the last token is computed by decode in any case
        state.prompt_tokens, state.digest = chain.token_count, prompt_digest(chain)
        state.handover, state.key = handover, handover.key
        if role == _PREFILL:
            self._offers.add(Prompt(request.request_id, handover.key, state.prompt_tokens, state.digest, request))
            return
        state.place = handover.prefill
        if must_compute(request):
            state.miss_reason = "must_compute"

    def _role(self, handover: Handover, request: Any) -> str | None:
        """This server's part, None if it can have none."""
        can_offer, can_pull = self._settings.can_offer, self._settings.can_pull
        side = handover.side
        if side is None and can_offer and can_pull:
            side = self._side_of_both(handover, request)
        elif side is None:
            side = _PREFILL if can_offer else _DECODE
        return side if (can_offer if side == _PREFILL else can_pull) else None

    def _side_of_both(self, handover: Handover, request: Any) -> str:
        """A server with both roles may see both calls of a request, or either."""
        prefill, decode = handover.prefill, handover.decode
        if prefill is not None and decode is not None and prefill.port != decode.port:
            if self._own_port == prefill.port:
                return _PREFILL
            if self._own_port == decode.port:
                return _DECODE
        # The call that asks for one token is the prefill.
        return _PREFILL if getattr(request, "max_tokens", None) == 1 else _DECODE

    def _serve_locally(self, state: _Request, reason: str) -> None:
        state.handover = state.place = None
        self._count(f"request_{reason}", 1)

    def _load_failed(self, state: _Request | None) -> None:
        if state is not None and not state.load_failed:
            state.load_failed = True
            self._count("recomputed_requests", 1)

    def _count_outcome(self, state: _Request, outcome: str) -> None:
        if state.is_counted:
            return
        state.is_counted = True
        self._count(f"request_{outcome}", 1)
        if state.asked_s is not None:
            self._count("waits", 1)
            self._count("wait_seconds", self._clock() - state.asked_s)

    def _count(self, name: str, amount: float) -> None:
        if amount:
            self._counters[name] = self._counters.get(name, 0) + amount


def prompt_digest(chain: Chain) -> bytes:
    """32 bytes that are equal exactly for equal prompts, whose KV is equal then."""
    return chain.digest()


def _shown(place: Address | None) -> str:
    return "nowhere" if place is None else f"{place.host}:{place.port}"
