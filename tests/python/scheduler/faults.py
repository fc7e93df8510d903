"""Spoils what is in a store, whatever its file format: blocks are found by their content."""


def corrupt_blocks(store, patterns):
    """Flips a bit of every copy of these byte patterns in the files below `store`; returns how many there were."""
    hits = 0
    for path in sorted(store.rglob("*")):
        if not path.is_file() or path.stat().st_size == 0:
            continue
        with open(path, "r+b") as file:
            content = file.read()
            for pattern in patterns:
                at = content.find(pattern)
                while at >= 0:
                    file.seek(at)
                    file.write(bytes([content[at] ^ 0x10]))
                    hits += 1
                    at = content.find(pattern, at + 1)
    return hits
