"""Text sources: the documents of a run, and which of them are kept for validation.

A source is cut into parts of about a megabyte, each a callable that pickles, so that worker processes share the reading
and no large file is ever held whole. A document belongs to the validation split when the hash of its text is below a
threshold: where it stands in the source does not matter, and two copies of it can't end up on both sides.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from training.errors import UserError

Split = Literal["train", "val"]

PART_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 64 << 20  # sentencepiece takes about 60 bytes of memory for a byte of the document it encodes
HASHED_BYTES = 256 << 20

_HASH_RANGE = 1 << 64
_BLANK_LINES = r"\n(?:[ \t\r]*\n)+"
_LINE_END = r"\n"
_STORY_END = re.escape("<|endoftext|>")
_TEXT_FIELDS = ("text", "story")


@dataclass(frozen=True)
class Part:
    """A piece of a source, read as a whole by one process.

    Attributes:
        read: yields the documents of the piece; a partial of a module-level function, so that it pickles.
        n_bytes: about how much text it holds, for the progress bar.
        val_below: documents whose hash is below this are validation: 0 for none, 2**64 for all.
    """

    read: Callable[[], Iterator[str]]
    n_bytes: int
    val_below: int = 0

    def documents(self) -> Iterator[tuple[Split, str]]:
        """Yield (split, text) in the order of the source; what holds nothing but white space is no document."""
        for text in self.read():
            if text.strip():
                yield ("val" if _text_hash(text) < self.val_below else "train"), text


@dataclass(frozen=True)
class Corpus:
    """An opened source.

    Attributes:
        name: "stdlib", "tinystories" or the name of the file or folder.
        fingerprint: SHA-256 (hex) of the source and of the options that shape its documents. Sources up to 256 MiB are
            hashed whole; of larger ones names, sizes and modification times are.
        parts: all of its text, in order.
    """

    name: str
    fingerprint: str
    parts: tuple[Part, ...]

    def documents(self, split: Split, max_parts: int | None = None) -> Iterator[str]:
        """Yield the documents of a split; with `max_parts`, those of that many parts, evenly spaced over the source."""
        stride = 1 if max_parts is None else -(-len(self.parts) // max_parts)
        for part in self.parts[::stride]:
            yield from (text for its_split, text in part.documents() if its_split == split)


def open_corpus(
    data: str,
    *,
    split_text: Literal["blank-lines", "whole"] = "blank-lines",
    text_field: str | None = None,
    val_fraction: float = 0.05,
    download_dir: Path = Path("data"),
) -> Corpus:
    """Open a source and decide its split; nothing is read but what the fingerprint and the split need.

    Args:
        data: "stdlib", "tinystories", or the path of a folder (one document a file), of a .jsonl or .parquet file (one
            document a row), or of any other file, which is taken as UTF-8 text. `./stdlib` means a path of that name.
        split_text: how a text file becomes documents; files of a folder are always whole.
        text_field: field of a .jsonl row or column of a .parquet file; by default `text` or `story`.
        val_fraction: share of the documents kept for validation, above 0 and below 1. Each split gets at least one.
        download_dir: where tinystories is kept.

    Raises:
        UserError: no such source, binary or malformed content, or fewer than two different documents.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction is {val_fraction}, allowed: above 0 and below 1")
    if split_text not in ("blank-lines", "whole"):
        raise UserError(f"--split-text is {split_text!r}, allowed: blank-lines, whole")
    try:
        if data == "tinystories":
            return _open_tinystories(download_dir)
        if data == "stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            files, parts = _stdlib(root)
            name = data
        else:
            root = Path(data)
            if not root.exists():
                raise UserError(f"--data {data}: no such file or folder; allowed: stdlib, tinystories or a path")
            files, parts = _open_path(root, split_text, text_field)
            name = root.resolve().name
        val_below = _val_threshold(parts, val_fraction, data)
        parts = tuple(Part(part.read, part.n_bytes, val_below) for part in parts)
        return Corpus(name, _fingerprint(files, root, [split_text, text_field, val_fraction]), parts)
    except OSError as error:
        raise UserError(f"--data {data}: {error}") from error


