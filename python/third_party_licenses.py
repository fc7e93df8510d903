"""Collects the licence texts of everything that is linked into the native module.

    python third_party_licenses.py --output THIRD_PARTY_LICENSES

Walks the locked dependency graph of crates/py along normal dependencies, for the platforms that wheels are built for,
and takes the licence files out of the crates' own sources. Fails when a crate offers no text.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"]
LICENSE_FILE = re.compile(r"^(licen[cs]es?|copying|copyright|notice|unlicense)([-._].*)?$", re.IGNORECASE)
RULE = "=" * 100


def metadata(target: str) -> dict[str, Any]:
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", target]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def linked_packages() -> dict[str, dict[str, Any]]:
    """Packages by id. Procedural macros count too: the code that they write is linked. Build scripts do not."""
    found: dict[str, dict[str, Any]] = {}
    for target in TARGETS:
        graph = metadata(target)
        packages = {package["id"]: package for package in graph["packages"]}
        nodes = {node["id"]: node for node in graph["resolve"]["nodes"]}
        todo = [package["id"] for package in graph["packages"] if package["name"] == "kvlane-py"]
        if not todo:
            raise SystemExit("the workspace has no package kvlane-py")
        while todo:
            identity = todo.pop()
            if packages[identity]["source"] is not None:
                if identity in found:
                    continue
                found[identity] = packages[identity]
            for dependency in nodes[identity]["deps"]:
                if any(kind["kind"] is None for kind in dependency["dep_kinds"]):
                    todo.append(dependency["pkg"])
    return found


def license_texts(folder: Path, named: str | None) -> dict[str, str]:
    """Licence texts of a crate by file name, from its root and a `LICENSES` folder."""
    candidates = [path for path in sorted(folder.iterdir()) if path.is_file() and LICENSE_FILE.match(path.name)]
    for subfolder in ("LICENSES", "licenses"):
        if (folder / subfolder).is_dir():
            candidates += sorted(path for path in (folder / subfolder).iterdir() if path.is_file())
    if named and (folder / named).is_file() and folder / named not in candidates:
        candidates.append(folder / named)
    return {path.name: path.read_text(encoding="utf-8", errors="replace").strip() for path in candidates}


def standard_library() -> tuple[str, dict[str, str]]:
    """The Rust library is linked too; its licences lie in the toolchain."""
    version = subprocess.run(["rustc", "--version"], check=True, capture_output=True, text=True).stdout.strip()
    sysroot = subprocess.run(["rustc", "--print", "sysroot"], check=True, capture_output=True, text=True).stdout.strip()
    folder = Path(sysroot, "share", "doc", "rust")
    texts = {}
    for name in ("licenses/MIT.txt", "licenses/Apache-2.0.txt", "licenses/LLVM-exception.txt"):
        if (folder / name).is_file():
            texts[Path(name).name] = (folder / name).read_text(encoding="utf-8").strip()
    return f"The Rust standard library ({version})", texts


def render() -> tuple[str, int]:
    apache = (ROOT / "LICENSE").read_text(encoding="utf-8").strip()
    listing: list[str] = []
    owners_of: dict[str, list[str]] = defaultdict(list)
    without: list[str] = []
    packages = sorted(linked_packages().values(), key=lambda package: (package["name"], package["version"]))
    for package in packages:
        title = f"{package['name']} {package['version']}"
        expression = package["license"] or f"see file {package['license_file']}"
        listing.append(f"{title}: {expression}" + (f", {package['repository']}" if package["repository"] else ""))
        texts = license_texts(Path(package["manifest_path"]).parent, package["license_file"])
        # Some crates leave the text at the root of a larger repository. Apache-2.0 has one wording for all.
        if not texts and "Apache-2.0" in expression:
            texts = {"LICENSE": apache}
        if not texts:
            without.append(f"{title} ({expression})")
        for name, text in texts.items():
            owners_of[text].append(f"{title} ({name})")
    if without:
        raise SystemExit("no licence text found for: " + ", ".join(without))

    name, texts = standard_library()
    listing.append(f"{name}: MIT OR Apache-2.0, https://github.com/rust-lang/rust")
    for file_name, text in (texts or {"Apache-2.0.txt": apache}).items():
        owners_of[text].append(f"{name} ({file_name})")

    parts = [
        "The native module of kvlane links the packages below. kvlane itself is under Apache-2.0; see LICENSE.",
        "\n".join(listing),
    ]
    for text, owners in sorted(owners_of.items(), key=lambda item: item[1]):
        parts.append(f"{RULE}\n" + "\n".join(owners) + f"\n{RULE}\n\n{text}")
    return "\n\n".join(parts) + "\n", len(packages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output: Path = parser.parse_args().output
    text, count = render()
    output.write_text(text, encoding="utf-8")
    print(f"kvlane: {output}: licences of {count} crates and of the Rust library", file=sys.stderr)


if __name__ == "__main__":
    main()
