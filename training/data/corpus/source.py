"""Open a source: its files, how they are cut into documents, and which of these are kept for validation.

A source is cut into parts of about a megabyte, each a callable that pickles, so that worker processes share the reading
and no large file is ever held whole. A document belongs to the validation split when the hash of its text is below a
threshold: where it stands in the source does not matter, and two copies of it can't end up on both sides.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from training.data.corpus import text
from training.data.corpus.files import SourceFile, find_files, first_names, look_into, one_kind, written_by_a_run
from training.data.corpus.parquet import parquet_parts
from training.data.corpus.parts import HASH_RANGE, Part, Report, Split, grouped, reading, text_hash
from training.data.corpus.records import array_parts, fields_of, jsonl_parts, no_text
from training.data.corpus.stdlib import stdlib_parts
from training.data.corpus.text import found_separator, literal, pattern_of, text_parts
from training.data.corpus.tinystories import tinystories_files
from training.errors import UserError

HASHED_BYTES = 256 << 20
_LOOKED_AT = 1 << 18  # characters of the first records


@dataclass(frozen=True)
class Corpus:
    """An opened source.

    Attributes:
        name: "stdlib", "tinystories" or the name of the file or folder.
        fingerprint: SHA-256 (hex) of the source and of the options that shape its documents. Sources up to 256 MiB are
            hashed whole; of larger ones names, sizes and modification times are.
        parts: all of its text, in order.
        cut: how it becomes documents, in words.
        bad: what was left out while it was opened, a line each.
    """

    name: str
    fingerprint: str
    parts: tuple[Part, ...]
    cut: str
    bad: tuple[str, ...] = ()

    def documents(self, split: Split, max_parts: int | None = None) -> Iterator[str]:
        """Yield the documents of a split; with `max_parts`, those of that many parts, evenly spaced over the source.

        Of a file that can only be read from its beginning, which is one part, it is the first so many megabytes.
        """
        stride = 1 if max_parts is None else -(-len(self.parts) // max_parts)
        for part in self.parts[::stride]:
            for piece in itertools.islice(part.pieces(Report()), max_parts):
                yield from (document for its_split, document in piece.documents() if its_split == split)


def open_corpus(
    data: str,
    *,
    split_text: str = "auto",
    text_field: str | None = None,
    val_fraction: float = 0.05,
    data_files: str = "",
    skip_bad: bool = False,
    download_dir: Path = Path("data"),
) -> Corpus:
    """Open a source and decide its split; nothing is read but what the fingerprint and the split need.

    Args:
        data: "stdlib", "tinystories", or the path of a file or folder. What a file holds decides how it is read: JSON
            records (one a line, or an array) and parquet rows are a document each, and anything else is taken as UTF-8
            text; each may be compressed (gzip, bzip2, xz, zstd). A folder holds one kind. `./stdlib` means a path.
        split_text: how text becomes documents: "blank-lines", "lines", "whole" (one a file), or a separator. "auto" is at
            a separator that others use, such as <|endoftext|>, where the text holds it, else "blank-lines"; in a folder
            the last two are "whole". Records are cut at a separator only.
        text_field: field of a record or column of a parquet file; by default `text` or `story`.
        val_fraction: share of the documents kept for validation, above 0 and below 1. Each split gets at least one.
        data_files: of a folder, the files whose name or path in it matches, as "*.jsonl"; empty: all.
        skip_bad: leave out what can't be read.
        download_dir: where tinystories is kept.

    Raises:
        UserError: no such source, binary or malformed content, or fewer than two different documents.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction is {val_fraction}, allowed: above 0 and below 1")
    separator = literal(split_text)
    bad: list[str] = []
    extras = ["without what is bad"] if skip_bad else []
    root = Path(data)
    with reading(root):
        if data == "tinystories":
            return _open_tinystories(download_dir)
        if data == "stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            paths, parts = stdlib_parts(root)
            cut = "a file a document"
        elif not root.exists():
            raise UserError(f"--data {data}: no such file or folder; allowed: stdlib, tinystories or a path")
        else:
            files = _files(root, data_files, text_field, split_text != "auto", skip_bad, bad)
            paths = [file.path for file in files]
            parts, cut, found = _parts_of(root, files, split_text, separator, text_field, skip_bad, bad)
            extras += found
        parts = [replace(part, skip_bad=skip_bad) for part in parts]
        report = Report()
        if data != "stdlib" and not _has_text(parts, report):
            names = first_names(files[0].path, files[0].kind) if files[0].kind in ("jsonl", "array") else []
            if names and not set(names) & set(fields_of(text_field)):
                raise UserError(f"{files[0].path}: {no_text(names, text_field)}")
            if report.bad:
                raise _nothing_left(root, report.bad)
        val_below = _val_threshold(parts, val_fraction, data)
        parts = tuple(replace(part, val_below=val_below) for part in parts)
        # As it was before there was "auto", so that what was prepared then is found.
        options = ["blank-lines" if split_text == "auto" else split_text, text_field, val_fraction, *extras]
        name = data if data == "stdlib" else root.resolve().name
        return Corpus(name, _fingerprint(paths, root, options), parts, cut, tuple(bad))


