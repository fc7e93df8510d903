"""kvlane's connectors for vLLM.

``{"kv_connector": "KvlaneFsConnector", "kv_connector_module_path": "kvlane.vllm", ...}`` works on every supported
vLLM, and so does ``KvlaneP2pConnector``. The names ``ExampleConnector`` and ``P2pNcclConnector`` with this module path
work where vLLM has no built-in connector of that name, or prefers the path (0.20 and newer): before, the built-in one
wins without a word. Installing kvlane is enough either way, because its plugin takes over the names.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlane.vllm.connector import ExampleConnector, KvlaneFsConnector
    from kvlane.vllm.p2p_connector import KvlaneP2pConnector, P2pNcclConnector

__all__ = ["ExampleConnector", "KvlaneFsConnector", "KvlaneP2pConnector", "P2pNcclConnector"]


def __getattr__(name: str) -> Any:
    # On first use, because the classes derive from vLLM's: options and identity stay importable without vLLM.
    if name in ("ExampleConnector", "KvlaneFsConnector"):
        from kvlane.vllm import connector

        return getattr(connector, name)
    if name in ("KvlaneP2pConnector", "P2pNcclConnector"):
        from kvlane.vllm import p2p_connector

        return getattr(p2p_connector, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
