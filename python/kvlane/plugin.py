"""Entry point of the group ``vllm.general_plugins``: takes over the connector names that kvlane replaces.

vLLM calls `register` once in every process, before it parses a command line and before the first look-up of a
connector. It only changes the registry and what the configuration accepts: nothing is imported that is not needed,
nothing is started.
"""

import logging
import os

#: Connector names that kvlane answers to: taken over where vLLM knows them, added where it does not.
CONNECTOR_NAMES = ("ExampleConnector", "KvlaneFsConnector", "KvlaneP2pConnector", "P2pNcclConnector")

_MODULE = "kvlane.vllm"


def register() -> None:
    """Registers kvlane's connectors with vLLM. ``KVLANE_PLUGIN=0`` in the environment turns it off.

    vLLM calls this at every start, with or without a connector: whatever goes wrong, it must be able to start.
    """
    # A name below vLLM's own logger: it has the handlers, other libraries' loggers have none.
    logger = logging.getLogger("vllm.kvlane")
    if not enabled():
        logger.info("kvlane: KVLANE_PLUGIN=0, so vLLM's own connectors stay")
        return
    _accept_old_keys()
    try:
        taken_over = _take_over()
    except Exception as error:
        logger.warning(
            "kvlane: this vLLM is unknown (%s: %s), so no connector is registered; 'kv_connector_module_path': '%s' "
            "may still work",
            type(error).__name__,
            error,
            _MODULE,
        )
        return
    logger.info("kvlane: %s is registered, taken over from vLLM: %s", ", ".join(CONNECTOR_NAMES), ", ".join(taken_over))


def _accept_old_keys() -> None:
    """Manifests for the old P2pNcclConnector hold keys that end the start of vLLM 0.32 and newer."""
    try:
        from kvlane import compat  # its import does it, and says so if it cannot

        compat.install()
    except Exception as error:
        logging.getLogger("vllm.kvlane").debug("kvlane: no old keys are accepted: %s", error)


def _take_over() -> list[str]:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    registry = KVConnectorFactory._registry
    before = dict(registry)
    try:
        for name in CONNECTOR_NAMES:
            registry.pop(name, None)  # register_connector refuses a known name
            KVConnectorFactory.register_connector(name, _MODULE, name)
    except Exception:
        registry.update(before)
        raise
    return [name for name in CONNECTOR_NAMES if name in before]


def enabled() -> bool:
    """Whether the environment leaves the plugin on."""
    return os.environ.get("KVLANE_PLUGIN", "1").strip().lower() not in ("0", "false", "off", "no")
