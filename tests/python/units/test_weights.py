"""Risk: servers whose weights came from a hub share KV of two commits, because nobody looked at the files."""

import json
import os
import time
import types

import pytest

from kvlane.vllm import identity, weights
from kvlane.vllm.weights import process_start_s
from test_identity import ModelConfig, engine, namespace

NAME = "org/name"
FIRST, SECOND = "a" * 40, "b" * 40


def start_now(monkeypatch):
    """What was made so far was there when the process began, and what comes was not. Times of files come in steps."""
    time.sleep(0.05)
    began_s = time.time()
    time.sleep(0.05)
    monkeypatch.setattr(weights, "process_start_s", lambda: began_s)


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


def test_weights_that_change_while_the_server_starts_are_not_shared(tmp_path, monkeypatch):
    """Loading takes minutes. A server that read the old files would name its KV after the new ones."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    changed_s = os.stat(tmp_path / "model.safetensors").st_ctime
    monkeypatch.setattr(weights, "process_start_s", lambda: changed_s + 0.01)
    assert identity.unnamed_weights(engine(tmp_path), None) is None
    monkeypatch.setattr(weights, "process_start_s", lambda: changed_s - 0.01)
    assert "model.safetensors was changed while this process ran" in identity.unnamed_weights(engine(tmp_path), None)
    assert identity.unnamed_weights(engine(tmp_path), "build 7") is None
    # Whatever times the copy brought along.
    os.utime(tmp_path / "model.safetensors", (0, 0))
    assert "was changed" in identity.unnamed_weights(engine(tmp_path), None)


@pytest.mark.parametrize(
    "way", ["link to the folder", "link above it", "link to the file", "folder", "folder above it"]
)
def test_weights_that_another_version_took_the_place_of_while_the_server_starts_are_not_shared(
    tmp_path, monkeypatch, way
):
    """All files are old, and those of the version that was loaded are not at the path any more."""
    for version in ("v1", "v2"):
        (tmp_path / "versions" / version / "model").mkdir(parents=True)
        (tmp_path / "versions" / version / "model" / "model.safetensors").write_bytes(version.encode())
    (tmp_path / "served").mkdir()

    def place(version):
        versions, served = tmp_path / "versions", tmp_path / "served"
        if way == "link to the folder":
            os.symlink(versions / version / "model", served / "model.new")
            (served / "model.new").rename(served / "model")
        elif way == "link above it":
            os.symlink(f"../versions/{version}", served / "current.new")
            (served / "current.new").rename(served / "current")
        elif way == "link to the file":
            (served / "model").mkdir(exist_ok=True)
            os.symlink(versions / version / "model" / "model.safetensors", served / "new")
            (served / "new").rename(served / "model" / "model.safetensors")
        else:
            name = "model" if way == "folder" else "current"
            if (served / name).exists():
                (served / name).rename(served / "old")
            (versions / version / ("model" if way == "folder" else "")).rename(served / name)

    path = tmp_path / "served" / ("current/model" if "above" in way else "model")
    place("v1")
    start_now(monkeypatch)
    assert identity.unnamed_weights(engine(path), None) is None
    place("v2")
    assert "was changed while this process ran" in identity.unnamed_weights(engine(path), None)
    assert identity.unnamed_weights(engine(path), "build 7") is None


def test_a_version_that_was_still_being_made_when_the_server_started_is_noticed_too(tmp_path, monkeypatch):
    for version in ("v1", "v2"):
        (tmp_path / version / "model").mkdir(parents=True)
        (tmp_path / version / "model" / "model.safetensors").write_bytes(version.encode())
    (tmp_path / "v1").rename(tmp_path / "current")
    start_now(monkeypatch)
    path = tmp_path / "current" / "model"
    (tmp_path / "v2" / "READY").write_text("")
    (tmp_path / "current").rename(tmp_path / "old")
    (tmp_path / "v2").rename(tmp_path / "current")
    assert "was changed while this process ran" in identity.unnamed_weights(engine(path), None)


def test_a_folder_above_a_model_may_change_its_rights_and_content(tmp_path, monkeypatch):
    """As an overlay file system does when something below is written for the first time."""
    (tmp_path / "a" / "b" / "model").mkdir(parents=True)
    (tmp_path / "a" / "b" / "model" / "model.safetensors").write_bytes(b"weights")
    start_now(monkeypatch)
    (tmp_path / "a" / "b").chmod(0o755)
    assert identity.unnamed_weights(engine(tmp_path / "a" / "b" / "model"), None) is None


def test_modelling_code_that_changes_while_the_server_starts_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "modeling.py").write_text("old")
    start_now(monkeypatch)
    with open(tmp_path / "modeling.py", "r+") as code:
        code.write("new")
    assert "modeling.py was changed" in identity.unnamed_weights(engine(tmp_path), None)


def test_a_path_that_leads_up_behind_a_link_is_followed_as_the_system_does(tmp_path, monkeypatch):
    (tmp_path / "versions" / "v1").mkdir(parents=True)
    (tmp_path / "versions" / "v2").mkdir()
    (tmp_path / "versions" / "v2" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "current").symlink_to(tmp_path / "versions" / "v1")
    monkeypatch.setattr(weights, "process_start_s", lambda: time.time() + 3600)
    path = f"{tmp_path}/models/current/../v2"
    assert identity.unnamed_weights(engine(path), None) is None
    monkeypatch.chdir(tmp_path / "models")
    assert identity.unnamed_weights(engine("current/../v2"), None) is None


def test_files_that_are_none_and_files_that_cannot_be_read_stop_no_start(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "gone.bin").symlink_to(tmp_path / "nowhere")
    trusted = engine(tmp_path, model_config__trust_remote_code=True)
    assert any("model.safetensors" in name for name, _ in identity.engine_facts(trusted, None))


def test_files_that_stay_as_they_are_are_read_once(tmp_path, monkeypatch):
    (tmp_path / "adapter.safetensors").write_bytes(b"weights")
    first = identity.file_facts(str(tmp_path), samples=True)
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("it was read again"))
    assert identity.file_facts(str(tmp_path), samples=True) == first


def test_what_comes_and_goes_beside_a_model_does_not_keep_it_from_being_shared(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    start_now(monkeypatch)
    (tmp_path / "another model").mkdir()
    assert identity.unnamed_weights(engine(tmp_path / "model"), None) is None


def test_a_hubs_files_are_shared_though_they_came_while_the_server_started(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "process_start_s", lambda: time.time() - 3600)
    download(tmp_path, FIRST, "1")
    assert identity.unnamed_weights(hub_engine(tmp_path), None) is None


def test_a_process_knows_when_it_began():
    psutil = pytest.importorskip("psutil")
    began_s = process_start_s.__wrapped__()
    assert abs(began_s - psutil.Process().create_time()) < 2


@pytest.mark.parametrize("size_bytes", [1, 4096, 5000, 1 << 20])
@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_weights_of_one_size_and_time_are_told_apart_by_what_is_in_them(tmp_path, size_bytes, place):
    """Archives and images are often made with one fixed time for all files."""
    names = []
    for value in (b"a", b"b"):
        content = bytearray(size_bytes)
        piece = max(size_bytes // 8, 1)
        at = {"start": 0, "middle": (size_bytes - piece) // 2, "end": size_bytes - piece}[place]
        content[at : at + piece] = value * piece
        (tmp_path / "model.safetensors").write_bytes(content)
        os.utime(tmp_path / "model.safetensors", (1, 1))
        weights._samples_hash.cache_clear()  # the files are of two servers
        names.append(namespace(engine(tmp_path)))
    assert names[0] != names[1]


@pytest.mark.parametrize(
    "name", ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]
)
def test_what_an_image_processor_does_is_part_of_the_namespace_where_there_are_images(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    images = {"model_config__multimodal_config": types.SimpleNamespace(mm_processor_kwargs=None)}
    names = []
    for content in (None, '{"image_mean": 0.5}', '{"image_mean": 0.4}'):
        if content is not None:
            (tmp_path / name).write_text(content)
        names.append(namespace(engine(tmp_path, **images)))
    assert len(set(names)) == 3
    text_only = namespace(engine(tmp_path))
    (tmp_path / name).unlink()
    assert namespace(engine(tmp_path)) == text_only
