"""The kv-transfer-config of the tests: kvlane behind the name that manifests already use."""

# Names that the plugin takes over or adds; the second way in is kv_connector_module_path.
NAME = "ExampleConnector"
OWN_NAME = "KvlaneFsConnector"
MODULE = "kvlane.vllm"

STORE_CAPACITY = "512MiB"


def transfer_config(role, store, *, name=NAME, by_module_path=False, **options):
    """kv-transfer-config as a dict. `role`: producer, consumer or both; `options` go to kv_connector_extra_config."""
    extra = {"shared_storage_path": str(store), "capacity_bytes": STORE_CAPACITY, **options}
    config = {"kv_connector": name, "kv_role": f"kv_{role}", "kv_connector_extra_config": extra}
    if by_module_path:
        config["kv_connector_module_path"] = MODULE
    return config
