"""Python's standard library as text: its own source, which every machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from training.data.corpus.parts import Part, check_document_size, grouped

_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}


def stdlib_parts(root: Path) -> tuple[list[Path], list[Part]]:
    """The standard library's .py files, sorted by relative path, one document each, tests included.

    Left out: site-packages and dist-packages, which differ from machine to machine, __pycache__, which holds no source,
    and the few files that are not UTF-8, which are fixtures of the standard library's own tests. So are two that begin
    with a byte order mark; it stays, so that what was prepared is what is prepared.
    """
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT and not name.startswith(".")]
        files += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(".")]
    files = sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(root).as_posix())
    parts = []
    for file in files:
        size = file.stat().st_size
        check_document_size(file, size)
        parts.append(Part(((file, partial(_read_source, file)),), size))
    return files, grouped(parts)


def _read_source(file: Path) -> Iterator[str]:
    raw = file.read_bytes()
    try:
        source = raw.decode()
    except UnicodeDecodeError:
        return
    if "\0" not in source:
        yield source
