"""What must agree before KV may be shared: the facts of a namespace, and the identity of adapters and requests.

All of it is read from vLLM's configuration objects by name, so nothing of vLLM is imported here.
"""

import dataclasses
import functools
import logging
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from kvlane._native import Chain, RecentChains, namespace_id
from kvlane.vllm.canonical import canonical_json, config_dict
from kvlane.vllm.weights import Facts, code_facts, file_facts, processor_facts, weight_facts, weights_elsewhere

logger = logging.getLogger("vllm.kvlane")

# With these the angle of a rotation depends on the longest sequence that the server allows.
_LENGTH_DEPENDENT_ROPE = {"longrope", "su", "dynamic"}

# Ways to speculate that add no KV layers. vLLM gives some of them the target model's own configuration.
_DRAFTS_WITHOUT_KV = {"ngram", "ngram_gpu", "custom_class", "suffix", "medusa", "mlp_speculator"}

#: How long a request waits for the state of its adapter's files. A local disk answers in a fraction of it; a file
#: system that does not is not waited for again.
ADAPTER_WAIT_S = 0.02
#: Nobody looks again at files that were looked at so recently: a burst of requests costs one look.
ADAPTER_FRESH_S = 1.0
#: What a slow file system said counts for so long.
ADAPTER_ANSWER_S = 10.0
#: Adapters that are remembered, and looks at their files that may hang at the same time.
ADAPTERS_LIMIT = 4096
ADAPTER_CHECKS_LIMIT = 8

# What vLLM's hashers make of an image (blake3, SHA-256, SHA-512), with the adapter's name in front where that changes
# how images are read. Anything else is a name that the client has given it, with whatever meaning.
_IMAGE_HASH = re.compile(r"(?:.*:)?(?:[0-9a-f]{64}|[0-9a-f]{128})", re.DOTALL)


def engine_facts(vllm_config: Any, model_identity: str | None) -> Facts:
    """Facts that all ranks of an engine share. `model_identity` stands for the weights where it is given."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    config = model.hf_config
    facts = [
        ("model config", canonical_json(config_dict(config))),
        ("model dtype", str(model.dtype)),
        ("kv dtype", kv_dtype(cache.cache_dtype, model.dtype)),
        ("kv skipped layers", canonical_json(getattr(cache, "kv_cache_dtype_skip_layers", None) or [])),
        *quantization_facts(model),
        ("hf overrides", canonical_json(getattr(model, "hf_overrides", None))),
        ("runner", str(getattr(model, "runner_type", None))),
        ("block tokens", str(cache.block_size)),
        ("attention", attention_backends(vllm_config)),
    ]
    if "CPU" in dict(facts)["attention"]:
        facts.append(("cpu packing", cpu_packing()))
    if _rope_types(config) & _LENGTH_DEPENDENT_ROPE:
        facts.append(("max model length", str(model.max_model_len)))
    multimodal = getattr(model, "multimodal_config", None)
    if multimodal is not None:
        facts.append(("image processing", canonical_json(getattr(multimodal, "mm_processor_kwargs", None))))
        facts += _prefixed("image processor", processor_facts(model, vllm_config.load_config))
    if getattr(model, "trust_remote_code", False):
        facts.append(("code revision", str(getattr(model, "code_revision", None))))
        facts += _prefixed("code", code_facts(model, vllm_config.load_config))
    facts += _prefixed("weights", weight_facts(model, vllm_config.load_config, model_identity))
    draft = _draft_model(vllm_config)
    if draft is not None:
        # The draft model has KV layers of its own in the same blocks.
        facts += [
            ("draft method", str(vllm_config.speculative_config.method)),
            ("draft config", canonical_json(config_dict(draft.hf_config))),
        ]
        facts += _prefixed("draft", quantization_facts(draft))
        facts += _prefixed("draft weights", weight_facts(draft, _draft_load_config(vllm_config), None))
    return facts


def quantization_facts(model: Any) -> Facts:
    """How weights are quantized: the method, and for one that quantizes while it loads also what it does."""
    return [
        ("quantization", str(getattr(model, "quantization", None))),
        ("quantization config", canonical_json(getattr(model, "quantization_config", None))),
    ]


def unnamed_weights(vllm_config: Any, model_identity: str | None) -> str | None:
    """Where the engine has weights from that its facts do not tell from others, None if there are none.

    What lies at an address, or at a hub, may be replaced, and only files that are here can be looked at. So only the
    operator can name such weights.
    """
    if model_identity is not None:
        return None
    model, draft = vllm_config.model_config, _draft_model(vllm_config)
    where = weights_elsewhere(model, vllm_config.load_config)
    if where is None and draft is not None:
        where = weights_elsewhere(draft, _draft_load_config(vllm_config))
    return where


def _draft_model(vllm_config: Any) -> Any:
    """The configuration of a draft model that has KV layers, None if there is none."""
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is vllm_config.model_config or getattr(speculative, "method", None) in _DRAFTS_WITHOUT_KV:
        return None
    return draft


def _draft_load_config(vllm_config: Any) -> Any:
    return getattr(vllm_config.speculative_config, "draft_load_config", None) or vllm_config.load_config


def backends_of_layers(vllm_config: Any) -> dict[str, str]:
    """The attention backend of each layer that has one. Known in workers, once the model is loaded."""
    layers = getattr(getattr(vllm_config, "compilation_config", None), "static_forward_context", None) or {}
    found = {}
    for layer_name, layer in layers.items():
        backend = getattr(layer, "attn_backend", None)
        if backend is not None and hasattr(backend, "get_name"):
            found[str(layer_name)] = str(backend.get_name())
    return found


def cpu_packing() -> str:
    """What decides how vLLM's kernels for CPUs pack a block: the machine and the units that it has."""
    import torch

    units = {}
    for name, probe in (("amx", "_is_amx_tile_supported"), ("avx512", "_is_avx512_supported")):
        units[name] = bool(getattr(torch.cpu, probe, lambda: False)())
    return canonical_json({"machine": platform.machine(), **units})


