"""The files of a source: found in a folder, and looked into, since what a file holds decides how it is read, not its name."""

from __future__ import annotations

import codecs
import fnmatch
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from training.data.corpus.blocks import compression, open_stream
from training.data.corpus.parts import reading
from training.data.corpus.records import fields_of, no_text, records_of
from training.data.corpus.text import found_separator
from training.errors import UserError

_HEAD_BYTES = 1 << 18
_JSON = {".json", ".jsonl", ".ndjson"}
_COMPRESSED = {".gz", ".zst", ".zstd", ".bz2", ".xz"}


@dataclass(frozen=True)
class SourceFile:
    """A file and what it holds.

    Attributes:
        path: the file.
        kind: "text", "jsonl" (a record a line), "array" (of records, or records of several lines) or "parquet".
        separator: what separates the documents of a text file, where it holds a separator that others use.
        has_mark: whether it begins with a byte order mark.
        compressed: with what, empty for a plain file.
        is_json: whether its name and its beginning say that it is JSON, also where it is taken as text.
    """

    path: Path
    kind: str
    separator: str = ""
    has_mark: bool = False
    compressed: str = ""
    is_json: bool = False


def look_into(path: Path, field: str | None, *, as_text: bool = False, alone: bool = True) -> SourceFile:
    """What a file holds, by its first bytes and then by its name. UserError for one that can't be read.

    as_text: whoever said how text is to be cut wants text that happens to be JSON to be text, unless its name says JSON.
    alone: not one of a folder, where a .json without texts may be a text among others.
    """
    with reading(path):
        packed = compression(path)
        with open_stream(path) as file:
            raw = file.read(_HEAD_BYTES)
        names = [suffix.lower() for suffix in path.suffixes]
        suffix = next((name for name in reversed(names) if not (packed and name in _COMPRESSED)), "")
        if raw.startswith(b"PAR1") or suffix == ".parquet":
            if packed:
                raise UserError(f"{path} is a parquet file in {packed}: uncompress it, parquet is compressed inside")
            return SourceFile(path, "parquet")
        has_mark = raw.startswith(codecs.BOM_UTF8)
        head = codecs.getincrementaldecoder("utf-8-sig")("replace").decode(raw)
        opening = head.lstrip()[:1]
        is_json = suffix == ".json" and opening in ("[", "{")
        kind, names = _records(path, opening) if suffix in _JSON or not as_text else ("", [])
        has_text = any(name in names for name in fields_of(field))
        if suffix in (".jsonl", ".ndjson"):
            kind = kind or "jsonl"
        elif is_json and alone:
            if opening == "{" and kind != "jsonl" and not has_text:
                raise UserError(f"{path}: {no_text(names, field)}; wanted records, one a line or an array of them")
            kind = kind or "array"
        elif not has_text:
            kind = "text"
        return SourceFile(path, kind, found_separator(head) if kind == "text" else "", has_mark, packed, is_json)


def _records(path: Path, opening: str) -> tuple[str, list[str]]:
    """How the records of JSON lie in a file, "jsonl" or "array", and the names in the first; ("", []) for any other text."""
    for kind in {"{": ("jsonl", "array"), "[": ("array",)}.get(opening, ()):
        if names := first_names(path, kind):
            return kind, names
    return "", []


def first_names(path: Path, kind: str) -> list[str]:
    """The names in the first record of JSON; none where it begins with anything else."""
    try:
        if kind == "array":
            with closing(records_of(path)) as records:
                record = next(records, None)
        else:
            with open_stream(path) as file:
                record = json.loads(file.readline(_HEAD_BYTES).decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return []
    return list(record) if isinstance(record, dict) else []


def find_files(root: Path, pattern: str = "") -> Iterator[Path | UserError]:
    """The files under a folder, sorted by relative path, and what can't be followed, as the UserError to raise or report.

    Hidden files and folders, and __pycache__, are left out: they are rarely text; and what a run or a preparation has written
    (`written_by_a_run`), which would else be text of the next. Links are followed, each folder once.
    pattern: only files whose name or relative path matches, as a shell would.
    """
    seen: set[tuple[int, int]] = set()
    found: list[Path] = []
    faults: list[UserError] = []

    def visit(folder: Path) -> None:
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                return
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError as error:
            faults.append(UserError(f"{folder} can't be read: {error.strerror or error}"))
            return
        if folder != root and written_by_a_run(set(names)):
            return
        for name in names:
            path = folder / name
            if name.startswith(".") or name == "__pycache__":
                continue
            if path.is_dir():
                visit(path)
            elif path.is_file():
                relative = path.relative_to(root).as_posix()
                if not pattern or fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(relative, pattern):
                    found.append(path)
            elif path.is_symlink():
                faults.append(UserError(f"{path} is a link to {os.readlink(path)}, which is not there"))

    visit(root)
    yield from faults
    yield from sorted(found, key=lambda path: path.relative_to(root).as_posix())


def written_by_a_run(names: set[str]) -> str:
    """What a folder of these files is, where a run has written it or tokens were prepared there; empty for any other."""
    marks = {
        "the folder of a run": {"config.toml", "metrics.jsonl"},
        "a prepared text": {"manifest.json", "train-00000.bin"},
    }
    return next((what for what, mark in marks.items() if mark <= names), "")


def one_kind(root: Path, files: list[SourceFile]) -> None:
    """UserError, with the way on, unless all files hold the same: text, JSON records or parquet."""
    kinds = {file.path: {"jsonl": "JSON records", "array": "JSON records"}.get(file.kind, file.kind) for file in files}
    counts = Counter(kinds.values())
    if len(counts) > 1:
        first = {kind: next(path for path in kinds if kinds[path] == kind) for kind in counts}
        held = ", ".join(f"{count} of {kind} (such as {first[kind].name})" for kind, count in counts.most_common())
        sizes: Counter[str] = Counter()
        for path, kind in kinds.items():
            sizes[kind] += path.stat().st_size
        suffix = first[sizes.most_common(1)[0][0]].suffix  # a card and an index are small beside the text of a set
        raise UserError(
            f"--data {root}: a folder is read as one kind, and the files of this one are {held}; "
            f"say which to read, for instance --data-files '*{suffix}'"
        )