def _text_hash(text: str) -> int:
    """A number in [0, 2**64) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _val_threshold(parts: list[Part], val_fraction: float, data: str) -> int:
    """The threshold that keeps `val_fraction` of the documents, moved where it would leave a split empty.

    Reads until both splits have a document: a few dozen of them in all but tiny sources.
    """
    threshold = int(val_fraction * _HASH_RANGE)
    lowest, highest = _HASH_RANGE, -1
    for part in parts:
        for _, text in part.documents():
            value = _text_hash(text)
            lowest, highest = min(lowest, value), max(highest, value)
            if lowest < threshold <= highest:
                return threshold
    if highest < 0:
        raise UserError(f"--data {data}: empty, it holds no text")
    if lowest == highest:
        raise UserError(
            f"--data {data}: it holds one document, and training and validation need two different ones; "
            "a text file has one a paragraph with --split-text blank-lines, a folder one a file"
        )
    return lowest + 1 if threshold <= lowest else highest


def _fingerprint(files: list[Path], root: Path, options: list) -> str:
    sizes = [file.stat().st_size for file in files]
    digest = hashlib.sha256(json.dumps(options).encode())
    for file, size in zip(files, sizes, strict=True):
        digest.update(f"\n{file.relative_to(root).as_posix()} {size} ".encode(errors="surrogateescape"))
        if sum(sizes) > HASHED_BYTES:
            digest.update(str(file.stat().st_mtime_ns).encode())
        else:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


# Folders ----------------------------------------------------------------------------------------------------------


def _stdlib(root: Path) -> tuple[list[Path], list[Part]]:
    """The standard library's .py files, sorted by relative path, one document each, tests included.

    Left out: site-packages and dist-packages, which differ from machine to machine, __pycache__, which holds no source,
    and the few files that are not UTF-8, which are fixtures of the standard library's own tests.
    """
    files = _sorted_files(root, {"site-packages", "dist-packages", "__pycache__"}, suffix=".py")
    return files, _file_parts(files, skip_undecodable=True)


def _open_path(path: Path, split_text: str, text_field: str | None) -> tuple[list[Path], list[Part]]:
    if path.is_dir():
        # Hidden files are rarely text: .git alone would make a folder of source code unusable.
        files = _sorted_files(path, {"__pycache__"})
        return files, _file_parts(files, skip_undecodable=False)
    if path.suffix == ".parquet":
        return [path], _parquet_parts(path, text_field)
    if path.suffix == ".jsonl":
        ranges = _ranges(path, _LINE_END)
        return [path], [Part(partial(_read_jsonl, path, *span, text_field), span[1] - span[0]) for span in ranges]
    if split_text == "whole":
        return [path], _file_parts([path], skip_undecodable=False)
    return [path], _text_parts(path, _BLANK_LINES)


def _sorted_files(root: Path, left_out: set[str], suffix: str = "") -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out and not name.startswith(".")]
        files += [Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
    return sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(root).as_posix())


def _file_parts(files: list[Path], skip_undecodable: bool) -> list[Part]:
    parts, group, group_bytes = [], [], 0
    for file in files:
        size = file.stat().st_size
        _check_document_size(file, size)
        group.append(file)
        group_bytes += size
        if group_bytes >= PART_BYTES or file is files[-1]:
            parts.append(Part(partial(_read_files, tuple(group), skip_undecodable), group_bytes))
            group, group_bytes = [], 0
    return parts


def _read_files(files: tuple[Path, ...], skip_undecodable: bool) -> Iterator[str]:
    for file in files:
        try:
            yield _decode(file.read_bytes(), file)
        except UserError:
            if not skip_undecodable:
                raise


# Files of many documents ------------------------------------------------------------------------------------------


def _text_parts(path: Path, separator: str) -> list[Part]:
    return [Part(partial(_read_text, path, *span, separator), span[1] - span[0]) for span in _ranges(path, separator)]


def _read_text(path: Path, start: int, stop: int, separator: str) -> Iterator[str]:
    for text in re.split(separator, _decode(_read_range(path, start, stop), path, start)):
        yield text.strip("\r\n")


def _read_jsonl(path: Path, start: int, stop: int, field: str | None) -> Iterator[str]:
    raw = _read_range(path, start, stop)
    for index, line in enumerate(_decode(raw, path, start).split("\n")):
        if not line.strip():
            continue
        try:
            yield _text_of_row(json.loads(line), field)
        except (ValueError, RecursionError) as error:
            # A part does not know how many lines come before it, so they are counted, now that the number is needed.
            number = _count_lines(path, start) + index + 1
            raise UserError(f"{path}, line {number}: {error}") from error


def _text_of_row(row: object, field: str | None) -> str:
    if not isinstance(row, dict):
        raise UserError(f"a {type(row).__name__}, wanted an object with a text field")
    field = _pick_field(list(row), field)
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"field {field!r} is a {type(text).__name__}, wanted a string")
    if "\0" in text:
        raise UserError(f"field {field!r} is binary: it holds a NUL")
    text.encode()  # raises UnicodeEncodeError, a ValueError, where JSON spelled half of a surrogate pair
    return text


def _pick_field(names: list[str], field: str | None) -> str:
    for wanted in _TEXT_FIELDS if field is None else (field,):
        if wanted in names:
            return wanted
    wanted = " or ".join(_TEXT_FIELDS) if field is None else field
    raise UserError(f"no field {wanted}, it has {', '.join(map(str, names)) or 'none'}; name one with --text-field")


def _ranges(path: Path, separator: str) -> list[tuple[int, int]]:
    """Cut a file into byte ranges of about PART_BYTES that start right after a separator, which is ASCII."""
    pattern = re.compile(separator.encode())
    size = path.stat().st_size
    ranges, start = [], 0
    with path.open("rb") as file:
        while start < size:
            stop = _after_next_separator(file, start + PART_BYTES, pattern) or size
            _check_document_size(path, stop - start)
            ranges.append((start, stop))
            start = stop
    return ranges


def _after_next_separator(file, offset: int, pattern: re.Pattern[bytes]) -> int | None:
    file.seek(offset)
    window = b""
    while block := file.read(1 << 16):
        window = window[-64:] + block  # with the end of the last block: a separator may lie across the two
        if match := pattern.search(window):
            return file.tell() - len(window) + match.end()
    return None


def _read_range(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def _count_lines(path: Path, stop: int) -> int:
    with path.open("rb") as file:
        return sum(file.read(min(1 << 20, stop - at)).count(b"\n") for at in range(0, stop, 1 << 20))


def _decode(raw: bytes, path: Path, offset: int = 0) -> str:
    """Decode without translating line ends, so that the text is the file to the byte."""
    if (nul := raw.find(b"\0")) >= 0:
        raise UserError(f"{path} is binary: it holds a NUL at byte {offset + nul}; wanted UTF-8 text")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        at = error.start
        message = f"{path} is binary or of another encoding: 0x{raw[at]:02x} at byte {offset + at}; wanted UTF-8 text"
        raise UserError(message) from error


def _check_document_size(path: Path, size: int) -> None:
    if size > MAX_DOCUMENT_BYTES:
        raise UserError(f"{path} holds a document of {size:,} bytes, allowed: up to {MAX_DOCUMENT_BYTES:,}; split it")


# Parquet ----------------------------------------------------------------------------------------------------------


def _parquet_parts(path: Path, field: str | None) -> list[Part]:
    """One part a row group."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"--data {path}: .parquet needs pyarrow: pip install triton-llama[parquet]") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a parquet file: {error}") from error
    try:
        field = _pick_field(schema.names, field)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column {field!r} holds {kind}, wanted string")
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    return [Part(partial(_read_parquet, path, group, field), size) for group, size in enumerate(sizes)]


