"""Records of JSON: one a line (.jsonl, .ndjson), an array of them (.json), or on as many lines as they take."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from training.data.corpus import parts
from training.data.corpus.blocks import Block, block_parts, open_stream
from training.data.corpus.parts import Item, Part, check_document_size, reading
from training.errors import UserError

TEXT_FIELDS = ("text", "story")
_READ_CHARACTERS = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")  # what stands between the records of an array


def jsonl_parts(path: Path, field: str | None) -> Iterator[Part]:
    """The parts of a file of one record a line."""
    with reading(path):
        yield from block_parts(path, r"\n", partial(_read_lines, field))


def _read_lines(field: str | None, block: Block) -> Iterator[Item]:
    for index, line in enumerate(block.text().split("\n")):
        if line.strip():
            try:
                yield text_of(json.loads(line), field)
            except (ValueError, RecursionError) as error:
                yield UserError(f"{block.path}, line {block.line_number(index)}: {error}")


def fields_of(field: str | None) -> tuple[str, ...]:
    """Names under which a record may have its text: the one of --text-field, or those that are usual."""
    return TEXT_FIELDS if field is None else (field,)


def text_of(record: object, field: str | None) -> str | None:
    """The text of a record; None where it has none. UserError for what is no record, or has no string for its text."""
    if not isinstance(record, dict):
        raise UserError(f"a {type(record).__name__}, wanted an object with a text field")
    name = next((name for name in fields_of(field) if record.get(name) is not None), None)
    return None if name is None else checked(record[name], f"field {name!r}")


def checked(text: object, where: str) -> str | None:
    """A text that can be written as UTF-8; None for one that holds nothing but white space. UserError for anything else."""
    if not isinstance(text, str):
        raise UserError(f"{where} is a {type(text).__name__}, wanted a string")
    if "\0" in text:
        raise UserError(f"{where} is binary: it holds a NUL")
    try:
        text.encode()  # JSON can spell half of a surrogate pair
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {error}") from error
    return text if text.strip() else None


def no_text(names: list[str], field: str | None) -> UserError:
    """What to say where records of these names have no text."""
    return UserError(
        f"no field {' or '.join(fields_of(field))}, it has {', '.join(map(str, names)) or 'none'}; name one with --text-field"
    )


# An array, or records of several lines, read as a stream ------------------------------------------------------------


def array_parts(path: Path, field: str | None) -> Iterator[Part]:
    """The parts of a file that is one JSON array of records, or records behind each other, which is never held whole."""
    yield Part(n_bytes=path.stat().st_size, stream=(path, partial(_read_array, path, field)))


def _read_array(path: Path, field: str | None) -> Iterator[Part | UserError]:
    yield from given_parts(path, _texts_of_array(path, field))


def given_parts(path: Path, items: Iterator[Item]) -> Iterator[Part | UserError]:
    """Parts that hold their documents, about a megabyte each, of a file that only one process can read."""
    batch: list[str | None] = []
    size = 0
    for item in items:
        if isinstance(item, UserError):
            yield item
            continue
        batch.append(item)
        size += len(item or "")
        if size >= parts.PART_BYTES:
            yield Part(((path, partial(iter, batch)),), size)
            batch, size = [], 0
    if batch:
        yield Part(((path, partial(iter, batch)),), size)


def _texts_of_array(path: Path, field: str | None) -> Iterator[Item]:
    for number, record in enumerate(records_of(path), 1):
        try:
            yield text_of(record, field)
        except UserError as error:
            yield UserError(f"{path}, record {number}: {error}")


def records_of(path: Path) -> Iterator[object]:
    """The elements of a JSON array, or objects that stand behind each other. UserError for anything else, and for two arrays."""
    decoder, count = json.JSONDecoder(), 0
    with open_stream(path) as raw:
        characters = codecs.getreader("utf-8-sig")(raw)
        text = characters.read(_READ_CHARACTERS).lstrip()
        is_array = text.startswith("[")
        if not is_array and not text.startswith("{"):
            raise UserError(f"{path} holds no records: it begins with {text[:20]!r}")
        at = int(is_array)
        while True:
            at = _BETWEEN.match(text, at).end()
            if at == len(text) and not is_array:
                if not (text := characters.read(_READ_CHARACTERS)):
                    return
                at = 0
                continue
            if is_array and text.startswith("]", at):
                behind = text[at + 1 :]
                while not behind.strip() and (behind := characters.read(_READ_CHARACTERS)):
                    pass
                if left := behind.strip()[:20]:
                    raise UserError(
                        f"{path} goes on behind its array, with {left!r}; wanted one array, or a record a line"
                    )
                return
            try:
                record, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                # Is it a mistake, or does the record go on in what was not read yet?
                mistake = error.pos < len(text) - 64 and not error.msg.startswith("Unterminated string")
                text, at = text[at:], 0
                more = "" if mistake else characters.read(max(_READ_CHARACTERS, len(text)))
                if not more:
                    raise UserError(f"{path}, record {count + 1}: {error.msg}") from error
                text += more
                check_document_size(path, len(text) - _READ_CHARACTERS)
                continue
            count += 1
            yield record
