"""Risk: a server uses KV of other weights, another adapter, another rank or another image, and answers wrongly."""

import hashlib
import os
import subprocess
import sys
import textwrap
import threading
import time
import types

import pydantic
import pytest

from kvlane._native import Chain, RecentChains
from kvlane.vllm import identity, weights

RANK = ((0, 1), (0, 2))
# What vLLM makes of two images.
CAT, DOG = "c" * 64, "d" * 64


class ModelConfig(dict):
    """A stand-in for a transformers configuration."""

    def to_dict(self):
        return dict(self)


def engine(folder, **changes):
    """The parts of a VllmConfig that the identity reads."""
    config = {"hidden_size": 64, "rope_parameters": {"rope_type": "default"}, "_name_or_path": "anywhere"}
    model = types.SimpleNamespace(
        model=str(folder), dtype="torch.bfloat16", hf_config=ModelConfig(config), revision=None, seed=0,
        quantization=None, hf_overrides={}, runner_type="generate", max_model_len=4096, multimodal_config=None,
    )  # fmt: skip
    cache = types.SimpleNamespace(
        cache_dtype="auto", block_size=16, enable_prefix_caching=True, calculate_kv_scales=False
    )
    load = types.SimpleNamespace(load_format="auto", download_dir=None)
    compilation = types.SimpleNamespace(static_forward_context=layers("FLASH_ATTN"))
    result = types.SimpleNamespace(
        model_config=model, cache_config=cache, load_config=load, speculative_config=None,
        compilation_config=compilation,
    )  # fmt: skip
    for path, value in changes.items():
        owner, name = path.split("__")
        setattr(getattr(result, owner), name, value)
    return result


def layers(*backends):
    """What vLLM keeps of a loaded model's layers: attention, and others that have no backend."""

    def layer(name):
        return types.SimpleNamespace(attn_backend=types.SimpleNamespace(get_name=lambda: name))

    attention = {f"l.{index}.attn": layer(name) for index, name in enumerate(backends)}
    return {**attention, "l.0.experts": types.SimpleNamespace()}


def namespace(config, model_identity=None, fingerprint=b"\x01" * 32, pp=RANK[0], tp=RANK[1]):
    facts = identity.engine_facts(config, model_identity)
    return identity.namespace_of(facts + identity.rank_facts(["l.0", "l.1"], fingerprint, pp, tp))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_bytes(b"text")
    return tmp_path


def test_two_engines_with_the_same_model_share_a_namespace(folder):
    assert namespace(engine(folder)) == namespace(engine(folder))


def test_where_a_configuration_came_from_does_not_matter(folder):
    moved = engine(folder)
    moved.model_config.hf_config["_name_or_path"] = "elsewhere"
    moved.model_config.hf_config["transformers_version"] = "9"
    assert namespace(moved) == namespace(engine(folder))


def test_files_that_are_no_weights_do_not_matter(folder):
    before = namespace(engine(folder))
    (folder / "README.md").write_bytes(b"other text")
    assert namespace(engine(folder)) == before


def test_weights_replaced_below_the_same_path_are_another_namespace(folder):
    before = namespace(engine(folder))
    file = folder / "model.safetensors"
    status = file.stat()
    file.write_bytes(b"WEIGHTS")  # as long as before
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert namespace(engine(folder)) != before


def test_weights_in_files_of_an_unknown_kind_are_not_taken_for_others(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.tensors").write_bytes(b"weights")
    before = namespace(engine(folder))
    (folder / "model.tensors").write_bytes(b"other weights")
    assert namespace(engine(folder)) != before


def test_an_additional_weight_file_is_another_namespace(folder):
    before = namespace(engine(folder))
    (folder / "model-2.safetensors").write_bytes(b"")
    assert namespace(engine(folder)) != before


def test_a_hub_cache_is_known_by_content_and_not_by_time(tmp_path):
    """Two machines that downloaded the same revision have other times and the same blobs."""

    def download(name, etag, time_ns):
        blobs, snapshot = tmp_path / name / "blobs", tmp_path / name / "snapshots" / "main"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        (blobs / etag).write_bytes(b"weights")
        os.utime(blobs / etag, ns=(time_ns, time_ns))
        (snapshot / "model.safetensors").symlink_to(blobs / etag)
        return snapshot

    first, second = download("a", "f" * 64, 1_000), download("b", "f" * 64, 2_000)
    other = download("c", "e" * 64, 1_000)
    assert namespace(engine(first)) == namespace(engine(second))
    assert namespace(engine(first)) != namespace(engine(other))


def test_the_operators_word_stands_for_the_files(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes(b"weights")
    assert namespace(engine(folder), "build 7") == namespace(engine(copy), "build 7")
    assert namespace(engine(folder), "build 7") != namespace(engine(folder), "build 8")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_config__dtype": "torch.float16"},
        {"model_config__quantization": "awq"},
        {"model_config__quantization_config": {"linear": "fp8_per_tensor"}},
        {"model_config__hf_overrides": {"rope_theta": 1}},
        {"cache_config__cache_dtype": "fp8_e4m3"},
        {"cache_config__block_size": 32},
        {"model_config__hf_config": ModelConfig({"hidden_size": 65})},
        {"load_config__load_format": "dummy"},
        {"compilation_config__static_forward_context": layers("FLASHINFER")},
        {"compilation_config__static_forward_context": layers("FLASH_ATTN", "FLASHINFER")},
        {"compilation_config__static_forward_context": {}},
    ],
)
def test_a_changed_fact_is_another_namespace(folder, changes):
    assert namespace(engine(folder, **changes)) != namespace(engine(folder))


