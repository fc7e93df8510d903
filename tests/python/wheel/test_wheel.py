"""Guards what users install: the wheel must load on every glibc from 2.28 (the stock vLLM image has 2.35), under every
Python from 3.10, without vLLM, and carry the licences of what it links."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

ROOT = Path(__file__).resolve().parents[3]
GLIBC_MAX = (2, 28)
# glibc, and the compiler's unwinder that every image with Python has.
LIBRARIES_ALLOWED = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1"}


@pytest.fixture(scope="module")
def wheel() -> Path:
    wheels = list((ROOT / "dist").glob("kvlane-*.whl"))
    assert len(wheels) == 1, f"`make wheel` leaves exactly one wheel in dist, found {wheels}"
    return wheels[0]


@pytest.fixture(scope="module")
def native_module(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        assert names == ["kvlane/_native.abi3.so"]
        return Path(archive.extract(names[0], folder))


def member_text(wheel: Path, suffix: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(suffix)]
        return archive.read(name).decode()


def test_one_wheel_serves_every_python_from_310_on_glibc_228(wheel: Path) -> None:
    version, python, abi, platform = wheel.stem.split("-")[1:]
    assert (python, abi) == ("cp310", "abi3")
    assert re.fullmatch(r"manylinux_2_28_(x86_64|aarch64)", platform)
    assert f"Tag: {python}-{abi}-{platform}" in member_text(wheel, ".dist-info/WHEEL")
    assert f"\nVersion: {version}\n" in member_text(wheel, ".dist-info/METADATA")


def test_the_module_needs_no_symbol_newer_than_its_tag_says(native_module: Path) -> None:
    with native_module.open("rb") as file:
        sections = [section for section in ELFFile(file).iter_sections() if isinstance(section, GNUVerNeedSection)]
        needed = {
            tuple(map(int, match[1].split(".")))
            for section in sections
            for _, versions in section.iter_versions()
            for version in versions
            if (match := re.fullmatch(r"GLIBC_([0-9.]+)", version.name))
        }
    assert needed, "a module that calls libc names its symbol versions"
    assert max(needed) <= GLIBC_MAX


def test_the_module_links_only_libraries_that_every_image_has(native_module: Path) -> None:
    with native_module.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        libraries = {tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"}
    assert "libc.so.6" in libraries
    assert {name for name in libraries if not name.startswith("ld-linux")} <= LIBRARIES_ALLOWED


def test_the_wheel_carries_the_licence_text_of_every_linked_crate(wheel: Path) -> None:
    assert "Apache License" in member_text(wheel, ".dist-info/licenses/LICENSE")
    texts = member_text(wheel, ".dist-info/licenses/THIRD_PARTY_LICENSES")
    # The bill of materials comes from the builder, so it is a second opinion on what is linked.
    bill = json.loads(member_text(wheel, ".cyclonedx.json"))
    linked = {
        f"{part['name']} {part['version']}"
        for part in bill["components"]
        if part["scope"] == "required" and not part["name"].startswith("kvlane-")
    }
    assert {crate.split()[0] for crate in linked} >= {"blake3", "memmap2", "pyo3"}
    missing = {crate for crate in linked if f"\n{crate}: " not in texts or f"\n{crate} (" not in texts}
    assert not missing


def test_the_wheel_registers_the_plugin_and_the_command(wheel: Path) -> None:
    entry_points = member_text(wheel, ".dist-info/entry_points.txt")
    assert re.search(r"\[vllm\.general_plugins\]\s+kvlane ?= ?kvlane\.plugin:register", entry_points)
    assert re.search(r"\[console_scripts\]\s+kvlane ?= ?kvlane\.cli:main", entry_points)
    assert "Requires-Dist" not in member_text(wheel, ".dist-info/METADATA")


def test_a_bare_environment_can_install_import_and_run_it(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=120)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-index", wheel], check=True, timeout=120)

    def run(*command: str | Path) -> str:
        # From a folder without the sources, so that only the installed package can answer.
        finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    origin = run(python, "-c", "import kvlane; print(kvlane.__file__)")
    assert Path(origin.strip()).is_relative_to(environment)
    assert run(python, "-c", "import kvlane; print(kvlane.__version__)").strip() == wheel.stem.split("-")[1]
    assert "store" in run(environment / "bin" / "kvlane", "--help")
