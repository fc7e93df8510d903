"""The identity of a model's weights: which files, or which name, they were loaded from."""

import functools
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from typing import Any

from kvlane.vllm.canonical import canonical_json

#: A fact is a name and a value; equal facts mean equal KV bytes.
Facts = list[tuple[str, str]]

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Loaders that read the model's own files. Others read something else than the files that lie there: an archive with a
# name of its own, another process, or whatever a plugin reads.
_LOAD_FORMATS_OF_FILES = {
    "auto", "bitsandbytes", "fastsafetensors", "gguf", "hf", "instanttensor", "mistral", "npcache", "pt",
    "runai_streamer", "runai_streamer_sharded", "safetensors", "sharded_state",
}  # fmt: skip
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# A name in a hub cache's blob folder is a hash of the content.
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# Pieces of a weight file that are read: the first one has the header, the others lie at equal distances.
_SAMPLES = 16
_SAMPLE_BYTES = 4096
# As many as Linux follows.
_LINKS_MAX = 40
# Files beside the weights that decide what an image processor makes of an image.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_CONTENT_BYTES_MAX = 4 << 20
_READ_AT_START = (*_WEIGHT_SUFFIXES, *_PROCESSOR_FILES, ".py")


def weights_elsewhere(model: Any, load_config: Any) -> str | None:
    """Where weights come from that `weight_facts` does not tell from others, None if it does."""
    load_format = _load_format(load_config)
    if load_format.endswith("dummy"):
        return None
    if load_format not in _LOAD_FORMATS_OF_FILES:
        return f"the loader '{load_format}'"
    name = _weights_name(model)
    if _ADDRESS.match(name):
        return f"'{name}'"
    path = model_path(model, load_config)
    if path is None or not file_facts(path, _WEIGHT_SUFFIXES):
        return f"'{name}', of which no weight files were found here,"
    changed = _changed_since(path, process_start_s())
    if changed is not None:
        # Loading takes minutes, and nobody knows whether it was before or behind the change.
        return f"'{name}', of which {changed} was changed while this process ran,"
    if path != name and _config_commit(model) not in (None, os.path.basename(path)):
        # The hub's branch moved on between the start and now, so nobody knows which of the two was loaded.
        return f"'{name}', which another download replaced meanwhile,"
    return None


def weight_facts(model: Any, load_config: Any, model_identity: str | None) -> Facts:
    """The identity of a model's weights.

    In order of preference: the operator's word; the weight files in the model's folder (name, size, and the content
    hash of a hub cache or else the modification time and samples of the content); the name and revision that the model
    was asked for, with all files in its folder, because weights may be in files of an unknown kind. That last is not
    enough to share, and `weights_elsewhere` says so.
    """
    if model_identity is not None:
        return [("identity", model_identity)]
    load_format = _load_format(load_config)
    facts = [("format", load_format)]
    loader = getattr(load_config, "model_loader_extra_config", None)
    if loader:
        # May hold passwords of an object store, and facts are left in the folder as text.
        facts.append(("loader config", hashlib.sha256(canonical_json(loader).encode()).hexdigest()))
    if getattr(model, "model_weights", None):
        facts.append(("address", str(model.model_weights)))
    if load_format.endswith("dummy"):
        return [*facts, ("random seed", str(getattr(model, "seed", None)))]
    path = model_path(model, load_config)
    files = file_facts(path, _WEIGHT_SUFFIXES, samples=True) if path else []
    if files:
        return [*facts, *files]
    facts += [("name", str(model.model)), ("revision", str(getattr(model, "revision", None)))]
    return [*facts, *(file_facts(path) if path else [])]


def model_path(model: Any, load_config: Any) -> str | None:
    """The local file or folder that a model's weights are loaded from, None if there is none."""
    name = _weights_name(model)
    if os.path.exists(name):
        return name
    if os.environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() in ("1", "true"):
        return None  # a cache of another kind; what a hub's cache has under this name was not loaded
    try:
        from huggingface_hub import snapshot_download

        # Asks nothing but the local cache, the one that vLLM puts weights into; no file is required to be in it.
        return snapshot_download(
            name,
            revision=getattr(model, "revision", None),
            cache_dir=getattr(load_config, "download_dir", None),
            local_files_only=True,
            ignore_patterns="*",
        )
    except (ImportError, ValueError, OSError):  # no hub client, not a hub name, not there
        return None


def processor_facts(model: Any, load_config: Any) -> Facts:
    """The files that decide what becomes of an image before the model sees it. vLLM's name of an image does not cover
    them."""
    folder = _model_folder(model, load_config)
    return _content_facts(folder, _PROCESSOR_FILES) if folder else []


def code_facts(model: Any, load_config: Any) -> Facts:
    """The modelling code that comes with a model. What it names in other repositories has a revision of its own."""
    folder = _model_folder(model, load_config)
    return _content_facts(folder, sorted(name for name in os.listdir(folder) if name.endswith(".py"))) if folder else []


def _model_folder(model: Any, load_config: Any) -> str | None:
    """Where the files beside the weights are, None if nowhere here."""
    path = str(model.model) if os.path.isdir(str(model.model)) else model_path(model, load_config)
    return path if path is not None and os.path.isdir(path) else None


