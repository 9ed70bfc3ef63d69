"""Text to documents: cut at blank lines, lines, or a separator that the text holds, or not at all."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from training.data.corpus.blocks import Block, block_parts, whole_part
from training.data.corpus.parts import Item, Part, reading
from training.errors import UserError

WAYS = ("auto", "blank-lines", "whole", "lines")
"""What --split-text may be beside a separator of the user's own."""

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")
"""Separators that are looked for in a text, since others' tools write them between documents."""

_BLANK_LINES = r"\n(?:[ \t\r]*\n)+"
_LINE_END = r"\n"


def literal(split_text: str) -> str:
    r"""The separator that --split-text spells, empty where it is one of WAYS. `\n` and `\t` stand for what they do in Python.

    UserError for what can't be a separator, or was probably meant to be one of WAYS.
    """
    if split_text in WAYS:
        return ""
    allowed = f"allowed: {', '.join(WAYS)}, or the characters that separate documents, such as '<|endoftext|>'"
    separator = split_text.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r")
    meant = difflib.get_close_matches(split_text.lower().replace("_", "-"), (*WAYS, "line", "blank-line"), cutoff=0.8)
    if meant or not separator or len(separator.encode()) > 64:
        raise UserError(f"--split-text is {split_text!r}, {allowed} (up to 64 bytes)")
    return separator


def found_separator(text: str) -> str:
    """A separator of others' that a text uses: it stands on a line of its own, or several times and never in quotes."""
    for separator in SEPARATORS:
        escaped = re.escape(separator)
        alone = re.search(rf"^[ \t]*{escaped}[ \t\r]*$", text, re.MULTILINE)
        if alone or (text.count(separator) > 1 and not re.search(rf"[\"'`]{escaped}|{escaped}[\"'`]", text)):
            return separator
    return ""


def pattern_of(way: str, separator: str) -> str:
    """The regular expression at which text is cut; empty for whole files."""
    if separator:
        return re.escape(separator)
    return {"blank-lines": _BLANK_LINES, "lines": _LINE_END, "whole": ""}[way]


def text_parts(path: Path, pattern: str) -> Iterator[Part]:
    """The parts of a text file whose documents end where `pattern` matches; one document where it is empty."""
    with reading(path):
        if pattern:
            yield from block_parts(path, pattern, partial(_split, pattern))
        else:
            yield whole_part(path, _as_it_is)


def _split(pattern: str, block: Block) -> Iterator[Item]:
    for text in re.split(pattern, block.text()):
        yield text.strip("\r\n")


def _as_it_is(block: Block) -> Iterator[Item]:
    yield block.text()
