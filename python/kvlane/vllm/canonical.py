"""One text for equal configurations, in every process and whatever the order of their keys."""

import dataclasses
import json
from typing import Any

# Parts of a model's configuration that say where it came from or how it is run, not what it computes.
_VOLATILE_CONFIG_KEYS = {"_name_or_path", "transformers_version", "_attn_implementation", "_commit_hash"}


def config_dict(config: Any) -> dict[str, Any]:
    """A model configuration without what does not change the model."""
    values = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
    return _without_volatile(values)


def canonical_json(value: Any) -> str:
    """One text for equal values, whatever the order of their keys."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"))


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_volatile(v) for k, v in value.items() if k not in _VOLATILE_CONFIG_KEYS}
    return value


def _plain(value: Any) -> Any:
    """Turns whatever a configuration holds into what JSON has, never into text with an address in it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump") and not isinstance(value, type):
        return _plain(value.model_dump())
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if hasattr(value, "to_dict"):
        return _plain(config_dict(value))
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text