def test_what_a_server_quantizes_while_it_loads_is_a_fact_whatever_object_says_it(folder):
    """vLLM 0.32 has a class for it, and only the word "online" in the method's name."""

    class Arguments(pydantic.BaseModel):
        linear: str
        targets: dict[str, str]

    def quantized(**arguments):
        return namespace(engine(folder, model_config__quantization_config=Arguments(**arguments)))

    one = {"linear": "fp8_per_tensor", "targets": {"a": "b", "c": "d"}}
    assert quantized(**one) == quantized(**{**one, "targets": {"c": "d", "a": "b"}})
    assert quantized(**one) != quantized(**{**one, "targets": {"a": "b"}})
    draft = types.SimpleNamespace(model=str(folder), hf_config=ModelConfig(), quantization_config=None)
    speculative = types.SimpleNamespace(method="eagle", draft_model_config=draft)
    config = engine(folder, model_config__quantization_config=None)
    config.speculative_config = speculative
    before = namespace(config)
    draft.quantization_config = {"linear": "fp8_per_tensor"}
    assert namespace(config) != before


def test_vllms_own_quantization_arguments_are_compared_by_value(folder):
    try:
        from vllm.config import quantization
    except ImportError:  # vLLM 0.15 has no such arguments
        from vllm.config import ModelConfig

        assert not hasattr(ModelConfig, "quantization_config")
        return

    def quantized(**arguments):
        arguments = quantization.QuantizationConfigArgs(**arguments)
        return namespace(engine(folder, model_config__quantization_config=arguments))

    assert quantized(linear="fp8_per_tensor") == quantized(linear="fp8_per_tensor")
    ways = {quantized(linear="fp8_per_tensor"), quantized(linear="fp8_per_block"), quantized(moe="fp8_per_tensor")}
    ways.add(quantized(linear="fp8_per_tensor", ignore=["lm_head"]))
    assert len(ways) == 4


FROM_ADDRESS = {"model_config__model_weights": "s3://models/llama", "load_config__load_format": "runai_streamer"}
FROM_ARCHIVE = {"load_config__load_format": "tensorizer"}


@pytest.mark.parametrize(
    "changes",
    [
        FROM_ADDRESS,
        {"model_config__model": "gs://models/llama"},
        {"model_config__model": "https://models.example/llama.gguf", "load_config__load_format": "gguf"},
        FROM_ARCHIVE,
        {"load_config__load_format": "modelexpress"},
        {"load_config__load_format": "a plugin's"},
    ],
)
def test_weights_at_an_address_have_only_the_name_that_the_operator_gives_them(folder, changes):
    """Files in the model's folder say nothing about them, and what is at the address may be replaced."""
    config = engine(folder, **changes)
    assert identity.unnamed_weights(config, None) is not None
    assert identity.unnamed_weights(config, "build 7") is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"load_config__load_format": "runai_streamer"},
        {"load_config__load_format": "safetensors"},
        {"model_config__model": "s3://models/llama", "load_config__load_format": "dummy"},
    ],
)
def test_weights_in_files_need_no_name_from_the_operator(folder, changes):
    assert identity.unnamed_weights(engine(folder, **changes), None) is None


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "suffix", "custom_class", "medusa", "mlp_speculator"])
@pytest.mark.parametrize("drafts", ["itself", "another"])
def test_a_server_that_speculates_without_kv_of_a_draft_shares_with_one_that_does_not_speculate(folder, method, drafts):
    """Decode servers speculate and prefill servers do not: with other namespaces nothing would ever be found."""
    config = engine(folder)
    another = types.SimpleNamespace(model="org/heads", hf_config=ModelConfig())
    draft = config.model_config if drafts == "itself" else another
    config.speculative_config = types.SimpleNamespace(method=method, draft_model_config=draft)
    assert namespace(config) == namespace(engine(folder))
    assert identity.unnamed_weights(config, None) is None


