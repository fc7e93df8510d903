"""The kv-transfer-config of the tests: kvlane behind the names that manifests already use."""

import uuid

# Names that the plugin takes over or adds; the second way in is kv_connector_module_path.
NAME = "ExampleConnector"
OWN_NAME = "KvlaneFsConnector"
MODULE = "kvlane.vllm"
P2P_NAME = "P2pNcclConnector"
OWN_P2P_NAME = "KvlaneP2pConnector"

STORE_CAPACITY = "512MiB"


def transfer_config(role, store, *, name=NAME, by_module_path=False, **options):
    """kv-transfer-config as a dict. `role`: producer, consumer or both; `options` go to kv_connector_extra_config."""
    extra = {"shared_storage_path": str(store), "capacity_bytes": STORE_CAPACITY, **options}
    config = {"kv_connector": name, "kv_role": f"kv_{role}", "kv_connector_extra_config": extra}
    return _by_path(config) if by_module_path else config


def p2p_config(role, kv_port, *, name=P2P_NAME, by_module_path=False, **options):
    """The same for the hand-over from server to server; rank r listens on `kv_port` + r."""
    config = {"kv_connector": name, "kv_role": f"kv_{role}", "kv_port": kv_port, "kv_connector_extra_config": options}
    return _by_path(config) if by_module_path else config


def _by_path(config):
    return {**config, "kv_connector_module_path": MODULE}


def transfer_id(prefill_address, decode_address):
    """A fresh X-Request-Id for both calls of a hand-over, as the proxy makes it. Addresses are HOST:PORT."""
    return f"___prefill_addr_{prefill_address}___decode_addr_{decode_address}_{uuid.uuid4().hex}"
