"""Whether token shards are still those that were prepared: a run on others would go on in silence."""

import hashlib
from pathlib import Path

from training.errors import UserError

BLOCK_BYTES, BLOCKS = 64 << 10, 256


def digest(path: Path) -> str:
    """SHA-256 (hex) of a file's size and of 256 blocks of 64 KiB, evenly spaced from end to end: up to 16 MiB, all of it.

    A larger file is not read whole, as that would take minutes at each start of a run on a large text: what is noticed there is
    another file of the same size, not every changed byte.
    """
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= BLOCKS * BLOCK_BYTES:
            found.update(file.read())
        else:
            for i in range(BLOCKS):
                file.seek(i * (size - BLOCK_BYTES) // (BLOCKS - 1))
                found.update(file.read(BLOCK_BYTES))
    return found.hexdigest()


def check(folder: Path, digests: dict[str, str]) -> None:
    """UserError, naming the first, where files of a folder have other digests than these."""
    for name, wanted in digests.items():
        if digest(folder / name) != wanted:
            raise UserError(f"{folder / name} is not the file that was prepared: its content has changed")