def test_a_method_of_a_newer_vllm_that_drafts_with_the_model_itself_adds_no_kv(folder):
    config = engine(folder)
    config.speculative_config = types.SimpleNamespace(method="new", draft_model_config=config.model_config)
    assert namespace(config) == namespace(engine(folder))


def test_a_draft_model_with_kv_layers_is_another_namespace(folder):
    config = engine(folder)
    draft = types.SimpleNamespace(model=str(folder), hf_config=ModelConfig())
    config.speculative_config = types.SimpleNamespace(method="eagle", draft_model_config=draft)
    assert namespace(config) != namespace(engine(folder))


def test_a_draft_models_weights_at_an_address_count_too(folder):
    def drafting(method):
        draft = types.SimpleNamespace(model="s3://drafts/one", hf_config=ModelConfig())
        config = engine(folder)
        config.speculative_config = types.SimpleNamespace(method=method, draft_model_config=draft)
        return identity.unnamed_weights(config, None)

    assert drafting("eagle") == "'s3://drafts/one'"
    assert drafting("ngram") is None


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        (FROM_ADDRESS, {"model_config__model_weights": "s3://models/other"}),
        (
            {**FROM_ARCHIVE, "load_config__model_loader_extra_config": {"tensorizer_uri": "s3://a", "key": "secret"}},
            {"load_config__model_loader_extra_config": {"tensorizer_uri": "s3://b", "key": "secret"}},
        ),
    ],
)
def test_where_a_loader_reads_is_a_fact_and_its_passwords_stay_secret(folder, changes, other):
    first = engine(folder, **changes)
    assert namespace(first) == namespace(engine(folder, **changes))
    assert namespace(first) != namespace(engine(folder, **{**changes, **other}))
    assert "secret" not in str(identity.engine_facts(first, None))


def test_the_place_of_a_layers_attention_backend_matters(folder):
    one = {"compilation_config__static_forward_context": layers("FLASH_ATTN", "FLASHINFER")}
    other = {"compilation_config__static_forward_context": layers("FLASHINFER", "FLASH_ATTN")}
    assert namespace(engine(folder, **one)) != namespace(engine(folder, **other))
    more = {"compilation_config__static_forward_context": layers("FLASH_ATTN", "FLASH_ATTN")}
    assert namespace(engine(folder, **more)) == namespace(engine(folder))


def test_auto_means_the_models_own_type(folder):
    assert namespace(engine(folder, cache_config__cache_dtype="bfloat16")) == namespace(engine(folder))


@pytest.mark.parametrize("change", [{"tp": (1, 2)}, {"tp": (0, 1)}, {"pp": (0, 2)}, {"fingerprint": b"\x02" * 32}])
def test_ranks_and_layouts_have_their_own_namespaces(folder, change):
    assert namespace(engine(folder), **change) != namespace(engine(folder))


def test_the_longest_sequence_matters_only_where_rotations_depend_on_it(folder):
    longer = {"model_config__max_model_len": 8192}
    assert namespace(engine(folder, **longer)) == namespace(engine(folder))
    scaled = {"model_config__hf_config": ModelConfig({"rope_scaling": {"rope_type": "longrope"}})}
    assert namespace(engine(folder, **scaled, **longer)) != namespace(engine(folder, **scaled))


def test_scales_that_an_engine_computes_itself_are_not_portable(folder):
    assert identity.scales_are_portable(engine(folder).cache_config)
    computed = engine(folder, cache_config__cache_dtype="fp8", cache_config__calculate_kv_scales=True)
    assert not identity.scales_are_portable(computed.cache_config)


# ---- requests


def request(**changes):
    values = {
        "request_id": "r", "prompt_token_ids": list(range(40)), "prompt_embeds": None, "pooling_params": None,
        "lora_request": None, "cache_salt": None, "mm_features": [],
    }  # fmt: skip
    return types.SimpleNamespace(**{**values, **changes})


