"""kvlane: KV-cache transfer between vLLM servers at memory speed."""

from kvlane._native import ConfigError, KvlaneError, StoreError, __version__

__all__ = ["ConfigError", "KvlaneError", "StoreError", "__version__"]
