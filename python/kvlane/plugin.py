"""Entry point of the group ``vllm.general_plugins``: takes over the connector names that kvlane replaces.

vLLM calls `register` once in every process, before the first look-up of a connector. It only changes the registry:
nothing is imported that is not needed, nothing is started.
"""

import os

#: Connector names that kvlane answers to: taken over where vLLM knows them, added where it does not.
CONNECTOR_NAMES = ("ExampleConnector", "KvlaneFsConnector")

_MODULE = "kvlane.vllm"


def register() -> None:
    """Registers kvlane's connectors with vLLM. ``KVLANE_PLUGIN=0`` in the environment turns it off."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.logger import init_logger

    # A name below vLLM's own logger: it has the handlers, other libraries' loggers have none.
    logger = init_logger("vllm.kvlane")
    if not enabled():
        logger.info("kvlane: KVLANE_PLUGIN=0, so vLLM's own connectors stay")
        return
    registry = KVConnectorFactory._registry
    taken_over = []
    for name in CONNECTOR_NAMES:
        if registry.pop(name, None) is not None:  # register_connector refuses a known name
            taken_over.append(name)
        KVConnectorFactory.register_connector(name, _MODULE, name)
    logger.info("kvlane: %s is registered, taken over from vLLM: %s", ", ".join(CONNECTOR_NAMES), ", ".join(taken_over))


def enabled() -> bool:
    """Whether the environment leaves the plugin on."""
    return os.environ.get("KVLANE_PLUGIN", "1").strip().lower() not in ("0", "false", "off", "no")