def chain_keys(asked, named=True, adapters=None):
    chain = identity.request_chain(asked, 16, adapters or identity.AdapterIdentities(), named)
    return chain.keys(0, chain.block_count) if chain is not None else None


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy machine may take longer than an engine waits; tests of the waiting set a time of their own."""
    monkeypatch.setattr(identity, "ADAPTER_WAIT_S", 10.0)


@pytest.fixture
def short_wait(patient, monkeypatch):
    monkeypatch.setattr(identity, "ADAPTER_WAIT_S", 0.02)


def adapter(folder, name="style", **changes):
    return types.SimpleNamespace(lora_name=name, lora_path=str(folder), lora_int_id=1, **changes)


def image(identifier, offset=4, length=6):
    place = types.SimpleNamespace(offset=offset, length=length)
    return types.SimpleNamespace(identifier=identifier, modality="image", mm_position=place)


@pytest.mark.parametrize(
    "changes", [{"prompt_token_ids": None}, {"prompt_embeds": object()}, {"pooling_params": object()}]
)
def test_what_tokens_do_not_name_has_no_chain(changes):
    assert chain_keys(request(**changes)) is None


def test_salted_requests_have_keys_of_their_own():
    assert chain_keys(request(cache_salt="a")) not in (chain_keys(request()), chain_keys(request(cache_salt="b")))


def test_images_decide_the_keys_by_name_and_place():
    keys = {
        chain_keys(request(mm_features=features))
        for features in ([], [image(CAT)], [image(DOG)], [image(CAT, offset=5)], [image(CAT), image(DOG, 20)])
    }
    assert len(keys) == 5


@pytest.mark.parametrize("name", ["img-0", "", None, "c" * 63, "C" * 64, f"{CAT} ", f"{CAT}\n"])
def test_an_image_that_the_client_has_named_has_no_chain(name):
    """A client's name lives as long as one server's caches; the next one may have another image of that name."""
    assert chain_keys(request(mm_features=[image(CAT), image(name, 20)])) is None


@pytest.mark.parametrize("name", [CAT, "0123456789abcdef" * 8, f"adapter: a\nb:{CAT}"])
def test_an_image_that_vllm_has_hashed_has_a_chain(name):
    assert chain_keys(request(mm_features=[image(name)])) is not None


def test_modelling_code_that_comes_with_a_model_is_a_fact_where_it_is_used(folder):
    trusted = {"model_config__trust_remote_code": True}
    found = []
    for code in ("one", "two"):
        (folder / "modeling.py").write_text(code)
        found += [namespace(engine(folder, **trusted)), namespace(engine(folder))]
    assert found[0] != found[2]
    assert found[1] == found[3]
    assert namespace(engine(folder, **trusted, model_config__code_revision="b")) not in found


def test_images_without_a_name_of_their_own_have_no_chain(folder):
    assert chain_keys(request(mm_features=[image(CAT)]), named=False) is None
    assert chain_keys(request(), named=False) is not None
    multimodal = types.SimpleNamespace(mm_processor_cache_gb=0)
    unnamed = engine(folder, model_config__multimodal_config=multimodal, cache_config__enable_prefix_caching=False)
    assert not identity.images_are_named(unnamed)
    assert identity.images_are_named(engine(folder, model_config__multimodal_config=multimodal))


def test_an_adapter_has_keys_of_its_own(folder):
    assert chain_keys(request(lora_request=adapter(folder))) not in (None, chain_keys(request()))


def test_the_same_adapter_name_with_other_files_misses(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"another")
    first = chain_keys(request(lora_request=adapter(folder)))
    assert first != chain_keys(request(lora_request=adapter(other)))
    assert first != chain_keys(request(lora_request=adapter(folder, "other name")))


def test_the_same_adapter_name_and_path_with_other_content_of_one_size_and_time_misses(folder):
    """As in two images of a server, made with one fixed time for all files."""
    found = set()
    for content in (b"first", b"other"):
        (folder / "model.safetensors").write_bytes(content)
        os.utime(folder / "model.safetensors", (0, 0))
        weights._samples_hash.cache_clear()  # the files are of two servers
        found.add(str(chain_keys(request(lora_request=adapter(folder)))))
    assert len(found) == 2
    assert "None" not in found


def test_an_adapter_whose_files_change_while_the_engine_runs_has_no_chain(folder):
    """The engine may hold the old weights or the new ones; nobody can tell."""
    now = [0.0]
    adapters = identity.AdapterIdentities(clock=lambda: now[0])
    before = chain_keys(request(lora_request=adapter(folder)), adapters=adapters)
    now[0] += identity.ADAPTER_FRESH_S
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert chain_keys(request(lora_request=adapter(folder)), adapters=adapters) is None
    # An engine that starts now loads the new files.
    assert chain_keys(request(lora_request=adapter(folder))) not in (None, before)


def test_an_adapter_that_is_not_a_local_folder_has_no_chain(folder):
    assert chain_keys(request(lora_request=adapter("someone/adapter"))) is None
    assert chain_keys(request(lora_request=adapter(folder, load_inplace=True))) is None


class SlowFolder:
    """Stands for a file system that answers when a test lets it."""

    def __init__(self):
        self.answers = threading.Event()
        self.answers.set()
        self.looks = 0

    def look(self, path):
        self.looks += 1
        assert self.answers.wait(30)
        return identity.file_facts(path)


def test_a_hanging_file_system_costs_an_engine_one_short_wait(folder, short_wait):
    slow = SlowFolder()
    slow.answers.clear()
    adapters = identity.AdapterIdentities(look=slow.look)
    start = time.monotonic()
    for _ in range(1000):
        assert adapters.identity(adapter(folder)) is None
    assert time.monotonic() - start < 10, "not one wait of 20 ms, but a thousand"
    assert slow.looks == 1, "every request started a thread that hangs"
    slow.answers.set()
    settle(lambda: adapters.identity(adapter(folder)) is not None)


def test_a_burst_of_requests_looks_at_an_adapters_files_once(folder):
    slow, now = SlowFolder(), [0.0]
    adapters = identity.AdapterIdentities(look=slow.look, clock=lambda: now[0])
    settle(lambda: adapters.identity(adapter(folder)) is not None)
    for _ in range(100):
        assert adapters.identity(adapter(folder)) is not None
    assert slow.looks == 1
    now[0] += identity.ADAPTER_FRESH_S
    assert adapters.identity(adapter(folder)) is not None
    settle(lambda: slow.looks == 2)


def test_what_a_slow_file_system_said_counts_for_a_while(folder, short_wait):
    slow, now = SlowFolder(), [0.0]
    adapters = identity.AdapterIdentities(look=slow.look, clock=lambda: now[0])
    settle(lambda: adapters.identity(adapter(folder)) is not None)
    known = adapters.identity(adapter(folder))
    slow.answers.clear()
    assert adapters.identity(adapter(folder)) == known
    now[0] += identity.ADAPTER_ANSWER_S + 1
    assert adapters.identity(adapter(folder)) is None
    slow.answers.set()
    settle(lambda: adapters.identity(adapter(folder)) == known)


def test_many_hanging_adapters_have_few_threads(folder, short_wait):
    slow = SlowFolder()
    slow.answers.clear()
    adapters = identity.AdapterIdentities(look=slow.look)
    for number in range(50):
        assert adapters.identity(adapter(folder, f"adapter {number}")) is None
    assert slow.looks <= identity.ADAPTER_CHECKS_LIMIT
    slow.answers.set()
    settle(lambda: adapters.identity(adapter(folder, "adapter 49")) is not None)


def settle(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- prompts that continue an earlier one

UNREAD = "a token that nobody may read"


def vllm_hashes(tokens, salt=None, block_tokens=16, digest_bytes=32):
    """Hashes of full blocks as vLLM makes them: each covers the one before, the first one the salt."""
    hashes, parent = [], b"seed"
    for first in range(0, len(tokens) - block_tokens + 1, block_tokens):
        block = repr((parent, tokens[first : first + block_tokens], salt if first == 0 else None))
        parent = hashlib.sha256(block.encode()).digest()[:digest_bytes]
        hashes.append(parent)
    return hashes


def hashed_request(tokens, **changes):
    hashes = vllm_hashes(tokens, changes.get("cache_salt"))
    return request(**{"prompt_token_ids": tokens, "block_hashes": hashes, "num_tokens": len(tokens), **changes})


@pytest.fixture
def recent(monkeypatch):
    monkeypatch.setattr(identity, "_RECENT_CHAINS", RecentChains())


def plain_keys(tokens, **root):
    chain = Chain(16, **root)
    chain.extend(tokens)
    return chain.keys(0, chain.block_count)


def without_head(asked, count):
    """The same request with tokens that would be refused if they were read."""
    asked.prompt_token_ids = [UNREAD] * count + asked.prompt_token_ids[count:]
    return asked


def test_a_prompt_that_grew_is_hashed_from_where_it_grew(recent):
    head, tokens = list(range(100)), list(range(100)) + list(range(500, 545))
    first = identity.request_chain(hashed_request(head), 16, identity.AdapterIdentities(), True)
    assert chain_keys(without_head(hashed_request(tokens), 96)) == plain_keys(tokens)
    # The earlier request lives on, with its own chain.
    assert (first.block_count, first.keys(0, 6)) == (6, plain_keys(head))
    assert chain_keys(without_head(hashed_request(tokens), 144)) == plain_keys(tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_salt": "tenant", "block_hashes": vllm_hashes(list(range(100)))},
        {"block_hashes": vllm_hashes(list(range(100)), digest_bytes=16)},
        {"block_hashes": vllm_hashes(list(range(100)), block_tokens=8)},
        {"block_hashes": []},
        {"mm_features": [image(CAT, 97, 2)]},
    ],
)
def test_a_prompt_that_may_not_continue_another_is_hashed_whole(recent, changes):
    """Even where vLLM's hashes were equal: other salt, hashes that may collide, other blocks, images."""
    tokens = list(range(100))
    chain_keys(hashed_request(tokens))
    with pytest.raises(TypeError, match="item 0 is a str"):
        chain_keys(without_head(hashed_request(tokens, **changes), 96))
    salt = changes.get("cache_salt")
    assert chain_keys(hashed_request(tokens, **changes)) == plain_keys(tokens, cache_salt=salt)