def _read_parquet(path: Path, group: int, field: str) -> Iterator[str]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[field]):
            for text in batch.column(0).to_pylist():
                if text is not None and "\0" in text:
                    raise UserError(f"{path}: column {field!r} is binary: it holds a NUL")
                yield text or ""


# TinyStories ------------------------------------------------------------------------------------------------------


def _open_tinystories(download_dir: Path) -> Corpus:
    """TinyStories (arXiv 2305.07759), the GPT-4 part of version 2, with its own validation file."""
    parts, files = [], []
    for split, val_below in (("train", 0), ("valid", _HASH_RANGE)):
        file = _download(f"TinyStoriesV2-GPT4-{split}.txt", download_dir)
        files.append(file)
        its_parts = [Part(part.read, part.n_bytes, val_below) for part in _text_parts(file, _STORY_END)]
        if not any(text for part in its_parts for _, text in part.documents()):
            raise UserError(f"--data tinystories: {file} is empty; delete it to download it again")
        parts += its_parts
    return Corpus("tinystories", _fingerprint(files, files[0].parent, []), tuple(parts))


def _download(filename: str, download_dir: Path) -> Path:
    file = download_dir / filename
    if file.exists():  # a download in progress has another name
        return file
    try:
        import huggingface_hub

        return Path(
            huggingface_hub.hf_hub_download(
                repo_id="roneneldan/TinyStories", filename=filename, repo_type="dataset", local_dir=download_dir
            )
        )
    except Exception as error:  # which classes it raises depends on its version and on its HTTP library's
        raise UserError(f"--data tinystories: {filename} can't be downloaded to {download_dir}: {error}") from error