def _content_facts(folder: str, names: Iterable[str]) -> Facts:
    facts: Facts = []
    for name in names:
        try:
            with open(os.path.join(folder, name), "rb") as file:
                content = file.read(_CONTENT_BYTES_MAX)
        except (FileNotFoundError, IsADirectoryError, PermissionError):  # then the engine does not read it either
            continue
        facts.append((f"file {name}", hashlib.sha256(content).hexdigest()))
    return facts


def file_facts(path: str, suffixes: tuple[str, ...] | None = None, samples: bool = False) -> Facts:
    """Name, size and content hash or modification time of a file, or of the files directly in a folder.

    `samples`: instead of the time alone a hash of some of the content, too. Archives and images are often made with one
    fixed time for all files, and all fine-tunes of a model are of one size.
    """
    facts = []
    for name, target in _files(path, suffixes):
        status, content_hash = os.stat(target), _content_hash(target)
        version = f"time {status.st_mtime_ns}" if content_hash is None else f"hash {content_hash}"
        if samples and content_hash is None:
            known = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            version += f", samples {_samples_hash(target, known)}"
        facts.append((f"file {name}", f"{status.st_size} bytes, {version}"))
    return facts


def _files(path: str, suffixes: tuple[str, ...] | None) -> Iterator[tuple[str, str]]:
    """Names, and where the content lies: a file, or those directly in a folder."""
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if suffixes is None or name.endswith(suffixes))
        paths = [(name, os.path.join(path, name)) for name in names]
    else:
        paths = [(os.path.basename(path), path)]
    for name, file in paths:
        target = os.path.realpath(file)
        if os.path.isfile(target):
            yield name, target


def _content_hash(target: str) -> str | None:
    """The content's hash where a hub cache has named the file after it."""
    folder, blob = os.path.split(target)
    return blob if os.path.basename(folder) == "blobs" and _ETAG.fullmatch(blob) else None


@functools.lru_cache(maxsize=4096)
def _samples_hash(target: str, known: tuple[int, ...]) -> str:
    """Of a file with this device, number, size and times: adapters are looked at every second."""
    samples, size_bytes = hashlib.sha256(), known[2]
    try:
        with open(target, "rb", buffering=0) as file:
            for number in range(_SAMPLES):
                file.seek(max(size_bytes - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
                samples.update(file.read(_SAMPLE_BYTES))
    except PermissionError:  # then the engine does not read it either
        return "unreadable"
    return samples.hexdigest()


def _changed_since(path: str, since_s: float) -> str | None:
    """What somebody changed later of the files that the engine reads at its start, or of the way to them. A hub cache's
    file is its content's."""
    try:
        for name, target in _files(path, _READ_AT_START):
            if _content_hash(target) is not None:
                continue
            if os.stat(target).st_ctime > since_s:
                return f"file {name}"
            for place in _way_to(os.path.join(path, name) if os.path.isdir(path) else path):
                if _took_its_place_since(place, target, since_s):
                    return place
    except OSError as error:  # it vanished under our eyes
        return f"{error.filename} ({error.strerror})"
    return None


def _took_its_place_since(place: str, target: str, since_s: float) -> bool:
    """Whether a link or folder on the way to a file may have come there later."""
    status = os.lstat(place)
    if status.st_ctime <= since_s:
        return False
    if stat.S_ISLNK(status.st_mode):
        return True
    if not stat.S_ISDIR(status.st_mode):
        return False
    # Above the model's folder files come and go, and an overlay file system touches folders that it copies. Another
    # name changes both a folder and the one that it is in.
    return place == os.path.dirname(target) or os.lstat(os.path.dirname(place)).st_mtime > since_s


def _way_to(path: str) -> Iterator[str]:
    """Folders and links that lead to a file, and the file. No folder comes with a link in its name."""
    rest, at, links = os.path.join(os.getcwd(), path).split("/"), "/", 0
    while rest:
        part = rest.pop(0)
        if part in ("", "."):
            continue
        if part == "..":
            at = os.path.dirname(at)
            continue
        place = os.path.join(at, part)
        yield place
        if os.path.islink(place) and links < _LINKS_MAX:
            links += 1
            target = os.readlink(place)
            rest = target.split("/") + rest
            at = "/" if target.startswith("/") else at
        else:
            at = place


@functools.cache
def process_start_s() -> float:
    """When this process began, in seconds since 1970. vLLM loads weights in the process that asks."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])  # field 22 of proc_pid_stat(5), since the system's boot
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s


def _load_format(load_config: Any) -> str:
    return str(getattr(load_config, "load_format", "auto"))


def _weights_name(model: Any) -> str:
    """The file, folder, hub name or address that weights are loaded from. For an address, `model` is a local copy of
    the rest of the model."""
    return str(getattr(model, "model_weights", None) or model.model)


def _config_commit(model: Any) -> str | None:
    """The commit of the hub that a model's configuration was read from, if it is the weights' own and known."""
    if getattr(model, "hf_config_path", None):
        return None
    return getattr(getattr(model, "hf_config", None), "_commit_hash", None)