def attention_backends(vllm_config: Any) -> str:
    """The name of the attention backend, or the layers of each where there are several.

    Backends differ in the order of a block's dimensions, which sizes and strides alone cannot always tell: with as many
    heads as tokens in a block, (2, blocks, 16, 16, size) may be either. Known in workers, once the model is loaded.
    """
    by_backend: dict[str, list[str]] = {}
    for layer_name, backend in backends_of_layers(vllm_config).items():
        by_backend.setdefault(backend, []).append(layer_name)
    if len(by_backend) > 1:
        return canonical_json({backend: sorted(names) for backend, names in by_backend.items()})
    return next(iter(by_backend), "unknown")


def rank_facts(layer_names: Iterable[str], fingerprint: bytes, pp: tuple[int, int], tp: tuple[int, int]) -> Facts:
    """Facts of one worker: its (rank, size) in the pipeline and tensor groups, its layers, the order of its bytes."""
    return [
        ("pipeline rank", f"{pp[0]} of {pp[1]}"),
        ("tensor rank", f"{tp[0]} of {tp[1]}"),
        ("layers", canonical_json(list(layer_names))),
        ("layout", fingerprint.hex()),
    ]


def namespace_of(facts: Facts) -> bytes:
    """The id of a namespace."""
    return namespace_id(facts)


@dataclasses.dataclass
class _Check:
    """One look at an adapter's files."""

    started_s: float
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)
    ended_s: float = 0.0
    identity: bytes | None = None


@dataclasses.dataclass
class _Adapter:
    #: The identity when its files were first seen.
    first: bytes | None = None
    #: The last check that ended, and the one that runs.
    answer: _Check | None = None
    running: _Check | None = None
    slow: bool = False