def test_an_adapters_prompt_does_not_continue_one_without(recent, folder):
    tokens = list(range(100))
    chain_keys(hashed_request(tokens))
    with pytest.raises(TypeError):
        chain_keys(without_head(hashed_request(tokens, lora_request=adapter(folder)), 96))


def test_a_prompt_with_another_token_is_not_taken_for_the_same(recent):
    tokens = list(range(100))
    chain_keys(hashed_request(tokens))
    for place in (0, 17, 95):
        other = [*tokens]
        other[place] = 7777
        assert chain_keys(hashed_request(other)) == plain_keys(other)


def test_remembered_chains_have_a_bound():
    recent = RecentChains(limit_chains=3, limit_blocks=20)

    def chain(tokens, unread=0):
        asked = without_head(hashed_request(tokens), unread)
        return recent.chain(asked.prompt_token_ids, asked.block_hashes, asked.num_tokens, 16)

    def is_known(tokens):
        try:
            return chain(tokens, len(tokens)).block_count == len(tokens) // 16
        except TypeError:
            return False

    prompts = [list(range(start, start + 16 * blocks)) for start, blocks in ((0, 2), (1000, 3), (2000, 4), (3000, 16))]
    for tokens in prompts:
        chain(tokens)
    assert [is_known(tokens) for tokens in prompts] == [False, False, True, True]
    too_long = list(range(16 * 21))
    chain(too_long)
    assert not is_known(too_long)
    assert is_known(prompts[-1])


