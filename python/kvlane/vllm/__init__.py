"""kvlane's connectors for vLLM.

``{"kv_connector": "KvlaneFsConnector", "kv_connector_module_path": "kvlane.vllm", ...}`` works on every supported
vLLM. The name ``ExampleConnector`` with this module path works from vLLM 0.20 on: before, the built-in connector of
that name wins without a word. Installing kvlane is enough either way, because its plugin takes over the name.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlane.vllm.connector import ExampleConnector, KvlaneFsConnector

__all__ = ["ExampleConnector", "KvlaneFsConnector"]


def __getattr__(name: str) -> Any:
    # On first use, because the classes derive from vLLM's: options and identity stay importable without vLLM.
    if name in __all__:
        from kvlane.vllm import connector

        return getattr(connector, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
