"""A file that grows by whole pieces: of one that the disk has no room for no part is left behind."""

import contextlib
import os
from pathlib import Path


class AppendedFile:
    """A file to append to, made where there is none. Each piece is the system's at once, so that a kill loses none.

    Raises OSError where it cannot be opened.
    """

    def __init__(self, path: Path):
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - open as long as the run

    def last_byte(self) -> bytes:
        """The last byte that is there; empty where the file is."""
        if not self._file.seek(0, os.SEEK_END):
            return b""
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1)

    def write(self, piece: bytes) -> None:
        """Append a piece. OSError where it did not go in whole; the file is then as it was, and may be tried again."""
        end = os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(piece)
            while left:
                left = left[self._file.write(left) :]  # a nearly full disk takes a part, and refuses only the rest
        except OSError:
            with contextlib.suppress(OSError):  # what is no file of a disk cannot be cut
                self._file.truncate(end)
            raise

    def flush(self) -> None:
        """Nothing: what is written is not kept back."""

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()
