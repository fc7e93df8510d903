"""Risk: servers whose weights came from a hub share KV of two commits, because nobody looked at the files."""

import json
import types

import pytest

from kvlane.vllm import identity
from test_identity import ModelConfig, engine, namespace

NAME = "org/name"
FIRST, SECOND = "a" * 40, "b" * 40


def download(cache, commit, etag, files=("model.safetensors",), branch="main"):
    """What a hub's client leaves of a commit: the branch, files by content, and links to them. Returns the snapshot."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "refs", repository / "blobs", repository / "trees", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    blob = repository / "blobs" / (etag * 64)
    blob.write_bytes(b"weights")
    for name in files:
        (snapshot / name).symlink_to(blob)
    # The client knows of more files than vLLM asked it for.
    known = {"size": 7, "blob_id": etag * 40}
    tree = {"format_version": 1, "files": dict.fromkeys((*files, "README.md"), known)}
    (repository / "trees" / f"{commit}.json").write_text(json.dumps(tree))
    return snapshot


def hub_engine(cache, **changes):
    return engine(NAME, **{"load_config__download_dir": str(cache), **changes})


@pytest.fixture(autouse=True)
def no_modelscope(monkeypatch):
    monkeypatch.delenv("VLLM_USE_MODELSCOPE", raising=False)


def test_two_commits_of_a_hubs_model_are_two_namespaces_also_where_only_weights_lie_in_the_cache(tmp_path):
    """vLLM puts weights into --download-dir and leaves config.json in the hub's own cache."""
    download(tmp_path / "one", FIRST, "1")
    download(tmp_path / "other", SECOND, "2")
    one, other = hub_engine(tmp_path / "one"), hub_engine(tmp_path / "other")
    assert namespace(one) != namespace(other)
    assert identity.unnamed_weights(one, None) is identity.unnamed_weights(other, None) is None


def test_a_commit_that_changed_no_weights_keeps_the_namespace(tmp_path):
    download(tmp_path / "one", FIRST, "1")
    download(tmp_path / "other", SECOND, "1")
    assert namespace(hub_engine(tmp_path / "one")) == namespace(hub_engine(tmp_path / "other"))


def test_a_revision_is_looked_up_and_not_the_main_branch(tmp_path):
    download(tmp_path, SECOND, "2")
    download(tmp_path, FIRST, "1", branch="old")
    branches = [hub_engine(tmp_path, model_config__revision=name) for name in ("old", FIRST, "main", None)]
    old, commit, main, default = (namespace(config) for config in branches)
    assert old == commit != main == default


@pytest.mark.parametrize("file", ["consolidated.safetensors", "pytorch_model.bin"])
def test_a_hubs_model_without_a_config_file_is_known_by_its_weights(tmp_path, file):
    download(tmp_path, FIRST, "1", files=("params.json", file))
    assert identity.unnamed_weights(hub_engine(tmp_path), None) is None
    assert f"file {file}" in str(identity.engine_facts(hub_engine(tmp_path), None))


@pytest.mark.parametrize("case", ["no cache", "no weights", "modelscope", "another name", "a quantization of many"])
def test_a_hubs_model_of_which_no_weight_files_are_found_has_only_the_name_that_the_operator_gives_it(
    tmp_path, case, monkeypatch
):
    config = hub_engine(tmp_path)
    if case != "no cache":
        download(tmp_path, FIRST, "1", files=("config.json",) if case == "no weights" else ("model.gguf",))
    if case == "modelscope":
        # It has a cache of its own: the hub's weights of that name were not loaded.
        monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    elif case == "another name":
        config.model_config.model = "org/another"
    elif case == "a quantization of many":
        config.model_config.model = f"{NAME}:Q4_K_M"
    assert "no weight files were found" in identity.unnamed_weights(config, None)
    assert identity.unnamed_weights(config, "build 7") is None
    assert not any(".gguf" in name for name, _ in identity.engine_facts(config, None))


def test_a_folder_without_weight_files_is_not_shared_and_random_weights_are(tmp_path):
    (tmp_path / "model.tensors").write_bytes(b"weights")
    assert str(tmp_path) in identity.unnamed_weights(engine(tmp_path), None)
    assert identity.unnamed_weights(engine(tmp_path, load_config__load_format="dummy"), None) is None


def test_weights_that_another_download_replaced_during_the_start_are_not_shared(tmp_path):
    """The engine has the first commit; the cache's branch says the second when the engine is asked for its facts."""
    config = hub_engine(tmp_path)
    config.model_config.hf_config = ModelConfig({"hidden_size": 64})
    config.model_config.hf_config._commit_hash = FIRST
    download(tmp_path, FIRST, "1")
    assert identity.unnamed_weights(config, None) is None
    download(tmp_path, SECOND, "2")
    assert "replaced meanwhile" in identity.unnamed_weights(config, None)
    config.model_config.hf_config_path = "org/config"  # says nothing about the weights
    assert identity.unnamed_weights(config, None) is None


def test_a_draft_model_of_a_hub_counts_too(tmp_path):
    config = hub_engine(tmp_path)
    download(tmp_path, FIRST, "1")
    draft = types.SimpleNamespace(model="org/draft", hf_config=ModelConfig())
    config.speculative_config = types.SimpleNamespace(method="eagle", draft_model_config=draft)
    assert "'org/draft'" in identity.unnamed_weights(config, None)
