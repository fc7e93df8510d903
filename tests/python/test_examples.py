"""Guards the examples: they are the first thing that users copy."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvlane import ConfigError
from kvlane.vllm.options import parse_options
from kvlane.vllm.p2p_options import parse_p2p_options

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "examples/kv-transfer-config").glob("*.json"))


def test_the_python_round_trip_moves_every_byte(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples/roundtrip.py", tmp_path]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "2 blocks ready" in finished.stdout
    assert "every byte equal" in finished.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_is_accepted_by_vllm_and_names_a_connector_of_kvlane(path: Path) -> None:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from kvlane.plugin import register

    given = json.loads(path.read_text())
    if "kv_connector_module_path" not in given:
        register()
    config = KVTransferConfig(**given)
    connector = KVConnectorFactory.get_connector_class(config)
    assert connector.__module__.split(".")[0] == "kvlane"
    if "P2p" in given["kv_connector"]:
        parse_p2p_options(config.kv_connector_extra_config)
    else:
        assert parse_options(config.kv_connector_extra_config).shared_storage_path == "/kv_cache"


def test_the_files_of_one_folder_agree_on_its_capacity() -> None:
    given = [json.loads(path.read_text()) for path in CONFIGS]
    given = [config["kv_connector_extra_config"] for config in given if "P2p" not in config["kv_connector"]]
    limits = {parse_options(options).capacity_bytes for options in given if "capacity_bytes" in options}
    assert limits == {64 << 30}


def test_a_misspelt_option_in_a_copied_file_is_refused() -> None:
    given = json.loads((ROOT / "examples/kv-transfer-config/fs-decode.json").read_text())
    extra = given["kv_connector_extra_config"]
    with pytest.raises(ConfigError, match="capacity_byte"):
        parse_options({**extra, "capacity_byte": extra.pop("capacity_bytes")})


def test_the_table_beside_the_config_files_lists_them_all() -> None:
    table = (ROOT / "examples/kv-transfer-config/README.md").read_text()
    for path in CONFIGS:
        if path.stem.startswith("before-"):
            continue
        assert f"`{path.name}`" in table


def test_every_config_block_of_the_readme_parses() -> None:
    blocks = re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        parse_options(json.loads(block)["kv_connector_extra_config"])


def test_the_readme_lists_every_option() -> None:
    import dataclasses

    from kvlane.vllm.options import Options

    readme = (ROOT / "README.md").read_text()
    for field in dataclasses.fields(Options):
        assert f"| `{field.name}` |" in readme, field.name


def test_the_page_of_the_p2p_connector_lists_every_option() -> None:
    import dataclasses

    from kvlane.vllm.p2p_options import P2pOptions

    page = (ROOT / "docs/p2p.md").read_text()
    for field in dataclasses.fields(P2pOptions):
        assert re.search(rf"^\|.*`{field.name}`.*\|.*\|", page, re.MULTILINE), field.name