def _files(
    root: Path, pattern: str, field: str | None, as_text: bool, skip_bad: bool, bad: list[str]
) -> list[SourceFile]:
    """The files of a path, looked into; what can't be read is raised, or added to `bad`."""
    if not root.is_dir() and not root.is_file():
        raise UserError(f"--data {root} is a pipe or a device, which can be read only once; wanted a file or a folder")
    if root.is_dir() and (what := written_by_a_run(set(os.listdir(root)))):
        raise UserError(f"--data {root} is {what}; name the text itself, in a folder of its own")
    if pattern and not root.is_dir():
        raise UserError(f"--data-files {pattern}: --data {root} is a file; it chooses files of a folder")
    files = []
    for found in find_files(root, pattern) if root.is_dir() else [root]:
        try:
            if isinstance(found, UserError):
                raise found
            files.append(look_into(found, field, as_text=as_text, alone=not root.is_dir()))
        except UserError as error:
            if not skip_bad:
                raise
            bad.append(str(error))
    if bad and not files:
        raise _nothing_left(root, bad)
    if not files:
        raise UserError(
            f"--data {root}: empty, it holds no files" + (f" that match --data-files {pattern}" * bool(pattern))
        )
    one_kind(root, files)
    if not as_text and all(file.is_json and file.kind == "text" for file in files):
        raise UserError(
            f"--data {root}: its files are JSON, and no record begins {files[0].path.name} with a text: "
            f"{no_text(first_names(files[0].path, 'array'), field)}, or train on JSON as it is with --split-text whole"
        )
    return files


def _parts_of(
    root: Path,
    files: list[SourceFile],
    split_text: str,
    separator: str,
    field: str | None,
    skip_bad: bool,
    bad: list[str],
) -> tuple[list[Part], str, list[str]]:
    """The parts of files of one kind, how they are cut in words, and what of that is new to the fingerprint."""
    kind = files[0].kind
    extras = ["no byte order mark"] if any(file.has_mark for file in files) else []
    if kind == "text":
        way = split_text
        if split_text == "auto":
            separator = next((file.separator for file in files if file.separator), "")
        if split_text in ("auto", "blank-lines"):
            way = "whole" if root.is_dir() else "blank-lines"
        if separator or way == "lines":
            extras.append(f"cut at {separator or 'lines'}")
        pattern = pattern_of(way, separator)
        cut = {"blank-lines": "cut at blank lines", "lines": "a line a document"}.get(way, "a file a document")
        if separator:
            cut = f"cut at {separator!r}"
        elif left := next((file.separator for file in files if file.separator), ""):
            cut += f", {left!r} left in it as --split-text {split_text} says"
        read = {"text": partial(text_parts, pattern=pattern)}
    else:
        cut = f"a record a document, its {' or '.join(map(repr, fields_of(field)))}"
        if root.is_dir() or (kind, root.suffix) not in (("jsonl", ".jsonl"), ("parquet", ".parquet")):
            extras.append(kind)
        if split_text in ("blank-lines", "lines"):
            cut += f" (--split-text {split_text} cuts text, not records)"
        kinds = {"jsonl": jsonl_parts, "array": array_parts, "parquet": parquet_parts}
        read = {kind: partial(reader, field=field) for kind, reader in kinds.items()}
    parts: list[Part] = []
    for file in files:
        try:
            parts += read[file.kind](file.path)
        except UserError as error:
            if not skip_bad:
                raise
            bad.append(str(error))
    # Row groups stay apart, as they were when what is prepared already was made: the tokenizer is trained on some of them.
    parts = parts if kind == "parquet" else grouped(parts)
    if kind != "text" and (separator or (split_text == "auto" and (separator := _separator_in(parts, skip_bad)))):
        extras.append(f"records cut at {separator}")
        cut += f", cut at {separator!r}"
        parts = [replace(part, separator=separator) for part in parts]
    return parts, cut, extras


