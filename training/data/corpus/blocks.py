"""Blocks of a file's bytes, about a megabyte each and cut where a document ends: ranges of a plain file, or read one after
another from a compressed one.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from training.data.corpus import parts
from training.data.corpus.parts import Item, Part, check_document_size
from training.errors import UserError

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # which begins as UTF-16's does
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_READ_BYTES = 1 << 16
_ZSTD_BYTES = 1 << 10  # of them, blocks of 128 KiB in four bytes each come to 32 MiB at most
_OVERLAP = 64  # a separator is no longer than this


@dataclass(frozen=True)
class Block:
    """Bytes of a file that hold whole documents.

    Attributes:
        path: the file.
        start: where they begin in it, uncompressed.
        stop: where they end.
        content: the bytes; None where whoever needs them reads them from the file.
        first_line: number of the first line; 0 where nobody has counted.
    """

    path: Path
    start: int
    stop: int
    content: bytes | None = None
    first_line: int = 0

    def text(self) -> str:
        """The text, without translating line ends and without a byte order mark. UserError for what is no UTF-8."""
        raw = self.content
        if raw is None:
            with self.path.open("rb") as file:
                file.seek(self.start)
                raw = file.read(self.stop - self.start)
        return decode(raw, self.path, self.start)

    def line_number(self, index: int) -> int:
        """The number in the file, from 1, of the block's line of that index, from 0."""
        if self.first_line:
            return self.first_line + index
        with self.path.open("rb") as file:  # counted now that the number is needed
            blocks = range(0, self.start, 1 << 20)
            return 1 + index + sum(file.read(min(1 << 20, self.start - at)).count(b"\n") for at in blocks)


Read = Callable[[Block], Iterator[Item]]
"""What makes documents of a block."""


def block_parts(path: Path, separator: str, read: Read) -> Iterator[Part]:
    """The parts of a file that is cut after a separator, a regular expression: ranges of it, or a stream where it is compressed."""
    if compression(path):
        yield Part(n_bytes=path.stat().st_size, stream=(path, partial(_streamed_parts, path, separator, read)))
        return
    for start, stop in _ranges(path, separator):
        yield Part(((path, partial(read, Block(path, start, stop))),), stop - start)


def whole_part(path: Path, read: Read) -> Part:
    """A file that is one block, compressed or not."""
    size = path.stat().st_size
    if not compression(path):
        check_document_size(path, size)
    return Part(((path, partial(_read_whole, path, read)),), size)


def _read_whole(path: Path, read: Read) -> Iterator[Item]:
    with open_stream(path) as file:
        raw = file.read(parts.MAX_DOCUMENT_BYTES + 1)
    check_document_size(path, len(raw))
    yield from read(Block(path, 0, len(raw), raw, first_line=1))


# Compressed files -------------------------------------------------------------------------------------------------


def compression(path: Path) -> str:
    """What a file is compressed with, by its first bytes; empty for a plain one."""
    with path.open("rb") as file:
        head = file.read(8)
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


@contextmanager
def open_stream(path: Path, raw: BinaryIO | None = None) -> Iterator[BinaryIO]:
    """The bytes of a file, uncompressed. UserError where a library that this needs is not installed."""
    kind = compression(path)
    with raw or path.open("rb") as file:
        if kind == "zstd":
            stream = _open_zstd(path, file)
        elif kind:
            opener = {"gzip": gzip.GzipFile, "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}[kind]
            stream = opener(fileobj=file) if kind == "gzip" else opener(file)
        else:
            stream = file
        with stream:
            yield stream


def _open_zstd(path: Path, file: BinaryIO) -> BinaryIO:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path} is compressed with zstd, which needs: pip install triton-llama[zstd]") from error
    return io.BufferedReader(_ZstdStream(file, zstandard.ZstdDecompressor()))


class _ZstdStream(io.RawIOBase):
    """Frames of zstd, one after another. EOFError within one: the library's own stream takes a file cut short for a whole one."""

    def __init__(self, file: BinaryIO, decompressor):
        self._file, self._decompressor = file, decompressor
        self._frame: Any = None  # the library's object for the frame that is begun
        self._packed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._plain:
            self._packed = self._packed or self._file.read(_ZSTD_BYTES)
            if not self._packed and self._frame:
                raise EOFError("Compressed file ended within a frame")
            if not self._packed:
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._plain, self._packed = self._frame.decompress(self._packed), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count


def _streamed_parts(path: Path, separator: str, read: Read) -> Iterator[Part]:
    start, line, compressed = 0, 1, 0
    with path.open("rb") as raw, open_stream(path, raw) as file:
        for content in _cut(path, file, re.compile(separator.encode())):
            block = Block(path, start, start + len(content), content, line)
            start, line = block.stop, line + content.count(b"\n")
            compressed, former = raw.tell(), compressed
            yield Part(((path, partial(read, block)),), compressed - former)


def _cut(path: Path, file: BinaryIO, pattern: re.Pattern[bytes]) -> Iterator[bytes]:
    """The bytes of a stream, cut where `_ranges` would cut a file."""
    buffer, looked_at = bytearray(), parts.PART_BYTES
    while block := file.read(_READ_BYTES):
        buffer += block
        while match := pattern.search(buffer, looked_at):
            check_document_size(path, match.end())
            yield bytes(buffer[: match.end()])
            del buffer[: match.end()]
            looked_at = parts.PART_BYTES
        looked_at = max(parts.PART_BYTES, len(buffer) - _OVERLAP)
        check_document_size(path, len(buffer))
    if buffer:
        yield bytes(buffer)


# Plain files ------------------------------------------------------------------------------------------------------


def _ranges(path: Path, separator: str) -> list[tuple[int, int]]:
    """Cut a file into byte ranges of about PART_BYTES that start right after a separator."""
    pattern = re.compile(separator.encode())
    size = path.stat().st_size
    ranges, start = [], 0
    with path.open("rb") as file:
        while start < size:
            stop = _after_next_separator(file, start + parts.PART_BYTES, pattern) or size
            check_document_size(path, stop - start)
            ranges.append((start, stop))
            start = stop
    return ranges


def _after_next_separator(file: BinaryIO, offset: int, pattern: re.Pattern[bytes]) -> int | None:
    file.seek(offset)
    window = b""
    while block := file.read(_READ_BYTES):
        window = window[-_OVERLAP:] + block  # with the end of the last block: a separator may lie across the two
        if match := pattern.search(window):
            return file.tell() - len(window) + match.end()
    return None


def decode(raw: bytes, path: Path, offset: int = 0) -> str:
    """Decode without translating line ends, so that the text is the file to the byte, but for a byte order mark in front."""
    if offset == 0 and (encoding := next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "")):
        raise UserError(f"{path} is {encoding}, wanted UTF-8; iconv -f {encoding.lower()} -t utf-8 makes it that")
    if (nul := raw.find(b"\0")) >= 0:
        raise UserError(f"{path} is binary: it holds a NUL at byte {offset + nul}; wanted UTF-8 text")
    mark = len(codecs.BOM_UTF8) if offset == 0 and raw.startswith(codecs.BOM_UTF8) else 0
    try:
        return raw[mark:].decode()
    except UnicodeDecodeError as error:
        at = mark + error.start
        message = f"{path} is binary or of another encoding: 0x{raw[at]:02x} at byte {offset + at}; wanted UTF-8 text"
        raise UserError(message) from error