def test_a_chain_that_was_continued_by_two_prompts_is_right_for_both(recent):
    head = list(range(96))
    chain_keys(hashed_request(head))
    for tail in (500, 600, 500):
        tokens = [*head, *range(tail, tail + 40)]
        assert chain_keys(hashed_request(tokens)) == plain_keys(tokens)
    assert chain_keys(without_head(hashed_request(head), 96)) == plain_keys(head)


# ---- processes


def test_names_do_not_depend_on_the_hash_seed_of_python(folder):
    """Python's own hashes differ from process to process; sets and dictionaries of names must not show it."""
    script = """
        import sys
        sys.path[:0] = [sys.argv[2]]
        from kvlane.vllm import identity
        identity.ADAPTER_WAIT_S = 10.0
        from test_identity import CAT, DOG, adapter, chain_keys, engine, hashed_request, image, namespace, request
        folder = sys.argv[1]
        config = engine(folder, model_config__hf_overrides={"names": {"a", "b", "c", "d", "e"}})
        print(namespace(config).hex())
        for asked in (
            request(cache_salt="s", mm_features=[image(CAT), image(DOG, 20)]),
            request(lora_request=adapter(folder)),
            hashed_request(list(range(100))),
        ):
            print(chain_keys(asked).hex())
    """
    said = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), str(folder), os.path.dirname(__file__)],
            check=True, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1", "4242")
    }  # fmt: skip
    assert len(said) == 1
    assert len(said.pop().split()) == 4
