"""The options in ``kv_connector_extra_config``, parsed into a typed value."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from kvlane._native import ConfigError

MEDIA = ("auto", "memory", "disk", "network")
LOAD_FAILURE_POLICIES = ("recompute", "keep")

#: Where `kvlane.compat` puts keys that newer vLLM versions dropped. No connector needs them.
LEGACY = "legacy"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the filesystem connector. Every field is an option of the same name."""

    #: Folder that all servers share. Segments lie in its subfolder ``kvlane``.
    shared_storage_path: str = "/tmp"
    #: Bytes that all segments may take together. None: what the folder has, else half of what is free.
    capacity_bytes: int | None = None
    #: Longest time that a request waits for its KV, for the prefill and the load together, in ms. A load that starts
    #: late gets a tenth of it.
    load_timeout_ms: int = 5_000
    #: How long a request that names a prefill server waits for that server to announce its blocks.
    prefill_grace_ms: int = 200
    #: Longest time that a step waits for the blocks it computed to be copied out.
    store_timeout_ms: int = 2_000
    #: Check the payload's checksum on every load.
    verify: bool = True
    #: Copying threads, for stores and loads each. None: by core count.
    io_threads: int | None = None
    #: Load inside the step that needs the KV. The default loads between steps.
    sync_load: bool = False
    #: With ``sync_load``: compute a layer as soon as its KV is there.
    layerwise_load: bool = False
    #: How bytes are moved: by the kind of file system ("auto"), or forced.
    medium: str = "auto"
    #: Size of one segment file. None: 64 MiB, more for a capacity above 64 GiB. At most a quarter of the capacity.
    segment_bytes: int | None = None
    #: "recompute": sets vLLM's kv_load_failure_policy, so that a failed load costs time and not the request.
    load_failure_policy: str = "recompute"
    #: Names the weights, in place of file names, sizes and times. For servers with copies of their own.
    model_identity: str | None = None
    #: Ask vLLM for the layout in which a block is one piece (vLLM 0.29 and newer).
    block_outermost_layout: bool = False

    @property
    def root(self) -> str:
        """The folder that holds kvlane's files."""
        return os.path.join(self.shared_storage_path, "kvlane")

    def native(self) -> dict[str, Any]:
        """What the native backend takes; an option that was not given is left to its default."""
        values = {
            "capacity_bytes": self.capacity_bytes,
            "segment_bytes": self.segment_bytes,
            "io_threads": self.io_threads,
            "verify": self.verify,
            "medium": self.medium,
        }
        return {name: value for name, value in values.items() if value is not None}


def parse_options(extra_config: Mapping[str, Any] | None) -> Options:
    """Reads the options; an unknown name or a value of a wrong kind is a `ConfigError` that says what is allowed."""
    options = Options(**read_options(extra_config, _READERS))
    if options.layerwise_load and not options.sync_load:
        raise ConfigError(
            "layerwise_load is True while sync_load is False, allowed: both True, or layerwise_load False"
        )
    return options


def read_options(
    extra_config: Mapping[str, Any] | None, readers: Mapping[str, Callable[[str, Any], Any]]
) -> dict[str, Any]:
    """Reads every option that is given, each by the reader of its name."""
    given = dict(extra_config or {})
    given.pop(LEGACY, None)
    unknown = sorted(set(given) - set(readers))
    if unknown:
        raise ConfigError(
            f"kv_connector_extra_config has an unknown option '{unknown[0]}' = {shown(given[unknown[0]])}, "
            f"allowed: {', '.join(sorted(readers))}"
        )
    return {name: readers[name](name, value) for name, value in given.items()}


def parse_bytes(name: str, value: Any, low: int = 1, high: int = (1 << 63) - 1) -> int:
    """Reads a number of bytes: 500000000, "500MB", "64GiB" (and the short forms "500M", "64Gi")."""
    total = None
    if isinstance(value, int) and not isinstance(value, bool):
        total = value
    elif isinstance(value, str) and len(value) <= _BYTES_TEXT_MAX:
        match = _BYTES.fullmatch(value.strip())
        if match:
            amount, unit, binary = match.groups()
            scale = (1024 if binary else 1000) ** ("KMGTP".index(unit.upper()) + 1) if unit else 1
            total = round(Decimal(amount) * scale)
    if total is None or not low <= total <= high:
        raise refused(name, value, f'{low} to {high} bytes, as a whole number or a text such as "500MB" or "64GiB"')
    return total


_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kKMGTP])(i?))?B?")
#: Every number of bytes that a machine can have is shorter.
_BYTES_TEXT_MAX = 64
#: An option's value in a message; what is longer is cut.
_SHOWN_MAX = 200


def refused(name: str, value: Any, allowed: str) -> ConfigError:
    """The error for an option with a value that is not allowed."""
    return ConfigError(f"option '{name}' is {shown(value)}, allowed: {allowed}")


def shown(value: Any) -> str:
    """A value as text for a message."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return f"a value of type {type(value).__name__} that cannot be written out"
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."


def read_flag(name: str, value: Any) -> bool:
    """Reads true or false."""
    if not isinstance(value, bool):
        raise refused(name, value, "true or false")
    return value


def read_text(name: str, value: Any) -> str:
    """Reads a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise refused(name, value, "a text that is not empty")
    return value


def read_number(low: int, high: int) -> Callable[[str, Any], int]:
    """A reader of whole numbers in a range."""

    def read(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise refused(name, value, f"a whole number from {low} to {high}")
        return value

    return read


def read_choice(*allowed: str) -> Callable[[str, Any], str]:
    """A reader of one of a few words."""

    def read(name: str, value: Any) -> str:
        if value not in allowed:
            raise refused(name, value, ", ".join(allowed))
        return value

    return read


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "shared_storage_path": read_text,
    "capacity_bytes": functools.partial(parse_bytes, low=1 << 20),
    "load_timeout_ms": read_number(1, 600_000),
    "prefill_grace_ms": read_number(0, 60_000),
    "store_timeout_ms": read_number(1, 600_000),
    "verify": read_flag,
    "io_threads": read_number(1, 64),
    "sync_load": read_flag,
    "layerwise_load": read_flag,
    "medium": read_choice(*MEDIA),
    "segment_bytes": functools.partial(parse_bytes, low=1 << 16, high=1 << 40),
    "load_failure_policy": read_choice(*LOAD_FAILURE_POLICIES),
    "model_identity": read_text,
    "block_outermost_layout": read_flag,
}