class AdapterIdentities:
    """Identities of LoRA adapters, by name, path and the state of their files.

    The engine holds an adapter's weights from when it first loaded them, not as they are on disk now. An adapter whose
    files change while this process runs has no identity from then on, or from a second later: nobody can say which
    weights made its KV. When the engine loads an adapter is not told, so a change between that and the first request
    goes unnoticed: a new version of an adapter needs a path of its own.

    Files are looked at by threads, because their file system may hang and the engine must not.
    """

    def __init__(self, look: Callable[[str], Facts] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        # All adapters of one rank are of one size, and images are often made with one time for all files.
        self._look = look or functools.partial(file_facts, samples=True)
        self._clock = clock
        self._adapters: dict[tuple[str, str], _Adapter] = {}
        self._is_full = False
        self._checks = threading.BoundedSemaphore(ADAPTER_CHECKS_LIMIT)

    def identity(self, lora_request: Any) -> bytes | None:
        """The adapter's identity, or None if its KV must be neither stored nor loaded (not known yet included)."""
        name, path = str(lora_request.lora_name), str(lora_request.lora_path)
        if getattr(lora_request, "load_inplace", False):
            return None
        adapter = self._adapters.get((name, path))
        if adapter is None:
            if len(self._adapters) >= ADAPTERS_LIMIT:
                if not self._is_full:
                    self._is_full = True
                    logger.warning(
                        "kvlane: %d LoRA adapters were seen; requests with further ones are computed and not "
                        "transferred until this server starts anew",
                        ADAPTERS_LIMIT,
                    )
                return None
            adapter = self._adapters[name, path] = _Adapter()
        self._take(adapter)
        answer = adapter.answer
        fresh = answer is not None and self._clock() - answer.started_s < ADAPTER_FRESH_S
        if not fresh and adapter.running is None and self._checks.acquire(blocking=False):
            self._start(adapter, name, path)
            if not adapter.slow and adapter.running is not None:
                adapter.slow = not adapter.running.ended.wait(ADAPTER_WAIT_S)
            self._take(adapter)
        answer = adapter.answer
        if answer is None or self._clock() - answer.ended_s > ADAPTER_ANSWER_S or answer.identity is None:
            return None
        if adapter.first is None:
            adapter.first = answer.identity
        return answer.identity if answer.identity == adapter.first else None

    def _start(self, adapter: _Adapter, name: str, path: str) -> None:
        check = _Check(self._clock())

        def run() -> None:
            try:
                files = self._look(os.path.expanduser(path))
                if files:  # else it has no local files, so a change could not be noticed
                    check.identity = canonical_json({"name": name, "path": path, "files": files}).encode()
            except OSError:
                pass
            finally:
                check.ended_s = self._clock()
                self._checks.release()
                check.ended.set()

        adapter.running = check
        try:
            threading.Thread(target=run, name="kvlane-adapter", daemon=True).start()
        except RuntimeError:  # no more threads
            adapter.running = None
            self._checks.release()

    def _take(self, adapter: _Adapter) -> None:
        check = adapter.running
        if check is not None and check.ended.is_set():
            adapter.answer, adapter.running = check, None
            adapter.slow = check.ended_s - check.started_s > ADAPTER_WAIT_S


#: Of this process, because vLLM's hashes have a meaning in one process.
_RECENT_CHAINS = RecentChains()


def request_chain(
    request: Any, block_tokens: int, adapters: AdapterIdentities, images_are_named: bool, is_vllms_block: bool = True
) -> Chain | None:
    """The chain of a request's prompt, or None if its KV cannot be named by its content.

    That is so for prompts given as embeddings, for pooling requests (their attention may look ahead), and for images
    whose identifier is the request's or the client's and not the image's. A prompt that continues a recent one is
    hashed from there on, where `block_tokens` is the size of vLLM's own blocks (`is_vllms_block`).
    """
    tokens = request.prompt_token_ids
    if tokens is None or getattr(request, "prompt_embeds", None) is not None:
        return None
    if getattr(request, "pooling_params", None) is not None:
        return None
    lora = None
    if request.lora_request is not None:
        lora = adapters.identity(request.lora_request)
        if lora is None:
            return None
    features = getattr(request, "mm_features", None)
    if not features and is_vllms_block:
        # vLLM has hashed every prompt before it asks a connector.
        hashes, num_tokens = getattr(request, "block_hashes", None), getattr(request, "num_tokens", len(tokens))
        return _RECENT_CHAINS.chain(tokens, hashes, num_tokens, block_tokens, cache_salt=request.cache_salt, lora=lora)
    # vLLM's hashes do not count images as kvlane does.
    chain = Chain(block_tokens, cache_salt=request.cache_salt, lora=lora)
    for feature in features or ():
        if not images_are_named or not _IMAGE_HASH.fullmatch(feature.identifier or ""):
            return None
        place = feature.mm_position
        chain.add_image(place.offset, place.length, f"{feature.modality}:{feature.identifier}")
    chain.extend(tokens)
    return chain


def images_are_named(vllm_config: Any) -> bool:
    """Whether multimodal identifiers name content.

    With both of its caches off, vLLM names an image after the request: two different images may share that name.
    """
    multimodal = getattr(vllm_config.model_config, "multimodal_config", None)
    if multimodal is None:
        return True
    no_processor_cache = getattr(multimodal, "mm_processor_cache_gb", 1) == 0
    return not (no_processor_cache and not vllm_config.cache_config.enable_prefix_caching)


def scales_are_portable(cache_config: Any) -> bool:
    """Whether another engine reads the same values from the same bytes.

    Scales that an engine computes from its own first batch stay in that engine.
    """
    return not (getattr(cache_config, "calculate_kv_scales", False) and str(cache_config.cache_dtype).startswith("fp8"))


def kv_dtype(cache_dtype: Any, model_dtype: Any) -> str:
    """The type of the cache's elements; "auto" means the model's."""
    name = str(cache_dtype)
    return str(model_dtype).removeprefix("torch.") if name == "auto" else name


def _prefixed(prefix: str, facts: Facts) -> Facts:
    return [(f"{prefix} {name}", value) for name, value in facts]


def _rope_types(config: Any) -> set[str]:
    found: set[str] = set()

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if key in ("rope_type", "type") and isinstance(item, str):
                    found.add(item)
                visit(item)

    visit(config_dict(config))
    return found