def _separator_in(parts: list[Part], skip_bad: bool) -> str:
    """A separator of others' that the first records use, as `found_separator`: they were text once."""
    head, length = [], 0
    for _, document in itertools.chain.from_iterable(replace(part, skip_bad=skip_bad).documents() for part in parts):
        head.append(document)
        length += len(document)
        if length > _LOOKED_AT:
            break
    return found_separator("\n".join(head))


def _has_text(parts: list[Part], report: Report | None = None) -> bool:
    return any(True for part in parts for _ in part.documents(report))


def _nothing_left(root: Path, bad: list[str]) -> UserError:
    return UserError(f"--data {root}: --skip-bad-files leaves nothing of it: {bad[0]}")


def _val_threshold(parts: list[Part], val_fraction: float, data: str) -> int:
    """The threshold that keeps `val_fraction` of the documents, moved where it would leave a split empty.

    Reads until both splits have a document: a few dozen of them in all but tiny sources.
    """
    threshold = int(val_fraction * HASH_RANGE)
    lowest, highest = HASH_RANGE, -1
    for part in parts:
        for _, document in part.documents():
            value = text_hash(document)
            lowest, highest = min(lowest, value), max(highest, value)
            if lowest < threshold <= highest:
                return threshold
    if highest < 0:
        raise UserError(f"--data {data}: empty, it holds no text")
    if lowest == highest:
        raise UserError(
            f"--data {data}: it holds one document, and training and validation need two different ones; a text file "
            "has one a paragraph with --split-text blank-lines, one a line with --split-text lines, a folder one a file"
        )
    return lowest + 1 if threshold <= lowest else highest


def _fingerprint(paths: list[Path], root: Path, options: list) -> str:
    sizes = [path.stat().st_size for path in paths]
    digest = hashlib.sha256(json.dumps(options).encode())
    for path, size in zip(paths, sizes, strict=True):
        digest.update(f"\n{path.relative_to(root).as_posix()} {size} ".encode(errors="surrogateescape"))
        if sum(sizes) > HASHED_BYTES:
            digest.update(str(path.stat().st_mtime_ns).encode())
        else:
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _open_tinystories(download_dir: Path) -> Corpus:
    parts: list[Part] = []
    files = tinystories_files(download_dir)
    for file, val_below in zip(files, (0, HASH_RANGE), strict=True):  # it has a validation file of its own
        its_parts = [
            replace(part, val_below=val_below) for part in text_parts(file, pattern_of("", text.SEPARATORS[0]))
        ]
        if not _has_text(its_parts):
            raise UserError(f"--data tinystories: {file} is empty; delete it to download it again")
        parts += its_parts
    return Corpus(
        "tinystories", _fingerprint(files, files[0].parent, []), tuple(parts), f"cut at {text.SEPARATORS[0]!r}"
    )
