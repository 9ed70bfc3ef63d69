"""A part of a source: what one process reads and encodes at a time, about a megabyte of text."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from lzma import LZMAError
from pathlib import Path
from typing import Literal

from training.errors import UserError

Split = Literal["train", "val"]
Item = str | UserError | None
"""What reading gives: a document, a mistake in one record, or None for a record without text."""

PART_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 64 << 20
HASH_RANGE = 1 << 64


@dataclass
class Report:
    """What was left out while parts were read: records without text, and what could not be read, a line each."""

    without_text: int = 0
    n_bad: int = 0
    bad: list[str] = field(default_factory=list)

    def add(self, other: Report, most: int) -> None:
        """Take in another report, and of what could not be read no more than `most` lines and their number."""
        self.without_text += other.without_text
        self.n_bad += other.n_bad
        self.bad += other.bad[: max(0, most - len(self.bad))]

    def left_out(self, error: UserError) -> None:
        """Count and keep what could not be read."""
        self.n_bad += 1
        self.bad.append(str(error))


@dataclass(frozen=True)
class Part:
    """A piece of a source, read as a whole by one process.

    Attributes:
        reads: files, or ranges of them, each with what yields its `Item`s: a partial of a module-level function, so that
            it pickles.
        n_bytes: about how much text it holds, for the progress bar.
        val_below: documents whose hash is below this are validation: 0 for none, 2**64 for all.
        skip_bad: leave out, and report, what can't be read.
        stream: instead of `reads`, yields the parts of a file that has to be read from its beginning.
        separator: what documents are cut at within an item, a record of several.
    """

    reads: tuple[tuple[Path, Callable[[], Iterator[Item]]], ...] = ()
    n_bytes: int = 0
    val_below: int = 0
    skip_bad: bool = False
    stream: tuple[Path, Callable[[], Iterator[Part]]] | None = None
    separator: str = ""

    def documents(self, report: Report | None = None) -> Iterator[tuple[Split, str]]:
        """Yield (split, text) in the order of the source; what holds nothing but white space is no document.

        Raises UserError for what can't be read, unless `skip_bad`; `report` then says what was left out.
        """
        report = report or Report()
        for part in self.pieces(report):
            for path, read in part.reads:
                for item in self._guarded(path, read, report):
                    if item is None:
                        report.without_text += 1
                        continue
                    for text in item.split(self.separator) if self.separator else (item,):
                        if text.strip():
                            yield ("val" if text_hash(text) < self.val_below else "train"), text

    def pieces(self, report: Report) -> Iterator[Part]:
        """The part itself, or those of its stream, each of which some process can read for itself."""
        if self.stream is None:
            yield self
            return
        for piece in self._guarded(*self.stream, report):
            yield replace(piece, val_below=self.val_below, skip_bad=self.skip_bad, separator=self.separator)

    def _guarded(self, path: Path, read: Callable[[], Iterator], report: Report) -> Iterator:
        """What `read` yields. This is the one place where a file of the user's is read, so that all errors are met alike."""
        try:
            with reading(path):
                for item in read():
                    if isinstance(item, UserError):
                        if not self.skip_bad:
                            raise item
                        report.left_out(item)
                    else:
                        yield item
        except UserError as error:
            if not self.skip_bad:
                raise
            report.left_out(error)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the system or a library says of a file that it can't read into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, ValueError, RecursionError, MemoryError, zlib.error, LZMAError) as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # by kind, without importing the libraries that have it: they are optional
        if type(error).__module__.partition(".")[0] in ("pyarrow", "zstandard", "compression", "zstd"):
            raise _unreadable(path, error) from error
        raise


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return UserError(f"{path} can't be read: {reason}")


def grouped(parts: Iterable[Part]) -> list[Part]:
    """Small neighbours made one, so that a folder of many files is not as many parts."""
    result: list[Part] = []
    reads: list = []
    n_bytes = 0
    for part in parts:
        if part.stream is None:
            reads += part.reads
            n_bytes += part.n_bytes
        if reads and (n_bytes >= PART_BYTES or part.stream is not None):
            result.append(Part(tuple(reads), n_bytes))
            reads, n_bytes = [], 0
        if part.stream is not None:
            result.append(part)
    return [*result, Part(tuple(reads), n_bytes)] if reads else result


def text_hash(text: str) -> int:
    """A number in [0, 2**64) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def check_document_size(path: Path, size: int) -> None:
    """UserError for a document that is too large: it is held in memory, several times."""
    if size > MAX_DOCUMENT_BYTES:
        raise UserError(f"{path} holds a document of {size:,} bytes, allowed: up to {MAX_DOCUMENT_BYTES:,}; split it")
