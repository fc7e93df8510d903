"""Old configurations on new vLLM versions.

vLLM 0.32 dropped kv_rank, kv_parallel_size, kv_ip and kv_buffer_size from its KVTransferConfig, and an unknown key ends
the start while arguments are parsed, before any connector runs. Importing this module makes KVTransferConfig take them
again: they are moved to ``kv_connector_extra_config["legacy"]``. Keys that vLLM never knew still fail.

kvlane's plugin does the same, before vLLM parses a command line. Python code that builds a KVTransferConfig first runs
before plugins load, so there ``import kvlane.compat`` has to come first.
"""

import logging
from typing import Any

logger = logging.getLogger("vllm.kvlane")

#: Keys of KVTransferConfig up to vLLM 0.31 that nothing but the old P2pNcclConnector was ever meant to read.
LEGACY_KEYS = ("kv_rank", "kv_parallel_size", "kv_ip", "kv_buffer_size")

#: Where their values are found in ``kv_connector_extra_config``.
LEGACY = "legacy"

_installed = False


def install() -> bool:
    """Makes this process's KVTransferConfig take the old keys; False where it takes them anyway. Twice is fine."""
    global _installed
    if _installed:
        return True
    from vllm.config import KVTransferConfig

    if LEGACY_KEYS[0] in KVTransferConfig.__dataclass_fields__:
        return False
    import pydantic.dataclasses
    from pydantic_core import core_schema

    def schema(cls: type, source: Any, handler: Any) -> Any:
        return core_schema.no_info_before_validator_function(move_legacy_keys, handler(source))

    KVTransferConfig.__get_pydantic_core_schema__ = classmethod(schema)
    try:
        pydantic.dataclasses.rebuild_dataclass(KVTransferConfig, force=True)
    except BaseException:
        del KVTransferConfig.__get_pydantic_core_schema__
        raise
    _installed = True
    return True


def move_legacy_keys(value: Any) -> Any:
    """A configuration's arguments with the old keys moved. They come as a dict (JSON, command line) or as pydantic's
    ArgsKwargs (constructor)."""
    if isinstance(value, dict):
        moved = _moved(value)
        return value if moved is None else moved
    if type(value).__name__ == "ArgsKwargs" and value.kwargs:
        moved = _moved(value.kwargs)
        return value if moved is None else type(value)(value.args, moved)
    return value


def _moved(fields: dict[str, Any]) -> dict[str, Any] | None:
    legacy = {key: fields[key] for key in LEGACY_KEYS if key in fields}
    extra = fields.get("kv_connector_extra_config")
    if not legacy or not (extra is None or isinstance(extra, dict)):
        return None
    kept = {key: value for key, value in fields.items() if key not in legacy}
    kept["kv_connector_extra_config"] = {LEGACY: legacy, **(extra or {})}
    return kept


try:
    install()
except Exception as error:
    logger.warning(
        "kvlane: this vLLM's KVTransferConfig is unknown (%s: %s), so it takes no old keys: %s",
        type(error).__name__,
        error,
        ", ".join(LEGACY_KEYS),
    )
