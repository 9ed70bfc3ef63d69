"""Parquet files: one document a row, read some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from training.data.corpus.parts import Item, Part, check_document_size, reading
from training.data.corpus.records import checked, fields_of, given_parts, no_text
from training.errors import UserError

_LARGE_GROUP_BYTES = 8 << 20  # such a row group is read by one process, a part at a time


def parquet_parts(path: Path, field: str | None) -> Iterator[Part]:
    """One part a row group; a large group is a stream of parts."""
    with reading(path), _open(path) as file:
        field, column = text_column(file, path, field)
        for group in range(file.metadata.num_row_groups):
            chunk = file.metadata.row_group(group).column(column)
            read = partial(_read_group, path, group, field)
            if chunk.total_uncompressed_size <= _LARGE_GROUP_BYTES:
                yield Part(((path, read),), chunk.total_uncompressed_size)
            else:
                yield Part(n_bytes=chunk.total_uncompressed_size, stream=(path, partial(_stream, path, read)))


def _open(path: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"--data {path}: .parquet needs pyarrow: pip install triton-llama[parquet]") from error
    try:
        # Buffered, so that a column of gigabytes is read a page at a time instead of whole.
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a parquet file: {error}") from error


def text_column(file, path: Path, field: str | None) -> tuple[str, int]:
    """Name and number of the column that holds the text. UserError unless there is exactly one, and it holds strings."""
    import pyarrow

    names = file.schema_arrow.names
    name = next((name for name in fields_of(field) if name in names), None)
    if name is None:
        raise UserError(f"{path}: {no_text(names, field)}")
    if names.count(name) > 1:
        raise UserError(
            f"{path}: it has {names.count(name)} columns {name!r}, wanted one; name another with --text-field"
        )
    kind = file.schema_arrow.field(name).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(kind) not in ("string", "large_string", "string_view"):
        raise UserError(f"{path}: column {name!r} holds {kind}, wanted string")
    paths = [file.metadata.schema.column(i).path for i in range(len(file.metadata.schema))]
    return name, paths.index(name)


def _read_group(path: Path, group: int, field: str) -> Iterator[Item]:
    with _open(path) as file:
        rows = file.metadata.row_group(group).num_rows
        chunk = file.metadata.row_group(group).column(text_column(file, path, field)[1])
        average = max(1, chunk.total_uncompressed_size // max(1, rows))
        batch_size = min(1024, max(1, (1 << 20) // average))
        number = sum(file.metadata.row_group(before).num_rows for before in range(group))
        for batch in file.iter_batches(batch_size=batch_size, row_groups=[group], columns=[field]):
            for value in batch.column(0):
                number += 1
                text = value.as_py()
                try:
                    if text is not None:
                        check_document_size(path, len(text))
                        text = checked(text, f"column {field!r}")
                    yield text
                except UserError as error:
                    yield UserError(f"{path}, row {number}: {error}")


def _stream(path: Path, read) -> Iterator[Part | UserError]:
    yield from given_parts(path, read())
